//! Wakes a thread by an eventfd, which one thread writes and another one polls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::error::{Error, Result};

/// Eventfd that becomes readable with [`Notifier::notify`], and stays so until [`Notifier::drain`].
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// Creates a notifier that is not readable.
    ///
    /// # Errors
    /// `Io` if no descriptor is available.
    pub fn new() -> Result<Notifier> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Notifier(fd.map_err(|e| Error::io("cannot create an eventfd", e.into()))?))
    }

    /// Makes the descriptor readable. The write fails only if the counter is full, and the descriptor is readable then.
    pub fn notify(&self) {
        while rustix::io::write(&self.0, 1u64.as_bytes()) == Err(Errno::INTR) {}
    }

    /// Makes the descriptor not readable.
    pub fn drain(&self) {
        let mut count = [0; 8];
        while rustix::io::read(&self.0, &mut count) == Err(Errno::INTR) {}
    }

    /// Waits until the descriptor is readable, or a signal arrives.
    pub fn wait(&self) {
        let _ = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None);
    }

    /// Waits as [`Notifier::wait`] does, but at most for `at_most`.
    pub fn wait_at_most(&self, at_most: Duration) {
        let timeout = Timespec::try_from(at_most).ok();
        let _ = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout.as_ref());
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
