//! One simulated file without its names: what reads see, what is durable, and the changes between the two.
//!
//! Each change is one sector or the length, and each may survive a crash without the others (crash-safety 3.2: a sector
//! is old or new, length and contents persist independently).

#![allow(clippy::cast_possible_truncation, reason = "remainders of a sector, and places in a buffer that exists")]

use super::metadata::InodeMetadata;
use crate::units::SECTOR_BYTES;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

const SECTOR: u64 = crate::units::SECTOR;
/// Room is given by pages of this many bytes.
pub(super) const PAGE: u64 = 4096;

/// The bytes of a sector, and their digest.
#[derive(Debug)]
pub(super) struct SectorData(pub(super) [u8; SECTOR_BYTES], u64);

impl SectorData {
    pub(super) fn new(bytes: [u8; SECTOR_BYTES]) -> Sector {
        let words = bytes.as_chunks::<8>().0.iter();
        let digest = words.fold(1, |digest, word| mix(digest, u64::from_be_bytes(*word)));
        Arc::new(SectorData(bytes, digest))
    }
}

type Sector = Arc<SectorData>;

static ZERO: LazyLock<Sector> = LazyLock::new(|| SectorData::new([0; SECTOR_BYTES]));

/// Mixes a word into a digest (the finish of splitmix64, as in `rng.rs`).
fn mix(digest: u64, word: u64) -> u64 {
    let z = (digest ^ word).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (z ^ (z >> 29)).wrapping_mul(0x94D0_49BB_1331_11EB).rotate_left(31)
}

/// A step from one state of a file to the next.
#[derive(Clone, Debug)]
pub(super) enum InodeChange {
    /// A sector gets new bytes, or becomes a hole.
    Sector(u64, Option<Sector>),
    /// The file gets a length.
    Len(u64),
}

/// What an operation does to a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Effect<'a> {
    /// Bytes are written at an offset.
    Write(u64, &'a [u8]),
    /// A range inside the file becomes holes.
    Clear(u64, u64),
    /// The file is cut or extended.
    Len(u64),
}

/// What a sync is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum SyncScope {
    /// All of the file.
    All,
    /// The bytes of a range, from and to, and the length.
    Range(u64, u64),
}

impl SyncScope {
    fn has(self, change: &InodeChange) -> bool {
        match (self, change) {
            (SyncScope::All, _) | (_, InodeChange::Len(_)) => true,
            (SyncScope::Range(from, to), InodeChange::Sector(at, _)) => {
                (from / SECTOR..to.div_ceil(SECTOR)).contains(at)
            }
        }
    }
}

#[derive(Clone, Default, Debug)]
struct Contents {
    sectors: BTreeMap<u64, Sector>,
    len: u64,
}

impl Contents {
    fn apply(&mut self, change: &InodeChange) {
        match change {
            InodeChange::Sector(at, Some(bytes)) => drop(self.sectors.insert(*at, bytes.clone())),
            InodeChange::Sector(at, None) => drop(self.sectors.remove(at)),
            InodeChange::Len(len) => {
                let shrinks = *len < self.len;
                self.len = *len;
                if shrinks {
                    self.cut();
                }
            }
        }
    }

    /// Removes what lies beyond the length.
    fn cut(&mut self) {
        self.sectors.split_off(&self.len.div_ceil(SECTOR));
        let keep = (self.len % SECTOR) as usize;
        if keep > 0
            && let Some(last) = self.sectors.get_mut(&(self.len / SECTOR))
        {
            let mut bytes = last.0;
            bytes[keep..].fill(0);
            *last = SectorData::new(bytes);
        }
    }

    fn read(&self, into: &mut [u8], offset: u64) {
        for (piece, sector, at) in pieces(offset, into.len() as u64) {
            match self.sectors.get(&sector) {
                Some(bytes) => into[piece.clone()].copy_from_slice(&bytes.0[at..at + piece.len()]),
                None => into[piece].fill(0),
            }
        }
    }

