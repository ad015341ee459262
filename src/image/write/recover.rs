//! Recovery at a writable open: what an unclean end left behind is put in order before anything is written.
//!
//! Crash-safety 3.5. Afterwards both footers are whole and equal, the places a killed predecessor gave are known, and the
//! room between the last block and the footer is durably zero: stale bytes there would be taken for bitmaps of later
//! blocks.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::bitmap::bitmaps::{Bitmaps, InitialBits};
use super::free_tail::FreeTail;
use super::journal_replay::ReplaySlot;
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::image::batmap::Batmap;
use crate::image::open::Image;
use crate::mutant::{self, Mutant};
use crate::storage::next_data;
use crate::units::{BlockSize, SECTOR, SECTOR_BYTES};

/// What images with a block table have besides.
pub(in crate::image) struct WritableSparse {
    pub(super) bitmaps: Bitmaps,
    pub(super) block_size: BlockSize,
    /// What the bits of a new block are.
    pub(super) fresh: InitialBits,
    pub(in crate::image) free_tail: Mutex<FreeTail>,
}

/// Brings an image into the state that reserve and growth rely on: footers equal, the tail durably zero. `found`: blocks
/// of a killed predecessor, whose places the file may not know yet. `stamped`: the sector before the footer is the stamp of a
/// session that goes on.
pub(in crate::image) fn recover(
    image: &Image,
    block_size: BlockSize,
    found: &[ReplaySlot],
    stamped: bool,
) -> Result<WritableSparse> {
    let (table, file) = (image.bat().expect("not fixed"), image.file());
    let bitmaps = Bitmaps::new(table.len(), block_size);
    let fresh = if image.kind() == DiskType::Differencing { InitialBits::Clear } else { InitialBits::Set };
    let (mut next, mut new_blocks) = (image.used_end().div_ceil(SECTOR), BTreeSet::new());
    let stamp = u64::from(stamped);
    let (reach, mut places) = (block_size.stride_sectors() - 1, BTreeSet::new());
    if !found.is_empty() {
        // An entry of a block behind the disk's end keeps no room.
        let blocks = block_size.blocks_for(image.size() / SECTOR);
        places.extend(table.used().filter(|(block, _)| u64::from(*block) < blocks).map(|(_, place)| place));
    }
    for f in found {
        let block = bitmaps.block_of(f.bitmap_sector).0;
        if table.place(block).is_none() {
            let end = u64::from(f.place) + u64::from(block_size.stride_sectors());
            // Not always behind the last block of the file: a younger one may have been committed first.
            let inside =
                u64::from(f.place) * SECTOR >= image.metadata_end() && (end + stamp) * SECTOR <= image.data_end();
            if !inside || places.range(f.place.saturating_sub(reach)..=f.place.saturating_add(reach)).next().is_some() {
                let what = format!("the live journal has block {block} at sector {}, where it cannot be", f.place);
                return Err(Error::new(ErrorKind::Refused, what).at_path(file.path()));
            }
            bitmaps.insert_fresh(block, fresh);
            table.set(block, f.place);
            new_blocks.insert(block);
            places.insert(f.place);
            next = next.max(end);
        }
    }
    let end = image.data_end().div_ceil(SECTOR).max(next + stamp);
    // What is made zero ends before the stamp.
    let zeros = if mutant::enabled(Mutant::ScrubStamp) { end } else { end - stamp };
    // The front copy first: while the trailing footer is missing it is the only one.
    let (footer, mut front) = (image.footer().encode(), [0; SECTOR_BYTES]);
    file.read_at(&mut front, 0)?;
    if front != footer {
        log::warn!("{}: the footer's copy at the start was not up to date; renewed", file.path().display());
        file.write_at(&footer, 0)?;
        file.sync()?;
    }
    if !image.has_whole_tail_footer() {
        log::info!(
            "{}: the trailing footer was missing: the image was not closed cleanly; recovered",
            file.path().display()
        );
        file.write_at(&footer, end * SECTOR)?;
    }
    // A killed predecessor may have left the trailing footer in the page cache alone, and the one that is durable in what
    // is punched next: there must be one at every moment.
    if (zeros > next && !mutant::enabled(Mutant::ScrubFirst)) || !image.has_whole_tail_footer() {
        file.sync()?;
    }
    // What holds no data reads as zeros already, and a full host may have no room for the change (btrfs).
    if zeros > next && !mutant::enabled(Mutant::NoScrub) {
        if next_data(file, next * SECTOR..zeros * SECTOR)?.is_some() {
            file.punch_hole(next * SECTOR, (zeros - next) * SECTOR)?;
        }
        if !mutant::enabled(Mutant::ScrubUnsynced) {
            file.sync()?;
        }
    }
    clear_stale_claims(image)?;
    let blocks = block_size.blocks_for(image.size() / SECTOR);
    let placed = table.used().filter(|(block, _)| u64::from(*block) < blocks).count() as u64;
    let room = FreeTail {
        next,
        // The sector before the footer is kept for a stamp.
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
        last_placed: u32::MAX,
        neighbor_run: 0,
    };
    Ok(WritableSparse { bitmaps, block_size, fresh, free_tail: Mutex::new(room) })
}

