//! The io_uring engine: usually one system call per batch, one for each write that is tried without the ring
//! (`nowait.rs`), and none to check for completions.
//!
//! Each operation has an entry in a slab for as long as the kernel may access its memory; the index of the entry is the
//! operation's user data. The submission queue never overflows: it has a slot for each outstanding operation, and each
//! operation is queued at most once.
//!
//! IORING_SETUP_DEFER_TASKRUN is not used, because it gains nothing: reads from the page cache are complete when the
//! submit returns. In a benchmark of the engine alone, 32 reads of 4 KiB per submit reach 673,000 reads a second at
//! 1.34 us of processor time each with this setup, 663,000 at 1.39 us with DEFER_TASKRUN, and 738,000 at 1.29 us with
//! preadv(2) (`benches/serve`, interleaved, busy machine with two processors). One call per read would thus be as fast
//! as a ring, but a read that waits for the disk would delay its queue. Faster than both is no call at all, which is
//! possible for data in the page cache (`pagecache/reader.rs`).
#![allow(unsafe_code)]

mod nowait;
mod sqe;

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::IoUring;

use self::nowait::NowaitWrites;
use self::sqe::{create_ring, submission_entry};
use super::backend::File;
use super::engine::{Engine, PageCache};
use super::host::file::HostFile;
use super::op::{Completion, FILE_SLOTS, FileSlot, Op};
use super::pagecache::reader::PageCacheReader;
use super::transfer::{Transfer, TransferState};

/// Flag of io_uring_enter(2): runs pending work of this thread, and waits for the given number of completions.
const ENTER_GETEVENTS: u32 = 1;

/// Maximum number of consecutive calls that the kernel may refuse for lack of memory.
const MAX_REFUSALS: u32 = 1000;

/// Engine that uses io_uring.
///
/// On Linux 6.0 and later, the ring belongs to one thread: the first one that submits an operation, by `submit` or
/// `wait`. The ring is created disabled, and this first submission enables it. Any thread may register
/// files before that, and only the owner may afterwards.
pub struct UringEngine {
    ring: IoUring,
    entries: Vec<SlabEntry>,
    free: Vec<u32>,
    nowait: NowaitWrites,
    /// Entries of writes that are tried without the ring first.
    nowait_writes: Vec<u32>,
    /// Completions that `wait` found, and those of writes without the ring.
    completed: Vec<Completion>,
    /// Entries whose transfer was short.
    unfinished: Vec<u32>,
    /// Number of entries in the submission queue that the kernel has not taken.
    queued: u32,
    /// Number of operations that the kernel has taken.
    in_flight: usize,
    enabled: bool,
    calls: u64,
}

#[derive(Default)]
struct SlabEntry {
    op: Option<Op>,
    transfer: Transfer,
}

// SAFETY: the iovecs in `entries` point to bytes of payloads that `entries` owns. The bytes are heap memory, or guest
// memory that the owner in the payload keeps mapped. (Iovecs of a completed operation may remain in its `transfer`;
// `Transfer::next_buffers` clears them before it uses the list again.) Neither this memory nor the ring's mappings are
// tied to a thread.
// If the kernel ties the ring to a thread, it rejects calls of other threads with an error. All methods that access the
// ring take `&mut self`, except `wake_fd`, which only reads the descriptor's number.
unsafe impl Send for UringEngine {}

impl UringEngine {
    /// Creates a ring for at most `depth` outstanding operations.
    ///
    /// # Errors
    /// If the kernel has no io_uring, forbids it, or has no memory for it.
    pub fn new(depth: usize) -> io::Result<UringEngine> {
        assert!(depth > 0, "an engine takes at least one operation");
        let numbers = u32::try_from(depth).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = numbers.checked_next_power_of_two().ok_or(io::ErrorKind::InvalidInput)?;
        let (ring, enabled) = create_ring(count)?;
        Ok(UringEngine {
            ring,
            entries: (0..depth).map(|_| SlabEntry::default()).collect(),
            // The lowest numbers are used first, so that a few entries of the slab stay in the processor's caches.
            free: (0..numbers).rev().collect(),
            nowait: NowaitWrites::new(),
            nowait_writes: Vec::with_capacity(depth),
            completed: Vec::with_capacity(depth),
            unfinished: Vec::with_capacity(depth),
            queued: 0,
            in_flight: 0,
            enabled,
            calls: 0,
        })
    }

