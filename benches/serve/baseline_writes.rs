//! Baseline of writes, without a server. This process writes with pwrite(2) to the places that a child would assign to
//! new blocks. A flush is two syncs with the bitmap writes between them. Overwrites of existing data are measured, too.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;

use crate::baseline_reads::{measure, thread_time};
use crate::disks::{ReadOrder, populate_cache, remove_and_wait};
use crate::load::{Load, Order, Until, permute};
use crate::sample::{Latencies, Sample};

const BLOCK: u64 = 2 << 20;
/// Alignment of block data in the images of the bench.
const UNIT: u64 = 64 << 10;
/// Bytes of a block and of the gap before the block. The bitmap of the block is at the end of the gap.
const STRIDE: u64 = BLOCK + UNIT;
const SECTOR: usize = 512;
const PIECE: usize = 64 << 10;

/// Runs `load` on a new file, which is preallocated for all blocks of the load.
pub fn fresh(path: &Path, load: &Load) -> Sample {
    let Until::Count(count) = load.until else { panic!("fresh writes are counted") };
    let (blocks, pieces) = (load.region / BLOCK, load.region / load.block as u64);
    let file = File::create(path).expect("a file can be made");
    let end = UNIT + blocks * STRIDE;
    rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, end).expect("there is room");
    file.write_all_at(&[1; SECTOR], end - SECTOR as u64).expect("a footer can be written");
    file.sync_all().expect("the file can be synced");
    let (data, mut latencies) = (vec![0x5a; load.block], Latencies::default());
    let (mut places, mut next) = (vec![None; blocks as usize], UNIT);
    let mut touched = BTreeSet::new();
    let (start, before) = (Instant::now(), thread_time());
    let mut now = start;
    for i in 0..count {
        let piece = if load.order == Order::Shuffled { permute(i % pieces, pieces) } else { i % pieces };
        let at = piece * load.block as u64;
        let place = *places[(at / BLOCK) as usize].get_or_insert_with(|| {
            next += STRIDE;
            next - STRIDE
        });
        file.write_all_at(&data, place + UNIT + at % BLOCK).expect("the file can be written");
        touched.insert(place);
        let after = Instant::now();
        latencies.add(after - now);
        now = after;
        if load.flush_every.is_some_and(|every| (i + 1) % every == 0) {
            file.sync_data().expect("the file can be synced");
            for place in std::mem::take(&mut touched) {
                file.write_all_at(&data[..SECTOR], place + UNIT - SECTOR as u64).expect("the file can be written");
            }
            file.write_all_at(&data[..SECTOR], 0).expect("the file can be written");
            file.sync_data().expect("the file can be synced");
            now = Instant::now();
        }
    }
    let mut sample = Sample::new(count, start.elapsed().as_secs_f64(), &latencies);
    sample.cpu = (thread_time() - before).as_secs_f64() * 1e6 / count as f64;
    remove_and_wait(path);
    sample
}

/// Measures sequential overwrites of `load.block` bytes, one at a time, in a file that is filled with data and read
/// into the page cache like the images of the comparison.
pub fn over(path: &Path, load: &Load, time: Duration) -> Sample {
    let file = File::create(path).expect("a file can be made");
    let data = vec![0x5a; load.block.max(PIECE)];
    for piece in (0..load.region).step_by(PIECE) {
        file.write_all_at(&data[..PIECE], UNIT + piece).expect("the file can be written");
    }
    populate_cache(path, ReadOrder::Interleaved);
    let mut next = 0;
    let sample = measure(time, 1, || {
        file.write_all_at(&data[..load.block], UNIT + next).expect("the file can be written");
        next = (next + load.block as u64) % load.region;
    });
    remove_and_wait(path);
    sample
}
