//! Tests of growth and trim on the simulated host.

use std::path::Path;

use super::*;
use crate::image::testing::{PATH, SLOT, child, commit, file, grow, host_with, kinds, open};
use crate::image::{ImageSpec, create};
use crate::storage::Action;
use crate::storage::sim::{FaultPlan, SimHost};
use crate::units::{BlockIndex, BlockSize, FileSector, SECTOR, SectorRange};

#[test]
fn both_footers_are_valid_at_every_moment() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    image.set_allocation(Allocation::Block);
    let footer = image.footer_bytes();
    let (old, end) = {
        let room = image.free_tail();
        (room.footer, room.end)
    };
    let at = |sector: FileSector| {
        let mut bytes = [0; SECTOR_BYTES];
        image.file().read_at(&mut bytes, sector.byte_offset()).map(|()| bytes).ok()
    };
    let (mut growth, mut ops, mut seen) = (Growth::begin(&image, SLOT).unwrap(), Vec::new(), String::new());
    assert!(Growth::begin(&image, SLOT).is_none(), "only one step at a time");
    while growth.next(None, &mut ops).unwrap() == JobStep::Wait {
        for op in ops.drain(..) {
            match op.payload {
                Payload::Own(bytes) => image.file().write_at(&bytes, op.offset).unwrap(),
                _ => image.file().allocate(op.offset, op.len).unwrap(),
            }
            seen.push(match op.action {
                Action::Allocate => 'A',
                Action::Write => 'W',
                Action::WriteThrough => 'T',
                _ => '?',
            });
        }
        let last = FileSector::containing(file(&host).stat().unwrap().len) - 1;
        assert!(at(FileSector::new(0)) == Some(footer) && at(last) == Some(footer), "after {seen}");
        assert!(seen.len() < 3 || at(old) == Some([0; SECTOR_BYTES]), "the old footer must not become a bitmap");
        assert_eq!(image.free_tail().end, end, "no space is used before it is durably zero");
    }
    assert_eq!(seen, "ATWT");
    let grown = image.free_tail().end;
    assert!(grown > end && !image.is_growing());
}

#[test]
fn a_full_file_system_is_reported_and_nothing_stays_reserved() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    image.set_allocation(Allocation::Block);
    let before = file(&host).stat().unwrap();
    host.set_faults(FaultPlan { capacity: Some(before.allocated + 8192), ..FaultPlan::default() });
    assert_eq!(grow(&host, &image).unwrap_err().kind(), ErrorKind::NoSpace);
    assert!(!image.is_poisoned() && !image.is_growing() && image.is_growth_due());
    let after = file(&host).stat().unwrap();
    assert_eq!((after.len, after.allocated), (before.len, before.allocated), "a failed step frees what it reserved");
    // With little space, growth reserves fewer blocks.
    host.set_faults(FaultPlan { capacity: Some(before.allocated + (300 << 10)), ..FaultPlan::default() });
    grow(&host, &image).unwrap();
    assert!(image.reserve(BlockIndex::new(0)).is_ok() && image.reserve(BlockIndex::new(1)).is_ok());
    host.set_faults(FaultPlan { no_allocate: true, ..FaultPlan::default() });
    grow(&host, &image).unwrap();
}

#[test]
fn space_for_all_blocks_or_none() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    image.set_allocation(Allocation::Block);
    let (before, step) = (file(&host).stat().unwrap(), |growth: &mut Growth| {
        crate::image::run_to_completion(&host, image.file(), SLOT, |failed, ops| growth.next(failed, ops))
    });
    host.set_faults(FaultPlan { capacity: Some(before.allocated + (1 << 20)), ..FaultPlan::default() });
    let mut growth = Growth::begin_for(&image, SLOT, 30).expect("there is none yet");
    assert_eq!(step(&mut growth).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(file(&host).stat().unwrap().allocated, before.allocated);
    host.set_faults(FaultPlan::default());
    step(&mut Growth::begin_for(&image, SLOT, 30).expect("there is none yet")).unwrap();
    assert!(Growth::begin_for(&image, SLOT, 30).is_none());
    assert!((0..30).all(|block| image.reserve(BlockIndex::new(block)).is_ok()));
}

