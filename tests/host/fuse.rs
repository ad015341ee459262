//! A disk that notes and misbehaves: a file system of one file, served by this process through FUSE.
//!
//! It keeps the file's bytes in memory and notes every write, sync and punch, in the order in which they took effect;
//! answers can be delayed, and writes and syncs made to fail. Put a loop device on the file, and a kernel's file system
//! has its medium in our hands.
//!
//! Do not read or write below the mount failpoint in the test's own process: killed in the midst of it, the process would
//! wait for an answer that it alone could give. Programs started by the test do.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Errno, ReplyData, ReplyEmpty, ReplyWrite};
use rustix::mount::UnmountFlags;
use tempfile::TempDir;

use crate::fuse_file::{self, FileContent};

use super::loopdev::unmount;
use super::pages::Pages;

/// Name of the file.
const NAME: &str = "disk";

/// What happened to the file.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write { offset: u64, data: Arc<[u8]> },
    Zero { offset: u64, len: u64 },
    Sync,
}

/// An event, and when it took effect.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) event: Event,
    pub(crate) done: Instant,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// A delayed request has taken effect.
    applied: Condvar,
    delay_ms: AtomicU64,
    read_delay_ms: AtomicU64,
    fail_writes: AtomicBool,
    fail_syncs: AtomicBool,
    failures: AtomicU64,
}

#[derive(Default)]
struct State {
    pages: Pages,
    log: Vec<Entry>,
    /// Data of writes that are being held back.
    held_writes: Vec<Arc<[u8]>>,
    /// Reads that are being held back, and when the last of them was answered.
    held_reads: usize,
    last_late_read: Option<Instant>,
    /// When requests arrived that move or sync bytes.
    arrivals: Vec<Instant>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread of the disk panics")
    }
}

/// The mounted disk. Dropped, it is unmounted.
pub(crate) struct FuseDisk {
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    mount_point: TempDir,
}

impl FuseDisk {
    /// Mounts a disk with these contents.
    pub(crate) fn mount(pages: Pages) -> FuseDisk {
        let shared = Arc::new(Shared { state: Mutex::new(State { pages, ..State::default() }), ..Shared::default() });
        let mount_point = tempfile::tempdir().expect("a mount point");
        let mut config = fuser::Config::default();
        config.mount_options = vec![fuser::MountOption::FSName("diffdisk-test".into())];
        let session =
            fuse_file::mount(Server(shared.clone()), mount_point.path(), &config).expect("FUSE mounts for root");
        FuseDisk { shared, session: Some(session), mount_point }
    }

    /// The file.
    pub(crate) fn path(&self) -> PathBuf {
        self.mount_point.path().join(NAME)
    }

    /// Number of events so far. What a request caused is counted when its completion is seen.
    pub(crate) fn position(&self) -> usize {
        self.shared.state().log.len()
    }

    /// Forgets the events so far; returns the contents that they led to.
    pub(crate) fn start_log(&self) -> Pages {
        let mut state = self.shared.state();
        state.log.clear();
        state.pages.clone()
    }

    /// All events.
    pub(crate) fn log(&self) -> Vec<Entry> {
        self.shared.state().log.clone()
    }

    /// The contents as they are now.
    pub(crate) fn contents(&self) -> Pages {
        self.shared.state().pages.clone()
    }

    /// Writes and syncs that arrive from now on take effect, and are answered, after this time.
    pub(crate) fn set_delay(&self, delay: Duration) {
        self.shared.delay_ms.store(millis(delay), Ordering::SeqCst);
    }

    /// Reads that arrive from now on are answered after this time.
    pub(crate) fn set_read_delay(&self, delay: Duration) {
        self.shared.read_delay_ms.store(millis(delay), Ordering::SeqCst);
    }

    /// Whether writes fail with EIO from now on, changing nothing.
    pub(crate) fn fail_writes(&self, on: bool) {
        self.shared.fail_writes.store(on, Ordering::SeqCst);
    }

    /// Whether syncs fail with EIO from now on.
    pub(crate) fn fail_syncs(&self, on: bool) {
        self.shared.fail_syncs.store(on, Ordering::SeqCst);
    }

    /// Requests that were made to fail.
    pub(crate) fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::SeqCst)
    }

    /// When the first request after `moment` arrived.
    pub(crate) fn first_arrival_after(&self, moment: Instant) -> Option<Instant> {
        self.shared.state().arrivals.iter().copied().filter(|at| *at > moment).min()
    }

    /// Waits until a write that holds `needle` has arrived and is being held back.
    pub(crate) fn wait_for_held_write(&self, needle: &[u8]) {
        self.wait("the write to arrive", |state| state.held_writes.iter().any(|data| contains(data, needle)));
    }

    /// Waits until a read has arrived and is being held back.
    pub(crate) fn wait_for_held_read(&self) {
        self.wait("a read to arrive", |state| state.held_reads > 0);
    }

    /// When the last of the reads that were held back was answered; `None` while one still is, or if none was.
    pub(crate) fn held_reads_done_at(&self) -> Option<Instant> {
        let state = self.shared.state();
        state.last_late_read.filter(|_| state.held_reads == 0)
    }

    /// Waits until nothing is held back.
    pub(crate) fn wait_until_applied(&self) {
        self.wait("the held writes to land", |state| state.held_writes.is_empty());
    }

    fn wait(&self, what: &str, until: impl Fn(&State) -> bool) {
        let patience = Duration::from_secs(60);
        let (_state, waited) = self
            .shared
            .applied
            .wait_timeout_while(self.shared.state(), patience, |state| !until(state))
            .expect("no thread of the disk panics");
        assert!(!waited.timed_out(), "waited too long for {what}");
    }
}

