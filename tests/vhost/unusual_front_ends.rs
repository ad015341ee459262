//! Front-ends that use rare features of the protocol, and front-ends whose mistakes the log must explain.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::raw::*;
use super::setup::{event, memory, started};

/// Front-end address of the memory. The next constants are offsets of the parts of a ring of up to 512 descriptors, and
/// the size of the memory.
const USER: u64 = 0x7000_0000;
const AVAIL: u64 = 0x3000;
const USED: u64 = 0x4000;
const RAM: u64 = 0x10000;

fn kick_queue(kick: &File) {
    rustix::io::write(kick, 1u64.as_bytes()).unwrap();
}

/// Returns the body of a message that describes one region of guest memory.
fn region(guest: u64, len: u64, user: u64) -> Vec<u8> {
    [0u64.as_bytes(), [guest, len, user, 0].as_bytes()].concat()
}

/// Describes a ring of `size` descriptors at `user`, and enables it. Returns whether every message was acknowledged.
fn set_up(front_end: &mut FrontEnd, queue: u32, size: u32, user: u64, kick: Option<&File>) -> bool {
    let mut done = front_end.set(SET_VRING_NUM, [queue, size].as_bytes(), &[]);
    let places = [user, user + USED, user + AVAIL, 0];
    done &= front_end.set(SET_VRING_ADDR, &[[queue, 0].as_bytes(), places.as_bytes()].concat(), &[]);
    done &= front_end.set(SET_VRING_BASE, [queue, 0].as_bytes(), &[]);
    done &= match kick {
        Some(kick) => front_end.set(SET_VRING_KICK, u64::from(queue).as_bytes(), &[kick.as_fd()]),
        None => front_end.set(SET_VRING_KICK, (0x100 | u64::from(queue)).as_bytes(), &[]),
    };
    done & front_end.set(SET_VRING_ENABLE, [queue, 1].as_bytes(), &[])
}

/// Puts a request for the serial number into a ring that lies at the beginning of `ram`, which is at guest address 0.
fn submit_get_id(ram: &File) {
    const HEADER: u64 = 0x8000;
    ram.write_all_at([8u32, 0, 0, 0].as_bytes(), HEADER).unwrap();
    for (index, (addr, len, flags)) in
        [(HEADER, 16u32, 1u16), (HEADER + 0x100, 20, 3), (HEADER + 0x200, 1, 2)].iter().enumerate()
    {
        let rest = [len.as_bytes(), flags.as_bytes(), (index as u16 + 1).as_bytes()].concat();
        ram.write_all_at(&[addr.as_bytes(), &rest].concat(), 16 * index as u64).unwrap();
    }
    ram.write_all_at([0u16, 1, 0].as_bytes(), AVAIL).unwrap();
}

fn wait_for_completion(ram: &File) {
    for _ in 0..3000 {
        let mut used = [0; 2];
        ram.read_exact_at(&mut used, USED + 2).unwrap();
        if used == [1, 0] {
            return;
        }
        sleep(Duration::from_millis(10));
    }
    panic!("the request was not completed");
}

