//! Cylinders, heads and sectors: a number that no guest of ours sees, computed for the programs that still size by it.

use crate::units::SECTOR;

/// A disk geometry. Never a reason to reject an image, and never divided by.
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
    /// The largest one: 127.5 GiB.
    pub const MAX: Geometry = Geometry { cylinders: 65535, heads: 16, sectors: 255 };

    /// The geometry of a disk of `bytes`, by the algorithm of the specification, all divisions rounded down
    /// (vhd-format 2.2). It covers at most the disk, often less.
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

    /// The bytes that it covers.
    pub const fn bytes(self) -> u64 {
        self.cylinders as u64 * self.heads as u64 * self.sectors as u64 * SECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
