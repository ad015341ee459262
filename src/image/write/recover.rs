//! Recovery: prepares an image for writing after an unclean end (crash-safety 4).
//!
//! Afterwards both footers are valid and equal, the blocks that a killed daemon placed have their places, and the free
//! tail is durably zero. Stale bytes in the free tail would become bitmaps of new blocks.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::bitmap::bitmaps::{Bitmaps, InitialBits};
use super::free_tail::FreeTail;
use super::journal_validation::ReplaySlot;
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::format::bat::BlockPlace;
use crate::image::batmap::Batmap;
use crate::image::open::Image;
use crate::mutant::{self, Mutant};
use crate::storage::next_data;
use crate::units::{BlockIndex, BlockSize, FileSector, SECTOR, SECTOR_BYTES};

/// State of a writable image with a BAT.
pub(in crate::image) struct WritableSparse {
    pub(super) bitmaps: Bitmaps,
    pub(super) block_size: BlockSize,
    /// The bitmap of a new block.
    pub(super) fresh: InitialBits,
    pub(in crate::image) free_tail: Mutex<FreeTail>,
}

/// Recovers an image, and returns the state with which it can be written.
///
/// `replayed` are the journal slots of a killed daemon; the BAT entries of their blocks may not be in the file yet.
/// `stamped` means that the sector before the footer is the stamp of a session that continues.
///
/// # Errors
/// - `Refused` if a journal slot has an impossible place;
/// - `NoSpace`, `Io`.
pub(in crate::image) fn recover(
    image: &Image,
    block_size: BlockSize,
    replayed: &[ReplaySlot],
    stamped: bool,
) -> Result<WritableSparse> {
    let (table, file) = (image.bat().expect("not fixed"), image.file());
    let bitmaps = Bitmaps::new(table.len(), block_size);
    let fresh = if image.kind() == DiskType::Differencing { InitialBits::Clear } else { InitialBits::Set };
    let (mut next, mut new_blocks) = (FileSector::at_or_after(image.used_end()), BTreeSet::new());
    let stamp = u64::from(stamped);
    let mut places = BTreeSet::new();
    if !replayed.is_empty() {
        // The entry of a block beyond the end of the disk takes no space.
        let blocks = block_size.blocks_for(image.size() / SECTOR);
        places.extend(table.used().filter(|(block, _)| block.is_within(blocks)).map(|(_, place)| place));
    }
    for slot in replayed {
        let block = bitmaps.block_of(slot.bitmap_sector).0;
        if table.place(block).is_none() {
            let end = slot.place.end(block_size);
            // The place need not be after the last block in the file, as a block that was placed later may have been
            // committed first.
            let is_inside = slot.place.sector().byte_offset() >= image.metadata_end()
                && (end + stamp).byte_offset() <= image.data_end();
            let before = places.range(..=slot.place).next_back();
            let after = places.range(slot.place..).next();
            let overlaps = before.is_some_and(|other: &BlockPlace| other.end(block_size) > slot.place.sector())
                || after.is_some_and(|other| other.sector() < end);
            if !is_inside || overlaps {
                let what = format!("the live journal has an impossible place for block {block}: sector {}", slot.place);
                return Err(Error::new(ErrorKind::Refused, what).at_path(file.path()));
            }
            bitmaps.insert_fresh(block, fresh);
            table.set(block, slot.place);
            new_blocks.insert(block);
            places.insert(slot.place);
            next = next.max(end);
        }
    }
    let end = FileSector::at_or_after(image.data_end()).max(next + stamp);
    // The sectors that are made zero end before the stamp.
    let zeros = if mutant::enabled(Mutant::ScrubStamp) { end } else { end - stamp };
    // The front copy is written first: if the trailing footer is missing, the front copy is the only valid footer.
    let (footer, mut front) = (image.footer().encode(), [0; SECTOR_BYTES]);
    file.read_at(&mut front, 0)?;
    if front != footer {
        log::warn!("{}: the copy of the footer at the start was out of date; rewritten", file.path().display());
        file.write_at(&footer, 0)?;
        file.sync()?;
    }
    if !image.has_whole_tail_footer() {
        log::info!(
            "{}: the trailing footer was missing, as the image was not closed cleanly; rewritten",
            file.path().display()
        );
        file.write_at(&footer, end.byte_offset())?;
    }
    // After a kill, the trailing footer may be in the page cache only, and the only durable footer may be in the range
    // that is punched next. One footer must be durable at every moment.
    if (zeros > next && !mutant::enabled(Mutant::ScrubFirst)) || !image.has_whole_tail_footer() {
        file.sync()?;
    }
    // A range without data already reads as zeros, and a full file system may have no space for the punch (btrfs).
    if zeros > next && !mutant::enabled(Mutant::NoScrub) {
        let (from, to) = (next.byte_offset(), zeros.byte_offset());
        if next_data(file, from..to)?.is_some() {
            file.punch_hole(from, to - from)?;
        }
        if !mutant::enabled(Mutant::ScrubUnsynced) {
            file.sync()?;
        }
    }
    clear_stale_claims(image)?;
    let blocks = block_size.blocks_for(image.size() / SECTOR);
    let placed = table.used().filter(|(block, _)| block.is_within(blocks)).count() as u64;
    let free_tail = FreeTail {
        next,
        // The sector before the footer is reserved for a stamp.
        end: if end > next { end - 1 } else { next },
        reserved: next,
        footer: end,
        stale: Vec::new(),
        unplaced: blocks - placed,
        fresh: new_blocks,
        growing: false,
        syncing: false,
        steps: 0,
        reservations: 0,
        last_placed: BlockIndex::new(u32::MAX),
        neighbor_run: 0,
    };
    Ok(WritableSparse { bitmaps, block_size, fresh, free_tail: Mutex::new(free_tail) })
}

