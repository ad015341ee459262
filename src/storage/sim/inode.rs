//! One simulated file without its names: current contents, durable contents, and the changes that are not durable yet.
//!
//! Each change concerns one sector or the length. After a crash a sector is either old or new, and each change survives
//! or not independently of the others.

#![allow(clippy::cast_possible_truncation, reason = "remainders of a sector, and places in a buffer that exists")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

use super::metadata::InodeMetadata;
use crate::units::SECTOR_BYTES;

const SECTOR: u64 = crate::units::SECTOR;
/// Unit of allocation in bytes.
pub(super) const PAGE: u64 = 4096;

/// Bytes of a sector, with their digest.
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

/// Mixes a word into a digest, with the multipliers of splitmix64 (`random.rs`).
fn mix(digest: u64, word: u64) -> u64 {
    let z = (digest ^ word).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (z ^ (z >> 29)).wrapping_mul(0x94D0_49BB_1331_11EB).rotate_left(31)
}

/// Change of a file.
#[derive(Clone, Debug)]
pub(super) enum InodeChange {
    /// A sector gets new bytes, or becomes a hole (`None`).
    Sector(u64, Option<Sector>),
    /// The file gets a new length.
    Len(u64),
}

/// Effect of an operation on a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Effect<'a> {
    /// Writes bytes at an offset.
    Write(u64, &'a [u8]),
    /// Turns a range (offset, length) into a hole. The length of the file does not change.
    Clear(u64, u64),
    /// Truncates or extends the file.
    Len(u64),
}

/// The changes that a sync makes durable.
#[derive(Clone, Copy, Debug)]
pub(super) enum SyncScope {
    /// All changes.
    All,
    /// Changes of the bytes in a range (begin, end), and of the length.
    Range(u64, u64),
}