/// Clears the bits of blocks that have no place: they would be believed as soon as the blocks get one. For a writable
/// open, before the first block does.
///
/// # Errors
/// `Io`.
fn clear_stale_claims(image: &Image) -> Result<()> {
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

#[cfg(all(test, feature = "sim"))]
mod tests {
    use crate::image::testing::{child, commit, file, grow, host_with, open};
    use crate::units::{SECTOR, SECTOR_BYTES, SectorRange};

    fn footers(host: &crate::storage::sim::SimHost) -> ([u8; SECTOR_BYTES], [u8; SECTOR_BYTES]) {
        let (file, mut front, mut tail) = (file(host), [0; SECTOR_BYTES], [0; SECTOR_BYTES]);
        file.read_at(&mut front, 0).unwrap();
        file.read_at(&mut tail, file.stat().unwrap().len - SECTOR).unwrap();
        (front, tail)
    }

    #[test]
    fn stale_bytes_behind_the_last_block_become_zeros() {
        let host = host_with(child(), 1000);
        let image = open(&host).unwrap();
        grow(&host, &image).unwrap();
        let place = image.reserve(0).unwrap();
        assert_eq!(image.mark(SectorRange::between(0, 1)), Ok(true));
        commit(&host, &image);
        // The room of the next block, which a killed write has used and no pointer reaches.
        let next = u64::from(image.reserve(1).unwrap()) * SECTOR;
        image.file().write_at(&[0xFF; 4096], next).unwrap();
        drop(image);
        let image = open(&host).unwrap();
        grow(&host, &image).unwrap();
        let again = u64::from(image.reserve(3).unwrap()) * SECTOR;
        assert_eq!((image.image().bat().unwrap().place(0), again), (Some(place), next), "the same room");
        let mut bytes = [1; 4096];
        image.file().read_at(&mut bytes, next).unwrap();
        assert_eq!(bytes, [0; 4096]);
        assert_eq!(image.bitmaps().unwrap().run(3, 0, 128), Some((false, 128)));
    }

    #[test]
    fn footers_are_made_whole() {
        let host = host_with(child(), 1000);
        let (whole, _) = footers(&host);
        let len = file(&host).stat().unwrap().len;
        // Cut off, as by a file system that lost the last page.
        file(&host).set_len(len - SECTOR).unwrap();
        drop(open(&host).unwrap());
        assert_eq!((file(&host).stat().unwrap().len, footers(&host)), (len, (whole, whole)));
        // A front copy that is no footer: the one at the end counts.
        file(&host).write_at(&[9; SECTOR_BYTES], 0).unwrap();
        drop(open(&host).unwrap());
        assert_eq!(footers(&host), (whole, whole));
    }

    #[test]
    fn blocks_that_have_no_place_are_counted() {
        let host = host_with(child(), 128 * 20);
        let image = open(&host).unwrap();
        image.set_allocation(crate::image::Allocation::Block);
        grow(&host, &image).unwrap();
        for block in 0..16 {
            image.reserve(block).unwrap();
            assert_eq!(image.mark(SectorRange::between(u64::from(block) * 128, u64::from(block) * 128 + 1)), Ok(true));
        }
        commit(&host, &image);
        drop(image);
        assert_eq!(open(&host).unwrap().free_tail().unplaced, 4);
    }
}
