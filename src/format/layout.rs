//! Where things go in the files that we write.
//!
//! Metadata and guest data share no 4 KiB page: the BAT stands at a page boundary and fills its pages, block data
//! begins at one, and its bitmap takes the last sectors before it (crash-safety 3.4). Near the 2 TiB that entries can
//! reach, blocks are packed without gaps where they would not all fit otherwise.

use std::ops::Range;

use crate::format::bat;
use crate::format::defect::Defect;
use crate::format::extents::TABLE_LIMIT;
use crate::format::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::format::header::{HEADER_BYTES, LOCATORS};
use crate::units::{BlockSize, SECTOR};

/// The unit of alignment, in bytes: a page, and a physical sector of every medium.
pub const PAGE: u64 = 4096;
const PAGE_SECTORS: u64 = PAGE / SECTOR;

/// The places in a new image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewLayout {
    /// Byte offset of the dynamic header; `None` for a fixed disk.
    pub header: Option<u64>,
    /// Room of each locator, in bytes of the file: whole sectors.
    pub locators: Vec<Range<u64>>,
    /// Byte offset of the BAT.
    pub table: u64,
    /// Entries of the BAT.
    pub entries: u32,
    /// Bytes of the BAT, in whole pages; all that is no entry is filled with ones.
    pub table_bytes: u64,
    /// Where the footer goes while there are no blocks, in bytes. Here the data ends.
    pub footer: u64,
}

impl NewLayout {
    /// The places in a new image of a disk of `size` bytes, with BAT entries for at least `reserve` blocks and with
    /// locators of so many bytes.
    ///
    /// # Errors
    /// [`Defect::DiskSize`], [`Defect::TableTooLarge`].
    ///
    /// # Panics
    /// For more than eight locators, or locators of a disk without parent.
    pub fn plan(
        disk_type: DiskType,
        size: u64,
        block_size: BlockSize,
        reserve: u32,
        locators: &[u32],
    ) -> Result<NewLayout, Defect> {
        assert!(locators.len() <= LOCATORS, "a header has room for eight locators");
        assert!(locators.is_empty() || disk_type == DiskType::Differencing, "only children have locators");
        if !Footer::size_fits(size) {
            return Err(Defect::DiskSize { at: 0, size });
        }
        if disk_type == DiskType::Fixed {
            let none =
                NewLayout { header: None, locators: Vec::new(), table: 0, entries: 0, table_bytes: 0, footer: size };
            return Ok(none);
        }
        let wanted = block_size.blocks_for(size / SECTOR).max(reserve.into());
        let limit = TABLE_LIMIT / 4;
        let entries = u32::try_from(wanted).ok().filter(|&entries| u64::from(entries) <= limit);
        let entries = entries.ok_or(Defect::TableTooLarge { at: 0, entries: wanted, limit })?;
        let mut end = FOOTER_BYTES + HEADER_BYTES;
        let place = |&length: &u32| {
            let start = end;
            end += u64::from(length).max(1).next_multiple_of(SECTOR);
            start..end
        };
        let locators = locators.iter().map(place).collect();
        let table = end.next_multiple_of(PAGE);
        let table_bytes = bat::bytes(entries).next_multiple_of(PAGE);
        Ok(NewLayout { header: Some(FOOTER_BYTES), locators, table, entries, table_bytes, footer: table + table_bytes })
    }
}

/// The entry of the next new block, where the data ends before sector `end` and `unplaced` blocks of the disk have no
/// place yet, this one included.
///
/// # Errors
/// [`Defect::NoPlace`] where no entry can name the place (O14).
pub fn next_place(end: u64, block_size: BlockSize, unplaced: u64) -> Result<u32, Defect> {
    let full = Defect::NoPlace { end: end.saturating_mul(SECTOR) };
    let stride = u64::from(block_size.stride_sectors());
    let bitmap = u64::from(block_size.bitmap_sectors());
    let aligned = end.checked_add(bitmap).and_then(|data| data.checked_next_multiple_of(PAGE_SECTORS));
    let aligned = aligned.map(|data| data - bitmap);
    // The last of the others would begin here if they were packed behind this one.
    let last = aligned.and_then(|entry| entry.checked_add(unplaced.saturating_sub(1).checked_mul(stride)?));
    let entry = match (aligned, last) {
        (Some(aligned), Some(last)) if last <= bat::MAX_ENTRY.into() => aligned,
        _ => end,
    };
    u32::try_from(entry).ok().filter(|&entry| entry <= bat::MAX_ENTRY).ok_or(full)
}