    /// Adds the next call of a slab entry's operation to the submission queue.
    fn enqueue(&mut self, number: u32) {
        let entry = &mut self.entries[number as usize];
        let op = entry.op.as_mut().expect("a queued entry has an operation");
        let sqe = submission_entry(op, &mut entry.transfer).user_data(u64::from(number));
        // SAFETY: the entry refers to the payload's bytes, and to arrays of iovecs in the payload or in `transfer`. The
        // arrays and the bytes of a `Buffer` are heap memory that does not move. By the contract of
        // `GuestIovecs::push`, guest memory stays mapped while the payload holds its owner. The slab keeps the payload
        // and `transfer` until the kernel has completed the entry. Drop waits for the completions, or leaks the slab.
        // While the slab has the operation, no reference to the payload's bytes exists.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        assert!(pushed.is_ok(), "the submission queue has a slot for each outstanding operation");
        self.queued += 1;
    }

    /// Makes one io_uring_enter call: submits the queue, runs pending work, and waits for `at_least` completions.
    fn enter(&mut self, at_least: u32) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        let mut refusals = 0;
        loop {
            self.calls += 1;
            // SAFETY: the call has no argument structure. The kernel accesses only the payloads and iovecs to which the
            // submitted entries refer. By the proof in `enqueue`, they stay in place and mapped until the kernel has
            // completed the entry.
            let taken =
                unsafe { self.ring.submitter().enter::<libc::sigset_t>(self.queued, at_least, ENTER_GETEVENTS, None) };
            match taken {
                Ok(taken) => {
                    let taken = u32::try_from(taken).expect("the kernel takes no more than it was given");
                    self.queued = self.queued.checked_sub(taken).expect("the kernel takes no more than it was given");
                    self.in_flight += taken as usize;
                    if self.queued == 0 || self.in_flight > 0 {
                        // The rest is submitted by the next call, which happens at the latest when an operation in
                        // flight completes.
                        return Ok(());
                    }
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => continue,
                // The kernel has no memory for requests, or completions must be reaped first.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    if self.in_flight > 0 {
                        return Ok(());
                    }
                    if refusals >= MAX_REFUSALS {
                        return Err(e);
                    }
                }
                Err(e) => return Err(e),
            }
            refusals += 1;
            if refusals > MAX_REFUSALS {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            std::thread::yield_now();
        }
    }

    /// Takes completions from the completion queue, without a system call. Short transfers are queued again.
    fn drain_completions(&mut self, out: &mut Vec<Completion>) {
        for cqe in self.ring.completion() {
            self.in_flight -= 1;
            let number = u32::try_from(cqe.user_data()).expect("the kernel returns the user data of an entry");
            let entry = &mut self.entries[number as usize];
            let op = entry.op.as_ref().expect("a completion belongs to an operation in flight");
            match entry.transfer.advance(op, cqe.result()) {
                TransferState::Continue => self.unfinished.push(number),
                TransferState::Finished(result) => {
                    let op = entry.op.take().expect("checked above");
                    self.free.push(number);
                    out.push(Completion { op, result });
                }
            }
        }
        while let Some(number) = self.unfinished.pop() {
            self.enqueue(number);
        }
    }

    /// Makes the writes in `nowait_writes`. A write that would wait, or is short, is queued in the ring.
    #[inline]
    fn write_nowait(&mut self) {
        if self.nowait_writes.is_empty() {
            return;
        }
        let mut writes = mem::take(&mut self.nowait_writes);
        for number in writes.drain(..) {
            let entry = &mut self.entries[number as usize];
            let op = entry.op.as_mut().expect("an entry in use has an operation");
            self.calls += 1;
            let returned = self.nowait.write(op, &mut entry.transfer);
            match returned.map(|returned| entry.transfer.advance(op, returned)) {
                None | Some(TransferState::Continue) => self.enqueue(number),
                Some(TransferState::Finished(result)) => {
                    let op = entry.op.take().expect("checked above");
                    self.free.push(number);
                    self.completed.push(Completion { op, result });
                }
            }
        }
        self.nowait_writes = writes;
    }

    fn update_file(&mut self, slot: FileSlot, fd: RawFd) -> io::Result<()> {
        if slot.0 >= FILE_SLOTS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.ring.submitter().register_files_update(u32::from(slot.0), &[fd]).map(drop)
    }
}

