//! `flatten`: a child becomes independent of some or all of its parents and keeps its disk.

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
const M: Fill<'static> = Fill::Tag("M");
const T: Fill<'static> = Fill::Tag("T");
const Z: Fill<'static> = Fill::Zeros;
const SMALL: u32 = 4096;

type Runs = [(u64, u64, Fill<'static>)];

fn flattened(env: &dyn Env, folder: &Path, keep: Option<&str>) -> Result<u64> {
    let keep = keep.map(|name| folder.join(name));
    ops::flatten::flatten(env, &folder.join("i.vhd"), keep.as_deref(), &Policy::default(), &mut |_| Ok(()))
}

/// Makes five layers with several block sizes. The second layer is smaller than the first, and hides parts of the first
/// layer by zeros. Beyond the end of the second layer, the third layer reads as zeros.
fn chain(fixture: &Fixture<'_>) {
    fixture.dynamic("r.vhd", 2 * SMALL, 200);
    fixture.write("r.vhd", &[(0, 60, R), (150, 200, R)]);
    fixture.child("m.vhd", "r.vhd", SMALL);
    fixture.write("m.vhd", &[(10, 20, M), (30, 40, Z), (150, 200, Z)]);
    let shrunk =
        ops::resize::resize(fixture.env, &fixture.path("m.vhd"), 160 * 512, true, &Policy::default(), &mut |_| Ok(()));
    shrunk.expect("only zeros are cut off");
    fixture.sized_child("n.vhd", "m.vhd", SMALL, Some(210));
    fixture.write("n.vhd", &[(15, 17, Z), (100, 101, M)]);
    fixture.child("i.vhd", "n.vhd", SMALL);
    fixture.write("i.vhd", &[(5, 6, T), (35, 36, T), (120, 130, T)]);
    fixture.child("k.vhd", "i.vhd", SMALL);
    fixture.write("k.vhd", &[(16, 17, T)]);
}

const SEEN: &Runs =
    &[(0, 60, R), (10, 20, M), (30, 40, Z), (15, 17, Z), (100, 101, M), (5, 6, T), (35, 36, T), (120, 130, T)];

fn shows() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let kid = disk(210, &[SEEN, &[(16, 17, T)]].concat());
    vec![("i.vhd", disk(210, SEEN), disk(210, SEEN)), ("k.vhd", kid.clone(), kid)]
}

#[test]
fn the_disk_stays_at_every_moment() {
    let alone = |env: &dyn Env, folder: &Path| flattened(env, folder, None).map(drop);
    SweepCase { name: "alone", setup: &chain, verb: &alone, expected: shows(), lengths_follow_data: false }.sweep();
    let on_root = |env: &dyn Env, folder: &Path| flattened(env, folder, Some("r.vhd")).map(drop);
    SweepCase { name: "on the root", setup: &chain, verb: &on_root, expected: shows(), lengths_follow_data: false }
        .sweep();
}

#[test]
fn data_of_kept_layers_is_not_copied() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    chain(&fixture);
    let copied = flattened(&host, &fixture.folder, Some("m.vhd")).expect("it works");
    // Two zero sectors and a data sector of the third layer, rounded up to pages at most.
    assert!((3 * 512..=2 * 4096).contains(&copied), "{copied}");
    assert_eq!(flattened(&host, &fixture.folder, Some("m.vhd")).expect("it is on that parent already"), 0);
    let copied = flattened(&host, &fixture.folder, Some("r.vhd")).expect("it works");
    assert!(((10 + 9 + 40) * 512..90 * 512).contains(&copied), "not the data and zeros of the second layer: {copied}");
    let info = ops::info::info(&host, &fixture.path("i.vhd"), Some(&Policy::default())).expect("it opens");
    assert_eq!(info.chain.expect("asked for").len(), 2);
    flattened(&host, &fixture.folder, None).expect("it works");
    let info = ops::info::info(&host, &fixture.path("i.vhd"), Some(&Policy::default())).expect("it opens");
    assert_eq!((info.disk_type, info.parent.is_none()), ("dynamic", true));
    for name in ["n.vhd", "m.vhd", "r.vhd"] {
        host.remove(&fixture.path(name)).expect("no image needs it");
    }
    assert!(fixture.read_disk("i.vhd").expect("it has no parent") == disk(210, SEEN));
    assert_eq!(flattened(&host, &fixture.folder, None).expect("it has no parent"), 0);
}

#[test]
fn zeros_that_hide_nothing_take_no_space() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.dynamic("r.vhd", SMALL, 200);
    fixture.write("r.vhd", &[(0, 80, Z), (100, 104, R)]);
    fixture.child("i.vhd", "r.vhd", SMALL);
    let copied = flattened(&host, &fixture.folder, None).expect("it works");
    let info = ops::info::info(&host, &fixture.path("i.vhd"), None).expect("it opens");
    assert!(copied <= 4096 && info.blocks_allocated <= Some(2), "{copied} {info:?}");
}

#[test]
fn bytes_under_clear_bits_stay_hidden() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.dynamic("r.vhd", SMALL, 16);
    fixture.child("i.vhd", "r.vhd", SMALL);
    fixture.write("i.vhd", &[(1, 2, T)]);
    // A write that a power cut interrupted: the data is written, but its bit in the bitmap is not set.
    let path = fixture.path("i.vhd");
    let file = host.open(&path, diffdisk::storage::Access::Write).expect("it opens");
    let at = file.stat().expect("it is there").len - 512 - 4096 + 5 * 512;
    file.write_at(&[0xAB; 512], at).expect("a write");
    drop(file);
    flattened(&host, &fixture.folder, None).expect("it works");
    let bytes = host.bytes(&path).expect("it is there");
    assert!(!bytes.windows(16).any(|window| window == [0xAB; 16]));
}

#[test]
fn only_ancestors_can_be_kept() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    chain(&fixture);
    fixture.dynamic("x.vhd", SMALL, 200);
    let before = host.bytes(&fixture.path("i.vhd"));
    for name in ["x.vhd", "k.vhd", "i.vhd"] {
        let e = flattened(&host, &fixture.folder, Some(name)).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains("not among its parents"), "{e:?}");
    }
    assert_eq!(flattened(&host, &fixture.folder, Some("nowhere.vhd")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(host.bytes(&fixture.path("i.vhd")), before);
}

#[test]
fn killed_at_every_point() {
    let acts = [
        KillCase { name: "alone", setup: &chain, args: &["flatten", "i.vhd"], expected: shows() },
        KillCase {
            name: "on the root",
            setup: &chain,
            args: &["flatten", "i.vhd", "--keep", "r.vhd"],
            expected: shows(),
        },
    ];
    kill_at_every_point(&["flatten", "relink"], &acts);
}
