//! A split virtqueue's avail and used rings (virtio 1.2, 2.7): heads in, used elements out, kicks and signals.
//!
//! virtio-queue's `Queue` holds what the front-end said about the ring; serving it is done here, for three reasons. Its
//! `add_used` publishes `used.idx` for every element, where one release store for a batch is enough (measured: 23 to
//! 40 ns an element against 10 ns in batches of 32). Its signal decision counts only elements that it added itself, and
//! does not know NO_INTERRUPT. And it looks up the region of a ring for every word, where the rings are checked once
//! (V1) and stay.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use super::guest_memory::{GuestSpan, GuestView};
use super::spec::{self, AVAIL_NO_INTERRUPT, Descriptor, USED_NO_NOTIFY, desc, used_element};
use crate::error::{Error, ErrorKind, Result};

/// Both rings: flags.
const FLAGS: usize = 0;
/// Both rings: idx.
const IDX: usize = 2;
/// Both rings: the elements.
const ELEMENTS: usize = 4;
const AVAIL_ELEMENT: usize = 2;
const USED_ELEMENT: usize = 8;

/// Where the driver put its rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingLayout {
    /// Descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub table: u64,
    /// Guest address of the avail ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

/// The driver broke a rule so that nothing in the avail ring can be trusted any more: latch, do not poll again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingError {
    /// V2: more chains are said to be available than the ring can hold.
    AvailIndexJump,
    /// V3: a head is not the index of a descriptor.
    BadHead,
    /// V3: a head is in flight already.
    HeadInFlight,
    /// A page of the guest's memory, or of the record, could not be had: what was read since may be zeros of ours.
    MemoryLost,
}

/// The rings of one virtqueue in service.
pub struct SplitRing {
    table: GuestSpan,
    avail: GuestSpan,
    used: GuestSpan,
    size: u16,
    event_idx: bool,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// `used.idx` as the driver sees it.
    published: Wrapping<u16>,
    /// `published` when a signal was last decided.
    interrupt_decided: Wrapping<u16>,
    /// The next decision is yes: see [`SplitRing::new`].
    force_interrupt: bool,
    /// Whether kicks are asked for, without event_idx.
    kicks_enabled: bool,
}

impl SplitRing {
    /// Checks V1, and goes on at `next_avail` and at the used ring's own index.
    ///
    /// Whoever served the ring before may have died between its last used element and the signal for it; so the first
    /// decision on a signal is yes. A driver takes a signal without news in its stride.
    ///
    /// # Errors
    /// `Invalid` where the ring breaks V1.
    pub fn new(
        view: &GuestView,
        layout: RingLayout,
        max_size: u16,
        event_idx: bool,
        next_avail: u16,
    ) -> Result<SplitRing> {
        let size = layout.size;
        let invalid = |what: String| Error::new(ErrorKind::Invalid, what);
        if !size.is_power_of_two() || size > max_size {
            return Err(invalid(format!("a virtqueue of {size} descriptors: must be a power of two up to {max_size}")));
        }
        let n = usize::from(size);
        let span = |what: &str, addr: u64, len: usize, align: usize| {
            view.span(addr, len, align).ok_or_else(|| {
                invalid(format!(
                    "the {what} of {len} bytes at guest address {addr:#x} is misaligned or not in one region"
                ))
            })
        };
        let table = span("descriptor table", layout.table, n * desc::LEN, 16)?;
        let avail = span("avail ring", layout.avail, ELEMENTS + n * AVAIL_ELEMENT + 2, 2)?;
        let used = span("used ring", layout.used, ELEMENTS + n * USED_ELEMENT + 2, 4)?;
        let next_used = Wrapping(used.load(IDX, Ordering::Acquire));
        Ok(SplitRing {
            table,
            avail,
            used,
            size,
            event_idx,
            next_avail: Wrapping(next_avail),
            next_used,
            published: next_used,
            interrupt_decided: next_used,
            force_interrupt: true,
            kicks_enabled: true,
        })
    }

    /// Descriptors in the table.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor table.
    pub fn table(&self) -> &GuestSpan {
        &self.table
    }

