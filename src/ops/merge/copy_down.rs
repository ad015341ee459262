//! Copying the sectors of layers into the image below the layers.
//!
//! The copy changes only sectors that the layers hide. So a reader of the layers sees the same disk before, during and
//! after the copy, and any part of the copy may be repeated.

use std::sync::Arc;

use crate::chain::{Frozen, Layer, Source, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::format::DiskType;
use crate::image::{Image, next_data};
use crate::ops::extents::Extents;
use crate::ops::image_writer::ImageWriter;
use crate::ops::source::{CHUNK_BYTES, CHUNK_SECTORS};
use crate::ops::zero_scan::{PAGE_BYTES, nonzero_runs};
use crate::storage::{Buffer, File, FileSlot};
use crate::units::{SECTOR, SectorRange};

/// Maximum length of a range that is zeroed at once: 64 MiB.
const ZERO_SECTORS: u64 = 1 << 17;
/// Minimum length of a run of zeros that becomes a hole. A shorter run is written as data.
const MIN_HOLE_SECTORS: u64 = 128;

/// Adjacent layers of a chain, without the images below.
pub(super) struct LayerStack {
    version: Version,
    /// Size of the smallest layer in sectors. At and after this sector, the layers hide the images below.
    masked_from: u64,
}

/// Callback of a copy. It receives the sector before which everything is copied. If the callback fails, the copy stops
/// and returns the error of the callback.
pub(super) type OnCopied<'a> = dyn FnMut(&mut ImageWriter<'_>, u64) -> Result<()> + 'a;

impl LayerStack {
    /// Creates a stack of the given images, youngest first.
    ///
    /// # Panics
    /// If an image is not differencing.
    pub(super) fn new(images: Vec<Image>) -> LayerStack {
        assert!(
            images.iter().all(|image| image.kind() == DiskType::Differencing),
            "only differencing images are merged"
        );
        let sizes = images.iter().map(Image::size);
        let masked_from = sizes.min().expect("at least one image") / SECTOR;
        let sectors = images[0].size() / SECTOR;
        let layers =
            (0..).zip(images).map(|(number, image)| Layer { slot: FileSlot(number), image: Arc::new(image) }).collect();
        LayerStack { version: Version::new(None, Frozen::new(layers), sectors), masked_from }
    }

    /// Returns the images, youngest first.
    pub(super) fn images(&self) -> impl Iterator<Item = &Image> {
        self.version.frozen().layers().iter().map(|layer| &*layer.image)
    }

    /// Checks that the file system of the image `beneath` has space for the data of `blocks` new blocks. The data needs
    /// at most the space that the layers occupy.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub(super) fn check_space(&self, blocks: u64, beneath: &Image) -> Result<()> {
        let Some(block_size) = beneath.block_size().filter(|_| blocks > 0) else { return Ok(()) };
        let mut allocated = 0u64;
        for image in self.images() {
            allocated += image.file().stat()?.allocated;
        }
        let needed = allocated.min(blocks * u64::from(block_size.bytes()));
        let available = beneath.file().file_system_space()?.available;
        if available >= needed {
            return Ok(());
        }
        let what = format!(
            "its file system has {available} bytes left, but the merge may need {needed}; free some space there"
        );
        Err(Error::new(ErrorKind::NoSpace, what).at_path(beneath.file().path()))
    }

    /// Returns an upper bound of the number of blocks that the data of the layers adds to the image `beneath`. (Zeros
    /// in the layers may add a few more blocks, if they hide data of older images.)
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn new_blocks(&self, beneath: &Image) -> Result<u64> {
        let (Some(table), Some(block_size)) = (beneath.bat(), beneath.block_size()) else { return Ok(0) };
        let disk = SectorRange::between(0, beneath.size() / SECTOR);
        let mut is_needed = vec![false; table.len() as usize];
        for image in self.images() {
            let (Some(blocks), Some(layer_block)) = (image.bat(), image.block_size()) else { continue };
            let bytes = u64::from(layer_block.bytes());
            let mut data = 0..0;
            for (block, place) in blocks.used() {
                let at = place.data(layer_block).byte_offset();
                if !data.contains(&at) {
                    data = next_data(image.file(), at..u64::MAX)?.unwrap_or(0..0);
                }
                if data.is_empty() || data.start >= at + bytes {
                    continue; // holes are zeros
                }
                let range = layer_block.sectors_of(block).clip(disk);
                for (block, _) in block_size.split_at_blocks(range) {
                    is_needed[block.as_usize()] |= table.place(block).is_none();
                }
            }
        }
        Ok(is_needed.iter().filter(|needed| **needed).count() as u64)
    }

    /// Copies the sectors of the layers at and after sector `from` into the image of `writer`. Sectors that the layers
    /// hide because a layer or CHILD ends before them become zeros. Returns the number of bytes of data that were
    /// written.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, `Poisoned`; errors of `on_copied`.
    pub(super) fn copy(&self, from: u64, writer: &mut ImageWriter<'_>, on_copied: &mut OnCopied<'_>) -> Result<u64> {
        let end = writer.version().sectors();
        let mut copier =
            LayerCopier { writer, on_copied, buffer: Buffer::zeroed(CHUNK_BYTES), last_data: None, written: 0 };
        let mut extents = Extents::from(&self.version, from);
        while let Some(extent) = extents.next()? {
            let range = extent.range.clip(SectorRange::between(0, end));
            match extent.source {
                Source::Zero => copier.zero(range.skip(self.masked_from.saturating_sub(range.start())))?,
                Source::File { slot, offset } => copier.copy(slot, self.version.file(slot), range, offset)?,
            }
            (copier.on_copied)(copier.writer, extent.range.end().min(end))?;
        }
        copier.zero(SectorRange::between(self.version.sectors().max(from), end))?;
        Ok(copier.written)
    }
}

