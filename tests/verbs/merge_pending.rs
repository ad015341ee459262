//! What may be done with the images of a merge that was killed, by the programs; and abandoning it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::daemon::Daemon;
use crate::common::digest;
use crate::common::temp::scratch;
use crate::common::tool::{DIFFDISKD, Finished, diffdisk, run};
use crate::failpoints;

/// Root, parent, child and grandchild in a folder, with data.
struct PendingFixture(tempfile::TempDir);

impl PendingFixture {
    fn new() -> PendingFixture {
        let stage = PendingFixture(scratch("pending"));
        diffdisk(["create".into(), stage.at("parent"), "--size=8M".into()]).ok();
        let create = |name: &str, parent: &str| {
            diffdisk(["create".into(), stage.at(name), "--parent".into(), stage.at(parent)]).ok();
        };
        create("child", "parent");
        let daemon = Daemon::start(&stage.at("child"), &[]);
        let mut guest = daemon.connect();
        // Enough for a record of progress in the middle.
        for at in (0..40u64).chain(80..120) {
            guest.write(at << 16, &[7; 64 << 10]).expect("it is written");
        }
        guest.flush().expect("it is flushed");
        drop(guest);
        daemon.stop();
        create("grand", "child");
        stage
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(format!("{name}.vhd"))
    }

    fn args(&self) -> [PathBuf; 2] {
        ["merge".into(), self.at("child")]
    }

    fn abandon(&self) -> Finished {
        diffdisk(["merge".into(), self.at("child"), "--abandon".into()])
    }

    fn merge_records(&self) -> usize {
        let names = fs::read_dir(self.0.path()).expect("the folder").flatten();
        names.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "merge")).count()
    }

    /// Whether each verb that reads the image refuses it as partly overwritten; all must agree.
    fn is_refused(&self, name: &str) -> bool {
        let (path, other) = (self.at(name), self.0.path().join("made"));
        let verbs: [Vec<PathBuf>; 5] = [
            vec!["map".into(), path.clone()],
            vec!["convert".into(), path.clone(), other.clone(), "--to=raw".into()],
            vec!["compare".into(), path.clone(), path.clone()],
            vec!["compare".into(), self.at("grand"), path.clone()],
            vec!["create".into(), other.clone(), "--parent".into(), path.clone()],
        ];
        let mut refused = Vec::new();
        for args in &verbs[..4] {
            let done = diffdisk(args);
            assert!(matches!(done.code, Some(0 | 1 | 5)), "{args:?}: {done:?}");
            refused.push(done.code == Some(1));
            assert_eq!(done.code == Some(1), done.stderr.contains("partly overwritten"), "{args:?}: {done:?}");
            let _ = fs::remove_file(&other);
        }
        let socket = format!("--socket-path={}", self.0.path().join("s").display());
        let mut daemon = Command::new(DIFFDISKD);
        let blk_file = format!("--blk-file={}", path.display());
        if refused[0] {
            let served = run(daemon.args([socket, blk_file, "--read-only".into()]), Duration::from_secs(60));
            assert!(served.code == Some(1) && served.stderr.contains("partly overwritten"), "{served:?}");
            assert_eq!(diffdisk(&verbs[4]).code, Some(1));
        } else {
            Daemon::start(&path, &["--read-only"]).stop();
        }
        assert!(refused.iter().all(|r| *r == refused[0]), "{refused:?}");
        refused[0]
    }
}

fn shown(path: &Path) -> String {
    digest::sha256_of_disk(path)
}

#[test]
fn a_half_merged_image_is_read_only_below_child() {
    for (point, refused) in
        [("merge.begun", false), ("merge.copying", true), ("merge.noted", true), ("merge.marked", false)]
    {
        let stage = PendingFixture::new();
        let before = shown(&stage.at("grand"));
        assert!(failpoints::killed(point, 1, stage.args()), "{point}");
        assert_eq!(stage.is_refused("parent"), refused, "{point}");
        assert!(!stage.is_refused("child") && !stage.is_refused("grand"), "{point}");
        // Headers may be looked at, with one warning that names the command.
        for verb in ["info", "check"] {
            let done = diffdisk([PathBuf::from(verb), stage.at("parent")]);
            let command = format!("`diffdisk merge {}`", stage.at("child").canonicalize().unwrap().display());
            assert_eq!(done.stderr.matches(&command).count(), 1, "{point}, {verb}: {done:?}");
            assert!(matches!(done.code, Some(0 | 4)), "{point}, {verb}: {done:?}");
        }
        let made = stage.0.path().join("made.vhd");
        let create = diffdisk(["create".into(), made, "--parent".into(), stage.at("parent")]);
        assert_eq!(create.code, Some(1), "{point}: a second child would stop the merge");
        assert_eq!(shown(&stage.at("grand")), before, "{point}");
        diffdisk(stage.args()).ok();
        assert_eq!((shown(&stage.at("grand")), stage.merge_records()), (before, 0), "{point}");
        assert!(!stage.is_refused("parent"), "{point}: it is whole again");
    }
}

