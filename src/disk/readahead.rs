//! Readahead across layers. A guest that reads sequentially reaches, at every border between two layers, a file in
//! which the kernel's readahead has not detected the stream yet.
//!
//! A lane detects sequential streams among its reads. While reads wait for the disk, the next part of a stream is
//! planned like a read (missing bitmaps are loaded), and its extents are prefetched ([`Action::Prefetch`]). A prefetch
//! is a hint: no request waits for it, and it changes no answer. A random read costs a few comparisons.
//!
//! - *Only while reads wait.* A read that is complete right after the submit came from the page cache. Any other read
//!   grants the next [`STEPS_PER_WAIT`] steps. While no steps are granted, a stream is only tracked. The blocking
//!   engine completes every read in `submit`, so no steps are granted with it.
//! - *Only extents shorter than [`LONG_EXTENT`] if the kernel's own readahead is at least [`WIDE_READAHEAD`].* In
//!   longer extents the kernel's readahead detects the stream and is faster: it reads into large folios, whereas a hint
//!   reads into single pages.
//! - *At most a quarter of the operations that the engine can have in flight*, so that there is room for requests. The
//!   rest of a step is dropped.
//!
//! `docs/performance.md`, section 4, has the figures and the variants that were dropped.

use super::op_queue::OpQueue;
use crate::chain::{Extent, FrozenCacheHandle, PlanBuffer, Source, Version};
use crate::storage::{Action, File, FileSlot, Op};
use crate::units::SectorRange;

/// Maximum number of streams that a lane tracks.
const STREAMS: usize = 4;
/// Number of reads outside of streams whose ends are recorded, since each of them may be the first of a stream.
const RECENT_ENDS: usize = 8;
/// A read continues a stream if it begins less than this number of sectors (128 KiB) after the stream's end. Other
/// queues may have read the sectors in between.
const MAX_GAP: u64 = 256;
/// Initial window of a stream, in sectors (512 KiB).
const MIN_WINDOW: u64 = 1 << 10;
/// Maximum window of a stream, in sectors (8 MiB).
const MAX_WINDOW: u64 = 16 << 10;
/// A step prefetches at least the window divided by this number, except at the end of the disk.
const STEPS_PER_WINDOW: u64 = 4;
/// Number of steps that are granted when a read waits for the disk (64 MiB with the maximum window).
const STEPS_PER_WAIT: u32 = 32;
/// Value of an unused entry: no disk has a sector with this number.
const NO_END: u64 = 1 << 62;
/// Minimum length in bytes of an extent that is not prefetched if the kernel has wide readahead.
const LONG_EXTENT: u64 = 1 << 20;
/// Minimum readahead of the kernel, in bytes, that counts as wide.
const WIDE_READAHEAD: u64 = 2 << 20;
/// Alignment of the ranges that are planned, in sectors: the default block size. Without it, an extent that a step cuts
/// would look short.
const BLOCK_SECTORS: u64 = 4096;
/// Maximum length of a hint in bytes. The kernel truncates a hint to the maximum of its own readahead and the largest
/// request of the disk (force_page_cache_ra in mm/readahead.c).
const HINT_BYTES: u64 = 256 << 10;
/// The sequential streams of a lane.
pub(super) struct Readahead {
    streams: [ReadStream; STREAMS],
    /// Ends of the most recent reads outside of streams.
    recent_ends: [u64; RECENT_ENDS],
    /// Index of the oldest entry of `recent_ends`.
    oldest_end: usize,
    /// Number of reads that began or continued a stream.
    clock: u64,
    /// Number of steps that are still granted.
    credit: u32,
    /// Number of prefetch operations in flight.
    in_flight: usize,
}

/// A sequence of reads, each of which begins at the end of the read before it or less than [`MAX_GAP`] sectors later.
#[derive(Clone, Copy)]
struct ReadStream {
    /// First sector after the last read of the stream.
    next: u64,
    /// First sector that is not prefetched yet.
    prefetched_to: u64,
    /// Number of sectors to prefetch after `next`.
    window: u64,
    /// Value of `Readahead::clock` at the last read of the stream.
    last_used: u64,
}

