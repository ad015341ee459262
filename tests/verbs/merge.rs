//! `diffdisk merge` as a program: killed at every failpoint, interrupted, refused; other programs read the results.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use diffdisk::storage::host::Host;
use tempfile::TempDir;

use crate::chain_spec::{ChainSpec, Layer, check_disk, fill};
use crate::common::daemon::Daemon;
use crate::common::temp::scratch;
use crate::common::tool::{DIFFDISK, DIFFDISKD, Finished, diffdisk, lock_spawns, run, start, wait};
use crate::common::{digest, oracle};
use crate::failpoints;
use crate::merge_cases::{MergeCase, all};

/// A folder with the images of a case.
struct MergeFixture {
    case: MergeCase,
    folder: TempDir,
}

impl MergeFixture {
    fn new(case: MergeCase) -> MergeFixture {
        let folder = scratch("merge");
        let built = {
            let _lock = lock_spawns();
            case.chain.build(&Host, folder.path())
        };
        built.expect("a chain");
        MergeFixture { case, folder }
    }

    /// Copies the images to a new folder.
    fn copy(&self) -> MergeFixture {
        let folder = scratch("merge");
        for entry in fs::read_dir(self.folder.path()).expect("the folder") {
            let from = entry.expect("a file").path();
            fs::copy(&from, folder.path().join(from.file_name().expect("a name"))).expect("a copy");
        }
        MergeFixture { case: self.case.clone(), folder }
    }

    fn at(&self, layer: usize) -> PathBuf {
        self.case.chain.path(self.folder.path(), layer)
    }

    fn child(&self) -> PathBuf {
        self.at(self.case.merged_layers[0])
    }

    fn args(&self) -> Vec<PathBuf> {
        let mut args = vec!["merge".into(), self.child()];
        if self.case.merged_layers.len() > 1 {
            args.extend(["--into".into(), self.at(self.case.into)]);
        }
        args
    }

    fn merge(&self) -> Finished {
        diffdisk(self.args())
    }

    /// Checks that CHILD and the kept descendants show the same disks as before the merge, and that `check` finds no
    /// corruption. If CHILD is removed, the receiver must show the disk of CHILD.
    #[track_caller]
    fn assert_same(&self, when: &str) {
        let (child, chain) = (self.case.merged_layers[0], &self.case.chain);
        let mut shown = chain.expected(child);
        let mut all: Vec<(usize, Vec<u8>)> = self.case.kept.iter().map(|&kept| (kept, chain.expected(kept))).collect();
        if self.child().exists() {
            all.push((child, shown));
        } else {
            shown.resize(usize::try_from(chain.sectors(self.case.into)).expect("small"), 0);
            all.push((self.case.into, shown));
        }
        for (layer, values) in all {
            let same = {
                let _lock = lock_spawns();
                check_disk(&Host, &self.at(layer), &values)
            };
            same.unwrap_or_else(|e| panic!("{}, {when}: {e}", self.case.name));
            let check = diffdisk(["check".into(), self.at(layer), "--chain".into()]);
            assert!(matches!(check.code, Some(0 | 4)), "{}, {when}: {check:?}", self.case.name);
        }
    }

    /// Checks that the merge is complete, that no other file is left, and that no image has a defect.
    #[track_caller]
    fn assert_done(&self, when: &str) {
        self.assert_same(when);
        let left = (0..self.case.chain.layers.len()).filter(|layer| !self.case.merged_layers.contains(layer));
        let mut left: Vec<PathBuf> = left.map(|layer| self.at(layer)).collect();
        let entries = fs::read_dir(self.folder.path()).expect("the folder");
        let mut names: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
        left.sort();
        names.sort();
        assert_eq!(names, left, "{}, {when}", self.case.name);
        for path in left {
            let check = diffdisk(["check".into(), path]);
            assert_eq!(check.code, Some(0), "{}, {when}: {check:?}", self.case.name);
        }
    }
}

/// Makes the images of a case, with blocks of 256 KiB and disks of 4 MiB unless the case has other sizes.
fn merge_fixture(name: &str) -> MergeFixture {
    MergeFixture::new(all(64).into_iter().find(|case| case.name == name).expect("a case"))
}

#[test]
fn killed_at_every_point() {
    let points = [failpoints::of("merge"), failpoints::of("relink")].concat();
    assert!(points.len() >= 20, "{points:?}");
    let mut reached = std::collections::BTreeMap::<&str, u32>::new();
    for name in ["smaller blocks", "two grandchildren", "two levels", "fixed root", "larger blocks", "a smaller child"]
    {
        let whole = merge_fixture(name);
        for point in &points {
            for count in [1, 3] {
                let fixture = whole.copy();
                let when = format!("{point}:{count}");
                if !failpoints::killed(point, count, fixture.args()) {
                    fixture.assert_done(&when);
                    break;
                }
                *reached.entry(point).or_default() += 1;
                fixture.assert_same(&when);
                fixture.merge().ok();
                fixture.assert_done(&when);
            }
        }
    }
    let missed: Vec<_> = points.iter().filter(|point| !reached.contains_key(point.as_str())).collect();
    assert!(missed.is_empty(), "never reached: {missed:?}");
}

