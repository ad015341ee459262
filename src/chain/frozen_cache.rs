//! Cache of the cells of the frozen layers, with a limit on its memory.
//!
//! A cell of one run takes only its entry in a table. The lists of runs of one table take at most [`MAX_RUN_BYTES`]
//! together; when a new list exceeds the limit, a table with that list alone replaces the full one, and other cells are
//! loaded again when they are needed. So a chain that is fragmented into single sectors cannot exhaust memory. A
//! look-up takes no lock and changes no reference count that queues share: each queue keeps a [`FrozenCacheHandle`],
//! and releases it before it sleeps.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwap, Cache};

use super::extent::{self, Extent, Source};
use crate::image::SparseArray;
use crate::storage::{FileSlot, prefetch_line};
use crate::units::{SECTOR, SectorRange};

/// Number of sectors in a cell: as many as one bitmap sector covers (2 MiB).
pub(super) const CELL_SECTORS: u64 = 4096;
/// Maximum total size of all lists of runs, in bytes. The list of one cell has at most 32 KiB, and a request touches at
/// most 17 cells.
const MAX_RUN_BYTES: usize = 32 << 20;

/// A run inside a cell, packed in 8 bytes: end in the cell (13 bits), file slot (12 bits, all ones for zeros), file
/// sector (39 bits).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct PackedRun(u64);

const END_BITS: u32 = 13;
const SLOT_BITS: u32 = 12;
const ZERO_SLOT: u64 = (1 << SLOT_BITS) - 1;

impl PackedRun {
    /// Packs a run that ends before sector `end` of the cell and whose first sector is at `source`.
    pub(super) fn new(end: u64, source: Source) -> PackedRun {
        let (slot, sector) = match source {
            Source::Zero => (ZERO_SLOT, 0),
            Source::File { slot, offset } => (u64::from(slot.0), offset / SECTOR),
        };
        assert!(end <= CELL_SECTORS && sector < 1 << (64 - END_BITS - SLOT_BITS), "files are smaller than 2^48 bytes");
        PackedRun(end | slot << END_BITS | sector << (END_BITS + SLOT_BITS))
    }

    fn end(self) -> u64 {
        self.0 & ((1 << END_BITS) - 1)
    }

    /// Returns the source of the sector that is `skip` sectors after the first one of the run.
    fn source(self, skip: u64) -> Source {
        match (self.0 >> END_BITS) & ZERO_SLOT {
            ZERO_SLOT => Source::Zero,
            slot => {
                let slot = FileSlot(u16::try_from(slot).expect("12 bits"));
                Source::File { slot, offset: ((self.0 >> (END_BITS + SLOT_BITS)) + skip) * SECTOR }
            }
        }
    }
}

impl std::fmt::Debug for PackedRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "..{} {:?}", self.end(), self.source(0))
    }
}

/// The runs of a cell.
#[derive(Clone, Debug)]
pub(super) enum Cell {
    /// One run covers the cell.
    Whole(PackedRun),
    /// Runs in ascending order, at least two.
    Runs(Box<[PackedRun]>),
}

impl Cell {
    /// Size of the list of runs on the heap, in bytes.
    fn heap_bytes(&self) -> usize {
        match self {
            Cell::Whole(_) => 0,
            Cell::Runs(runs) => size_of_val(&**runs),
        }
    }

    /// Prefetches the run that [`find_run`] tries first for sector `at` of the cell.
    #[inline]
    pub(super) fn prefetch(&self, at: u64) {
        if let Cell::Runs(runs) = self {
            prefetch_line((&raw const runs[guess_run(runs, at)]).cast());
        }
    }

    /// Appends the extents of `part` of the disk. The cell begins at sector `start` of the disk.
    #[inline]
    pub(super) fn append_to(&self, start: u64, part: SectorRange, extents: &mut Vec<Extent>) {
        match self {
            Cell::Whole(run) => extent::push(extents, part, run.source(part.start() - start)),
            Cell::Runs(runs) => append_runs(runs, start, part, extents),
        }
    }
}

