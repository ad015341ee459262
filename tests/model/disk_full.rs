//! Requests on a full file system, on the simulated machine.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use diffdisk::disk::{Disk, DiskOptions, Outcome, Work, ZeroRange};
use diffdisk::image::{self, ImageKind, ImageSpec};
use diffdisk::storage::sim::{FaultPlan, SimHost};
use diffdisk::storage::{Access, EngineKind, Env};
use diffdisk::units::{BlockSize, SectorRange};

use crate::testing::TestDisk;

const PATH: &str = "/d/disk.vhd";

/// Makes and opens a root of 1 MiB with blocks of 64 KiB. Without space, writes wait (`WhenFull::Park`).
fn disk(host: &SimHost) -> Arc<Disk> {
    let block_size = BlockSize::from_bytes(64 << 10).expect("a legal size");
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: 1 << 20, block_size, reserve: 0 };
    image::create(host, Path::new(PATH), &spec).expect("a new image");
    Disk::open(Arc::new(host.clone()), &DiskOptions::new(Path::new(PATH))).expect("it opens")
}

/// Limits the free space to `bytes`.
fn leave(host: &SimHost, bytes: u64, copy_on_write: bool) {
    let taken = host.open(Path::new(PATH), Access::Read).and_then(|file| file.stat()).expect("the image").allocated;
    host.set_faults(FaultPlan { capacity: Some(taken + bytes), copy_on_write, ..FaultPlan::default() });
}

fn sectors(first: u64, count: u64) -> SectorRange {
    SectorRange::between(first, first + count)
}

#[test]
fn zeroing_waits_for_room() {
    let host = SimHost::new(1);
    let mut disk = TestDisk::new(disk(&host), EngineKind::Auto);
    disk.write(sectors(0, 8), &[7; 4096], &[4096]);
    leave(&host, 0, false);
    let zero = Work::WriteZeroes { ranges: vec![ZeroRange { range: sectors(16, 64), unmap: false }] };
    let tag = disk.submit(zero);
    for _ in 0..100 {
        disk.poll();
        disk.lane.tick();
    }
    assert!(disk.answers().is_empty(), "the request must wait: {:?}", disk.answers());
    host.set_faults(FaultPlan::default());
    disk.lane.tick();
    let done = disk.finish();
    assert_eq!(done.iter().map(|(t, o)| (*t, *o)).collect::<Vec<_>>(), [(tag, Outcome::Done)]);
    disk.close();
}

#[test]
fn a_commit_that_is_held_does_not_keep_another_queue_from_stopping() {
    let host = SimHost::new(1);
    let disk = disk(&host);
    let (mut holder, mut stopping) =
        (TestDisk::new(disk.clone(), EngineKind::Auto), TestDisk::new(disk, EngineKind::Auto));
    holder.write(sectors(0, 8), &[7; 4096], &[4096]);
    stopping.write(sectors(128, 8), &[8; 4096], &[4096]);
    // All writes of a commit need new space, and there is none.
    leave(&host, 0, true);
    holder.submit(Work::Flush);
    for _ in 0..100 {
        holder.poll();
        holder.lane.tick();
    }
    assert!(holder.answers().is_empty(), "the flush must wait: {:?}", holder.answers());
    stopping.submit(Work::Flush);
    let stopped = thread::spawn(move || {
        let outcomes: Vec<_> = stopping.finish().into_iter().map(|(_, outcome)| outcome).collect();
        (stopping, outcomes)
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while !stopped.is_finished() {
        assert!(Instant::now() < deadline, "the queue does not stop");
        holder.lane.tick();
        holder.poll();
        thread::sleep(Duration::from_millis(1));
    }
    let (mut stopping, outcomes) = stopped.join().expect("it stops");
    assert_eq!(outcomes, [Outcome::Failed]);
    // No data is lost: both queues continue when there is space.
    host.set_faults(FaultPlan::default());
    holder.lane.tick();
    holder.finish();
    stopping.flush();
    assert_eq!(holder.read(sectors(128, 8)), [8; 4096]);
    drop(stopping);
    holder.close();
}
