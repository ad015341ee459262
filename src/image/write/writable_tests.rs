//! Tests of `writable.rs` on the simulated host.

use std::path::Path;

use super::*;
use crate::format::Footer;
use crate::format::bat;
use crate::image::testing::{PATH, child, file, grow, host_with, open};
use crate::image::{ImageKind, ImageSpec, create};
use crate::storage::sim::SimHost;
use crate::units::{BlockSize, FileSector, SECTOR};

#[test]
fn places_are_distinct_and_end_with_the_free_tail() {
    let host = host_with(child(), 128 * 40);
    let image = open(&host).unwrap();
    image.set_allocation(Allocation::Block);
    assert_eq!(image.reserve(BlockIndex::new(0)), Err(NeedsGrowth), "the free tail is empty");
    grow(&host, &image).unwrap();
    let mut places = Vec::new();
    for block in (0..).map(BlockIndex::new) {
        let Ok(place) = image.reserve(block) else { break };
        assert_eq!(image.reserve(block), Ok(place), "a repeated call");
        places.push(place.sector().get());
    }
    assert!((16..40).contains(&places.len()), "a step of growth is sixteen blocks: {}", places.len());
    let footer = file(&host).stat().unwrap().len / SECTOR - 1;
    assert!(places.windows(2).all(|p| p[1] >= p[0] + 129), "blocks overlap: {places:?}");
    assert!(places.iter().all(|p| p + 129 <= footer && (p + 1) % 8 == 0), "data is page-aligned, before the footer");
    grow(&host, &image).unwrap();
    assert!(image.reserve(BlockIndex::new(39)).is_ok());
}

#[test]
fn no_block_ends_after_the_computed_end() {
    for bytes in [4 << 10, 256 << 10, 512 << 10, 2 << 20, 8 << 20, 128 << 20, 256 << 20] {
        let (host, block_size) = (SimHost::new(1), BlockSize::from_bytes(bytes).unwrap());
        let spec = ImageSpec { kind: ImageKind::Dynamic, size: 1 << 20, block_size, reserve: 0 };
        create(&host, Path::new(PATH), &spec).unwrap();
        let image = open(&host).unwrap();
        let (stride, last) = (u64::from(block_size.stride_sectors()), u64::from(bat::MAX_ENTRY));
        let (unit, paged) = (layout::alignment(block_size) / SECTOR, layout::page_stride(block_size));
        // Far from 2 TiB; then closer, such that only some blocks can be aligned, or page-aligned; then packed.
        let most = [1 << 20, 30 * layout::aligned_stride(block_size), 30 * paged + 200, 30 * paged, 30 * stride];
        for from in most.into_iter().flat_map(|room| (0..150).map(move |n| last - stride - room - n)) {
            let (mut end, mut unplaced) = (from, 30);
            for blocks in 1..=30 {
                let Ok(place) = layout::next_place(FileSector::new(end), block_size, unplaced) else { break };
                (end, unplaced) = (place.end(block_size).get(), unplaced - 1);
                let computed = image.end_after(FileSector::new(from), blocks, 30).unwrap().get();
                assert!(end <= computed, "{blocks} of {bytes} from {from} end at {end}, not {computed}");
                assert!(
                    computed <= from + (unit - 1) + blocks * (stride + unit - 1),
                    "{blocks} of {bytes} from {from}"
                );
            }
        }
        assert_eq!(image.end_after(FileSector::new(last + 1), 1, 1), None);
    }
}

#[test]
fn a_mark_may_span_blocks() {
    let host = host_with(child(), 128 * 4);
    let image = open(&host).unwrap();
    grow(&host, &image).unwrap();
    (0..3).for_each(|block| assert!(image.reserve(BlockIndex::new(block)).is_ok()));
    assert_eq!(image.mark(SectorRange::between(120, 260)), Ok(true));
    let bitmaps = image.bitmaps().unwrap();
    let runs: Vec<_> = (0..3).map(|block| bitmaps.run(BitmapSectorIndex::new(block), 0, 128).unwrap()).collect();
    assert_eq!(runs, [(false, 120), (true, 128), (true, 4)]);
    let mut dirty = image.dirty().clone();
    dirty.sort_unstable();
    assert_eq!(dirty, [0, 1, 2].map(BitmapSectorIndex::new));
}

#[test]
fn poison_keeps_its_first_reason() {
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
