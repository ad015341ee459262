//! Tests of the bitmap cache without a file; `clock_tests.rs` tests it with a file and threads.

use super::*;
use crate::image::write::journal_layout::JournalSlot;

impl Bitmaps {
    /// The first run of equal bits in `from..end` of a bitmap sector, if it is in memory.
    pub(in crate::image) fn run(&self, index: BitmapSectorIndex, from: u32, end: u32) -> Option<(bool, u32)> {
        let mut first = None;
        let known = self.each_run(index, from, end, |set, count| {
            first.get_or_insert((set, count));
        });
        first.filter(|_| known)
    }
}

fn at(index: usize) -> BitmapSectorIndex {
    BitmapSectorIndex::new(index)
}

/// Marks a range and notes the bitmap sectors as dirty. Returns how many were clean before.
fn mark(maps: &Bitmaps, from: u64, to: u64) -> usize {
    let (mut noted, mut absent) = (0, Vec::new());
    maps.mark(SectorRange::between(from, to), &mut absent, |_, frame, new| {
        noted += usize::from(new.is_newer && !std::mem::replace(&mut frame.state.dirty, true));
    });
    assert!(absent.is_empty(), "{absent:?}");
    noted
}

/// Inserts bitmap sectors with bit 0 set, and unpins them.
fn load(maps: &Bitmaps, indices: impl IntoIterator<Item = usize>) {
    let mut sector = [0; SECTOR_BYTES];
    sector[0] = 0x80;
    for index in indices {
        let evictions = maps.eviction_count(at(index)).expect("it is absent");
        assert!(maps.insert(at(index), evictions, &sector));
        maps.unpin(at(index));
    }
}

/// The bitmap sectors in memory.
fn resident(maps: &Bitmaps, count: usize) -> Vec<usize> {
    (0..count).filter(|index| maps.eviction_count(at(*index)).is_none()).collect()
}

#[test]
fn bitmap_sectors_of_large_and_small_blocks() {
    let large = Bitmaps::new(4, BlockSize::from_bytes(8 << 20).unwrap());
    assert_eq!((large.bitmap_sector_of(16384 + 4096), large.bit_of(16384 + 4097)), (at(5), 1));
    assert_eq!(large.block_of(at(5)), (BlockIndex::new(1), 1));
    let small = Bitmaps::new(10, BlockSize::from_bytes(4096).unwrap());
    assert_eq!((small.bitmap_sector_of(17), small.bit_of(17), small.bits_per_sector()), (at(2), 1, 8));
}

#[test]
fn marks_are_noted_once_until_the_snapshot() {
    let maps = Bitmaps::new(2, BlockSize::DEFAULT);
    assert!(maps.run(at(0), 0, 4096).is_none());
    assert!(maps.insert(at(0), 0, &[0; 512]));
    assert_eq!((mark(&maps, 3, 5), mark(&maps, 4, 9)), (1, 0));
    assert_eq!(maps.run(at(0), 0, 4096), Some((false, 3)));
    assert_eq!(maps.run(at(0), 3, 4096), Some((true, 6)));
    assert_eq!(maps.lock_resident(at(0)).snapshot()[..2], [0b0001_1111, 0b1000_0000]);
    assert_eq!(mark(&maps, 4, 9), 0, "the bits were set before");
    assert_eq!(mark(&maps, 9, 10), 1);
}

#[test]
fn a_fresh_block_owes_a_commit_even_if_no_bit_changes() {
    let maps = Bitmaps::new(2, BlockSize::DEFAULT);
    maps.insert_fresh(BlockIndex::new(1), InitialBits::Set);
    assert_eq!(mark(&maps, 4096, 4097), 1);
    assert!(!maps.lock_resident(at(1)).is_ordered() && maps.lock_resident(at(1)).snapshot() == [0xFF; 512]);
    maps.set_placed(BlockIndex::new(1));
    assert_eq!(mark(&maps, 4096, 4097), 1, "the BAT entry is in the file, the bits are not");
    assert!(maps.lock_resident(at(1)).snapshot() == [0xFF; 512]);
    maps.set_written(at(1));
    assert_eq!((mark(&maps, 4096, 4097), maps.table.get(at(1))), (0, BitmapEntry::Full));
}

#[test]
fn full_bitmap_sectors_take_no_frame() {
    for (bytes, sectors) in [(4096, 8), (64 << 10, 128), (2 << 20, 4096)] {
        let maps = Bitmaps::new(300, BlockSize::from_bytes(bytes).unwrap());
        // Inserted as read from the file. Bits after the last sector of a small block are ignored.
        let mut sector = [0; SECTOR_BYTES];
        sector[..sectors / 8].fill(0xFF);
        for index in 0..300 {
            assert!(!maps.insert(at(index), 0, &sector), "there is nothing to pin");
        }
        assert_eq!((maps.frames(), maps.run(at(299), 1, 8), mark(&maps, 1, 8)), (0, Some((true, 7)), 0));
        // Written in memory, then committed.
        let maps = Bitmaps::new(300, BlockSize::from_bytes(bytes).unwrap());
        for index in 0..300 {
            let block = BlockIndex::from_usize(index);
            maps.insert_fresh(block, InitialBits::Clear);
            let first = (index * sectors) as u64;
            mark(&maps, first, first + sectors as u64 - 1);
            maps.lock_resident(at(index)).snapshot();
            maps.set_placed(block);
            maps.set_written(at(index));
            assert!(matches!(maps.table.get(at(index)), BitmapEntry::InFrame(_)), "a sector is missing");
            mark(&maps, first, first + sectors as u64);
            maps.lock_resident(at(index)).snapshot();
            assert_ne!(maps.table.get(at(index)), BitmapEntry::Full, "the last bit is not in the file yet");
            maps.set_written(at(index));
            assert_eq!(maps.table.get(at(index)), BitmapEntry::Full);
        }
        assert_eq!(maps.frames(), 1, "one frame passes from block to block");
    }
}

