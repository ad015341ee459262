//! Frozen: all layers below the top, merged into one immutable map, so that a look-up costs the same at any depth.
//!
//! The disk is divided into *cells* of 2 MiB, regardless of the block sizes of the layers. The first look-up of a cell
//! walks the layers once, youngest first, and caches the result: zeros, one run of one file, or a list of runs. Later
//! look-ups take an index into a table. In a cell of many runs they guess the run, and take a binary search if the
//! guess is wrong (`frozen_cache.rs`, which also limits the memory).
//!
//! Rules (format 6): a sector after the end of a layer is zero, and the layers below it are not looked up; a set bit
//! means that the layer holds the sector; for a clear bit, or in a block without a place, the sector is the parent's,
//! or zero in a root.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::extent::{self, Source};
use super::frozen_cache::{CELL_SECTORS, Cell, FrozenCache, FrozenCacheHandle, PackedRun};
use super::plan::{Missing, PlanBuffer};
use crate::format::bat::BlockPlace;
use crate::format::{DiskType, bitmap};
use crate::image::Image;
use crate::storage::FileSlot;
use crate::units::{SECTOR, SECTOR_BITS, SectorRange};

/// A layer of the chain. Clones share the image.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The slot of the image's file in the engines.
    pub slot: FileSlot,
    /// The image.
    pub image: Arc<Image>,
}

/// The words of one bitmap sector.
pub(super) type BitmapWords = [u64; SECTOR_BITS as usize / 64];
/// Returns a bitmap sector (layer, byte offset) if it is loaded.
pub(super) type BitmapLookup<'a> = dyn FnMut(usize, u64) -> Option<BitmapWords> + 'a;

/// A bitmap sector that a cell needs, with its words once it was read.
#[derive(Debug)]
pub struct CellRead {
    /// Index of the layer.
    pub layer: usize,
    /// Byte offset of the bitmap sector in the layer's file.
    pub at: u64,
    /// The words of the bitmap sector, once they were read.
    pub words: Option<Box<BitmapWords>>,
}

/// The merged layers, youngest first. Only the cache of cells changes.
#[derive(Debug)]
pub struct Frozen {
    layers: Vec<Layer>,
    cache: FrozenCache,
    sectors: u64,
}

impl Frozen {
    /// Makes the map of these layers, youngest first. Without layers all sectors are zero.
    pub fn new(layers: Vec<Layer>) -> Frozen {
        let sectors = layers.first().map_or(0, |l| l.image.size() / SECTOR);
        Frozen { layers, cache: FrozenCache::new(sectors), sectors }
    }

    /// Returns the map of the same layers below `layer`. Copies cached cells in which `layer` has no block, so that
    /// they need not be computed again, until the new cache is half full.
    #[must_use]
    pub fn with_layer(&self, layer: Layer) -> Frozen {
        let layers: Vec<Layer> = std::iter::once(layer).chain(self.layers.iter().cloned()).collect();
        let new = Frozen::new(layers);
        let mut handle = FrozenCacheHandle::default();
        let cached = self.cache.table(&mut handle);
        // If a disk ends inside a cell, that cell is computed again.
        let whole_cells = usize::try_from(self.sectors.min(new.sectors) / CELL_SECTORS).expect("at most 2^20 cells");
        for index in (0..whole_cells).filter(|index| !new.youngest_has_block(*index)) {
            match cached.get(index) {
                Some(cell) if !new.cache.is_half_full() => new.cache.insert(index, cell.clone()),
                _ => {}
            }
        }
        new
    }

    /// Whether the youngest layer is fixed, or has a block in the range of a cell.
    fn youngest_has_block(&self, index: usize) -> bool {
        let image = &self.layers[0].image;
        let (Some(table), Some(block_size)) = (image.bat(), image.block_size()) else { return true };
        let start = index as u64 * CELL_SECTORS;
        let cell = SectorRange::between(start, start + CELL_SECTORS);
        block_size.split_at_blocks(cell).any(|(block, _)| table.place(block).is_some())
    }

