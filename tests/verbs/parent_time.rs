//! The modification time of a parent: verbs that leave the parent's disk unchanged restore the time, and verbs that
//! change the parent's disk advance the time. Opening a child of a changed parent warns.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use diffdisk::chain::{Chain, OpenMode, Policy};
use diffdisk::image::Durability;
use diffdisk::ops;
use diffdisk::ops::merge::PreparedMerge;
use diffdisk::storage::sim::SimHost;
use diffdisk::storage::{Access, Env, ModifiedTime};

use crate::common::daemon::Daemon;
use crate::common::temp::scratch;
use crate::common::tool::{Finished, diffdisk};
use crate::fixture::{Fill, Fixture};

const A: Fill<'static> = Fill::Tag("A");
const SMALL: u32 = 4096;

fn time(env: &dyn Env, path: &Path) -> ModifiedTime {
    env.open(path, Access::Read).expect("a file").stat().expect("its state").last_change()
}

/// Returns the kinds of notes of `check --chain`.
fn notes(fixture: &Fixture<'_>, name: &str) -> Vec<&'static str> {
    let policy = Policy::default();
    let report = ops::check::check(fixture.env, &fixture.path(name), Some(&policy), &[], &mut |_| Ok(()));
    report.expect("a check").notes.iter().map(|note| note.kind).collect()
}

fn chain(host: &SimHost) -> Fixture<'_> {
    let fixture = Fixture::new(host, Path::new("/d"));
    fixture.dynamic("r.vhd", SMALL, 400);
    fixture.write("r.vhd", &[(0, 60, A), (150, 200, Fill::Zeros)]);
    fixture.child("p.vhd", "r.vhd", SMALL);
    fixture.write("p.vhd", &[(10, 100, A), (160, 170, Fill::Zeros), (200, 210, A)]);
    fixture.child("c.vhd", "p.vhd", SMALL);
    fixture.write("c.vhd", &[(20, 30, Fill::Tag("C"))]);
    fixture.child("g.vhd", "c.vhd", SMALL);
    fixture
}

type Verb = fn(&dyn Env, &Path);

#[test]
fn verbs_that_keep_the_disk_restore_the_time() {
    let verbs: [(&str, Verb); 8] = [
        ("compact", |env, path| {
            ops::compact::compact(env, path, &Policy::default(), &mut |_| Ok(())).expect("compact");
        }),
        ("grow", |env, path| {
            ops::resize::resize(env, path, 500 * 512, false, &Policy::default(), &mut |_| Ok(())).expect("resize");
        }),
        ("shrink", |env, path| {
            ops::resize::resize(env, path, 300 * 512, true, &Policy::default(), &mut |_| Ok(())).expect("resize");
        }),
        ("refused shrink", |env, path| {
            ops::resize::resize(env, path, 512, true, &Policy::default(), &mut |_| Ok(())).expect_err("data is lost");
        }),
        ("flatten", |env, path| {
            ops::flatten::flatten(env, path, None, &Policy::default(), &mut |_| Ok(())).expect("flatten");
        }),
        ("rebase", |env, path| {
            let other = path.with_file_name("other.vhd");
            ops::rebase::rebase(env, path, &other, false, &Policy::default(), &mut |_| Ok(())).expect("rebase");
        }),
        ("rebase to the same parent", |env, path| {
            let same = path.with_file_name("r.vhd");
            let done = ops::rebase::rebase(env, path, &same, true, &Policy::default(), &mut |_| Ok(()));
            assert!(done.expect("rebase").same_parent);
        }),
        ("repair", |env, path| {
            let file = env.open(path, Access::Write).expect("a file");
            let before = file.stat().expect("its state").last_change();
            file.write_at(&[0; 512], 0).expect("the copy of the footer is damaged");
            file.set_modified(before).expect("its time");
            let report = ops::check::repair(env, path, None, &[], None, &mut |_| Ok(())).expect("repair");
            assert!(!report.repaired.is_empty());
        }),
    ];
    for (name, verb) in verbs {
        let host = SimHost::new(1);
        let fixture = chain(&host);
        fixture.dynamic("other.vhd", SMALL, 400);
        let path = fixture.path("p.vhd");
        let before = time(&host, &path);
        verb(&host, &path);
        assert_eq!(time(&host, &path), before, "{name}");
        // The modification time is the same after a power cut.
        assert_eq!(time(&host.crash_with(&|_| true), &path), before, "{name}");
        assert!(!notes(&fixture, "g.vhd").contains(&"parent-changed"), "{name}");
    }
}

