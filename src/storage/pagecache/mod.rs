//! Reads from the page cache without system calls.
//!
//! A read whose pages are all resident in the page cache is a copy from a mapped file. An engine creates the object
//! that makes such copies ([`Engine::page_cache`](super::Engine::page_cache)); [`reader`] implements it. Every other
//! read is an operation of the engine.
//!
//! ```text
//!   reader         one per lane on io_uring: finds, copies, measures batches, backs off after waiting for the disk
//!   map_cache      the regions that the reader used last
//!   file_map       one per open file: mapped regions of 256 MiB, one residency bit per page
//!   copy_nofault   the copy, which returns false if a page is unavailable
//!   range          the range that the two methods exchange
//! ```
//!
//! Invariants; `docs/page-cache.md` has the reasons:
//!
//! 1. A mapping shows exactly what system calls read and write: only file systems with that guarantee are mapped.
//! 2. Residency is a hint. A copy may wait for the disk; the reader notices, clears the bits and backs off.
//! 3. An unavailable page ends the copy, not the process. The read is then repeated as an operation, which reports the
//!    error.
//! 4. No reference to shared memory exists: file pages and guest memory are accessed by raw pointers.
//! 5. A region stays mapped while a copy uses it: the map cache or the registered file keeps it.
//! 6. A copy never exceeds the length that the file had when the region was last queried.
//! 7. Residency is used only for files for which the kernel reports it.
//! 8. A write that completed before a read was submitted is in the page cache, so the copy contains it.

mod copy_nofault;
pub(super) mod file_map;
mod map_cache;
pub(super) mod range;
pub(super) mod reader;
