//! A guest whose disk can be checked after a power cut. The contents of every sector identify the write that they come
//! from. The history has the position in the medium's log at the submission of each write and at the completion of each
//! flush, and the order of all submissions of flushes and completions of writes.

use std::collections::HashMap;
use std::ops::Range;

use crate::common::client::{Client, Command, Options};
use crate::common::rng::Rng;

pub(crate) const SECTOR: usize = 512;

/// Maximum number of requests in flight.
const DEPTH: usize = 8;
/// Maximum number of sectors in a request.
const MAX_SECTORS: u64 = 256;
/// Number of sectors in the part of the disk that is overwritten most.
const HOT_SECTORS: u64 = 2048;

/// The contents of a sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    Zero,
    /// Data of a write, or of the initial contents.
    Tag(u64),
}

/// Returns the bytes of sector `sector` with the tag `tag`.
pub(crate) fn tagged(tag: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for unit in bytes.chunks_exact_mut(16) {
        unit[..8].copy_from_slice(&(tag | 1 << 63).to_be_bytes());
        unit[8..].copy_from_slice(&sector.to_be_bytes());
    }
    bytes
}

/// Returns the bytes of a run of sectors with one tag.
pub(crate) fn tagged_run(tag: u64, first: u64, count: u64) -> Vec<u8> {
    (first..first + count).flat_map(|sector| tagged(tag, sector)).collect()
}

/// Identifies the contents of sector `sector`. Fails if the bytes have no pattern of the guest, or the pattern of
/// another sector.
pub(crate) fn identify(bytes: &[u8], sector: u64) -> Result<Content, String> {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    // All units of 16 bytes must be equal.
    if bytes[16..] != bytes[..SECTOR - 16] {
        return Err("a mixture".into());
    }
    match (word(0), word(8)) {
        (0, 0) => Ok(Content::Zero),
        (tag, place) if tag >> 63 == 1 && place == sector => Ok(Content::Tag(tag & !(1 << 63))),
        (tag, place) if tag >> 63 == 1 => Err(format!("sector {place} of write {}", tag & !(1 << 63))),
        _ => Err(format!("foreign bytes: {:02x?}", &bytes[..16])),
    }
}

/// Returns whether each unit of 16 bytes comes from one of the allowed contents of sector `sector`.
fn is_mixture_of(allowed: &[Content], bytes: &[u8], sector: u64) -> bool {
    bytes.chunks_exact(16).all(|unit| {
        allowed.iter().any(|content| match content {
            Content::Zero => unit == [0; 16],
            Content::Tag(tag) => *unit == tagged(*tag, sector)[..16],
        })
    })
}

/// The possible contents, after a power cut, of a sector that was being written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tearing {
    /// The sector has its old or its new contents.
    Whole,
    /// The sector may be a mixture of its allowed contents. Linux does not freeze a page during writeback: a write to
    /// the page at that time may be on the medium in part, until the page is written back again. (Seen with only
    /// `pwrite` and `fdatasync` on ext4: one sector in 1,400 under constant overwriting.)
    Torn,
}

/// A write or a zeroing.
struct Change {
    content: Content,
    sectors: Range<u64>,
    /// Position in the medium's log before the submission.
    submitted: usize,
    /// Number of the completion among the guest's events; `None` before the completion.
    acknowledged: Option<u64>,
}

struct Flush {
    /// Number of the submission among the guest's events. The flush covers changes acknowledged before this event.
    submitted_event: u64,
    /// Position in the medium's log at the completion; `None` before the completion.
    complete: Option<usize>,
}

/// All changes and flushes of a guest.
pub(crate) struct History {
    initial: Vec<Content>,
    changes: Vec<Change>,
    /// For each sector, the indices of its changes in order of submission.
    by_sector: Vec<Vec<u32>>,
    flushes: Vec<Flush>,
    events: u64,
}

impl History {
    /// Creates an empty history of a disk with these initial contents.
    pub(crate) fn of(initial: Vec<Content>) -> History {
        let of_sector = vec![Vec::new(); initial.len()];
        History { initial, changes: Vec::new(), by_sector: of_sector, flushes: Vec::new(), events: 0 }
    }

    fn event(&mut self) -> u64 {
        self.events += 1;
        self.events
    }

    fn change(&mut self, content: Content, sectors: Range<u64>, submitted: usize) -> usize {
        let number = self.changes.len();
        for list in &mut self.by_sector[index(sectors.start)..index(sectors.end)] {
            list.push(u32::try_from(number).expect("a short history"));
        }
        self.changes.push(Change { content, sectors, submitted, acknowledged: None });
        number
    }

