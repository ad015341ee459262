//! Guest memory that cannot be accessed: a front-end cuts its memory file, or the host has no pages for it. The disk is
//! then out of service until a front-end connects again. All other disks stay in service.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;
use rustix::fs::{MemfdFlags, memfd_create};
use zerocopy::IntoBytes;

use super::blk::Guest;
use super::daemon::{Daemon, SOCKET};
use super::guest::{GUEST_REQUESTS, GuestRequest, ManualGuest, PAGE, PARTS, Part, SLOTS};
use super::image;
use super::raw::*;
use super::rng::Rng;
use super::setup::{MIB, event};
use super::temp::RuntimeDir;

/// The log line of a lost page.
const LOST: &str = "an access to guest memory failed";

/// Starts a daemon with a dynamic image on its main socket and a fixed image on `b.sock`. Returns the daemon and its
/// runtime folder.
fn two_disks(dir: &Path, options: &[&str]) -> (Daemon, RuntimeDir) {
    let runtime = RuntimeDir::new();
    let (a, b) = (dir.join("a.vhd"), dir.join("b.vhd"));
    let mut tool = std::process::Command::new(cargo_bin!("diffdisk"));
    assert!(tool.arg("create").arg(&a).args(["--size", "64M", "--quiet"]).status().unwrap().success());
    image::make_fixed(&b, 4 * MIB);
    let disk = |path: &Path, name| format!("path={},socket={},queues=1", path.display(), dir.join(name).display());
    let options = [&[runtime.option()], options].concat();
    (Daemon::start_disks(dir, &[disk(&b, "b.sock"), disk(&a, SOCKET)], &options), runtime)
}

/// Completes one request, so that the ring is started and its pages are allocated.
fn warm_up(guest: &mut ManualGuest, ask: GuestRequest) {
    guest.prepare(ask);
    guest.publish();
    assert!(guest.wait(), "{ask:?}");
    assert_eq!(guest.status(), 0, "{ask:?}");
}

/// Sets the flag when dropped, also during a panic.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The test removes one page, then submits a request that needs it.
#[test]
fn a_disk_survives_the_loss_of_any_part_of_a_request() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, _runtime) = two_disks(dir.path(), &[]);
    let mut other = Guest::connect(&dir.path().join("b.sock"), 1, 64);
    assert_eq!(other.write(0, 0, &[5; 4096]), 0);
    let mut rounds = 0;
    for last in PARTS {
        for ask in GUEST_REQUESTS.into_iter().filter(|ask| last != Part::Indirect || *ask == GuestRequest::Indirect) {
            let mut guest = ManualGuest::new(last);
            let mut front_end = FrontEnd::negotiated(daemon.connect());
            guest.attach(&mut front_end);
            assert!(guest.enable(&mut front_end));
            warm_up(&mut guest, if rounds % 2 == 0 { GuestRequest::Write } else { ask });
            guest.prepare(ask);
            guest.truncate_last_page();
            guest.publish();
            assert!(front_end.is_closed(), "{last:?}, {ask:?}: {}", daemon.log());
            rounds += 1;
            assert_ne!(guest.completed(), 2, "{last:?}, {ask:?}: it was answered");
            daemon.wait_for_log("front-end disconnected", rounds);
            assert_eq!(other.read(0, 0, 4096).unwrap(), [5; 4096]);
        }
    }
    let log = daemon.log();
    assert_eq!(log.matches(LOST).count(), rounds, "once each time: {log}");
    assert!(!log.contains("Bad address"), "{log}");
    let mut guest = Guest::connect(daemon.socket(), 1, 64);
    assert_eq!(guest.write(0, 65536, &[7; 512]), 0);
    assert_eq!(guest.read(0, 65536, 512).unwrap(), [7; 512]);
    assert!(daemon.terminate().success());
}