#[test]
fn killed_again_and_again() {
    let whole = merge_fixture("two levels");
    let points = [failpoints::of("merge"), failpoints::of("relink")].concat();
    for first in ["merge.noted", "merge.marked", "relink.switched", "merge.layer-removed"] {
        for second in &points {
            let fixture = whole.copy();
            assert!(failpoints::killed(first, 1, fixture.args()), "{first}");
            let when = format!("{first}, then {second}");
            if failpoints::killed(second, 1, fixture.args()) {
                fixture.assert_same(&when);
                fixture.merge().ok();
            }
            fixture.assert_done(&when);
        }
    }
}

#[test]
fn an_interrupted_merge_is_continued() {
    // The layers are full of data, so that there is time for a signal.
    let layer = |name, parent, value| Layer {
        name,
        parent,
        fixed: false,
        block: 4096,
        sectors: 1024,
        writes: vec![(0, 1024, value)],
    };
    let chain = ChainSpec { layers: vec![layer("root.vhd", None, 1), layer("child.vhd", Some(0), 2)], scale: 512 };
    let case = MergeCase { name: "dense", chain, merged_layers: vec![1], into: 0, kept: vec![] };
    let whole = MergeFixture::new(case);
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let fixture = whole.copy();
        let mut merge = Command::new(DIFFDISK);
        let mut merge = start(merge.args(fixture.args()).stderr(Stdio::piped())).expect("it starts");
        let deadline = Instant::now() + Duration::from_secs(60);
        let is_begun = || {
            let entries = fs::read_dir(fixture.folder.path()).expect("the folder");
            entries.flatten().any(|entry| entry.path().extension().is_some_and(|ending| ending == "merge"))
        };
        while !is_begun() {
            assert!(
                Instant::now() < deadline && merge.try_wait().expect("a child").is_none(),
                "the merge does not begin"
            );
        }
        let pid = rustix::process::Pid::from_child(&merge);
        let signal = rustix::process::Signal::from_named_raw(signal).expect("a signal");
        rustix::process::kill_process(pid, signal).expect("it is there");
        let mut said = String::new();
        merge.stderr.take().expect("a pipe").read_to_string(&mut said).expect("text");
        assert_eq!(wait(&mut merge, deadline), (Some(1), false), "{said}");
        assert!(said.starts_with("diffdisk: merge: ") && said.contains("interrupted") && said.lines().count() == 1);
        fixture.assert_same("interrupted");
        for layer in 0..2 {
            assert_eq!(
                diffdisk(["check".into(), fixture.at(layer)]).code,
                Some(0),
                "an interrupted merge leaves a defect"
            );
        }
        let note = fs::read_dir(fixture.folder.path()).expect("the folder").flatten();
        let note = note.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|ending| ending == "merge"));
        let note = fs::read_to_string(note.expect("the record stays")).expect("text");
        assert!(note.lines().any(|line| line.starts_with("copied ") && line != "copied all"), "{note}");
        fixture.merge().ok();
        fixture.assert_done("continued");
    }
}

#[test]
fn output_of_a_merge() {
    let fixture = merge_fixture("two levels");
    let done = fixture.merge().ok();
    let (said, root) =
        (String::from_utf8(done.stdout).expect("text"), fixture.at(0).canonicalize().expect("it is there"));
    let end = "copied, 2 images removed, 1 image linked to it\n";
    assert!(said.starts_with(&format!("merged {} into {}: ", fixture.child().display(), root.display())), "{said}");
    assert!(said.ends_with(end) && done.stderr.is_empty(), "{said}{}", done.stderr);
    let fixture = self::merge_fixture("leaf");
    let done = diffdisk([fixture.args(), vec!["--quiet".into()]].concat()).ok();
    assert!(done.stdout.is_empty() && done.stderr.is_empty());
    // The merge is complete, so it cannot be continued.
    let again = fixture.merge();
    assert!(again.code == Some(1) && again.stderr.lines().count() == 1, "{again:?}");
}

#[track_caller]
fn assert_refused(done: &Finished, why: &str) {
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.stderr.contains(why) && done.stderr.lines().count() == 1 && done.stdout.is_empty(), "{}", done.stderr);
}

/// Returns the paths and digests of all files in a folder.
fn digests(folder: &Path) -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(folder).expect("the folder").map(|entry| entry.expect("a file").path());
    let mut all: Vec<_> = entries.map(|path| (path.clone(), digest::sha256_of_file(&path))).collect();
    all.sort();
    all
}