    /// Returns the number of completed flushes.
    pub(crate) fn flushes(&self) -> usize {
        self.flushes.iter().filter(|f| f.complete.is_some()).count()
    }

    /// Checks a disk after a power cut at position `cut` of the medium's log. Each sector must have the contents that
    /// the last completed flush covered, or contents written after that flush was submitted (S1, S2). Returns the
    /// violations.
    pub(crate) fn check(&self, disk: &[u8], cut: usize, sectors: Tearing) -> Vec<String> {
        let complete = self.flushes.iter().filter(|f| f.complete.is_some_and(|at| at <= cut));
        let covered = complete.map(|f| f.submitted_event).max().unwrap_or(0);
        let mut wrong = Vec::new();
        if disk.len() != self.initial.len() * SECTOR {
            wrong.push(format!("the disk has {} bytes", disk.len()));
        }
        for (sector, bytes) in (0..).zip(disk.chunks_exact(SECTOR)) {
            let changes = || self.by_sector[index(sector)].iter().map(|n| &self.changes[*n as usize]);
            let is_covered = |c: &Change| c.acknowledged.is_some_and(|at| at < covered);
            let base = changes().rposition(is_covered);
            let since = changes().skip(base.unwrap_or(0)).take_while(|c| c.submitted <= cut).map(|c| c.content);
            let before = base.is_none().then_some(self.initial[index(sector)]);
            let found = identify(bytes, sector);
            if !found.as_ref().is_ok_and(|found| before.into_iter().chain(since.clone()).any(|c| c == *found)) {
                let allowed: Vec<_> = before.into_iter().chain(since).collect();
                if sectors == Tearing::Torn && is_mixture_of(&allowed, bytes, sector) {
                    continue;
                }
                wrong.push(format!("sector {sector}: {found:?}, allowed are {allowed:?}"));
            }
        }
        wrong
    }

    /// Checks a disk without a power cut: each sector must have the contents of its last change. Returns the
    /// violations.
    pub(crate) fn check_final(&self, disk: &[u8]) -> Vec<String> {
        let mut wrong = Vec::new();
        for (sector, bytes) in (0..).zip(disk.chunks_exact(SECTOR)) {
            let last = self.by_sector[index(sector)].last().map(|n| &self.changes[*n as usize]);
            let want = last.map_or(self.initial[index(sector)], |c| c.content);
            let found = identify(bytes, sector);
            if found != Ok(want) {
                wrong.push(format!("sector {sector}: {found:?}, expected {want:?}"));
            }
        }
        wrong
    }
}

fn index(sector: u64) -> usize {
    usize::try_from(sector).expect("a small disk")
}

/// A connected guest, and its history.
pub(crate) struct Guest<'a> {
    client: Client,
    history: History,
    position: &'a dyn Fn() -> usize,
    in_flight: HashMap<u64, Submitted>,
    sectors: u64,
}

enum Submitted {
    Change(usize),
    Flush(usize),
}

