//! `compact`: redundant blocks are freed, gaps are closed, zeros become holes; the disk does not change.

use std::path::Path;

use diffdisk::chain::Policy;
use diffdisk::error::{ErrorKind, Result};
use diffdisk::ops::{self, compact::Compacted};
use diffdisk::storage::sim::SimHost;
use diffdisk::storage::{Access, Env};

use crate::fixture::{Fill, Fixture, disk};
use crate::kill_cases::{KillCase, kill_at_every_point};
use crate::sweep::{FOLDER, SweepCase};

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

/// Makes a root whose file has blocks of zeros at its start and in its middle, and a child of the root.
fn root(fixture: &Fixture<'_>) {
    fixture.dynamic("i.vhd", SMALL, 100);
    fixture.write("i.vhd", &[(80, 96, Z)]);
    fixture.write("i.vhd", &[(0, 3, T), (24, 32, Z), (40, 48, T), (97, 99, T)]);
    fixture.child("k.vhd", "i.vhd", SMALL);
    fixture.write("k.vhd", &[(26, 27, P), (80, 90, P)]);
}

const ROOT: &Runs = &[(0, 3, T), (40, 48, T), (97, 99, T)];
const OF_ROOT: &Runs = &[(0, 3, T), (26, 27, P), (40, 48, T), (80, 90, P), (97, 99, T)];

/// Makes a child whose block size differs from its parent's. In some blocks the child repeats its parent's data, in
/// others it has different data. Also makes a grandchild.
fn child(fixture: &Fixture<'_>) {
    fixture.dynamic("p.vhd", 2 * SMALL, 100);
    fixture.write("p.vhd", &[(0, 20, P), (40, 60, P)]);
    fixture.child("i.vhd", "p.vhd", SMALL);
    fixture.write("i.vhd", &[(8, 14, P), (30, 33, Z), (70, 80, Z), (40, 48, Z), (50, 52, P), (56, 57, T), (64, 66, T)]);
    fixture.child("k.vhd", "i.vhd", SMALL);
    fixture.write("k.vhd", &[(11, 12, T)]);
}

const CHILD: &Runs = &[(0, 20, P), (40, 60, P), (40, 48, Z), (56, 57, T), (64, 66, T)];

/// Makes a root similar to that of `root`, but with block data aligned at 8 KiB, so that blocks at the end move into
/// gaps.
fn larger_blocks(fixture: &Fixture<'_>) {
    fixture.dynamic("i.vhd", 64 * SMALL, 4096);
    fixture.write("i.vhd", &[(520, 523, Z), (1500, 1600, T)]);
    fixture.write("i.vhd", &[(0, 3, T), (3000, 3200, Z), (3700, 3705, T)]);
}

const LARGER: &Runs = &[(1500, 1600, T), (0, 3, T), (3700, 3705, T)];

/// Makes a root whose BAT is after the blocks. Three of the seven blocks contain only zeros.
fn moved_table(fixture: &Fixture<'_>) {
    root(fixture);
    let (env, path) = (fixture.env, fixture.path("i.vhd"));
    ops::resize::resize(env, &path, 9_000 * 512, false, &Policy::default(), &mut |_| Ok(())).expect("it grows");
    fixture.write("i.vhd", &[(8_000, 8_008, T)]);
}

const MOVED: &Runs = &[(0, 3, T), (40, 48, T), (97, 99, T), (8_000, 8_008, T)];

fn with_batmap(fixture: &Fixture<'_>) {
    root(fixture);
    crate::xenserver::make(fixture, "i.vhd");
}

fn same(sectors: u64, name: &'static str, runs: &Runs) -> (&'static str, Vec<u8>, Vec<u8>) {
    (name, disk(sectors, runs), disk(sectors, runs))
}

