//! Tests of `commit.rs` on a real file system.

use std::path::Path;

use super::*;
use crate::image::{Durability, Image, ImageKind, ImageSpec, ParentLink, create};
use crate::storage::host::Host;
use crate::storage::{Access, Env};
use crate::units::{BlockSize, SectorRange};

const SLOT: FileSlot = FileSlot(3);

/// A writable image of 8 MiB with a free tail, without data.
fn image(folder: &Path, kind: ImageKind) -> Arc<Writable> {
    let path = folder.join("a.vhd");
    create(&Host, &path, &ImageSpec { kind, size: 8 << 20, block_size: BlockSize::DEFAULT, reserve: 0 }).unwrap();
    reopen(&path)
}

fn reopen(path: &Path) -> Arc<Writable> {
    let image = Image::open(Host.open(path, Access::Write).unwrap()).unwrap();
    let image = Arc::new(Writable::new(&Host, image, &Durability::FlushOnly).unwrap());
    if let Some(mut growth) = crate::image::Growth::begin(&image, SLOT) {
        crate::image::run_to_completion(&Host, image.file(), SLOT, |failed, ops| growth.next(failed, ops)).unwrap();
    }
    image
}

fn child() -> ImageKind {
    let uuid = uuid::Uuid::from_u128(7);
    ImageKind::Differencing(ParentLink { uuid, modified: 0, relative: None, absolute: None, name: "p.vhd".into() })
}

/// Runs a commit, and returns the operations of each step: `S` for a sync, `W` for a write.
fn steps(commit: &mut Commit, image: &Writable) -> Vec<String> {
    let (mut all, mut ops) = (Vec::new(), Vec::new());
    while commit.next(None, &mut ops).unwrap() == JobStep::Wait {
        all.push(ops.iter().map(|op| if op.action == Action::Sync { 'S' } else { 'W' }).collect());
        for op in ops.drain(..) {
            if let Payload::Own(bytes) = op.payload {
                image.file().write_at(&bytes, op.offset).unwrap();
            }
        }
    }
    all
}

fn write(image: &Writable, from: u64, to: u64) {
    let block = BlockSize::DEFAULT.block_at(from);
    image.reserve(block).unwrap();
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
    assert_eq!(commit(&image).1, 1, "the first commit syncs data of the previous process in the page cache");
    assert_eq!(commit(&image), (vec![], 0), "nothing written");
    write(&image, 0, 8);
    write(&image, 9000, 9008);
    let expected = vec!["S".to_owned(), "WWW".to_owned(), "S".to_owned()];
    assert_eq!(commit(&image), (expected, 2), "two bitmaps and one sector of the BAT");
    write(&image, 0, 8);
    assert_eq!(commit(&image), (vec!["S".to_owned()], 1), "an overwrite");
    write(&image, 8, 16);
    assert_eq!(commit(&image), (vec!["S".into(), "W".into(), "S".into()], 2), "new bits in a block that has a place");
}

#[test]
fn a_dynamic_root_needs_one_barrier_for_new_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), ImageKind::Dynamic);
    commit(&image);
    write(&image, 5000, 5001);
    assert_eq!(commit(&image), (vec!["WW".to_owned(), "S".to_owned()], 1));
    let (path, mut bitmap) = (image.path().to_path_buf(), [0; 512]);
    let place = image.image().bat().unwrap().place(BlockIndex::new(1)).unwrap();
    image.file().read_at(&mut bitmap, place.sector().byte_offset()).unwrap();
    assert_eq!(bitmap, [0xFF; 512], "programs that ignore bitmaps read the same");
    drop(image);
    assert_eq!(reopen(&path).image().bat().unwrap().place(BlockIndex::new(1)), Some(place));
}

#[test]
fn bits_set_during_the_first_sync_wait_for_the_next_commit() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), child());
    commit(&image);
    write(&image, 0, 8);
    let (mut running, mut ops) = (Commit::new(image.clone(), SLOT), Vec::new());
    assert_eq!(running.next(None, &mut ops).unwrap(), JobStep::Wait);
    write(&image, 8, 16);
    write(&image, 5000, 5001);
    ops.clear();
    running.next(None, &mut ops).unwrap();
    let Payload::Own(bitmap) = &ops[0].payload else { panic!("a bitmap first") };
    assert_eq!(bitmap[..3], [0xFF, 0, 0], "only writes that had completed at the start");
    let Payload::Own(table) = &ops[1].payload else { panic!("then the BAT") };
    assert!(table[..4] != [0xFF; 4] && table[4..8] == [0xFF; 4], "the BAT entry of block 1 is not written yet");
    ops.clear();
    running.next(None, &mut ops).unwrap();
    assert_eq!(running.next(None, &mut ops).unwrap(), JobStep::Done);
    assert_eq!(commit(&image).1, 2, "the next commit writes the rest");
}

#[test]
fn a_failed_pointer_write_is_repeated_and_a_failed_sync_is_not() {
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
