//! Reads of what the host has in memory, made by a copy in place of a system call.
//!
//! A small read from the page cache is mostly the way into the kernel and back: 4 KiB take 1.1 to 1.4 us by preadv(2), and
//! 0.5 to 0.6 us by a copy from the mapped file (Linux 6.18 on AMD EPYC with its mitigations; 512 MiB in the page cache). So
//! files are mapped, and what is known to be in memory (`host/mapped.rs`) is copied; all else goes through the ring.
//!
//! A page may have left memory since it was known to be there. Then the copy waits for the disk, and with it the queue. It
//! is noticed: a batch that took long, while the kernel says that this thread waited for a page, has its pages forgotten,
//! and for a hundred times as long nothing is copied, so that waiting takes a hundredth of the time at most.
//! A page that cannot be had (a cut file, a failing disk) ends the copy; the ring then finds out why.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::copy;
use super::engine::{SLOTS, host_file};
use super::env::File;
use super::host::{HostFile, Place};
use super::op::{Action, Op, Slot};
use super::payload::Payload;

/// Most bytes of a read that is copied: of longer ones the way into the kernel is a small part.
const MOST: usize = 16 << 10;
/// Places to ask the kernel about, at most, after a batch.
const QUESTIONS: usize = 4;
/// A batch of copies takes less, and each of them; what takes longer may have waited.
const LONG: Duration = Duration::from_micros(20);
const LONG_EACH: Duration = Duration::from_micros(2);
/// For so many times as long as it waited nothing is copied.
const RECOVERY: u32 = 100;

/// The files of a ring that may be copied from.
pub(super) struct Warm {
    files: Vec<Option<HostFile>>,
    questions: Vec<(Slot, u64)>,
    /// Until when nothing is copied.
    held: Option<Instant>,
    /// Pages this thread has waited for so far.
    waits: i64,
}

impl Warm {
    pub(super) fn new() -> Warm {
        Warm {
            files: (0..SLOTS).map(|_| None).collect(),
            questions: Vec::with_capacity(QUESTIONS),
            held: None,
            waits: i64::MAX,
        }
    }

    /// Notes a file that the ring got; direct ones are to leave the host's memory alone.
    pub(super) fn register(&mut self, slot: Slot, file: &File) -> io::Result<()> {
        let entry = self.files.get_mut(usize::from(slot.0)).ok_or(io::ErrorKind::InvalidInput)?;
        let file = host_file(file)?;
        *entry = (!file.is_direct() && copy::is_ready()).then(|| file.clone());
        Ok(())
    }

    pub(super) fn unregister(&mut self, slot: Slot) {
        if let Some(entry) = self.files.get_mut(usize::from(slot.0)) {
            *entry = None;
        }
        self.questions.retain(|(of, _)| *of != slot);
    }

    /// Where in memory the bytes are that an operation wants, if they can be copied.
    #[inline]
    pub(super) fn find(&mut self, op: &Op) -> Option<NonNull<u8>> {
        let len = op.payload.len();
        if op.action != Action::Read || len > MOST {
            return None;
        }
        let file = self.files.get(usize::from(op.slot.0))?.as_ref()?;
        match file.mapped().place(op.offset, len) {
            Place::Here(start) => {
                self.held = self.held.filter(|until| Instant::now() < *until);
                self.held.is_none().then_some(start)
            }
            Place::Ask => {
                if self.questions.len() < QUESTIONS {
                    self.questions.push((op.slot, op.offset));
                }
                None
            }
            Place::Unknown => None,
        }
    }

    /// Fills the operation's memory with the bytes at `from`, where `find` found them; false where that failed.
    pub(super) fn fill(&self, op: &mut Op, from: NonNull<u8>) -> bool {
        let mut from = from.as_ptr().cast_const();
        let mut piece = |to: *mut u8, len: usize| {
            // SAFETY: the file keeps its regions mapped, and `files` keeps the file: an operation is over before its slot is
            // given to another. The other side is the operation's own memory, to which nobody has a reference.
            let whole = unsafe { copy::copy(from, to, len) };
            from = from.wrapping_add(len);
            whole
        };
        match &mut op.payload {
            Payload::None => false,
            Payload::Own(buffer) => piece(buffer.as_mut_ptr(), buffer.len()),
            Payload::Guest(slices) => slices.iovecs().iter().all(|run| piece(run.iov_base.cast(), run.iov_len)),
        }
    }

    /// To be called after a batch of copies, with how long they took.
    pub(super) fn judge<'a>(&mut self, took: Duration, copied: impl ExactSizeIterator<Item = &'a Op>) {
        let count = u32::try_from(copied.len()).unwrap_or(u32::MAX);
        if took <= LONG + LONG_EACH * count {
            return;
        }
        let before = std::mem::replace(&mut self.waits, waits());
        if self.waits <= before {
            return; // or nothing to compare with yet
        }
        for op in copied {
            if let Some(Some(file)) = self.files.get(usize::from(op.slot.0)) {
                file.mapped().forget(op.offset, op.payload.len());
            }
        }
        self.held = Some(Instant::now() + took * RECOVERY);
    }

    /// Asks the kernel what it has in memory, where that is worth it. To be called when nobody waits for an answer.
    pub(super) fn ask(&mut self) {
        for (slot, offset) in self.questions.drain(..) {
            if let Some(Some(file)) = self.files.get(usize::from(slot.0)) {
                file.mapped().ask(file, offset, || file.stat().ok().map(|stat| stat.len));
            }
        }
    }
}

/// Pages that this thread has waited for.
fn waits() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills in what it is given; zeros are a value, too.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_majflt
    }
}

#[cfg(test)]
#[path = "warm_tests.rs"]
mod tests;