#[test]
fn the_disk_stays_at_every_moment() {
    let of_child = [CHILD, &[(11, 12, T)]].concat();
    type Setup<'a> = &'a dyn Fn(&Fixture<'_>);
    let cases = [
        ("root", &root as Setup<'_>, vec![same(100, "i.vhd", ROOT), same(100, "k.vhd", OF_ROOT)]),
        ("child", &child, vec![same(100, "i.vhd", CHILD), same(100, "k.vhd", &of_child)]),
        ("moved table", &moved_table, vec![same(9_000, "i.vhd", MOVED), same(100, "k.vhd", OF_ROOT)]),
        ("batmap", &with_batmap, vec![same(100, "i.vhd", ROOT)]),
        ("larger blocks", &larger_blocks, vec![same(4096, "i.vhd", LARGER)]),
    ];
    for (name, setup, shows) in cases {
        SweepCase { name, setup, verb: &verb, expected: shows, lengths_follow_data: false }.sweep();
    }
}

/// Compacts an image twice; the second run must free nothing. Returns the result of the first run, and the length of
/// the file before the first and after the second run.
fn lengths(setup: &dyn Fn(&Fixture<'_>)) -> (Compacted, usize, usize) {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    setup(&fixture);
    let len = || host.bytes(&fixture.path("i.vhd")).expect("it is there").len();
    let before = len();
    let done = compacted(&host, &fixture.folder).expect("it works");
    let again = compacted(&host, &fixture.folder).expect("it works");
    assert_eq!((again.freed_blocks, again.freed_bytes), (0, 0), "the second run frees something");
    (done, before, len())
}

#[test]
fn redundant_blocks_are_freed_and_the_file_shrinks() {
    // A block with its bitmap takes two pages of the file; the last block ends without padding.
    const BLOCK: usize = 8192;
    let (done, before, after) = lengths(&root);
    assert_eq!((done.freed_blocks, before - after), (3, 3 * BLOCK), "80..96 and 24..32");
    assert!(done.freed_bytes >= 3 * BLOCK as u64, "{done:?}");
    let (done, before, after) = lengths(&child);
    // 8..14 and 50..52 repeat the parent; 30..33 and 72..80, in three blocks, are zeros where the parent has no data.
    assert_eq!((done.freed_blocks, before - after), (5, 5 * BLOCK), "{done:?}");
    let (done, before, after) = lengths(&moved_table);
    assert_eq!(done.freed_blocks, 3);
    // Blocks stay page-aligned, so not every gap can be closed.
    assert!(before - after > 2 * BLOCK, "the BAT does not move: {before}, now {after}");
    let (done, ..) = lengths(&with_batmap);
    assert_eq!(done.freed_blocks, 3);
    let (done, before, after) = lengths(&larger_blocks);
    assert_eq!(
        (done.freed_blocks, before - after),
        (3, 3 * 33 * 2 * SMALL as usize),
        "blocks and the gaps before them"
    );
}

#[test]
fn a_bat_moves_before_aligned_blocks_if_it_fits() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.dynamic("i.vhd", LARGE, 64 * SECTORS);
    fixture.write("i.vhd", &[(0, 9, T)]);
    let path = fixture.path("i.vhd");
    ops::resize::resize(&host, &path, 5000 * u64::from(LARGE), false, &Policy::default(), &mut |_| Ok(()))
        .expect("grows");
    let (moved, block) = (block_table(&host, &path), places(&host, &path, 1));
    assert!(moved > u64::from(block[0]) * 512, "the BAT of five pages is not after the block");
    fixture.write("i.vhd", &[(SECTORS, SECTORS + 9, T), (2 * SECTORS, 2 * SECTORS + 9, T)]);
    let before = places(&host, &path, 3);
    assert!(before.iter().all(|place| (place + 1) % 32 == 0), "{before:?}");
    compacted(&host, &fixture.folder).expect("it works");
    assert_eq!(
        (block_table(&host, &path), places(&host, &path, 3)),
        (moved, before),
        "the BAT has moved into gaps that are too small"
    );
    ops::resize::resize(&host, &path, 1500 * u64::from(LARGE), true, &Policy::default(), &mut |_| Ok(()))
        .expect("shrinks");
    assert_eq!(block_table(&host, &path), 4096, "the BAT of two pages is not before the first block");
    assert_eq!(fixture.defects("i.vhd"), [""; 0]);
}

#[test]
fn compact_clears_the_batmap() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    with_batmap(&fixture);
    assert_eq!(crate::xenserver::whole(&fixture, "i.vhd").len(), 6);
    compacted(&host, &fixture.folder).expect("it works");
    assert_eq!(crate::xenserver::whole(&fixture, "i.vhd"), [0; 0]);
}

#[test]
fn zeros_in_blocks_and_reserved_room_become_holes() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.dynamic("i.vhd", 512 << 10, 4096);
    fixture.write("i.vhd", &[(0, 1024, T), (1024, 1100, T)]);
    fixture.write("i.vhd", &[(100, 900, Z)]);
    let file = host.open(&fixture.path("i.vhd"), Access::Write).expect("it opens");
    // The file is preallocated: it has allocated space that was never written.
    let len = file.stat().expect("it is there").len;
    file.allocate(0, len).expect("there is room");
    let before = file.stat().expect("it is there").allocated;
    drop(file);
    let done = compacted(&host, &fixture.folder).expect("it works");
    let after =
        host.open(&fixture.path("i.vhd"), Access::Read).expect("it opens").stat().expect("it is there").allocated;
    assert_eq!((done.freed_blocks, done.freed_bytes), (0, before - after));
    assert!(done.freed_bytes > 700 * 512, "{done:?}");
    assert!(fixture.read_disk("i.vhd").expect("it opens") == disk(4096, &[(0, 1100, T), (100, 900, Z)]));
}

