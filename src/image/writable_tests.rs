//! Tests of `writable.rs` on the simulated host.

use super::super::rig::{child, file, grow, host_with, open};
use super::*;
use crate::format::Footer;

#[test]
fn places_are_distinct_and_end_with_the_room() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    assert_eq!(image.reserve(0), Err(NoRoom), "nothing is prepared yet");
    grow(&host, &image).unwrap();
    let mut places = Vec::new();
    for block in 0.. {
        let Ok(place) = image.reserve(block) else { break };
        assert_eq!(image.reserve(block), Ok(place), "asked again");
        places.push(u64::from(place));
    }
    assert!((16..40).contains(&places.len()), "a step of growth is sixteen blocks: {}", places.len());
    let footer = file(&host).stat().unwrap().len / SECTOR - 1;
    assert!(places.windows(2).all(|p| p[1] >= p[0] + 129), "blocks overlap: {places:?}");
    assert!(places.iter().all(|p| p + 129 <= footer && (p + 1) % 8 == 0), "data at pages, before the footer");
    grow(&host, &image).unwrap();
    assert!(image.reserve(39).is_ok());
}

#[test]
fn marks_reach_over_blocks() {
    let host = host_with(child(), 128 * 4);
    let image = open(&host).unwrap();
    grow(&host, &image).unwrap();
    (0..3).for_each(|block| assert!(image.reserve(block).is_ok()));
    assert_eq!(image.mark(SectorRange::between(120, 260)), Ok(true));
    let bitmaps = image.bitmaps().unwrap();
    let runs: Vec<_> = (0..3).map(|block| bitmaps.run(block, 0, 128).unwrap()).collect();
    assert_eq!(runs, [(false, 120), (true, 128), (true, 4)]);
    let mut dirty = image.dirty().clone();
    dirty.sort_unstable();
    assert_eq!(dirty, [0, 1, 2]);
}

#[test]
fn poison_stays_with_its_first_reason() {
    let image = open(&host_with(child(), 128)).unwrap();
    assert!(image.check_poison().is_ok());
    image.poison("a sync failed");
    image.poison("later");
    let e = image.check_poison().unwrap_err();
    assert!(image.is_poisoned() && e.kind() == ErrorKind::Poisoned && e.line().contains("a sync failed"), "{e}");
}

#[test]
fn hidden_and_suspended_images_are_not_written() {
    for change in [|f: &mut Footer| f.set_hidden(true), |f: &mut Footer| f.saved_state = 1] {
        let host = host_with(child(), 128);
        let (file, mut bytes) = (file(&host), [0; SECTOR_BYTES]);
        file.read_at(&mut bytes, 0).unwrap();
        let mut footer = Footer::decode(&bytes).unwrap();
        change(&mut footer);
        file.write_at(&footer.encode(), 0).unwrap();
        file.write_at(&footer.encode(), file.stat().unwrap().len - SECTOR).unwrap();
        assert_eq!(open(&host).err().map(|e| e.kind()), Some(ErrorKind::Refused));
    }
}