#[test]
fn verbs_that_would_stop_the_merge_are_refused() {
    for point in ["merge.begun", "merge.noted", "merge.marked"] {
        let stage = PendingFixture::new();
        assert!(failpoints::killed(point, 1, stage.args()), "{point}");
        let (parent, child) = (stage.at("parent"), stage.at("child"));
        let verbs: [Vec<PathBuf>; 6] = [
            vec!["compact".into(), parent.clone()],
            vec!["resize".into(), parent.clone(), "9M".into()],
            vec!["resize".into(), child.clone(), "9M".into()],
            vec!["flatten".into(), child.clone()],
            vec!["rebase".into(), child.clone(), "--parent".into(), parent.clone()],
            vec!["rebase".into(), child.clone(), "--unsafe".into(), "--parent".into(), parent.clone()],
        ];
        for args in verbs {
            let done = diffdisk(&args);
            assert!(
                done.code == Some(1) && done.stderr.contains("was begun: finish that first"),
                "{point}, {args:?}: {done:?}"
            );
        }
        diffdisk(stage.args()).ok();
        assert_eq!(stage.merge_records(), 0);
    }
}

#[test]
fn abandoned_and_finished_after_all() {
    for point in [failpoints::of("abandon"), vec!["none".into()]].concat() {
        for (at, partial) in [("merge.begun", false), ("merge.noted", true), ("merge.marked", false)] {
            let stage = PendingFixture::new();
            let before = shown(&stage.at("grand"));
            assert!(failpoints::killed(at, 1, stage.args()), "{at}");
            let args = [PathBuf::from("merge"), stage.at("child"), "--abandon".into()];
            failpoints::killed(&point, 1, args);
            let again = stage.abandon();
            let when = format!("{at}, {point}: {again:?}");
            assert!(again.code == Some(0) || again.stderr.contains("no merge of it was begun"), "{when}");
            assert_eq!((stage.is_refused("parent"), stage.merge_records()), (partial, usize::from(partial)), "{when}");
            assert_eq!(shown(&stage.at("grand")), before, "{when}");
            if partial {
                // CHILD may be used, and be made independent of what is damaged.
                diffdisk(["compact".into(), stage.at("child")]).ok();
                diffdisk(["compact".into(), stage.at("parent")]).ok();
            }
            diffdisk(stage.args()).ok();
            assert_eq!((shown(&stage.at("grand")), stage.merge_records()), (before, 0), "{when}");
            assert!(!stage.is_refused("parent"), "{when}");
        }
    }
}

#[test]
fn no_state_is_left_only_by_deleting_a_hidden_file() {
    // The receiver is given up.
    let stage = PendingFixture::new();
    let before = shown(&stage.at("grand"));
    assert!(failpoints::killed("merge.noted", 1, stage.args()));
    stage.abandon().ok();
    diffdisk(["flatten".into(), stage.at("child")]).ok();
    assert!(stage.is_refused("parent"), "it is damaged for ever");
    fs::remove_file(stage.at("parent")).unwrap();
    stage.abandon().ok();
    assert_eq!((stage.merge_records(), shown(&stage.at("grand"))), (0, before));
    // CHILD is gone, and a backup of the receiver is there again.
    let stage = PendingFixture::new();
    let backup = fs::read(stage.at("parent")).unwrap();
    assert!(failpoints::killed("merge.noted", 1, stage.args()));
    fs::remove_file(stage.at("child")).unwrap();
    let refused = stage.abandon();
    if refused.code == Some(1) {
        assert!(refused.stderr.contains("restore"), "{refused:?}");
        fs::remove_file(stage.at("parent")).unwrap();
        fs::write(stage.at("parent"), backup).unwrap();
        stage.abandon().ok();
    }
    assert_eq!(stage.merge_records(), 0);
    diffdisk(["map".into(), stage.at("parent")]).ok();
    // A record that cannot be read: with CHILD the merge begins again, without it the record goes.
    for gone in [false, true] {
        let stage = PendingFixture::new();
        assert!(failpoints::killed(if gone { "merge.layer-removed" } else { "merge.noted" }, 1, stage.args()));
        let entries = fs::read_dir(stage.0.path()).unwrap().flatten().map(|entry| entry.path());
        let note = entries.into_iter().find(|path| path.extension().is_some_and(|e| e == "merge")).expect("a record");
        fs::write(note, "diffdisk merge 3\n").unwrap();
        if gone {
            stage.abandon().ok()
        } else {
            diffdisk(stage.args()).ok()
        };
        assert_eq!(stage.merge_records(), 0);
        diffdisk(["map".into(), stage.at("parent")]).ok();
    }
}