impl Drop for FuseDisk {
    fn drop(&mut self) {
        self.set_delay(Duration::ZERO);
        self.set_read_delay(Duration::ZERO);
        let path = self.mount_point.path();
        if let Err(why) = unmount(path) {
            // A test that failed may have left users. They get errors from now on, and end.
            eprintln!("{} is unmounted by force: {why}", path.display());
            let forced = rustix::mount::unmount(path, UnmountFlags::FORCE | UnmountFlags::DETACH);
            if let Err(e) = forced {
                eprintln!("{} stays mounted: {e}", path.display());
                return;
            }
        }
        let ended = self.session.take().map(BackgroundSession::join);
        if let Some(Err(e)) = ended {
            eprintln!("{}: {e}", path.display());
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).expect("a short time")
}

/// Whether `needle` is somewhere in `data`.
pub(crate) fn contains(data: &[u8], needle: &[u8]) -> bool {
    data.windows(needle.len()).any(|window| window == needle)
}

struct Server(Arc<Shared>);

impl Server {
    /// Has an event take effect, now or after the delay, then answers.
    fn apply(&self, event: Event, answer: impl FnOnce() + Send + 'static) {
        let shared = self.0.clone();
        let delay = Duration::from_millis(shared.delay_ms.load(Ordering::SeqCst));
        let land = move || {
            let mut state = shared.state();
            match &event {
                Event::Write { offset, data } => {
                    state.pages.write(*offset, data);
                    state.held_writes.retain(|held| !Arc::ptr_eq(held, data));
                }
                Event::Zero { offset, len } => state.pages.zero(*offset, *len),
                Event::Sync => {}
            }
            state.log.push(Entry { event, done: Instant::now() });
            drop(state);
            shared.applied.notify_all();
            answer();
        };
        if delay.is_zero() {
            land();
        } else {
            thread::spawn(move || {
                thread::sleep(delay);
                land();
            });
        }
    }

    fn should_fail(&self, switch: &AtomicBool) -> bool {
        let fails = switch.load(Ordering::SeqCst);
        self.0.failures.fetch_add(u64::from(fails), Ordering::SeqCst);
        fails
    }

    fn record_arrival(&self) {
        self.0.state().arrivals.push(Instant::now());
    }
}

impl FileContent for Server {
    const NAME: &'static str = NAME;
    const TTL: Duration = Duration::from_secs(3600);

    fn len(&self) -> u64 {
        self.0.state().pages.len()
    }

    fn allocated(&self) -> u64 {
        self.0.state().pages.used()
    }

    fn set_len(&self, len: u64) {
        self.0.state().pages.set_len(len);
    }

    fn read(&self, offset: u64, size: usize, reply: ReplyData) {
        self.record_arrival();
        let delay = Duration::from_millis(self.0.read_delay_ms.load(Ordering::SeqCst));
        if delay.is_zero() {
            let bytes = self.0.state().pages.read(offset, size);
            return reply.data(&bytes);
        }
        self.0.state().held_reads += 1;
        self.0.applied.notify_all();
        let shared = self.0.clone();
        thread::spawn(move || {
            thread::sleep(delay);
            let mut state = shared.state();
            state.held_reads -= 1;
            state.last_late_read = Some(Instant::now());
            let bytes = state.pages.read(offset, size);
            drop(state);
            reply.data(&bytes);
        });
    }

    fn write(&self, offset: u64, data: &[u8], reply: ReplyWrite) {
        self.record_arrival();
        if self.should_fail(&self.0.fail_writes) {
            return reply.error(Errno::EIO);
        }
        let size = u32::try_from(data.len()).expect("a size in memory");
        let data: Arc<[u8]> = data.into();
        self.0.state().held_writes.push(data.clone());
        self.0.applied.notify_all();
        self.apply(Event::Write { offset, data }, move || reply.written(size));
    }

    fn sync(&self, reply: ReplyEmpty) {
        self.record_arrival();
        if self.should_fail(&self.0.fail_syncs) {
            return reply.error(Errno::EIO);
        }
        self.apply(Event::Sync, move || reply.ok());
    }

    fn allocate(&self, offset: u64, len: u64, mode: i32, reply: ReplyEmpty) {
        self.record_arrival();
        if self.should_fail(&self.0.fail_writes) {
            return reply.error(Errno::EIO);
        }
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            // Room is always there.
            0 => reply.ok(),
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => {
                self.apply(Event::Zero { offset, len }, move || reply.ok());
            }
            _ => reply.error(Errno::EOPNOTSUPP),
        }
    }
}

/// A disk of `len` zeros, mounted.
pub(crate) fn blank(len: u64) -> FuseDisk {
    FuseDisk::mount(Pages::zeroed(len))
}

/// A disk with the contents of a file, mounted.
pub(crate) fn copy_of(file: &Path) -> FuseDisk {
    FuseDisk::mount(Pages::of(&std::fs::read(file).expect("a readable file")))
}
