//! Storage that stops answering: a FUSE file system with one file, served by this process.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, ReplyData, ReplyEmpty, ReplyWrite};
use rustix::mount::{UnmountFlags, unmount};
use zerocopy::IntoBytes;

use super::daemon::Daemon;
use super::fuse_file::{self, FileContent};
use super::guest::{GuestRequest, ManualGuest, Part};
use super::raw::*;
use super::setup::MIB;

const NAME: &str = "disk.vhd";
/// Name that does not exist in the file system. Its look-up is not answered while the storage is stuck.
const BLOCKING_NAME: &str = "nothing";

struct Server {
    bytes: Mutex<Vec<u8>>,
    stuck: Arc<AtomicBool>,
}

/// The mounted file system. Dropping this value makes it answer again and unmounts it.
pub(crate) struct StuckDisk {
    stuck: Arc<AtomicBool>,
    session: Option<BackgroundSession>,
    place: tempfile::TempDir,
}

impl StuckDisk {
    /// Mounts a file with the given bytes. If FUSE is not available, prints the reason and returns `None`.
    pub(crate) fn mount(bytes: Vec<u8>) -> Option<StuckDisk> {
        let stuck = Arc::new(AtomicBool::new(false));
        let place = tempfile::tempdir().unwrap();
        let server = Server { bytes: Mutex::new(bytes), stuck: stuck.clone() };
        match fuse_file::mount(server, place.path(), &fuser::Config::default()) {
            Ok(session) => Some(StuckDisk { stuck, session: Some(session), place }),
            Err(e) => {
                eprintln!("skipped: FUSE cannot be mounted here: {e}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.place.path().join(NAME)
    }

    pub(crate) fn open(&self) -> File {
        // The server answers the first FLUSH with ENOSYS; the kernel then sends no further FLUSH when a file is closed.
        drop(File::open(self.path()).unwrap());
        File::options().read(true).write(true).open(self.path()).unwrap()
    }

    /// Makes the server stop reading requests: it blocks in the look-up of [`BLOCKING_NAME`]. (A process whose request
    /// was read but not answered could not be killed.)
    pub(crate) fn stop_answering(&self) {
        self.stuck.store(true, Ordering::SeqCst);
        let nothing = self.place.path().join(BLOCKING_NAME);
        thread::spawn(move || std::fs::metadata(nothing));
        sleep(Duration::from_millis(200));
    }

    pub(crate) fn answer_again(&self) {
        self.stuck.store(false, Ordering::SeqCst);
    }
}

impl Drop for StuckDisk {
    fn drop(&mut self) {
        self.answer_again();
        let _ = unmount(self.place.path(), UnmountFlags::DETACH);
        drop(self.session.take());
    }
}

impl FileContent for Server {
    const NAME: &'static str = NAME;
    /// Zero, so that the kernel repeats every look-up.
    const TTL: Duration = Duration::ZERO;

    fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn before_not_found(&self, name: &OsStr) {
        while name == OsStr::new(BLOCKING_NAME) && self.stuck.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(5));
        }
    }

    fn read(&self, offset: u64, size: usize, reply: ReplyData) {
        let bytes = self.bytes.lock().unwrap();
        let from = (offset as usize).min(bytes.len());
        reply.data(&bytes[from..(from + size).min(bytes.len())]);
    }

    fn write(&self, offset: u64, data: &[u8], reply: ReplyWrite) {
        let mut bytes = self.bytes.lock().unwrap();
        let (from, to) = (offset as usize, offset as usize + data.len());
        if bytes.len() < to {
            bytes.resize(to, 0);
        }
        bytes[from..to].copy_from_slice(data);
        reply.written(data.len() as u32);
    }

    fn sync(&self, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// Starts a daemon with a guest that has completed a write, makes the storage stop answering, and submits a request
/// that therefore does not complete. The storage is the last element of the result, so that callers drop it first: a
/// daemon that waits for the storage cannot be killed.
fn stuck_request() -> Option<(tempfile::TempDir, Daemon, ManualGuest, FrontEnd, StuckDisk)> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    super::image::make_fixed(&image, 4 * MIB);
    let stuck = StuckDisk::mount(std::fs::read(&image).unwrap())?;
    let control = format!("--control={}", dir.path().join("control").display());
    let mut daemon = Daemon::start(dir.path(), &stuck.path(), &["--num-queues=2", &control]);
    daemon.wait_for_log("queues of", 1);
    let mut guest = ManualGuest::new(Part::Data);
    let mut front_end = FrontEnd::negotiated(daemon.connect());
    guest.attach(&mut front_end);
    assert!(guest.enable(&mut front_end));
    guest.prepare(GuestRequest::Write);
    guest.publish();
    assert!(guest.wait(), "{}", daemon.log());
    stuck.stop_answering();
    guest.prepare(GuestRequest::Write);
    guest.publish();
    // During this wait the daemon also looks up the names of its files. These look-ups must not block it.
    sleep(Duration::from_secs(6));
    assert_eq!(guest.completed(), 1);
    Some((dir, daemon, guest, front_end, stuck))
}

#[test]
fn the_signal_ends_a_daemon_whose_storage_does_not_answer() {
    let Some((_dir, mut daemon, _guest, _front_end, stuck)) = stuck_request() else { return };
    let begun = Instant::now();
    let status = daemon.terminate_within(Duration::from_secs(20));
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}: {}", begun.elapsed(), daemon.log());
    assert!(status.is_some_and(|status| !status.success()), "what was not written is no success: {}", daemon.log());
    assert!(daemon.log().contains("the storage does not respond"), "{}", daemon.log());
    drop(stuck);
}

/// The control socket answers methods that need no file system, and the time limit of `shutdown` ends the daemon.
#[test]
fn the_control_socket_does_not_wait_for_the_storage() {
    let Some((dir, mut daemon, _guest, _front_end, stuck)) = stuck_request() else { return };
    let mut control = BufReader::new(UnixStream::connect(dir.path().join("control")).unwrap());
    control.get_ref().set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut request = |id: u32, method: &str, params: &str| {
        let text = format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":{params}}}"#);
        control.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
        if ["disks", "stats"].contains(&method) {
            return;
        }
        let mut answer = String::new();
        control.read_line(&mut answer).unwrap();
        assert!(answer.contains(&format!(r#""id":{id}"#)) && answer.contains("result"), "{method}: {answer}");
    };
    // These requests wait for the size of the file, so the answers to the later ones come first.
    request(1, "stats", "{}");
    request(2, "disks", "{}");
    request(3, "version", "{}");
    let begun = Instant::now();
    request(4, "watch", "{}");
    request(5, "shutdown", r#"{"timeout_s":1}"#);
    let status = daemon.terminate_within(Duration::from_secs(20));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}: {}", begun.elapsed(), daemon.log());
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{}", daemon.log());
    assert!(daemon.log().contains("not closed 1 s after the request to end"), "{}", daemon.log());
    drop(stuck);
}

/// After the deadline the daemon closes the connection, because it has no ring base to return.
#[test]
fn stopping_a_queue_has_a_deadline() {
    let Some((_dir, mut daemon, guest, mut front_end, stuck)) = stuck_request() else { return };
    front_end.send_message(GET_VRING_BASE, [0u32, 0].as_bytes(), &[]);
    std::thread::sleep(Duration::from_secs(20));
    assert!(front_end.is_closed(), "{}", daemon.log());
    daemon.wait_for_log("the storage does not respond", 1);
    // A front-end that reconnects gets replies, but cannot enable the queue yet.
    let mut again = FrontEnd::negotiated(daemon.connect());
    let next = ManualGuest::new(Part::Data);
    next.attach(&mut again);
    assert!(!next.enable(&mut again));
    assert!(again.is_closed(), "where the ring stands is unknown");
    // The front-end cannot enable another queue either: the late request could overwrite data that the front-end writes
    // through that queue.
    let mut again = FrontEnd::negotiated(daemon.connect());
    next.attach_to(&mut again, 1);
    assert!(!again.set(SET_VRING_ENABLE, [1u32, 1].as_bytes(), &[]));
    assert!(again.is_closed());
    stuck.answer_again();
    let begun = Instant::now();
    loop {
        let mut again = FrontEnd::negotiated(daemon.connect());
        next.attach(&mut again);
        if next.enable(&mut again) {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", daemon.log());
        drop(again);
        sleep(Duration::from_millis(100));
    }
    assert_eq!(guest.completed(), 2, "the late request did not complete");
    assert!(daemon.terminate().success());
}
