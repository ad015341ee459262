//! Tests of `check_image.rs` and `check_blocks.rs` on the simulated file system.

use super::super::space::whole_pages;
use super::*;
use crate::format::bat::BlockPlace;
use crate::format::{DynamicHeader, Footer, Severity};
use crate::image::ImageKind;
use crate::image::testing::{self, child, commit, file, grow, host_with, kinds, open, poke, written};
use crate::storage::sim::SimHost;
use crate::units::{BlockIndex, FileSector, SECTOR, SECTOR_BYTES, SectorRange};

fn place(host: &SimHost, block: u32) -> u64 {
    Image::open(file(host)).unwrap().bat().unwrap().place(BlockIndex::new(block)).unwrap().sector().byte_offset()
}

#[test]
fn bits_after_the_end_of_the_disk_are_reported() {
    let host = written(child(), 1000, &[(900, 903), (0, 2)]);
    assert_eq!(kinds(&host), [""; 0]);
    // The last block has 104 sectors: bit 104 is the first of byte 13.
    let at = place(&host, 7);
    poke(&host, at + 13, &[0xA0]);
    let (report, _) = check(file(&host)).unwrap();
    assert_eq!(report.defects, [Defect::BitsBeyondDisk { block: BlockIndex::new(7), bits: 2, at }]);
    assert_eq!((report.count(Severity::Cosmetic), report.count(Severity::Corruption)), (1, 0));
    // A writer that sets the bits of whole blocks sets those after the end, too.
    poke(&host, at, &[0xFF; 16]);
    assert_eq!(kinds(&host), [""; 0]);
    poke(&host, at + 16, &[0xFF; 100]);
    assert_eq!(kinds(&host), [""; 0], "the rest of the bitmap's sector means nothing");
    assert_eq!(kinds(&written(ImageKind::Dynamic, 1000, &[(999, 1000)])), [""; 0]);
    let words = [u64::MAX; 192];
    let beyond = |words: &[u64], sectors| check_blocks::bits_beyond_disk(words, sectors, 12_288).collect::<Vec<_>>();
    assert_eq!((beyond(&words, 4_095), beyond(&words, 4_096), beyond(&words, 12_288)), (vec![], vec![], vec![]));
    let mut partial = words;
    partial[64] = 0;
    assert_eq!(beyond(&partial, 4_500), [(4_500, 8_192)], "per bitmap sector: bitmap sectors are written one by one");
    assert_eq!(beyond(&partial, 9_000), []);
}

#[test]
fn data_under_clear_bits_of_a_root_is_reported() {
    let host = written(ImageKind::Dynamic, 1000, &[(0, 9), (128, 130)]);
    let at = place(&host, 1);
    poke(&host, at, &[0x80]);
    poke(&host, at + 1, &[0; 15]);
    let (report, _) = check(file(&host)).unwrap();
    assert_eq!(
        report.defects,
        [Defect::DataUnderClearBit { block: BlockIndex::new(1), sector: 1, at: at + 2 * SECTOR }]
    );
    poke(&host, at + 2 * SECTOR, &[0; SECTOR_BYTES]);
    assert_eq!(kinds(&host), [""; 0], "zeros are what an absent sector holds");
    let host = written(child(), 1000, &[(0, 9)]);
    let at = place(&host, 0);
    poke(&host, at, &[0x80, 0]);
    assert_eq!(kinds(&host), [""; 0], "a power cut may leave data under clear bits of a child");
}

#[test]
fn sectors_after_the_end_of_the_file_are_reported() {
    let host = written(child(), 1000, &[(0, 128)]);
    let at = place(&host, 0);
    let end = at + 129 * SECTOR;
    file(&host).set_len(end - 3 * SECTOR).unwrap();
    let (report, _) = check(file(&host)).unwrap();
    let cut = Defect::BlockCutOff { block: BlockIndex::new(0), sectors: 3, at };
    assert!(report.defects.contains(&cut) && report.defects.len() == 2, "{:?}", report.defects);
    assert_eq!(report.lost, [SectorRange::between(125, 128)]);
    poke(&host, at + 12, &[0; 4]);
    assert_eq!(kinds(&host), ["trailing-footer-missing"], "sectors with clear bits are not lost");
}

#[test]
fn unreferenced_space_is_reported_if_it_is_allocated() {
    let host = written(child(), 1000, &[(0, 1), (128, 129), (256, 257)]);
    let table = Image::open(file(&host)).unwrap().table_offset().unwrap();
    poke(&host, table + 4, &[0xFF; 4]);
    let (report, image) = check(file(&host)).unwrap();
    assert!(matches!(report.defects[..], [Defect::SpaceUnreferenced { .. }]), "{:?}", report.defects);
    let gap = unreferenced_space(&image.unwrap()).unwrap().remove(0);
    file(&host).punch_hole(whole_pages(&gap).start, whole_pages(&gap).end - whole_pages(&gap).start).unwrap();
    assert_eq!(kinds(&host), [""; 0]);
    poke(&host, table + 8, &[0xFF; 4]);
    let (report, _) = check(file(&host)).unwrap();
    assert!(matches!(report.defects[..], [Defect::SpaceUnreferenced { .. }]), "space before the footer always counts");
    assert_eq!(report.count(Severity::Leak), 1);
}

