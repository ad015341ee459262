//! Baseline of reads of a chain in the page cache, without a server: copies from the mapped files of the chain.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::ptr;
use std::rc::Rc;
use std::time::Duration;

use memmap2::MmapOptions;

use crate::baseline_reads::{BLOCK, DEPTH, measure, pages};
use crate::harness::random_stream;
use crate::sample::Sample;

/// Number of copies per batch. The first four cache lines of each copy's data are prefetched before the first copy of
/// the batch.
const BATCH: usize = 16;
const LINE: usize = 64;

/// Measures random copies of 4 KiB from the data of the files of a chain.
pub fn copies(files: &[PathBuf], time: Duration) -> Sample {
    let mut mappings = HashMap::new();
    let mut places = Vec::new();
    for (file, at) in pages(files) {
        let mapping = mappings
            .entry(Rc::as_ptr(&file))
            .or_insert_with(|| MmapOptions::new().map_raw_read_only(&*file).expect("the image can be mapped"));
        places.push(mapping.as_ptr().wrapping_add(at as usize));
    }
    let mut memory = vec![0u8; DEPTH * BLOCK];
    let copy = |from: *const u8, to: &mut [u8]| {
        // SAFETY: `from` must be readable and `to` writable for `BLOCK` bytes, and they must not overlap. `pages`
        // returns only whole pages inside the data of a file, so `from` lies in the mapping of this file. `mappings`
        // lives until the function returns, and no process truncates the file, which belongs to the bench. Every caller
        // passes a `to` of `BLOCK` bytes in `memory`, which is separate from the mappings.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), BLOCK) };
    };
    places.iter().for_each(|place| copy(*place, &mut memory[..BLOCK]));
    let mut rng = random_stream(0);
    measure(time, DEPTH, || {
        for turn in memory.chunks_mut(BATCH * BLOCK) {
            let from = [(); BATCH].map(|()| places[rng.below(places.len() as u64) as usize]);
            from.iter()
                .for_each(|from| (0..4).for_each(|n| diffdisk::storage::prefetch_line(from.wrapping_add(n * LINE))));
            from.iter().zip(turn.chunks_mut(BLOCK)).for_each(|(from, to)| copy(*from, to));
        }
    })
}