impl SyncScope {
    fn covers(self, change: &InodeChange) -> bool {
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
                    self.truncate();
                }
            }
        }
    }

    /// Removes all bytes beyond the length.
    fn truncate(&mut self) {
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
        for (piece, sector, at) in sector_pieces(offset, into.len() as u64) {
            match self.sectors.get(&sector) {
                Some(bytes) => into[piece.clone()].copy_from_slice(&bytes.0[at..at + piece.len()]),
                None => into[piece].fill(0),
            }
        }
    }

    /// Returns a digest of the contents. Holes and zeros are equal.
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
                let sectors = sector_pieces(offset, bytes.len() as u64).map(|(piece, sector, at)| {
                    InodeChange::Sector(sector, Some(self.patched(sector, at, &bytes[piece])))
                });
                grows.into_iter().chain(sectors).collect()
            }
            Effect::Clear(offset, len) => {
                let end = (offset + len).min(self.len);
                if offset >= end {
                    return Vec::new();
                }
                // Only sectors that are not holes yet are changed, since the range may be much larger than the data in
                // it.
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

/// Splits a range of bytes at sector boundaries. Returns for each piece its position in the range, the sector, and the
/// offset in it.
fn sector_pieces(offset: u64, len: u64) -> impl Iterator<Item = (std::ops::Range<usize>, u64, usize)> {
    let end = offset + len;
    (offset / SECTOR..end.div_ceil(SECTOR)).take(if len == 0 { 0 } else { usize::MAX }).map(move |sector| {
        let start = (sector * SECTOR).max(offset);
        let stop = ((sector + 1) * SECTOR).min(end);
        ((start - offset) as usize..(stop - offset) as usize, sector, (start % SECTOR) as usize)
    })
}

#[derive(Clone, Debug)]
struct LoggedChange {
    seq: u64,
    change: InodeChange,
    /// A sync of this change failed: no later sync makes it durable.
    forgotten: bool,
}

/// File without its names.
#[derive(Clone, Default, Debug)]
pub(super) struct Inode {
    // Shared by all copies of a machine until one of them writes.
    now: Arc<Contents>,
    durable: Arc<Contents>,
    log: Vec<LoggedChange>,
    /// Allocated pages.
    pages: BTreeSet<u64>,
    pub(super) metadata: InodeMetadata,
}

impl Inode {
    /// Creates an empty file with a modification time.
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

    /// Returns a digest of the current contents.
    pub(super) fn digest(&self) -> u64 {
        self.now.digest()
    }

    /// Returns offset and length of the next data, up to the end of the file.
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

    /// Returns the pages of a range that are not allocated.
    pub(super) fn pages_missing(&self, offset: u64, len: u64) -> Vec<u64> {
        (offset / PAGE..(offset + len).div_ceil(PAGE)).filter(|p| !self.pages.contains(p)).collect()
    }

    /// Returns the number of pages of a range that contain data. Pages that are only allocated do not count.
    pub(super) fn pages_written(&self, offset: u64, len: u64) -> u64 {
        let sectors = offset / PAGE * (PAGE / SECTOR)..(offset + len).div_ceil(PAGE) * (PAGE / SECTOR);
        self.now.sectors.range(sectors).map(|(at, _)| at * SECTOR / PAGE).collect::<BTreeSet<_>>().len() as u64
    }

    pub(super) fn reserve(&mut self, pages: Vec<u64>) {
        self.pages.extend(pages);
    }

    /// Frees the pages that lie completely in a range. If the range includes the end of the file, the page at the end
    /// of the range is freed, too.
    pub(super) fn release(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let last = if end >= self.now.len { end.div_ceil(PAGE) } else { end / PAGE };
        let first = offset.div_ceil(PAGE);
        self.pages.retain(|page| !(first..last.max(first)).contains(page));
    }

    /// Returns the changes of an effect on the current contents.
    pub(super) fn changes(&self, effect: Effect<'_>) -> Vec<InodeChange> {
        self.now.changes(effect)
    }

    /// Applies a change. It is visible at once, and becomes durable with a sync.
    pub(super) fn apply(&mut self, seq: u64, change: InodeChange) {
        Arc::make_mut(&mut self.now).apply(&change);
        if let InodeChange::Len(len) = change {
            self.pages.split_off(&len.div_ceil(PAGE));
        }
        self.log.push(LoggedChange { seq, change, forgotten: false });
    }

    /// Makes durable the changes up to number `seq` that are in the scope, unless an earlier sync of them failed.
    pub(super) fn sync(&mut self, seq: u64, scope: SyncScope) {
        let mut kept: Vec<LoggedChange> = Vec::new();
        let durable = Arc::make_mut(&mut self.durable);
        for logged in std::mem::take(&mut self.log) {
            if logged.seq > seq || logged.forgotten || !scope.covers(&logged.change) {
                kept.push(logged);
                continue;
            }
            durable.apply(&logged.change);
            kept.retain(|old| !same_place(&old.change, &logged.change));
        }
        self.log = kept;
    }

    /// Records a failed sync: the changes count as clean, although they are not durable.
    pub(super) fn forget(&mut self, seq: u64, scope: SyncScope) {
        let lost = self.log.iter_mut().filter(|s| s.seq <= seq && scope.covers(&s.change));
        lost.for_each(|s| s.forgotten = true);
    }

    /// Returns the changes that are not durable, oldest first, with their numbers.
    pub(super) fn unsynced(&self) -> impl Iterator<Item = (u64, &InodeChange)> {
        self.log.iter().map(|s| (s.seq, &s.change))
    }

    /// Returns the file after a crash which exactly the changes in `survived` survive. They are applied in this order.
    pub(super) fn after_crash<'a>(&self, survived: impl Iterator<Item = &'a InodeChange>) -> Inode {
        let mut survived = survived.peekable();
        let mut left = self.durable.clone();
        if survived.peek().is_some() {
            let left = Arc::make_mut(&mut left);
            survived.for_each(|change| left.apply(change));
            left.truncate();
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
#[path = "inode_tests.rs"]
mod tests;
