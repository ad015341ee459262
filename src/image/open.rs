//! Opening: reads what a file says of itself, and believes none of it before it was held against the rules (O1 to O16).
//!
//! Reads the two footers, the header, the block table and, of XenServer's images, the batmap's header; nothing else, and
//! nothing is mapped. What breaks a rule but harms nobody becomes a note. `check` walks the same way and goes on where an
//! open stops.

use std::ops::ControlFlow;

use uuid::Uuid;

use super::bat::Bat;
use super::batmap::read_bitmap;
use super::standing::place_of;
use crate::error::{Error, ErrorKind, Result};
use crate::format::batmap::{self, BatmapHeader, Presence};
use crate::format::entries::{EntryRules, Placed, check_entries};
use crate::format::extents::{check_header_place, check_table};
use crate::format::locator::{Candidate, candidates};
use crate::format::{
    Chosen, Defect, DiskType, DynamicHeader, Footer, FooterSource, Metadata, Platform, Severity, Stamp, bat, choose,
};
use crate::storage::File;
use crate::units::{BlockSize, SECTOR, SECTOR_BYTES, SectorRange};

/// Bytes of the block table read at once: they are passed while the processor's cache has them, and the memory for them is
/// not fetched from the host anew for every file of a chain.
const TABLE_CHUNK: u64 = 64 << 10;

/// An opened image: what it is, where its blocks are. Sound by the rules.
#[derive(Debug)]
pub struct Image {
    file: File,
    chosen: Chosen,
    sparse: Option<Sparse>,
}

/// What images with a block table have besides.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) header: DynamicHeader,
    pub(super) metadata: Metadata,
    pub(super) table: Bat,
    /// What fills the table's last sector behind the last entry.
    padding: u32,
    /// The blocks in the order of their places, and where they end.
    pub(super) placed: Placed,
    /// XenServer's batmap.
    pub(super) batmap: Option<BatmapHeader>,
}

/// What a broken rule means for an open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Weight {
    /// It can go on.
    Note,
    /// The image must not be used.
    Fatal,
}

/// Is told of each broken rule.
pub(super) type Found<'a> = dyn FnMut(Defect, Weight) -> ControlFlow<Error> + 'a;

impl Image {
    /// Opens the image in a file.
    ///
    /// # Errors
    /// `Invalid` with the first broken rule and its offset; `Refused` for encrypted images; `Io`.
    pub fn open(file: File) -> Result<Image> {
        let path = file.path().to_path_buf();
        Image::examine(file, &mut |defect, weight| match weight {
            Weight::Fatal => ControlFlow::Break(Error::from(defect).at_path(&path)),
            Weight::Note => {
                log::debug!("{}: {defect}", path.display());
                ControlFlow::Continue(())
            }
        })
    }

    /// Opens the image and tells `found` each broken rule. It ends where `found` breaks, or where nothing further can be
    /// read.
    pub(super) fn examine(file: File, found: &mut Found<'_>) -> Result<Image> {
        let len = file.stat()?.len;
        let chosen = read_footers(&file, len)?.map_err(|d| fatal(&file, found, d))?;
        for defect in &chosen.notes {
            tell(found, defect.clone(), Weight::Note)?;
        }
        if chosen.footer.disk_type == DiskType::Fixed {
            return Ok(Image { file, chosen, sparse: None });
        }
        let footer = &chosen.footer;
        check_header_place(footer, len).map_err(|d| fatal(&file, found, d))?;
        let mut bytes = [0; 1024];
        file.read_at(&mut bytes, footer.data_offset)?;
        let header = DynamicHeader::decode(&bytes);
        let header = header.map_err(|d| fatal(&file, found, d.placed(footer.data_offset)))?;
        let table_range = check_table(footer, &header, len).map_err(|d| fatal(&file, found, d))?;
        let batmap = read_batmap(&file, footer, &header, len)?;
        if batmap.as_ref().is_some_and(BatmapHeader::encrypted) {
            return Err(fatal(&file, found, Defect::Encrypted { at: table_range.end }));
        }
        let (metadata, notes) = Metadata::new(footer, &header, batmap.as_ref(), len);
        for defect in notes {
            tell(found, defect, Weight::Note)?;
        }
        let (table, padding) = read_table(&file, &header)?;
        let rules = EntryRules::new(&chosen, &header, &metadata);
        let placed = check_entries(table.used(), &rules, |defect| {
            let weight = if defect.severity() == Severity::Corruption { Weight::Fatal } else { Weight::Note };
            found(defect, weight)
        })?;
        Ok(Image { file, chosen, sparse: Some(Sparse { header, metadata, table, padding, placed, batmap }) })
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The footer that counts.
    pub fn footer(&self) -> &Footer {
        &self.chosen.footer
    }

    /// What is wrong with the footers but does not prevent reading.
    pub fn notes(&self) -> &[Defect] {
        &self.chosen.notes
    }

    /// The dynamic header; `None` for a fixed image.
    pub fn header(&self) -> Option<&DynamicHeader> {
        self.sparse.as_ref().map(|s| &s.header)
    }

    /// Fixed, dynamic or differencing.
    pub fn kind(&self) -> DiskType {
        self.chosen.footer.disk_type
    }

    /// Virtual size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.chosen.footer.current_size
    }

