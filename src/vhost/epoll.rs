//! Waiting for edges: an event counter reports each write to it without ever being read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// What a descriptor stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WakeSource {
    /// The daemon's own threads and the kernel.
    Internal,
    /// The guest's kick.
    Kick,
}

/// An epoll instance of edge-triggered reading.
pub(super) struct Epoll(RawFd);

impl Epoll {
    pub(super) fn new() -> io::Result<Epoll> {
        epoll::create(true).map(Epoll)
    }

    /// Waits for `fd`, too. Descriptors that are closed leave by themselves.
    pub(super) fn add(&self, fd: BorrowedFd<'_>, source: WakeSource) -> io::Result<()> {
        let event = epoll::Event::new(epoll::Events::EPOLLIN | epoll::Events::EPOLLET, source as u64);
        epoll::ctl(self.0, epoll::ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    pub(super) fn remove(&self, fd: BorrowedFd<'_>) {
        let none = epoll::Event::new(epoll::Events::empty(), 0);
        // It may be gone already: a broken ring's kick is removed when it breaks.
        let _ = epoll::ctl(self.0, epoll::ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), none);
    }

    /// Returns when something happened, when the time is over, or for no reason; true if there was a kick.
    pub(super) fn wait(&self, at_most: Duration) -> bool {
        let at_most = i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX);
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
        match epoll::wait(self.0, at_most, &mut events) {
            Ok(count) => events[..count].iter().any(|event| event.data == WakeSource::Kick as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => false,
            Err(e) => panic!("a queue's own epoll instance fails: {e}"),
        }
    }
}

impl Drop for Epoll {
    fn drop(&mut self) {
        let _ = epoll::close(self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::storage::Notifier;

    /// The rule the workers' loop stands on: every write to an event counter is one event, though nobody reads the counter.
    #[test]
    fn each_ring_of_the_bell_is_one_event() {
        let bell = Notifier::new().unwrap();
        let epoll = Epoll::new().unwrap();
        bell.notify();
        epoll.add(bell.as_fd(), WakeSource::Kick).unwrap();
        let happened = |epoll: &Epoll| {
            let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
            epoll::wait(epoll.0, 0, &mut events).unwrap()
        };
        assert_eq!(happened(&epoll), 1, "rung before it was added");
        assert_eq!(happened(&epoll), 0, "an edge is told once");
        for _ in 0..3 {
            bell.notify();
            assert_eq!(happened(&epoll), 1);
        }
        bell.notify();
        assert!(epoll.wait(Duration::ZERO) && !epoll.wait(Duration::ZERO));
        epoll.remove(bell.as_fd());
        bell.notify();
        assert_eq!(happened(&epoll), 0);
    }
}
