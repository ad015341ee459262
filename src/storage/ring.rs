//! The engine over io_uring.

use std::io;

use super::blocking::Blocking;

/// Stands in until the ring is there.
pub struct Ring;

impl Ring {
    /// Refuses, so that `Auto` falls back.
    pub fn new(_depth: usize) -> io::Result<Blocking> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