    /// A number that tells contents apart; holes and zeros are the same.
    fn digest(&self) -> u64 {
        let written = self.sectors.iter().filter(|(_, bytes)| !Arc::ptr_eq(bytes, &ZERO));
        written.fold(mix(1, self.len), |digest, (at, bytes)| mix(mix(digest, *at), bytes.1))
    }

    fn changes(&self, effect: Effect<'_>) -> Vec<InodeChange> {
        match effect {
            Effect::Len(len) => vec![InodeChange::Len(len)],
            Effect::Write(offset, bytes) => {
                let end = offset + bytes.len() as u64;
                let grows = (end > self.len).then_some(InodeChange::Len(end));
                let sectors = pieces(offset, bytes.len() as u64).map(|(piece, sector, at)| {
                    InodeChange::Sector(sector, Some(self.patched(sector, at, &bytes[piece])))
                });
                grows.into_iter().chain(sectors).collect()
            }
            Effect::Clear(offset, len) => {
                let end = (offset + len).min(self.len);
                if offset >= end {
                    return Vec::new();
                }
                // Only sectors that are no holes already: ranges may be far larger than what is there.
                let present = self.sectors.range(offset / SECTOR..end.div_ceil(SECTOR));
                present
                    .map(|(&sector, _)| {
                        let start = (sector * SECTOR).max(offset);
                        let stop = ((sector + 1) * SECTOR).min(end);
                        let zeros = &[0; SECTOR_BYTES][..(stop - start) as usize];
                        let whole = zeros.len() == SECTOR_BYTES;
                        let at = (start % SECTOR) as usize;
                        InodeChange::Sector(sector, (!whole).then(|| self.patched(sector, at, zeros)))
                    })
                    .collect()
            }
        }
    }

    fn patched(&self, sector: u64, at: usize, bytes: &[u8]) -> Sector {
        let old = self.sectors.get(&sector).unwrap_or(&ZERO);
        let mut new = old.0;
        new[at..at + bytes.len()].copy_from_slice(bytes);
        if new == ZERO.0 { ZERO.clone() } else { SectorData::new(new) }
    }
}

/// Cuts a range of bytes at sector boundaries: the piece of the range, its sector, where it begins there.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (std::ops::Range<usize>, u64, usize)> {
    let end = offset + len;
    (offset / SECTOR..end.div_ceil(SECTOR)).take(if len == 0 { 0 } else { usize::MAX }).map(move |sector| {
        let start = (sector * SECTOR).max(offset);
        let stop = ((sector + 1) * SECTOR).min(end);
        ((start - offset) as usize..(stop - offset) as usize, sector, (start % SECTOR) as usize)
    })
}

#[derive(Clone, Debug)]
struct Logged {
    seq: u64,
    change: InodeChange,
    /// A failed sync forgot it: no later one makes it durable.
    forgotten: bool,
}

/// See the file's first lines.
#[derive(Clone, Default, Debug)]
pub(super) struct Inode {
    // Shared between the fates of a machine until one of them writes.
    now: Arc<Contents>,
    durable: Arc<Contents>,
    log: Vec<Logged>,
    /// Pages it has room for.
    pages: BTreeSet<u64>,
    pub(super) metadata: InodeMetadata,
}

impl Inode {
    /// An empty file, made at a time.
    pub(super) fn new(modified: i64) -> Inode {
        Inode { metadata: InodeMetadata::new(modified), ..Inode::default() }
    }

    pub(super) fn len(&self) -> u64 {
        self.now.len
    }

    pub(super) fn durable_len(&self) -> u64 {
        self.durable.len
    }

    pub(super) fn durable_sector(&self, at: u64) -> [u8; SECTOR_BYTES] {
        self.durable.sectors.get(&at).unwrap_or(&ZERO).0
    }

    pub(super) fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    pub(super) fn read(&self, into: &mut [u8], offset: u64) {
        self.now.read(into, offset);
    }

