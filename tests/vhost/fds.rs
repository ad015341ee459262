//! File descriptors passed by a front-end must not block a thread of the daemon.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::guest::{GuestRequest, ManualGuest, Part, USER};
use super::raw::*;
use super::setup::{MIB, event, memory, started};
use super::stuck_storage::StuckDisk;

/// Sets an eventfd to its maximum, so that a blocking write to it would wait for a read that never happens.
fn fill_counter(counter: &File) {
    rustix::io::write(counter, (u64::MAX - 1).as_bytes()).unwrap();
}

/// The driver never reads its call eventfd.
#[test]
fn a_full_call_eventfd_blocks_no_thread() {
    let (_dir, mut daemon) = started(&["--num-queues=1"]);
    let mut guest = ManualGuest::new(Part::Data);
    fill_counter(&guest.call);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    guest.attach(&mut front_end);
    assert!(guest.enable(&mut front_end));
    for _ in 0..20 {
        guest.prepare(GuestRequest::Read);
        guest.publish();
        assert!(guest.wait(), "{}", daemon.log());
    }
    // Setting a new call eventfd also signals it.
    let other = event();
    fill_counter(&other);
    assert!(front_end.set(SET_VRING_CALL, 0u64.as_bytes(), &[other.as_fd()]));
    guest.prepare(GuestRequest::Write);
    guest.publish();
    assert!(guest.wait());
    front_end.send_message(GET_VRING_BASE, [0u32, 0].as_bytes(), &[]);
    assert_eq!(front_end.read_reply(GET_VRING_BASE), [0u32, 21].as_bytes());
    drop(front_end);
    assert!(daemon.terminate_within(Duration::from_secs(5)).is_some_and(|status| status.success()), "{}", daemon.log());
}

#[test]
fn a_full_error_eventfd_blocks_no_thread() {
    let (_dir, mut daemon) = started(&["--num-queues=1"]);
    let mut guest = ManualGuest::new(Part::Data);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let err = event();
    fill_counter(&err);
    assert!(front_end.set(SET_VRING_ERR, 0u64.as_bytes(), &[err.as_fd()]));
    guest.attach(&mut front_end);
    assert!(guest.enable(&mut front_end));
    guest.submitted = 999;
    guest.publish();
    daemon.wait_for_log("the ring is broken", 1);
    front_end.send_message(GET_VRING_BASE, [0u32, 0].as_bytes(), &[]);
    assert_eq!(front_end.read_reply(GET_VRING_BASE).len(), 8);
    drop(front_end);
    assert!(daemon.terminate_within(Duration::from_secs(5)).is_some_and(|status| status.success()), "{}", daemon.log());
}

