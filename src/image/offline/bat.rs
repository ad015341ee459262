//! Changes entries of an [`Offline`] image's block table, and moves or extends the table.
//!
//! XenServer's batmap follows the table in the file and moves with it.

use std::collections::BTreeSet;
use std::ops::Range;

use super::offline_image::{Offline, OfflineSparse};
use crate::error::Result;
use crate::format::batmap::{self, BatmapHeader, BatmapPresence};
use crate::format::{MetadataMap, MetadataPart, bat, layout};
use crate::storage::Buffer;
use crate::units::{BlockIndex, SECTOR, SECTOR_BYTES};

/// Bytes of a table or a batmap per read or write.
const CHUNK: u64 = 1 << 20;

impl Offline {
    /// Writes the table sectors that contain the entries of `blocks`, all of which the table has. Does not sync.
    pub(super) fn write_entries(&self, blocks: impl IntoIterator<Item = BlockIndex>) -> Result<()> {
        let sectors: BTreeSet<u32> = blocks.into_iter().map(bat::sector_of).collect();
        let shape = self.sparse();
        for sector in sectors {
            let bytes = shape.entries(sector, shape.header.entries, shape.padding);
            self.file().write_at(&bytes, shape.header.table_offset + u64::from(sector) * SECTOR)?;
        }
        Ok(())
    }

