//! Tests of `tail.rs`.

use super::super::rig::{SLOT, child, file, grow, host_with, open};
use super::*;
use crate::storage::sim::FaultPlan;

#[test]
fn both_footers_are_valid_at_every_moment() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    let footer = image.footer_bytes();
    let (old, end) = {
        let room = image.room();
        (room.footer, room.end)
    };
    let at = |sector: u64| {
        let mut bytes = [0; SECTOR_BYTES];
        image.file().read_at(&mut bytes, sector * SECTOR).map(|()| bytes).ok()
    };
    let (mut growth, mut ops, mut seen) = (Growth::begin(&image, SLOT).unwrap(), Vec::new(), String::new());
    assert!(Growth::begin(&image, SLOT).is_none(), "one step at a time");
    while growth.next(None, &mut ops).unwrap() == Step::Wait {
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
        let last = file(&host).stat().unwrap().len / SECTOR - 1;
        assert!(at(0) == Some(footer) && at(last) == Some(footer), "after {seen}");
        assert!(seen.len() < 3 || at(old) == Some([0; SECTOR_BYTES]), "the old one would be a bitmap");
        assert_eq!(image.room().end, end, "no room before it is durably zero");
    }
    assert_eq!(seen, "ATWT");
    let grown = image.room().end;
    assert!(grown > end && !image.is_growing());
}

#[test]
fn a_full_host_is_told_and_costs_nothing() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    let before = file(&host).stat().unwrap();
    host.set_faults(FaultPlan { room: Some(before.allocated + 8192), ..FaultPlan::default() });
    assert_eq!(grow(&host, &image).unwrap_err().kind(), ErrorKind::NoSpace);
    assert!(!image.is_poisoned() && !image.is_growing() && image.wants_room());
    let after = file(&host).stat().unwrap();
    assert_eq!((after.len, after.allocated), (before.len, before.allocated), "what a failed try got is given back");
    // A little room: fewer blocks.
    host.set_faults(FaultPlan { room: Some(before.allocated + (300 << 10)), ..FaultPlan::default() });
    grow(&host, &image).unwrap();
    assert!(image.reserve(0).is_ok() && image.reserve(1).is_ok());
    host.set_faults(FaultPlan { no_allocate: true, ..FaultPlan::default() });
    grow(&host, &image).unwrap();
}

#[test]
fn room_for_all_or_none() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    let (before, step) = (file(&host).stat().unwrap(), |growth: &mut Growth| {
        super::super::drive(&host, image.file(), SLOT, |failed, ops| growth.next(failed, ops))
    });
    host.set_faults(FaultPlan { room: Some(before.allocated + (1 << 20)), ..FaultPlan::default() });
    let mut growth = Growth::begin_for(&image, SLOT, 30).expect("there is none yet");
    assert_eq!(step(&mut growth).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(file(&host).stat().unwrap().allocated, before.allocated);
    host.set_faults(FaultPlan::default());
    step(&mut Growth::begin_for(&image, SLOT, 30).expect("there is none yet")).unwrap();
    assert!(Growth::begin_for(&image, SLOT, 30).is_none());
    assert!((0..30).all(|block| image.reserve(block).is_ok()));
}

#[test]
fn a_trimmed_file_ends_behind_its_last_block() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    grow(&host, &image).unwrap();
    let place = image.reserve(7).unwrap();
    assert_eq!(image.mark(crate::units::SectorRange::between(7 * 128, 7 * 128 + 1)), Ok(true));
    super::super::rig::commit(&host, &image);
    image.reserve(8).unwrap();
    image.trim().unwrap();
    assert_eq!(file(&host).stat().unwrap().len, (u64::from(place) + 129 + 1) * SECTOR, "block 8 was never written");
    drop(image);
    let image = open(&host).unwrap();
    assert_eq!((image.image().bat().unwrap().place(7), image.image().bat().unwrap().place(8)), (Some(place), None));
    let empty = host_with(child(), 128 * 40);
    let image = open(&empty).unwrap();
    grow(&empty, &image).unwrap();
    image.trim().unwrap();
    assert_eq!(file(&empty).stat().unwrap().len, image.image().metadata_end() + SECTOR);
    drop(image);
    assert!(open(&empty).is_ok());
}
