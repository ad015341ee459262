//! Tests of `repair.rs` and `undo_file.rs` on the simulated file system; `tests/verbs` has kills and power cuts.

use std::collections::BTreeSet;
use std::path::Path;

use super::super::apply_undo::undo_repair;
use super::super::check_image::{check, tests::with_batmap};
use super::*;
use crate::error::ErrorKind;
use crate::format::DiskType;
use crate::format::Severity;
use crate::image::testing::{PATH, child, file, host_with, kinds, poke, written};
use crate::storage::Access;
use crate::storage::sim::{FaultPlan, SimHost};

/// Creates an image of 1000 sectors in blocks of 64 KiB: all of block 0, one sector of block 2, three of the last
/// block.
fn image() -> SimHost {
    written(child(), 1000, &[(0, 128), (256, 257), (900, 903)])
}

/// Restores the image from before a repair by the documented format of the undo file alone.
fn undone(host: &SimHost, kept: &Path) -> Vec<u8> {
    let (mut image, undo) = (host.bytes(Path::new(PATH)).unwrap(), host.bytes(kept).unwrap());
    let number = |at: usize| usize::try_from(u64::from_be_bytes(undo[at..at + 8].try_into().unwrap())).unwrap();
    assert_eq!((&undo[..16], number(48), number(72)), (&b"diffdisk undo 2\n"[..], 1, undo.len()));
    image.resize(number(16), 0);
    let (mut pieces, mut at) = (Vec::new(), 512);
    while at < number(24) {
        pieces.push((number(at), &undo[at + 16..at + 16 + number(at + 8)]));
        at += 16 + number(at + 8);
    }
    for (offset, bytes) in pieces.into_iter().rev() {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    image
}

/// Breaks an image, checks that the defect of `kind` is reported, repairs it, compares the place and the number of
/// present sectors of each block with those before the repair, and undoes the repair.
fn mends(kind: &str, break_it: fn(&SimHost)) {
    let host = image();
    assert_eq!(kinds(&host), [""; 0]);
    break_it(&host);
    let broken = host.bytes(Path::new(PATH)).unwrap();
    let found = kinds(&host);
    assert!(found.contains(&kind), "{found:?}, not {kind}");
    let bits = |host: &SimHost| {
        let image = Image::open(file(host)).unwrap();
        let of = |block| {
            let count = |words: Vec<u64>| bitmap::count(&words, 0, image.sectors_on_disk(block));
            (image.bat().unwrap().place(block), image.block_bitmap(block).unwrap().map(count))
        };
        (0..8).map(BlockIndex::new).map(of).collect::<Vec<_>>()
    };
    let before = bits(&host);
    let kept = repair(&host, &file(&host), None).unwrap().unwrap();
    assert_eq!(kinds(&host), [""; 0], "{kind}");
    assert!(bits(&host) == before, "{kind}");
    assert!(repair(&host, &file(&host), None).unwrap().is_none(), "nothing is left to do");
    assert!(undone(&host, &kept) == broken, "{kind}: an undone repair leaves other bytes");
    let undo_file = host.open(&kept, Access::Write).unwrap();
    let undo = || undo_repair(&file(&host), &undo_file).map_err(|e| e.kind());
    // If the image was changed since the repair, even in bytes without meaning, the undo is refused.
    let tail = end(&host);
    let mut footer = [0; SECTOR_BYTES];
    file(&host).read_at(&mut footer, tail).unwrap();
    file(&host).set_len(tail + SECTOR + 1).unwrap();
    assert_eq!(undo(), Err(ErrorKind::Refused), "{kind}");
    file(&host).set_len(tail + SECTOR).unwrap();
    assert_eq!(undo(), Ok(()), "{kind}");
    assert!(host.bytes(Path::new(PATH)).unwrap() == broken, "{kind}: an undo leaves other bytes");
    assert_eq!(undo(), Err(ErrorKind::Refused), "{kind}: once only");
}

fn end(host: &SimHost) -> u64 {
    Image::open(file(host)).unwrap().data_end()
}

fn footer(host: &SimHost) -> Footer {
    Image::open(file(host)).unwrap().footer().clone()
}

fn table(host: &SimHost) -> u64 {
    Image::open(file(host)).unwrap().table_offset().unwrap()
}

/// Returns the offset of the last block.
fn last_block(host: &SimHost) -> u64 {
    Image::open(file(host)).unwrap().bat().unwrap().place(BlockIndex::new(7)).unwrap().sector().byte_offset()
}

/// A kind of defect, and a function that causes it in the image.
type Damage = (&'static str, fn(&SimHost));

/// Damage of every repairable kind that is not in [`TESTED_ALONE`].
const DAMAGES: &[Damage] = &[
    ("front-footer-invalid", |host| poke(host, 0, &[1; 512])),
    ("front-footer-invalid", |host| poke(host, 24, &[1; 2])),
    ("trailing-footer-missing", |host| poke(host, end(host), &[0xC7; 512])),
    ("trailing-footer-invalid", |host| poke(host, end(host) + 100, &[1; 3])),
    ("trailing-footer-missing", |host| file(host).set_len(end(host)).unwrap()),
    ("trailing-footer-missing", |host| file(host).set_len(end(host) - 1000).unwrap()),
    ("short-footer", |host| file(host).set_len(end(host) + 511).unwrap()),
    ("footers-differ", |host| poke(host, 0, &footer(host).with_size(500_224).encode())),
    ("footer-copy-stale", |host| poke(host, 0, &Footer { timestamp: 1, ..footer(host) }.encode())),
    ("bits-beyond-disk", |host| poke(host, last_block(host) + 14, &[0x11])),
    ("entry-zero", |host| {
        poke(host, table(host) + 4, &[0; 4]);
        poke(host, table(host) + 12, &[0; 8]);
    }),
    ("batmap-wrong", |host| with_batmap(host, &[0, 1, 2])),
    ("batmap-checksum", |host| {
        with_batmap(host, &[0]);
        poke(host, table(host) + 512 + 24, &[1; 4]);
    }),
    ("space-unreferenced", |host| {
        let (at, footer) = (end(host), footer(host).encode());
        poke(host, at, &[3; 20_000]);
        poke(host, at + 20_480, &footer);
    }),
];

/// The repairable kinds that have a test of their own below: the repair changes which blocks have a place, or the image
/// is fixed.
const TESTED_ALONE: [&str; 2] = ["block-beyond-disk", "fixed-padded"];

#[test]
fn every_repairable_defect_is_repaired_and_the_repair_can_be_undone() {
    DAMAGES.iter().for_each(|(kind, break_it)| mends(kind, *break_it));
    let tested: BTreeSet<_> = DAMAGES.iter().map(|(kind, _)| *kind).chain(TESTED_ALONE).collect();
    assert_eq!(
        tested,
        Defect::repairable_kinds().collect::<BTreeSet<_>>(),
        "each repairable row of the table of defects needs a test"
    );
}

#[test]
fn space_between_blocks_becomes_holes() {
    let host = image();
    let image = Image::open(file(&host)).unwrap();
    poke(&host, image.table_offset().unwrap() + 8, &[0xFF; 4]);
    let (broken, room) = (host.bytes(Path::new(PATH)).unwrap(), file(&host).stat().unwrap());
    assert_eq!(kinds(&host), ["space-unreferenced"]);
    let kept = repair(&host, &file(&host), None).unwrap().unwrap();
    let now = file(&host).stat().unwrap();
    assert!(kinds(&host).is_empty() && now.allocated < room.allocated && now.len == room.len);
    assert!(undone(&host, &kept) == broken);
}

#[test]
fn entries_after_the_end_of_the_disk_are_dropped_and_their_space_freed() {
    let host = image();
    let image = Image::open(file(&host)).unwrap();
    // Cut to 7 blocks, as a fast resize does: the last block is after the end of the disk.
    let footer = image.footer().with_size(896 * SECTOR).encode();
    poke(&host, 0, &footer);
    poke(&host, image.data_end(), &footer);
    let broken = host.bytes(Path::new(PATH)).unwrap();
    assert_eq!(kinds(&host), ["block-beyond-disk"]);
    let kept = repair(&host, &file(&host), None).unwrap().unwrap();
    assert_eq!(kinds(&host), [""; 0], "the entry is dropped, then its space is freed");
    assert!(file(&host).stat().unwrap().len < broken.len() as u64);
    assert!(undone(&host, &kept) == broken);
}

#[test]
fn footers_of_two_disk_types_are_repaired_only_by_choice() {
    for (take, kind) in [(FooterChoice::Front, DiskType::Differencing), (FooterChoice::End, DiskType::Dynamic)] {
        let host = image();
        let tail = end(&host);
        let footer = Image::open(file(&host)).unwrap().footer().clone();
        poke(&host, tail, &Footer { disk_type: DiskType::Dynamic, ..footer }.encode());
        let broken = host.bytes(Path::new(PATH)).unwrap();
        assert_eq!(kinds(&host), ["footer-kinds-differ"]);
        assert!(repair(&host, &file(&host), None).unwrap().is_none());
        let refused = Image::open(file(&host)).unwrap().check_writable().unwrap_err();
        assert!(refused.line().contains("--take"), "{}", refused.line());
        assert!(crate::image::open_reconciled(&file(&host)).is_ok() && host.bytes(Path::new(PATH)).unwrap() == broken);
        let kept = repair(&host, &file(&host), Some(take)).unwrap().unwrap();
        assert_eq!((kinds(&host), Image::open(file(&host)).unwrap().kind()), (vec![], kind));
        undo_repair(&file(&host), &host.open(&kept, Access::Write).unwrap()).unwrap();
        assert!(host.bytes(Path::new(PATH)).unwrap() == broken);
    }
}

#[test]
fn padding_after_a_fixed_disk_is_cut_off() {
    let host = host_with(crate::image::ImageKind::Fixed, 100);
    poke(&host, 0, &[7; 1536]);
    let whole = host.bytes(Path::new(PATH)).unwrap();
    file(&host).set_len(whole.len() as u64 + 3584).unwrap();
    let padded = host.bytes(Path::new(PATH)).unwrap();
    assert!(kinds(&host) == ["fixed-padded"] && Image::open(file(&host)).is_err());
    let kept = repair(&host, &file(&host), None).unwrap().unwrap();
    assert!(kinds(&host).is_empty() && host.bytes(Path::new(PATH)).unwrap() == whole);
    undo_repair(&file(&host), &host.open(&kept, Access::Write).unwrap()).unwrap();
    assert!(host.bytes(Path::new(PATH)).unwrap() == padded);
    // A non-zero byte in the padding, or a footer with another size, is not recognized as padding.
    poke(&host, padded.len() as u64 - 1, &[1]);
    assert_eq!(kinds(&host), ["footer-missing"]);
    poke(&host, padded.len() as u64 - 1, &[0]);
    let at = whole.len() as u64 - SECTOR;
    let footer = Footer::decode(whole.last_chunk().unwrap()).unwrap();
    poke(&host, at, &footer.with_size(at - SECTOR).encode());
    assert_eq!(kinds(&host), ["footer-missing"]);
}

#[test]
fn ambiguous_defects_are_not_repaired() {
    let host = image();
    let image = Image::open(file(&host)).unwrap();
    let (table, place) = (image.table_offset().unwrap(), image.bat().unwrap().place(BlockIndex::new(0)).unwrap());
    poke(&host, table + 4, &place.entry().to_be_bytes());
    assert!(repair(&host, &file(&host), None).unwrap().is_none());
    poke(&host, 0, &[0; 512]);
    assert!(repair(&host, &file(&host), None).unwrap().is_some(), "a footer is repaired in spite of defects in blocks");
    assert_eq!(kinds(&host), ["block-duplicate"]);
    poke(&host, 512, &[0; 512]);
    let e = repair(&host, &file(&host), None).unwrap_err();
    assert!(e.line().contains("no dynamic header"), "{}", e.line());
}

#[test]
fn a_full_file_system_changes_nothing() {
    let host = image();
    poke(&host, 0, &[1; 512]);
    let before = host.digest(Path::new(PATH));
    host.set_faults(FaultPlan { capacity: Some(0), ..FaultPlan::default() });
    let e = repair(&host, &file(&host), None).unwrap_err();
    assert_eq!((e.kind(), host.digest(Path::new(PATH))), (crate::error::ErrorKind::NoSpace, before));
    assert_eq!(host.names().len(), 1, "{:?}", host.names());
    host.set_faults(FaultPlan::default());
    assert!(repair(&host, &file(&host), None).unwrap().is_some());
    let report = check(file(&host)).unwrap().0;
    assert_eq!(report.count(Severity::Corruption), 0);
}
