//! An image that nobody else has open, to change its structure: its size, its block table, the places of its blocks.
//!
//! Every method is a step from one valid image to another; what must be durable before what is said there. Steps put
//! together, with the points at which tests kill them, are the verbs' own: `resize.rs` and `compact.rs`.
//!
//! What is not there yet or not any more lies where nothing refers to it: behind the blocks, or in a gap between them.
//! So no step overwrites anything that counts, but for these, each one sector: a footer, the header's first sector
//! (which holds all that is changed here), a sector of the block table, where any mixture of old and new entries shows
//! the same disk.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::PoisonError;

use super::open::Image;
use super::recover::recover;
use crate::error::{Error, ErrorKind, Result};
use crate::format::batmap::{self, BatmapHeader, Presence};
use crate::format::{DiskType, DynamicHeader, Footer, Metadata, Part, bat, layout};
use crate::storage::{Buffer, File};
use crate::units::{BlockSize, SECTOR, SECTOR_BYTES};

/// Bytes of a block table that are written at once.
const TABLE_CHUNK: u64 = 1 << 20;

/// An image locked for us alone, recovered as for writing.
pub struct Offline {
    file: File,
    footer: Footer,
    /// Byte offset of the trailing footer.
    tail: u64,
    shape: Option<Shape>,
}

/// What images with a block table have besides.
pub(super) struct Shape {
    pub(super) header: DynamicHeader,
    metadata: Metadata,
    batmap: Option<BatmapHeader>,
    /// What fills the table's last sector behind the last entry.
    padding: u32,
    /// The file sectors at which the blocks begin, also those of blocks behind the end of the disk.
    pub(super) places: BTreeMap<u32, u32>,
}

impl Offline {
    /// Takes an opened image that is locked exclusively. What an unclean end left behind is recovered.
    ///
    /// # Errors
    /// As `Writable::new`.
    pub fn new(image: &Image) -> Result<Offline> {
        image.check_writable()?;
        let (file, footer) = (image.file().clone(), image.footer().clone());
        let Some(sparse) = image.sparse() else {
            return Ok(Offline { file, footer, tail: image.data_end(), shape: None });
        };
        let room = recover(image, sparse.header.block_size, &[])?.room.into_inner();
        let tail = room.unwrap_or_else(PoisonError::into_inner).end * SECTOR;
        let shape = Shape {
            header: sparse.header.clone(),
            metadata: sparse.metadata.clone(),
            batmap: sparse.batmap.clone(),
            padding: image.table_padding(),
            places: sparse.table.used().collect(),
        };
        Ok(Offline { file, footer, tail, shape: Some(shape) })
    }

    /// The same image, opened and recovered again.
    ///
    /// # Errors
    /// As [`Offline::new`].
    pub(super) fn reopened(&self) -> Result<Offline> {
        Offline::new(&Image::open(self.file.clone())?)
    }

    /// Its file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fixed, dynamic or differencing.
    pub fn kind(&self) -> DiskType {
        self.footer.disk_type
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.footer.current_size
    }

    /// Size of a block; `None` for a fixed image.
    pub fn block_size(&self) -> Option<BlockSize> {
        self.shape.as_ref().map(|s| s.header.block_size)
    }

