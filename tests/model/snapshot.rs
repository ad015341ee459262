//! Snapshots of running disks: the contents of the kept images and of the disks. No request is lost or fails.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use diffdisk::disk::Disk;
use diffdisk::disk::{SnapshotReport, SnapshotRequest, snapshot};
use diffdisk::error::{ErrorKind, Result};
use diffdisk::storage::EngineKind;
use diffdisk::units::SectorRange;

use crate::chain_model::{ChainModel, KIB};
use crate::testing::TestDisk;
use crate::version_change::{SHARE, verify_under_load};

/// Number of snapshots under load.
const SNAPSHOTS: u64 = 12;

fn keep(disk: &Arc<Disk>, keep_as: &Path) -> Result<SnapshotReport> {
    snapshot(&[SnapshotRequest { disk: disk.clone(), name: "disk".into(), keep_as: keep_as.into() }])
}

/// Takes a snapshot of a disk that has one lane, and polls the lane meanwhile.
fn keep_polled(disk: &mut TestDisk, keep_as: &Path) -> Result<SnapshotReport> {
    let shared = disk.disk.clone();
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| keep(&shared, keep_as));
        while !taking.is_finished() {
            disk.poll();
        }
        taking.join().expect("no panic")
    })
}

fn kept_path(chain: &ChainModel, number: u64) -> PathBuf {
    chain.top().with_file_name(format!("kept{number}.vhd"))
}

/// Writes each value of a counter to two sectors in turn until `stop` is set. The sectors are on one disk or on two.
/// Each sector has a lane, and a thread that polls the lane without pause.
fn count(places: [(&Arc<Disk>, u64); 2], engine: EngineKind, stop: &AtomicBool) {
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for (turn, (disk, sector)) in (0..).zip(places) {
            let written = &written;
            scope.spawn(move || {
                let mut disk = TestDisk::new(disk.clone(), engine);
                while !stop.load(Ordering::Relaxed) {
                    let count = written.load(Ordering::SeqCst);
                    if count % 2 == turn {
                        let bytes = (count / 2 + 1).to_be_bytes().repeat(64);
                        disk.write(SectorRange::between(sector, sector + 1), &bytes, &[]);
                        written.store(count + 1, Ordering::SeqCst);
                    } else {
                        disk.poll();
                    }
                }
            });
        }
    });
}

/// Sets the flag when it is dropped.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn counter(disk: &mut TestDisk, sector: u64) -> u64 {
    let bytes = disk.read(SectorRange::between(sector, sector + 1));
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

#[test]
fn snapshots_under_load_keep_one_moment_each() {
    for (engine, direct, bitmaps) in
        [(EngineKind::Auto, false, None), (EngineKind::Blocking, false, Some(2)), (EngineKind::Auto, true, Some(4))]
    {
        let mut chain = ChainModel::new(95, engine, direct);
        chain.cached_bitmap_sectors = bitmaps;
        chain.push("dynamic", 64 * KIB, 3 * SHARE * 512);
        chain.push("child", 64 * KIB, 3 * SHARE * 512);
        let mut disk = chain.open(false);
        chain.work(&mut disk, 40);
        disk.write(SectorRange::between(2 * SHARE, 3 * SHARE), &vec![0; SHARE as usize * 512], &[]);
        disk.flush();
        let TestDisk { disk, lane, .. } = disk;
        drop(lane);
        let (stop, start, requests) = (AtomicBool::new(false), Barrier::new(3), AtomicU64::new(0));
        let (expected, reports) = std::thread::scope(|scope| {
            let _stop = StopAtEnd(&stop);
            let loads = [0, 1].map(|share| {
                let (disk, start, requests) = (&disk, &start, &requests);
                scope.spawn(move || {
                    let (done, expected) = verify_under_load(disk, engine, share, start, Duration::from_secs(2));
                    requests.fetch_add(done, Ordering::Relaxed);
                    expected
                })
            });
            let counter = scope.spawn(|| {
                start.wait();
                count([(&disk, 2 * SHARE), (&disk, 2 * SHARE + SHARE / 2)], engine, &stop);
            });
            let mut reports = Vec::new();
            for number in 0..SNAPSHOTS {
                std::thread::sleep(Duration::from_millis(100));
                reports.push(keep(&disk, &kept_path(&chain, number)).expect("a snapshot"));
            }
            let expected = loads.map(|load| load.join().expect("the load")).concat();
            stop.store(true, Ordering::Relaxed);
            counter.join().expect("the counter");
            (expected, reports)
        });
        let pause = reports.iter().map(|report| report.pause).max().expect("snapshots were taken");
        let held = reports.iter().map(|report| report.held_flush).max().expect("snapshots were taken");
        println!(
            "{engine:?}, direct {direct}: {} requests, longest pause {pause:?}, longest held flush {held:?}",
            requests.load(Ordering::Relaxed)
        );
        assert_eq!(disk.version().depth() as u64, 2 + SNAPSHOTS);
        disk.close().expect("a clean close");
        drop(disk);
        let mut disk = chain.open(true);
        assert!(disk.read(SectorRange::between(0, 2 * SHARE)) == expected, "another disk after it is opened again");
        let mut last = 0;
        let active = chain.layers.pop().expect("the active image");
        for number in 0..SNAPSHOTS {
            chain.layers.push(kept_path(&chain, number));
            chain.check(true);
            let mut kept = chain.open(true);
            let (first, second) = (counter(&mut kept, 2 * SHARE), counter(&mut kept, 2 * SHARE + SHARE / 2));
            assert!(first == second || first == second + 1, "image {number}: {first} and {second}");
            assert!(second >= last, "image {number} is older than the one before");
            last = second;
            chain.layers.pop();
        }
        chain.layers.push(active);
        assert!(last > 0, "the counter did not run");
    }
}