    /// A number that tells what reads see from what they see of other files.
    pub(super) fn digest(&self) -> u64 {
        self.now.digest()
    }

    /// The next run of sectors that are no holes, clipped to the length.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut present = self.now.sectors.range(offset / SECTOR..).map(|(&s, _)| s);
        let first = present.next()?;
        let mut end = first + 1;
        while present.next() == Some(end) {
            end += 1;
        }
        let (start, stop) = ((first * SECTOR).max(offset), (end * SECTOR).min(self.now.len));
        (start < stop).then(|| (start, stop - start))
    }

    /// Pages that a range would newly take.
    pub(super) fn pages_missing(&self, offset: u64, len: u64) -> Vec<u64> {
        (offset / PAGE..(offset + len).div_ceil(PAGE)).filter(|p| !self.pages.contains(p)).collect()
    }
    /// Pages of a range that hold something written: reserved ones do not.
    pub(super) fn pages_written(&self, offset: u64, len: u64) -> u64 {
        let sectors = offset / PAGE * (PAGE / SECTOR)..(offset + len).div_ceil(PAGE) * (PAGE / SECTOR);
        self.now.sectors.range(sectors).map(|(at, _)| at * SECTOR / PAGE).collect::<BTreeSet<_>>().len() as u64
    }

    pub(super) fn reserve(&mut self, pages: Vec<u64>) {
        self.pages.extend(pages);
    }

    /// Gives back the room of the pages that lie wholly in a range.
    pub(super) fn release(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let last = if end >= self.now.len { end.div_ceil(PAGE) } else { end / PAGE };
        let first = offset.div_ceil(PAGE);
        self.pages.retain(|page| !(first..last.max(first)).contains(page));
    }

    /// The steps that an effect would take now.
    pub(super) fn changes(&self, effect: Effect<'_>) -> Vec<InodeChange> {
        self.now.changes(effect)
    }

    /// Takes a step that readers see at once and that becomes durable with a sync.
    pub(super) fn apply(&mut self, seq: u64, change: InodeChange) {
        Arc::make_mut(&mut self.now).apply(&change);
        if let InodeChange::Len(len) = change {
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.log.push(Logged { seq, change, forgotten: false });
    }

    /// Makes every step up to `seq` durable that is covered and that no failed sync forgot.
    pub(super) fn sync(&mut self, seq: u64, covers: SyncScope) {
        let mut kept: Vec<Logged> = Vec::new();
        let durable = Arc::make_mut(&mut self.durable);
        for step in std::mem::take(&mut self.log) {
            if step.seq > seq || step.forgotten || !covers.has(&step.change) {
                kept.push(step);
                continue;
            }
            durable.apply(&step.change);
            kept.retain(|old| !same_place(&old.change, &step.change));
        }
        self.log = kept;
    }

    /// A sync failed: the steps count as clean although they are not durable.
    pub(super) fn forget(&mut self, seq: u64, covers: SyncScope) {
        let lost = self.log.iter_mut().filter(|s| s.seq <= seq && covers.has(&s.change));
        lost.for_each(|s| s.forgotten = true);
    }

    /// The steps that are not durable, oldest first, with their numbers.
    pub(super) fn unsynced(&self) -> impl Iterator<Item = (u64, &InodeChange)> {
        self.log.iter().map(|s| (s.seq, &s.change))
    }

    /// The file after a crash in which just these steps survived, in this order.
    pub(super) fn after_crash<'a>(&self, survived: impl Iterator<Item = &'a InodeChange>) -> Inode {
        let mut survived = survived.peekable();
        let mut left = self.durable.clone();
        if survived.peek().is_some() {
            let left = Arc::make_mut(&mut left);
            survived.for_each(|change| left.apply(change));
            left.cut();
        }
        let pages = left.sectors.keys().map(|s| s * SECTOR / PAGE).collect();
        Inode { now: left.clone(), durable: left, log: Vec::new(), pages, metadata: self.metadata.after_crash() }
    }
}

