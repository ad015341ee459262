//! Tests with Linux in a QEMU virtual machine, which uses a chain through `diffdiskd` with its virtio driver, ext4 and
//! fio.
//!
//! `make test` builds the guest that these tests boot (vm-images/). Without this guest the tests fail.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::chain::Chain;
use common::daemon::Daemon;
use common::guest::Guest;
use common::{digest, oracle};

#[test]
fn all_readers_agree_on_a_file_system_written_to_a_chain() {
    let mut chain = Chain::with_root(128, 1);
    // A guest writes to the parent first, so that the top hides sectors of two layers.
    chain.push_child("middle.vhd");
    let daemon = Daemon::start(chain.top(), &[]);
    Guest::boot(&daemon.socket(), "fill", &[]).finish();
    daemon.stop();
    chain.push_child("top.vhd");

    let daemon = Daemon::start(chain.top(), &[]);
    let console = Guest::boot(&daemon.socket(), "files", &[]).finish();
    daemon.stop();

    let seen_by_guest = console.value("DEVICE-SHA256");
    assert_eq!(digest::sha256_of_disk(chain.top()), seen_by_guest, "diffdisk convert reads another disk");
    assert_eq!(oracle::sha256_of_disk(chain.top()), seen_by_guest, "7-Zip reads another disk");
    chain.assert_sound();
}

/// The guest of a virtio-mmio machine chooses its rings without regard to the front-end's queue size.
#[test]
fn a_microvm_boots_on_a_chain() {
    let mut chain = Chain::with_root(128, 6);
    chain.push_child("middle.vhd");
    chain.push_child("top.vhd");
    let daemon = Daemon::start(chain.top(), &[]);
    let console = Guest::boot(&daemon.socket(), "files", &["--machine", "microvm"]).finish();
    assert_eq!(daemon.log().matches("served without the record").count(), 1, "{}", daemon.log());
    daemon.stop();
    assert_eq!(digest::sha256_of_disk(chain.top()), console.value("DEVICE-SHA256"));
    chain.assert_sound();
}

#[test]
fn a_guest_whose_memory_is_not_shared_is_explained() {
    let chain = Chain::with_root(32, 7);
    let daemon = Daemon::start(chain.top(), &[]);
    let guest = Guest::boot(&daemon.socket(), "fill", &["--private-memory"]);
    daemon.wait_for_log("share=on", 1);
    drop(guest);
    daemon.stop();
}

#[test]
fn two_queues_of_random_writes_are_read_back() {
    let mut chain = Chain::with_root(64, 2);
    chain.push_child("child.vhd");
    let daemon = Daemon::start(chain.top(), &["--num-queues=2"]);
    let console = Guest::boot(&daemon.socket(), "verify", &["--queues", "2"]).finish();
    daemon.stop();
    assert_eq!(console.value("QUEUES"), "2");
    chain.assert_sound();
}

/// R6. QEMU tries to reconnect to a lost daemon once a second.
#[test]
fn a_daemon_is_killed_again_and_again_and_the_guest_notices_nothing() {
    let mut chain = Chain::with_root(64, 3);
    chain.push_child("child.vhd");
    let mut daemon = Daemon::start(chain.top(), &["--num-queues=2"]);
    let mut guest = Guest::boot(&daemon.socket(), "kills", &["--queues", "2", "--reconnect"]);
    guest.wait_for("LOAD: begins");
    let over = AtomicBool::new(false);
    let kills = thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut kills = 0;
            while !over.load(Ordering::Relaxed) {
                let front_ends = daemon.log().matches("front-end connected").count();
                daemon.kill_and_restart();
                kills += 1;
                // The daemon is not killed during the handshake, since QEMU 7.2 may never reconnect after such a kill.
                daemon.wait_for_log("front-end connected", front_ends + 1);
                thread::sleep(Duration::from_millis(200 + 97 * kills % 700));
            }
            kills
        });
        guest.wait_for("LOAD: over");
        over.store(true, Ordering::Relaxed);
        killer.join().expect("the killer ends")
    });
    let console = guest.finish();
    println!("{kills} kills in {} rounds", console.value("ROUNDS"));
    assert!(kills >= 20, "only {kills} kills: QEMU was slow to come back");
    daemon.stop();
    chain.assert_sound();
}

#[test]
fn trimmed_space_goes_back_to_the_host() {
    let mut chain = Chain::with_root(128, 4);
    chain.push_child("child.vhd");
    let daemon = Daemon::start(chain.top(), &[]);
    let filled = Guest::boot(&daemon.socket(), "fill", &[]).finish();
    let filled_bytes: u64 = filled.value("FILLED-BYTES").parse().expect("a number of bytes");
    let before = chain.top_allocated();
    assert!(before >= filled_bytes, "{filled_bytes} bytes of random data cannot lie in {before}");

    // A second virtual machine uses the same daemon.
    Guest::boot(&daemon.socket(), "trim", &[]).finish();
    daemon.stop();
    let after = chain.top_allocated();
    // The bitmap of a block and the unaligned ends of a trimmed range stay allocated. An eighth is more than they need.
    let expected = filled_bytes - filled_bytes / 8;
    assert!(before.saturating_sub(after) >= expected, "the child took {before} bytes, and {after} after the trim");
    chain.assert_sound();
}

#[test]
fn a_read_only_disk_refuses_writes_and_stays_as_it_is() {
    let mut chain = Chain::with_root(32, 5);
    chain.push_child("child.vhd");
    let before = digest::sha256_of_file(chain.top());
    let daemon = Daemon::start(chain.top(), &["--read-only"]);
    let console = Guest::boot(&daemon.socket(), "readonly", &[]).finish();
    daemon.stop();
    assert_eq!(console.value("DEVICE-SHA256"), digest::sha256_of_disk(chain.top()));
    assert_eq!(digest::sha256_of_file(chain.top()), before, "a read-only disk was written");
    chain.assert_sound();
}