/// Block size for which data is aligned at 16 KiB. The next constants are the numbers of sectors of a block without and
/// with its bitmap.
const LARGE: u32 = 512 << 10;
const SECTORS: u64 = 1024;
const STRIDE: u64 = SECTORS + 1;

fn block_table(host: &SimHost, path: &Path) -> u64 {
    let mut at = [0; 8];
    host.open(path, Access::Read).expect("it opens").read_at(&mut at, 512 + 16).expect("a header");
    u64::from_be_bytes(at)
}

/// Returns the BAT entries of the first blocks.
fn places(host: &SimHost, path: &Path, blocks: usize) -> Vec<u32> {
    let mut entries = vec![0; blocks * 4];
    host.open(path, Access::Read).expect("it opens").read_at(&mut entries, block_table(host, path)).expect("a table");
    entries.chunks(4).map(|entry| u32::from_be_bytes(entry.try_into().expect("four"))).collect()
}

/// Makes a root whose first blocks have page-aligned data, as XenServer and old versions of this program place them.
/// `slots` are the positions of these blocks in a row of blocks that are 7 sectors apart. The first 64 sectors of each
/// block have data. Returns the BAT entries.
fn at_pages(fixture: &Fixture<'_>, host: &SimHost, slots: &[u64]) -> Vec<u32> {
    fixture.dynamic("i.vhd", LARGE, 64 * SECTORS);
    let (path, mut footer) = (fixture.path("i.vhd"), [0; 512]);
    let file = host.open(&path, Access::Write).expect("it opens");
    let (table, first) = (block_table(host, &path), file.stat().expect("it is there").len / 512 - 1 + 7);
    file.read_at(&mut footer, 0).expect("a footer");
    file.write_at(&[0; 512], (first - 7) * 512).expect("no footer here");
    let places: Vec<u64> = slots.iter().map(|slot| first + slot * (STRIDE + 7)).collect();
    for (block, place) in (0..).zip(&places) {
        let mut data = [0; 64 * 512];
        crate::common::pattern::fill(&mut data, "T", block * SECTORS);
        file.write_at(&u32::try_from(*place).expect("small").to_be_bytes(), table + block * 4).expect("an entry");
        file.write_at(&[0xFF; 128], place * 512).expect("a bitmap");
        file.write_at(&data, (place + 1) * 512).expect("data");
    }
    let end = places.iter().max().expect("a block") + STRIDE;
    file.write_at(&footer, end * 512).expect("the footer");
    file.sync().expect("it is durable");
    places.into_iter().map(|place| u32::try_from(place).expect("small")).collect()
}

