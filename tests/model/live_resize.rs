//! Resizes of a running disk: no request is lost or fails, and the added sectors read as zeros and take writes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use diffdisk::disk::live_resize::{ResizeReport, resize};
use diffdisk::disk::{Disk, DiskOptions};
use diffdisk::error::{ErrorKind, Result};
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;

use crate::chain_model::{ChainModel, KIB};
use crate::testing::TestDisk;
use crate::version_change::{SHARE, verify_under_load};

/// Number of resizes under load.
const RESIZES: u64 = 12;

/// Grows a disk that has one lane, and polls the lane meanwhile.
fn resize_polled(disk: &mut TestDisk, size: u64) -> Result<ResizeReport> {
    let shared = disk.disk.clone();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| resize(&shared, size));
        while !running.is_finished() {
            disk.poll();
        }
        running.join().expect("no panic")
    })
}

#[test]
fn disks_grow_under_load() {
    for (engine, direct, bitmaps) in
        [(EngineKind::Auto, false, None), (EngineKind::Blocking, false, Some(2)), (EngineKind::Auto, true, Some(4))]
    {
        let mut chain = ChainModel::new(120, engine, direct);
        chain.push("dynamic", 64 * KIB, 2 * SHARE * 512);
        chain.push("child", 64 * KIB, 2 * SHARE * 512);
        let mut disk = chain.open(false);
        chain.work(&mut disk, 40);
        let TestDisk { disk, lane, .. } = disk;
        drop(lane);
        let (start, requests) = (Barrier::new(3), AtomicU64::new(0));
        let sizes: Vec<u64> = (1..=RESIZES).map(|n| (2 * SHARE + n * n * 300 + n % 3) * 512).collect();
        let (mut expected, reports) = std::thread::scope(|scope| {
            let loads = [0, 1].map(|share| {
                let (disk, start, requests) = (&disk, &start, &requests);
                scope.spawn(move || {
                    let (done, expected) = verify_under_load(disk, engine, share, start, Duration::from_secs(2));
                    requests.fetch_add(done, Ordering::Relaxed);
                    expected
                })
            });
            start.wait();
            let mut reports = Vec::new();
            for size in &sizes {
                std::thread::sleep(Duration::from_millis(100));
                reports.push(resize(&disk, *size).expect("it grows"));
                let version = disk.version();
                if let (Some(frames), Some(top)) = (bitmaps, version.top().and_then(|top| top.image.bitmaps())) {
                    top.set_max_frames(frames);
                }
            }
            (loads.map(|load| load.join().expect("the load")).concat(), reports)
        });
        let pause = reports.iter().map(|report| report.pause).max().expect("the disk grew");
        println!("{engine:?}, direct {direct}: {} requests, longest pause {pause:?}", requests.load(Ordering::Relaxed));
        let size = sizes[sizes.len() - 1];
        assert_eq!((reports[reports.len() - 1].size, disk.capacity()), (size, size / 512));
        // The added sectors are zeros, and take writes.
        expected.resize(size as usize, 0);
        let mut disk = TestDisk::new(disk, engine);
        chain.model = expected;
        chain.compare_all(&mut disk);
        chain.work(&mut disk, 60);
        disk.close();
        chain.check(true);
        chain.compare_all(&mut chain.open(true));
    }
}

#[test]
fn every_kind_of_active_image_grows() {
    for (kind, block) in [("fixed", 64 * KIB), ("dynamic", 64 * KIB), ("dynamic", 2048 * KIB), ("dynamic", 4 * KIB)] {
        let mut chain = ChainModel::new(121, EngineKind::Auto, false);
        chain.push(kind, block, 5001 * 512);
        let mut disk = chain.open(false);
        // The first size is the old one. The last size needs a larger block table.
        for sectors in [5001, 5002, 5100, 9000, 20_000] {
            let report = resize_polled(&mut disk, sectors * 512).expect("it grows");
            assert_eq!((report.size, disk.disk.capacity()), (sectors * 512, sectors));
            chain.model.resize(sectors as usize * 512, 0);
            chain.work(&mut disk, 30);
        }
        disk.close();
        chain.check(true);
        let mut disk = chain.open(false);
        chain.compare_all(&mut disk);
        // The guest has not written since the open, and the daemon is killed soon after the resize.
        resize_polled(&mut disk, 21_000 * 512).expect("it grows");
        chain.model.resize(21_000 * 512, 0);
        chain.work(&mut disk, 10);
        disk.abandon();
        let mut disk = chain.open(false);
        chain.compare_all(&mut disk);
        disk.close();
        chain.check(true);
    }
}