#[test]
fn only_eventfds_are_accepted() {
    let (dir, mut daemon) = started(&["--num-queues=1"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (reader, writer) = std::io::pipe().unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let others: [OwnedFd; 6] = [
        reader.into(),
        writer.into(),
        near.into(),
        memory(4096).into(),
        File::create(dir.path().join("file")).unwrap().into(),
        rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap(),
    ];
    let mut refusals = 0;
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        for other in &others {
            assert!(!front_end.set(request, 0u64.as_bytes(), &[other.as_fd()]), "{request} {other:?}");
            refusals += 1;
        }
        assert!(front_end.set(request, 0u64.as_bytes(), &[event().as_fd()]));
    }
    daemon.wait_for_log("not an eventfd", refusals);
    drop(front_end);
    assert!(daemon.terminate().success());
}

/// Regions of guest memory may come from tmpfs and hugetlbfs. Every other file is refused, and the log names the
/// remedy.
#[test]
fn only_memory_files_are_accepted_as_guest_memory() {
    let (_dir, mut daemon) = started(&["--num-queues=1"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let region = |guest: u64| [0u64.as_bytes(), [guest, 0x10000, USER + guest, 0].as_bytes()].concat();
    let (shm, disk) =
        (tempfile::tempfile_in("/dev/shm").unwrap(), tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    shm.set_len(0x10000).unwrap();
    disk.set_len(0x10000).unwrap();
    assert!(front_end.set(ADD_MEM_REG, &region(0), &[shm.as_fd()]));
    assert!(front_end.set(ADD_MEM_REG, &region(0x10000), &[memory(0x10000).as_fd()]));
    assert!(!front_end.set(ADD_MEM_REG, &region(0x20000), &[disk.as_fd()]));
    daemon.wait_for_log("not a file in memory", 1);
    assert!(daemon.log().contains("memory-backend-memfd"), "{}", daemon.log());
}

/// The front-end passes a file whose file system answers no request.
#[test]
fn a_file_on_stuck_storage_is_refused_at_once() {
    let (_dir, mut daemon) = started(&["--num-queues=1"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let Some(stuck) = StuckDisk::mount(vec![0; 0x10000]) else { return };
    let file = stuck.open();
    stuck.stop_answering();
    let begun = Instant::now();
    let region = [0u64.as_bytes(), [0, 0x10000, USER, 0].as_bytes()].concat();
    assert!(!front_end.set(ADD_MEM_REG, &region, &[file.as_fd()]));
    assert!(!front_end.set(SET_VRING_CALL, 0u64.as_bytes(), &[file.as_fd()]));
    assert!(!front_end.set(SET_VRING_KICK, 0u64.as_bytes(), &[file.as_fd()]));
    assert_eq!(front_end.get(GET_QUEUE_NUM), 1);
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(front_end);
    assert!(daemon.terminate_within(Duration::from_secs(5)).is_some_and(|status| status.success()), "{}", daemon.log());
}

/// One system call transfers at most 1024 memory ranges. The rest of a longer transfer must not wait for the next tick
/// of the queue.
#[test]
fn a_transfer_of_very_many_runs_does_not_wait_for_a_tick() {
    const RUNS: u64 = 4096;
    let (_dir, daemon) = started(&["--num-queues=1"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (ram, kick) = (memory(16 * MIB), event());
    let region = [0u64.as_bytes(), [0, 16 * MIB, USER, 0].as_bytes()].concat();
    assert!(front_end.set(ADD_MEM_REG, &region, &[ram.as_fd()]));
    let (avail, used, header, data) = (MIB, 2 * MIB, 3 * MIB, 4 * MIB);
    assert!(front_end.set(SET_VRING_NUM, [0u32, 8192].as_bytes(), &[]));
    let places = [USER, USER + used, USER + avail, 0];
    assert!(front_end.set(SET_VRING_ADDR, &[[0u32, 0].as_bytes(), places.as_bytes()].concat(), &[]));
    assert!(front_end.set(SET_VRING_KICK, 0u64.as_bytes(), &[kick.as_fd()]));
    assert!(front_end.set(SET_VRING_ENABLE, [0u32, 1].as_bytes(), &[]));
    let put = |at: u64, bytes: &[u8]| ram.write_all_at(bytes, at).unwrap();
    let mut slowest = Duration::ZERO;
    for round in 0..6u16 {
        let write = round % 2 == 0;
        put(header, [u32::from(write), 0, 0, 0].as_bytes());
        let mut table = Vec::new();
        let mut describe = |addr: u64, len: u32, flags: u16| {
            let next = (table.len() / 16 + 1) as u16;
            table.extend([addr.as_bytes(), len.as_bytes(), flags.as_bytes(), next.as_bytes()].concat());
        };
        describe(header, 16, 1);
        // Every second sector, so that no two descriptors are merged into one memory range.
        (0..RUNS).for_each(|run| describe(data + run * 1024, 512, if write { 1 } else { 3 }));
        describe(header + 64, 1, 2);
        put(0, &table);
        put(avail + 4 + 2 * u64::from(round), 0u16.as_bytes());
        // The queue is idle now, and its next tick is some time away.
        std::thread::sleep(Duration::from_millis(50));
        let begun = Instant::now();
        put(avail + 2, (round + 1).as_bytes());
        rustix::io::write(&kick, 1u64.as_bytes()).unwrap();
        loop {
            let mut index = 0u16;
            ram.read_exact_at(index.as_mut_bytes(), used + 2).unwrap();
            if index == round + 1 {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{}", daemon.log());
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut status = [0xff];
        ram.read_exact_at(&mut status, header + 64).unwrap();
        assert_eq!(status, [0], "round {round}: {}", daemon.log());
        slowest = slowest.max(begun.elapsed());
    }
    assert!(slowest < Duration::from_millis(400), "{slowest:?}");
}

/// Control characters in names and messages must neither reach the terminal that shows the log nor forge a log line.
#[test]
fn the_log_escapes_control_characters() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a\u{1b}[2J\nforged.vhd");
    super::image::make_fixed(&image, MIB);
    let mut daemon = super::daemon::Daemon::start(dir.path(), &image, &["--num-queues=1"]);
    daemon.wait_for_log("queues of", 1);
    let log = daemon.log();
    assert!(log.contains("\\u{1b}[2J\\nforged.vhd"), "{log}");
    assert!(!log.contains('\u{1b}') && !log.lines().any(|line| line.starts_with("forged")), "{log}");
    assert!(daemon.terminate().success());
}
