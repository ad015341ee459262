//! Parsing of sizes in arguments, and their output (`1.5 GiB`).

pub(super) use crate::units::parse_byte_size as parse_size;

use crate::units::BlockSize;

/// Parses a block size.
pub(super) fn parse_block_size(text: &str) -> Result<BlockSize, String> {
    let size = u32::try_from(parse_size(text)?).ok().and_then(BlockSize::from_bytes);
    size.ok_or_else(|| "the block size must be a power of two from 4K to 256M".to_owned())
}

/// Parses an alignment of the disk size: 1, or a multiple of 512 up to 2 TiB.
pub(super) fn parse_alignment(text: &str) -> Result<u64, String> {
    // A larger alignment than 2 TiB would exceed the maximum size of a disk.
    let fits = |align: &u64| *align == 1 || (align.is_multiple_of(512) && (512..=1 << 41).contains(align));
    Some(parse_size(text)?)
        .filter(fits)
        .ok_or_else(|| "the alignment must be 1 or a multiple of 512 up to 2T".to_owned())
}

/// Formats a number of bytes with a binary unit: `2 MiB`, `1.5 GiB`.
pub(super) fn human_size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let rank = (64 - bytes.leading_zeros()).saturating_sub(1) / 10;
    let (unit, one) = (units[rank as usize], 1u64 << (rank * 10));
    let (whole, hundredths) = (bytes / one, u128::from(bytes % one) * 100 / u128::from(one));
    match hundredths {
        0 => format!("{whole} {unit}"),
        n if n % 10 == 0 => format!("{whole}.{} {unit}", n / 10),
        n => format!("{whole}.{n:02} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64K", 64 << 10),
            ("10m", 10 << 20),
            ("2GiB", 2 << 30),
            ("1T", 1 << 40),
            ("7B", 7),
            ("3kb", 3072),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "K", "-1", "1.5G", "1 G", "16777216T", "5X", "1KK", "0x10", "18446744073709551616", "1iB", "١"]
        {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_block_size("512K").map(BlockSize::bytes), Ok(512 << 10));
        assert_eq!((parse_alignment("1M"), parse_alignment("1536")), (Ok(1 << 20), Ok(1536)));
        for bad in ["0", "511", "3T", "x"] {
            assert!(parse_alignment(bad).is_err(), "{bad}");
        }
        for bad in ["2K", "3M", "512M", "4G"] {
            assert!(parse_block_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_formatted() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536 << 10, "1.5 MiB"),
            ((2 << 20) + 4608, "2 MiB"),
            ((1 << 30) + (30 << 20), "1.02 GiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }
}
