//! Tests of `reparent.rs`: power cuts at every write, texts that fit in front of the blocks and texts that do not.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::*;
use crate::image::ImageKind;
use crate::image::testing::{commit, file, grow, host_with, kinds, open};
use crate::storage::sim::{FaultPlan, Random, SimHost};
use crate::units::{BlockIndex, SectorRange};

fn link(uuid: u128, name: &str) -> ParentLink {
    let absolute = Some(Path::new("/d").join(name));
    ParentLink { uuid: Uuid::from_u128(uuid), modified: 0, relative: Some(name.into()), absolute, name: name.into() }
}

/// Creates a child of three blocks, with data in the first sector of block 1.
fn child() -> SimHost {
    let host = host_with(ImageKind::Differencing(link(7, "old.vhd")), 128 * 3);
    let image = open(&host).unwrap();
    grow(&host, &image).unwrap();
    let place = image.reserve(BlockIndex::new(1)).unwrap();
    image.file().write_at(&[5; SECTOR_BYTES], (place.sector() + 1).byte_offset()).unwrap();
    assert_eq!(image.mark(SectorRange::between(128, 129)), Ok(true));
    commit(&host, &image);
    image.trim().unwrap();
    host
}

/// Checks the data, and returns the parent's UUID and the recorded paths.
fn seen(host: &SimHost) -> (u128, Vec<PathBuf>) {
    let image = Image::open(file(host)).unwrap();
    let place = image.bat().unwrap().place(BlockIndex::new(1)).expect("the block is there");
    let (mut bits, mut data) = ([0; SECTOR_BYTES], [0; SECTOR_BYTES]);
    image.file().read_at(&mut bits, place.sector().byte_offset()).unwrap();
    image.file().read_at(&mut data, (place.sector() + 1).byte_offset()).unwrap();
    assert!(bits[0] == 0x80 && bits[1..] == [0; SECTOR_BYTES - 1] && data == [5; SECTOR_BYTES]);
    let paths = image.recorded_parent().unwrap().paths.iter().map(|path| path.as_path().to_path_buf()).collect();
    (image.header().unwrap().parent_uuid.as_u128(), paths)
}

fn paths(names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(Into::into).collect()
}

#[test]
fn a_power_cut_leaves_the_old_parent_or_the_new_one() {
    let old = (7, paths(&["old.vhd", "/d/old.vhd"]));
    let new = (8, paths(&["the-new-parent-with-a-longer-name.vhd", "/d/the-new-parent-with-a-longer-name.vhd"]));
    let to = link(8, "the-new-parent-with-a-longer-name.vhd");
    let host = child();
    let len = file(&host).stat().unwrap().len;
    assert_eq!(seen(&host), old);
    host.start_recording();
    reparent(&host, &file(&host), Some(&to)).unwrap();
    let (moments, mut random, mut switched, mut contradictions) = (host.take_recording(), Random::new(1), 0, 0);
    assert!(moments.len() > 20);
    for moment in moments {
        let count = moment.unsynced().len();
        for fate in 0..40 {
            let bits = if fate == 0 { 0 } else { random.next_u64() | if fate == 1 { u64::MAX } else { 0 } };
            let after = moment.crash_with(&|unit| bits >> (unit % 64) & 1 == 1);
            let found = seen(&after);
            assert!(found == old || found == new, "{found:?}, fate {bits:x} of {count}");
            let is_left = Image::open(file(&after)).is_ok_and(|image| !is_reparent_finished(&image));
            assert!(is_left || found == old || kinds(&after).is_empty(), "{:?}", kinds(&after));
            switched += usize::from(found == new);
            // In every other case, the image is written before the reparent is repeated, if it opens for writing.
            let image = open(&after);
            let front = after.bytes(Path::new(crate::image::testing::PATH)).unwrap()[..SECTOR_BYTES].to_vec();
            let is_whole = Footer::decode(front.as_slice().try_into().unwrap()).is_ok();
            assert!(is_whole && (image.is_ok() || image.as_ref().is_err_and(|e| e.kind() == ErrorKind::Refused)));
            contradictions += usize::from(image.is_err());
            if let (Ok(image), true) = (image, fate % 2 == 0) {
                image
                    .reserve(BlockIndex::new(0))
                    .or_else(|_| grow(&after, &image).map(|()| image.reserve(BlockIndex::new(0)).unwrap()))
                    .unwrap();
                assert_eq!(image.mark(SectorRange::between(0, 1)), Ok(true));
                commit(&after, &image);
            }
            reparent(&after, &file(&after), Some(&to)).unwrap();
            assert_eq!(
                (seen(&after), Image::open(file(&after)).unwrap().footer().data_offset),
                (new.clone(), HEADER_HOME)
            );
            assert!(fate % 2 == 0 || (kinds(&after).is_empty() && file(&after).stat().unwrap().len == len));
        }
    }
    assert!(switched > 100 && (1..200).contains(&contradictions), "{contradictions}");
    assert_eq!((seen(&host), kinds(&host).len(), file(&host).stat().unwrap().len), (new, 0, len));
}

