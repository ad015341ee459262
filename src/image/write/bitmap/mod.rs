//! The sector bitmaps of a writable image, cached in memory one bitmap sector at a time.

pub mod bitmaps;
mod clock;
mod entry;
pub(super) mod frame;
