//! Tests of the daemon over its real socket, with correct guests and with front-ends that send invalid messages.
#![allow(clippy::cast_possible_truncation, reason = "the small numbers of a test")]

mod blk;
#[path = "../common/client.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod client;
mod daemon;
mod fds;
#[path = "../common/fuse_file.rs"]
mod fuse_file;
mod guest;
mod image;
mod lost_memory;
mod mounts;
mod page_cache;
mod raw;
mod resize;
#[path = "../common/rng.rs"]
#[allow(dead_code, reason = "only one test is random")]
mod rng;
mod setup;
mod start;
mod statistics;
mod stuck_storage;
mod system;
#[path = "../common/temp.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod temp;
mod unusual_front_ends;
mod version_change;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin;
use zerocopy::IntoBytes;

use blk::Guest;
use raw::*;
use setup::{MIB, memory, started};

fn diffdiskd() -> Command {
    Command::new(cargo_bin!("diffdiskd"))
}

#[test]
fn a_guest_reads_what_earlier_guests_wrote() {
    let (_dir, mut daemon) = started(&["--num-queues=2"]);
    let pattern: Vec<u8> = (0..16384u32).map(|i| (i % 251) as u8).collect();
    for round in 0..3 {
        daemon.wait_for_log("front-end disconnected", round as usize);
        let mut guest = Guest::connect(daemon.socket(), 2, 128);
        assert_eq!(guest.config.capacity.to_native(), 4 * MIB / 512);
        assert_eq!(guest.config.num_queues.to_native(), 2);
        for queue in 0..2 {
            let place = |round: u64| 65536 * (2 * round + queue as u64);
            for earlier in 0..round {
                assert_eq!(guest.read(queue, place(earlier), pattern.len()).unwrap(), pattern, "{round} {earlier}");
            }
            assert_eq!(guest.write(queue, place(round), &pattern), 0);
            assert_eq!(guest.flush(1 - queue), 0);
            assert_eq!(guest.read(1 - queue, place(round), pattern.len()).unwrap(), pattern);
        }
    }
    assert!(daemon.terminate().success());
}

#[test]
fn a_polled_ring_wraps_around() {
    let (_dir, mut daemon) = started(&["--num-queues=1", "--poll-us=50"]);
    let mut guest = Guest::connect(daemon.socket(), 1, 16);
    for i in 0..100u64 {
        let data = [i as u8; 512];
        assert_eq!(guest.write(0, i * 512, &data), 0);
        assert_eq!(guest.read(0, i * 512, 512).unwrap(), data);
    }
    assert!(daemon.terminate().success());
}

#[test]
fn sigterm_shuts_the_daemon_down_cleanly() {
    for connected in [false, true] {
        let (_dir, mut daemon) = started(&["--num-queues=1"]);
        let mut guest = connected.then(|| Guest::connect(daemon.socket(), 1, 64));
        if let Some(guest) = &mut guest {
            assert_eq!(guest.write(0, 0, &[7; 512]), 0);
        }
        assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
        assert!(!daemon.socket().exists());
        assert!(daemon.log().contains("closed"));
    }
}

#[test]
fn a_second_front_end_is_refused_and_named() {
    let (_dir, mut daemon) = started(&[]);
    let mut first = FrontEnd::negotiated(daemon.connect());
    let mut second = FrontEnd::new(daemon.connect());
    assert!(second.is_closed());
    daemon.wait_for_log(&format!("refused: process {}", std::process::id()), 1);
    assert_eq!(first.get(GET_FEATURES) & FEATURES, FEATURES, "the first front-end lost its service");
    drop(first);
    for _ in 0..50 {
        FrontEnd::negotiated(daemon.connect());
    }
    assert_eq!(
        daemon.log().matches("second front-end").count(),
        1,
        "a front-end that reconnected was taken for a second one"
    );
}

