//! Disk geometry: cylinders, heads and sectors. diffdisk computes the geometry only for programs that derive the disk
//! size from it; a guest of diffdisk does not see it.

use crate::units::SECTOR;

/// The creator tags for which every version of QEMU takes the disk size from the footer's current size.
const EXACT_CREATORS: [[u8; 4]; 5] = [*b"win ", *b"qem2", *b"d2v ", *b"tap\0", *b"CTXS"];

/// A disk geometry. No geometry is a reason to reject an image, and its numbers are never divisors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors in a track.
    pub sectors: u8,
}

impl Geometry {
    /// The largest geometry: 127.5 GiB.
    pub const MAX: Geometry = Geometry { cylinders: 65535, heads: 16, sectors: 255 };

    /// Computes the geometry of a disk of `bytes` by the algorithm of the specification, with all divisions rounded
    /// down (format 2.2). The geometry covers at most the disk, often less.
    pub fn for_size(bytes: u64) -> Geometry {
        let total = (bytes / SECTOR).min(Geometry::MAX.bytes() / SECTOR);
        let (sectors, heads, tracks) = if total >= 65535 * 16 * 63 {
            (255, 16, total / 255)
        } else {
            let tracks = total / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if tracks < heads * 1024 && heads <= 16 {
                (17, heads, tracks)
            } else if total / 31 < 16 * 1024 {
                (31, 16, total / 31)
            } else {
                (63, 16, total / 63)
            }
        };
        let cylinders = u16::try_from(tracks / heads).expect("the sectors are capped at 65535 cylinders");
        Geometry { cylinders, heads: u8::try_from(heads).expect("at most 16 heads"), sectors }
    }

    /// Computes the geometry to record for a disk of `bytes` in an image with this creator tag, so that every version
    /// of QEMU uses the current size. The result is the largest geometry if QEMU would otherwise cut the disk to the
    /// size of its ordinary geometry.
    ///
    /// QEMU uses the current size of images by a few creators, and of all images with the largest geometry. For other
    /// images it multiplies cylinders, heads and sectors: before QEMU 10 for all other tags, since then for `vpc ` and
    /// `qemu` (format 2.3).
    pub fn for_creator(creator: [u8; 4], bytes: u64) -> Geometry {
        let ordinary = Geometry::for_size(bytes);
        if EXACT_CREATORS.contains(&creator) || ordinary.bytes() == bytes { ordinary } else { Geometry::MAX }
    }

    /// Returns the number of bytes that the geometry covers.
    pub const fn bytes(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors as u64 * SECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the size that QEMU uses, before version 10 and since (block/vpc.c).
    fn by_qemu(creator: [u8; 4], geometry: Geometry, current: u64) -> [u64; 2] {
        let exact_before = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"].contains(&&creator);
        let exact_since = ![b"vpc ", b"qemu"].contains(&&creator);
        [exact_before, exact_since].map(|exact| match exact || geometry == Geometry::MAX {
            true => current,
            false => geometry.bytes(),
        })
    }

    #[test]
    fn no_version_of_qemu_cuts_a_disk() {
        let tags = [
            b"win ",
            b"qem2",
            b"d2v ",
            b"tap\0",
            b"CTXS",
            b"vpc ",
            b"qemu",
            b"vbox",
            b"dutl",
            b"xo  ",
            b"vs  ",
            b"wa\0\0",
            b"caml",
            b"d2v\0",
            b"\0\0\0\0",
        ];
        for &tag in tags {
            for size in [512, 34816, 1 << 20, 10 << 20, 504 << 20, 1 << 30, 127 << 30, 2040 << 30] {
                let geometry = Geometry::for_creator(tag, size);
                assert_eq!(by_qemu(tag, geometry, size), [size; 2], "{} {size}", tag.escape_ascii());
            }
        }
        assert_eq!(by_qemu(*b"vbox", Geometry::for_size(1 << 20), 1 << 20), [1_044_480, 1 << 20]);
        assert_eq!(
            Geometry::for_creator(*b"tap\0", 1 << 20),
            Geometry::for_size(1 << 20),
            "vhd-util minds the largest"
        );
        assert_eq!(Geometry::for_creator(*b"vpc ", 504 << 20), Geometry::for_size(504 << 20), "no sector is cut off");
    }

    #[test]
    fn the_table_of_the_specification() {
        const KIB: u64 = 1 << 10;
        const MIB: u64 = 1 << 20;
        const EDGE: u64 = 65535 * 16 * 63 * 512;
        let table = [
            (33 * KIB, 0, 4, 17, 0),
            (34 * KIB, 1, 4, 17, 34816),
            (MIB, 30, 4, 17, 1_044_480),
            (16 * MIB, 481, 4, 17, 16_746_496),
            (32 * MIB, 963, 4, 17, 33_527_808),
            (34 * MIB, 140, 16, 31, 35_553_280),
            (64 * MIB, 963, 8, 17, 67_055_616),
            (128 * MIB, 963, 16, 17, 134_111_232),
            (247 * MIB, 1019, 16, 31, 258_777_088),
            (248 * MIB, 503, 16, 63, 259_596_288),
            (504 * MIB, 1024, 16, 63, 528_482_304),
            (1024 * MIB, 2080, 16, 63, 1_073_479_680),
            (EDGE - 512, 65534, 16, 63, 33_821_835_264),
            (EDGE, 16191, 16, 255, 33_822_351_360),
            (127 * 1024 * MIB, 65278, 16, 255, 136_363_130_880),
            (136_899_993_600, 65535, 16, 255, 136_899_993_600),
            (2040 * 1024 * MIB, 65535, 16, 255, 136_899_993_600),
            (u64::MAX, 65535, 16, 255, 136_899_993_600),
            (0, 0, 4, 17, 0),
        ];
        for (size, cylinders, heads, sectors, bytes) in table {
            let g = Geometry::for_size(size);
            assert_eq!(g, Geometry { cylinders, heads, sectors }, "{size}");
            assert_eq!(g.bytes(), bytes, "{size}");
        }
    }
}