impl ReadStream {
    fn new(next: u64, used: u64) -> ReadStream {
        ReadStream { next, prefetched_to: 0, window: MIN_WINDOW, last_used: used }
    }
}

impl Readahead {
    pub(super) fn new() -> Readahead {
        let (streams, strays) = ([ReadStream::new(NO_END, 0); STREAMS], [NO_END; RECENT_ENDS]);
        Readahead { streams, recent_ends: strays, oldest_end: 0, clock: 0, credit: 0, in_flight: 0 }
    }

    /// Records that a read waited for the disk.
    pub(super) fn read_waited(&mut self) {
        self.credit = STEPS_PER_WAIT;
    }

    /// Records a read on a disk of `sectors` sectors. Returns the range to prefetch now, or `None` if no step is due or
    /// granted.
    #[inline]
    pub(super) fn record_read(&mut self, range: SectorRange, sectors: u64) -> Option<SectorRange> {
        let continues = |end: u64| range.start().wrapping_sub(end) < MAX_GAP;
        if let Some(at) = self.streams.iter().position(|s| continues(s.next)) {
            return self.step(at, range, sectors);
        }
        if let Some(at) = self.recent_ends.iter().position(|end| continues(*end)) {
            self.recent_ends[at] = NO_END;
            self.clock += 1;
            let unused = self.streams.iter_mut().min_by_key(|s| s.last_used).expect("STREAMS is not zero");
            *unused = ReadStream::new(range.end(), self.clock);
            return None;
        }
        self.recent_ends[self.oldest_end] = range.end();
        self.oldest_end = (self.oldest_end + 1) % RECENT_ENDS;
        None
    }

    fn step(&mut self, at: usize, range: SectorRange, sectors: u64) -> Option<SectorRange> {
        self.clock += 1;
        let stream = &mut self.streams[at];
        (stream.next, stream.last_used) = (range.end(), self.clock);
        let (from, to) = (stream.prefetched_to.max(stream.next), (stream.next + stream.window).min(sectors));
        let due = to < sectors && from + stream.window / STEPS_PER_WINDOW <= to || to == sectors && from < to;
        if self.credit == 0 || !due {
            return None;
        }
        self.credit -= 1;
        stream.prefetched_to = to;
        stream.window = (stream.window * 2).min(MAX_WINDOW);
        Some(SectorRange::between(from, to))
    }

    /// Pushes hints for the extents in `range`, as long as hints use at most a quarter of the engine's depth. Returns
    /// the number of hints and the number of their bytes.
    pub(super) fn push_hints(
        &mut self,
        range: SectorRange,
        extents: &[Extent],
        policy: impl Fn(FileSlot) -> ReadaheadPolicy,
        token: u64,
        ops: &mut OpQueue,
    ) -> (u32, u64) {
        let (mut hints, mut bytes) = (0, 0);
        let room = (ops.engine.depth() / 4).saturating_sub(self.in_flight);
        for (slot, at, len) in prefetch_pieces(extents, range, policy).take(room) {
            self.in_flight += 1;
            hints += 1;
            bytes += len;
            ops.push(Op::range(token, slot, Action::Prefetch, at, len));
        }
        (hints, bytes)
    }

    /// Records the completion of a hint. A failed hint has no consequence.
    pub(super) fn hint_completed(&mut self) {
        self.in_flight -= 1;
    }
}

/// Plans all blocks that overlap a range to prefetch.
pub(super) fn plan_blocks(range: SectorRange, version: &Version, cache: &mut FrozenCacheHandle, plan: &mut PlanBuffer) {
    version.plan_read(whole_blocks(range, version.sectors()), cache, plan);
}

/// Extends a range to whole blocks of the default size, up to the end of the disk.
fn whole_blocks(range: SectorRange, sectors: u64) -> SectorRange {
    SectorRange::between(
        range.start() / BLOCK_SECTORS * BLOCK_SECTORS,
        range.end().next_multiple_of(BLOCK_SECTORS).min(sectors),
    )
}

/// Policy that selects the extents of a file to prefetch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReadaheadPolicy {
    /// No extents: O_DIRECT does not read from the page cache.
    Off,
    /// Extents shorter than [`LONG_EXTENT`], in which the kernel's own readahead does not detect the stream.
    ShortExtents,
    /// All extents.
    AllExtents,
}

