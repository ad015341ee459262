//! Recovery at a writable open: what an unclean end left behind is put in order before anything is written.
//!
//! Crash-safety 3.5. Afterwards both footers are whole and equal, the places a killed predecessor gave are known, and the
//! room between the last block and the footer is durably zero: stale bytes there would be taken for bitmaps of later
//! blocks.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::bitmaps::{Bitmaps, Fresh};
use super::journal::Found;
use super::open::Image;
use super::tail::Room;
use super::writable::Sparse;
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::units::{BlockSize, SECTOR, SECTOR_BYTES};

/// Brings an image into the state that reserve and growth rely on: footers equal, the tail durably zero. `found`: blocks
/// of a killed predecessor, whose places the file may not know yet.
pub(super) fn recover(image: &Image, block_size: BlockSize, found: &[Found]) -> Result<Sparse> {
    let (table, file) = (image.bat().expect("not fixed"), image.file());
    let bitmaps = Bitmaps::new(table.len(), block_size);
    let fresh = if image.kind() == DiskType::Differencing { Fresh::Clear } else { Fresh::Set };
    let (mut next, mut new_blocks) = (image.used_end().div_ceil(SECTOR), BTreeSet::new());
    for f in found {
        let block = bitmaps.block_of(f.granule).0;
        if table.place(block).is_none() {
            let end = u64::from(f.place) + u64::from(block_size.stride_sectors());
            if u64::from(f.place) * SECTOR < image.used_end() || end * SECTOR > image.data_end() {
                let what = format!("the live journal has block {block} at sector {}, where it cannot be", f.place);
                return Err(Error::new(ErrorKind::Refused, what).at_path(file.path()));
            }
            bitmaps.prepare(block, fresh);
            table.set(block, f.place);
            new_blocks.insert(block);
            next = next.max(end);
        }
    }
    let end = image.data_end().div_ceil(SECTOR).max(next);
    // The front copy first: while the trailing footer is missing it is the only one.
    let (footer, mut front) = (image.footer().encode(), [0; SECTOR_BYTES]);
    file.read_at(&mut front, 0)?;
    if front != footer {
        log::warn!("{}: the footer's copy at the start was not up to date; renewed", file.path().display());
        file.write_at(&footer, 0)?;
        file.sync()?;
    }
    if !image.has_whole_tail_footer() {
        log::warn!("{}: the trailing footer is missing: it was not closed cleanly; recovered", file.path().display());
        file.write_at(&footer, end * SECTOR)?;
        file.sync()?;
    }
    if end > next {
        file.punch(next * SECTOR, (end - next) * SECTOR)?;
        file.sync()?;
    }
    let blocks = block_size.blocks_for(image.size() / SECTOR);
    let placed = table.used().filter(|(block, _)| u64::from(*block) < blocks).count() as u64;
    let room = Room { next, end, unplaced: blocks - placed, fresh: new_blocks, growing: false };
    Ok(Sparse { bitmaps, block_size, fresh, room: Mutex::new(room) })
}