    /// The blocks of the disk that have a place, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = u32> {
        let end = self.blocks_of_disk();
        self.shape.iter().flat_map(|s| s.places.keys()).copied().take_while(move |block| u64::from(*block) < end)
    }

    /// Byte offsets of a block's bitmap and of its data; `None` where it has no place.
    pub fn block(&self, block: u32) -> Option<(u64, u64)> {
        let shape = self.shape.as_ref()?;
        let place = u64::from(*shape.places.get(&block)?);
        Some((place * SECTOR, (place + u64::from(shape.header.block_size.bitmap_sectors())) * SECTOR))
    }

    /// The bitmap of a block that has a place, a bit per sector.
    ///
    /// # Errors
    /// `Io`.
    pub fn bitmap(&self, block: u32) -> Result<Vec<u64>> {
        let (at, data) = self.block(block).expect("only blocks with a place are asked for");
        let mut bytes = vec![0; usize::try_from(data - at).expect("a bitmap")];
        self.file.read_at(&mut bytes, at)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect())
    }

    pub(super) fn shape(&self) -> &Shape {
        self.shape.as_ref().expect("it has a block table")
    }

    pub(super) fn shape_mut(&mut self) -> &mut Shape {
        self.shape.as_mut().expect("it has a block table")
    }

    pub(super) fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Byte offset of the trailing footer.
    pub(super) fn tail(&self) -> u64 {
        self.tail
    }

    /// Blocks of the disk, with a place or without.
    pub(super) fn blocks_of_disk(&self) -> u64 {
        self.block_size().map_or(0, |size| size.blocks_for(self.footer.sectors()))
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync()
    }

    /// The first byte behind all blocks and metadata, whole sectors.
    pub(super) fn used_end(&self) -> u64 {
        let shape = self.shape();
        let stride = u64::from(shape.header.block_size.stride_sectors());
        let blocks = shape.places.values().max().map_or(0, |&place| (u64::from(place) + stride) * SECTOR);
        shape.metadata.end().next_multiple_of(SECTOR).max(blocks)
    }

    /// The bytes between metadata and blocks before `end` that nothing refers to, ascending.
    pub(super) fn gaps(&self, end: u64) -> Vec<Range<u64>> {
        let shape = self.shape();
        let stride = u64::from(shape.header.block_size.stride_sectors());
        let blocks = shape.places.values().map(|&p| u64::from(p) * SECTOR..(u64::from(p) + stride) * SECTOR);
        let mut taken: Vec<_> = shape.metadata.extents().iter().map(|e| e.range.clone()).chain(blocks).collect();
        taken.sort_unstable_by_key(|range| range.start);
        let (mut gaps, mut at) = (Vec::new(), 0);
        for range in taken.into_iter().chain(std::iter::once(end..end)) {
            let gap = at..range.start.min(end) / SECTOR * SECTOR;
            if gap.start < gap.end {
                gaps.push(gap);
            }
            at = at.max(range.end.next_multiple_of(SECTOR));
        }
        gaps
    }

    // The file's end.

    /// Makes the file longer where `end` lies behind the trailing footer, so that there is zero room before `end`.
    ///
    /// The new footer is durable before the old one is wiped: one of them is whole at every moment.
    ///
    /// # Errors
    /// `NoSpace`: the file is as it was; `Io`.
    pub(super) fn extend(&mut self, end: u64) -> Result<()> {
        if end <= self.tail {
            return Ok(());
        }
        let (old, end) = (self.tail, end.max(self.tail + SECTOR));
        let extended = match self.file.allocate(old, end + SECTOR - old) {
            Err(e) if e.kind() != ErrorKind::Unsupported => Err(e),
            _ => self.file.write_at(&self.footer.encode(), end),
        };
        // ext4 keeps what a failed fallocate got; cutting to the length of before gives it back.
        extended.inspect_err(|_| drop(self.file.set_len(old + SECTOR)))?;
        self.sync()?;
        self.file.write_at(&[0; SECTOR_BYTES], old)?;
        self.sync()?;
        self.tail = end;
        Ok(())
    }

    /// Writes the footer at byte `at`, too, where nothing that counts is. Durable when it returns. Where that is behind
    /// the file's end, it is the trailing one from then on.
    ///
    /// # Errors
    /// `NoSpace`: the file is as it was; `Io`.
    pub(super) fn put_second_tail(&mut self, at: u64) -> Result<()> {
        if at == self.tail {
            return Ok(());
        }
        let len = self.file.stat()?.len;
        self.file.write_at(&self.footer.encode(), at).inspect_err(|_| drop(self.file.set_len(len)))?;
        self.sync()?;
        self.tail = self.tail.max(at);
        Ok(())
    }

    /// Cuts the file behind a footer written before.
    pub(super) fn use_second_tail(&mut self, at: u64) -> Result<()> {
        if at < self.tail {
            self.file.set_len(at + SECTOR)?;
            self.sync()?;
            self.tail = at;
        }
        Ok(())
    }

    /// Sees to it that the trailing footer is one sector: in a file of an odd length it is not, and could be torn.
    pub(super) fn align_tail(&mut self) -> Result<()> {
        match self.tail % SECTOR {
            0 => Ok(()),
            _ => self.put_second_tail(self.tail.next_multiple_of(SECTOR) + SECTOR),
        }
    }

    /// Makes the file end right behind what is in use. The new footer is durable before the file is cut.
    pub(super) fn cut(&mut self) -> Result<()> {
        let end = if self.shape.is_some() { self.used_end() } else { self.size() };
        if self.tail == end {
            return Ok(());
        }
        self.file.write_at(&self.footer.encode(), end)?;
        self.sync()?;
        self.file.set_len(end + SECTOR)?;
        self.sync()?;
        self.tail = end;
        Ok(())
    }

    /// Takes away the copy of the footer at the start: two whole ones that differ would forbid writing, a missing one is
    /// renewed by any writable open.
    pub(super) fn wipe_front(&mut self) -> Result<()> {
        self.file.write_at(&[0; SECTOR_BYTES], 0)?;
        self.sync()
    }

    /// Replaces the trailing footer, the one that counts: one sector.
    pub(super) fn put_tail(&mut self, footer: Footer) -> Result<()> {
        self.file.write_at(&footer.encode(), self.tail)?;
        self.sync()?;
        self.footer = footer;
        Ok(())
    }

    /// Brings back the copy of the footer at the start.
    pub(super) fn put_front(&mut self) -> Result<()> {
        self.file.write_at(&self.footer.encode(), 0)?;
        self.sync()
    }

    // The block table.

    /// Writes the sectors of the table that hold the entries of `blocks`, which lie in the table. Not synced.
    pub(super) fn write_entries(&self, blocks: impl IntoIterator<Item = u32>) -> Result<()> {
        let sectors: BTreeSet<u32> = blocks.into_iter().map(bat::sector_of).collect();
        let shape = self.shape();
        for sector in sectors {
            let bytes = shape.entries(sector, shape.header.entries, shape.padding);
            self.file.write_at(&bytes, shape.header.table_offset + u64::from(sector) * SECTOR)?;
        }
        Ok(())
    }

    /// Forgets the places of blocks. Durable when it returns: from then on their room may be used for others.
    pub(super) fn drop_blocks(&mut self, blocks: &[u32]) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        for block in blocks {
            self.shape_mut().places.remove(block);
        }
        let entries = self.shape().header.entries;
        self.write_entries(blocks.iter().copied().filter(|block| *block < entries))?;
        self.sync()
    }

    /// The blocks behind the end of the disk that have a place all the same.
    pub(super) fn beyond(&self) -> Vec<u32> {
        let (shape, blocks) = (self.shape(), self.blocks_of_disk());
        shape.places.keys().copied().filter(|block| u64::from(*block) >= blocks).collect()
    }

    /// Whether the table can have `entries` where it is.
    pub(super) fn has_room_for(&self, entries: u32) -> bool {
        let shape = self.shape();
        let (old, new) = (bat::bytes(shape.header.entries), bat::bytes(entries));
        let at = shape.header.table_offset;
        let wanted = at + old..at + new.max(old);
        let stride = u64::from(shape.header.block_size.stride_sectors()) * SECTOR;
        let mut blocks = shape.places.values().map(|&place| u64::from(place) * SECTOR);
        let free = shape.metadata.overlapping(&wanted).is_none()
            && !blocks.any(|block| block < wanted.end && wanted.start < block + stride);
        wanted.is_empty() || free
    }

    /// Writes what the table will have more when it has `entries`, behind what it has now. Durable when it returns.
    pub(super) fn write_more_entries(&mut self, entries: u32) -> Result<()> {
        let shape = self.shape();
        let (at, end) = (shape.header.table_offset, shape.header.table_offset + bat::bytes(entries));
        let (first, last) = (bat::sector_of(shape.header.entries), entries.div_ceil(bat::ENTRIES_PER_SECTOR));
        self.extend(end)?;
        let shape = self.shape();
        for sector in first..last {
            let bytes = shape.entries(sector, entries, bat::UNUSED);
            self.file.write_at(&bytes, at + u64::from(sector) * SECTOR)?;
        }
        self.sync()
    }

    /// Bytes that a table of `entries` takes elsewhere, with XenServer's batmap where the image has one: whole pages.
    pub(super) fn table_room(&self, entries: u32) -> u64 {
        let batmap = if self.has_batmap() { SECTOR + self.map_bytes(entries) } else { 0 };
        (bat::bytes(entries) + batmap).next_multiple_of(layout::PAGE)
    }

    /// Writes the table anew, with `entries`, at byte `at`, where nothing is. Behind it an empty batmap, where the image
    /// has one: a hint that says nothing is never wrong, whatever becomes of blocks and size. Durable when it returns,
    /// and of no meaning before [`Offline::use_table`].
    pub(super) fn write_table(&mut self, at: u64, entries: u32) -> Result<()> {
        let room = self.table_room(entries);
        self.extend(at + room)?;
        self.file.punch(at, room)?;
        let (shape, bytes) = (self.shape(), bat::bytes(entries));
        let end = if self.has_batmap() { bytes } else { room };
        let mut chunk = Buffer::zeroed(usize::try_from(end.min(TABLE_CHUNK)).expect("a chunk"));
        for start in (0..end).step_by(chunk.len()) {
            let len = usize::try_from((end - start).min(TABLE_CHUNK)).expect("a chunk");
            for (sector, to) in (start / SECTOR..).zip(chunk[..len].as_chunks_mut::<SECTOR_BYTES>().0) {
                *to = shape.entries(u32::try_from(sector).expect("a table's sector"), entries, bat::UNUSED);
            }
            self.file.write_at(&chunk[..len], at + start)?;
        }
        if self.has_batmap() {
            let bytes = self.empty_batmap(at + bytes, entries).encode();
            self.file.write_at(&bytes, at + bat::bytes(entries))?;
        }
        self.sync()
    }

    /// Makes the header name a table of `entries` at `at`, and gives back the room of the old one. Durable when it
    /// returns.
    pub(super) fn use_table(&mut self, at: u64, entries: u32) -> Result<()> {
        let old: Vec<Range<u64>> = self.table_extents().collect();
        let batmap = (at != self.shape().header.table_offset && self.has_batmap())
            .then(|| self.empty_batmap(at + bat::bytes(entries), entries));
        let shape = self.shape_mut();
        (shape.header.table_offset, shape.header.entries) = (at, entries);
        shape.padding = bat::UNUSED;
        if batmap.is_some() {
            shape.batmap = batmap;
        }
        let bytes = shape.header.encode();
        // All that has changed, and the sum, lies in the first of the header's two sectors.
        self.file.write_at(&bytes[..SECTOR_BYTES], self.footer.data_offset)?;
        self.sync()?;
        let len = self.tail + SECTOR;
        let shape = self.shape();
        let metadata = Metadata::new(&self.footer, &shape.header, shape.batmap.as_ref(), len).0;
        self.shape_mut().metadata = metadata;
        for range in old {
            self.punch_unused(range)?;
        }
        Ok(())
    }

    /// Gives back what nothing refers to of a range.
    pub(super) fn punch_unused(&self, range: Range<u64>) -> Result<()> {
        for gap in self.gaps(self.tail) {
            let part = gap.start.max(range.start)..gap.end.min(range.end);
            if part.start < part.end {
                self.file.punch(part.start, part.end - part.start)?;
            }
        }
        Ok(())
    }

    /// What moves when the table moves.
    fn table_extents(&self) -> impl Iterator<Item = Range<u64>> {
        let parts = [Part::Table, Part::BatmapHeader, Part::Batmap];
        let extents = self.shape().metadata.extents().iter();
        extents.filter(move |e| parts.contains(&e.part)).map(|e| e.range.clone())
    }

    // XenServer's batmap.

    pub(super) fn has_batmap(&self) -> bool {
        self.shape().batmap.is_some() || batmap::presence(&self.footer) == Presence::Present
    }

    /// Whether there is a batmap that says something, or may.
    pub(super) fn batmap_speaks(&self) -> Result<bool> {
        if !self.has_batmap() {
            return Ok(false);
        }
        let Some(region) = self.shape().metadata.extents().iter().find(|e| e.part == Part::Batmap) else {
            return Ok(true); // a broken one
        };
        let mut map =
            vec![0; usize::try_from((region.range.end - region.range.start).min(TABLE_CHUNK)).expect("small")];
        self.file.read_at(&mut map, region.range.start)?;
        Ok(map.len() as u64 != region.range.end - region.range.start || map.iter().any(|byte| *byte != 0))
    }

    /// Bytes of a batmap for `entries` blocks, whole sectors: as many as the sum of any disk of so many blocks covers.
    fn map_bytes(&self, entries: u32) -> u64 {
        let largest = u64::from(entries).saturating_mul(self.shape().header.block_size.bytes().into());
        u64::from(entries.div_ceil(8)).next_multiple_of(SECTOR).max(BatmapHeader::summed_bytes(largest))
    }

    /// The header, itself at byte `at`, of a batmap right behind it that calls no block whole.
    fn empty_batmap(&self, at: u64, entries: u32) -> BatmapHeader {
        let fresh = || BatmapHeader {
            offset: 0,
            sectors: 0,
            version: 0x0001_0002,
            checksum: 0,
            marker: 0,
            keyhash: 0,
            rest: [0; 482],
        };
        let mut header = self.shape().batmap.clone().unwrap_or_else(fresh);
        header.offset = at + SECTOR;
        header.sectors = u32::try_from(self.map_bytes(entries) / SECTOR).expect("a bit a block");
        header.checksum = header.checksum_of(&[]);
        header
    }

    /// # Errors
    /// `NoSpace` with the reason.
    pub(super) fn full(&self, why: &str) -> Error {
        Error::new(ErrorKind::NoSpace, why).at_path(self.file.path())
    }
}

impl Shape {
    /// Sector `sector` of a table of so many entries; behind the last one `padding`.
    fn entries(&self, sector: u32, entries: u32, padding: u32) -> [u8; SECTOR_BYTES] {
        let first = sector * bat::ENTRIES_PER_SECTOR;
        let mut bytes = [0; SECTOR_BYTES];
        for (n, to) in (0..).zip(bytes.as_chunks_mut::<4>().0) {
            let block = first + n;
            let entry = self.places.get(&block).copied().unwrap_or(bat::UNUSED);
            *to = if block < entries { entry } else { padding }.to_be_bytes();
        }
        bytes
    }
}
