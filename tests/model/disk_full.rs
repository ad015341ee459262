//! Requests on a full file system, on the simulated machine.

use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use diffdisk::disk::{Disk, DiskOptions, Outcome, Work, ZeroRange};
use diffdisk::error::ErrorKind;
use diffdisk::image::{self, ImageKind, ImageSpec};
use diffdisk::storage::sim::{FaultPlan, SimHost};
use diffdisk::storage::{Access, EngineKind, Env};
use diffdisk::units::{BlockSize, SectorRange};

use crate::gated_host::GatedHost;
use crate::testing::TestDisk;

const PATH: &str = "/d/disk.vhd";

/// Makes and opens a root of 1 MiB with blocks of 64 KiB. Without space, writes wait (`WhenFull::Park`).
fn disk(host: &SimHost) -> Arc<Disk> {
    disk_over(Arc::new(host.clone()), host)
}

/// Makes the same disk on `host`, and opens it through `env`.
fn disk_over(env: Arc<dyn Env>, host: &SimHost) -> Arc<Disk> {
    let block_size = BlockSize::from_bytes(64 << 10).expect("a legal size");
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: 1 << 20, block_size, reserve: 0 };
    image::create(host, Path::new(PATH), &spec).expect("a new image");
    Disk::open(env, &DiskOptions::new(Path::new(PATH))).expect("it opens")
}

/// Limits the free space to `bytes`.
fn leave(host: &SimHost, bytes: u64, copy_on_write: bool) {
    let taken = host.open(Path::new(PATH), Access::Read).and_then(|file| file.stat()).expect("the image").allocated;
    host.set_faults(FaultPlan { capacity: Some(taken + bytes), copy_on_write, ..FaultPlan::default() });
}

/// Makes two lanes of one disk on a full file system, after a write to the first lane. The file system copies on write,
/// so all writes of a commit need space.
fn two_lanes_without_space(host: &SimHost) -> (TestDisk, TestDisk) {
    let disk = disk(host);
    let mut first = TestDisk::new(disk.clone(), EngineKind::Auto);
    first.write(sectors(0, 8), &[7; 4096], &[4096]);
    leave(host, 0, true);
    (first, TestDisk::new(disk, EngineKind::Auto))
}

/// Runs a lane for ten ticks; a worker ticks once a second. Afterwards a commit that the lane leads has ended or is
/// stalled.
fn run_for_seconds(disk: &mut TestDisk) {
    for _ in 0..10 {
        disk.lane.tick();
        (0..20).for_each(|_| disk.poll());
    }
}

/// Makes two lanes: the first one leads a commit that waits for space, and a flush of the second one waits for the commit
/// after it. Returns the tag of that flush, too.
fn stalled_commit(host: &SimHost) -> (TestDisk, TestDisk, u64) {
    let (mut leader, mut other) = two_lanes_without_space(host);
    leader.submit(Work::Flush);
    run_for_seconds(&mut leader);
    let waiting = other.submit(Work::Flush);
    run_for_seconds(&mut other);
    (leader, other, waiting)
}

/// Runs a lane until `thread` has ended. Returns the result of the thread.
fn run_until_ended<T>(thread: JoinHandle<T>, disk: &mut TestDisk) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !thread.is_finished() {
        assert!(Instant::now() < deadline, "the thread does not end");
        disk.lane.tick();
        disk.poll();
        thread::sleep(Duration::from_millis(1));
    }
    thread.join().expect("the thread does not panic")
}

/// Stops a lane that has one flush in flight. Returns the outcome of the flush.
fn stop(disk: &mut TestDisk) -> Outcome {
    let done = disk.finish();
    assert_eq!(done.len(), 1, "{done:?}");
    done[0].1
}

