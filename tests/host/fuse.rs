//! A disk that logs its requests, delays them, and fails them: a FUSE file system with one file, served by this
//! process.
//!
//! The file's bytes are in memory. Every write, sync, punch and zeroing that succeeds is logged, in the order in which
//! they take effect. A loop device on the file makes it the medium of a kernel file system.
//!
//! The test process itself must not access files below the mount point: if the process were killed during such an
//! access, it would wait for an answer that only it could give. Programs started by the test may access these files.

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

/// A change of the file, or a sync.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write { offset: u64, data: Arc<[u8]> },
    Zero { offset: u64, len: u64 },
    Sync,
}

/// An event, and the time when it took effect.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) event: Event,
    pub(crate) done: Instant,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Notified when a write or a delayed read arrives, and when a change or a sync takes effect.
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
    /// Data of the writes that have not taken effect yet.
    held_writes: Vec<Arc<[u8]>>,
    /// Number of delayed reads, and the time when the last one was answered.
    held_reads: usize,
    last_late_read: Option<Instant>,
    /// Arrival times of reads, writes, syncs, allocations, punches and zeroings.
    arrivals: Vec<Instant>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread of the disk panics")
    }
}

/// The mounted disk. Dropping this value unmounts the file system.
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

    /// Returns the path of the file.
    pub(crate) fn path(&self) -> PathBuf {
        self.mount_point.path().join(NAME)
    }

    /// Returns the number of logged events. A request's events are logged before it completes.
    pub(crate) fn position(&self) -> usize {
        self.shared.state().log.len()
    }

    /// Clears the log and returns the current contents.
    pub(crate) fn start_log(&self) -> Pages {
        let mut state = self.shared.state();
        state.log.clear();
        state.pages.clone()
    }

    /// Returns the log.
    pub(crate) fn log(&self) -> Vec<Entry> {
        self.shared.state().log.clone()
    }

    /// Returns the current contents.
    pub(crate) fn contents(&self) -> Pages {
        self.shared.state().pages.clone()
    }

    /// Delays the effect and the answer of writes, punches and syncs that arrive from now on.
    pub(crate) fn set_delay(&self, delay: Duration) {
        self.shared.delay_ms.store(millis(delay), Ordering::SeqCst);
    }

    /// Delays the answer of reads that arrive from now on.
    pub(crate) fn set_read_delay(&self, delay: Duration) {
        self.shared.read_delay_ms.store(millis(delay), Ordering::SeqCst);
    }

    /// Sets whether writes, allocations, punches and zeroings fail with EIO and have no effect.
    pub(crate) fn fail_writes(&self, on: bool) {
        self.shared.fail_writes.store(on, Ordering::SeqCst);
    }

    /// Sets whether syncs fail with EIO.
    pub(crate) fn fail_syncs(&self, on: bool) {
        self.shared.fail_syncs.store(on, Ordering::SeqCst);
    }

    /// Returns the number of requests that were made to fail.
    pub(crate) fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::SeqCst)
    }

    /// Returns the arrival time of the first request after `moment`.
    pub(crate) fn first_arrival_after(&self, moment: Instant) -> Option<Instant> {
        self.shared.state().arrivals.iter().copied().filter(|at| *at > moment).min()
    }

    /// Waits until a write that contains `needle` has arrived and is delayed.
    pub(crate) fn wait_for_held_write(&self, needle: &[u8]) {
        self.wait("the write to arrive", |state| state.held_writes.iter().any(|data| contains(data, needle)));
    }

    /// Waits until a read has arrived and is delayed.
    pub(crate) fn wait_for_held_read(&self) {
        self.wait("a read to arrive", |state| state.held_reads > 0);
    }

    /// Returns the time when the last delayed read was answered, or `None` while a read is delayed or if no read was
    /// delayed.
    pub(crate) fn held_reads_done_at(&self) -> Option<Instant> {
        let state = self.shared.state();
        state.last_late_read.filter(|_| state.held_reads == 0)
    }

    /// Waits until no write is delayed.
    pub(crate) fn wait_until_applied(&self) {
        self.wait("the held writes to land", |state| state.held_writes.is_empty());
    }

    fn wait(&self, what: &str, until: impl Fn(&State) -> bool) {
        let timeout = Duration::from_secs(60);
        let (_state, waited) = self
            .shared
            .applied
            .wait_timeout_while(self.shared.state(), timeout, |state| !until(state))
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
            // Programs of a failed test may still use the file system. A forced unmount makes their I/O fail, so that
            // they end.
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

/// Returns whether `data` contains `needle`.
pub(crate) fn contains(data: &[u8], needle: &[u8]) -> bool {
    data.windows(needle.len()).any(|window| window == needle)
}

struct Server(Arc<Shared>);

impl Server {
    /// Applies an event, now or after the delay, then calls `answer`.
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
            // Space is always available.
            0 => reply.ok(),
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => {
                self.apply(Event::Zero { offset, len }, move || reply.ok());
            }
            _ => reply.error(Errno::EOPNOTSUPP),
        }
    }
}

/// Mounts a disk of `len` zeros.
pub(crate) fn blank(len: u64) -> FuseDisk {
    FuseDisk::mount(Pages::zeroed(len))
}

/// Mounts a disk with the contents of a file.
pub(crate) fn copy_of(file: &Path) -> FuseDisk {
    FuseDisk::mount(Pages::of(&std::fs::read(file).expect("a readable file")))
}
