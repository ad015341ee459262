//! Opens images: reads a file's metadata, and uses each structure only after it passed the rules (O1 to O16).
//!
//! An open reads the two footers, the header, the block table and, of XenServer's images, the batmap's header. If the
//! file was cut off inside a block, it also reads the bitmap of that block. It maps nothing. A violation that leaves
//! the image readable becomes a note. `check` uses the same examination, but continues after defects that end an open.

use std::ops::ControlFlow;

use uuid::Uuid;

use super::bat::Bat;
use super::callbacks::{OnDefect, report_defect};
use super::lost::TruncatedBlocks;
use super::structures::{read_footers, read_sector_after_table, read_table};
use super::unrecognized;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::BlockPlace;
use crate::format::batmap::{self, BatmapHeader, BatmapPresence};
use crate::format::entries::{EntryRules, PlacedBlocks, check_entries};
use crate::format::metadata::{check_header_place, check_table};
use crate::format::{
    ChosenFooter, Consequence, Defect, DiskType, DynamicHeader, Footer, FooterSource, MetadataMap, SessionStamp, bat,
    bitmap,
};
use crate::storage::File;
use crate::units::{BlockIndex, BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

/// Maximum number of defects that an open keeps: a corrupt table may have millions of wrong entries.
const MAX_NOTES: usize = 64;

/// An opened image: its validated metadata and the places of its blocks.
#[derive(Debug)]
pub struct Image {
    file: File,
    chosen: ChosenFooter,
    sparse: Option<SparseImage>,
    /// The defects that did not end the open.
    notes: Vec<Defect>,
}

/// The part of an [`Image`] that only dynamic and differencing images have.
#[derive(Debug)]
pub(super) struct SparseImage {
    pub(super) header: DynamicHeader,
    pub(super) metadata: MetadataMap,
    pub(super) table: Bat,
    /// The value that fills the table's last sector after the last entry.
    padding: u32,
    /// The blocks in the order of their places, and the end of all blocks and metadata.
    pub(super) placed: PlacedBlocks,
    /// The header of XenServer's batmap.
    pub(super) batmap: Option<BatmapHeader>,
    /// The lost ranges of the disk; empty unless the open accepted lost sectors.
    lost: Vec<SectorRange>,
}

impl Image {
    /// Opens the image in a file.
    ///
    /// # Errors
    /// - `Invalid`, with the first defect that makes the image unreadable, and its offset.
    /// - `Unsupported` if the file is an image of another format.
    /// - `Refused` if the image is encrypted, its block table is too large, or a resize by vhd-util was interrupted.
    /// - `Io`.
    pub fn open(file: File) -> Result<Image> {
        Image::open_despite(file, |_| false)
    }

    /// Opens an image that may have lost sectors, to read the others. [`Image::lost`] returns the lost ones.
    ///
    /// # Errors
    /// - `Invalid`, with the first other defect that makes the image unreadable, and its offset.
    /// - `Unsupported` if the file is an image of another format.
    /// - `Refused` if the image is encrypted, its block table is too large, or a resize by vhd-util was interrupted.
    /// - `Io`.
    pub fn salvage(file: File) -> Result<Image> {
        Image::open_despite(file, |defect| matches!(defect, Defect::BlockCutOff { .. }))
    }

    /// Opens an image that may be unreadable, to describe its metadata. The caller must not read its data.
    ///
    /// # Errors
    /// - `Invalid`, with a defect after which no further metadata can be read, and its offset.
    /// - `Unsupported` if the file is an image of another format.
    /// - `Refused` if the image is encrypted, its block table is too large, or a resize by vhd-util was interrupted.
    /// - `Io`.
    pub fn inspect(file: File) -> Result<Image> {
        Image::open_despite(file, |_| true)
    }

    /// Opens the image in a file in spite of the defects for which `bears` returns true.
    fn open_despite(file: File, bears: fn(&Defect) -> bool) -> Result<Image> {
        let (path, mut notes) = (file.path().to_path_buf(), Vec::new());
        let mut image = Image::examine(file, &mut |defect| {
            let consequence = defect.consequence();
            if consequence == Consequence::NotReadable && !bears(&defect) {
                return ControlFlow::Break(Error::from(defect).at_path(&path));
            }
            log::debug!("{}: {defect}", path.display());
            // A defect with a worse consequence than all kept defects is kept even beyond the limit.
            if notes.len() < MAX_NOTES || notes.iter().all(|known: &Defect| known.consequence() < consequence) {
                notes.push(defect);
            }
            ControlFlow::Continue(())
        })?;
        image.notes = notes;
        Ok(image)
    }

    /// Opens the image and passes each defect to `found`. Fails if `found` breaks, or if nothing further can be read.
    pub(super) fn examine(file: File, found: &mut OnDefect<'_>) -> Result<Image> {
        let len = file.stat()?.len;
        let chosen = match read_footers(&file, len)? {
            Ok(chosen) => chosen,
            Err(Defect::FooterMissing { len }) => {
                let defect = unrecognized::diagnose(&file, len)?.unwrap_or(Defect::FooterMissing { len });
                return Err(fatal(&file, found, defect));
            }
            Err(defect) => return Err(fatal(&file, found, defect)),
        };
        for defect in chosen.notes.iter().cloned().chain(write_blockers(&chosen)) {
            report_defect(found, defect)?;
        }
        if chosen.footer.disk_type == DiskType::Fixed {
            return Ok(Image { file, chosen, sparse: None, notes: Vec::new() });
        }
        let footer = &chosen.footer;
        check_header_place(footer, len).map_err(|d| fatal(&file, found, d))?;
        let mut bytes = [0; 1024];
        file.read_at(&mut bytes, footer.data_offset)?;
        let header = DynamicHeader::decode(&bytes);
        let header = header.map_err(|d| fatal(&file, found, d.with_base_offset(footer.data_offset)))?;
        let table_range = check_table(footer, &header, len).map_err(|d| fatal(&file, found, d))?;
        let after_table = read_sector_after_table(&file, footer, &header, len)?;
        let batmap = after_table.as_ref().and_then(|bytes| BatmapHeader::decode(bytes).ok());
        if batmap.as_ref().is_some_and(BatmapHeader::is_encrypted) {
            return Err(fatal(&file, found, Defect::Encrypted { at: table_range.end }));
        }
        let (metadata, notes) = MetadataMap::new(footer, &header, batmap.as_ref(), len);
        for defect in notes {
            report_defect(found, defect)?;
        }
        let (table, padding) = read_table(&file, &header, found)?;
        let rules = EntryRules::new(&chosen, &header, &metadata);
        let placed = check_entries(table.used(), &rules, &mut *found)?;
        let is_damaged = |bytes: [u8; SECTOR_BYTES]| {
            let at = table_range.end..table_range.end + SECTOR;
            batmap.is_none()
                && batmap::presence(footer) == BatmapPresence::Present
                && bytes != [0; SECTOR_BYTES]
                && at.end <= chosen.data_end
                && metadata.overlapping(&at).is_none()
                && !placed.covers(&at, header.block_size)
        };
        if after_table.is_some_and(is_damaged) {
            report_defect(found, Defect::BatmapHeader { at: table_range.end })?;
        }
        let cut = TruncatedBlocks {
            file: &file,
            header: &header,
            placed: &placed,
            data_end: chosen.data_end,
            footer_follows: chosen.source != FooterSource::Front,
            disk: SectorRange::between(0, footer.sectors()),
        };
        let lost = cut.lost_ranges(found)?;
        let sparse = SparseImage { header, metadata, table, padding, placed, batmap, lost };
        Ok(Image { file, chosen, sparse: Some(sparse), notes: Vec::new() })
    }

    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the footer that was chosen from the two of the file.
    pub fn footer(&self) -> &Footer {
        &self.chosen.footer
    }

    /// Returns the defects that did not end the open; if there are many, only the first ones and the worst.
    pub fn notes(&self) -> &[Defect] {
        &self.notes
    }

    /// Returns the lost ranges of the disk, ascending; empty unless the open accepted lost sectors.
    pub fn lost(&self) -> &[SectorRange] {
        self.sparse.as_ref().map_or(&[], |s| &s.lost)
    }

    /// Returns the dynamic header; `None` for a fixed image.
    pub fn header(&self) -> Option<&DynamicHeader> {
        self.sparse.as_ref().map(|s| &s.header)
    }

    /// Returns the disk type: fixed, dynamic or differencing.
    pub fn kind(&self) -> DiskType {
        self.chosen.footer.disk_type
    }

    /// Returns the virtual size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.chosen.footer.current_size
    }

    /// Returns the image's UUID.
    pub fn uuid(&self) -> Uuid {
        self.chosen.footer.uuid
    }

    /// Returns the block size; `None` for a fixed image.
    #[inline]
    pub fn block_size(&self) -> Option<BlockSize> {
        self.sparse.as_ref().map(|s| s.header.block_size)
    }

    /// Returns the block table; `None` for a fixed image.
    #[inline]
    pub fn bat(&self) -> Option<&Bat> {
        self.sparse.as_ref().map(|s| &s.table)
    }

    /// Returns the byte offset of the block table in the file; `None` for a fixed image.
    pub fn table_offset(&self) -> Option<u64> {
        self.sparse.as_ref().map(|s| s.header.table_offset)
    }

    /// Returns the value that fills the block table's last sector after the last entry.
    pub(super) fn table_padding(&self) -> u32 {
        self.sparse.as_ref().map_or(bat::UNUSED, |s| s.padding)
    }

    /// Returns the offset at which the data must end: that of the trailing footer or, if it is missing, the file's
    /// length.
    pub fn data_end(&self) -> u64 {
        self.chosen.data_end
    }

    /// Returns the end of all blocks and metadata.
    pub fn used_end(&self) -> u64 {
        self.sparse.as_ref().map_or(self.chosen.data_end, |s| s.placed.end)
    }

    /// Returns the end of all metadata.
    pub fn metadata_end(&self) -> u64 {
        self.sparse.as_ref().map_or(0, |s| s.metadata.end())
    }

    /// Reads a block's bitmap from the file, as words of [`format::bitmap`](crate::format::bitmap); `None` if the block
    /// has no place. Bits after the end of the data are clear.
    ///
    /// # Errors
    /// `Io`.
    pub fn block_bitmap(&self, block: BlockIndex) -> Result<Option<Vec<u64>>> {
        let place = self.bat().and_then(|table| table.place(block));
        place.map(|place| self.read_bitmap(place)).transpose()
    }

    /// Returns the number of a block's sectors that lie within the disk.
    pub(super) fn sectors_on_disk(&self, block: BlockIndex) -> u32 {
        let Some(block_size) = self.block_size() else { return 0 };
        let left = (self.size() / SECTOR).saturating_sub(block_size.sectors_of(block).start());
        u32::try_from(left).unwrap_or(u32::MAX).min(block_size.sectors())
    }

    /// Reads the bitmap of the block at `place`. Bits after the end of the data are clear.
    pub(super) fn read_bitmap(&self, place: BlockPlace) -> Result<Vec<u64>> {
        let block_size = self.block_size().expect("it has blocks");
        let mut bytes = vec![0; block_size.bitmap_sectors() as usize * SECTOR_BYTES];
        let at = place.sector().byte_offset();
        let there = self.data_end().saturating_sub(at).min(bytes.len() as u64);
        self.file().read_at(&mut bytes[..usize::try_from(there).expect("a bitmap")], at)?;
        let mut words = vec![0; bitmap::words(block_size)];
        bitmap::decode(&bytes, &mut words);
        Ok(words)
    }

    /// Prefetches the bitmaps of those blocks of a range that have a place.
    pub fn prefetch_bitmaps(&self, range: SectorRange) {
        let (Some(table), Some(block_size)) = (self.bat(), self.block_size()) else { return };
        let range = range.clip(SectorRange::between(0, self.size() / SECTOR));
        if range.is_empty() {
            return;
        }
        let (mut block, last) = (block_size.block_at(range.start()), block_size.block_at(range.end() - 1));
        while let Some(next) = table.next_used(block).filter(|next| *next <= last) {
            let place = table.place(next).expect("it is used");
            self.file.prefetch(place.sector().byte_offset(), u64::from(block_size.bitmap_sectors()) * SECTOR);
            block = next.following();
        }
    }

    /// Returns whether the file ends with a valid footer of 512 bytes that is aligned to a sector.
    pub fn has_whole_tail_footer(&self) -> bool {
        self.chosen.source == FooterSource::Trailing && self.chosen.data_end.is_multiple_of(SECTOR)
    }

    /// Reads the session stamp before the trailing footer, and returns it with its byte offset. Returns `None` if there
    /// is none, or if blocks or metadata include that sector, because a guest may write bytes that look like a stamp.
    ///
    /// # Errors
    /// `Io`.
    pub fn stamp(&self) -> Result<Option<(SessionStamp, u64)>> {
        let Some(at) = self.stamp_offset() else { return Ok(None) };
        let mut bytes = [0; SECTOR_BYTES];
        self.file.read_at(&mut bytes, at)?;
        Ok(SessionStamp::decode(&bytes, self.uuid()).map(|stamp| (stamp, at)))
    }

    /// Returns the offset of the sector before the trailing footer, if it is free to contain a stamp.
    fn stamp_offset(&self) -> Option<u64> {
        let at = self.data_end().checked_sub(SECTOR)?;
        let used = self.used_end().max(self.metadata_end()).next_multiple_of(SECTOR);
        (self.block_size().is_some() && self.has_whole_tail_footer() && at >= used).then_some(at)
    }

    pub(super) fn sparse(&self) -> Option<&SparseImage> {
        self.sparse.as_ref()
    }

    /// Checks that the image may be written.
    ///
    /// # Errors
    /// `Refused`, with the defect that forbids writing.
    pub fn check_writable(&self) -> Result<()> {
        match self.notes.iter().find(|defect| defect.consequence() >= Consequence::NotWritable) {
            None => Ok(()),
            Some(defect) => {
                let what = format!("the image may only be read: {defect}");
                Err(Error::new(ErrorKind::Refused, what).at_path(self.file.path()))
            }
        }
    }
}

/// Returns the defects of a footer that forbid writing the image.
fn write_blockers(chosen: &ChosenFooter) -> impl Iterator<Item = Defect> {
    let at = chosen.data_end;
    let saved = (chosen.footer.saved_state != 0).then_some(Defect::SavedState { at });
    saved.into_iter().chain(chosen.footer.is_hidden().then_some(Defect::Hidden { at }))
}

/// Passes a defect that ends an examination to `found`, and returns the error for it.
fn fatal(file: &File, found: &mut OnDefect<'_>, defect: Defect) -> Error {
    match found(defect.clone()) {
        ControlFlow::Break(error) => error,
        ControlFlow::Continue(()) => Error::from(defect).at_path(file.path()),
    }
}