#[test]
fn every_kind_of_active_image_is_kept() {
    for (kind, block) in [("fixed", 64 * KIB), ("dynamic", 64 * KIB), ("dynamic", 2048 * KIB)] {
        let mut chain = ChainModel::new(96, EngineKind::Auto, false);
        chain.push(kind, block, 5000 * 512);
        let mut disk = chain.open(false);
        let serial = *disk.disk.serial();
        let mut models = Vec::new();
        for number in 0..3 {
            chain.work(&mut disk, 30);
            models.push(chain.model.clone());
            let report = keep_polled(&mut disk, Path::new(&format!("kept{number}.vhd"))).expect("a snapshot");
            assert_eq!(report.members[0].kept.file_name(), kept_path(&chain, number).file_name());
        }
        chain.work(&mut disk, 30);
        disk.close();
        let mut disk = chain.open(false);
        assert_eq!(*disk.disk.serial(), serial, "the guest knows the serial");
        chain.compare_all(&mut disk);
        chain.work(&mut disk, 30);
        disk.close();
        chain.check(true);
        for (number, model) in models.into_iter().enumerate() {
            chain.layers.push(kept_path(&chain, number as u64));
            chain.model = model;
            chain.compare_all(&mut chain.open(true));
            chain.check(true);
        }
    }
}

#[test]
fn a_snapshot_that_is_refused_changes_nothing() {
    let mut chain = ChainModel::new(97, EngineKind::Auto, false);
    chain.push("dynamic", 64 * KIB, 1024 * KIB);
    let folder = chain.top().parent().expect("a folder").to_path_buf();
    let mut disk = chain.open(false);
    chain.work(&mut disk, 20);
    let existing = kept_path(&chain, 0);
    std::fs::write(&existing, "another file").expect("a file");
    std::fs::create_dir(folder.join("sub")).expect("a folder");
    let listed = || {
        let names = std::fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let before = listed();
    for keep_as in [existing.clone(), folder.join("sub/kept.vhd"), folder.join(".."), "/tmp/kept.vhd".into()] {
        let refused = keep(&disk.disk, &keep_as).expect_err("it is refused");
        assert!(matches!(refused.kind(), ErrorKind::Refused), "{}", refused.line());
    }
    // The lanes of the disk do not respond, as no thread polls them.
    let mut other = TestDisk::new(disk.disk.clone(), EngineKind::Auto);
    let late = keep(&disk.disk, &kept_path(&chain, 1)).expect_err("a lane is silent");
    assert!(late.kind() == ErrorKind::Busy && late.line().contains("does not respond"), "{}", late.line());
    assert_eq!(listed(), before);
    other.write(SectorRange::between(3, 4), &[5; 512], &[]);
    chain.model_bytes(SectorRange::between(3, 4)).fill(5);
    drop(other);
    chain.work(&mut disk, 20);
    disk.close();
    let read_only = chain.open(true);
    let refused = keep(&read_only.disk, &kept_path(&chain, 1)).expect_err("it is refused");
    assert_eq!(refused.kind(), ErrorKind::Refused);
    drop(read_only);
    chain.check(true);
    assert_eq!(listed(), before);
}

#[test]
fn a_snapshot_of_two_disks_keeps_one_moment() {
    let mut chains = [98, 99].map(|seed| {
        let mut chain = ChainModel::new(seed, EngineKind::Auto, false);
        chain.push("dynamic", 64 * KIB, 1024 * KIB);
        chain
    });
    let disks = chains.each_ref().map(|chain| chain.open(false).disk);
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        // A test that fails must stop the counter, too.
        let _stop = StopAtEnd(&stop);
        let counting = scope.spawn(|| count([(&disks[0], 7), (&disks[1], 9)], EngineKind::Auto, &stop));
        let reports: Vec<SnapshotReport> = (0..10)
            .map(|number| {
                std::thread::sleep(Duration::from_millis(50));
                let requests = [0, 1].map(|disk| SnapshotRequest {
                    disk: disks[disk].clone(),
                    name: format!("disk{disk}"),
                    keep_as: kept_path(&chains[disk], number),
                });
                snapshot(&requests).expect("a snapshot")
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        counting.join().expect("the counter");
        reports.into_iter().max_by_key(|report| report.pause).expect("snapshots were taken")
    });
    println!("longest pause {:?}, flushes held {:?}", report.pause, report.held_flush);
    // One of the disks cannot be kept, so the other one is not kept either.
    let requests = [(0, "new.vhd"), (1, "kept0.vhd")].map(|(disk, name)| SnapshotRequest {
        disk: disks[disk].clone(),
        name: format!("disk{disk}"),
        keep_as: name.into(),
    });
    assert_eq!(snapshot(&requests).expect_err("a name exists").kind(), ErrorKind::Refused);
    for disk in disks {
        disk.close().expect("a clean close");
    }
    assert!(!chains[0].top().with_file_name("new.vhd").exists());
    let mut last = 0;
    for number in 0..10 {
        let [first, second] = [(0, 7), (1, 9)].map(|(index, sector)| {
            let chain: &mut ChainModel = &mut chains[index];
            chain.layers.push(kept_path(chain, number));
            let value = counter(&mut chain.open(true), sector);
            chain.check(true);
            chain.layers.pop();
            value
        });
        assert!(first == second || first == second + 1, "snapshot {number}: {first} and {second}");
        assert!(second >= last, "snapshot {number} is older than the one before");
        last = second;
    }
    assert!(last > 0, "the counter did not run");
}