    /// Drops the places of blocks. Durable on return, so their space may be reused then.
    pub(super) fn drop_blocks(&mut self, blocks: &[BlockIndex]) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        for block in blocks {
            self.sparse_mut().places.remove(block);
        }
        let entries = self.sparse().header.entries;
        self.write_entries(blocks.iter().copied().filter(|block| block.get() < entries))?;
        self.sync()
    }

    /// Returns the blocks after the end of the disk that have a place.
    pub(super) fn blocks_beyond_disk(&self) -> Vec<BlockIndex> {
        let (shape, blocks) = (self.sparse(), self.blocks_of_disk());
        shape.places.keys().copied().filter(|block| !block.is_within(blocks)).collect()
    }

    /// Returns whether the table can grow to `entries` in place.
    pub(super) fn has_room_for(&self, entries: u32) -> bool {
        let shape = self.sparse();
        let (old, new) = (bat::bytes(shape.header.entries), bat::bytes(entries));
        let at = shape.header.table_offset;
        let wanted = at + old..at + new.max(old);
        let mut blocks = shape.places.values().map(|place| place.byte_range(shape.header.block_size));
        let free = shape.metadata.overlapping(&wanted).is_none()
            && !blocks.any(|block| block.start < wanted.end && wanted.start < block.end);
        wanted.is_empty() || free
    }

    /// Writes the entries of the blocks in `made`, and unused entries after the present table up to `entries`. Durable
    /// on return.
    pub(super) fn write_more_entries(&mut self, entries: u32, made: &[BlockIndex]) -> Result<()> {
        let (at, old) = (self.sparse().header.table_offset, self.sparse().header.entries);
        let more = old / bat::ENTRIES_PER_SECTOR..entries.div_ceil(bat::ENTRIES_PER_SECTOR);
        let padding = if entries > old { bat::UNUSED } else { self.sparse().padding };
        let mut sectors: BTreeSet<u32> = made.iter().copied().map(bat::sector_of).collect();
        sectors.extend(more.filter(|_| entries > old));
        self.extend(at + bat::bytes(entries))?;
        for sector in sectors {
            let bytes = self.sparse().entries(sector, entries, padding);
            self.file().write_at(&bytes, at + u64::from(sector) * SECTOR)?;
        }
        self.sync()
    }

    /// Returns the space for a moved table of `entries`, with XenServer's batmap if the image has one, in bytes, whole
    /// pages.
    pub(super) fn table_space(&self, entries: u32) -> u64 {
        let batmap = if self.has_batmap() { SECTOR + self.map_bytes(entries) } else { 0 };
        (bat::bytes(entries) + batmap).next_multiple_of(layout::PAGE)
    }

    /// Writes a copy of the table, with `entries` entries, at byte `at`, in unreferenced space. If the image has a
    /// batmap, an empty one follows: without claims it stays right when blocks and size change. Durable on return;
    /// without effect before [`Offline::use_table`].
    pub(super) fn write_table(&mut self, at: u64, entries: u32) -> Result<()> {
        let room = self.table_space(entries);
        self.extend(at + room)?;
        self.file().punch_hole(at, room)?;
        let (shape, bytes) = (self.sparse(), bat::bytes(entries));
        let end = if self.has_batmap() { bytes } else { room };
        let mut chunk = Buffer::zeroed(usize::try_from(end.min(CHUNK)).expect("a chunk"));
        for start in (0..end).step_by(chunk.len()) {
            let len = usize::try_from((end - start).min(CHUNK)).expect("a chunk");
            for (sector, to) in (start / SECTOR..).zip(chunk[..len].as_chunks_mut::<SECTOR_BYTES>().0) {
                *to = shape.entries(u32::try_from(sector).expect("a table's sector"), entries, bat::UNUSED);
            }
            self.file().write_at(&chunk[..len], at + start)?;
        }
        if self.has_batmap() {
            let bytes = self.empty_batmap(at + bytes, entries).encode();
            self.file().write_at(&bytes, at + bat::bytes(entries))?;
        }
        self.sync()
    }

    /// Switches the header to a table of `entries` at byte `at`, durably, and frees the space of the old table.
    pub(super) fn use_table(&mut self, at: u64, entries: u32) -> Result<()> {
        let old: Vec<Range<u64>> = self.table_extents().collect();
        let batmap = (at != self.sparse().header.table_offset && self.has_batmap())
            .then(|| self.empty_batmap(at + bat::bytes(entries), entries));
        let shape = self.sparse_mut();
        (shape.header.table_offset, shape.header.entries) = (at, entries);
        shape.padding = bat::UNUSED;
        if batmap.is_some() {
            shape.batmap = batmap;
        }
        let bytes = shape.header.encode();
        // The changed fields and the checksum lie in the first of the header's two sectors.
        self.file().write_at(&bytes[..SECTOR_BYTES], self.footer().data_offset)?;
        self.sync()?;
        let len = self.footer_offset() + SECTOR;
        let shape = self.sparse();
        let metadata = MetadataMap::new(self.footer(), &shape.header, shape.batmap.as_ref(), len).0;
        self.sparse_mut().metadata = metadata;
        for range in old {
            self.punch_unused(range)?;
        }
        Ok(())
    }

    /// Punches holes into the unreferenced parts of a range.
    pub(super) fn punch_unused(&self, range: Range<u64>) -> Result<()> {
        for gap in self.gaps(self.footer_offset()) {
            let part = gap.start.max(range.start)..gap.end.min(range.end);
            if part.start < part.end {
                self.file().punch_hole(part.start, part.end - part.start)?;
            }
        }
        Ok(())
    }

    /// Returns the byte ranges of the table and its batmap.
    fn table_extents(&self) -> impl Iterator<Item = Range<u64>> {
        let parts = [MetadataPart::Table, MetadataPart::BatmapHeader, MetadataPart::Batmap];
        let extents = self.sparse().metadata.extents().iter();
        extents.filter(move |e| parts.contains(&e.part)).map(|e| e.range.clone())
    }

    // XenServer's batmap.

    pub(super) fn has_batmap(&self) -> bool {
        self.sparse().batmap.is_some() || batmap::presence(self.footer()) == BatmapPresence::Present
    }

    /// Returns whether the batmap declares a block complete. Also returns true if the batmap is damaged, or longer than
    /// [`CHUNK`] and so not read in full.
    pub(super) fn batmap_has_claims(&self) -> Result<bool> {
        if !self.has_batmap() {
            return Ok(false);
        }
        let Some(region) = self.sparse().metadata.extents().iter().find(|e| e.part == MetadataPart::Batmap) else {
            return Ok(true); // a damaged batmap
        };
        let mut map = vec![0; usize::try_from((region.range.end - region.range.start).min(CHUNK)).expect("small")];
        self.file().read_at(&mut map, region.range.start)?;
        Ok(map.len() as u64 != region.range.end - region.range.start || map.iter().any(|byte| *byte != 0))
    }

    /// Returns the length of a batmap for `entries` blocks, in bytes, whole sectors: enough for the checksum of the
    /// largest disk of that many blocks.
    fn map_bytes(&self, entries: u32) -> u64 {
        let largest = u64::from(entries).saturating_mul(self.sparse().header.block_size.bytes().into());
        u64::from(entries.div_ceil(8)).next_multiple_of(SECTOR).max(BatmapHeader::checksummed_bytes(largest))
    }

    /// Makes the header, for byte `at`, of an empty batmap that follows it directly.
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
        let mut header = self.sparse().batmap.clone().unwrap_or_else(fresh);
        header.offset = at + SECTOR;
        header.sectors = u32::try_from(self.map_bytes(entries) / SECTOR).expect("a bit a block");
        header.checksum = header.checksum_of(&[]);
        header
    }
}