impl Engine for UringEngine {
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        // The ring's file table refers to the open file description. So the locks of the file last as long as any
        // operation in flight, even if this process is killed. The next process waits for the end of these locks
        // (`host/file.rs`, the fence).
        self.update_file(slot, HostFile::of(file)?.as_raw_fd())?;
        self.nowait.register(slot, file)
    }

    fn unregister(&mut self, slot: FileSlot) -> io::Result<()> {
        self.nowait.unregister(slot);
        self.update_file(slot, -1)
    }

    fn page_cache(&self) -> Option<Box<dyn PageCache>> {
        Some(Box::new(PageCacheReader::new()?))
    }

    fn push(&mut self, op: Op) -> Result<(), Op> {
        if self.outstanding() == self.depth() {
            return Err(op);
        }
        let number = self.free.pop().expect("there is an entry for each outstanding operation");
        let entry = &mut self.entries[number as usize];
        entry.transfer.reset();
        let nowait = self.nowait.accepts(&op);
        entry.op = Some(op);
        if nowait {
            self.nowait_writes.push(number)
        } else {
            self.enqueue(number)
        }
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.queued > 0 {
            // The queued operations are submitted first, so that the kernel carries them out during the writes below.
            self.enter(0)?;
        }
        self.write_nowait();
        if self.queued == 0 { Ok(()) } else { self.enter(0) }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        if self.outstanding() == 0 {
            return; // the usual case if the guest's reads are all in the page cache
        }
        if self.enabled {
            self.write_nowait();
        }
        out.append(&mut self.completed);
        self.drain_completions(out);
        // A call is needed if the kernel has completions that only this thread can finish, or if short transfers were
        // queued again. The error is ignored, because the next `submit` fails as well.
        let pending = self.ring.submission().taskrun();
        if (pending || self.queued > 0 && self.enabled) && self.enter(0).is_ok() {
            self.drain_completions(out);
        }
        // A transfer of many iovecs takes several calls. The next of them must not remain in the submission queue: no
        // event would wake this thread for it.
        while self.queued > 0 && self.enabled {
            let before = self.queued;
            if self.enter(0).is_err() || self.queued == before {
                break; // the next `submit`, or a completion, continues
            }
            self.drain_completions(out);
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut completed = mem::take(&mut self.completed);
        let result = loop {
            self.write_nowait();
            completed.append(&mut self.completed);
            self.drain_completions(&mut completed);
            if !completed.is_empty() || self.in_flight == 0 && self.queued == 0 {
                break self.submit();
            }
            if let Err(e) = self.enter(1) {
                break Err(e);
            }
        };
        self.completed = completed;
        result
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's descriptor is open as long as the ring, which the returned value borrows.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }

    fn outstanding(&self) -> usize {
        self.entries.len() - self.free.len() + self.completed.len()
    }

    fn depth(&self) -> usize {
        self.entries.len()
    }

    fn system_calls(&self) -> u64 {
        self.calls
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // The queued operations were never submitted, so the kernel does not access their memory.
        self.queued = 0;
        while self.in_flight > 0 {
            if let Err(e) = self.enter(1) {
                // The kernel may still access the memory of the operations in flight, so the memory is leaked.
                log::error!(
                    "cannot wait for {} operations in flight: {e}. Their memory is never freed",
                    self.in_flight
                );
                mem::forget(mem::take(&mut self.entries));
                return;
            }
            while self.ring.completion().next().is_some() {
                self.in_flight -= 1;
            }
        }
        // The kernel destroys a closed ring later, in a kernel thread. Until then the ring's table holds the files and
        // their locks, and the next process would find them busy. Only the thread that owns the ring can empty the
        // table; if another thread drops the ring, the files are released when the kernel destroys it.
        if let Err(e) = self.ring.submitter().register_files_update(0, &[-1; FILE_SLOTS as usize]) {
            log::debug!("the kernel releases the files of a ring later: {e}");
        }
    }
}
