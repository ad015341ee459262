//! Tests of `commit.rs`: its steps, and what a failure of each makes of the image.

use std::path::Path;

use super::*;
use crate::image::{Growth, Image, Keep, Kind, ParentLink, Spec, create, drive};
use crate::storage::host::Host;
use crate::storage::{Access, Env};
use crate::units::{BlockSize, SectorRange};

const SLOT: Slot = Slot(3);

/// A writable image of 8 MiB with room to write, nothing written.
fn image(folder: &Path, kind: Kind) -> Arc<Writable> {
    sized(folder, kind, 8 << 20)
}

fn sized(folder: &Path, kind: Kind, size: u64) -> Arc<Writable> {
    let path = folder.join("a.vhd");
    create(&Host, &path, &Spec { kind, size, block_size: BlockSize::DEFAULT, reserve: 0 }).unwrap();
    reopen(&path)
}

fn reopen(path: &Path) -> Arc<Writable> {
    let image = Image::open(Host.open(path, Access::Write).unwrap()).unwrap();
    let image = Arc::new(Writable::new(&Host, image, &Keep::Nothing).unwrap());
    grow(&image);
    image
}

fn child() -> Kind {
    let uuid = uuid::Uuid::from_u128(7);
    Kind::Differencing(ParentLink { uuid, modified: 0, relative: None, absolute: None, name: "p.vhd".into() })
}

/// Carries out a commit step by step; what each step did, in a letter an operation.
fn steps(commit: &mut Commit, image: &Writable) -> Vec<String> {
    let (mut all, mut ops) = (Vec::new(), Vec::new());
    while commit.next(None, &mut ops).unwrap() == Step::Wait {
        let letter = |op: &Op| match op.action {
            Action::Sync => 'S',
            Action::WriteBehind => 'H',
            _ => 'W',
        };
        all.push(ops.iter().map(letter).collect());
        for op in ops.drain(..) {
            if let Payload::Own(bytes) = op.payload {
                image.file().write_at(&bytes, op.offset).unwrap();
            }
        }
    }
    all
}

fn grow(image: &Arc<Writable>) {
    if let Some(mut growth) = Growth::begin(image, SLOT) {
        drive(&Host, image.file(), SLOT, |failed, ops| growth.next(failed, ops)).unwrap();
    }
}

fn write(image: &Arc<Writable>, from: u64, to: u64) {
    let block = BlockSize::DEFAULT.block_of(from);
    while image.reserve(block).is_err() {
        grow(image);
    }
    assert_eq!(image.mark(SectorRange::between(from, to)), Ok(true));
}

fn commit(image: &Arc<Writable>) -> (Vec<String>, u32) {
    let mut commit = Commit::new(image.clone(), SLOT);
    (steps(&mut commit, image), commit.barriers())
}

#[test]
fn a_child_needs_two_barriers_for_new_bits_and_one_for_overwrites() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), child());
    assert_eq!(commit(&image).1, 1, "the first commit covers what a predecessor left in the page cache");
    assert_eq!(commit(&image), (vec![], 0), "nothing written");
    write(&image, 0, 8);
    write(&image, 9000, 9008);
    let want = vec!["S".to_owned(), "WWW".to_owned(), "S".to_owned()];
    assert_eq!(commit(&image), (want, 2), "two bitmaps and one sector of the table");
    write(&image, 0, 8);
    assert_eq!(commit(&image), (vec!["S".to_owned()], 1), "an overwrite");
    write(&image, 8, 16);
    assert_eq!(commit(&image), (vec!["S".into(), "W".into(), "S".into()], 2), "new bits in a block that has a place");
}

#[test]
fn a_dynamic_root_needs_one_barrier_for_new_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), Kind::Dynamic);
    commit(&image);
    write(&image, 5000, 5001);
    assert_eq!(commit(&image), (vec!["WW".to_owned(), "S".to_owned()], 1));
    let (path, mut bitmap) = (image.path().to_path_buf(), [0; 512]);
    let place = image.image().bat().unwrap().place(1).unwrap();
    image.file().read_at(&mut bitmap, u64::from(place) * SECTOR).unwrap();
    assert_eq!(bitmap, [0xFF; 512], "readers that ignore bitmaps see the same");
    drop(image);
    assert_eq!(reopen(&path).image().bat().unwrap().place(1), Some(place));
}

