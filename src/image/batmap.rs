//! XenServer's batmap beside what it speaks of: which of its bits are wrong, and the bytes that make it right.
//!
//! A set bit tells tapdisk that all sectors of a block are there, so that it does not look at the block's bitmap. A clear
//! one tells nothing. So a writer that only sets bits of bitmaps may leave the batmap alone, and a wrong bit is mended by
//! clearing it.

use super::open::Image;
use crate::error::Result;
use crate::format::batmap::is_whole;
use crate::format::{BatmapHeader, Defect, MetadataPart, bitmap};
use crate::units::{SECTOR, SECTOR_BYTES};

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

/// Clears the bits of blocks that have no place: they would be believed as soon as the blocks get one. For a writable
/// open, before the first block does.
///
/// # Errors
/// `Io`.
pub(super) fn clear_stale_claims(image: &Image) -> Result<()> {
    let Some(mut batmap) = Batmap::read(image)? else { return Ok(()) };
    let placed = |block: u32| image.bat().is_some_and(|table| table.place(block).is_some());
    let stale: Vec<u32> = batmap.claimed().filter(|block| !placed(*block)).collect();
    if stale.is_empty() {
        return Ok(());
    }
    log::warn!("{}: the batmap called {} absent blocks whole; mended", image.file().path().display(), stale.len());
    // A wrong checksum stays wrong: other bits may be, too, and it keeps XenServer from believing them.
    let sound = batmap.verify().is_ok();
    stale.into_iter().for_each(|block| batmap.clear(block));
    for (at, bytes) in batmap.encoded().iter().take(if sound { 2 } else { 1 }) {
        image.file().write_at(bytes, *at)?;
    }
    image.file().sync()
}

/// Whether a block has a place and all its sectors that lie on the disk.
fn is_block_whole(image: &Image, block: u32) -> Result<bool> {
    let Some(place) = image.bat().and_then(|table| table.place(block)) else { return Ok(false) };
    let words = read_bitmap(image, place)?;
    let sectors = sectors_on_disk(image, block);
    Ok(bitmap::run(&words, 0, sectors) == (true, sectors))
}

/// Sectors of a block that lie on the disk.
pub(super) fn sectors_on_disk(image: &Image, block: u32) -> u32 {
    let Some(block_size) = image.block_size() else { return 0 };
    let left = (image.size() / SECTOR).saturating_sub(block_size.sectors_of(block).start());
    u32::try_from(left).unwrap_or(u32::MAX).min(block_size.sectors())
}

/// The bitmap of the block at file sector `place`. What the file does not hold of it is clear.
pub(super) fn read_bitmap(image: &Image, place: u32) -> Result<Vec<u64>> {
    let block_size = image.block_size().expect("it has blocks");
    let mut bytes = vec![0; block_size.bitmap_sectors() as usize * SECTOR_BYTES];
    let at = u64::from(place) * SECTOR;
    let there = image.data_end().saturating_sub(at).min(bytes.len() as u64);
    image.file().read_at(&mut bytes[..usize::try_from(there).expect("a bitmap")], at)?;
    let mut words = vec![0; bitmap::words(block_size)];
    bitmap::decode(&bytes, &mut words);
    Ok(words)
}
