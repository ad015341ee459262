//! The engine over io_uring: one call for a whole batch, none to look whether something is complete.
//!
//! Every operation has an entry in a slab for as long as the kernel may touch its memory; its number is the
//! operation's user data. Submission entries never run out, since there are as many as operations under way may be and
//! each of those waits in the queue at most once.
//!
//! DEFER_TASKRUN is left out, and not missed: reads that the page cache answers are complete when the submit returns.
//! Without a server around them, 32 reads of 4 KiB in a submit: 673,000 reads a second and 1.34 us of processor each as
//! set up here, 663,000 and 1.39 us with DEFER_TASKRUN; preadv(2), 738,000 and 1.29 us (`benches/serve`, interleaved, a
//! busy machine of two processors). So a call for each read would be no slower than a ring; where a read has to wait for
//! the disk, it would hold up its queue. What is faster than both, where the bytes are in memory, is no call (`reader.rs`).
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::IoUring;

use super::engine::{Engine, FILE_SLOTS, host_file};
use super::env::File;
use super::nowait::NowaitWrites;
use super::op::{Completion, FileSlot, Op};
use super::payload::GuestIovecs;
use super::reader::{CachedRange, PageCacheReader};
use super::sqe::{create_ring, submission_entry};
use super::transfer::{Transfer, TransferState};

/// io_uring_enter(2): run what is pending for this thread, and wait for as many completions as asked.
const ENTER_GETEVENTS: u32 = 1;

/// Calls in a row that the kernel may refuse for want of memory.
const MAX_REFUSALS: u32 = 1000;

/// See the file's first line.
///
/// Where the kernel can (Linux 6.0), the ring belongs to one thread: the one that calls `submit`, `wait`, or `reap`
/// first, since it is made disabled and enabled then. Files may be registered by any thread before that, and only by
/// the owner afterwards.
pub struct UringEngine {
    ring: IoUring,
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// Writes that are tried without the ring first, as numbers of entries.
    inline: NowaitWrites,
    writes: Vec<u32>,
    warm: PageCacheReader,
    /// Completions that `wait` found, and those of such writes.
    over: Vec<Completion>,
    /// Entries whose transfer was short.
    again: Vec<u32>,
    /// Entries in the submission queue that the kernel has not taken.
    queued: u32,
    /// Operations the kernel has.
    flying: usize,
    enabled: bool,
    calls: u64,
}

#[derive(Default)]
struct Entry {
    op: Option<Op>,
    progress: Transfer,
}

// SAFETY: the ring's mappings and the pointers in `entries` belong to it alone and to no thread; a ring that the kernel
// ties to a thread refuses calls from others with an error.
unsafe impl Send for UringEngine {}

impl UringEngine {
    /// A ring for at most `depth` operations at once.
    ///
    /// # Errors
    /// Where the kernel has no io_uring, forbids it, or has no memory for it.
    pub fn new(depth: usize) -> io::Result<UringEngine> {
        assert!(depth > 0, "an engine takes at least one operation");
        let numbers = u32::try_from(depth).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = numbers.checked_next_power_of_two().ok_or(io::ErrorKind::InvalidInput)?;
        let (ring, enabled) = create_ring(count)?;
        Ok(UringEngine {
            ring,
            entries: (0..depth).map(|_| Entry::default()).collect(),
            // The lowest numbers are used first: they are warm.
            free: (0..numbers).rev().collect(),
            inline: NowaitWrites::new(),
            writes: Vec::with_capacity(depth),
            warm: PageCacheReader::new(),
            over: Vec::with_capacity(depth),
            again: Vec::with_capacity(depth),
            queued: 0,
            flying: 0,
            enabled,
            calls: 0,
        })
    }

    /// Puts the entry's next call into the submission queue.
    fn queue(&mut self, number: u32) {
        let entry = &mut self.entries[number as usize];
        let op = entry.op.as_mut().expect("a queued entry has an operation");
        let sqe = submission_entry(op, &mut entry.progress).user_data(u64::from(number));
        // SAFETY: the memory the entry names is the operation's payload and the arrays of runs in payload or progress.
        // The slab keeps both, unmoved on the heap, until the completion, and nobody forms references to the bytes.
        let pushed = unsafe { self.ring.submission().push(&sqe) };
        assert!(pushed.is_ok(), "the submission queue holds as many entries as operations may be under way");
        self.queued += 1;
    }