    /// Its identity.
    pub fn uuid(&self) -> Uuid {
        self.chosen.footer.uuid
    }

    /// Size of a block; `None` for a fixed image.
    #[inline]
    pub fn block_size(&self) -> Option<BlockSize> {
        self.sparse.as_ref().map(|s| s.header.block_size)
    }

    /// The block table; `None` for a fixed image.
    #[inline]
    pub fn bat(&self) -> Option<&Bat> {
        self.sparse.as_ref().map(|s| &s.table)
    }

    /// Byte offset of the block table in the file.
    pub fn table_offset(&self) -> Option<u64> {
        self.sparse.as_ref().map(|s| s.header.table_offset)
    }

    /// What fills the block table's last sector behind the last entry.
    pub(super) fn table_padding(&self) -> u32 {
        self.sparse.as_ref().map_or(bat::UNUSED, |s| s.padding)
    }

    /// The byte at which the data must end: the offset of the trailing footer, or the file's length where it is missing.
    pub fn data_end(&self) -> u64 {
        self.chosen.data_end
    }

    /// First byte behind all blocks and metadata.
    pub fn used_end(&self) -> u64 {
        self.sparse.as_ref().map_or(self.chosen.data_end, |s| s.placed.end)
    }

    /// First byte behind all metadata.
    pub fn metadata_end(&self) -> u64 {
        self.sparse.as_ref().map_or(0, |s| s.metadata.end())
    }

    /// The bits of a block's sectors, as words of [`format::bitmap`](crate::format::bitmap), from the file; `None` where the
    /// block has no place. What the file does not hold of them is clear.
    ///
    /// # Errors
    /// `Io`.
    pub fn sector_bits(&self, block: u32) -> Result<Option<Vec<u64>>> {
        let place = self.bat().and_then(|table| table.place(block));
        place.map(|place| read_bitmap(self, place)).transpose()
    }

    /// Says that the bitmaps of the blocks that have a place and lie in a range are going to be read.
    pub fn prefetch_bits(&self, range: SectorRange) {
        let (Some(table), Some(block_size)) = (self.bat(), self.block_size()) else { return };
        let range = range.clip(SectorRange::between(0, self.size() / SECTOR));
        if range.is_empty() {
            return;
        }
        let (mut block, last) = (block_size.block_of(range.start()), block_size.block_of(range.end() - 1));
        while let Some(next) = table.next_used(block).filter(|next| *next <= last) {
            let place = table.place(next).expect("it is used");
            self.file.prefetch(u64::from(place) * SECTOR, u64::from(block_size.bitmap_sectors()) * SECTOR);
            block = next + 1;
        }
    }

    /// Whether the file ends with a footer of 512 bytes that fills a sector.
    pub fn has_whole_tail_footer(&self) -> bool {
        self.chosen.source == FooterSource::TailFull && self.chosen.data_end.is_multiple_of(SECTOR)
    }

    /// The stamp before the trailing footer, and its byte offset; `None` if blocks or metadata reach that far, as a guest may
    /// write what looks like a stamp, or if there is none.
    ///
    /// # Errors
    /// `Io`.
    pub fn stamp(&self) -> Result<Option<(Stamp, u64)>> {
        let Some(at) = place_of(self) else { return Ok(None) };
        let mut bytes = [0; SECTOR_BYTES];
        self.file.read_at(&mut bytes, at)?;
        Ok(Stamp::decode(&bytes, self.uuid()).map(|stamp| (stamp, at)))
    }

    pub(super) fn sparse(&self) -> Option<&Sparse> {
        self.sparse.as_ref()
    }

