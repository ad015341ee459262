//! Cache of the sector bitmaps of a writable image, one bitmap sector at a time.
//!
//! ```text
//!   bitmaps     look up, mark, insert, pin
//!   clock       frames, and which of them is evicted
//!   entry       a word per bitmap sector: absent, full, or in a frame
//!   frame       the bits of one bitmap sector, with a lock, and reads without a lock
//! ```

pub mod bitmaps;
mod clock;
mod entry;
pub(super) mod frame;