#[test]
fn changes_of_the_disk_advance_the_time() {
    let host = SimHost::new(1);
    let fixture = chain(&host);
    let path = fixture.path("p.vhd");
    let before = time(&host, &path);
    let version = Chain::open(&host, &path, &Policy::default(), OpenMode::Write).unwrap();
    let version = version.into_writable(&host, &Durability::FlushOnly).unwrap();
    version.top().unwrap().image.trim().unwrap();
    drop(version);
    assert_eq!(time(&host, &path), before, "an open without a write changes the time");
    assert_eq!(notes(&fixture, "c.vhd"), [""; 0]);
    // The simulated clock stands still, so this write falls into the same second.
    fixture.write("p.vhd", &[(10, 11, Fill::Tag("new"))]);
    assert!(time(&host, &path).seconds > before.seconds);
    assert_eq!(notes(&fixture, "c.vhd"), ["parent-changed"]);
    assert!(time(&host.crash_with(&|_| false), &path).seconds > before.seconds, "the new time is not durable");
    let e =
        PreparedMerge::prepare(&host, &fixture.path("c.vhd"), None, false, &Policy::default()).err().expect("refused");
    assert!(e.line().contains("--changed-parent") && e.path() == Some(&path), "{}", e.line());
    // A link to another parent changes the disk, too.
    fixture.dynamic("other.vhd", SMALL, 400);
    let before = time(&host, &path);
    let other = fixture.path("other.vhd");
    ops::rebase::rebase(&host, &path, &other, true, &Policy::default(), &mut |_| Ok(())).expect("rebase");
    assert!(time(&host, &path).seconds > before.seconds);
}

#[test]
fn after_a_merge_no_parent_counts_as_changed() {
    for (child, into) in [("c.vhd", None), ("p.vhd", None), ("c.vhd", Some("r.vhd"))] {
        let host = SimHost::new(1);
        let fixture = chain(&host);
        fixture.child("gg.vhd", "g.vhd", SMALL);
        let (path, into) = (fixture.path(child), into.map(|into| fixture.path(into)));
        let merge = PreparedMerge::prepare(&host, &path, into.as_deref(), false, &Policy::default()).expect("a merge");
        let merged = merge.run(&mut |_| Ok(())).expect("done");
        assert_eq!(merged.relinked.len(), 1);
        assert_eq!(notes(&fixture, "gg.vhd"), [""; 0], "{child} into {into:?}");
    }
}

fn created(folder: &Path) -> (PathBuf, PathBuf) {
    let (parent, child) = (folder.join("parent.vhd"), folder.join("child.vhd"));
    diffdisk(["create".into(), parent.clone(), "--size=8M".into()]).ok();
    diffdisk(["create".into(), child.clone(), "--parent".into(), parent.clone()]).ok();
    (parent, child)
}

fn set_time(path: &Path, time: SystemTime) {
    fs::File::options().write(true).open(path).and_then(|file| file.set_modified(time)).expect("its time");
}

#[test]
fn a_daemon_without_a_write_leaves_the_time() {
    let folder = scratch("time");
    let (parent, child) = created(folder.path());
    let before = fs::metadata(&parent).unwrap().modified().unwrap();
    Daemon::start(&parent, &["--allow-writable-parent", "--num-queues=2"]).stop();
    assert_eq!(fs::metadata(&parent).unwrap().modified().unwrap(), before);
    let daemon = Daemon::start(&child, &[]);
    assert!(!daemon.log().contains("written to"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn every_open_warns_once_of_a_changed_parent() {
    let folder = scratch("time");
    let (parent, child) = created(folder.path());
    let other = folder.path().join("other.vhd");
    diffdisk(["create".into(), other.clone(), "--size=8M".into()]).ok();
    let recorded = fs::metadata(&parent).unwrap().modified().unwrap();
    let names = |done: &Finished| done.stderr.matches("parent.vhd: it was written to").count();
    let read = [
        vec!["map".into(), child.clone()],
        vec!["diff".into(), child.clone()],
        vec!["info".into(), child.clone(), "--chain".into()],
        vec!["compare".into(), child.clone(), child.clone()],
        vec!["convert".into(), child.clone(), folder.path().join("out"), "--to=raw".into(), "--force".into()],
        vec!["create".into(), folder.path().join("g.vhd"), "--parent".into(), child.clone()],
    ];
    for args in &read[..5] {
        assert_eq!(names(&diffdisk(args).ok()), 0, "{args:?}");
    }
    set_time(&parent, recorded + Duration::from_secs(2));
    for args in &read {
        assert_eq!(names(&diffdisk(args).ok()), 1, "{args:?}");
    }
    fs::remove_file(folder.path().join("g.vhd")).unwrap();
    let daemon = Daemon::start(&child, &[]);
    assert_eq!(daemon.log().matches("parent.vhd: it was written to").count(), 1, "{}", daemon.log());
    daemon.stop();
    let refused = diffdisk(["merge".into(), child.clone()]);
    assert!(refused.code == Some(1) && refused.stderr.contains("--changed-parent"), "{refused:?}");
    // This rebase records the time again and copies no bytes.
    let done = diffdisk(["rebase".into(), child.clone(), "--unsafe".into(), "--parent".into(), parent.clone()]).ok();
    assert!(String::from_utf8_lossy(&done.stdout).contains("the time of that file is recorded again"), "{done:?}");
    assert_eq!(names(&diffdisk(&read[0]).ok()), 0);
    set_time(&parent, recorded + Duration::from_secs(9));
    diffdisk(["merge".into(), child.clone(), "--changed-parent".into()]).ok();
    assert!(!child.exists());
}