    /// One io_uring_enter: hands over what is queued, runs what is pending, waits for `at_least` completions.
    fn enter(&mut self, at_least: u32) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        let mut refusals = 0;
        loop {
            self.calls += 1;
            // SAFETY: without an argument no memory is passed; the queue has `queued` entries, whose memory lives (see
            // `queue`).
            let taken =
                unsafe { self.ring.submitter().enter::<libc::sigset_t>(self.queued, at_least, ENTER_GETEVENTS, None) };
            match taken {
                Ok(taken) => {
                    let taken = u32::try_from(taken).expect("the kernel takes no more than it was given");
                    self.queued = self.queued.checked_sub(taken).expect("the kernel takes no more than it was given");
                    self.flying += taken as usize;
                    if self.queued == 0 || self.flying > 0 {
                        // What is left goes with the next call, which a completion of those under way brings about.
                        return Ok(());
                    }
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => continue,
                // No memory for requests, or completions to be reaped first.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    if self.flying > 0 {
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

    /// Takes completions out of their queue, without a system call; what is not whole yet is queued again.
    fn drain(&mut self, out: &mut Vec<Completion>) {
        for cqe in self.ring.completion() {
            self.flying -= 1;
            let number = u32::try_from(cqe.user_data()).expect("our own numbers come back");
            let entry = &mut self.entries[number as usize];
            let op = entry.op.as_ref().expect("a completion belongs to an operation under way");
            match entry.progress.advance(op, cqe.result()) {
                TransferState::Continue => self.again.push(number),
                TransferState::Finished(result) => {
                    let op = entry.op.take().expect("looked at above");
                    self.free.push(number);
                    out.push(Completion { op, result });
                }
            }
        }
        while let Some(number) = self.again.pop() {
            self.queue(number);
        }
    }

    /// Makes the writes that need no ring; the others are queued.
    #[inline]
    fn write_inline(&mut self) {
        if self.writes.is_empty() {
            return;
        }
        let mut writes = mem::take(&mut self.writes);
        for number in writes.drain(..) {
            let entry = &mut self.entries[number as usize];
            let op = entry.op.as_mut().expect("an entry in use has an operation");
            self.calls += 1;
            let returned = self.inline.write(op, &mut entry.progress);
            match returned.map(|returned| entry.progress.advance(op, returned)) {
                None | Some(TransferState::Continue) => self.queue(number),
                Some(TransferState::Finished(result)) => {
                    let op = entry.op.take().expect("looked at above");
                    self.free.push(number);
                    self.over.push(Completion { op, result });
                }
            }
        }
        self.writes = writes;
    }

    fn update(&mut self, slot: FileSlot, fd: RawFd) -> io::Result<()> {
        if slot.0 >= FILE_SLOTS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.ring.submitter().register_files_update(u32::from(slot.0), &[fd]).map(drop)
    }
}

impl Engine for UringEngine {
    fn register(&mut self, slot: FileSlot, file: &File) -> io::Result<()> {
        // The table holds the open description itself: locks on it live as long as any operation, even if this process
        // is killed (crash-safety 3.10, the fence).
        self.update(slot, host_file(file)?.as_raw_fd())?;
        self.warm.register(slot, file)?;
        self.inline.register(slot, file)
    }

    fn unregister(&mut self, slot: FileSlot) -> io::Result<()> {
        self.inline.unregister(slot);
        self.warm.unregister(slot);
        self.update(slot, -1)
    }

    fn push(&mut self, op: Op) -> Result<(), Op> {
        if self.outstanding() == self.depth() {
            return Err(op);
        }
        let number = self.free.pop().expect("there are as many entries as operations may be under way");
        let entry = &mut self.entries[number as usize];
        entry.progress.reset();
        let inline = self.inline.accepts(&op);
        entry.op = Some(op);
        if inline {
            self.writes.push(number)
        } else {
            self.queue(number)
        }
        Ok(())
    }

    #[inline]
    fn find_cached(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        self.warm.find(slot, offset, len)
    }

    #[inline]
    fn copy_cached(&mut self, found: &CachedRange, into: &GuestIovecs, at: usize) -> bool {
        self.warm.copy(found, into, at)
    }

    fn end_copy_batch(&mut self) {
        self.warm.end_batch();
    }

    fn query_residency(&mut self) {
        self.warm.run_queries();
    }

    fn copy_count(&self) -> u64 {
        self.warm.copies()
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.queued > 0 {
            // First what others do for us.
            self.enter(0)?;
        }
        self.write_inline();
        if self.queued == 0 { Ok(()) } else { self.enter(0) }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        if self.outstanding() == 0 {
            return; // nearly always so beside a guest that reads what is in memory
        }
        if self.enabled {
            self.write_inline();
        }
        out.append(&mut self.over);
        self.drain(out);
        // Two reasons for a call: the kernel has completions that only this thread can finish, and short transfers go on.
        // A refusal shows again, as an error, in the next `submit`.
        let pending = self.ring.submission().taskrun();
        if (pending || self.queued > 0 && self.enabled) && self.enter(0).is_ok() {
            self.drain(out);
        }
        // A transfer of very many runs takes several calls, and nothing would wake a queue for one that waits here.
        while self.queued > 0 && self.enabled {
            let before = self.queued;
            if self.enter(0).is_err() || self.queued == before {
                break; // the next `submit`, or a completion of those under way, brings it about
            }
            self.drain(out);
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut over = mem::take(&mut self.over);
        let result = loop {
            self.write_inline();
            over.append(&mut self.over);
            self.drain(&mut over);
            if !over.is_empty() || self.flying == 0 && self.queued == 0 {
                break self.submit();
            }
            if let Err(e) = self.enter(1) {
                break Err(e);
            }
        };
        self.over = over;
        result
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's fd is open as long as the ring, which is borrowed.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }

    fn outstanding(&self) -> usize {
        self.entries.len() - self.free.len() + self.over.len()
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
        // Never handed over, so nobody touches their memory: `enter` is not told of them any more.
        self.queued = 0;
        while self.flying > 0 {
            if let Err(e) = self.enter(1) {
                // The kernel may still write there.
                log::error!("{} operations cannot be waited for ({e}): their memory is kept for good", self.flying);
                mem::forget(mem::take(&mut self.entries));
                return;
            }
            while self.ring.completion().next().is_some() {
                self.flying -= 1;
            }
        }
        // The kernel takes a closed ring apart later, on a thread of its own, and until then its table holds the files
        // and their locks: who opens them next would find them busy. A thread that does not own the ring cannot empty
        // the table; then it is as late as the kernel is.
        if let Err(e) = self.ring.submitter().register_files_update(0, &[-1; FILE_SLOTS as usize]) {
            log::debug!("the files of a ring are let go of by the kernel: {e}");
        }
    }
}
