//! Frozen: every layer beneath the top, merged into one immutable map. This is why depth costs nothing.
//!
//! The disk is cut into *cells* of 2 MiB, whatever the block sizes of the layers. The first time a cell is asked for,
//! the layers are walked once, youngest first, and the answer is kept: all zero, all in one run of one file, or a
//! list of runs. From then on a look-up is an index and, for a cell of many runs, a binary search, at any depth.
//!
//! Rules (vhd-format 6): a sector beyond the end of a layer is zero, and nothing beneath that layer is asked; a set bit
//! means here; a clear bit or a missing block means the parent, or zero in a root.

use std::ops::ControlFlow;
use std::sync::OnceLock;

use super::extent::{Missing, Plan, Source};
use crate::format::{DiskType, bitmap};
use crate::image::{Image, Paged};
use crate::storage::Slot;
use crate::units::{SECTOR, SECTOR_BITS, SectorRange};

/// Sectors in a cell: what one bitmap sector of a 2 MiB block speaks for.
const CELL_SECTORS: u64 = 4096;

/// A file of the chain.
#[derive(Debug)]
pub struct Layer {
    /// Its place in the engines' tables of files.
    pub slot: Slot,
    /// What it is.
    pub image: Image,
}

/// A run inside a cell, in 8 bytes: end in the cell (13 bits), file (12 bits, all ones for zero), file sector (39 bits).
#[derive(Clone, Copy, PartialEq, Eq)]
struct Run(u64);

const END_BITS: u32 = 13;
const SLOT_BITS: u32 = 12;
const ZERO_SLOT: u64 = (1 << SLOT_BITS) - 1;

impl Run {
    /// A run up to sector `end` of the cell whose first sector is at `source`.
    fn new(end: u64, source: Source) -> Run {
        let (slot, sector) = match source {
            Source::Zero => (ZERO_SLOT, 0),
            Source::File { slot, offset } => (u64::from(slot.0), offset / SECTOR),
        };
        assert!(end <= CELL_SECTORS && sector < 1 << (64 - END_BITS - SLOT_BITS), "files are smaller than 2^48 bytes");
        Run(end | slot << END_BITS | sector << (END_BITS + SLOT_BITS))
    }

    fn end(self) -> u64 {
        self.0 & ((1 << END_BITS) - 1)
    }

    /// Where sector `skip` of the run is.
    fn source(self, skip: u64) -> Source {
        match (self.0 >> END_BITS) & ZERO_SLOT {
            ZERO_SLOT => Source::Zero,
            slot => {
                let slot = Slot(u16::try_from(slot).expect("12 bits"));
                Source::File { slot, offset: ((self.0 >> (END_BITS + SLOT_BITS)) + skip) * SECTOR }
            }
        }
    }
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "..{} {:?}", self.end(), self.source(0))
    }
}

/// The answer for a cell.
#[derive(Debug)]
enum Cell {
    /// One run covers it all.
    Whole(Run),
    /// Runs in ascending order, at least two.
    Runs(Box<[Run]>),
}

/// A sector of bitmap that a cell needs, and its words once it was read.
#[derive(Debug)]
pub struct BitmapPiece {
    /// Index of the layer.
    pub layer: usize,
    /// Byte offset of the bitmap sector in the layer's file.
    pub at: u64,
    /// What was read.
    pub words: Option<Box<[u64; SECTOR_BITS as usize / 64]>>,
}

/// The merged layers, youngest first. Immutable but for what it remembers.
#[derive(Debug)]
pub struct Frozen {
    layers: Vec<Layer>,
    cells: Paged<OnceLock<Cell>>,
    sectors: u64,
}

impl Frozen {
    /// The map of these layers, youngest first. May be empty: then all is zero.
    pub fn new(layers: Vec<Layer>) -> Frozen {
        let sectors = layers.first().map_or(0, |l| l.image.size() / SECTOR);
        let cells = usize::try_from(sectors.div_ceil(CELL_SECTORS)).expect("at most 2^20 cells in 2040 GiB");
        Frozen { layers, cells: Paged::new(cells, OnceLock::new), sectors }
    }

