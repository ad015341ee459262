//! The checksum of footers, headers and batmaps: the inverted sum of their bytes.

use std::ops::Range;

/// Returns the one's complement of the sum of all bytes except those at `skip`, where the checksum itself is stored.
pub(crate) fn checksum(bytes: &[u8], skip: Range<usize>) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
    !sum(&bytes[..skip.start]).wrapping_add(sum(&bytes[skip.end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stored_checksum_does_not_count() {
        assert_eq!(checksum(&[1, 2, 255, 255, 3], 2..4), !6);
        assert_eq!(checksum(&[], 0..0), u32::MAX);
    }
}
