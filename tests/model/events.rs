//! Events of a disk on the simulated host: a full host, room again, a failed sync.

use std::path::Path;
use std::sync::{Arc, Mutex};

use diffdisk::disk::{Disk, DiskOptions, Outcome, WhenFull, Work};
use diffdisk::event::{DiskEvent, EventReporter};
use diffdisk::image::{self, ImageKind, ImageSpec};
use diffdisk::storage::sim::{FaultPlan, SimHost};
use diffdisk::storage::{Access, EngineKind, Env};
use diffdisk::units::{BlockSize, SectorRange};

use crate::testing::{TestDisk, TestMemory};

const PATH: &str = "/d/disk.vhd";

/// Makes and opens a root of 1 MiB with blocks of 64 KiB. Returns its events, too.
fn disk(host: &SimHost, when_full: WhenFull) -> (TestDisk, Arc<Mutex<Vec<DiskEvent>>>) {
    let block_size = BlockSize::from_bytes(64 << 10).expect("a legal size");
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: 1 << 20, block_size, reserve: 0 };
    image::create(host, Path::new(PATH), &spec).expect("a new image");
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = events.clone();
    let reporter = EventReporter::new(move |event| seen.lock().expect("no panic").push(event));
    let options = DiskOptions { events: reporter, when_full, ..DiskOptions::new(Path::new(PATH)) };
    let disk = Disk::open(Arc::new(host.clone()), &options).expect("it opens");
    (TestDisk::new(disk, EngineKind::Auto), events)
}

fn take(events: &Mutex<Vec<DiskEvent>>) -> Vec<DiskEvent> {
    std::mem::take(&mut events.lock().expect("no panic"))
}

#[test]
fn a_full_host_is_one_event_and_room_again_another() {
    for when_full in [WhenFull::Park, WhenFull::Fail] {
        let host = SimHost::new(1);
        let (mut disk, events) = disk(&host, when_full);
        let memory = TestMemory::new(&[7; 4096]);
        let write = |block: u64| Work::Write {
            range: SectorRange::between(block * 128, block * 128 + 8),
            from: memory.iovecs(&[4096]),
        };
        assert_eq!(disk.run(write(0)), Outcome::Done);
        let taken = host.open(Path::new(PATH), Access::Read).and_then(|file| file.stat()).expect("the image").allocated;
        host.set_faults(FaultPlan { capacity: Some(taken), ..FaultPlan::default() });
        for block in 4..8 {
            disk.submit(write(block));
        }
        for _ in 0..3 {
            (0..20).for_each(|_| disk.poll());
            disk.lane.tick();
        }
        assert_eq!(take(&events), [DiskEvent::DiskFull { path: PATH.into() }], "{when_full:?}");
        assert!(disk.disk.is_full());
        host.set_faults(FaultPlan::default());
        for _ in 0..3 {
            disk.lane.tick();
            (0..20).for_each(|_| disk.poll());
        }
        let expected = if when_full == WhenFull::Park { Outcome::Done } else { Outcome::Failed };
        assert!(disk.finish().iter().all(|(_, outcome)| *outcome == expected), "{when_full:?}");
        assert_eq!(take(&events), [DiskEvent::RoomAgain { path: PATH.into() }], "{when_full:?}");
        assert!(!disk.disk.is_full() && !disk.disk.is_poisoned());
        disk.close();
    }
}

#[test]
fn a_failed_sync_is_one_event() {
    let host = SimHost::new(1);
    let (mut disk, events) = disk(&host, WhenFull::Park);
    disk.write(SectorRange::between(0, 8), &[7; 4096], &[4096]);
    host.set_faults(FaultPlan { failing_syncs: (1..1000).collect(), ..FaultPlan::default() });
    assert_eq!(disk.run(Work::Flush), Outcome::Failed);
    assert_eq!(disk.run(Work::Flush), Outcome::Failed);
    let found = take(&events);
    let is_poisoned = |event: &DiskEvent| matches!(event, DiskEvent::Poisoned { path, .. } if path == Path::new(PATH));
    assert!(found.len() == 1 && is_poisoned(&found[0]), "{found:?}");
    assert!(disk.disk.is_poisoned() && !disk.disk.is_full());
}