#[test]
fn refusals_change_nothing() {
    let fixture = merge_fixture("two levels");
    let create = |name: &str, parent: usize, more: &[&str]| {
        let path = fixture.folder.path().join(name);
        let mut args = vec!["create".into(), path.clone(), "--parent".into(), fixture.at(parent)];
        args.extend(more.iter().map(Into::into));
        diffdisk(args).ok();
        path
    };
    let merge = |child: &Path, into: Option<&Path>| {
        let mut args = vec!["merge".into(), child.to_path_buf()];
        args.extend(into.into_iter().flat_map(|into| ["--into".into(), into.to_path_buf()]));
        diffdisk(args)
    };
    let (root, middle, child, grand) = (fixture.at(0), fixture.at(1), fixture.at(2), fixture.at(3));
    let check = |done: &Finished, why: &str, before: &[(PathBuf, String)]| {
        assert_refused(done, why);
        assert_eq!(digests(fixture.folder.path()), before, "{why}");
    };
    let before = digests(fixture.folder.path());
    check(&merge(&root, None), "no parent", &before);
    check(&merge(&child, Some(&child)), "into itself", &before);
    check(&merge(&middle, Some(&child)), "not an ancestor", &before);
    check(&merge(&child, Some(&fixture.folder.path().join("none.vhd"))), "No such file", &before);
    check(&merge(&fixture.folder.path().join("none.vhd"), None), "No such file", &before);
    for parent in [0, 1] {
        let other = create("stranger.vhd", parent, &[]);
        let before = digests(fixture.folder.path());
        check(&merge(&child, Some(&root)), "another child, ", &before);
        fs::remove_file(other).expect("it is there");
    }
    let larger = create("larger.vhd", 3, &["--size", "5M"]);
    let before = digests(fixture.folder.path());
    check(&merge(&larger, None), &format!("run `diffdisk resize {}", grand.display()), &before);
    fs::remove_file(larger).expect("it is there");
    // A daemon serves the youngest image, and locks its parents.
    let before = digests(fixture.folder.path());
    let daemon = Daemon::start(&grand, &[]);
    check(&merge(&child, None), "has it open", &digests(fixture.folder.path()));
    daemon.stop();
    assert_eq!(before.len(), digests(fixture.folder.path()).len());
    fixture.assert_same("refused");
}

#[test]
fn a_different_merge_than_the_one_begun_is_refused() {
    let whole = merge_fixture("two levels");
    let fixture = whole.copy();
    assert!(failpoints::killed("merge.begun", 1, fixture.args()));
    assert_refused(&diffdisk(["merge".into(), fixture.child()]), "was begun: end that first, with --into");
    let fixture = whole.copy();
    assert!(failpoints::killed("merge.layer-removed", 1, fixture.args()));
    // Another image has the child's name.
    diffdisk(["create".into(), fixture.child(), "--parent".into(), fixture.at(3)]).ok();
    assert_refused(&fixture.merge(), "another image of this name");
    let aside = fixture.folder.path().join("aside.vhd");
    fs::rename(fixture.child(), &aside).expect("it is there");
    fixture.merge().ok();
    fs::remove_file(aside).expect("it is there");
    fixture.assert_done("after the other image was moved");
    // The merge record that the killed merge left cannot be read.
    let fixture = whole.copy();
    assert!(failpoints::killed("merge.noted", 1, fixture.args()));
    let entries = fs::read_dir(fixture.folder.path()).expect("the folder").flatten();
    let note = entries.map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "merge")).expect("a record");
    fs::write(&note, "diffdisk merge 2\n").expect("it is written");
    let done = fixture.merge().ok();
    assert!(done.stderr.contains("cannot be read; the merge begins again"), "{}", done.stderr);
    fixture.assert_done("begun again");
}

#[test]
fn a_child_written_after_a_kill_is_copied_again() {
    let whole = merge_fixture("leaf");
    for point in ["merge.noted", "merge.copied", "merge.marked", "merge.relinked"] {
        let mut fixture = whole.copy();
        assert!(failpoints::killed(point, 1, fixture.args()), "{point}");
        let more = [(1, 5, 9), (70, 90, 8)];
        let filled = {
            let _lock = lock_spawns();
            fill(&Host, &fixture.child(), &more, 64)
        };
        filled.expect("it takes writes");
        fixture.case.chain.layers[1].writes.extend(more);
        fixture.assert_same(point);
        fixture.merge().ok();
        fixture.assert_done(point);
    }
}

/// Restores a backup by `cp -p`: into the same file, with the backup's times.
fn restore(backup: &Path, onto: &Path) {
    let copied = Command::new("cp").arg("-p").args([backup, onto]).status().expect("cp runs");
    assert!(copied.success());
}