/// Checks that the flush with this tag has waited, frees space, and checks that the flush succeeds then.
fn succeeds_with_space(host: &SimHost, disk: &mut TestDisk, tag: u64) {
    assert!(disk.answers().is_empty(), "the flush must wait: {:?}", disk.answers());
    host.set_faults(FaultPlan::default());
    run_for_seconds(disk);
    assert_eq!(disk.finish(), [(tag, Outcome::Done)]);
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
    run_for_seconds(&mut disk);
    assert!(disk.answers().is_empty(), "the request must wait: {:?}", disk.answers());
    host.set_faults(FaultPlan::default());
    disk.lane.tick();
    let done = disk.finish();
    assert_eq!(done.iter().map(|(t, o)| (*t, *o)).collect::<Vec<_>>(), [(tag, Outcome::Done)]);
    disk.close();
}

#[test]
fn a_queue_that_stops_fails_only_its_own_flushes() {
    let host = SimHost::new(1);
    let disk = disk(&host);
    let (mut leader, mut stopping) =
        (TestDisk::new(disk.clone(), EngineKind::Auto), TestDisk::new(disk, EngineKind::Auto));
    leader.write(sectors(0, 8), &[7; 4096], &[4096]);
    stopping.write(sectors(128, 8), &[8; 4096], &[4096]);
    // The file system copies on write, so all writes of a commit need space, and there is none.
    leave(&host, 0, true);
    let waiting = leader.submit(Work::Flush);
    run_for_seconds(&mut leader);
    assert!(leader.answers().is_empty(), "the flush must wait: {:?}", leader.answers());
    stopping.submit(Work::Flush);
    let stopped = thread::spawn(move || {
        let outcome = stop(&mut stopping);
        (stopping, outcome)
    });
    let (mut stopping, outcome) = run_until_ended(stopped, &mut leader);
    assert_eq!(outcome, Outcome::Failed);
    // No data is lost: both queues continue when there is space.
    succeeds_with_space(&host, &mut leader, waiting);
    stopping.flush();
    assert_eq!(leader.read(sectors(128, 8)), [8; 4096]);
    drop(stopping);
    leader.close();
}

#[test]
fn a_queue_that_stops_hands_a_stalled_commit_over() {
    let host = SimHost::new(1);
    let (mut leader, mut other, waiting) = stalled_commit(&host);
    assert_eq!(stop(&mut leader), Outcome::Failed);
    run_for_seconds(&mut other);
    succeeds_with_space(&host, &mut other, waiting);
    drop(other);
    leader.close();
}

#[test]
fn a_stalled_commit_outlives_the_lane_that_led_it() {
    let host = SimHost::new(1);
    let (leader, mut other, waiting) = stalled_commit(&host);
    drop(leader);
    succeeds_with_space(&host, &mut other, waiting);
    other.close();
}

#[test]
fn a_stalled_commit_fails_for_the_control_thread_only() {
    let host = SimHost::new(1);
    let disk = disk(&host);
    let mut lane = TestDisk::new(disk.clone(), EngineKind::Auto);
    lane.write(sectors(0, 8), &[7; 4096], &[4096]);
    leave(&host, 0, true);
    let waiting = lane.submit(Work::Flush);
    run_for_seconds(&mut lane);
    let control = thread::spawn(move || disk.commit());
    let failed = run_until_ended(control, &mut lane).expect_err("there is no space");
    assert_eq!(failed.kind(), ErrorKind::NoSpace, "{}", failed.line());
    succeeds_with_space(&host, &mut lane, waiting);
    lane.close();
}

#[test]
fn a_flush_that_arrives_during_a_commit_of_the_control_thread_waits() {
    let host = SimHost::new(1);
    let gated = Arc::new(GatedHost::new(&host));
    let disk = disk_over(gated.clone(), &host);
    let mut lane = TestDisk::new(disk.clone(), EngineKind::Auto);
    lane.write(sectors(0, 8), &[7; 4096], &[4096]);
    leave(&host, 0, true);
    gated.close_gate();
    let control = thread::spawn(move || disk.commit());
    gated.await_arrival();
    let waiting = lane.submit(Work::Flush);
    lane.poll();
    gated.open_gate();
    let failed = run_until_ended(control, &mut lane).expect_err("there is no space");
    assert_eq!(failed.kind(), ErrorKind::NoSpace, "{}", failed.line());
    run_for_seconds(&mut lane);
    succeeds_with_space(&host, &mut lane, waiting);
    lane.close();
}