impl<'a> Guest<'a> {
    /// Connects a guest. `position` returns the current position in the medium's log.
    pub(crate) fn connect(socket: &std::path::Path, history: History, position: &'a dyn Fn() -> usize) -> Guest<'a> {
        let options = Options { queues: 2, depth: DEPTH, ..Options::default() };
        let client = Client::connect_with(socket, &options).expect("a connection");
        let sectors = client.capacity().expect("a configuration") / SECTOR as u64;
        assert_eq!(sectors, history.initial.len() as u64);
        Guest { client, history, position, in_flight: HashMap::new(), sectors }
    }

    /// Submits one random request.
    pub(crate) fn step(&mut self, rng: &mut Rng) {
        while !self.client.has_room() {
            self.complete_one();
        }
        let queue = usize::from(rng.below(2) == 1);
        let kind = rng.below(100);
        if kind < 10 {
            let asked = self.history.event();
            let ticket = self.client.submit(queue, Command::Flush).expect("a flush is queued");
            self.in_flight.insert(ticket, Submitted::Flush(self.history.flushes.len()));
            self.history.flushes.push(Flush { submitted_event: asked, complete: None });
            return;
        }
        let count = 1 + rng.below(MAX_SECTORS) / (1 << rng.below(8));
        let within = if rng.below(2) == 0 { HOT_SECTORS } else { self.sectors };
        let start = rng.below(within - count);
        // Two changes of one sector must not be in flight at once: the order of such changes is undefined.
        while self.overlaps_in_flight(&(start..start + count)) {
            self.complete_one();
        }
        let submitted = (self.position)();
        let (sent, ticket) = if kind < 20 {
            let sent = self.history.change(Content::Zero, start..start + count, submitted);
            let (offset, len) = (start * SECTOR as u64, count * SECTOR as u64);
            (sent, self.client.submit(queue, Command::WriteZeroes { offset, len, unmap: kind < 15 }))
        } else {
            let tag = self.history.changes.len() as u64 + 1;
            let sent = self.history.change(Content::Tag(tag), start..start + count, submitted);
            let data = tagged_run(tag, start, count);
            (sent, self.client.submit(queue, Command::Write { offset: start * SECTOR as u64, data: &data }))
        };
        self.in_flight.insert(ticket.expect("a request is queued"), Submitted::Change(sent));
    }

    fn overlaps_in_flight(&self, range: &Range<u64>) -> bool {
        self.in_flight.values().any(|sent| match sent {
            Submitted::Change(n) => {
                let other = &self.history.changes[*n].sectors;
                other.start < range.end && range.start < other.end
            }
            Submitted::Flush(_) => false,
        })
    }

    fn complete_one(&mut self) {
        let done = self.client.wait().expect("the daemon answers");
        done.result.expect("no request fails");
        let event = self.history.event();
        match self.in_flight.remove(&done.ticket).expect("a ticket completes once") {
            Submitted::Change(n) => self.history.changes[n].acknowledged = Some(event),
            Submitted::Flush(n) => self.history.flushes[n].complete = Some((self.position)()),
        }
    }

    /// Waits for all requests, flushes, and disconnects. Returns the history.
    pub(crate) fn finish(mut self) -> History {
        while self.client.in_flight() > 0 {
            self.complete_one();
        }
        let asked = self.history.event();
        self.client.flush().expect("a flush");
        self.history.flushes.push(Flush { submitted_event: asked, complete: Some((self.position)()) });
        self.history
    }
}

#[test]
fn a_history_accepts_allowed_contents_and_no_others() {
    let mut h = History::of(vec![Content::Tag(0), Content::Zero]);
    let disk = |a: Content, b: Content| {
        let bytes = |c, s| match c {
            Content::Zero => [0; SECTOR],
            Content::Tag(t) => tagged(t, s),
        };
        [bytes(a, 0), bytes(b, 1)].concat()
    };
    let (zero, tag) = (Content::Zero, Content::Tag);
    // Position 10: a write to both sectors, acknowledged. 20: a flush completes. 30: sector 0 is written again.
    let first = h.change(tag(1), 0..2, 10);
    h.changes[first].acknowledged = Some(h.event());
    let asked = h.event();
    h.flushes.push(Flush { submitted_event: asked, complete: Some(20) });
    h.change(tag(2), 0..1, 30);
    let ok = |a, b, cut| [Tearing::Whole, Tearing::Torn].map(|s| h.check(&disk(a, b), cut, s).is_empty()) == [true; 2];
    assert!(ok(tag(0), zero, 9) && !ok(tag(1), zero, 9), "not written yet");
    assert!(ok(tag(0), tag(1), 10) && ok(tag(1), zero, 19), "each sector by itself");
    assert!(!ok(zero, tag(1), 19), "zero was never in sector 0");
    assert!(ok(tag(1), tag(1), 20) && !ok(tag(0), tag(1), 20) && !ok(tag(1), zero, 20), "flushed");
    assert!(!ok(tag(2), tag(1), 29) && ok(tag(2), tag(1), 30) && ok(tag(1), tag(1), 30), "written since");
    assert!(h.check_final(&disk(tag(2), tag(1))).is_empty() && !h.check_final(&disk(tag(1), tag(1))).is_empty());
    assert!(identify(&tagged(3, 7), 8).unwrap_err().contains("sector 7 of write 3"));
    let mut torn = tagged(3, 7);
    torn[100] = 7;
    assert!(identify(&torn, 7).is_err());

    // The two halves of sector 0 are from different writes.
    let mixed = |a, b| [&tagged(a, 0)[..256], &tagged(b, 0)[256..], &tagged(1, 1)].concat();
    let may_be = |a, b, cut| [Tearing::Whole, Tearing::Torn].map(|s| h.check(&mixed(a, b), cut, s).is_empty());
    assert_eq!(may_be(1, 2, 30), [false, true], "flushed, and being overwritten");
    assert_eq!(
        (may_be(1, 2, 29), may_be(0, 2, 30)),
        ([false; 2], [false; 2]),
        "not yet written, and overwritten for good"
    );
}
