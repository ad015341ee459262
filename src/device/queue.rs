//! One virtqueue in service.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{Device, Memory, Vring};
use crate::disk::Lane;
use crate::error::Result;

/// What is to be done after a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Nothing: wait for a kick or a wake fd.
    Idle,
    /// There is work left: come again (V17).
    More,
    /// The ring is broken: nothing is popped any more, only what is in flight completes.
    Broken,
}

/// One virtqueue in service, owned by the thread that serves it.
pub struct Queue {
    #[allow(dead_code)]
    device: Arc<Device>,
    lane: Lane,
    #[allow(dead_code)]
    index: usize,
}

impl Queue {
    /// A queue of `device`, not started.
    pub fn new(device: Arc<Device>, lane: Lane, index: usize) -> Queue {
        Queue { device, lane, index }
    }

    /// Begins to serve what `vring` says, in `memory`.
    ///
    /// # Errors
    /// `Invalid` where the ring breaks V1.
    pub fn start(&mut self, _vring: &Vring, _memory: Arc<Memory>) -> Result<()> {
        unimplemented!()
    }

    /// One turn.
    ///
    /// # Errors
    /// Where the lane's engine fails.
    pub fn serve(&mut self, _vring: &Vring) -> io::Result<Turn> {
        unimplemented!()
    }

    /// Completes what is in flight and ends the service; gives the next index of the avail ring.
    ///
    /// # Errors
    /// Where the lane's engine fails.
    pub fn stop(&mut self, _vring: &Vring) -> io::Result<u16> {
        unimplemented!()
    }

    /// What to wait for beside the kick.
    pub fn wake_fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.lane.wake_fd(), Some(self.lane.bell_fd())]
    }

    /// The lane.
    pub fn lane(&mut self) -> &mut Lane {
        &mut self.lane
    }
}