    /// Index of the next entry of the avail ring.
    pub fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    /// Index of the next element of the used ring.
    pub fn next_used(&self) -> u16 {
        self.next_used.0
    }

    /// Chains that can be taken now (V2).
    ///
    /// # Errors
    /// [`RingError::AvailIndexJump`].
    pub fn available(&self) -> Result<u16, RingError> {
        // Acquire: what the driver wrote before it raised idx is seen by the reads that follow.
        let there = (Wrapping(self.avail.load(IDX, Ordering::Acquire)) - self.next_avail).0;
        if there > self.size { Err(RingError::AvailIndexJump) } else { Ok(there) }
    }

    /// The next chain's head (V3), one of those [`SplitRing::available`]; it stays until [`SplitRing::advance`].
    ///
    /// # Errors
    /// [`RingError::BadHead`].
    pub fn head(&self) -> Result<u16, RingError> {
        let head = self.avail_entry(0);
        if head < self.size { Ok(head) } else { Err(RingError::BadHead) }
    }

    /// Entry of the avail ring, so many behind the next.
    #[inline]
    fn avail_entry(&self, behind: u16) -> u16 {
        let at = ELEMENTS + usize::from((self.next_avail + Wrapping(behind)).0 & (self.size - 1)) * AVAIL_ELEMENT;
        self.avail.load(at, Ordering::Relaxed)
    }

    /// Has the processor fetch the first descriptor of a chain, so many behind the next: the driver's processor wrote it last.
    #[inline]
    pub fn prefetch_descriptor(&self, behind: u16) {
        self.table.prefetch(self.descriptor_offset(behind));
    }

    /// Where the first descriptor of such a chain points. Good for a hint only: it is not checked, and is read again.
    #[inline]
    pub fn header_addr_hint(&self, behind: u16) -> u64 {
        Descriptor::decode(self.table.load_raw64(self.descriptor_offset(behind)), 0).addr
    }

    /// Place of that descriptor; of another one where the head is none.
    #[inline]
    fn descriptor_offset(&self, behind: u16) -> usize {
        usize::from(self.avail_entry(behind) & (self.size - 1)) * desc::LEN
    }

    /// `taken` chains were taken and not given back by whoever served the ring before: goes on behind them.
    pub fn resume_after(&mut self, taken: u16) {
        self.next_avail = self.next_used + Wrapping(taken);
    }

    /// The next chain was taken.
    pub fn advance(&mut self) {
        self.next_avail += 1;
    }

    /// Gives a chain back with `written` bytes in it. The driver sees it after [`SplitRing::publish`].
    pub fn put_used(&mut self, head: u16, written: u32) {
        let at = ELEMENTS + usize::from(self.next_used.0 & (self.size - 1)) * USED_ELEMENT;
        let [id, len] = used_element(head, written);
        self.used.store_raw32(at, id);
        self.used.store_raw32(at + 4, len);
        self.next_used += 1;
    }

    /// Shows the driver all chains given back; true if it wants a signal.
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_used && !self.force_interrupt {
            return false;
        }
        // Release: status bytes and used elements are there before idx says so.
        self.used.store(IDX, self.next_used.0, Ordering::Release);
        self.published = self.next_used;
        // The driver first says where it wants a signal, then looks at idx; we do it the other way round.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = Wrapping(self.avail.load(self.used_event_offset(), Ordering::Relaxed));
            self.published - event - Wrapping(1) < self.published - self.interrupt_decided
        } else {
            self.avail.load(FLAGS, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        };
        self.interrupt_decided = self.published;
        std::mem::take(&mut self.force_interrupt) || wanted
    }

    /// Asks for a kick when a chain is added; true if one is there already, or the ring is worth a look.
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            let at = ELEMENTS + usize::from(self.size) * USED_ELEMENT;
            self.used.store(at, self.next_avail.0, Ordering::Relaxed);
        } else if !self.kicks_enabled {
            self.used.store(FLAGS, 0, Ordering::Relaxed);
            self.kicks_enabled = true;
        }
        // The driver first adds, then looks whether to kick; we do it the other way round.
        fence(Ordering::SeqCst);
        self.avail.load(IDX, Ordering::Relaxed) != self.next_avail.0
    }

    /// Asks for no kicks, as well as that can be said: with event_idx there are none until [`SplitRing::enable_kicks`].
    pub fn disable_kicks(&mut self) {
        if !self.event_idx && self.kicks_enabled {
            self.used.store(FLAGS, USED_NO_NOTIFY, Ordering::Relaxed);
            self.kicks_enabled = false;
        }
    }

    /// Place of `used_event`.
    fn used_event_offset(&self) -> usize {
        ELEMENTS + usize::from(self.size) * AVAIL_ELEMENT
    }
}