/// The guest of a virtio-mmio machine chooses the sizes of its rings. The front-end's in-flight record may be smaller.
#[test]
fn rings_larger_than_their_in_flight_record_are_served() {
    let (_dir, mut daemon) = started(&["--num-queues=2", "--log-level=debug"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (ram, kick) = (memory(2 * RAM), event());
    assert!(front_end.set(ADD_MEM_REG, &region(0, 2 * RAM, USER), &[ram.as_fd()]));
    // A record for one of the two queues, and with too few descriptors.
    let (body, record) = front_end.inflight(1, 128);
    assert!(front_end.set(SET_INFLIGHT_FD, &body, &[record.as_fd()]));
    assert!(set_up(&mut front_end, 0, 256, USER, Some(&kick)));
    assert!(set_up(&mut front_end, 1, 128, USER + RAM, Some(&kick)));
    daemon.wait_for_log("ring 1 runs from 0", 1);
    submit_get_id(&ram);
    kick_queue(&kick);
    wait_for_completion(&ram);
    let log = daemon.log();
    assert_eq!(log.matches("served without the record").count(), 1, "one warning a front-end: {log}");
    assert!(
        log.contains("ring 0 has 256 descriptors, but the front-end's in-flight record has only 128")
            && log.contains("queue-size=256"),
        "{log}"
    );
}

/// No message contains the daemon's `--queue-size`, only the number of queues.
#[test]
fn rings_and_records_larger_than_the_daemons_queue_size_are_served() {
    let (_dir, mut daemon) = started(&["--num-queues=1", "--queue-size=64", "--log-level=debug"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (ram, kick) = (memory(RAM), event());
    assert!(front_end.set(ADD_MEM_REG, &region(0, RAM, USER), &[ram.as_fd()]));
    let (body, record) = front_end.inflight(2, 512);
    assert!(front_end.set(SET_INFLIGHT_FD, &body, &[record.as_fd()]));
    assert!(set_up(&mut front_end, 0, 512, USER, Some(&kick)));
    daemon.wait_for_log("ring 0 runs from 0", 1);
    submit_get_id(&ram);
    kick_queue(&kick);
    wait_for_completion(&ram);
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}

#[test]
fn a_ring_may_come_before_its_memory() {
    let (_dir, mut daemon) = started(&["--num-queues=1", "--log-level=debug"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (ram, other, kick) = (memory(RAM), memory(RAM), event());
    assert!(front_end.set(ADD_MEM_REG, &region(0x10_0000, RAM, USER + 0x10_0000), &[other.as_fd()]));
    assert!(front_end.set(SET_VRING_NUM, [0u32, 128].as_bytes(), &[]));
    let places = [USER, USER + USED, USER + AVAIL, 0];
    assert!(front_end.set(SET_VRING_ADDR, &[[0u32, 0].as_bytes(), places.as_bytes()].concat(), &[]));
    assert!(front_end.set(ADD_MEM_REG, &region(0, RAM, USER), &[ram.as_fd()]));
    assert!(front_end.set(SET_VRING_KICK, 0u64.as_bytes(), &[kick.as_fd()]));
    assert!(front_end.set(SET_VRING_ENABLE, [0u32, 1].as_bytes(), &[]));
    daemon.wait_for_log("ring 0 runs from 0", 1);
}

#[test]
fn a_ring_without_a_kick_is_polled() {
    let (_dir, daemon) = started(&["--num-queues=1"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let ram = memory(RAM);
    assert!(front_end.set(ADD_MEM_REG, &region(0, RAM, USER), &[ram.as_fd()]));
    assert!(set_up(&mut front_end, 0, 128, USER, None));
    submit_get_id(&ram);
    wait_for_completion(&ram);
}

/// QEMU with a private memory backend sends the memory's file, but the guest's writes never reach this file.
#[test]
fn a_guest_whose_memory_is_private_is_explained() {
    let (_dir, mut daemon) = started(&["--num-queues=2"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (ram, kick) = (memory(2 * RAM), event());
    assert!(front_end.set(ADD_MEM_REG, &region(0, 2 * RAM, USER), &[ram.as_fd()]));
    for queue in 0..2 {
        assert!(set_up(&mut front_end, queue, 128, USER + u64::from(queue) * RAM, Some(&kick)));
    }
    kick_queue(&kick);
    daemon.wait_for_log("share=on", 1);
    sleep(Duration::from_secs(2));
    assert_eq!(daemon.log().matches("share=on").count(), 1, "{}", daemon.log());
}

/// A front-end may kick rings that are empty.
#[test]
fn a_kick_of_an_empty_ring_causes_no_warning() {
    let (_dir, daemon) = started(&["--num-queues=2"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (ram, kick, other) = (memory(2 * RAM), event(), event());
    assert!(front_end.set(ADD_MEM_REG, &region(0, 2 * RAM, USER), &[ram.as_fd()]));
    assert!(set_up(&mut front_end, 0, 128, USER, Some(&kick)));
    assert!(set_up(&mut front_end, 1, 128, USER + RAM, Some(&other)));
    submit_get_id(&ram);
    kick_queue(&kick);
    wait_for_completion(&ram);
    kick_queue(&other);
    sleep(Duration::from_secs(6));
    assert!(!daemon.log().contains("share=on"), "{}", daemon.log());
}

/// QEMU with anonymous guest memory describes no region.
#[test]
fn a_guest_without_shared_memory_is_explained() {
    let (_dir, mut daemon) = started(&["--num-queues=1"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    assert!(set_up(&mut front_end, 0, 128, USER, Some(&event())));
    daemon.wait_for_log("shares none of the guest's memory", 1);
    assert!(daemon.log().contains("share=on"), "{}", daemon.log());
}

/// QEMU compares its number of queues with the daemon's, and disconnects.
#[test]
fn a_front_end_that_uses_more_queues_is_explained() {
    let (_dir, mut daemon) = started(&["--num-queues=1"]);
    for retries in 1..4 {
        let mut front_end = FrontEnd::negotiated(daemon.connect());
        assert_eq!(front_end.get(GET_QUEUE_NUM), 1);
        drop(front_end);
        daemon.wait_for_log("front-end disconnected", retries);
    }
    assert_eq!(daemon.log().matches("offers 1: ").count(), 1, "{}", daemon.log());
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    assert!(!front_end.set(SET_VRING_NUM, [1u32, 128].as_bytes(), &[]));
    daemon.wait_for_log("a larger --num-queues", 2);
}
