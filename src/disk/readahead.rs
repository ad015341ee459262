//! Reading ahead at the level of the disk: a guest that reads one thing behind the other meets, at every border between
//! layers, a file whose own readahead in the host knows nothing of it.
//!
//! A queue follows the streams among its reads. While reads wait for the disk, what comes next in a stream is planned as any
//! read is (bitmaps that are missing are loaded), and the host is told of its extents ([`Action::Prefetch`]). That is a hint:
//! no request waits for it, and nothing is told to the guest. Who reads anywhere pays for a few comparisons.
//!
//! - *Only while reads wait.* Reads that the page cache answers are complete when they were handed over. A read that is not
//!   pays for the next [`STEPS_PER_WAIT`] steps; a warm stream is only followed. The engine of plain calls waits for each read where
//!   nobody sees it, so with it nothing is read ahead.
//! - *Only extents below [`LONG`] where the host itself reads [`WIDE_READAHEAD`] ahead*. In longer ones its own readahead finds
//!   the stream, and does better: it reads into large folios, where a hint gets single pages.
//! - *Never more than a quarter of the engine's operations*, so that requests find room; what is beyond is left out.
//!
//! Measured by `benches/serve cold` on ext4, daemons without and with this in turns, three times each (medians, MiB/s, 512 MiB,
//! guest and server on a processor each of two, the host reads 8 MiB ahead; 2026-11-22). "Flat" is read(2) of a flat file,
//! "pieces" direct reads of the same pieces, 32 at once:
//!
//! ```text
//!                          128 KiB, 4 in flight    1 MiB, 4 in flight
//!   flat | pieces          1,780 | 920             1,890 | 840
//!   qemu-storage-daemon    1,510 (raw)             1,570 (raw)
//!   1 layer                1,660 -> 1,770          1,650 -> 1,710
//!   16, blocks in turns    1,510 -> 1,720          1,780 -> 1,880
//!   16, 64 KiB in turns      440 ->   930            620 ->   890
//! ```
//!
//! On a loop device, where the host reads Linux's usual 128 KiB ahead, by requests of 128 KiB: 1 layer from 960 to 1,370, blocks
//! in turns from 760 to 1,230, 64 KiB in turns from 450 to 800. Warm reads are as fast with it as without.
//!
//! What was tried and dropped:
//! - *Hints for long extents where the host reads 8 MiB ahead*: 16 layers of blocks in turns from 1,620 to 1,140-1,250, by
//!   requests of 1 MiB from 1,630 to 1,030. With 1 MiB there is nothing between the two.
//! - *posix_fadvise by the queue's thread* rather than through the ring: 880 instead of 780 (64 KiB in turns), but a queue that
//!   is full at the disk would hold up the requests behind it.

use std::sync::atomic::Ordering;

use super::lane::Lane;
use super::request::{Request, Work};
use super::task::{Task, Token};
use crate::chain::{Extent, PlanBuffer, Source};
use crate::storage::{Action, File, FileSlot, Op};
use crate::units::SectorRange;

/// Streams that a queue follows at once.
const STREAMS: usize = 4;
/// Reads of no stream that are remembered: any may be the first of one.
const RECENT_ENDS: usize = 8;
/// A read goes on with a stream where it begins less than this behind its end, in sectors (128 KiB): other queues may have
/// what lies between.
const MAX_GAP: u64 = 256;
/// How far ahead, in sectors: at first (512 KiB), and at most (8 MiB).
const MIN_WINDOW: u64 = 1 << 10;
const MAX_WINDOW: u64 = 16 << 10;
/// A step is this part of the way ahead, at least.
const STEPS_PER_WINDOW: u64 = 4;
/// Steps after a read that waited (64 MiB).
const STEPS_PER_WAIT: u32 = 32;
/// An end where no read begins.
const NO_END: u64 = 1 << 62;
/// Whole extents of this many bytes are left to a host that itself reads so many ahead.
const LONG_EXTENT: u64 = 1 << 20;
const WIDE_READAHEAD: u64 = 2 << 20;
/// Extents are looked up for whole blocks of the usual size, in sectors: their cut at the end of a step says nothing.
const BLOCK_SECTORS: u64 = 4096;
/// Bytes that the host is told of at once. It cuts off what is more than its readahead or its disk's largest request
/// (force_page_cache_ra in mm/readahead.c).
const HINT_BYTES: u64 = 256 << 10;
/// Requests for which there must be room besides.
const MIN_FREE_TASKS: usize = 64;

/// The streams of a queue.
pub(super) struct Readahead {
    streams: [ReadStream; STREAMS],
    /// Where reads of no stream ended.
    recent_ends: [u64; RECENT_ENDS],
    /// Which of them is forgotten next.
    oldest_end: usize,
    /// Reads of streams so far.
    clock: u64,
    /// Steps that are left before a read must have waited again.
    credit: u32,
    /// Operations under way.
    in_flight: usize,
}

/// Reads one behind the other.
#[derive(Clone, Copy)]
struct ReadStream {
    /// Where the next begins.
    next: u64,
    /// Up to where was read ahead.
    prefetched_to: u64,
    /// How far ahead of `next` that is to be, in sectors.
    window: u64,
    /// When it was last read.
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

