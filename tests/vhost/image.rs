//! The simplest image: a fixed VHD, which is a disk followed by a footer.

use std::path::Path;

/// Creates a fixed VHD of `size` bytes of zeros (format 2: all fields are big-endian, and the checksum covers all other
/// bytes of the footer).
pub(crate) fn make_fixed(path: &Path, size: u64) {
    let mut footer = [0u8; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[8..12].copy_from_slice(&2u32.to_be_bytes());
    footer[12..16].copy_from_slice(&0x1_0000u32.to_be_bytes());
    footer[16..24].copy_from_slice(&u64::MAX.to_be_bytes());
    footer[28..32].copy_from_slice(b"win ");
    footer[32..36].copy_from_slice(&0x6_0001u32.to_be_bytes());
    footer[36..40].copy_from_slice(b"Wi2k");
    footer[40..48].copy_from_slice(&size.to_be_bytes());
    footer[48..56].copy_from_slice(&size.to_be_bytes());
    let cylinders = u16::try_from(size / 512 / (4 * 17)).unwrap();
    footer[56..58].copy_from_slice(&cylinders.to_be_bytes());
    footer[58..60].copy_from_slice(&[4, 17]);
    footer[60..64].copy_from_slice(&2u32.to_be_bytes());
    footer[68..84].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    let sum = footer.iter().fold(0u32, |sum, byte| sum + u32::from(*byte));
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    let file = std::fs::File::create(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &footer, size).unwrap();
}