/// The first sector of a run in the cell.
fn start_of(runs: &[PackedRun], number: usize) -> u64 {
    if number == 0 { 0 } else { runs[number - 1].end() }
}

/// Guesses the index of the run that contains sector `at` of the cell. The guess is right if all runs have the same
/// length.
fn guess_run(runs: &[PackedRun], at: u64) -> usize {
    usize::try_from(runs.len() as u64 * at / CELL_SECTORS).expect("below the number of runs")
}

/// Finds the run that holds sector `at` of the cell. If runs have similar lengths, such as the clusters of a guest's
/// file system, the first guess is usually right. Then one cache line of the list is read, or two if the run is the
/// first of its line.
fn find_run(runs: &[PackedRun], at: u64) -> usize {
    let guess = guess_run(runs, at);
    let right = at < runs[guess].end() && start_of(runs, guess) <= at;
    if right { guess } else { runs.partition_point(|run| run.end() <= at) }
}

/// Appends the extents of `part` of the disk from the runs of a cell that begins at sector `start`.
fn append_runs(runs: &[PackedRun], start: u64, part: SectorRange, extents: &mut Vec<Extent>) {
    let mut rest = part;
    let first = find_run(runs, part.start() - start);
    let mut begin = start_of(runs, first);
    for run in &runs[first..] {
        if rest.is_empty() {
            break;
        }
        let piece = rest.first(start + run.end() - rest.start());
        extent::push(extents, piece, run.source(rest.start() - start - begin));
        rest = rest.skip(piece.count());
        begin = run.end();
    }
}

/// The cached cells, by number.
#[derive(Debug)]
pub(super) struct CellTable {
    cells: SparseArray<OnceLock<Cell>>,
    run_bytes: AtomicUsize,
}

impl CellTable {
    fn new(sectors: u64) -> CellTable {
        let count = usize::try_from(sectors.div_ceil(CELL_SECTORS)).expect("at most 2^20 cells in 2040 GiB");
        CellTable { cells: SparseArray::new(count, OnceLock::new), run_bytes: AtomicUsize::new(0) }
    }

    #[inline]
    pub(super) fn get(&self, index: usize) -> Option<&Cell> {
        self.cells.get(index)?.get()
    }
}

/// The handle of one thread to the table of the frozen cache that it used last, so that threads share no reference
/// count in a look-up. A new handle refers to no table.
#[derive(Debug, Default)]
pub struct FrozenCacheHandle(Option<Cache<Arc<ArcSwap<CellTable>>, Arc<CellTable>>>);

impl FrozenCacheHandle {
    /// Drops the reference to the table, which may be the last one to a table that was replaced. A thread calls this
    /// before it sleeps.
    pub fn release(&mut self) {
        self.0 = None;
    }
}

/// Cache of the cells that were looked up.
#[derive(Debug)]
pub(super) struct FrozenCache {
    table: Arc<ArcSwap<CellTable>>,
    sectors: u64,
    max_run_bytes: usize,
}

impl FrozenCache {
    /// Makes an empty cache for a disk of `sectors`.
    pub(super) fn new(sectors: u64) -> FrozenCache {
        let table = Arc::new(ArcSwap::from_pointee(CellTable::new(sectors)));
        FrozenCache { table, sectors, max_run_bytes: MAX_RUN_BYTES }
    }

