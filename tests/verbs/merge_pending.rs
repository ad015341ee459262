//! Images after a killed merge, with the real programs: the verbs that are allowed, and abandoning the merge.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::daemon::Daemon;
use crate::common::digest;
use crate::common::temp::scratch;
use crate::common::tool::{DIFFDISKD, Finished, diffdisk, run};
use crate::failpoints;

/// A folder with a parent, a child with data, and a grandchild.
struct PendingFixture(tempfile::TempDir);

impl PendingFixture {
    fn new() -> PendingFixture {
        let fixture = PendingFixture(scratch("pending"));
        diffdisk(["create".into(), fixture.at("parent"), "--size=8M".into()]).ok();
        let create = |name: &str, parent: &str| {
            diffdisk(["create".into(), fixture.at(name), "--parent".into(), fixture.at(parent)]).ok();
        };
        create("child", "parent");
        let daemon = Daemon::start(&fixture.at("child"), &[]);
        let mut guest = daemon.connect();
        // There is enough data that the merge records its progress before its end.
        for at in (0..40u64).chain(80..120) {
            guest.write(at << 16, &[7; 64 << 10]).expect("it is written");
        }
        guest.flush().expect("it is flushed");
        drop(guest);
        daemon.stop();
        create("grand", "child");
        fixture
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

    /// Returns whether the verbs that read the image refuse it as partly overwritten. Panics if the verbs disagree.
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
fn a_half_merged_image_is_read_only_as_a_parent_of_child() {
    for (point, refused) in
        [("merge.begun", false), ("merge.copying", true), ("merge.noted", true), ("merge.marked", false)]
    {
        let fixture = PendingFixture::new();
        let before = shown(&fixture.at("grand"));
        assert!(failpoints::killed(point, 1, fixture.args()), "{point}");
        assert_eq!(fixture.is_refused("parent"), refused, "{point}");
        assert!(!fixture.is_refused("child") && !fixture.is_refused("grand"), "{point}");
        // `info` and `check` work, with one warning that names the command.
        for verb in ["info", "check"] {
            let done = diffdisk([PathBuf::from(verb), fixture.at("parent")]);
            let command = format!("`diffdisk merge {}`", fixture.at("child").canonicalize().unwrap().display());
            assert_eq!(done.stderr.matches(&command).count(), 1, "{point}, {verb}: {done:?}");
            assert!(matches!(done.code, Some(0 | 4)), "{point}, {verb}: {done:?}");
        }
        let made = fixture.0.path().join("made.vhd");
        let create = diffdisk(["create".into(), made, "--parent".into(), fixture.at("parent")]);
        assert_eq!(create.code, Some(1), "{point}: a second child would prevent the merge");
        assert_eq!(shown(&fixture.at("grand")), before, "{point}");
        diffdisk(fixture.args()).ok();
        assert_eq!((shown(&fixture.at("grand")), fixture.merge_records()), (before, 0), "{point}");
        assert!(!fixture.is_refused("parent"), "{point}: still refused after the merge");
    }
}

#[test]
fn verbs_that_would_stop_the_merge_are_refused() {
    for point in ["merge.begun", "merge.noted", "merge.marked"] {
        let fixture = PendingFixture::new();
        assert!(failpoints::killed(point, 1, fixture.args()), "{point}");
        let (parent, child) = (fixture.at("parent"), fixture.at("child"));
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
        diffdisk(fixture.args()).ok();
        assert_eq!(fixture.merge_records(), 0);
    }
}

#[test]
fn an_abandoned_merge_can_be_finished() {
    for point in [failpoints::of("abandon"), vec!["none".into()]].concat() {
        for (at, partial) in [("merge.begun", false), ("merge.noted", true), ("merge.marked", false)] {
            let fixture = PendingFixture::new();
            let before = shown(&fixture.at("grand"));
            assert!(failpoints::killed(at, 1, fixture.args()), "{at}");
            let args = [PathBuf::from("merge"), fixture.at("child"), "--abandon".into()];
            failpoints::killed(&point, 1, args);
            let again = fixture.abandon();
            let when = format!("{at}, {point}: {again:?}");
            assert!(again.code == Some(0) || again.stderr.contains("no merge of it was begun"), "{when}");
            assert_eq!(
                (fixture.is_refused("parent"), fixture.merge_records()),
                (partial, usize::from(partial)),
                "{when}"
            );
            assert_eq!(shown(&fixture.at("grand")), before, "{when}");
            if partial {
                // After abandoning, `compact` accepts CHILD and the partly overwritten parent.
                diffdisk(["compact".into(), fixture.at("child")]).ok();
                diffdisk(["compact".into(), fixture.at("parent")]).ok();
            }
            diffdisk(fixture.args()).ok();
            assert_eq!((shown(&fixture.at("grand")), fixture.merge_records()), (before, 0), "{when}");
            assert!(!fixture.is_refused("parent"), "{when}");
        }
    }
}

#[test]
fn every_state_ends_without_deleting_the_record_by_hand() {
    // The partly overwritten parent is deleted.
    let fixture = PendingFixture::new();
    let before = shown(&fixture.at("grand"));
    assert!(failpoints::killed("merge.noted", 1, fixture.args()));
    fixture.abandon().ok();
    diffdisk(["flatten".into(), fixture.at("child")]).ok();
    assert!(fixture.is_refused("parent"), "a damaged image is not refused");
    fs::remove_file(fixture.at("parent")).unwrap();
    fixture.abandon().ok();
    assert_eq!((fixture.merge_records(), shown(&fixture.at("grand"))), (0, before));
    // CHILD is deleted, and the parent is restored from a backup.
    let fixture = PendingFixture::new();
    let backup = fs::read(fixture.at("parent")).unwrap();
    assert!(failpoints::killed("merge.noted", 1, fixture.args()));
    fs::remove_file(fixture.at("child")).unwrap();
    let refused = fixture.abandon();
    if refused.code == Some(1) {
        assert!(refused.stderr.contains("restore"), "{refused:?}");
        fs::remove_file(fixture.at("parent")).unwrap();
        fs::write(fixture.at("parent"), backup).unwrap();
        fixture.abandon().ok();
    }
    assert_eq!(fixture.merge_records(), 0);
    diffdisk(["map".into(), fixture.at("parent")]).ok();
    // The merge record cannot be read. If CHILD exists, the merge begins again; otherwise the record is removed.
    for gone in [false, true] {
        let fixture = PendingFixture::new();
        assert!(failpoints::killed(if gone { "merge.layer-removed" } else { "merge.noted" }, 1, fixture.args()));
        let entries = fs::read_dir(fixture.0.path()).unwrap().flatten().map(|entry| entry.path());
        let note = entries.into_iter().find(|path| path.extension().is_some_and(|e| e == "merge")).expect("a record");
        fs::write(note, "diffdisk merge 3\n").unwrap();
        if gone {
            fixture.abandon().ok()
        } else {
            diffdisk(fixture.args()).ok()
        };
        assert_eq!(fixture.merge_records(), 0);
        diffdisk(["map".into(), fixture.at("parent")]).ok();
    }
}