    /// Where the parent may be, in the order to try; empty for a root.
    ///
    /// # Errors
    /// `Io`; texts that no path comes out of are skipped.
    pub fn parent_candidates(&self) -> Result<Vec<Candidate>> {
        let Some(sparse) = self.sparse.as_ref().filter(|_| self.kind() == DiskType::Differencing) else {
            return Ok(Vec::new());
        };
        let texts = self.parent_locators()?;
        let texts = texts.iter().map(|(slot, platform, text)| (*slot, *platform, text.as_slice()));
        let (found, notes) = candidates(texts, &sparse.header.parent_name);
        for note in notes {
            log::debug!("{}: {note}", self.file.path().display());
        }
        Ok(found)
    }

    /// The bytes of each parent locator that passes the rules, with its number and platform; none for a root.
    ///
    /// # Errors
    /// `Io`.
    pub fn parent_locators(&self) -> Result<Vec<(usize, Platform, Vec<u8>)>> {
        let mut texts = Vec::new();
        let Some(sparse) = self.sparse.as_ref().filter(|_| self.kind() == DiskType::Differencing) else {
            return Ok(texts);
        };
        for (slot, locator) in sparse.header.locators.iter().enumerate() {
            if !sparse.metadata.has_locator(slot) {
                continue;
            }
            if let Ok(Some(range)) = locator.text_range(slot, self.data_end().max(SECTOR)) {
                let len = usize::try_from(range.end - range.start).expect("at most 4096 by the rules");
                let mut text = vec![0; len];
                self.file.read_at(&mut text, range.start)?;
                texts.push((slot, locator.platform(), text));
            }
        }
        Ok(texts)
    }

    /// # Errors
    /// `Refused` where its own bytes forbid writing (O3, O16).
    pub(super) fn check_writable(&self) -> Result<()> {
        let refuse = |why: &str| Err(Error::new(ErrorKind::Refused, why).at_path(self.file.path()));
        if !self.chosen.agree {
            return refuse("its two footers contradict each other: run `diffdisk check` before it is written");
        }
        if self.chosen.footer.saved_state != 0 {
            return refuse("a suspended machine depends on this disk: it may only be read");
        }
        if self.chosen.footer.hidden() {
            return refuse("it is hidden, as the parent of a snapshot is: it may only be read");
        }
        Ok(())
    }
}

fn tell(found: &mut Found<'_>, defect: Defect, weight: Weight) -> Result<()> {
    match found(defect, weight) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}

/// The error of a rule whose breach ends an examination.
fn fatal(file: &File, found: &mut Found<'_>, defect: Defect) -> Error {
    match found(defect.clone(), Weight::Fatal) {
        ControlFlow::Break(error) => error,
        ControlFlow::Continue(()) => Error::from(defect).at_path(file.path()),
    }
}

/// Reads both ends and chooses.
pub(super) fn read_footers(file: &File, len: u64) -> Result<Result<Chosen, Defect>> {
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

/// The header of XenServer's batmap, where there is one that can be decoded.
fn read_batmap(file: &File, footer: &Footer, header: &DynamicHeader, len: u64) -> Result<Option<BatmapHeader>> {
    let Some(at) = batmap::header_offset(header).filter(|at| at.checked_add(SECTOR).is_some_and(|end| end <= len))
    else {
        return Ok(None);
    };
    if batmap::presence(footer) == Presence::Absent {
        return Ok(None);
    }
    let mut bytes = [0; SECTOR_BYTES];
    file.read_at(&mut bytes, at)?;
    Ok(BatmapHeader::decode(&bytes).ok())
}

/// The table's entries, and what fills its last sector. Its place and size were checked against the file.
fn read_table(file: &File, header: &DynamicHeader) -> Result<(Bat, u32)> {
    let table = Bat::new(header.entries);
    let bytes = bat::bytes(header.entries);
    let mut chunk = vec![0; usize::try_from(bytes.min(TABLE_CHUNK)).expect("a chunk")];
    let (mut at, mut block, mut padding) = (0, 0u32, bat::UNUSED);
    while at < bytes {
        let len = usize::try_from((bytes - at).min(TABLE_CHUNK)).expect("a chunk");
        file.read_at(&mut chunk[..len], header.table_offset + at)?;
        for sector in chunk[..len].chunks(SECTOR_BYTES) {
            // Most of a large disk's table is unused, and 64 layers have 64 of them: those are passed at memory's speed.
            if bat::is_unused(sector) {
                block = block.saturating_add(bat::ENTRIES_PER_SECTOR);
                continue;
            }
            for entry in bat::decode(sector) {
                match block < header.entries {
                    true if entry != bat::UNUSED => table.set(block, entry),
                    true => {}
                    false => padding = entry,
                }
                block = block.saturating_add(1);
            }
        }
        at += len as u64;
    }
    Ok((table, padding))
}
