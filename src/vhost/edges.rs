//! Waiting for edges: an event counter reports each write to it without ever being read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// An epoll instance of edge-triggered reading.
pub(super) struct Epoll(RawFd);

impl Epoll {
    pub(super) fn new() -> io::Result<Epoll> {
        epoll::create(true).map(Epoll)
    }

    /// Waits for `fd`, too. Descriptors that are closed leave by themselves.
    pub(super) fn add(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let event = epoll::Event::new(epoll::Events::EPOLLIN | epoll::Events::EPOLLET, 0);
        epoll::ctl(self.0, epoll::ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    pub(super) fn remove(&self, fd: BorrowedFd<'_>) {
        let none = epoll::Event::new(epoll::Events::empty(), 0);
        // It may be gone already: a broken ring's kick is removed when it breaks.
        let _ = epoll::ctl(self.0, epoll::ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), none);
    }

    /// Returns when something happened, when the time is over, or for no reason.
    pub(super) fn wait(&self, at_most: Duration) {
        let at_most = i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX);
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
        if let Err(e) = epoll::wait(self.0, at_most, &mut events)
            && e.kind() != io::ErrorKind::Interrupted
        {
            panic!("a queue's own epoll instance fails: {e}");
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

    use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

    use super::*;

    /// The rule the workers' loop stands on: every write to an event counter is one event, though nobody reads the counter.
    #[test]
    fn each_ring_of_the_bell_is_one_event() {
        let (end, bell) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
        let epoll = Epoll::new().unwrap();
        bell.notify().unwrap();
        epoll.add(end.as_fd()).unwrap();
        let happened = |epoll: &Epoll| {
            let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
            epoll::wait(epoll.0, 0, &mut events).unwrap()
        };
        assert_eq!(happened(&epoll), 1, "rung before it was added");
        assert_eq!(happened(&epoll), 0, "an edge is told once");
        for _ in 0..3 {
            bell.notify().unwrap();
            assert_eq!(happened(&epoll), 1);
        }
        epoll.remove(end.as_fd());
        bell.notify().unwrap();
        assert_eq!(happened(&epoll), 0);
    }
}