/// One front-end shrinks the guest's memory at random moments under load, while the data on another disk is verified.
#[test]
fn a_front_end_that_shrinks_its_memory_harms_only_its_own_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, _runtime) = two_disks(dir.path(), &["--poll-us=20"]);
    let mut verifier = Guest::connect(&dir.path().join("b.sock"), 1, 64);
    let over = AtomicBool::new(false);
    let rounds = 60;
    let verified = std::thread::scope(|scope| {
        let verify = scope.spawn(|| {
            let mut verified = 0u64;
            while !over.load(Ordering::Relaxed) {
                let (place, byte) = (verified % 64 * 32768, (verified % 251) as u8);
                assert_eq!(verifier.write(0, place, &[byte; 16384]), 0);
                assert_eq!(verifier.read(0, place, 16384).unwrap(), [byte; 16384], "after {verified}");
                verified += 1;
            }
            verified
        });
        let ends = SetOnDrop(&over);
        let mut rng = Rng::seeded(0x9e37_79b9_7f4a_7c15);
        for round in 0..rounds {
            let mut guest = ManualGuest::new(rng.pick(&PARTS));
            let mut front_end = FrontEnd::negotiated(daemon.connect());
            guest.attach(&mut front_end);
            assert!(guest.enable(&mut front_end));
            let ram = guest.ram.try_clone().unwrap();
            let (moment, pages) = (Duration::from_micros(rng.below(3000)), rng.below(PARTS.len() as u64));
            let cut = scope.spawn(move || {
                sleep(moment);
                ram.set_len(pages * PAGE).unwrap();
            });
            let begun = Instant::now();
            // The load continues until the daemon closes the connection.
            while !front_end.has_hung_up() {
                assert!(begun.elapsed() < Duration::from_secs(30), "round {round}, {guest:?}: {}", daemon.log());
                if !guest.submitted.is_multiple_of(SLOTS) || guest.completed() == guest.submitted {
                    guest.prepare(rng.pick(&GUEST_REQUESTS));
                    guest.publish();
                } else {
                    guest.notify();
                    sleep(Duration::from_micros(50));
                }
            }
            cut.join().unwrap();
            daemon.wait_for_log("front-end disconnected", round + 1);
        }
        drop(ends);
        verify.join().unwrap()
    });
    assert!(verified > 50, "{verified}");
    let log = daemon.log();
    assert_eq!(log.matches(LOST).count(), rounds, "{log}");
    assert!(daemon.terminate().success());
}

/// The host has no huge pages for the guest's memory. (If the host has huge pages, the test is skipped.)
#[test]
fn guest_memory_of_huge_pages_that_the_host_lacks() {
    let Ok(fd) = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) else {
        eprintln!("skipped: the kernel has no huge pages of 2 MiB");
        return;
    };
    let ram = File::from(fd);
    ram.set_len(2 * MIB).unwrap();
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap();
    if free.trim() != "0" {
        eprintln!("skipped: the host has huge pages");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, _runtime) = two_disks(dir.path(), &[]);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    let region = [0u64.as_bytes(), [0, 2 * MIB, 0x7000_0000, 0].as_bytes()].concat();
    assert!(front_end.set(ADD_MEM_REG, &region, &[ram.as_fd()]));
    let places = [0x7000_0000u64, 0x7000_2000, 0x7000_1000, 0];
    front_end.send_message(SET_VRING_NUM, [0u32, 64].as_bytes(), &[]);
    front_end.send_message(SET_VRING_ADDR, &[[0u32, 0].as_bytes(), places.as_bytes()].concat(), &[]);
    front_end.send_message(SET_VRING_KICK, 0u64.as_bytes(), &[event().as_fd()]);
    front_end.send_message(SET_VRING_ENABLE, [0u32, 1].as_bytes(), &[]);
    assert!(front_end.is_closed());
    daemon.wait_for_log(LOST, 1);
    Guest::connect(daemon.socket(), 1, 64);
    assert!(daemon.terminate().success());
}

/// The memory file has a hole, and its tmpfs is full.
#[test]
fn guest_memory_with_a_hole_on_a_full_tmpfs() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("memory");
    std::fs::create_dir(&place).unwrap();
    let Some(_mounted) = super::mounts::tmpfs(&place, "size=64k") else { return };
    let (mut daemon, _runtime) = two_disks(dir.path(), &[]);
    let mut other = Guest::connect(&dir.path().join("b.sock"), 1, 64);
    let open = |name: &str| File::options().create(true).truncate(true).read(true).write(true).open(place.join(name));
    for (round, last) in [Part::Data, Part::Status, Part::Used].into_iter().enumerate() {
        let ram = open("ram").unwrap();
        ram.set_len(PARTS.len() as u64 * PAGE).unwrap();
        let mut guest = ManualGuest::with_memory(ram, last);
        let mut front_end = FrontEnd::negotiated(daemon.connect());
        guest.attach(&mut front_end);
        // The pages of all other parts are allocated, and the tmpfs has none left.
        guest.prepare(GuestRequest::Read);
        guest.allocate_pages();
        let filler = open("filler").unwrap();
        assert!(std::io::copy(&mut std::io::repeat(1).take(MIB), &mut &filler).is_err(), "it is full");
        front_end.send_message(SET_VRING_ENABLE, [0u32, 1].as_bytes(), &[]);
        guest.publish();
        assert!(front_end.is_closed(), "{last:?}: {}", daemon.log());
        daemon.wait_for_log(LOST, round + 1);
        assert_eq!(other.write(0, 0, &[round as u8; 512]), 0);
        filler.set_len(0).unwrap();
    }
    assert!(daemon.terminate().success());
}
