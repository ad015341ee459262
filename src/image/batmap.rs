//! Compares XenServer's batmap with the bitmaps that it summarizes, and encodes a corrected batmap.
//!
//! A set bit claims that all sectors of a block are present, so that tapdisk skips the block's bitmap. A clear bit
//! claims nothing. So a writer that only sets bits in bitmaps need not update the batmap, and clearing a wrong bit
//! repairs it.

use super::open::Image;
use crate::error::Result;
use crate::format::batmap::is_whole;
use crate::format::{BatmapHeader, Defect, MetadataPart, bitmap};
use crate::units::{BlockIndex, SECTOR};

/// The batmap of an image, in memory.
#[derive(Clone, Debug)]
pub struct Batmap {
    header: BatmapHeader,
    header_at: u64,
    map_at: u64,
    /// The first sectors of the map: those for the disk's blocks and those that the checksum covers, as far as the
    /// recorded map has them.
    map: Vec<u8>,
    summed: usize,
    blocks: u32,
}

impl Batmap {
    /// Reads the batmap of an image; `None` if the image has none, or its header or place is invalid.
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
        // Both lengths derive from the disk's size, which is limited, and not from the map's recorded length.
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

    /// Returns whether the batmap claims that a block is complete.
    pub fn claims(&self, block: BlockIndex) -> bool {
        block.get() < self.blocks && is_whole(&self.map, block)
    }

    /// Returns the byte offset in the file of a block's bit.
    pub fn offset(&self, block: BlockIndex) -> u64 {
        self.map_at + u64::from(block.get() / 8)
    }

    /// Verifies the checksum.
    ///
    /// # Errors
    /// [`Defect::BatmapChecksum`], with the header's offset.
    pub fn verify(&self) -> Result<(), Defect> {
        self.header.verify(&self.map[..self.summed]).map_err(|defect| defect.with_base_offset(self.header_at))
    }

    /// Returns the blocks of the disk that the batmap claims are complete.
    pub fn claimed(&self) -> impl Iterator<Item = BlockIndex> {
        (0..self.blocks).map(BlockIndex::new).filter(|block| self.claims(*block))
    }

    /// Returns the wrong claims: blocks that have no place, or of which a sector of the disk is not present.
    ///
    /// # Errors
    /// `Io`.
    pub fn wrong_claims(&self, image: &Image) -> Result<Vec<BlockIndex>> {
        let mut wrong = Vec::new();
        for block in self.claimed() {
            if !is_block_whole(image, block)? {
                wrong.push(block);
            }
        }
        Ok(wrong)
    }

    /// Withdraws the claim that a block is complete.
    pub fn clear(&mut self, block: BlockIndex) {
        self.map[block.as_usize() / 8] &= !(0x80 >> (block.get() % 8));
    }

    /// Encodes map and header, with a new checksum, each with the byte offset to write it at. The map is first.
    pub fn encoded(&self) -> [(u64, Vec<u8>); 2] {
        let checksum = self.header.checksum_of(&self.map[..self.summed]);
        let header = BatmapHeader { checksum, ..self.header.clone() };
        [(self.map_at, self.map.clone()), (self.header_at, header.encode().to_vec())]
    }
}

/// Returns whether a block has a place and all its sectors within the disk are present.
fn is_block_whole(image: &Image, block: BlockIndex) -> Result<bool> {
    let Some(place) = image.bat().and_then(|table| table.place(block)) else { return Ok(false) };
    let words = image.read_bitmap(place)?;
    let sectors = image.sectors_on_disk(block);
    Ok(bitmap::run(&words, 0, sectors) == (true, sectors))
}