#[test]
fn a_trimmed_file_ends_after_its_last_block() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    grow(&host, &image).unwrap();
    let place = image.reserve(BlockIndex::new(7)).unwrap();
    assert_eq!(image.mark(SectorRange::between(7 * 128, 7 * 128 + 1)), Ok(true));
    commit(&host, &image);
    image.reserve(BlockIndex::new(8)).unwrap();
    image.trim().unwrap();
    assert_eq!(file(&host).stat().unwrap().len, (place.sector() + 129 + 1).byte_offset(), "block 8 was never written");
    drop(image);
    let image = open(&host).unwrap();
    let bat = image.image().bat().unwrap();
    assert_eq!((bat.place(BlockIndex::new(7)), bat.place(BlockIndex::new(8))), (Some(place), None));
    let empty = host_with(child(), 128 * 40);
    let image = open(&empty).unwrap();
    grow(&empty, &image).unwrap();
    image.trim().unwrap();
    assert_eq!(file(&empty).stat().unwrap().len, image.image().metadata_end() + SECTOR);
    drop(image);
    assert!(open(&empty).is_ok());
}

#[test]
fn a_sparse_step_reserves_the_pages_that_commits_write() {
    let host = host_with(child(), 128 * 400);
    let image = open(&host).unwrap();
    let before = file(&host).stat().unwrap();
    assert_eq!(file(&host).stat().unwrap(), before, "nothing is reserved before the first block needs a place");
    assert!(image.reserve(BlockIndex::new(0)).is_err());
    grow(&host, &image).unwrap();
    let after = file(&host).stat().unwrap();
    assert!(after.len > before.len + 8 * (64 << 10));
    // The first bitmap shares a page with the BAT, and the footer is in the page after the eighth block.
    assert_eq!(after.allocated - before.allocated, 8 * 4096, "eight bitmaps and the footer");
    // Now the file system is full: there is no space for data, but there is space for everything that a commit writes.
    host.set_faults(FaultPlan { capacity: Some(after.allocated), ..FaultPlan::default() });
    image.reserve(BlockIndex::new(0)).unwrap(); // its data begins in the page of the old footer
    for block in 1..8 {
        let place = image.reserve(BlockIndex::new(block)).unwrap().sector().byte_offset();
        let refused = image.file().write_at(&[7; 512], place + SECTOR);
        assert!(refused.is_err_and(|e| e.kind() == ErrorKind::NoSpace), "block {block} at {place}");
        let first = u64::from(block) * 128;
        assert_eq!(image.mark(SectorRange::between(first, first + 1)), Ok(true));
    }
    commit(&host, &image);
    assert_eq!(file(&host).stat().unwrap().allocated, after.allocated);
    assert!(Growth::begin(&image, SLOT).is_some_and(|mut growth| {
        let grown = crate::image::run_to_completion(&host, image.file(), SLOT, |failed, ops| growth.next(failed, ops));
        grown.is_err_and(|e| e.kind() == ErrorKind::NoSpace)
    }));
    assert!(!image.is_poisoned());
}

#[test]
fn reservations_double_with_the_blocks_used() {
    let host = host_with(child(), 128 * 4000);
    let image = open(&host).unwrap();
    let before = file(&host).stat().unwrap().allocated;
    for block in 0..1000 {
        while image.reserve(BlockIndex::new(block)).is_err() {
            grow(&host, &image).unwrap();
        }
        while image.is_growth_due() {
            grow(&host, &image).unwrap();
        }
        let (used, taken) = (u64::from(block) + 1, (file(&host).stat().unwrap().allocated - before) / 4096);
        assert!(taken <= 16 + used * 3, "{taken} pages for {used} blocks");
    }
}

#[test]
fn the_free_tail_of_a_killed_process_is_reserved_again() {
    for allocation in [Allocation::Sparse, Allocation::Block] {
        let host = host_with(child(), 128 * 40);
        let image = open(&host).unwrap();
        image.set_allocation(allocation);
        grow(&host, &image).unwrap();
        let left = file(&host).stat().unwrap();
        drop(image); // killed: the free tail stays, and the next open punches it
        let image = open(&host).unwrap();
        image.set_allocation(allocation);
        let found = file(&host).stat().unwrap();
        assert!(found.len == left.len && found.allocated <= left.allocated, "{found:?}");
        // The reserved ranges of the free tail are unknown after a kill, so no space counts as reserved.
        file(&host).punch_hole(found.len - 200 * SECTOR, 200 * SECTOR - SECTOR).unwrap();
        let found = file(&host).stat().unwrap();
        host.set_faults(FaultPlan { capacity: Some(found.allocated), ..FaultPlan::default() });
        assert!(image.reserve(BlockIndex::new(0)).is_err(), "a commit might find no space");
        // The page of the first bitmap is allocated, as the footer was in it.
        let first = grow(&host, &image).map(|()| image.reserve(BlockIndex::new(0)).unwrap());
        assert!(first.is_err() || image.reserve(BlockIndex::new(1)).is_err());
        assert_eq!(grow(&host, &image).unwrap_err().kind(), ErrorKind::NoSpace);
        host.set_faults(FaultPlan::default());
        grow(&host, &image).unwrap();
        assert_eq!(file(&host).stat().unwrap().len, left.len, "the footer stays");
        assert!((0..8).all(|block| image.reserve(BlockIndex::new(block)).is_ok()));
    }
}