#[test]
fn page_aligned_blocks_move_only_into_gaps() {
    // Positions of the blocks, as `at_pages` takes them, before and after compaction.
    let cases: [(&[u64], &[u64]); 5] = [
        (&[0, 1, 2, 3, 4], &[0, 1, 2, 3, 4]),
        (&[3, 0, 1, 2], &[3, 0, 1, 2]),
        (&[0, 1, 3, 4], &[0, 1, 3, 2]),
        (&[0, 3, 4, 5], &[0, 3, 2, 1]),
        (&[0, 1, 6, 4, 5, 7], &[0, 1, 3, 4, 5, 2]),
    ];
    for (before, after) in cases {
        let host = SimHost::new(1);
        let fixture = Fixture::new(&host, Path::new(FOLDER));
        let (path, placed) = (fixture.path("i.vhd"), at_pages(&fixture, &host, before));
        assert_eq!(fixture.defects("i.vhd"), [""; 0], "{before:?}");
        let shown: Vec<_> = (0..placed.len() as u64).map(|b| (b * SECTORS, b * SECTORS + 64, T)).collect();
        for _ in 0..2 {
            assert_eq!(compacted(&host, &fixture.folder).expect("it works").freed_blocks, 0);
            let first = u64::from(placed[before.iter().position(|slot| *slot == 0).expect("one is first")]);
            let wanted: Vec<_> = after.iter().map(|slot| u32::try_from(first + slot * (STRIDE + 7)).unwrap()).collect();
            assert_eq!(places(&host, &path, placed.len()), wanted, "{before:?}");
            let end = u64::from(*wanted.iter().max().expect("a block")) + STRIDE + 1;
            assert_eq!(host.bytes(&path).expect("it is there").len() as u64, end * 512, "{before:?}");
            assert!(fixture.read_disk("i.vhd").expect("it opens") == disk(64 * SECTORS, &shown), "{before:?}");
        }
        assert_eq!(fixture.defects("i.vhd"), [""; 0], "{before:?}");
    }
    // The data of blocks that `write` adds begins at multiples of 32 sectors. `compact` moves such a block into a gap
    // with the same alignment.
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    let (path, placed) = (fixture.path("i.vhd"), at_pages(&fixture, &host, &[0, 1, 2]));
    fixture.write("i.vhd", &[(3 * SECTORS, 3 * SECTORS + 9, T), (4 * SECTORS, 4 * SECTORS + 9, T)]);
    fixture.write("i.vhd", &[(5 * SECTORS, 5 * SECTORS + 9, T), (3 * SECTORS, 3 * SECTORS + 9, Z)]);
    let before = places(&host, &path, 6);
    assert!(before[..3] == placed && before[3..].iter().all(|place| (place + 1) % 32 == 0), "{before:?}");
    assert_eq!(fixture.defects("i.vhd"), [""; 0]);
    assert_eq!(compacted(&host, &fixture.folder).expect("it works").freed_blocks, 1);
    let moved = [&before[..3], &[u32::MAX, before[4], before[3]]].concat();
    assert_eq!(places(&host, &path, 6), moved);
}

#[test]
fn alignment_gaps_are_no_leaks_and_take_no_space() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.dynamic("i.vhd", LARGE, 64 * SECTORS);
    // Each write of a block makes the file grow from an unaligned end. The resulting gap contains the old footer and is
    // zeroed.
    (0..5).for_each(|block| fixture.write("i.vhd", &[(block * SECTORS, (block + 1) * SECTORS, T)]));
    let path = fixture.path("i.vhd");
    let before = places(&host, &path, 5);
    assert!(before.windows(2).all(|pair| pair[1] - pair[0] == 33 * 32), "a gap without 31 sectors: {before:?}");
    assert_eq!(fixture.defects("i.vhd"), [""; 0]);
    let file = host.open(&path, Access::Write).expect("it opens");
    let allocated = || file.stat().expect("it is there").allocated;
    file.allocate(0, file.stat().expect("it is there").len).expect("there is room");
    assert!(allocated() > 5 * 33 * (16 << 10), "too little space is allocated");
    assert_eq!(fixture.defects("i.vhd"), [""; 0]);
    assert_eq!(compacted(&host, &fixture.folder).expect("it works").freed_blocks, 0);
    assert_eq!(places(&host, &path, 5), before, "a block has moved");
    // The sum of the data and a page with the bitmap for each block, the pages of header and BAT, and the footer's
    // page.
    assert_eq!(allocated(), 5 * (u64::from(LARGE) + 4096) + 8192 + 4096);
    // An unreferenced block is still a leak.
    file.write_at(&[0xFF; 4], block_table(&host, &path) + 2 * 4).expect("no entry");
    assert_eq!(fixture.defects("i.vhd"), ["space-unreferenced"]);
}

#[test]
fn a_fixed_image_has_no_blocks() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.fixed("i.vhd", 10);
    assert_eq!(compacted(&host, &fixture.folder).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn killed_at_every_point() {
    let acts = [
        KillCase { name: "root", setup: &root, args: &["compact", "i.vhd"], expected: vec![same(100, "i.vhd", ROOT)] },
        KillCase {
            name: "moved table",
            setup: &moved_table,
            args: &["compact", "i.vhd"],
            expected: vec![same(9_000, "i.vhd", MOVED), same(100, "k.vhd", OF_ROOT)],
        },
        KillCase {
            name: "batmap",
            setup: &with_batmap,
            args: &["compact", "i.vhd"],
            expected: vec![same(100, "i.vhd", ROOT)],
        },
    ];
    kill_at_every_point(&["compact"], &acts);
}