#[test]
fn a_text_that_does_not_fit_in_front_stays_after_the_blocks() {
    let host = child();
    let folder = "f".repeat(200);
    let long = PathBuf::from(format!("/{folder}/{folder}/{folder}/{folder}/{folder}/{folder}/p"));
    let to = ParentLink { absolute: Some(long.clone()), ..link(8, "p.vhd") };
    let before = file(&host).stat().unwrap().len;
    reparent(&host, &file(&host), Some(&to)).unwrap();
    assert_eq!((seen(&host), kinds(&host).len()), ((8, vec!["p.vhd".into(), long]), 0));
    let after = file(&host).stat().unwrap().len;
    assert!(after > before + 2048 && after < before + 4096);
    // The next parent's texts fit in front, so the file ends after its blocks again.
    reparent(&host, &file(&host), Some(&link(9, "q.vhd"))).unwrap();
    assert_eq!((seen(&host).0, kinds(&host).len(), file(&host).stat().unwrap().len), (9, 0, before));
}

#[test]
fn locators_keep_their_slots_and_roots_have_none() {
    let host = child();
    let f = file(&host);
    let mut header = Image::open(f.clone()).unwrap().header().unwrap().clone();
    header.locators = [LocatorEntry::UNUSED; LOCATORS];
    header.locators[6] = LocatorEntry::new(Platform::W2ru, 1536, 10);
    header.locators[2] = LocatorEntry::new(Platform::MacX, 2048, 10);
    header.locators[1] = LocatorEntry::new(Platform::Mac, 2560, 10);
    f.write_at(&header.encode(), HEADER_HOME).unwrap();
    reparent(&host, &f, Some(&link(8, "p q.vhd"))).unwrap();
    let image = Image::open(f.clone()).unwrap();
    let texts = image.parent_locators().unwrap();
    let slots: Vec<_> = texts.iter().map(|(slot, platform, _)| (*slot, *platform)).collect();
    assert_eq!(slots, [(0, Platform::W2ku), (2, Platform::MacX), (6, Platform::W2ru)]);
    assert_eq!((texts[1].2.as_slice(), texts[1].2.len()), (&b"file://./p%20q.vhd"[..], 18));
    assert!(image.header().unwrap().locators.iter().all(|entry| entry.offset < 4096));
    reparent(&host, &f, None).unwrap();
    let image = Image::open(f.clone()).unwrap();
    assert_eq!((image.kind(), image.header().unwrap().parent_uuid), (DiskType::Dynamic, Uuid::nil()));
    assert!(image.header().unwrap().locators.iter().all(LocatorEntry::is_unused) && kinds(&host).is_empty());
    reparent(&host, &f, Some(&link(9, "r.vhd"))).unwrap();
    assert_eq!(seen(&host), (9, paths(&["r.vhd", "/d/r.vhd"])));
}

#[test]
fn a_full_file_system_and_an_unsupported_path_change_nothing() {
    let host = child();
    let before = host.bytes(Path::new(crate::image::testing::PATH));
    let stat = file(&host).stat().unwrap();
    host.set_faults(FaultPlan { capacity: Some(stat.allocated), ..FaultPlan::default() });
    // The texts take more space than is free in the file's last page.
    let long = ParentLink { absolute: Some(format!("/{}/p.vhd", "f".repeat(1800)).into()), ..link(8, "p.vhd") };
    assert_eq!(reparent(&host, &file(&host), Some(&long)).unwrap_err().kind(), ErrorKind::NoSpace);
    host.set_faults(FaultPlan::default());
    assert_eq!((file(&host).stat().unwrap().allocated, seen(&host).0), (stat.allocated, 7));
    assert_eq!(reparent(&host, &file(&host), Some(&link(8, "a\\b"))).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(host.bytes(Path::new(crate::image::testing::PATH)), before);
    let fixed = host_with(ImageKind::Fixed, 100);
    assert_eq!(reparent(&fixed, &file(&fixed), None).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// A power cut between the writes of two footers: the trailing one has another size, and a geometry by the rule for its
/// creator or by the rule of an earlier version.
#[test]
fn footers_agree_again_whatever_the_geometry() {
    let host = host_with(ImageKind::Dynamic, 1000);
    let f = file(&host);
    let end = f.stat().unwrap().len - SECTOR;
    let old = Footer { creator: *b"vbox", ..Image::open(f.clone()).unwrap().footer().clone() };
    for geometry in [Geometry::for_size(999 * SECTOR), Geometry::MAX] {
        let new = Footer { geometry, ..old.with_size(999 * SECTOR) };
        f.write_at(&old.encode(), 0).unwrap();
        f.write_at(&new.encode(), end).unwrap();
        open_reconciled(&f).unwrap();
        let mut front = [0; SECTOR_BYTES];
        f.read_at(&mut front, 0).unwrap();
        assert_eq!(Footer::decode(&front).as_ref(), Ok(&new));
    }
}
