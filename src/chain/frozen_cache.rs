//! What was decided about the cells of a chain's lower layers, and how much of it is kept.
//!
//! A cell of one run takes a word of a table; lists of runs are kept up to [`MAX_RUN_BYTES`] in all. Then the memory starts
//! afresh, and what is needed again is read again as on the first look, without holding up other requests. So a chain cut
//! into single sectors cannot eat the host, and a look-up takes no lock. Nor does it count on a counter that queues share:
//! who asks several times remembers what it saw last ([`CacheHandle`]), and lets go of it before it sleeps.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwap, Cache};

use super::extent::{self, Extent, Source};
use crate::image::SparseArray;
use crate::storage::{FileSlot, prefetch_line};
use crate::units::{SECTOR, SectorRange};

/// Sectors in a cell: what one bitmap sector of a 2 MiB block speaks for.
pub(super) const CELL_SECTORS: u64 = 4096;
/// Bytes of lists of runs that are kept. A cell has 32 KiB at the worst, and a request touches at most 17 cells.
const MAX_RUN_BYTES: usize = 32 << 20;

/// A run inside a cell, in 8 bytes: end in the cell (13 bits), file (12 bits, all ones for zero), file sector (39 bits).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct PackedRun(u64);

const END_BITS: u32 = 13;
const SLOT_BITS: u32 = 12;
const ZERO_SLOT: u64 = (1 << SLOT_BITS) - 1;

impl PackedRun {
    /// A run up to sector `end` of the cell whose first sector is at `source`.
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

    /// Where sector `skip` of the run is.
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

/// The answer for a cell.
#[derive(Debug)]
pub(super) enum Cell {
    /// One run covers it all.
    Whole(PackedRun),
    /// Runs in ascending order, at least two.
    Runs(Box<[PackedRun]>),
}

impl Cell {
    /// Bytes beside itself.
    fn heap_bytes(&self) -> usize {
        match self {
            Cell::Whole(_) => 0,
            Cell::Runs(runs) => size_of_val(&**runs),
        }
    }

    /// Has the processor fetch the run that holds sector `at` of the cell, as [`find`] guesses it.
    #[inline]
    pub(super) fn prefetch(&self, at: u64) {
        if let Cell::Runs(runs) = self {
            prefetch_line((&raw const runs[guess_run(runs, at)]).cast());
        }
    }

    /// Appends the part of the cell, which begins at sector `start`, that covers `part`.
    #[inline]
    pub(super) fn append_to(&self, start: u64, part: SectorRange, extents: &mut Vec<Extent>) {
        match self {
            Cell::Whole(run) => extent::push(extents, part, run.source(part.start() - start)),
            Cell::Runs(runs) => append_runs(runs, start, part, extents),
        }
    }
}

/// Where in the cell a run begins.
fn start_of(runs: &[PackedRun], number: usize) -> u64 {
    if number == 0 { 0 } else { runs[number - 1].end() }
}

/// Which run holds sector `at` of the cell, if all are as long as each other.
fn guess_run(runs: &[PackedRun], at: u64) -> usize {
    usize::try_from(runs.len() as u64 * at / CELL_SECTORS).expect("below the number of runs")
}

/// The run that holds sector `at` of the cell. Where runs are of like lengths, as a guest's clusters make them, the first
/// guess is right, and only one line of the list is fetched.
fn find_run(runs: &[PackedRun], at: u64) -> usize {
    let guess = guess_run(runs, at);
    let right = at < runs[guess].end() && start_of(runs, guess) <= at;
    if right { guess } else { runs.partition_point(|run| run.end() <= at) }
}

/// Appends the part of a cell's runs that covers `part`.
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

/// The cells that are decided.
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

/// What one who asks saw last.
#[derive(Debug)]
pub(super) struct CacheHandle(Cache<Arc<ArcSwap<CellTable>>, Arc<CellTable>>);

/// The memory of a chain.
#[derive(Debug)]
pub(super) struct FrozenCache {
    table: Arc<ArcSwap<CellTable>>,
    sectors: u64,
    max_run_bytes: usize,
}

impl FrozenCache {
    /// Nothing is decided of a disk of so many sectors.
    pub(super) fn new(sectors: u64) -> FrozenCache {
        let decided = Arc::new(ArcSwap::from_pointee(CellTable::new(sectors)));
        FrozenCache { table: decided, sectors, max_run_bytes: MAX_RUN_BYTES }
    }