/// The largest virtqueue anywhere: rings of this size have offsets far below `usize::MAX`.
const _: () = assert!(spec::MAX_QUEUE_SIZE as usize * desc::LEN < 1 << 20);

#[cfg(test)]
mod tests {
    use super::super::testing::{AVAIL, SEAM, TABLE, TestDriver, USED};
    use super::*;

    const USED_EVENT: u64 = AVAIL + 4 + 2 * 8;
    const AVAIL_EVENT: u64 = USED + 4 + 8 * 8;

    /// A ring of 8 whose owed first signal has been given.
    fn ring(d: &TestDriver, event_idx: bool) -> SplitRing {
        let mut ring = d.ring(event_idx);
        assert!(ring.publish(), "the signal that a predecessor may have owed");
        assert!(!ring.publish());
        ring
    }

    #[test]
    fn rings_are_checked_once_and_for_all() {
        let d = TestDriver::new(8);
        let good = d.layout();
        let new = |layout| SplitRing::new(&d.view(), layout, 64, false, 0).map(|_| ()).map_err(|e| e.kind());
        let bad = Err(ErrorKind::Invalid);
        assert_eq!(new(good), Ok(()));
        for size in [1, 2, 64] {
            assert_eq!(new(RingLayout { size, ..good }), Ok(()), "{size}");
        }
        for size in [0, 3, 12, 63, 65, 128, 32768, u16::MAX] {
            assert_eq!(new(RingLayout { size, ..good }), bad, "{size}");
        }
        assert_eq!(new(RingLayout { table: TABLE + 8, ..good }), bad);
        assert_eq!(new(RingLayout { avail: AVAIL + 1, ..good }), bad);
        assert_eq!(new(RingLayout { avail: AVAIL + 2, ..good }), Ok(()));
        assert_eq!(new(RingLayout { used: USED + 2, ..good }), bad);
        assert_eq!(new(RingLayout { used: USED + 4, ..good }), Ok(()));
        // Up to the last byte of a region, and not into the next: 8 descriptors are 128, 22 and 70 bytes.
        assert_eq!(new(RingLayout { table: SEAM - 128, ..good }), Ok(()));
        assert_eq!(new(RingLayout { table: SEAM - 112, ..good }), bad);
        assert_eq!(new(RingLayout { avail: SEAM - 22, ..good }), Ok(()));
        assert_eq!(new(RingLayout { avail: SEAM - 20, ..good }), bad);
        assert_eq!(new(RingLayout { used: SEAM - 72, ..good }), Ok(()));
        assert_eq!(new(RingLayout { used: SEAM - 68, ..good }), bad);
        for lost in [u64::MAX - 15, 1 << 60] {
            assert_eq!(new(RingLayout { table: lost, ..good }), bad);
        }
    }

    #[test]
    fn the_avail_index_may_not_jump() {
        let d = TestDriver::new(8);
        let mut ring = d.ring(false);
        for next in [0u16, 1, 7, u16::MAX] {
            while ring.next_avail() != next {
                ring.advance();
            }
            for (there, want) in [
                (0, Ok(0)),
                (1, Ok(1)),
                (8, Ok(8)),
                (9, Err(RingError::AvailIndexJump)),
                (u16::MAX, Err(RingError::AvailIndexJump)),
            ] {
                d.put_word(AVAIL + 2, next.wrapping_add(there));
                assert_eq!(ring.available(), want, "{there} after {next}");
            }
        }
    }