/// Clears the batmap bits of blocks without a place, before the first block gets one. XenServer would trust such a bit
/// as soon as the block has a place.
///
/// # Errors
/// `NoSpace`, `Io`.
fn clear_stale_claims(image: &Image) -> Result<()> {
    let Some(mut batmap) = Batmap::read(image)? else { return Ok(()) };
    let placed = |block| image.bat().is_some_and(|table| table.place(block).is_some());
    let stale: Vec<BlockIndex> = batmap.claimed().filter(|block| !placed(*block)).collect();
    if stale.is_empty() {
        return Ok(());
    }
    log::warn!("{}: the batmap marked {} absent blocks as full; cleared", image.file().path().display(), stale.len());
    // A wrong checksum is not corrected: other bits may be wrong, too, and XenServer ignores a batmap with a wrong
    // checksum.
    let sound = batmap.verify().is_ok();
    stale.into_iter().for_each(|block| batmap.clear(block));
    for (at, bytes) in batmap.encoded().iter().take(if sound { 2 } else { 1 }) {
        image.file().write_at(bytes, *at)?;
    }
    image.file().sync()
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use crate::image::testing::{child, commit, file, grow, host_with, open};
    use crate::units::{BitmapSectorIndex, BlockIndex, SECTOR, SECTOR_BYTES, SectorRange};

    fn footers(host: &crate::storage::sim::SimHost) -> ([u8; SECTOR_BYTES], [u8; SECTOR_BYTES]) {
        let (file, mut front, mut tail) = (file(host), [0; SECTOR_BYTES], [0; SECTOR_BYTES]);
        file.read_at(&mut front, 0).unwrap();
        file.read_at(&mut tail, file.stat().unwrap().len - SECTOR).unwrap();
        (front, tail)
    }

    #[test]
    fn stale_bytes_after_the_last_block_become_zeros() {
        let host = host_with(child(), 1000);
        let image = open(&host).unwrap();
        grow(&host, &image).unwrap();
        let place = image.reserve(BlockIndex::new(0)).unwrap();
        assert_eq!(image.mark(SectorRange::between(0, 1)), Ok(true));
        commit(&host, &image);
        // A killed write has written to the next block's space, to which no pointer refers.
        let next = image.reserve(BlockIndex::new(1)).unwrap().sector().byte_offset();
        image.file().write_at(&[0xFF; 4096], next).unwrap();
        drop(image);
        let image = open(&host).unwrap();
        grow(&host, &image).unwrap();
        let again = image.reserve(BlockIndex::new(3)).unwrap().sector().byte_offset();
        assert_eq!(
            (image.image().bat().unwrap().place(BlockIndex::new(0)), again),
            (Some(place), next),
            "the same place"
        );
        let mut bytes = [1; 4096];
        image.file().read_at(&mut bytes, next).unwrap();
        assert_eq!(bytes, [0; 4096]);
        assert_eq!(image.bitmaps().unwrap().run(BitmapSectorIndex::new(3), 0, 128), Some((false, 128)));
    }

    #[test]
    fn missing_footers_are_rewritten() {
        let host = host_with(child(), 1000);
        let (whole, _) = footers(&host);
        let len = file(&host).stat().unwrap().len;
        // The trailing footer is lost, as after a crash of a file system that had not written the last page.
        file(&host).set_len(len - SECTOR).unwrap();
        drop(open(&host).unwrap());
        assert_eq!((file(&host).stat().unwrap().len, footers(&host)), (len, (whole, whole)));
        // The front copy is not a valid footer, so the trailing footer is used.
        file(&host).write_at(&[9; SECTOR_BYTES], 0).unwrap();
        drop(open(&host).unwrap());
        assert_eq!(footers(&host), (whole, whole));
    }

    #[test]
    fn blocks_without_a_place_are_counted() {
        let host = host_with(child(), 128 * 20);
        let image = open(&host).unwrap();
        image.set_allocation(crate::image::Allocation::Block);
        grow(&host, &image).unwrap();
        for block in 0..16 {
            image.reserve(BlockIndex::new(block)).unwrap();
            assert_eq!(image.mark(SectorRange::between(u64::from(block) * 128, u64::from(block) * 128 + 1)), Ok(true));
        }
        commit(&host, &image);
        drop(image);
        assert_eq!(open(&host).unwrap().free_tail().unplaced, 4);
    }
}