#[test]
fn a_bitmap_sector_that_is_not_used_is_evicted_and_read_again() {
    let maps = Bitmaps::new(100, BlockSize::DEFAULT);
    maps.set_max_frames(4);
    load(&maps, 0..4);
    load(&maps, [50]);
    assert_eq!(resident(&maps, 100).len(), 4);
    let stay = resident(&maps, 100)[0];
    for index in 60..70 {
        assert_eq!(maps.run(at(stay), 0, 9), Some((true, 1)));
        load(&maps, [index]);
    }
    let now = resident(&maps, 100);
    assert!(now.contains(&stay) && now.len() == 4 && maps.frames() == 4, "{now:?}");
    let gone = (0..4).find(|index| !now.contains(index)).unwrap();
    assert!(maps.run(at(gone), 0, 9).is_none());
    load(&maps, [gone]);
    assert_eq!(maps.run(at(gone), 0, 9), Some((true, 1)));
}

#[test]
fn neither_dirty_nor_pinned_bitmap_sectors_are_evicted() {
    let maps = Bitmaps::new(100, BlockSize::DEFAULT);
    maps.set_max_frames(0);
    load(&maps, 0..2);
    assert_eq!(resident(&maps, 100), [1]);
    mark(&maps, 4096 + 7, 4096 + 8);
    load(&maps, [2, 3]);
    assert_eq!(resident(&maps, 100), [1, 3], "dirty");
    assert_eq!(maps.lock_resident(at(1)).snapshot()[..1], [0x81]);
    load(&maps, [4, 5]);
    assert_eq!(resident(&maps, 100), [1, 5], "in a running commit");
    maps.set_written(at(1));
    load(&maps, [6, 7]);
    assert_eq!((resident(&maps, 100), maps.frames()), (vec![7], 2), "the frames beyond the limit are evicted");
    maps.insert_fresh(BlockIndex::new(20), InitialBits::Clear);
    load(&maps, 8..12);
    assert!(maps.eviction_count(at(20)).is_none(), "the BAT entry of its block is not in the file");
    maps.lock_resident(at(20)).state.journal_slot = Some(JournalSlot::new(3));
    maps.set_placed(BlockIndex::new(20));
    assert_eq!(maps.lock_resident(at(20)).state.journal_slot, None, "no bit needs the slot");
    load(&maps, 12..16);
    assert!(maps.eviction_count(at(20)).is_some());
    load(&maps, [1]);
    assert!(maps.pin(at(1)));
    load(&maps, [2, 3, 4, 5]);
    assert!(maps.eviction_count(at(1)).is_none(), "pinned");
    maps.unpin(at(1));
    load(&maps, [6, 8, 9, 10]);
    assert!(maps.eviction_count(at(1)).is_some());
}

#[test]
fn a_read_from_before_an_eviction_is_ignored() {
    let maps = Bitmaps::new(100, BlockSize::DEFAULT);
    maps.set_max_frames(0);
    let (evictions, stale) = (maps.eviction_count(at(5)).unwrap(), [0; SECTOR_BYTES]);
    load(&maps, [5]);
    mark(&maps, 5 * 4096 + 1, 5 * 4096 + 2);
    assert!(maps.insert(at(5), evictions, &stale), "memory stays as it is");
    maps.unpin(at(5));
    assert_eq!(maps.run(at(5), 0, 9), Some((true, 2)));
    maps.lock_resident(at(5)).snapshot();
    maps.set_written(at(5));
    load(&maps, [6, 7, 8]);
    assert!(maps.eviction_count(at(5)).is_some_and(|now| now != evictions));
    let frames = maps.frames();
    assert!(!maps.insert(at(5), evictions, &stale) && !maps.insert(at(5), evictions, &[0xFF; SECTOR_BYTES]));
    assert!(maps.eviction_count(at(5)).is_some());
    load(&maps, [9]);
    assert_eq!(maps.frames(), frames, "the frame was freed");
}

#[test]
fn absent_bitmap_sectors_are_reported_and_the_others_marked() {
    let maps = Bitmaps::new(3, BlockSize::from_bytes(8 << 20).unwrap());
    load(&maps, [1, 3]);
    let mut absent = Vec::new();
    maps.mark(SectorRange::between(5, 4 * 4096), &mut absent, |_, frame, _| frame.state.dirty = true);
    assert_eq!(
        (absent, maps.run(at(1), 0, 4096), maps.run(at(3), 0, 4096)),
        (vec![at(0), at(2)], Some((true, 4096)), Some((true, 4096)))
    );
}