    /// A read had to wait for the disk.
    pub(super) fn read_waited(&mut self) {
        self.credit = STEPS_PER_WAIT;
    }

    /// Takes note of a read on a disk of `sectors`; what is to be read ahead now.
    #[inline]
    fn record_read(&mut self, range: SectorRange, sectors: u64) -> Option<SectorRange> {
        let goes_on = |end: u64| range.start().wrapping_sub(end) < MAX_GAP;
        if let Some(at) = self.streams.iter().position(|s| goes_on(s.next)) {
            return self.step(at, range, sectors);
        }
        if let Some(at) = self.recent_ends.iter().position(|end| goes_on(*end)) {
            self.recent_ends[at] = NO_END;
            self.clock += 1;
            let unused = self.streams.iter_mut().min_by_key(|s| s.last_used).expect("there are some");
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
}

/// The range with all of the blocks that it touches.
fn whole_blocks(range: SectorRange, sectors: u64) -> SectorRange {
    SectorRange::between(
        range.start() / BLOCK_SECTORS * BLOCK_SECTORS,
        range.end().next_multiple_of(BLOCK_SECTORS).min(sectors),
    )
}

/// What of a file is read ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReadaheadPolicy {
    /// Nothing: O_DIRECT has nothing to do with what the host keeps.
    Off,
    /// Extents that the host's own readahead would not follow.
    ShortExtents,
    /// All extents.
    AllExtents,
}

impl ReadaheadPolicy {
    /// For a buffered file.
    pub(super) fn of(file: &File) -> ReadaheadPolicy {
        if file.kernel_readahead() >= WIDE_READAHEAD {
            ReadaheadPolicy::ShortExtents
        } else {
            ReadaheadPolicy::AllExtents
        }
    }
}

/// What the host is told of when `range` is to be read ahead: slot, byte offset and length.
fn prefetch_pieces(
    extents: &[Extent],
    range: SectorRange,
    reach: impl Fn(FileSlot) -> ReadaheadPolicy,
) -> impl Iterator<Item = (FileSlot, u64, u64)> {
    extents.iter().flat_map(move |extent| {
        let inside = extent.skip(range.start().saturating_sub(extent.range.start()));
        let file = match inside.source {
            Source::File { slot, offset } => match reach(slot) {
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

impl Lane {
    /// Takes note of a read, and begins to read ahead of it where that is due.
    #[inline]
    pub(super) fn track_read(&mut self, range: SectorRange) {
        if let Some(range) = self.readahead.record_read(range, self.disk.capacity())
            && self.push_capacity() >= MIN_FREE_TASKS
        {
            self.start_request(Request { tag: 0, work: Work::Prefetch { range } });
        }
    }

    /// Plans what is to be read ahead.
    pub(super) fn plan_readahead(&self, range: SectorRange, plan: &mut PlanBuffer) {
        let version = self.disk.version();
        version.plan_read(whole_blocks(range, version.sectors()), plan);
    }

    /// Tells the host of what was planned, as far as there is room.
    pub(super) fn push_prefetches(&mut self, number: u32, task: &mut Task, range: SectorRange, plan: &PlanBuffer) {
        let token = Token::Task { task: number, detail: 0 }.pack();
        let (disk, mut told) = (self.disk.clone(), 0);
        let room = (self.engine().depth() / 4).saturating_sub(self.readahead.in_flight);
        for (slot, at, len) in prefetch_pieces(&plan.extents, range, |slot| disk.readahead_policy(slot)).take(room) {
            self.readahead.in_flight += 1;
            task.pending_ops += 1;
            told += len;
            self.push_op(Op::range(token, slot, Action::Prefetch, at, len));
        }
        disk.counters.readahead_bytes.fetch_add(told, Ordering::Relaxed);
    }

    /// The host took a hint, or did not: nobody minds.
    pub(super) fn prefetch_completed(&mut self, number: u32) {
        self.readahead.in_flight -= 1;
        let task = self.tasks[number as usize].as_mut().expect("operations belong to tasks");
        task.pending_ops -= 1;
        if task.pending_ops == 0 {
            self.advance(number);
        }
    }
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
    fn a_stream_is_read_ahead_once_each_sector_and_never_too_far() {
        let mut ahead = Readahead::new();
        let (mut next, mut upto) = (1000, None);
        while next < DISK {
            ahead.read_waited();
            let count = 64.min(DISK - next);
            if let Some((from, to)) = read(&mut ahead, next, count) {
                assert!(upto.is_none_or(|upto| from == upto), "{from} does not go on at {upto:?}");
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
    fn the_way_ahead_grows() {
        let mut ahead = Readahead::new();
        ahead.read_waited();
        let steps: Vec<_> = (0..2000).filter_map(|n| read(&mut ahead, n * 8, 8)).map(|(from, to)| to - from).collect();
        assert_eq!(steps[..2], [MIN_WINDOW, MIN_WINDOW + 8], "to twice as far: {steps:?}");
        assert!(steps.windows(2).all(|w| w[0] <= w[1] || w[1] >= MAX_WINDOW / STEPS_PER_WINDOW), "{steps:?}");
        assert!(steps.iter().all(|s| *s <= MAX_WINDOW));
    }

    #[test]
    fn nothing_is_read_ahead_of_reads_that_do_not_wait() {
        let mut ahead = Readahead::new();
        assert!((0..5000).all(|n| read(&mut ahead, n * 256, 256).is_none()));
        ahead.read_waited();
        let steps = (5000..DISK / 256).filter(|n| read(&mut ahead, n * 256, 256).is_some()).count();
        assert_eq!(steps, STEPS_PER_WAIT as usize, "one wait pays for so many steps");
    }

    #[test]
    fn reads_anywhere_are_no_stream() {
        let (mut ahead, mut random) = (Readahead::new(), 1_u64);
        for _ in 0..10_000 {
            ahead.read_waited();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let got = read(&mut ahead, (random >> 33) % (1 << 10) * 4096, 8);
            assert_eq!(got, None);
        }
    }

    #[test]
    fn several_streams_go_on_beside_each_other_and_reads_anywhere() {
        let mut ahead = Readahead::new();
        let mut told = [0; STREAMS];
        for n in 0..400 {
            ahead.read_waited();
            for (i, told) in told.iter_mut().enumerate() {
                *told += u32::from(read(&mut ahead, i as u64 * 500_000 + n * 32, 32).is_some());
            }
            read(&mut ahead, 3_000_000 + n * 1000, 8);
        }
        assert!(told.iter().all(|t| *t > 3 && *t == told[0]), "{told:?}");
        // A new one takes the place of the one that was used longest ago.
        assert_eq!((0..3).filter_map(|n| read(&mut ahead, 2_500_000 + n * 8, 8)).count(), 1);
        let known: Vec<_> = ahead.streams.iter().map(|s| s.next).collect();
        assert!(known.contains(&2_500_024) && !known.contains(&(400 * 32)), "{known:?}");
    }

    #[test]
    fn what_other_queues_have_in_between_is_no_end_of_a_stream() {
        let mut ahead = Readahead::new();
        ahead.read_waited();
        let any = (0..20).filter_map(|n| read(&mut ahead, n * 512, 257)).count();
        assert!(any > 0, "every other read of 128 KiB");
        assert_eq!(
            (0..20).filter_map(|n| read(&mut ahead, (1 << 20) + n * 513, 257)).count(),
            0,
            "too far from each other"
        );
    }

    #[test]
    fn extents_are_told_in_pieces_and_some_are_left_to_the_host() {
        let file = |start: u64, end: u64, slot: u16, offset: u64| Extent {
            range: SectorRange::between(start, end),
            source: Source::File { slot: FileSlot(slot), offset },
        };
        let zero = Extent { range: SectorRange::between(300, 400), source: Source::Zero };
        let long = LONG_EXTENT / SECTOR;
        let extents = [file(0, 300, 1, 4096), zero, file(400, 1400, 2, 0), file(1400, 1400 + long, 3, 0)];
        let told =
            |from, to, reach| prefetch_pieces(&extents, SectorRange::between(from, to), |_| reach).collect::<Vec<_>>();
        let got = |from, to| told(from, to, ReadaheadPolicy::ShortExtents);
        let two = [(FileSlot(2), 0, HINT_BYTES), (FileSlot(2), HINT_BYTES, 1000 * SECTOR - HINT_BYTES)];
        assert_eq!(got(0, 5000), [vec![(FileSlot(1), 4096, 300 * SECTOR)], two.to_vec()].concat());
        assert_eq!(got(100, 410), [(FileSlot(1), 4096 + 100 * SECTOR, 200 * SECTOR), (FileSlot(2), 0, 10 * SECTOR)]);
        assert_eq!(got(1390, 1410), [(FileSlot(2), 990 * SECTOR, 10 * SECTOR)], "of the long one nothing, cut or not");
        assert_eq!(got(310, 390), []);
        let all = told(1390, 1410, ReadaheadPolicy::AllExtents);
        assert_eq!(all, [(FileSlot(2), 990 * SECTOR, 10 * SECTOR), (FileSlot(3), 0, 10 * SECTOR)]);
        assert_eq!(told(0, 5000, ReadaheadPolicy::Off), []);
        let direct = |slot| if slot == FileSlot(1) { ReadaheadPolicy::Off } else { ReadaheadPolicy::AllExtents };
        let others = prefetch_pieces(&extents, SectorRange::between(0, 410), direct).collect::<Vec<_>>();
        assert_eq!(others, [(FileSlot(2), 0, 10 * SECTOR)], "each file as it is open");
    }

    #[test]
    fn whole_blocks_end_with_the_disk() {
        let of = |from, to| whole_blocks(SectorRange::between(from, to), 10_000);
        assert_eq!(of(5000, 8192), SectorRange::between(4096, 8192));
        assert_eq!(of(4096, 8193), SectorRange::between(4096, 10_000));
    }
}
