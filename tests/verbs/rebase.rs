//! `rebase`: an image gets another parent and keeps its disk. With `--unsafe` only the parent link changes, so the
//! image may show another disk.

use std::path::Path;

use diffdisk::chain::Policy;
use diffdisk::error::{ErrorKind, Result};
use diffdisk::ops;
use diffdisk::storage::Env;
use diffdisk::storage::sim::SimHost;

use crate::fixture::{Fill, Fixture, disk};
use crate::kill_cases::{KillCase, kill_at_every_point};
use crate::sweep::{FOLDER, SweepCase};

const R: Fill<'static> = Fill::Tag("R");
const A: Fill<'static> = Fill::Tag("A");
const B: Fill<'static> = Fill::Tag("B");
const T: Fill<'static> = Fill::Tag("T");
const Z: Fill<'static> = Fill::Zeros;
const SMALL: u32 = 4096;

type Runs = [(u64, u64, Fill<'static>)];

fn rebased(env: &dyn Env, folder: &Path, parent: &str, only_link: bool) -> Result<u64> {
    let (path, parent) = (folder.join("i.vhd"), folder.join(parent));
    let done = ops::rebase::rebase(env, &path, &parent, only_link, &Policy::default(), &mut |_| Ok(()));
    done.map(|done| done.copied)
}

/// Makes two branches of one root, and another root. The image is a child of the first branch.
fn branches(fixture: &Fixture<'_>) {
    fixture.dynamic("r.vhd", SMALL, 200);
    fixture.write("r.vhd", &[(0, 60, R), (150, 200, R)]);
    fixture.child("a.vhd", "r.vhd", SMALL);
    fixture.write("a.vhd", &[(10, 20, A), (160, 170, Z), (150, 151, R)]);
    fixture.child("b.vhd", "r.vhd", 2 * SMALL);
    fixture.write("b.vhd", &[(15, 25, B), (40, 50, Z), (100, 110, B), (12, 13, A)]);
    fixture.dynamic("x.vhd", 2 * SMALL, 220);
    fixture.write("x.vhd", &[(0, 10, R), (50, 90, B), (165, 220, B)]);
    fixture.child("i.vhd", "a.vhd", SMALL);
    fixture.write("i.vhd", &[(5, 6, T), (105, 107, T), (45, 46, Z), (168, 169, T)]);
    fixture.child("k.vhd", "i.vhd", SMALL);
    fixture.write("k.vhd", &[(16, 17, T)]);
}

const OWN: &Runs = &[(5, 6, T), (105, 107, T), (45, 46, Z), (168, 169, T)];
const ON_A: &Runs = &[(0, 60, R), (150, 200, R), (10, 20, A), (160, 170, Z)];
const ON_B: &Runs = &[(0, 60, R), (150, 200, R), (15, 25, B), (40, 50, Z), (100, 110, B), (12, 13, A)];

fn shows() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let (seen, kid) = (disk(200, &[ON_A, OWN].concat()), disk(200, &[ON_A, OWN, &[(16, 17, T)]].concat()));
    vec![("i.vhd", seen.clone(), seen), ("k.vhd", kid.clone(), kid)]
}

#[test]
fn the_disk_stays_at_every_moment() {
    for parent in ["b.vhd", "x.vhd", "r.vhd"] {
        let verb = |env: &dyn Env, folder: &Path| rebased(env, folder, parent, false).map(drop);
        SweepCase { name: parent, setup: &branches, verb: &verb, expected: shows(), lengths_follow_data: false }
            .sweep();
    }
}

#[test]
fn an_unsafe_rebase_changes_only_the_link() {
    let verb = |env: &dyn Env, folder: &Path| rebased(env, folder, "b.vhd", true).map(drop);
    let shows = vec![("i.vhd", disk(200, &[ON_A, OWN].concat()), disk(200, &[ON_B, OWN].concat()))];
    SweepCase { name: "unsafe", setup: &branches, verb: &verb, expected: shows, lengths_follow_data: false }.sweep();
}

#[test]
fn a_missing_parent_is_replaced_only_with_unsafe() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    branches(&fixture);
    let folder = host.folder(&fixture.folder).expect("a folder");
    folder.rename("a.vhd".as_ref(), &folder, "moved.vhd".as_ref()).expect("it moves");
    let before = host.bytes(&fixture.path("i.vhd"));
    assert_eq!(rebased(&host, &fixture.folder, "moved.vhd", false).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(host.bytes(&fixture.path("i.vhd")), before);
    assert_eq!(rebased(&host, &fixture.folder, "moved.vhd", true).expect("a link"), 0);
    assert!(fixture.read_disk("k.vhd").expect("it opens") == shows()[1].1);
}

#[test]
fn data_that_both_chains_share_is_not_read() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    branches(&fixture);
    let copied = rebased(&host, &fixture.folder, "b.vhd", false).expect("it works");
    // The copied sectors are 10..25 except 12, 40..50 except 45, 100..110 except 105..107, and 160..170 except 168.
    assert_eq!(copied, (14 + 9 + 8 + 9) * 512);
    let reads = host.counts().reads;
    rebased(&host, &fixture.folder, "b.vhd", false).expect("it is on that parent already");
    let again = host.counts().reads - reads;
    fixture.write("r.vhd", &[(60, 140, R)]);
    let reads = host.counts().reads;
    assert_eq!(rebased(&host, &fixture.folder, "b.vhd", false).expect("it is on that parent already"), 0);
    // Bitmaps may be read, but no data: the blocks of the root, which both chains share, are skipped.
    assert!(host.counts().reads - reads <= again + 20, "{again} reads, then {}", host.counts().reads - reads);
}

#[test]
fn cycles_are_refused() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    branches(&fixture);
    fixture.fixed("f.vhd", 200);
    let before = host.bytes(&fixture.path("i.vhd"));
    for only_link in [false, true] {
        for (parent, word) in [("i.vhd", "its own parent"), ("k.vhd", "among its own parents")] {
            let e = rebased(&host, &fixture.folder, parent, only_link).unwrap_err();
            assert!(e.kind() == ErrorKind::Refused && e.line().contains(word), "{e:?}");
        }
        assert_eq!(rebased(&host, &fixture.folder, "nowhere.vhd", only_link).unwrap_err().kind(), ErrorKind::NotFound);
        for root in ["r.vhd", "f.vhd"] {
            let (path, parent) = (fixture.path(root), fixture.path("x.vhd"));
            let e = ops::rebase::rebase(&host, &path, &parent, only_link, &Policy::default(), &mut |_| Ok(()));
            assert_eq!(e.unwrap_err().kind(), ErrorKind::Refused, "{root} is not a child");
        }
    }
    assert_eq!(host.bytes(&fixture.path("i.vhd")), before);
    rebased(&host, &fixture.folder, "f.vhd", false).expect("a fixed root is a parent, too");
    assert!(fixture.read_disk("k.vhd").expect("it opens") == shows()[1].1);
}

#[test]
fn killed_at_every_point() {
    let linked = vec![("i.vhd", disk(200, &[ON_A, OWN].concat()), disk(200, &[ON_B, OWN].concat()))];
    let acts = [
        KillCase {
            name: "branch",
            setup: &branches,
            args: &["rebase", "i.vhd", "--parent", "b.vhd"],
            expected: shows(),
        },
        KillCase {
            name: "unsafe",
            setup: &branches,
            args: &["rebase", "i.vhd", "--parent", "b.vhd", "--unsafe"],
            expected: linked,
        },
    ];
    kill_at_every_point(&["rebase"], &acts);
}