    #[test]
    fn heads_are_descriptors() {
        let d = TestDriver::new(8);
        let ring = d.ring(false);
        for (head, want) in [(0, Ok(0)), (7, Ok(7)), (8, Err(RingError::BadHead)), (u16::MAX, Err(RingError::BadHead))]
        {
            d.put_word(AVAIL + 4, head);
            assert_eq!(ring.head(), want);
        }
        // What is fetched ahead takes any head.
        d.desc(TABLE, 3, (0x1234, 5, 0, 0));
        for (behind, head, want) in [(1, 3, 0x1234), (8, u16::MAX, 0), (9, 3, 0x1234)] {
            d.put_word(AVAIL + 4 + behind % 8 * 2, head);
            let behind = u16::try_from(behind).unwrap();
            ring.prefetch_descriptor(behind);
            assert_eq!(ring.header_addr_hint(behind), want, "{head} in entry {behind}");
        }
    }

    #[test]
    fn a_batch_is_published_as_a_whole_and_wraps() {
        let mut d = TestDriver::new(8);
        // As after a reconnection: both rings are under way.
        d.put_word(USED + 2, u16::MAX - 1);
        d.seen = u16::MAX - 1;
        let mut ring = SplitRing::new(&d.view(), d.layout(), 8, false, u16::MAX).unwrap();
        assert_eq!((ring.next_avail(), ring.next_used()), (u16::MAX, u16::MAX - 1));
        for i in 0..5u16 {
            ring.put_used(i, u32::from(i) * 100);
            assert_eq!(d.used(), [], "not before publish");
        }
        ring.publish();
        assert_eq!(d.used(), [(0, 0), (1, 100), (2, 200), (3, 300), (4, 400)]);
        assert_eq!(ring.next_used(), 3);
    }

    #[test]
    fn signals_follow_the_used_event() {
        let d = TestDriver::new(8);
        let mut ring = ring(&d, true);
        d.put_word(AVAIL, AVAIL_NO_INTERRUPT);
        let mut give = |n: u16, event: u16| {
            d.put_word(USED_EVENT, event);
            (0..n).for_each(|_| ring.put_used(0, 0));
            ring.publish()
        };
        assert!(give(1, 0), "the flag means nothing here");
        assert!(!give(0, 1), "nothing new");
        assert!(!give(1, 2), "1 was given, 2 is waited for");
        assert!(give(3, 2), "it is in the middle of the batch");
        assert!(!give(2, 2), "it has passed");
        assert!(give(1, 7), "exactly the last");
        for _ in 0..(u16::MAX - 8) / 7 {
            give(7, 0);
        }
        assert!(give(14, 2), "over the wrap");
    }

    #[test]
    fn signals_follow_the_flag_without_event_idx() {
        let d = TestDriver::new(8);
        let mut ring = ring(&d, false);
        d.put_word(USED_EVENT, 1000);
        ring.put_used(0, 0);
        assert!(ring.publish());
        d.put_word(AVAIL, AVAIL_NO_INTERRUPT);
        ring.put_used(0, 0);
        assert!(!ring.publish());
    }

    #[test]
    fn kicks_are_asked_for() {
        let mut d = TestDriver::new(8);
        let mut plain = ring(&d, false);
        plain.disable_kicks();
        assert_eq!(d.word(USED), USED_NO_NOTIFY);
        assert!(!plain.enable_kicks());
        assert_eq!(d.word(USED), 0);
        d.add(3);
        assert!(plain.enable_kicks(), "it came in between");
        plain.advance();
        assert!(!plain.enable_kicks());

        let mut event = ring(&d, true);
        d.put_word(AVAIL_EVENT, 77);
        event.disable_kicks();
        assert_eq!((d.word(USED), d.word(AVAIL_EVENT)), (0, 77));
        assert!(event.enable_kicks());
        event.advance();
        assert!(!event.enable_kicks());
        assert_eq!(d.word(AVAIL_EVENT), 1);
    }
}
