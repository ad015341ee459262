//! `compact`: blocks that say nothing go, gaps close, zeros become holes; the disk stays.

use std::path::Path;

use diffdisk::chain::Policy;
use diffdisk::error::{ErrorKind, Result};
use diffdisk::ops::{self, compact::Compacted};
use diffdisk::storage::sim::SimHost;
use diffdisk::storage::{Access, Env};

use crate::reshape::{Act, kill_everywhere};
use crate::scene::{Fill, Scene, disk};
use crate::sweep::{Case, FOLDER};

const T: Fill<'static> = Fill::Tag("T");
const P: Fill<'static> = Fill::Tag("P");
const Z: Fill<'static> = Fill::Zeros;
const SMALL: u32 = 4096;

type Runs = [(u64, u64, Fill<'static>)];

fn compacted(env: &dyn Env, folder: &Path) -> Result<Compacted> {
    ops::compact::compact(env, &folder.join("i.vhd"), &Policy::default(), &mut |_| Ok(()))
}

fn verb(env: &dyn Env, folder: &Path) -> Result<()> {
    compacted(env, folder).map(drop)
}

/// A root with zeros in the first blocks of its file, and in one in the middle; and a child of it.
fn root(scene: &Scene<'_>) {
    scene.dynamic("i.vhd", SMALL, 100);
    scene.write("i.vhd", &[(80, 96, Z)]);
    scene.write("i.vhd", &[(0, 3, T), (24, 32, Z), (40, 48, T), (97, 99, T)]);
    scene.child("k.vhd", "i.vhd", SMALL);
    scene.write("k.vhd", &[(26, 27, P), (80, 90, P)]);
}

const ROOT: &Runs = &[(0, 3, T), (40, 48, T), (97, 99, T)];
const OF_ROOT: &Runs = &[(0, 3, T), (26, 27, P), (40, 48, T), (80, 90, P), (97, 99, T)];

/// A child that says in some blocks what its parent says, in others more; with blocks of another size; and its child.
fn child(scene: &Scene<'_>) {
    scene.dynamic("p.vhd", 2 * SMALL, 100);
    scene.write("p.vhd", &[(0, 20, P), (40, 60, P)]);
    scene.child("i.vhd", "p.vhd", SMALL);
    scene.write("i.vhd", &[(8, 14, P), (30, 33, Z), (70, 80, Z), (40, 48, Z), (50, 52, P), (56, 57, T), (64, 66, T)]);
    scene.child("k.vhd", "i.vhd", SMALL);
    scene.write("k.vhd", &[(11, 12, T)]);
}

const CHILD: &Runs = &[(0, 20, P), (40, 60, P), (40, 48, Z), (56, 57, T), (64, 66, T)];

/// A root whose table lies behind blocks of which most are zeros.
fn moved_table(scene: &Scene<'_>) {
    root(scene);
    let (env, path) = (scene.env, scene.path("i.vhd"));
    ops::resize::resize(env, &path, 9_000 * 512, false, &Policy::default(), &mut |_| Ok(())).expect("it grows");
    scene.write("i.vhd", &[(8_000, 8_008, T)]);
}

const MOVED: &Runs = &[(0, 3, T), (40, 48, T), (97, 99, T), (8_000, 8_008, T)];

fn with_batmap(scene: &Scene<'_>) {
    root(scene);
    crate::tap::make(scene, "i.vhd");
}

fn same(sectors: u64, name: &'static str, runs: &Runs) -> (&'static str, Vec<u8>, Vec<u8>) {
    (name, disk(sectors, runs), disk(sectors, runs))
}

#[test]
fn the_disk_stays_at_every_moment() {
    let of_child = [CHILD, &[(11, 12, T)]].concat();
    type Setup<'a> = &'a dyn Fn(&Scene<'_>);
    let cases = [
        ("root", &root as Setup<'_>, vec![same(100, "i.vhd", ROOT), same(100, "k.vhd", OF_ROOT)]),
        ("child", &child, vec![same(100, "i.vhd", CHILD), same(100, "k.vhd", &of_child)]),
        ("moved table", &moved_table, vec![same(9_000, "i.vhd", MOVED), same(100, "k.vhd", OF_ROOT)]),
        ("batmap", &with_batmap, vec![same(100, "i.vhd", ROOT)]),
    ];
    for (name, setup, shows) in cases {
        Case { name, setup, verb: &verb, shows, kind: false }.sweep();
    }
}

/// What is given up, and the length of the file before and after.
fn lengths(setup: &dyn Fn(&Scene<'_>)) -> (Compacted, usize, usize) {
    let host = SimHost::new(1);
    let scene = Scene::new(&host, Path::new(FOLDER));
    setup(&scene);
    let len = || host.bytes(&scene.path("i.vhd")).expect("it is there").len();
    let before = len();
    let done = compacted(&host, &scene.folder).expect("it works");
    let again = compacted(&host, &scene.folder).expect("it works");
    assert_eq!((again.blocks, again.given_back), (0, 0), "nothing is left to do");
    (done, before, len())
}

#[test]
fn blocks_go_and_the_file_becomes_shorter() {
    // A block with its bitmap takes two pages of the file, the last one what it needs.
    const BLOCK: usize = 8192;
    let (done, before, after) = lengths(&root);
    assert_eq!((done.blocks, before - after), (3, 3 * BLOCK), "80..96 and 24..32");
    assert!(done.given_back >= 3 * BLOCK as u64, "{done:?}");
    let (done, before, after) = lengths(&child);
    // 8..14 and 50..52 as the parent; 30..33 and 72..80 zeros where it has nothing, in three blocks.
    assert_eq!((done.blocks, before - after), (5, 5 * BLOCK), "{done:?}");
    let (done, before, after) = lengths(&moved_table);
    assert_eq!(done.blocks, 3);
    // The blocks stay at pages, so not every gap can be closed.
    assert!(before - after > 2 * BLOCK, "the table moves, too: {before}, now {after}");
    let (done, ..) = lengths(&with_batmap);
    assert_eq!(done.blocks, 3);
}

#[test]
fn a_batmap_does_not_outlive_blocks() {
    let host = SimHost::new(1);
    let scene = Scene::new(&host, Path::new(FOLDER));
    with_batmap(&scene);
    assert_eq!(crate::tap::whole(&scene, "i.vhd").len(), 6);
    compacted(&host, &scene.folder).expect("it works");
    assert_eq!(crate::tap::whole(&scene, "i.vhd"), [0; 0]);
}

#[test]
fn zeros_in_blocks_and_reserved_room_become_holes() {
    let host = SimHost::new(1);
    let scene = Scene::new(&host, Path::new(FOLDER));
    scene.dynamic("i.vhd", 512 << 10, 4096);
    scene.write("i.vhd", &[(0, 1024, T), (1024, 1100, T)]);
    scene.write("i.vhd", &[(100, 900, Z)]);
    let file = host.open(&scene.path("i.vhd"), Access::Write).expect("it opens");
    // As a writer leaves it that reserves room: nothing was written there.
    let len = file.stat().expect("it is there").len;
    file.allocate(0, len).expect("there is room");
    let before = file.stat().expect("it is there").allocated;
    drop(file);
    let done = compacted(&host, &scene.folder).expect("it works");
    let after = host.open(&scene.path("i.vhd"), Access::Read).expect("it opens").stat().expect("it is there").allocated;
    assert_eq!((done.blocks, done.given_back), (0, before - after));
    assert!(done.given_back > 700 * 512, "{done:?}");
    assert!(scene.seen("i.vhd").expect("it opens") == disk(4096, &[(0, 1100, T), (100, 900, Z)]));
}

#[test]
fn a_fixed_image_has_no_blocks() {
    let host = SimHost::new(1);
    let scene = Scene::new(&host, Path::new(FOLDER));
    scene.fixed("i.vhd", 10);
    assert_eq!(compacted(&host, &scene.folder).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn killed_at_every_point() {
    let acts = [
        Act { name: "root", setup: &root, args: &["compact", "i.vhd"], shows: vec![same(100, "i.vhd", ROOT)] },
        Act {
            name: "moved table",
            setup: &moved_table,
            args: &["compact", "i.vhd"],
            shows: vec![same(9_000, "i.vhd", MOVED), same(100, "k.vhd", OF_ROOT)],
        },
        Act { name: "batmap", setup: &with_batmap, args: &["compact", "i.vhd"], shows: vec![same(100, "i.vhd", ROOT)] },
    ];
    kill_everywhere(&["compact"], &acts);
}
