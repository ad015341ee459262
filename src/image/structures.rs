//! Reads the metadata structures of a file; `open.rs` validates them.

use super::bat::Bat;
use super::callbacks::{OnDefect, report_defect};
use crate::error::Result;
use crate::format::bat::BlockPlace;
use crate::format::batmap::{self, BatmapPresence};
use crate::format::{ChosenFooter, Defect, DynamicHeader, Footer, bat, choose};
use crate::storage::File;
use crate::units::{BlockIndex, SECTOR, SECTOR_BYTES};

/// Bytes of the block table per read: small enough for the processor's cache, and for an allocator to reuse the memory
/// for every file of a chain.
const TABLE_CHUNK: u64 = 64 << 10;

/// Reads the footers at both ends of a file, and chooses the one to use.
pub(super) fn read_footers(file: &File, len: u64) -> Result<Result<ChosenFooter, Defect>> {
    let tail_len = len.min(SECTOR);
    let mut tail = vec![0; usize::try_from(tail_len).expect("at most a sector")];
    if tail_len > 0 {
        file.read_at(&mut tail, len - tail_len)?;
    }
    let mut front = [0; SECTOR_BYTES];
    let has_front = len >= SECTOR;
    if has_front {
        file.read_at(&mut front, 0)?;
    }
    Ok(choose(&tail, has_front.then_some(&front), len))
}

/// Reads the sector after the table, for the header of XenServer's batmap, if an image of this creator can have a
/// batmap.
pub(super) fn read_sector_after_table(
    file: &File,
    footer: &Footer,
    header: &DynamicHeader,
    len: u64,
) -> Result<Option<[u8; SECTOR_BYTES]>> {
    let Some(at) = batmap::header_offset(header).filter(|at| at.checked_add(SECTOR).is_some_and(|end| end <= len))
    else {
        return Ok(None);
    };
    if batmap::presence(footer) == BatmapPresence::Absent {
        return Ok(None);
    }
    let mut bytes = [0; SECTOR_BYTES];
    file.read_at(&mut bytes, at)?;
    Ok(Some(bytes))
}

/// Reads the table, and the value that fills its last sector. The caller has checked the table's offset and length
/// against the file. No block can begin at sector 0, so an entry of 0 is read as unused.
pub(super) fn read_table(file: &File, header: &DynamicHeader, found: &mut OnDefect<'_>) -> Result<(Bat, u32)> {
    let table = Bat::new(header.entries);
    let bytes = bat::bytes(header.entries);
    let mut chunk = vec![0; usize::try_from(bytes.min(TABLE_CHUNK)).expect("a chunk")];
    let (mut at, mut block, mut padding) = (0, 0u32, bat::UNUSED);
    let (mut zeros, mut first_zero) = (0u64, BlockIndex::new(0));
    while at < bytes {
        let len = usize::try_from((bytes - at).min(TABLE_CHUNK)).expect("a chunk");
        file.read_at(&mut chunk[..len], header.table_offset + at)?;
        for sector in chunk[..len].chunks(SECTOR_BYTES) {
            // Fast path: most sectors of a large disk's table are unused, in each of up to 64 layers.
            if bat::is_unused(sector) {
                block = block.saturating_add(bat::ENTRIES_PER_SECTOR);
                continue;
            }
            for entry in bat::decode(sector) {
                match block < header.entries {
                    true if entry == 0 => {
                        first_zero = if zeros == 0 { BlockIndex::new(block) } else { first_zero };
                        zeros += 1;
                    }
                    true => {
                        if let Some(place) = BlockPlace::from_entry(entry) {
                            table.set(BlockIndex::new(block), place);
                        }
                    }
                    false => padding = entry,
                }
                block = block.saturating_add(1);
            }
        }
        at += len as u64;
    }
    if zeros > 0 {
        let at = header.table_offset + u64::from(first_zero.get()) * 4;
        report_defect(found, Defect::EntryZero { block: first_zero, entries: zeros, at })?;
    }
    Ok((table, padding))
}