#[test]
fn the_offered_queues_memory_slots_and_features() {
    let (_dir, daemon) = started(&["--read-only"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    // The features of `config.rs`, and bit 30, by which vhost-user offers its protocol features.
    assert_eq!(front_end.get(GET_FEATURES), 0x1_7000_1e64, "of a read-only disk");
    let (_dir, daemon) = started(&["--num-queues=3"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    assert_eq!(front_end.get(GET_FEATURES), 0x1_7000_7e44, "of a writable disk");
    assert_eq!(front_end.get(GET_QUEUE_NUM), 3);
    assert_eq!(front_end.get(GET_MAX_MEM_SLOTS), 509);
    assert!(!front_end.set(SET_FEATURES, (1u64 << 63).as_bytes(), &[]));
    assert!(front_end.set(RESET_DEVICE, &[], &[]));
    assert!(front_end.set(SET_FEATURES, FEATURES.as_bytes(), &[]));
}

#[test]
fn the_configuration_space_is_readable_at_any_offset() {
    let (_dir, daemon) = started(&["--num-queues=3"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let whole = front_end.config(0, 256);
    assert_eq!(whole[..8], *(4 * MIB / 512).as_bytes());
    assert_eq!(whole[34..36], *3u16.as_bytes());
    for (offset, len) in [(0, 60), (0, 8), (1, 3), (33, 3), (59, 1), (60, 4), (7, 249), (255, 1)] {
        let part = front_end.config(offset, len);
        assert_eq!(part, whole[offset as usize..(offset + len) as usize], "{offset} {len}");
    }
    assert_eq!(front_end.config(0x100, 60), whole[..60], "the offset that old cloud-hypervisors use");
    assert_eq!(front_end.config(4095, 1).len(), 1);
}

/// Every message here is invalid, and none may end the connection.
#[test]
fn invalid_messages_are_refused_and_the_connection_stays() {
    let (_dir, daemon) = started(&["--num-queues=2"]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let (null, page) = (File::open("/dev/null").unwrap(), memory(0x1000));
    let (null, page) = (null.as_fd(), page.as_fd());
    let region = |guest: u64, size: u64, user: u64, offset: u64| [guest, size, user, offset];
    let table = |regions: &[[u64; 4]]| [[regions.len() as u32, 0].as_bytes(), regions.as_bytes()].concat();
    let single = |region: [u64; 4]| [0u64.as_bytes(), region.as_bytes()].concat();
    let good = region(0, 0x1000, 0x10_0000, 0);
    let (one_null, one_page, two_pages) = (&[null][..], &[page][..], &[page, page][..]);
    let many = vec![page; 32];
    let cases: Vec<(&str, u32, Vec<u8>, &[std::os::fd::BorrowedFd<'_>])> = vec![
        ("an unknown request", 999, vec![1, 2, 3], &[]),
        ("request 0", 0, vec![], &[]),
        ("too short", SET_FEATURES, vec![0; 4], &[]),
        ("too long", SET_FEATURES, vec![0; 4096], &[]),
        ("a file where none belongs", SET_FEATURES, FEATURES.as_bytes().to_vec(), one_null),
        ("no regions", SET_MEM_TABLE, table(&[]), &[]),
        ("a region without a file", SET_MEM_TABLE, table(&[good]), &[]),
        ("two files for a region", SET_MEM_TABLE, table(&[good]), two_pages),
        ("more regions than files fit", SET_MEM_TABLE, table(&vec![good; 33]), &many),
        ("a region of nothing", SET_MEM_TABLE, table(&[region(0, 0, 0, 0)]), one_page),
        ("a region beyond its file", SET_MEM_TABLE, table(&[region(0, 0x2000, 0, 0)]), one_page),
        ("an offset that overflows", SET_MEM_TABLE, table(&[region(0, 0x1000, 0, u64::MAX)]), one_page),
        ("an address that overflows", SET_MEM_TABLE, table(&[region(u64::MAX, 0x1000, 0, 0)]), one_page),
        ("regions that overlap", SET_MEM_TABLE, table(&[good, region(0x800, 0x800, 0x20_0000, 0)]), two_pages),
        ("a region that is no memory", SET_MEM_TABLE, table(&[good]), one_null),
        ("a count that lies", SET_MEM_TABLE, [[7u32, 0].as_bytes(), good.as_bytes()].concat(), one_page),
        ("a region to add without a file", ADD_MEM_REG, single(good), &[]),
        ("a region to add that is no memory", ADD_MEM_REG, single(good), one_null),
        ("a region to remove that is not there", REM_MEM_REG, single(good), &[]),
        ("a queue that is not there", SET_VRING_NUM, [2u32, 128].as_bytes().to_vec(), &[]),
        ("a queue far away", SET_VRING_BASE, [u32::MAX, 0].as_bytes().to_vec(), &[]),
        ("a queue of nothing", SET_VRING_NUM, [0u32, 0].as_bytes().to_vec(), &[]),
        ("a queue of no power of two", SET_VRING_NUM, [0u32, 100].as_bytes().to_vec(), &[]),
        ("a queue too long", SET_VRING_NUM, [0u32, 0x1_0000].as_bytes().to_vec(), &[]),
        ("a queue of 65536 and more", SET_VRING_NUM, [0u32, 0x1_0080].as_bytes().to_vec(), &[]),
        ("a base of more than 16 bits", SET_VRING_BASE, [0u32, 0x1_0000].as_bytes().to_vec(), &[]),
        ("a ring that is not aligned", SET_VRING_ADDR, [0u64, 1, 1, 1, 0].as_bytes().to_vec(), &[]),
        ("a kick without a file", SET_VRING_KICK, 0u64.as_bytes().to_vec(), &[]),
        ("a kick for a queue that is not there", SET_VRING_KICK, 200u64.as_bytes().to_vec(), one_null),
        ("neither on nor off", SET_VRING_ENABLE, [0u32, 2].as_bytes().to_vec(), &[]),
        ("a configuration to write nowhere", SET_CONFIG, [[0u32, 8, 0].as_bytes(), &[0xff; 8]].concat(), &[]),
        ("a configuration that lies", SET_CONFIG, [[0u32, 9, 0].as_bytes(), &[0; 8]].concat(), &[]),
        ("what was not offered: in-flight", 32, vec![0; 24], one_page),
        ("what was not offered: log", 7, 0u64.as_bytes().to_vec(), one_page),
    ];
    for (what, request, body, files) in cases {
        assert!(!front_end.set(request, &body, files), "{what}");
        front_end.send_message(request, &body, files);
        assert_eq!(front_end.get(GET_FEATURES) & FEATURES, FEATURES, "after {what}");
    }
    drop(front_end);
    let mut guest = Guest::connect(daemon.socket(), 2, 128);
    assert_eq!(guest.write(1, 512, &[9; 512]), 0);
    assert_eq!(guest.read(0, 512, 512).unwrap(), [9; 512]);
}

/// Each of these messages ends the connection, and so does a front-end that hangs up in the middle of a message. The
/// daemon must then serve the next front-end.
#[test]
fn closed_connections_do_not_disturb_the_next_front_end() {
    let (_dir, mut daemon) = started(&["--num-queues=1"]);
    let hung_up_on = |message: &dyn Fn(&mut FrontEnd)| {
        let mut front_end = FrontEnd::negotiated(daemon.connect());
        message(&mut front_end);
        assert!(front_end.is_closed());
    };
    hung_up_on(&|f| f.send(GET_FEATURES, 2, &[], &[]));
    hung_up_on(&|f| f.send(GET_FEATURES, 1, &vec![0; 5000], &[]));
    hung_up_on(&|f| f.send_message(GET_VRING_BASE, [7u32, 0].as_bytes(), &[]));
    hung_up_on(&|f| {
        // The front-end reads no replies. The daemon must close the connection before a send would block.
        rustix::net::sockopt::set_socket_send_buffer_size(f.socket(), 1 << 20).unwrap();
        for _ in 0..20_000 {
            let sent = rustix::net::send(f.socket(), [GET_FEATURES, 1, 0].as_bytes(), rustix::net::SendFlags::NOSIGNAL);
            if sent.is_err() {
                break;
            }
        }
    });
    for half in [&[1u8][..], &[0; 11], [SET_FEATURES, 1, 8, 0].as_bytes()] {
        let gone = daemon.connect();
        rustix::net::send(&gone, half, rustix::net::SendFlags::empty()).unwrap();
        gone.shutdown(std::net::Shutdown::Both).unwrap();
    }
    let half = daemon.connect();
    rustix::net::send(&half, &[1], rustix::net::SendFlags::empty()).unwrap();
    daemon.wait_for_log("sent an incomplete message", 1);
    assert!(FrontEnd::new(half).is_closed());
    let mut guest = Guest::connect(daemon.socket(), 1, 128);
    assert_eq!(guest.write(0, 0, &[1; 512]), 0);
    assert!(daemon.terminate().success());
}

#[test]
fn a_front_end_without_protocol_features_has_its_rings_enabled() {
    let (_dir, daemon) = started(&["--num-queues=1", "--log-level=debug"]);
    let mut daemon = daemon;
    let mut front_end = FrontEnd::new(daemon.connect());
    let ram = memory(0x10000);
    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    front_end.send_message(SET_FEATURES, (1u64 << 32).as_bytes(), &[]);
    let table = [[1u32, 0].as_bytes(), [0u64, 0x10000, 0x7000_0000, 0].as_bytes()].concat();
    front_end.send_message(SET_MEM_TABLE, &table, &[ram.as_fd()]);
    front_end.send_message(SET_VRING_NUM, [0u32, 16].as_bytes(), &[]);
    let (descriptors, used, available) = (0x7000_0000u64, 0x7000_2000u64, 0x7000_1000u64);
    front_end.send_message(SET_VRING_ADDR, [0, descriptors, used, available, 0].as_bytes(), &[]);
    front_end.send_message(SET_VRING_BASE, [0u32, 5].as_bytes(), &[]);
    front_end.send_message(SET_VRING_KICK, 0u64.as_bytes(), &[kick.as_fd()]);
    daemon.wait_for_log("ring 0 runs from 5", 1);
}

#[test]
fn a_connection_handed_over_ends_the_daemon_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.vhd");
    image::make_fixed(&image, MIB);
    let (near, far) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&far, rustix::io::FdFlags::empty()).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&far).to_string();
    let mut child = std::process::Command::new(cargo_bin!("diffdiskd"))
        .args(["--fd", &number, "--blk-file"])
        .arg(&image)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    drop(far);
    let mut front_end = FrontEnd::negotiated(near);
    assert!(front_end.get(GET_QUEUE_NUM) >= 1);
    drop(front_end);
    assert!(child.wait().unwrap().success());
}

#[test]
fn capabilities_and_wrong_usage() {
    let capabilities = "{\"type\": \"block\", \"features\": [\"read-only\", \"blk-file\"]}\n";
    diffdiskd().arg("--print-capabilities").assert().code(0).stdout(capabilities);
    for wrong in [&[][..], &["--blk-file"], &["--blk-file=x", "--no-such-option"], &["--disk=path=/x,colour=red"]] {
        diffdiskd().args(wrong).assert().code(2).stdout("");
    }
}

#[test]
fn failures_are_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("disk.vhd"), dir.path().join("vhost.sock"));
    let fails = |args: &[&std::ffi::OsStr], words: &str| {
        let output = diffdiskd().args(["--log-level=off"]).args(args).assert().code(1).get_output().clone();
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.starts_with("diffdisk: serve: ") && line.contains(words), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    };
    let (socket_path, blk_file) = ("--socket-path".as_ref(), "--blk-file".as_ref());
    fails(&[socket_path, socket.as_ref(), blk_file, image.as_ref()], "disk.vhd");
    assert!(!socket.exists());
    image::make_fixed(&image, MIB);
    fails(&[blk_file, image.as_ref()], "no socket");
    fails(&["--fd=77".as_ref(), blk_file, image.as_ref()], "descriptor 77");
    std::fs::write(&socket, "precious").unwrap();
    fails(&[socket_path, socket.as_ref(), blk_file, image.as_ref()], "not a socket");
    fails(&["--config".as_ref(), "/nonexistent.toml".as_ref()], "/nonexistent.toml");
}

#[test]
fn many_disks_in_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["a", "b"] {
        image::make_fixed(&path(name), MIB);
    }
    let config = path("disks.toml");
    std::fs::write(&config, format!("[[disk]]\npath = {:?}\nsocket = {:?}\nqueues = 2\n", path("b"), path("b.sock")))
        .unwrap();
    let disk = format!("--disk=path={},socket={},queues=1", path("a").display(), path("a.sock").display());
    let mut command = std::process::Command::new(cargo_bin!("diffdiskd"));
    let mut child =
        command.arg(&disk).arg("--config").arg(&config).stderr(std::process::Stdio::null()).spawn().unwrap();
    while !(path("a.sock").exists() && path("b.sock").exists()) {
        assert!(child.try_wait().unwrap().is_none(), "the daemon ended");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let (mut a, mut b) = (Guest::connect(&path("a.sock"), 1, 64), Guest::connect(&path("b.sock"), 2, 64));
    assert_eq!((a.write(0, 0, &[1; 512]), b.write(1, 0, &[2; 512])), (0, 0));
    assert_eq!((a.read(0, 0, 512).unwrap()[0], b.read(0, 0, 512).unwrap()[0]), (1, 2));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!path("a.sock").exists() && !path("b.sock").exists());
}