#[test]
fn bits_that_come_while_the_first_sync_runs_wait_for_the_next_commit() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), child());
    commit(&image);
    write(&image, 0, 8);
    let (mut running, mut ops) = (Commit::new(image.clone(), SLOT), Vec::new());
    assert_eq!(running.next(None, &mut ops).unwrap(), Step::Wait);
    write(&image, 8, 16);
    write(&image, 5000, 5001);
    ops.clear();
    running.next(None, &mut ops).unwrap();
    let Payload::Own(bitmap) = &ops[0].payload else { panic!("a bitmap first") };
    assert_eq!(bitmap[..3], [0xFF, 0, 0], "only what was complete at the start");
    let Payload::Own(table) = &ops[1].payload else { panic!("then the table") };
    assert!(table[..4] != [0xFF; 4] && table[4..8] == [0xFF; 4], "block 1 has no place in the file yet");
    ops.clear();
    running.next(None, &mut ops).unwrap();
    assert_eq!(running.next(None, &mut ops).unwrap(), Step::Done);
    assert_eq!(commit(&image).1, 2, "the next commit has the rest");
}

/// A child of 200 blocks with so many of them partly written.
fn scattered(folder: &Path, blocks: u64) -> Arc<Writable> {
    let image = sized(folder, child(), 200 << 21);
    (0..blocks).for_each(|block| write(&image, block * 4096, block * 4096 + 8));
    image
}

#[test]
fn the_host_is_told_between_portions() {
    for (blocks, want) in
        [(3, "4"), (10, "11"), (11, "8 4"), (30, "8 8 8 7"), (100, "25 25 25 26"), (190, "48 48 48 48")]
    {
        let folder = tempfile::tempdir().unwrap();
        let image = scattered(folder.path(), blocks);
        let mut commit = Commit::new(image.clone(), SLOT).with_hints();
        let steps = steps(&mut commit, &image);
        let portions = want.split(' ').map(|n| "W".repeat(n.parse().unwrap()));
        let c2 = portions.collect::<Vec<_>>().join(" H ");
        assert_eq!(steps.join(" "), format!("S {c2} S"), "{blocks}");
        assert_eq!(commit.barriers(), 2);
        let path = image.path().to_path_buf();
        drop(image);
        let image = reopen(&path);
        assert!(
            (0..200).all(|block| image.image().bat().unwrap().place(block).is_some() == (u64::from(block) < blocks))
        );
    }
}

#[test]
fn a_hint_fails_the_commit_only_where_data_may_be_lost() {
    for (code, lost) in [(libc::EINVAL, false), (libc::ENOSYS, false), (libc::EIO, true), (libc::ENOSPC, true)] {
        let folder = tempfile::tempdir().unwrap();
        let image = scattered(folder.path(), 20);
        let (mut running, mut ops) = (Commit::new(image.clone(), SLOT).with_hints(), Vec::new());
        while ops.last().is_none_or(|op: &Op| op.action != Action::WriteBehind) {
            ops.clear();
            assert_eq!(running.next(None, &mut ops).unwrap(), Step::Wait);
        }
        let step = running.next(Some(io::Error::from_raw_os_error(code)), &mut ops);
        assert_eq!(step.map_err(|e| e.kind()), if lost { Err(ErrorKind::Poisoned) } else { Ok(Step::Wait) }, "{code}");
        assert_eq!(image.is_poisoned(), lost);
    }
}

#[test]
fn a_failed_pointer_write_is_tried_again_and_a_failed_sync_never() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), child());
    commit(&image);
    write(&image, 0, 8);
    let (mut first, mut ops) = (Commit::new(image.clone(), SLOT), Vec::new());
    first.next(None, &mut ops).unwrap();
    first.next(None, &mut ops).unwrap();
    let eio = || io::Error::from_raw_os_error(libc::EIO);
    assert_eq!(first.next(Some(eio()), &mut ops).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(commit(&image).1, 2, "everything again, from the first sync");
    write(&image, 0, 8);
    let mut second = Commit::new(image.clone(), SLOT);
    second.next(None, &mut ops).unwrap();
    assert_eq!(second.next(Some(eio()), &mut ops).unwrap_err().kind(), ErrorKind::Poisoned);
    let third = Commit::new(image.clone(), SLOT).next(None, &mut ops).unwrap_err();
    assert_eq!(third.kind(), ErrorKind::Poisoned, "{}", third.line());
}