#[test]
fn a_larger_parent_stays_hidden() {
    let mut chain = ChainModel::new(122, EngineKind::Auto, false);
    chain.push("dynamic", 64 * KIB, 9000 * 512);
    let mut disk = chain.open(false);
    disk.write(SectorRange::between(0, 9000), &vec![7; 9000 * 512], &[]);
    chain.model.fill(7);
    disk.close();
    chain.push("child", 64 * KIB, 3001 * 512);
    chain.model.truncate(3001 * 512);
    let mut disk = chain.open(false);
    chain.work(&mut disk, 20);
    for sectors in [3010, 5000, 9000, 9100] {
        resize_polled(&mut disk, sectors * 512).expect("it grows");
        chain.model.resize(sectors as usize * 512, 0);
        chain.work(&mut disk, 20);
    }
    disk.close();
    chain.check(true);
    chain.compare_all(&mut chain.open(true));
}

#[test]
fn a_resize_that_is_refused_changes_nothing() {
    let mut chain = ChainModel::new(123, EngineKind::Auto, false);
    chain.push("dynamic", 64 * KIB, 1024 * KIB);
    let mut disk = chain.open(false);
    chain.work(&mut disk, 20);
    let refused = |disk: &Arc<Disk>, size| resize(disk, size).map(drop).expect_err("it is refused").kind();
    assert_eq!(refused(&disk.disk, 512 * KIB), ErrorKind::Refused, "smaller");
    for size in [0, 1024 * KIB + 1, (2040 << 30) + 512] {
        assert_eq!(refused(&disk.disk, size), ErrorKind::Invalid, "{size}");
    }
    assert_eq!(refused(&disk.disk, 2040 << 30), ErrorKind::Refused, "a table of more than 16 MiB");
    let same = resize(&disk.disk, 1024 * KIB).expect("the same size");
    assert_eq!((same.pause, same.size), (Duration::ZERO, 1024 * KIB));
    // The lanes of the disk do not respond, as no thread polls them.
    let mut other = TestDisk::new(disk.disk.clone(), EngineKind::Auto);
    let late = resize(&disk.disk, 2048 * KIB).expect_err("a lane is silent");
    assert!(late.kind() == ErrorKind::Busy && late.line().contains("does not respond"), "{}", late.line());
    assert_eq!(disk.disk.capacity(), 2048);
    other.write(SectorRange::between(3, 4), &[5; 512], &[]);
    chain.model_bytes(SectorRange::between(3, 4)).fill(5);
    drop(other);
    chain.work(&mut disk, 20);
    let shared = disk.disk.clone();
    disk.close();
    assert_eq!(refused(&shared, 2048 * KIB), ErrorKind::Busy, "it is closed");
    drop(shared);
    chain.check(true);
    assert_eq!(refused(&chain.open(true).disk, 2048 * KIB), ErrorKind::Refused, "read-only");
    // With a child, the image is served and grows only if the option allows writes to a parent.
    chain.push("child", 64 * KIB, 1024 * KIB);
    let options = DiskOptions { allow_writable_parent: true, ..DiskOptions::new(&chain.layers[0]) };
    let parent = Disk::open(chain.env.clone(), &options).expect("it opens");
    assert_eq!(resize(&parent, 2048 * KIB).expect("it grows").size, 2048 * KIB);
    parent.close().expect("a clean close");
    drop(parent);
    chain.compare_all(&mut chain.open(true));
}