    /// What is decided now, as long as it is held in `memo`.
    #[inline]
    pub(super) fn table<'a>(&self, memo: &'a mut Option<CacheHandle>) -> &'a CellTable {
        if !memo.as_ref().is_some_and(|memo| std::ptr::eq(memo.0.arc_swap(), &*self.table)) {
            *memo = Some(CacheHandle(Cache::new(self.table.clone())));
        }
        memo.as_mut().expect("made above").0.load()
    }

    /// Whether a cell is decided now.
    pub(super) fn contains(&self, index: usize) -> bool {
        self.table.load().get(index).is_some()
    }

    /// Keeps a cell, perhaps instead of all others.
    pub(super) fn insert(&self, index: usize, cell: Cell) {
        let (decided, bytes) = (self.table.load(), cell.heap_bytes());
        if decided.get(index).is_some() {
            return; // another queue was faster, and found the same
        }
        let before = decided.run_bytes.fetch_add(bytes, Ordering::Relaxed);
        if bytes > 0 && before + bytes > self.max_run_bytes {
            let fresh = CellTable::new(self.sectors);
            fresh.run_bytes.store(bytes, Ordering::Relaxed);
            let _ = fresh.cells.get_or_init(index).set(cell);
            // Where two queues do so at once, one forgets what the other has just kept: it is read again.
            self.table.store(Arc::new(fresh));
        } else if decided.cells.get_or_init(index).set(cell).is_err() {
            decided.run_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_keep_their_limits() {
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
    fn runs_of_like_and_of_other_lengths_are_found() {
        let runs = |ends: &[u64]| ends.iter().map(|end| PackedRun::new(*end, Source::Zero)).collect::<Vec<_>>();
        let like: Vec<u64> = (1..=32).map(|n| n * 128).collect();
        for ends in [&like[..], &[1, 4096], &[4095, 4096], &[7, 8, 9, 3000, 4096], &[100, 200], &[1, 2, 3]] {
            let runs = runs(ends);
            for at in 0..*ends.last().unwrap() {
                assert_eq!(find_run(&runs, at), ends.iter().position(|end| at < *end).unwrap(), "{at} in {ends:?}");
            }
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut cells = FrozenCache::new(100 * CELL_SECTORS);
        let runs = |n: u64| (1..=n).map(|end| PackedRun::new(end, Source::Zero)).collect::<Box<[PackedRun]>>();
        cells.max_run_bytes = 4 * size_of_val(&*runs(10));
        cells.insert(99, Cell::Whole(PackedRun::new(CELL_SECTORS, Source::Zero)));
        (0..4).for_each(|n| cells.insert(n, Cell::Runs(runs(10))));
        cells.insert(3, Cell::Runs(runs(10)));
        let mut memo = None;
        let held = cells.table(&mut memo);
        assert!((0..4).all(|n| held.get(n).is_some()) && held.get(99).is_some(), "twice the same counts once");
        cells.insert(4, Cell::Runs(runs(10)));
        assert!(held.get(3).is_some(), "who looks keeps what it looks at");
        let known: Vec<_> = (0..100).filter(|n| cells.contains(*n)).collect();
        assert_eq!(known, [4], "one more than there is room for");
        let now = cells.table(&mut memo);
        assert!(now.get(4).is_some() && now.get(3).is_none(), "and who looks again sees that");
        let others = FrozenCache::new(CELL_SECTORS);
        assert!(others.table(&mut memo).get(0).is_none() && cells.table(&mut memo).get(4).is_some());
    }
}