    /// The layers, youngest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Appends the extents of `range` to `plan`, or the bitmaps that must be loaded first.
    #[inline]
    pub fn plan_read(&self, range: SectorRange, cache: &mut FrozenCacheHandle, plan: &mut PlanBuffer) {
        let table = self.cache.table(cache);
        let mut rest = range.clip(SectorRange::between(0, self.sectors));
        let beyond = range.skip(rest.count());
        while !rest.is_empty() {
            let index = usize::try_from(rest.start() / CELL_SECTORS).expect("at most 2^20 cells");
            let start = index as u64 * CELL_SECTORS;
            let part = rest.clip(SectorRange::between(start, start + CELL_SECTORS));
            rest = rest.skip(part.count());
            match table.get(index) {
                Some(cell) => cell.append_to(start, part, &mut plan.extents),
                // A cell that needs no bitmap is computed immediately.
                None => match self.decide_cell(index, &mut |_, _| None) {
                    Err(_) => plan.add_missing(Missing::Cell(index)),
                    Ok(cell) => {
                        cell.append_to(start, part, &mut plan.extents);
                        self.cache.insert(index, cell);
                    }
                },
            }
        }
        plan.push(beyond, Source::Zero);
    }

    /// Number of sectors of the youngest layer; 0 without layers.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Prefetches, into the processor's cache, the run that a look-up of `sector` tries first. Does nothing if the
    /// sector's cell is not cached as a list of runs.
    #[inline]
    pub fn prefetch(&self, sector: u64, cache: &mut FrozenCacheHandle) {
        if sector < self.sectors {
            let index = usize::try_from(sector / CELL_SECTORS).expect("at most 2^20 cells");
            if let Some(cell) = self.cache.table(cache).get(index) {
                cell.prefetch(sector % CELL_SECTORS);
            }
        }
    }

    /// The bitmap sectors that a cell needs; none if the cell is cached.
    pub fn cell_reads(&self, index: usize) -> Vec<CellRead> {
        if self.cache.contains(index) {
            return Vec::new();
        }
        let needed = self.decide_cell(index, &mut |_, _| None).err().unwrap_or_default();
        needed.into_iter().map(|(layer, at)| CellRead { layer, at, words: None }).collect()
    }

    /// Computes a cell from the bitmap sectors that were read for it, and caches the cell. If the cell was cached when
    /// the reads were listed, and has left the cache since, the next plan misses it again.
    pub fn supply(&self, index: usize, reads: &[CellRead]) {
        if self.cache.contains(index) {
            return; // another queue has cached the cell
        }
        let read = |layer, at| reads.iter().find(|read| read.layer == layer && read.at == at);
        let mut words = |layer, at| read(layer, at).and_then(|read| read.words.as_deref().copied());
        if let Ok(cell) = self.decide_cell(index, &mut words) {
            self.cache.insert(index, cell);
        }
    }

    /// Computes a cell by one walk down the layers. The error lists the bitmap sectors (layer, byte offset) that
    /// `bitmaps` does not return.
    pub(super) fn decide_cell(&self, index: usize, bitmaps: &mut BitmapLookup<'_>) -> Result<Cell, Vec<(usize, u64)>> {
        let start = index as u64 * CELL_SECTORS;
        let whole = SectorRange::between(start, (start + CELL_SECTORS).min(self.sectors));
        let mut walk = LayerWalk { bitmaps, decided: Vec::new(), undecided: vec![whole], needed: Vec::new() };
        for (number, layer) in self.layers.iter().enumerate() {
            if let ControlFlow::Break(()) = walk.visit_layer(number, layer) {
                break;
            }
        }
        if !walk.needed.is_empty() {
            return Err(walk.needed);
        }
        walk.decided.extend(walk.undecided.iter().map(|r| (*r, Source::Zero)));
        walk.decided.sort_unstable_by_key(|(r, _)| r.start());
        let mut joined = Vec::new();
        for (range, source) in walk.decided {
            extent::push(&mut joined, range, source);
        }
        let runs: Box<[PackedRun]> = joined.iter().map(|e| PackedRun::new(e.range.end() - start, e.source)).collect();
        Ok(if let [run] = *runs { Cell::Whole(run) } else { Cell::Runs(runs) })
    }
}