/// State of a copy.
struct LayerCopier<'a, 'w, 's> {
    writer: &'a mut ImageWriter<'w>,
    on_copied: &'a mut OnCopied<'s>,
    buffer: Buffer,
    /// The last range of a file without holes that [`next_data`] returned: file, first byte, end.
    last_data: Option<(FileSlot, u64, u64)>,
    /// Bytes of data written.
    written: u64,
}

impl LayerCopier<'_, '_, '_> {
    /// Makes a range read as zeros, in parts of at most [`ZERO_SECTORS`].
    fn zero(&mut self, range: SectorRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.first(ZERO_SECTORS - rest.start() % ZERO_SECTORS);
            rest = rest.skip(piece.count());
            self.writer.zero(piece)?;
            failpoint::reached("merge.zeroed");
            (self.on_copied)(self.writer, piece.end())?;
        }
        Ok(())
    }

    /// Copies a range that lies at byte `offset` of a file. Holes of the file become zeros.
    fn copy(&mut self, slot: FileSlot, file: &File, range: SectorRange, offset: u64) -> Result<()> {
        let (mut rest, mut offset) = (range, offset);
        while !rest.is_empty() {
            let hole = self.hole_sectors(slot, file, offset)?;
            if hole >= MIN_HOLE_SECTORS.min(rest.count()) {
                let piece = rest.first(hole);
                self.zero(piece)?;
                (rest, offset) = (rest.skip(piece.count()), offset + piece.bytes());
                continue;
            }
            let piece = rest.first(CHUNK_SECTORS - rest.start() % CHUNK_SECTORS);
            self.copy_chunk(file, piece, offset)?;
            failpoint::reached("merge.put");
            (self.on_copied)(self.writer, piece.end())?;
            (rest, offset) = (rest.skip(piece.count()), offset + piece.bytes());
        }
        Ok(())
    }

    /// Returns the number of sectors from byte `offset` to the end of the hole there, or 0 if there is data.
    fn hole_sectors(&mut self, slot: FileSlot, file: &File, offset: u64) -> Result<u64> {
        let (start, end) = match self.last_data {
            Some((last, start, end)) if last == slot && (start..end).contains(&offset) => (start, end),
            _ => next_data(file, offset..u64::MAX)?.map_or((u64::MAX, u64::MAX), |found| (found.start, found.end)),
        };
        self.last_data = Some((slot, start, end));
        Ok(start.saturating_sub(offset) / SECTOR)
    }

    /// Copies `piece`, which has at most [`CHUNK_SECTORS`] sectors. Long runs of zeros become holes.
    fn copy_chunk(&mut self, file: &File, piece: SectorRange, offset: u64) -> Result<()> {
        let bytes = &mut self.buffer[..usize::try_from(piece.bytes()).expect("at most a chunk")];
        file.read_at(bytes, offset)?;
        let into_page = usize::try_from(piece.start() * SECTOR % PAGE_BYTES as u64).expect("in a page");
        // Runs of data. Two runs are joined if the run of zeros between them is short.
        let (mut runs, mut done) = (Vec::<SectorRange>::new(), piece.start());
        for (at, len) in nonzero_runs(bytes, into_page) {
            let run = piece.skip(at as u64 / SECTOR).first(len as u64 / SECTOR);
            match runs.last_mut() {
                Some(last) if run.start() - last.end() < MIN_HOLE_SECTORS => {
                    *last = SectorRange::between(last.start(), run.end())
                }
                _ => runs.push(run),
            }
        }
        for run in runs {
            self.writer.zero(SectorRange::between(done, run.start()))?;
            let at = usize::try_from((run.start() - piece.start()) * SECTOR).expect("in a chunk");
            let len = usize::try_from(run.bytes()).expect("in a chunk");
            self.writer.put(run, &self.buffer[at..at + len])?;
            self.written += run.bytes();
            done = run.end();
        }
        self.writer.zero(SectorRange::between(done, piece.end()))
    }
}