#[test]
fn a_failed_step_on_a_copy_on_write_file_system_continues_when_there_is_space() {
    // On a copy-on-write file system, overwriting the footer at the old end of the file takes a page that was not
    // reserved.
    let plan = |room| FaultPlan { capacity: room, copy_on_write: true, ..FaultPlan::default() };
    let host = host_with(child(), 128 * 400);
    host.set_faults(plan(None));
    let image = open(&host).unwrap();
    let before = file(&host).stat().unwrap();
    host.set_faults(plan(Some(before.allocated + 8 * 4096)));
    for _ in 0..100 {
        assert_eq!(grow(&host, &image).unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(!image.is_poisoned() && image.reserve(BlockIndex::new(0)).is_err());
    }
    let after = file(&host).stat().unwrap();
    assert!(after.len > before.len && after.len < before.len + 60 * (72 << 10), "the new end stays: {after:?}");
    host.set_faults(plan(Some(after.allocated + 2 * 4096)));
    grow(&host, &image).unwrap();
    assert!(image.reserve(BlockIndex::new(0)).is_ok() && image.free_tail().stale.is_empty());
    host.set_faults(plan(None));
    image.trim().unwrap();
    assert_eq!(kinds(&host), Vec::<&str>::new());
}

#[test]
fn an_image_can_be_closed_on_a_full_file_system() {
    // Blocks so large that there is a gap before the next bitmap: the footer needs a page of its own.
    let host = SimHost::new(1);
    let block_size = BlockSize::from_bytes(1 << 20).unwrap();
    create(&host, Path::new(PATH), &ImageSpec { kind: child(), size: 64 << 20, block_size, reserve: 0 }).unwrap();
    let image = open(&host).unwrap();
    grow(&host, &image).unwrap();
    let place = image.reserve(BlockIndex::new(0)).unwrap().sector();
    image.file().write_at(&[7; 512], (place + 1).byte_offset()).unwrap();
    assert_eq!(image.mark(SectorRange::between(0, 1)), Ok(true));
    commit(&host, &image);
    let before = file(&host).stat().unwrap();
    host.set_faults(FaultPlan { capacity: Some(0), ..FaultPlan::default() });
    image.trim().unwrap();
    assert_eq!(file(&host).stat().unwrap().len, before.len, "the file keeps its length");
    drop(image);
    let image = open(&host).unwrap();
    host.set_faults(FaultPlan::default());
    grow(&host, &image).unwrap();
    // Now the space reserved after the block is enough for the footer.
    let full = file(&host).stat().unwrap().allocated;
    host.set_faults(FaultPlan { capacity: Some(full), ..FaultPlan::default() });
    image.trim().unwrap();
    assert_eq!(file(&host).stat().unwrap().len, (place + 2049 + 1).byte_offset());
    assert_eq!(kinds(&host), Vec::<&str>::new());
}

#[test]
fn blocks_that_are_written_whole_are_reserved_whole() {
    let host = host_with(child(), 128 * 4000);
    let image = open(&host).unwrap();
    // Writes 200 blocks in sequence, `marked` sectors of each. Returns the bytes allocated.
    let taken = |first: u32, marked: u64| {
        let before = file(&host).stat().unwrap().allocated;
        for block in first..first + 200 {
            while image.reserve(BlockIndex::new(block)).is_err() || image.is_growth_due() {
                grow(&host, &image).unwrap();
            }
            let sector = u64::from(block) * 128;
            assert_eq!(image.mark(SectorRange::between(sector, sector + marked)), Ok(true));
        }
        file(&host).stat().unwrap().allocated - before
    };
    let few = taken(0, 8);
    assert!(few < 700 * 4096, "{few} bytes for parts of 200 blocks");
    let all = taken(1000, 128);
    assert!(all > 100 * (64 << 10), "{all} bytes for 200 whole blocks");
    assert!(all < 240 * (64 << 10), "{all} bytes for 200 whole blocks");
}