#[test]
fn an_ancestor_restored_after_a_kill_is_copied_to_again() {
    let whole = merge_fixture("leaf");
    for point in ["merge.noted", "merge.copied", "merge.closed", "merge.marked", "merge.relinked"] {
        // The backup is restored once into the same file, and once as another file of the same name.
        for renamed in [false, true] {
            let fixture = whole.copy();
            let aside = scratch("backup");
            let backup = aside.path().join("backup.vhd");
            restore(&fixture.at(0), &backup);
            let when = format!("{point}, another file: {renamed}");
            assert!(failpoints::killed(point, 1, fixture.args()), "{when}");
            if renamed {
                fs::rename(&backup, fixture.at(0)).expect("it is there");
            } else {
                restore(&backup, &fixture.at(0));
            }
            fixture.merge().ok();
            fixture.assert_done(&when);
        }
    }
}

#[test]
fn an_ancestor_restored_after_the_removal_of_the_child_is_refused() {
    let fixture = merge_fixture("two levels, leaf");
    let aside = scratch("backup");
    let backup = aside.path().join("backup.vhd");
    restore(&fixture.at(0), &backup);
    assert!(failpoints::killed("merge.layer-removed", 1, fixture.args()));
    let right = aside.path().join("right.vhd");
    fs::rename(fixture.at(0), &right).expect("it is there");
    restore(&backup, &fixture.at(0));
    let before = digests(fixture.folder.path());
    assert_refused(&fixture.merge(), "changed or replaced");
    assert_eq!(digests(fixture.folder.path()), before);
    // With the right file the merge continues.
    fs::rename(right, fixture.at(0)).expect("it is there");
    fixture.merge().ok();
    fixture.assert_done("with the right file");
}

#[test]
fn a_child_restored_after_a_kill_is_copied_again() {
    let whole = merge_fixture("leaf");
    for point in ["merge.noted", "merge.marked", "merge.relinked"] {
        let fixture = whole.copy();
        let aside = scratch("backup");
        let backup = aside.path().join("backup.vhd");
        restore(&fixture.child(), &backup);
        let more = [(1, 5, 9), (70, 90, 8)];
        let filled = {
            let _lock = lock_spawns();
            fill(&Host, &fixture.child(), &more, 64)
        };
        filled.expect("it takes writes");
        assert!(failpoints::killed(point, 1, fixture.args()), "{point}");
        // The backup is older than the merge record and has other data.
        restore(&backup, &fixture.child());
        // Data of the newer child that was copied to the ancestor is visible now where the restored child has no data
        // of its own.
        let shown = digest::sha256_of_disk(&fixture.child());
        fixture.merge().ok();
        assert!(!fixture.child().exists(), "{point}");
        assert_eq!(digest::sha256_of_disk(&fixture.at(0)), shown, "{point}");
    }
}

#[test]
fn an_ancestor_of_an_unfinished_merge_takes_no_other_writes() {
    let whole = merge_fixture("two levels");
    let aside = scratch("socket");
    for point in ["merge.begun", "merge.noted", "merge.marked", "merge.layer-removed"] {
        let fixture = whole.copy();
        assert!(failpoints::killed(point, 1, fixture.args()), "{point}");
        let root = fixture.at(0);
        let before = digests(fixture.folder.path());
        for args in [vec!["compact".into(), root.clone()], vec!["resize".into(), root.clone(), "8M".into()]] {
            let done = diffdisk(args);
            assert!(done.code == Some(1) && done.stderr.contains("was begun: finish that first"), "{done:?}");
        }
        let mut daemon = Command::new(DIFFDISKD);
        let socket = format!("--socket-path={}", aside.path().join("disk.sock").display());
        let served = daemon.args([socket, format!("--blk-file={}", root.display())]);
        let served = run(served, Duration::from_secs(60));
        assert!(served.code == Some(1) && served.stderr.contains("was begun: finish that first"), "{served:?}");
        assert_eq!(digests(fixture.folder.path()), before, "{point}");
        fixture.merge().ok();
        fixture.assert_done(point);
    }
}

#[test]
fn other_programs_read_the_result() {
    for name in ["leaf", "inner", "two levels", "fixed root"] {
        let case = all(512).into_iter().find(|case| case.name == name).expect("a case");
        let fixture = MergeFixture::new(case);
        let leaf = fixture.at(fixture.case.kept.last().copied().unwrap_or(fixture.case.into));
        let before = digest::sha256_of_disk(&if fixture.case.kept.is_empty() { fixture.child() } else { leaf.clone() });
        fixture.merge().ok();
        assert_eq!(digest::sha256_of_disk(&leaf), before, "{name}: diffdisk");
        assert_eq!(oracle::sha256_of_disk(&leaf), before, "{name}: 7-Zip");
    }
}