    /// The layers, youngest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Appends where `range` is to `plan`, or what must be loaded to tell.
    #[inline]
    pub fn split(&self, range: SectorRange, plan: &mut Plan) {
        let mut rest = range.clip(SectorRange::between(0, self.sectors));
        let beyond = range.skip(rest.count());
        while !rest.is_empty() {
            let index = usize::try_from(rest.start() / CELL_SECTORS).expect("at most 2^20 cells");
            let start = index as u64 * CELL_SECTORS;
            let part = rest.clip(SectorRange::between(start, start + CELL_SECTORS));
            rest = rest.skip(part.count());
            match self.cell(index) {
                None => plan.miss(Missing::Cell(index)),
                Some(Cell::Whole(run)) => plan.push(part, run.source(part.start() - start)),
                Some(Cell::Runs(runs)) => split_runs(runs, start, part, plan),
            }
        }
        plan.push(beyond, Source::Zero);
    }

    /// A cell, decided now if that needs no bitmap.
    #[inline]
    fn cell(&self, index: usize) -> Option<&Cell> {
        if let Some(cell) = self.cells.get(index).and_then(OnceLock::get) {
            return Some(cell);
        }
        let cell = self.decide(index, &[]).ok()?;
        Some(self.cells.touch(index).get_or_init(|| cell))
    }

    /// The bitmap sectors that decide a cell; none where it is decided.
    pub fn pieces(&self, index: usize) -> Vec<BitmapPiece> {
        let wanted = self.decide(index, &[]).err().unwrap_or_default();
        wanted.into_iter().map(|(layer, at)| BitmapPiece { layer, at, words: None }).collect()
    }

    /// Takes in all pieces of a cell, and decides it.
    pub fn supply(&self, index: usize, pieces: &[BitmapPiece]) {
        let cell = self.decide(index, pieces).expect("all pieces that were asked for are there");
        // Two queues may have loaded the same cell; both found the same.
        let _ = self.cells.touch(index).set(cell);
    }

    /// Walks the layers once, or names the bitmap sectors (layer, byte offset) that are not among `known`.
    fn decide(&self, index: usize, known: &[BitmapPiece]) -> Result<Cell, Vec<(usize, u64)>> {
        let start = index as u64 * CELL_SECTORS;
        let whole = SectorRange::between(start, (start + CELL_SECTORS).min(self.sectors));
        let mut walk = Walk { known, decided: Vec::new(), open: vec![whole], wanted: Vec::new() };
        for (number, layer) in self.layers.iter().enumerate() {
            if let ControlFlow::Break(()) = walk.layer(number, layer) {
                break;
            }
        }
        if !walk.wanted.is_empty() {
            return Err(walk.wanted);
        }
        walk.decided.extend(walk.open.iter().map(|r| (*r, Source::Zero)));
        walk.decided.sort_unstable_by_key(|(r, _)| r.start());
        let mut joined = Plan::default();
        for (range, source) in walk.decided {
            joined.push(range, source);
        }
        let runs: Box<[Run]> = joined.extents.iter().map(|e| Run::new(e.range.end() - start, e.source)).collect();
        Ok(if let [run] = *runs { Cell::Whole(run) } else { Cell::Runs(runs) })
    }
}

/// Appends the part of a cell's runs that covers `part`.
fn split_runs(runs: &[Run], start: u64, part: SectorRange, plan: &mut Plan) {
    let mut rest = part;
    let first = runs.partition_point(|r| r.end() <= part.start() - start);
    let mut begin = if first == 0 { 0 } else { runs[first - 1].end() };
    for run in &runs[first..] {
        if rest.is_empty() {
            break;
        }
        let piece = rest.first(start + run.end() - rest.start());
        plan.push(piece, run.source(rest.start() - start - begin));
        rest = rest.skip(piece.count());
        begin = run.end();
    }
}