#[test]
fn misaligned_blocks_are_suspects() {
    let host = written(child(), 1000, &[(0, 1), (128, 256), (256, 384)]);
    assert!(check(file(&host)).unwrap().0.suspects.is_none());
    // The last block is moved by one sector, as QEMU packs it.
    let image = Image::open(file(&host)).unwrap();
    let (table, at) = (image.table_offset().unwrap(), place(&host, 2));
    let mut block = vec![0; 129 * SECTOR_BYTES];
    file(&host).read_at(&mut block, at).unwrap();
    let moved = BlockPlace::from_sector(FileSector::containing(at) + 1).unwrap();
    poke(&host, at + SECTOR, &block);
    poke(&host, at + 130 * SECTOR, &image.footer().encode());
    poke(&host, table + 8, &moved.entry().to_be_bytes());
    let (report, _) = check(file(&host)).unwrap();
    assert_eq!(report.defects, [Defect::PlacedByAnother { block: BlockIndex::new(2), blocks: 1, at: at + SECTOR }]);
    assert_eq!(report.count(Severity::Cosmetic), 1);
    let suspects = report.suspects.unwrap();
    assert!(suspects.placed_by_another && suspects.blocks == [(BlockIndex::new(2), moved)], "{suspects:?}");
    poke(&host, at + SECTOR, &[0xFF, 0xFE]);
    assert!(
        check(file(&host)).unwrap().0.suspects.is_none(),
        "a block with a clear bit was written as a child's block"
    );
    // Another program's image may have its blocks anywhere, so their alignment proves nothing.
    poke(&host, at + SECTOR, &[0xFF, 0xFF]);
    let foreign = Footer { creator: *b"xyz ", ..image.footer().clone() }.encode();
    poke(&host, 0, &foreign);
    poke(&host, at + 130 * SECTOR, &foreign);
    let (report, _) = check(file(&host)).unwrap();
    assert!(report.defects.is_empty() && !report.suspects.unwrap().placed_by_another);
}

#[test]
fn at_most_a_thousand_defects_of_a_kind_are_listed() {
    let host = host_with(child(), 128 * 3000);
    let image = Image::open(file(&host)).unwrap();
    let (table, entry) = (image.table_offset().unwrap(), u32::try_from(image.data_end() / SECTOR).unwrap());
    let entries: Vec<u8> = (0..2500).flat_map(|_| entry.to_be_bytes()).collect();
    poke(&host, table, &entries);
    poke(&host, image.data_end() + 129 * SECTOR, &image.footer().encode());
    let (report, _) = check(file(&host)).unwrap();
    assert_eq!((report.defects.len(), report.count(Severity::Corruption)), (1000, 2499));
    assert_eq!(report.unlisted(Severity::Corruption), 1499);
}

/// Changes the image to one as XenServer creates it: with a batmap in the free page after the table.
pub(in crate::image) fn with_batmap(host: &SimHost, claims: &[u32]) {
    let image = Image::open(file(host)).unwrap();
    let header = image.header().unwrap().clone();
    let at = header.table_offset + crate::format::bat::bytes(header.entries);
    let mut map = [0; SECTOR_BYTES];
    claims.iter().for_each(|block| map[(block / 8) as usize] |= 0x80 >> (block % 8));
    let sum = !map.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let mut bytes = [0; SECTOR_BYTES];
    bytes[..8].copy_from_slice(b"tdbatmap");
    bytes[8..16].copy_from_slice(&(at + SECTOR).to_be_bytes());
    bytes[16..20].copy_from_slice(&1u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&0x0001_0002u32.to_be_bytes());
    bytes[24..28].copy_from_slice(&sum.to_be_bytes());
    poke(host, at, &bytes);
    poke(host, at + SECTOR, &map);
    let tap = Footer { creator: *b"tap\0", creator_version: 0x0001_0003, ..image.footer().clone() }.encode();
    poke(host, 0, &tap);
    poke(host, image.data_end(), &tap);
    assert!(DynamicHeader::decode(&header.encode()).is_ok());
}

#[test]
fn a_batmap_is_compared_with_the_bitmaps() {
    let host = written(child(), 1000, &[(0, 128), (128, 255), (896, 1000)]);
    with_batmap(&host, &[0, 7]);
    assert_eq!(kinds(&host), [""; 0], "the last block is complete up to the end of the disk");
    with_batmap(&host, &[0, 1, 3]);
    let (report, image) = check(file(&host)).unwrap();
    let at = Batmap::read(&image.unwrap()).unwrap().unwrap().offset(BlockIndex::new(1));
    let wrong = [1, 3].map(|block| Defect::BatmapWrong { at, block: BlockIndex::new(block) });
    assert_eq!(report.defects, wrong, "one block misses a sector, one has no place");
    poke(&host, at, &[0x80]);
    assert_eq!(kinds(&host), ["batmap-checksum"]);
    assert!(testing::open(&host).is_ok(), "an open does not need a valid batmap");
}

use crate::image::batmap::Batmap;

#[test]
fn a_writer_clears_the_claims_of_the_batmap_for_blocks_without_a_place() {
    let host = written(child(), 1000, &[(0, 128)]);
    with_batmap(&host, &[0, 3]);
    let image = open(&host).unwrap();
    assert_eq!(kinds(&host), [""; 0]);
    while image.reserve(BlockIndex::new(3)).is_err() {
        grow(&host, &image).unwrap();
    }
    assert_eq!(image.mark(SectorRange::between(384, 385)), Ok(true));
    commit(&host, &image);
    image.trim().unwrap();
    drop(image);
    assert_eq!(kinds(&host), [""; 0]);
    let image = Image::open(file(&host)).unwrap();
    let batmap = Batmap::read(&image).unwrap().unwrap();
    assert_eq!(batmap.claimed().collect::<Vec<_>>(), [BlockIndex::new(0)]);
    assert!(batmap.verify().is_ok());
}
