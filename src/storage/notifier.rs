//! A bell between threads: an eventfd that one rings and the other polls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::error::{Error, Result};

/// Readable from the first ring until it is silenced.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// A silent bell.
    ///
    /// # Errors
    /// Where the host has no descriptor left.
    pub fn new() -> Result<Notifier> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Notifier(fd.map_err(|e| Error::io("cannot make an eventfd", e.into()))?))
    }

    /// Rings. A counter that is full rings already.
    pub fn notify(&self) {
        while rustix::io::write(&self.0, 1u64.as_bytes()) == Err(Errno::INTR) {}
    }

    /// Stops ringing.
    pub fn drain(&self) {
        let mut count = [0; 8];
        while rustix::io::read(&self.0, &mut count) == Err(Errno::INTR) {}
    }

    /// Waits until it rings (or a signal comes).
    pub fn wait(&self) {
        let _ = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None);
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