    /// The current table, which stays in memory as long as `handle` is neither used again, released nor dropped.
    #[inline]
    pub(super) fn table<'a>(&self, handle: &'a mut FrozenCacheHandle) -> &'a CellTable {
        if !handle.0.as_ref().is_some_and(|cache| std::ptr::eq(cache.arc_swap(), &*self.table)) {
            handle.0 = Some(Cache::new(self.table.clone()));
        }
        handle.0.as_mut().expect("made above").load()
    }

    /// Whether a cell is in the current table.
    pub(super) fn contains(&self, index: usize) -> bool {
        self.table.load().get(index).is_some()
    }

    /// Whether the lists of all cells take at least half of the limit.
    pub(super) fn is_half_full(&self) -> bool {
        self.table.load().run_bytes.load(Ordering::Relaxed) >= self.max_run_bytes / 2
    }

    /// Inserts a cell. If the lists of all cells then exceed the limit, a new table with this cell alone replaces the
    /// current one.
    pub(super) fn insert(&self, index: usize, cell: Cell) {
        let (table, bytes) = (self.table.load(), cell.heap_bytes());
        if table.get(index).is_some() {
            return; // another queue has inserted the same cell
        }
        let before = table.run_bytes.fetch_add(bytes, Ordering::Relaxed);
        if bytes > 0 && before + bytes > self.max_run_bytes {
            let fresh = CellTable::new(self.sectors);
            fresh.run_bytes.store(bytes, Ordering::Relaxed);
            let _ = fresh.cells.get_or_init(index).set(cell);
            // If two queues replace the table at once, the cell of one is lost and will be loaded again.
            self.table.store(Arc::new(fresh));
        } else if table.cells.get_or_init(index).set(cell).is_err() {
            table.run_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_packed_at_their_limits() {
        let last =
            Source::File { slot: FileSlot(u16::try_from(ZERO_SLOT).unwrap() - 1), offset: ((1 << 39) - 1) * SECTOR };
        for (end, source) in
            [(1, Source::Zero), (CELL_SECTORS, last), (7, Source::File { slot: FileSlot(0), offset: 0 })]
        {
            let run = PackedRun::new(end, source);
            assert_eq!((run.end(), run.source(0)), (end, source));
        }
        let run = PackedRun::new(4096, Source::File { slot: FileSlot(5), offset: 512 });
        assert_eq!(run.source(3), Source::File { slot: FileSlot(5), offset: 2048 });
        assert_eq!(PackedRun::new(9, Source::Zero).source(8), Source::Zero);
    }

    #[test]
    fn runs_of_equal_and_of_different_lengths_are_found() {
        let runs = |ends: &[u64]| ends.iter().map(|end| PackedRun::new(*end, Source::Zero)).collect::<Vec<_>>();
        let equal: Vec<u64> = (1..=32).map(|n| n * 128).collect();
        for ends in [&equal[..], &[1, 4096], &[4095, 4096], &[7, 8, 9, 3000, 4096], &[100, 200], &[1, 2, 3]] {
            let runs = runs(ends);
            for at in 0..*ends.last().unwrap() {
                assert_eq!(find_run(&runs, at), ends.iter().position(|end| at < *end).unwrap(), "{at} in {ends:?}");
            }
        }
    }

    #[test]
    fn memory_of_the_cache_is_limited() {
        let mut cache = FrozenCache::new(100 * CELL_SECTORS);
        let runs = |n: u64| (1..=n).map(|end| PackedRun::new(end, Source::Zero)).collect::<Box<[PackedRun]>>();
        cache.max_run_bytes = 4 * size_of_val(&*runs(10));
        cache.insert(99, Cell::Whole(PackedRun::new(CELL_SECTORS, Source::Zero)));
        (0..4).for_each(|n| cache.insert(n, Cell::Runs(runs(10))));
        cache.insert(3, Cell::Runs(runs(10)));
        let mut handle = FrozenCacheHandle::default();
        let held = cache.table(&mut handle);
        assert!(
            (0..4).all(|n| held.get(n).is_some()) && held.get(99).is_some(),
            "a cell that is inserted twice counts once"
        );
        cache.insert(4, Cell::Runs(runs(10)));
        assert!(held.get(3).is_some(), "a table in use stays in memory");
        let cached: Vec<_> = (0..100).filter(|n| cache.contains(*n)).collect();
        assert_eq!(cached, [4], "the limit is exceeded by one cell");
        let now = cache.table(&mut handle);
        assert!(now.get(4).is_some() && now.get(3).is_none(), "the next look-up uses the new table");
        let others = FrozenCache::new(CELL_SECTORS);
        assert!(others.table(&mut handle).get(0).is_none() && cache.table(&mut handle).get(4).is_some());
    }
}