impl OfflineSparse {
    /// Encodes sector `sector` of a table of `entries` entries, with `padding` after the last one.
    fn entries(&self, sector: u32, entries: u32, padding: u32) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        for (block, to) in bat::blocks_of(sector).zip(bytes.as_chunks_mut::<4>().0) {
            let entry = self.places.get(&block).map_or(bat::UNUSED, |place| place.entry());
            *to = if block.get() < entries { entry } else { padding }.to_be_bytes();
        }
        bytes
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use crate::format::bat::BlockPlace;
    use crate::image::Image;
    use crate::image::testing::{child, file, host_with};
    use crate::units::FileSector;

    #[test]
    fn a_table_grows_in_place_or_moves() {
        let host = host_with(child(), 128 * 4);
        let mut image = Offline::new(&Image::open(file(&host)).unwrap()).unwrap();
        let (at, room) = (image.sparse().header.table_offset, u32::try_from(layout::PAGE / 4).unwrap());
        assert!(image.has_room_for(4) && image.has_room_for(room + 1), "unused space follows the table");
        let place = BlockPlace::from_sector(FileSector::containing(image.used_end()) + 7).unwrap();
        let block = BlockIndex::new(1);
        image.sparse_mut().places.insert(block, place);
        assert!(image.has_room_for(room) && !image.has_room_for(3 * room), "a block follows the table's page");
        image.extend((place.sector() + 129).byte_offset()).unwrap();
        image.write_more_entries(200, &[block]).unwrap();
        assert_eq!(Image::open(file(&host)).unwrap().bat().unwrap().place(block), Some(place));
        image.use_table(at, 200).unwrap();
        let to = image.used_end().next_multiple_of(layout::PAGE);
        image.write_table(to, 5000).unwrap();
        assert_eq!(Image::open(file(&host)).unwrap().table_offset(), Some(at), "without effect before the switch");
        image.use_table(to, 5000).unwrap();
        let moved = Image::open(file(&host)).unwrap();
        let table = moved.bat().unwrap();
        assert_eq!(
            (moved.table_offset(), table.len(), table.used().collect::<Vec<_>>()),
            (Some(to), 5000, vec![(block, place)])
        );
        let mut old = [1; 64];
        image.file().read_at(&mut old, at).unwrap();
        assert_eq!(old, [0; 64], "the old table's space is freed");
        image.drop_blocks(&[block]).unwrap();
        assert_eq!(Image::open(file(&host)).unwrap().bat().unwrap().used().count(), 0);
    }
}
