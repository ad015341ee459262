//! Edge-triggered epoll, which reports each write to an eventfd although the eventfd is never read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// Origin of an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WakeSource {
    /// Another thread of the daemon, or the kernel.
    Internal,
    /// The kick eventfd of the queue.
    Kick,
}

/// An epoll instance that reports readability, edge-triggered.
pub(super) struct Epoll(RawFd);

impl Epoll {
    pub(super) fn new() -> io::Result<Epoll> {
        epoll::create(true).map(Epoll)
    }

    /// Adds `fd`. The kernel removes `fd` from the instance when the last descriptor of its open file is closed.
    pub(super) fn add(&self, fd: BorrowedFd<'_>, source: WakeSource) -> io::Result<()> {
        let event = epoll::Event::new(epoll::Events::EPOLLIN | epoll::Events::EPOLLET, source as u64);
        epoll::ctl(self.0, epoll::ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    pub(super) fn remove(&self, fd: BorrowedFd<'_>) {
        let none = epoll::Event::new(epoll::Events::empty(), 0);
        // The error is ignored, since the kick of a broken ring was removed already.
        let _ = epoll::ctl(self.0, epoll::ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), none);
    }

    /// Waits for an event, for at most `at_most`. May return earlier without an event. Returns whether one of the
    /// events was a kick.
    pub(super) fn wait(&self, at_most: Duration) -> bool {
        let at_most = i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX);
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
        match epoll::wait(self.0, at_most, &mut events) {
            Ok(count) => events[..count].iter().any(|event| event.data == WakeSource::Kick as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => false,
            Err(e) => panic!("epoll_wait failed: {e}"),
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

    /// The event loop of a queue depends on this property of the kernel.
    #[test]
    fn each_write_to_an_eventfd_is_one_event() {
        let notifier = Notifier::new().unwrap();
        let epoll = Epoll::new().unwrap();
        notifier.notify();
        epoll.add(notifier.as_fd(), WakeSource::Kick).unwrap();
        let count_events = |epoll: &Epoll| {
            let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 8];
            epoll::wait(epoll.0, 0, &mut events).unwrap()
        };
        assert_eq!(count_events(&epoll), 1, "written before it was added");
        assert_eq!(count_events(&epoll), 0, "an edge is reported once");
        for _ in 0..3 {
            notifier.notify();
            assert_eq!(count_events(&epoll), 1);
        }
        notifier.notify();
        assert!(epoll.wait(Duration::ZERO) && !epoll.wait(Duration::ZERO));
        epoll.remove(notifier.as_fd());
        notifier.notify();
        assert_eq!(count_events(&epoll), 0);
    }
}
