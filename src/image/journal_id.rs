//! A checksum of the block table, by which a live journal or an undo file identifies the state of its image.

use super::open::Image;
use crate::format::bat::BlockPlace;
use crate::units::BlockIndex;

/// Computes a checksum of the block table that does not depend on the order in which entries were added.
pub(super) fn table_sum(image: &Image) -> u64 {
    image
        .bat()
        .map_or(0, |table| table.used().fold(0, |sum: u64, (block, place)| sum.wrapping_add(entry_hash(block, place))))
}

/// Hashes one entry for [`table_sum`] with splitmix64's finaliser, so that swapped or shifted entries do not cancel
/// out.
pub(super) fn entry_hash(block: BlockIndex, place: BlockPlace) -> u64 {
    let mut z = (u64::from(block.get()) << 32 | u64::from(place.entry())).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