impl ReadaheadPolicy {
    /// The policy for a buffered file.
    pub(super) fn of(file: &File) -> ReadaheadPolicy {
        if file.kernel_readahead() >= WIDE_READAHEAD {
            ReadaheadPolicy::ShortExtents
        } else {
            ReadaheadPolicy::AllExtents
        }
    }
}

/// Returns the hints that prefetch `range`, each as file slot, byte offset and length.
fn prefetch_pieces(
    extents: &[Extent],
    range: SectorRange,
    policy: impl Fn(FileSlot) -> ReadaheadPolicy,
) -> impl Iterator<Item = (FileSlot, u64, u64)> {
    extents.iter().flat_map(move |extent| {
        let inside = extent.skip(range.start().saturating_sub(extent.range.start()));
        let file = match inside.source {
            Source::File { slot, offset } => match policy(slot) {
                ReadaheadPolicy::AllExtents => Some((slot, offset)),
                ReadaheadPolicy::ShortExtents if extent.range.bytes() < LONG_EXTENT => Some((slot, offset)),
                ReadaheadPolicy::ShortExtents | ReadaheadPolicy::Off => None,
            },
            Source::Zero => None,
        };
        let bytes = inside.range.clip(range).bytes();
        file.into_iter().flat_map(move |(slot, offset)| {
            (0..bytes.div_ceil(HINT_BYTES))
                .map(move |n| (slot, offset + n * HINT_BYTES, (bytes - n * HINT_BYTES).min(HINT_BYTES)))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::SECTOR;

    const DISK: u64 = 1 << 22;

    fn read(ahead: &mut Readahead, start: u64, count: u64) -> Option<(u64, u64)> {
        ahead.record_read(SectorRange::between(start, start + count), DISK).map(|r| (r.start(), r.end()))
    }

    #[test]
    fn each_sector_of_a_stream_is_prefetched_once_and_within_the_window() {
        let mut ahead = Readahead::new();
        let (mut next, mut upto) = (1000, None);
        while next < DISK {
            ahead.read_waited();
            let count = 64.min(DISK - next);
            if let Some((from, to)) = read(&mut ahead, next, count) {
                assert!(upto.is_none_or(|upto| from == upto), "{from} is not adjacent to {upto:?}");
                assert!(from >= next + count && to <= next + count + MAX_WINDOW && to <= DISK);
                upto = Some(to);
            }
            next += count;
            assert!(
                next < 1200 || upto.is_some_and(|upto| upto >= (next + MIN_WINDOW * 3 / 4).min(DISK)),
                "short at {next}"
            );
        }
        assert_eq!(upto, Some(DISK), "the last step may be short");
    }

    #[test]
    fn the_window_grows() {
        let mut ahead = Readahead::new();
        ahead.read_waited();
        let steps: Vec<_> = (0..2000).filter_map(|n| read(&mut ahead, n * 8, 8)).map(|(from, to)| to - from).collect();
        assert_eq!(steps[..2], [MIN_WINDOW, MIN_WINDOW + 8], "the window doubles: {steps:?}");
        assert!(steps.windows(2).all(|w| w[0] <= w[1] || w[1] >= MAX_WINDOW / STEPS_PER_WINDOW), "{steps:?}");
        assert!(steps.iter().all(|s| *s <= MAX_WINDOW));
    }

    #[test]
    fn nothing_is_prefetched_without_a_read_that_waits() {
        let mut ahead = Readahead::new();
        assert!((0..5000).all(|n| read(&mut ahead, n * 256, 256).is_none()));
        ahead.read_waited();
        let steps = (5000..DISK / 256).filter(|n| read(&mut ahead, n * 256, 256).is_some()).count();
        assert_eq!(steps, STEPS_PER_WAIT as usize, "one wait grants these steps");
    }

    #[test]
    fn random_reads_are_no_stream() {
        let (mut ahead, mut random) = (Readahead::new(), 1_u64);
        for _ in 0..10_000 {
            ahead.read_waited();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let got = read(&mut ahead, (random >> 33) % (1 << 10) * 4096, 8);
            assert_eq!(got, None);
        }
    }

    #[test]
    fn several_streams_are_tracked_among_random_reads() {
        let mut ahead = Readahead::new();
        let mut steps = [0; STREAMS];
        for n in 0..400 {
            ahead.read_waited();
            for (i, steps) in steps.iter_mut().enumerate() {
                *steps += u32::from(read(&mut ahead, i as u64 * 500_000 + n * 32, 32).is_some());
            }
            read(&mut ahead, 3_000_000 + n * 1000, 8);
        }
        assert!(steps.iter().all(|n| *n > 3 && *n == steps[0]), "{steps:?}");
        // A new stream replaces the least recently used one.
        assert_eq!((0..3).filter_map(|n| read(&mut ahead, 2_500_000 + n * 8, 8)).count(), 1);
        let ends: Vec<_> = ahead.streams.iter().map(|s| s.next).collect();
        assert!(ends.contains(&2_500_024) && !ends.contains(&(400 * 32)), "{ends:?}");
    }

    #[test]
    fn gaps_that_other_queues_read_do_not_end_a_stream() {
        let mut ahead = Readahead::new();
        ahead.read_waited();
        let any = (0..20).filter_map(|n| read(&mut ahead, n * 512, 257)).count();
        assert!(any > 0, "every other read of 128 KiB is on another queue");
        assert_eq!(
            (0..20).filter_map(|n| read(&mut ahead, (1 << 20) + n * 513, 257)).count(),
            0,
            "too far from each other"
        );
    }

    #[test]
    fn extents_are_cut_into_hints_and_long_ones_are_left_to_the_kernel() {
        let file = |start: u64, end: u64, slot: u16, offset: u64| Extent {
            range: SectorRange::between(start, end),
            source: Source::File { slot: FileSlot(slot), offset },
        };
        let zero = Extent { range: SectorRange::between(300, 400), source: Source::Zero };
        let long = LONG_EXTENT / SECTOR;
        let extents = [file(0, 300, 1, 4096), zero, file(400, 1400, 2, 0), file(1400, 1400 + long, 3, 0)];
        let hints = |from, to, policy| {
            prefetch_pieces(&extents, SectorRange::between(from, to), |_| policy).collect::<Vec<_>>()
        };
        let got = |from, to| hints(from, to, ReadaheadPolicy::ShortExtents);
        let two = [(FileSlot(2), 0, HINT_BYTES), (FileSlot(2), HINT_BYTES, 1000 * SECTOR - HINT_BYTES)];
        assert_eq!(got(0, 5000), [vec![(FileSlot(1), 4096, 300 * SECTOR)], two.to_vec()].concat());
        assert_eq!(got(100, 410), [(FileSlot(1), 4096 + 100 * SECTOR, 200 * SECTOR), (FileSlot(2), 0, 10 * SECTOR)]);
        assert_eq!(
            got(1390, 1410),
            [(FileSlot(2), 990 * SECTOR, 10 * SECTOR)],
            "nothing of the long extent, whether it is cut or not"
        );
        assert_eq!(got(310, 390), []);
        let all = hints(1390, 1410, ReadaheadPolicy::AllExtents);
        assert_eq!(all, [(FileSlot(2), 990 * SECTOR, 10 * SECTOR), (FileSlot(3), 0, 10 * SECTOR)]);
        assert_eq!(hints(0, 5000, ReadaheadPolicy::Off), []);
        let direct = |slot| if slot == FileSlot(1) { ReadaheadPolicy::Off } else { ReadaheadPolicy::AllExtents };
        let others = prefetch_pieces(&extents, SectorRange::between(0, 410), direct).collect::<Vec<_>>();
        assert_eq!(others, [(FileSlot(2), 0, 10 * SECTOR)], "each file by its own policy");
    }

    #[test]
    fn whole_blocks_end_at_the_end_of_the_disk() {
        let of = |from, to| whole_blocks(SectorRange::between(from, to), 10_000);
        assert_eq!(of(5000, 8192), SectorRange::between(4096, 8192));
        assert_eq!(of(4096, 8193), SectorRange::between(4096, 10_000));
    }
}
