//! Units: sectors and ranges of sectors, blocks and their sizes, sizes that users type, and the progress callback.
//!
//! All conversions between sectors, blocks and bytes are in this folder, so that overflow is handled once. A sector is
//! always 512 bytes, regardless of the logical block size of the storage device.
//!
//! A sector of the disk is a plain number, and a range of them is a [`SectorRange`]. A sector of a file is a
//! [`FileSector`].

mod block;
mod byte_size;
mod sector;

pub use block::{BitmapSectorIndex, BlockIndex, BlockSize};
pub use byte_size::parse_byte_size;
pub use sector::{FileSector, SectorRange};

use crate::error::Result;

/// Bytes in a sector, as a count of bytes on a disk.
pub const SECTOR: u64 = 512;
/// Bytes in a sector, as a length in memory.
pub const SECTOR_BYTES: usize = 512;
/// Bits in a sector.
pub const SECTOR_BITS: u32 = 4096;

/// Progress callback of a long operation. It receives the number of processed bytes, since the last call or in total,
/// as the operation documents. If the callback fails, the operation ends with the error of the callback.
pub type OnProgress<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Converts sectors to bytes; `None` if the result does not fit in 64 bits.
pub fn sectors_to_bytes(sectors: u64) -> Option<u64> {
    sectors.checked_mul(SECTOR)
}
