//! XenServer's batmap beside what it speaks of: which of its bits are wrong, and the bytes that make it right.
//!
//! A set bit tells tapdisk that all sectors of a block are there, so that it does not look at the block's bitmap. A clear
//! one tells nothing. So a writer that only sets bits of bitmaps may leave the batmap alone, and a wrong bit is mended by
//! clearing it.

use super::open::Image;
use crate::error::Result;
use crate::format::batmap::is_whole;
use crate::format::{BatmapHeader, Defect, MetadataPart, bitmap};
use crate::units::SECTOR;

/// The batmap of an image.
#[derive(Clone, Debug)]
pub struct Batmap {
    header: BatmapHeader,
    header_at: u64,
    map_at: u64,
    /// As much of the map as the disk has blocks, and at least what the checksum covers, in whole sectors.
    map: Vec<u8>,
    summed: usize,
    blocks: u32,
}

impl Batmap {
    /// Reads the batmap of an image; `None` where there is none, or none that can be found.
    ///
    /// # Errors
    /// `Io`.
    pub fn read(image: &Image) -> Result<Option<Batmap>> {
        let Some((sparse, header)) = image.sparse().and_then(|s| Some((s, s.batmap.as_ref()?))) else {
            return Ok(None);
        };
        let place = |part| sparse.metadata.extents().iter().find(|e| e.part == part).map(|e| e.range.clone());
        let (Some(header_at), Some(region)) = (place(MetadataPart::BatmapHeader), place(MetadataPart::Batmap)) else {
            return Ok(None);
        };
        // Both numbers come from the size of the disk, which is limited, and not from the map's own size.
        let blocks = sparse.header.block_size.blocks_for(image.size() / SECTOR);
        let summed = BatmapHeader::checksummed_bytes(image.size());
        let len = blocks.div_ceil(8).next_multiple_of(SECTOR).max(summed).min(region.end - region.start);
        let mut map = vec![0; usize::try_from(len).expect("a bit a block")];
        image.file().read_at(&mut map, region.start)?;
        let summed = usize::try_from(summed.min(len)).expect("a part of the map");
        let blocks = u32::try_from(blocks).expect("the table has an entry for each");
        Ok(Some(Batmap {
            header: header.clone(),
            header_at: header_at.start,
            map_at: region.start,
            map,
            summed,
            blocks,
        }))
    }

    /// Whether it calls a block whole.
    pub fn claims(&self, block: u32) -> bool {
        block < self.blocks && is_whole(&self.map, block)
    }

    /// The byte of the file in which the bit of a block is.
    pub fn offset(&self, block: u32) -> u64 {
        self.map_at + u64::from(block / 8)
    }

    /// Whether its checksum fits.
    ///
    /// # Errors
    /// [`Defect::BatmapChecksum`], at the header's place.
    pub fn verify(&self) -> Result<(), Defect> {
        self.header.verify(&self.map[..self.summed]).map_err(|defect| defect.with_base_offset(self.header_at))
    }

    /// The blocks of the disk that it calls whole.
    pub fn claimed(&self) -> impl Iterator<Item = u32> {
        (0..self.blocks).filter(|block| self.claims(*block))
    }

    /// The blocks that it calls whole and that are not: they have no place, or a sector of the disk is missing.
    ///
    /// # Errors
    /// `Io`.
    pub fn wrong_claims(&self, image: &Image) -> Result<Vec<u32>> {
        let mut wrong = Vec::new();
        for block in self.claimed() {
            if !is_block_whole(image, block)? {
                wrong.push(block);
            }
        }
        Ok(wrong)
    }

    /// Says of a block that it may not be whole.
    pub fn clear(&mut self, block: u32) {
        self.map[(block / 8) as usize] &= !(0x80 >> (block % 8));
    }

    /// What to write where, map first, so that the file says what this says, under a right checksum.
    pub fn encoded(&self) -> [(u64, Vec<u8>); 2] {
        let checksum = self.header.checksum_of(&self.map[..self.summed]);
        let header = BatmapHeader { checksum, ..self.header.clone() };
        [(self.map_at, self.map.clone()), (self.header_at, header.encode().to_vec())]
    }
}

/// Whether a block has a place and all its sectors that lie on the disk.
fn is_block_whole(image: &Image, block: u32) -> Result<bool> {
    let Some(place) = image.bat().and_then(|table| table.place(block)) else { return Ok(false) };
    let words = image.read_bitmap(place)?;
    let sectors = image.sectors_on_disk(block);
    Ok(bitmap::run(&words, 0, sectors) == (true, sectors))
}