/// The walk down the layers for one cell.
struct Walk<'a> {
    known: &'a [BitmapPiece],
    decided: Vec<(SectorRange, Source)>,
    /// What no layer has answered for yet.
    open: Vec<SectorRange>,
    wanted: Vec<(usize, u64)>,
}

impl Walk<'_> {
    fn layer(&mut self, number: usize, layer: &Layer) -> ControlFlow<()> {
        let end = layer.image.size() / SECTOR;
        for range in std::mem::take(&mut self.open) {
            let inside = range.clip(SectorRange::between(0, end));
            // Beyond the end of an ancestor nothing beneath it is asked.
            self.decided.push((range.skip(inside.count()), Source::Zero));
            self.ask(number, layer, inside);
        }
        self.decided.retain(|(r, _)| !r.is_empty());
        if self.open.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn ask(&mut self, number: usize, layer: &Layer, range: SectorRange) {
        let (Some(table), Some(block_size)) = (layer.image.bat(), layer.image.block_size()) else {
            return self.take(layer, range, range.start() * SECTOR); // fixed
        };
        let mut rest = range;
        while !rest.is_empty() {
            let block = block_size.block_of(rest.start());
            let part = rest.clip(block_size.range_of(block));
            rest = rest.skip(part.count());
            match table.place(block) {
                None => self.pass(layer, part),
                Some(place) => self.ask_block(number, layer, u64::from(place), part),
            }
        }
    }

    /// A part of one block that has a place: its bits tell.
    fn ask_block(&mut self, number: usize, layer: &Layer, place: u64, part: SectorRange) {
        let block_size = layer.image.block_size().expect("it has blocks");
        let data = (place + u64::from(block_size.bitmap_sectors())) * SECTOR;
        let mut rest = part;
        while !rest.is_empty() {
            let within = block_size.within(rest.start());
            let (sector, bit) = (within / SECTOR_BITS, within % SECTOR_BITS);
            let at = (place + u64::from(sector)) * SECTOR;
            let group = rest.first(u64::from(SECTOR_BITS - bit));
            rest = rest.skip(group.count());
            if at + SECTOR > layer.image.data_end() {
                self.pass(layer, group); // cut off, as read-only opens tolerate: no bits
                continue;
            }
            let piece = self.known.iter().find(|p| p.layer == number && p.at == at);
            let Some(words) = piece.and_then(|p| p.words.as_ref()) else {
                self.wanted.push((number, at));
                self.open.push(group);
                continue;
            };
            let mut left = group;
            while !left.is_empty() {
                let from = block_size.within(left.start()) % SECTOR_BITS;
                let end = from + u32::try_from(left.count()).expect("inside a granule");
                let (set, count) = bitmap::run(words.as_slice(), from, end);
                let run = left.first(u64::from(count));
                left = left.skip(run.count());
                let offset = data + u64::from(block_size.within(run.start())) * SECTOR;
                if set { self.take(layer, run, offset) } else { self.pass(layer, run) }
            }
        }
    }

    /// The layer holds the run at byte `offset`. What lies behind a missing tail of the file is zero (O12).
    fn take(&mut self, layer: &Layer, run: SectorRange, offset: u64) {
        let there = layer.image.data_end().saturating_sub(offset) / SECTOR;
        let inside = run.first(there);
        self.decided.push((inside, Source::File { slot: layer.slot, offset }));
        self.decided.push((run.skip(inside.count()), Source::Zero));
    }

    /// The layer has nothing to say: its parent does, or in a root nobody.
    fn pass(&mut self, layer: &Layer, run: SectorRange) {
        match layer.image.kind() {
            DiskType::Differencing => self.open.push(run),
            _ => self.decided.push((run, Source::Zero)),
        }
    }
}
