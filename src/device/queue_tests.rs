//! Tests of `queue.rs`: batches on a real lane and a real image.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, IntoRawFd};
use vhost_user_backend::VringT;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

use super::spec::{feature, kind};
use super::testing::*;
use super::*;
use crate::disk::{Disk, DiskOptions};
use crate::image::{ImageKind, ImageSpec, create};
use crate::storage::EngineKind;
use crate::storage::host::Host;
use crate::units::BlockSize;
use std::sync::Arc;

/// A disk of 2048 sectors in a temporary file.
fn disk() -> (tempfile::TempDir, Arc<Disk>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhd");
    let spec = ImageSpec { kind: ImageKind::Dynamic, size: 2048 * 512, block_size: BlockSize::DEFAULT, reserve: 0 };
    create(&Host, &path, &spec).unwrap();
    (folder, Disk::open(Arc::new(Host), &DiskOptions::new(path)).unwrap())
}

struct TestQueue {
    _folder: tempfile::TempDir,
    d: TestDriver,
    device: Arc<Device>,
    vring: Vring,
    queue: Queue,
    call: vmm_sys_util::event::EventConsumer,
}

fn test_queue(features: u64) -> TestQueue {
    let d = TestDriver::new(64);
    let (folder, disk) = disk();
    let device = Device::new(disk, 1, 64, true);
    device.ack(features);
    let vring = Vring::new(GuestMemoryAtomic::from(d.memory.regions().clone()), 64).unwrap();
    vring.set_queue_info(TABLE, AVAIL, USED).unwrap();
    vring.set_queue_ready(true);
    let (call, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
    // SAFETY: `into_raw_fd` gives up the ownership of an open descriptor without closing it, and the new `File` is its
    // only owner from then on.
    vring.set_call(Some(unsafe { std::fs::File::from_raw_fd(notifier.into_raw_fd()) }));
    vring.set_enabled(true);
    let lane = device.disk().lane(EngineKind::Auto, 16).unwrap();
    let mut queue = Queue::new(device.clone(), lane, 0);
    queue.start(&vring, d.memory.clone(), None).unwrap();
    TestQueue { _folder: folder, d, device, vring, queue, call }
}

fn ask(d: &mut TestDriver, i: u16, kind: u32, sector: u64, at: u64, len: u32) {
    let header = d.header(i, kind, sector);
    let flag = if kind == kind::IN { WRITE } else { 0 };
    d.put(STATUS + u64::from(i), &[0xff]);
    d.chain(TABLE, 3 * i, &[(header, 16, 0), (at, len, flag), (STATUS + u64::from(i), 1, WRITE)]);
    d.add(3 * i);
}

/// Serves batches until nothing is in flight. Returns the last result.
fn serve(r: &mut TestQueue) -> ServeResult {
    loop {
        let result = r.queue.serve(&r.vring).unwrap();
        if result != ServeResult::More && r.queue.lane().is_idle() && !r.queue.enable_kicks(&r.vring) {
            return result;
        }
    }
}

fn took_interrupt(r: &TestQueue) -> bool {
    r.call.consume().is_ok()
}

#[test]
fn a_read_returns_written_data() {
    for features in [feature::VERSION_1, u64::MAX] {
        let mut r = test_queue(features);
        assert_eq!(serve(&mut r), ServeResult::Idle);
        assert!(took_interrupt(&r), "a killed daemon may not have sent the first interrupt");
        assert_eq!(serve(&mut r), ServeResult::Idle);
        assert!(!took_interrupt(&r));
        r.d.put(SEAM - 256, &[7; 512]);
        ask(&mut r.d, 0, kind::OUT, 5, SEAM - 256, 512);
        assert_eq!(serve(&mut r), ServeResult::Idle);
        assert!(took_interrupt(&r));
        assert_eq!(r.d.used(), [(0, 1)]);
        ask(&mut r.d, 1, kind::IN, 5, DATA, 512);
        ask(&mut r.d, 2, kind::FLUSH, 0, DATA, 0);
        r.d.put_word(AVAIL + 4 + 128, 1);
        assert_eq!(serve(&mut r), ServeResult::Idle);
        assert!(took_interrupt(&r));
        assert_eq!(r.d.used(), [(3, 513), (6, 1)]);
        assert_eq!(r.d.get(DATA, 512), [7; 512]);
        assert_eq!(r.d.get(STATUS, 3), [0, 0, 0]);
    }
}

#[test]
fn disabled_stopped_and_broken_queues() {
    let mut r = test_queue(u64::MAX);
    r.vring.set_enabled(false);
    ask(&mut r.d, 0, kind::IN, 0, DATA, 512);
    assert_eq!(serve(&mut r), ServeResult::Idle);
    assert_eq!(r.d.used(), []);
    r.vring.set_enabled(true);
    (1..10).for_each(|i| ask(&mut r.d, i, kind::IN, 0, DATA, 512));
    assert_eq!(serve(&mut r), ServeResult::Idle);
    assert_eq!(r.d.used().len(), 10);
    let weak = Arc::downgrade(&r.d.memory);
    assert_eq!(r.queue.stop(&r.vring).unwrap(), 10);
    assert_eq!(r.vring.queue_next_avail(), 10);
    assert_eq!(serve(&mut r), ServeResult::Idle);
    let count = weak.strong_count();
    r.queue.start(&r.vring, r.d.memory.clone(), None).unwrap();
    assert!(weak.strong_count() > count);
    ask(&mut r.d, 0, kind::IN, 0, DATA, 512);
    assert_eq!(serve(&mut r), ServeResult::Idle);
    assert_eq!(r.d.used(), [(0, 513)]);
    r.d.put_word(AVAIL + 2, 100);
    assert_eq!(serve(&mut r), ServeResult::Broken);
    assert_eq!(serve(&mut r), ServeResult::Broken);
    assert_eq!(r.queue.stop(&r.vring).unwrap(), 11);
    assert_eq!(weak.strong_count(), count, "a stopped queue keeps no guest memory");
    r.vring.set_queue_info(TABLE, SEAM - 2, USED).unwrap();
    assert!(r.queue.start(&r.vring, r.d.memory.clone(), None).is_err());
}

#[test]
fn an_interrupt_that_waits_is_not_lost() {
    let mut waited = 0;
    for round in 0..60 {
        let mut r = test_queue(u64::MAX);
        // The first write waits until the file has grown.
        ask(&mut r.d, 16, kind::OUT, 0, DATA, 512);
        serve(&mut r);
        assert!(took_interrupt(&r), "a killed daemon may not have sent the first interrupt");
        assert_eq!(r.d.used().len(), 1);
        r.d.put_word(AVAIL + 4 + 128, 1); // the driver requires an interrupt for the next used element
        // Records a batch of slow writes, so that the interrupt waits while some writes are left. The interrupt waits
        // 100 us at most, so it is not delayed in every round.
        r.queue.interrupts.record_batch(1, std::time::Duration::from_micros(48));
        (0..16).for_each(|i| ask(&mut r.d, i, kind::OUT, 0, DATA, 512));
        assert_eq!(r.queue.serve(&r.vring).unwrap(), ServeResult::More);
        let waits = !took_interrupt(&r);
        let answered = r.d.used().len();
        if answered < 8 {
            continue; // the host was too busy to complete the writes, so no interrupt is pending
        }
        waited += u32::from(waits);
        match round % 3 {
            0 => drop(serve(&mut r)),
            1 => drop(r.queue.stop(&r.vring).unwrap()),
            _ => {
                r.vring.set_enabled(false);
                assert_eq!(r.queue.serve(&r.vring).unwrap(), ServeResult::Idle);
            }
        }
        assert!(!waits || took_interrupt(&r), "round {round}");
        let all = if round % 3 == 0 { 16 } else { 8 };
        assert_eq!(answered + r.d.used().len(), all);
    }
    assert!(waited > 0, "no interrupt ever waited");
}

#[test]
fn the_write_cache_can_be_switched() {
    use std::sync::atomic::Ordering::Relaxed;
    let r = test_queue(u64::MAX);
    let disk = r.device.disk();
    let through = || disk.is_write_through();
    assert!(!through());
    assert_eq!(r.device.read_config(32, 1), [1]);
    r.device.write_config(32, &[0]).unwrap();
    assert_eq!((through(), disk.counters().commits.load(Relaxed), r.device.read_config(32, 1)), (true, 1, vec![0]));
    r.device.write_config(32, &[0]).unwrap();
    assert_eq!(disk.counters().commits.load(Relaxed), 1);
    r.device.write_config(32, &[1]).unwrap();
    assert!(!through() && disk.counters().commits.load(Relaxed) == 1);
    r.device.ack(!feature::FLUSH);
    assert!(through());
    r.device.ack(u64::MAX);
    assert!(!through());
    r.device.reset();
    assert!(through() && r.device.acked() == 0);
    assert_eq!(r.device.read_config(0, 8), [0, 8, 0, 0, 0, 0, 0, 0]);
}