/// A walk down the layers for one cell.
struct LayerWalk<'a> {
    bitmaps: &'a mut BitmapLookup<'a>,
    decided: Vec<(SectorRange, Source)>,
    /// Ranges that no layer so far decides.
    undecided: Vec<SectorRange>,
    needed: Vec<(usize, u64)>,
}

impl LayerWalk<'_> {
    fn visit_layer(&mut self, number: usize, layer: &Layer) -> ControlFlow<()> {
        let end = layer.image.size() / SECTOR;
        for range in std::mem::take(&mut self.undecided) {
            let inside = range.clip(SectorRange::between(0, end));
            // After the end of a layer the disk is zero, even if the layers below hold data there.
            self.decided.push((range.skip(inside.count()), Source::Zero));
            self.visit_range(number, layer, inside);
        }
        self.decided.retain(|(r, _)| !r.is_empty());
        if self.undecided.is_empty() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn visit_range(&mut self, number: usize, layer: &Layer, range: SectorRange) {
        let (Some(table), Some(block_size)) = (layer.image.bat(), layer.image.block_size()) else {
            return self.add_stored(layer, range, range.start() * SECTOR); // fixed
        };
        for (block, part) in block_size.split_at_blocks(range) {
            match table.place(block) {
                None => self.add_absent(layer, part),
                Some(place) => self.visit_block(number, layer, place, part),
            }
        }
    }

    /// Decides a part of one block that has a place, by the bits of the block.
    fn visit_block(&mut self, number: usize, layer: &Layer, place: BlockPlace, part: SectorRange) {
        let block_size = layer.image.block_size().expect("it has blocks");
        let data = place.data(block_size).byte_offset();
        let mut rest = part;
        while !rest.is_empty() {
            let within = block_size.sector_in_block(rest.start());
            let (sector, bit) = (within / SECTOR_BITS, within % SECTOR_BITS);
            let at = (place.sector() + u64::from(sector)).byte_offset();
            let group = rest.first(u64::from(SECTOR_BITS - bit));
            rest = rest.skip(group.count());
            if at + SECTOR > layer.image.data_end() {
                // The bitmap itself is lost. Only the mode `Salvage` opens such an image. The sectors read as zeros,
                // never as old data of the parent.
                self.decided.push((group, Source::Zero));
                continue;
            }
            let Some(words) = (self.bitmaps)(number, at) else {
                self.needed.push((number, at));
                self.undecided.push(group);
                continue;
            };
            let mut left = group;
            while !left.is_empty() {
                let from = block_size.sector_in_block(left.start()) % SECTOR_BITS;
                let end = from + u32::try_from(left.count()).expect("inside a bitmap sector");
                let (set, count) = bitmap::run(words.as_slice(), from, end);
                let run = left.first(u64::from(count));
                left = left.skip(run.count());
                let offset = data + u64::from(block_size.sector_in_block(run.start())) * SECTOR;
                if set { self.add_stored(layer, run, offset) } else { self.add_absent(layer, run) }
            }
        }
    }

    /// Adds a run that the layer holds at byte `offset`. Lost sectors, which only the mode `Salvage` reads, are zero
    /// (O12).
    fn add_stored(&mut self, layer: &Layer, run: SectorRange, offset: u64) {
        let there = layer.image.data_end().saturating_sub(offset) / SECTOR;
        let inside = run.first(there);
        self.decided.push((inside, Source::File { slot: layer.slot, offset }));
        self.decided.push((run.skip(inside.count()), Source::Zero));
    }

    /// Adds a run that the layer does not hold: its parent decides, or it is zero in a root.
    fn add_absent(&mut self, layer: &Layer, run: SectorRange) {
        match layer.image.kind() {
            DiskType::Differencing => self.undecided.push(run),
            _ => self.decided.push((run, Source::Zero)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ChainFolder, read_sector_bytes};
    use super::super::{OpenMode, Version};
    use super::*;

    /// Three layers with different block sizes. The middle one is the shortest.
    fn three() -> (ChainFolder, Vec<u8>) {
        let chains = ChainFolder::new();
        chains.dynamic("root", 4 << 10, 10_000);
        chains.fill("root", &[(0, 10_000, 1)]);
        chains.child("middle", "root", 2 << 20, 9_000);
        chains.fill("middle", &[(3, 5, 2), (4_090, 4_100, 3), (8_999, 9_000, 4)]);
        chains.child("leaf", "middle", 512 << 10, 10_001);
        chains.fill("leaf", &[(4, 5, 5), (4_095, 4_097, 6), (9_500, 9_501, 7)]);
        let mut want = vec![1; 9_000];
        want.resize(10_001, 0);
        for (from, to, byte) in [
            (3, 4, 2),
            (4, 5, 5),
            (4_090, 4_095, 3),
            (4_095, 4_097, 6),
            (4_097, 4_100, 3),
            (8_999, 9_000, 4),
            (9_500, 9_501, 7),
        ] {
            want[from..to].fill(byte);
        }
        (chains, want)
    }

    #[test]
    fn every_sector_comes_from_the_youngest_layer_that_has_it() {
        let (chains, want) = three();
        let whole = chains.read("leaf");
        assert_eq!(read_sector_bytes(&whole, 0, 10_001), want);
        // Ranges that begin inside runs, with cached and with new cells.
        for version in [whole, chains.read("leaf")] {
            for from in [1, 3, 4, 5, 100, 4_094, 4_095, 4_096, 4_099, 4_100, 8_998, 8_999, 9_000, 9_499, 9_501] {
                for to in [from + 1, from + 2, from + 130].map(|to| to.min(10_001)) {
                    assert_eq!(read_sector_bytes(&version, from as u64, to as u64), want[from..to], "{from}..{to}");
                }
            }
        }
    }

    #[test]
    fn a_cell_is_loaded_once() {
        let (chains, _) = three();
        let version = chains.read("leaf");
        let (range, mut plan) = (SectorRange::between(4_000, 4_200), PlanBuffer::default());
        version.plan_read(range, &mut FrozenCacheHandle::default(), &mut plan);
        assert_eq!(plan.missing, [Missing::Cell(0), Missing::Cell(1)]);
        // The cell needs one bitmap sector of the child, one of the middle layer, and those of the root for the
        // undecided part. Each block of 4 KiB of the root has one bitmap sector.
        let reads = version.frozen().cell_reads(1);
        assert!(reads.iter().any(|read| read.layer == 0) && reads.iter().any(|read| read.layer == 2), "{reads:?}");
        version.load_now(&plan.missing, &mut crate::image::Pins::default()).unwrap();
        version.plan_read(range, &mut FrozenCacheHandle::default(), &mut plan);
        assert!(plan.missing.is_empty() && version.frozen().cell_reads(1).is_empty());
        let ends: Vec<_> = plan.extents.iter().map(|e| e.range.end()).collect();
        assert!(ends.contains(&4_095) && ends.contains(&4_097) && ends.last() == Some(&4_200), "{ends:?}");
    }

    #[test]
    fn blocks_without_a_place_need_no_bitmaps() {
        let chains = ChainFolder::new();
        chains.fixed("root", 9_000);
        chains.child("leaf", "root", 2 << 20, 9_000);
        let version = chains.chain("leaf", OpenMode::Inspect).unwrap().into_frozen();
        let mut plan = PlanBuffer::default();
        let mut cache = FrozenCacheHandle::default();
        version.plan_read(SectorRange::between(10, 8_900), &mut cache, &mut plan);
        assert!(plan.missing.is_empty());
        let want = Source::File { slot: FileSlot(0), offset: 10 * SECTOR };
        assert!(matches!(plan.extents[..], [extent] if extent.source == want), "{plan:?}");
        let nothing = Version::new(None, Frozen::new(Vec::new()), 8);
        nothing.plan_read(SectorRange::between(0, 8), &mut cache, &mut plan);
        assert_eq!(plan.extents[0].source, Source::Zero);
    }
}
