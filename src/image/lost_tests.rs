//! Tests of `lost.rs` on the simulated file system.

use super::super::check;
use super::super::testing::{child, file, kinds, poke, written};
use super::*;
use crate::error::ErrorKind;
use crate::image::{Image, ImageKind};
use crate::storage::sim::SimHost;
use crate::units::{BlockIndex, SECTOR};

fn place(host: &SimHost, block: u32) -> u64 {
    Image::open(file(host)).unwrap().bat().unwrap().place(BlockIndex::new(block)).unwrap().sector().byte_offset()
}

/// Returns the lost ranges, and whether the image opens.
fn lost(host: &SimHost) -> (Vec<(u64, u64)>, bool) {
    let ranges = check(file(host)).unwrap().0.lost;
    let opens = Image::open(file(host));
    assert!(opens.is_ok() || opens.is_err_and(|e| e.kind() == ErrorKind::Invalid && e.line().contains("are lost")));
    (ranges.iter().map(|range| (range.start(), range.end())).collect(), Image::open(file(host)).is_ok())
}

#[test]
fn sectors_cut_off_are_lost_if_their_bits_are_set() {
    for kind in [child(), ImageKind::Dynamic] {
        let root = matches!(kind, ImageKind::Dynamic);
        // Sectors 0 to 9 of block 0 and the first sector of block 1 are written. A root sets the bits of whole blocks.
        let host = written(kind, 1000, &[(0, 10), (128, 129)]);
        let (first, last) = (place(&host, 0), place(&host, 1));
        assert_eq!(lost(&host), (vec![], true));
        let cut = |len: u64| file(&host).set_len(len).unwrap();
        // The cut is in sectors of the last block that were never written. In a child their bits are clear, so no
        // sector is lost. In a root their bits are set.
        cut(last + 20 * SECTOR);
        match root {
            false => assert_eq!(lost(&host), (vec![], true)),
            true => assert_eq!(lost(&host), (vec![(128 + 19, 256)], false)),
        }
        // The cut is in the middle of a present sector.
        cut(last + SECTOR + 100);
        let all = if root { (128, 256) } else { (128, 129) };
        assert_eq!(lost(&host), (vec![all], false));
        // The cut is in the bitmap of the last block, so all sectors of that block may have been present.
        cut(last + 100);
        assert_eq!(lost(&host), (vec![(128, 256)], false));
        cut(last);
        assert_eq!(lost(&host), (vec![(128, 256)], false));
        cut(first + 5 * SECTOR);
        let of_first: &[(u64, u64)] = if root { &[(4, 256)] } else { &[(4, 10), (128, 256)] };
        assert_eq!(lost(&host), (of_first.to_vec(), false));
    }
}

#[test]
fn an_entry_far_after_the_end_of_the_file_loses_only_its_block() {
    let host = written(child(), 1000, &[(0, 10)]);
    let table = Image::open(file(&host)).unwrap().table_offset().unwrap();
    poke(&host, table + 4 * 7, &0xFFFF_FF00u32.to_be_bytes());
    // The last block has 104 sectors.
    assert_eq!(lost(&host), (vec![(896, 1000)], false));
    assert!(kinds(&host).contains(&"block-cut-off"));
    let kept = super::super::repair(&host, &file(&host), None).unwrap();
    assert!(kept.is_none(), "an image that has lost sectors is not repaired");
    let salvaged = Image::salvage(file(&host)).unwrap();
    assert_eq!(salvaged.lost(), [SectorRange::between(896, 1000)]);
    assert!(salvaged.check_writable().is_err());
}

#[test]
fn neighbours_are_joined() {
    let range = SectorRange::between;
    let all = merge_ranges(vec![range(8, 10), range(0, 4), range(4, 6), range(3, 5)]);
    assert_eq!(all, [range(0, 6), range(8, 10)]);
}