fn same_place(a: &InodeChange, b: &InodeChange) -> bool {
    match (a, b) {
        (InodeChange::Sector(a, _), InodeChange::Sector(b, _)) => a == b,
        (InodeChange::Len(_), InodeChange::Len(_)) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(inode: &mut Inode, seq: u64, offset: u64, bytes: &[u8]) {
        for change in inode.changes(Effect::Write(offset, bytes)) {
            inode.apply(seq, change);
        }
    }

    fn byte(inode: &Inode, at: u64) -> u8 {
        let mut b = [0];
        inode.read(&mut b, at);
        b[0]
    }

    #[test]
    fn a_sync_covers_what_was_complete_before_it() {
        let mut i = Inode::default();
        write(&mut i, 1, 0, &[1; 1024]);
        write(&mut i, 2, 512, &[2; 512]);
        i.sync(1, SyncScope::All);
        let old = i.after_crash([].into_iter());
        assert_eq!((byte(&old, 0), byte(&old, 600), old.len()), (1, 1, 1024));
        assert_eq!(byte(&i.after_crash(i.unsynced().map(|(_, change)| change)), 600), 2);
        assert_eq!(byte(&i, 600), 2);
    }

    #[test]
    fn a_forgotten_step_survives_no_newer_one() {
        let mut i = Inode::default();
        write(&mut i, 1, 0, &[1; 512]);
        i.sync(1, SyncScope::All);
        write(&mut i, 2, 0, &[2; 512]);
        i.forget(2, SyncScope::All);
        i.sync(2, SyncScope::All);
        assert_eq!(byte(&i.after_crash([].into_iter()), 0), 1);
        assert_eq!(byte(&i, 0), 2);
        write(&mut i, 3, 0, &[3; 512]);
        i.sync(3, SyncScope::All);
        assert_eq!(i.unsynced().count(), 0);
        assert_eq!(byte(&i.after_crash([].into_iter()), 0), 3);
    }

    #[test]
    fn a_sync_of_a_range_covers_no_more_than_that_and_the_length() {
        let mut i = Inode::default();
        write(&mut i, 1, 0, &[1; 1024]);
        write(&mut i, 2, 4096, &[2; 512]);
        i.sync(2, SyncScope::Range(4096, 4608));
        let left = i.after_crash([].into_iter());
        assert_eq!((byte(&left, 0), byte(&left, 512), byte(&left, 4096), left.len()), (0, 0, 2, 4608));
        assert_eq!(byte(&i.after_crash(i.unsynced().map(|(_, change)| change)), 600), 1);
        i.forget(2, SyncScope::Range(0, 512));
        i.sync(2, SyncScope::All);
        let left = i.after_crash([].into_iter());
        assert_eq!((byte(&left, 0), byte(&left, 512)), (0, 1), "a failed one forgets no more, either");
    }

    #[test]
    fn edges_of_sectors() {
        let mut i = Inode::default();
        write(&mut i, 1, 500, &[7; 24]);
        assert_eq!((byte(&i, 499), byte(&i, 500), byte(&i, 523), i.len()), (0, 7, 7, 524));
        for change in i.changes(Effect::Clear(510, 5)) {
            i.apply(2, change);
        }
        assert_eq!((byte(&i, 509), byte(&i, 510), byte(&i, 514), byte(&i, 515)), (7, 0, 0, 7));
        i.apply(3, InodeChange::Len(516));
        i.apply(4, InodeChange::Len(600));
        assert_eq!((byte(&i, 515), byte(&i, 516)), (7, 0));
        assert_eq!(i.next_data(0), Some((0, 600)));
        assert_eq!(i.next_data(513), Some((513, 87)));
        // The length that was lost takes the bytes beyond with it.
        i.sync(1, SyncScope::All);
        let cut = i.after_crash([InodeChange::Len(501)].iter());
        assert_eq!((cut.len(), byte(&cut, 500), byte(&cut, 501)), (501, 7, 0));
    }
}
