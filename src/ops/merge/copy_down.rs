//! What some layers say, copied down into the image beneath them.
//!
//! Only sectors change that the layers answer for, so whoever reads through the layers sees the same disk before, while
//! and after; and doing any part of it again changes nothing.

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

/// Sectors that are made zero at once: 64 MiB.
const ZERO_SECTORS: u64 = 1 << 17;
/// Sectors of zeros, at least, that are not written like data: less is not worth a hole.
const MIN_HOLE_SECTORS: u64 = 128;

/// Some layers of a chain, without what lies beneath them.
pub(super) struct LayerStack {
    version: Version,
    /// From this sector on nothing beneath is asked: a layer ends here.
    masked_from: u64,
}

/// Is told the sector before which all is copied. What it fails with ends the work.
pub(super) type OnCopied<'a> = dyn FnMut(&mut ImageWriter<'_>, u64) -> Result<()> + 'a;

impl LayerStack {
    /// These images, youngest first; all of them children.
    pub(super) fn new(images: Vec<Image>) -> LayerStack {
        assert!(images.iter().all(|image| image.kind() == DiskType::Differencing), "only children are folded");
        let sizes = images.iter().map(Image::size);
        let masked = sizes.min().expect("at least one image") / SECTOR;
        let sectors = images[0].size() / SECTOR;
        let layers = (0..).zip(images).map(|(number, image)| Layer { slot: FileSlot(number), image }).collect();
        LayerStack { version: Version::new(None, Frozen::new(layers), sectors), masked_from: masked }
    }

    /// The images, youngest first.
    pub(super) fn images(&self) -> impl Iterator<Item = &Image> {
        self.version.frozen().layers().iter().map(|layer| &layer.image)
    }

    /// Checks that the host has room for the data of so many new blocks of the image beneath: at most for all that the layers
    /// take.
    ///
    /// # Errors
    /// `NoSpace`; `Io`.
    pub(super) fn check_space(&self, blocks: u64, beneath: &Image) -> Result<()> {
        let Some(block_size) = beneath.block_size().filter(|_| blocks > 0) else { return Ok(()) };
        let mut taken = 0u64;
        for image in self.images() {
            taken += image.file().stat()?.allocated;
        }
        let wanted = taken.min(blocks * u64::from(block_size.bytes()));
        let available = beneath.file().file_system_space()?.available;
        if available >= wanted {
            return Ok(());
        }
        let what =
            format!("its file system has {available} bytes left, and the merge may need {wanted}; free space there");
        Err(Error::new(ErrorKind::NoSpace, what).at_path(beneath.file().path()))
    }

    /// Blocks that the image beneath needs for data besides those it has, at most. (Zeros may need a few more, where they
    /// hide something further down.)
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn new_blocks(&self, beneath: &Image) -> Result<u64> {
        let (Some(table), Some(block_size)) = (beneath.bat(), beneath.block_size()) else { return Ok(0) };
        let disk = SectorRange::between(0, beneath.size() / SECTOR);
        let mut wanted = vec![false; table.len() as usize];
        for image in self.images() {
            let (Some(blocks), Some(theirs)) = (image.bat(), image.block_size()) else { continue };
            let (bitmap, bytes) = (u64::from(theirs.bitmap_sectors()), u64::from(theirs.bytes()));
            let mut seen = 0..0;
            for (block, place) in blocks.used() {
                let at = (u64::from(place) + bitmap) * SECTOR;
                if !seen.contains(&at) {
                    seen = next_data(image.file(), at..u64::MAX)?.unwrap_or(0..0);
                }
                if seen.is_empty() || seen.start >= at + bytes {
                    continue; // holes are zeros
                }
                let range = theirs.sectors_of(block).clip(disk);
                for (block, _) in block_size.split_at_blocks(range) {
                    wanted[block as usize] |= table.place(block).is_none();
                }
            }
        }
        Ok(wanted.iter().filter(|wanted| **wanted).count() as u64)
    }

    /// Copies all that the layers say, from sector `from` on, into `writer`'s image. Tells how many bytes were data.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, `Poisoned`; what `step` fails with.
    pub(super) fn copy(&self, from: u64, writer: &mut ImageWriter<'_>, step: &mut OnCopied<'_>) -> Result<u64> {
        let end = writer.version().sectors();
        let mut run =
            LayerCopier { writer, on_copied: step, buffer: Buffer::zeroed(CHUNK_BYTES), last_data: None, written: 0 };
        let mut extents = Extents::from(&self.version, from);
        while let Some(extent) = extents.next()? {
            let range = extent.range.clip(SectorRange::between(0, end));
            match extent.source {
                Source::Zero => run.zero(range.skip(self.masked_from.saturating_sub(range.start())))?,
                Source::File { slot, offset } => run.copy(slot, self.version.file(slot), range, offset)?,
            }
            (run.on_copied)(run.writer, extent.range.end().min(end))?;
        }
        run.zero(SectorRange::between(self.version.sectors().max(from), end))?;
        Ok(run.written)
    }
}

/// The work on one run after another.
struct LayerCopier<'a, 'w, 's> {
    writer: &'a mut ImageWriter<'w>,
    on_copied: &'a mut OnCopied<'s>,
    buffer: Buffer,
    /// What was last found that is no hole: file, its first byte, its end.
    last_data: Option<(FileSlot, u64, u64)>,
    written: u64,
}

impl LayerCopier<'_, '_, '_> {
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

    /// Copies a run that lies in one piece in a file, from byte `offset` on.
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

    /// Sectors from byte `offset` on that are a hole in the file.
    fn hole_sectors(&mut self, slot: FileSlot, file: &File, offset: u64) -> Result<u64> {
        let (start, end) = match self.last_data {
            Some((seen, start, end)) if seen == slot && (start..end).contains(&offset) => (start, end),
            _ => next_data(file, offset..u64::MAX)?.map_or((u64::MAX, u64::MAX), |found| (found.start, found.end)),
        };
        self.last_data = Some((slot, start, end));
        Ok(start.saturating_sub(offset) / SECTOR)
    }

    fn copy_chunk(&mut self, file: &File, piece: SectorRange, offset: u64) -> Result<()> {
        let bytes = &mut self.buffer[..usize::try_from(piece.bytes()).expect("at most a chunk")];
        file.read_at(bytes, offset)?;
        let into_page = usize::try_from(piece.start() * SECTOR % PAGE_BYTES as u64).expect("in a page");
        // Runs of data, short zeros between them included.
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
