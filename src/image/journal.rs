//! The live journal: what was marked since the last commit, in memory that outlives the process (crash-safety 3.9).
//!
//! A killed daemon's guest lives on and will never repeat what was acknowledged, so its successor must know every mark.
//! The journal lives on tmpfs: it is there after a kill, and gone after a host crash, when the guest is gone too. Marking
//! costs a store.
//!
//! ```text
//!   words 0..512      header: who it belongs to, the last commit, a sum over the block table
//!   then SLOTS x 68   slot: epoch | granule | place | placed by | 64 words of bitmap
//! ```
//!
//! A slot speaks for one granule: where its block is, and all its bits. It counts while its epoch is younger than the last
//! commit. Epochs advance with each commit's snapshot, so one store of the header (`COMMITTED`) ends all slots that
//! the commit has made superfluous, together with the sum that goes with it; there is no moment in between.
//!
//! Order of stores: a slot's words before its epoch; its bits before the request is answered.
//!
//! It is believed only by a process on the same boot, for the same file (inode and UUID) whose block table sums to what
//! the journal expects: the sum of the entries that commits have put there, and, of the blocks that slots speak for and
//! no commit has, those whose entries a commit under way may have written.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fit::{identity, mix, path_of, table_sum};
use super::open::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap;
use crate::mutant::{self, Mutant};
use crate::storage::{Env, Live};

/// Granules that may be marked between two commits.
pub const SLOTS: u32 = 4096;
/// Slots in use from which on a commit is due.
const DUE: usize = SLOTS as usize * 3 / 4;

const MAGIC: u64 = u64::from_be_bytes(*b"ddjrnl01");
const HEADER: usize = 512;
const SLOT: usize = 68;
const WORDS: usize = 64;
/// Bytes of memory that a journal takes.
pub const BYTES: u64 = ((HEADER + SLOTS as usize * SLOT) * size_of::<u64>()) as u64;

// Words of the header.
const MAGIC_AT: usize = 0;
const IDENTITY_AT: usize = 1; // boot id (2), device, inode, UUID (2)
const COMMITTED: usize = 7; // last commit's epoch << 1 | which sum counts
const SUMS: usize = 8; // two
const UNACCOUNTED: usize = 10; // 1: a commit under way may put places into the file that no slot tells
// Not zero: why the image was poisoned, as text.
const POISON: usize = 16;
const POISON_WORDS: usize = 32;

// Words of a slot.
const EPOCH: usize = 0;
const GRANULE: usize = 1;
const PLACE: usize = 2;
const PLACED_BY: usize = 3;
const BITS: usize = 4;

/// No commit has put the block's place into the file.
const NEVER: u64 = u64::MAX;

/// The journal of an image that is open for writing.
#[derive(Debug)]
pub struct Journal {
    live: Live,
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Slots claimed now belong to this epoch.
    epoch: u64,
    free: Vec<u32>,
    used: BTreeSet<u32>,
    /// Blocks whose places the running commit puts into the file, and its epoch.
    placing: (u64, BTreeSet<u32>),
}

/// What a slot of a predecessor says.
#[derive(Clone, Debug)]
pub struct Found {
    /// The slot.
    pub slot: u32,
    /// The granule.
    pub granule: usize,
    /// Place of the granule's block.
    pub place: u32,
    /// The granule's bits.
    pub words: [u64; WORDS],
    counted: bool,
}

impl Journal {
    /// Opens the journal of an image in `folder`, a new one if there is none or `discard` says so. What a predecessor left
    /// there is returned; the caller takes it in, or gives up.
    ///
    /// # Errors
    /// `Unsupported` where `folder` is not in memory; `Refused` where a journal is there that does not fit the image.
    pub fn open(env: &dyn Env, folder: &Path, image: &Image, discard: bool) -> Result<(Journal, Vec<Found>)> {
        let path = path_of(folder, image.file(), image.uuid())?;
        if discard && env.exists(&path) {
            log::warn!("{}: discarded, with what was acknowledged since the last flush", path.display());
            env.remove(&path)?;
        }
        // The file comes last: a failure before leaves nothing behind.
        let (identity, sum) = (identity(env, image)?, table_sum(image));
        let live = env.live(&path, HEADER + SLOTS as usize * SLOT)?;
        let new = live[MAGIC_AT].load(Ordering::Acquire) == 0;
        if new {
            for (at, word) in identity.into_iter().enumerate() {
                live[IDENTITY_AT + at].store(word, Ordering::Relaxed);
            }
            live[SUMS].store(sum, Ordering::Relaxed);
            live[MAGIC_AT].store(MAGIC, Ordering::Release);
        }
        let committed = live[COMMITTED].load(Ordering::Acquire) >> 1;
        let state =
            State { epoch: committed + 1, free: Vec::new(), used: BTreeSet::new(), placing: Default::default() };
        let journal = Journal { live, path, state: Mutex::new(state) };
        let found = journal.look(&identity, sum, image)?;
        journal.settle(sum, &found, image);
        Ok((journal, found))
    }

    /// Counts in the places that a commit of the predecessor has put into the file without living to say so: `sum` is that
    /// of the table now. From here on they are as if they had always been there.
    ///
    /// As at the end of a commit, one store makes it so: until then the slots say nothing that they did not say before.
    fn settle(&self, sum: u64, found: &[Found], image: &Image) {
        let word = self.live[COMMITTED].load(Ordering::Acquire);
        let which = usize::from(word & 1 == 1);
        if self.live[SUMS + which].load(Ordering::Acquire) == sum {
            return;
        }
        let mut state = self.lock();
        let settled = state.epoch + 1;
        state.epoch = settled + 1;
        let per_block = image.block_size().map_or(1, |b| b.bitmap_sectors() as usize);
        let in_file = |f: &Found| {
            let block = u32::try_from(f.granule / per_block).expect("looked at before");
            image.bat().is_some_and(|table| table.place(block).is_some())
        };
        for f in found {
            if !f.counted {
                let placed_by = if in_file(f) { settled } else { NEVER };
                self.word(f.slot, PLACED_BY).store(placed_by, Ordering::Release);
            }
            self.word(f.slot, EPOCH).store(state.epoch, Ordering::Release);
        }
        self.live[SUMS + (1 - which)].store(sum, Ordering::Release);
        self.live[COMMITTED].store(settled << 1 | (1 - which) as u64, Ordering::Release);
        self.live[UNACCOUNTED].store(0, Ordering::Release);
    }

    /// The folder it lies in.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Whether it contains nothing that a successor needs: no mark, and no record of a failed sync.
    pub(super) fn is_vacant(&self) -> bool {
        self.is_empty() && self.poisoned().is_none()
    }

    /// Removes it: everything it says is in the file, or is given up.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, env: &dyn Env) -> Result<()> {
        env.remove(&self.path)
    }

    /// Holds what is there against the image, and gathers the slots that count.
    fn look(&self, identity: &[u64; 6], sum: u64, image: &Image) -> Result<Vec<Found>> {
        let refuse = |why: &str| {
            let what = format!(
                "the live journal does not fit {}: {why}; what it holds was acknowledged to a guest. \
                 If that guest is gone, start with --discard-journal",
                image.file().path().display()
            );
            Err(Error::new(ErrorKind::Refused, what).at_path(&self.path))
        };
        if self.live[MAGIC_AT].load(Ordering::Acquire) != MAGIC {
            return refuse("it is of another version");
        }
        if let Some(why) = self.poisoned() {
            let what = format!(
                "it was poisoned: {why}. What was acknowledged since the last flush is lost; check it, then start with \
                 --discard-journal"
            );
            return Err(Error::new(ErrorKind::Poisoned, what).at_path(image.file().path()));
        }
        let stored = |at: usize| self.live[IDENTITY_AT + at].load(Ordering::Relaxed);
        if (0..2).any(|at| stored(at) != identity[at]) && !mutant::is(Mutant::OldJournal) {
            return refuse("the host was started anew since");
        }
        if (2..6).any(|at| stored(at) != identity[at]) {
            return refuse("it belongs to another file");
        }
        let word = self.live[COMMITTED].load(Ordering::Acquire);
        let (committed, settled) = (word >> 1, self.live[SUMS + usize::from(word & 1 == 1)].load(Ordering::Acquire));
        let mut state = self.lock();
        let mut found = Vec::new();
        for slot in (0..SLOTS).rev() {
            let epoch = self.word(slot, EPOCH).load(Ordering::Acquire);
            if epoch <= committed {
                self.word(slot, EPOCH).store(0, Ordering::Release);
                state.free.push(slot);
                continue;
            }
            state.epoch = state.epoch.max(epoch);
            state.used.insert(slot);
            let placed_by = self.word(slot, PLACED_BY).load(Ordering::Relaxed);
            let place = u32::try_from(self.word(slot, PLACE).load(Ordering::Relaxed));
            let Ok(place) = place else { return refuse("it is damaged") };
            let words = std::array::from_fn(|n| self.word(slot, BITS + n).load(Ordering::Acquire));
            let granule = usize::try_from(self.word(slot, GRANULE).load(Ordering::Relaxed)).unwrap_or(usize::MAX);
            found.push(Found { slot, granule, place, words, counted: placed_by <= committed });
        }
        drop(state);
        let per_block = image.block_size().map_or(1, |b| b.bitmap_sectors() as usize);
        let mut expected = settled;
        let mut seen = BTreeSet::new();
        for f in &found {
            let Ok(block) = u32::try_from(f.granule / per_block) else { return refuse("it is damaged") };
            let in_file = image.bat().filter(|t| block < t.len()).map(|t| t.place(block));
            match in_file {
                None => return refuse("it is damaged"),
                Some(Some(place)) if place != f.place => return refuse("a block has moved"),
                Some(Some(place)) if !f.counted && seen.insert(block) => {
                    expected = expected.wrapping_add(mix(block, place));
                }
                Some(_) => {}
            }
        }
        let accounted = self.live[UNACCOUNTED].load(Ordering::Acquire) == 0;
        if expected != sum && accounted { refuse("its block table has changed") } else { Ok(found) }
    }

    /// Takes a slot for a granule whose bits are `words`; `None` where all are taken. `fresh`: no commit has put the
    /// block's place into the file.
    pub(super) fn claim(
        &self,
        granule: usize,
        block: u32,
        place: u32,
        fresh: bool,
        words: &[AtomicU64],
    ) -> Option<u32> {
        let mut state = self.lock();
        let slot = state.free.pop()?;
        let placed_by = match &state.placing {
            (epoch, blocks) if blocks.contains(&block) => *epoch,
            _ if fresh => NEVER,
            _ => 0,
        };
        self.word(slot, GRANULE).store(granule as u64, Ordering::Relaxed);
        self.word(slot, PLACE).store(place.into(), Ordering::Relaxed);
        self.word(slot, PLACED_BY).store(placed_by, Ordering::Relaxed);
        for n in 0..WORDS {
            let bits = words.get(n).map_or(0, |w| w.load(Ordering::SeqCst));
            self.word(slot, BITS + n).store(bits, Ordering::Relaxed);
        }
        self.word(slot, EPOCH).store(state.epoch, Ordering::Release);
        state.used.insert(slot);
        Some(slot)
    }

    /// Sets bits of a slot.
    pub(super) fn set(&self, slot: u32, bit: u32, count: u32) {
        let at = HEADER + slot as usize * SLOT + BITS;
        bitmap::set_atomic(&self.live[at..at + WORDS], bit, count);
    }

    /// Remembers for the next process that a sync failed: what the slots say must not be believed any more, since the
    /// host may have dropped the data they speak for.
    pub(super) fn poison(&self, why: &str) {
        let mut bytes = [0; POISON_WORDS * 8];
        let len = why.len().min(bytes.len());
        bytes[..len].copy_from_slice(&why.as_bytes()[..len]);
        for (n, word) in bytes.as_chunks::<8>().0.iter().enumerate().rev() {
            self.live[POISON + n].store(u64::from_be_bytes(*word), Ordering::Release);
        }
    }

    /// Why it was poisoned.
    fn poisoned(&self) -> Option<String> {
        let words = (0..POISON_WORDS).map(|n| self.live[POISON + n].load(Ordering::Acquire).to_be_bytes());
        let bytes: Vec<u8> = words.flatten().take_while(|b| *b != 0).collect();
        (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether a commit should begin, so that slots do not run out.
    pub fn is_due(&self) -> bool {
        self.lock().used.len() >= DUE
    }

    /// Slots in use.
    pub fn len(&self) -> usize {
        self.lock().used.len()
    }

    /// Whether no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A commit begins, which is going to put the places of `blocks` into the file. Called before its snapshot is taken:
    /// slots claimed from now on belong to the next one. Its epoch. `unaccounted`: some of the blocks found no slot when
    /// they got their places; if this commit is killed, the sum proves nothing.
    pub(super) fn begin(&self, blocks: BTreeSet<u32>, unaccounted: bool) -> u64 {
        let mut state = self.lock();
        if unaccounted {
            self.live[UNACCOUNTED].store(1, Ordering::Release);
        }
        let epoch = state.epoch;
        state.placing = (epoch, blocks);
        state.epoch += 1;
        epoch
    }

    /// The commit that began last failed; what it was to place, the next one will.
    pub(super) fn failed(&self) {
        self.lock().placing.1.clear();
    }

    /// The commit of `epoch` has made its snapshot durable, `places` (block, place) included: all slots up to that epoch are
    /// superfluous, but for those that are still in use. `keep(slot, granule, renew)` tells: of a slot in use it calls
    /// `renew` while it holds the granule.
    pub(super) fn committed(&self, epoch: u64, places: &[(u32, u32)], keep: impl Fn(u32, usize, &dyn Fn()) -> bool) {
        let (next, old) = {
            let state = self.lock();
            let old: Vec<u32> = state.used.iter().copied().filter(|s| self.epoch_of(*s) <= epoch).collect();
            (state.epoch, old)
        };
        let placed: BTreeSet<u64> = places.iter().map(|(_, place)| u64::from(*place)).collect();
        let mut over = Vec::new();
        for slot in old {
            let granule = self.word(slot, GRANULE).load(Ordering::Relaxed);
            let renew = || {
                // Counts only from the store of COMMITTED below on.
                if placed.contains(&self.word(slot, PLACE).load(Ordering::Relaxed)) {
                    self.word(slot, PLACED_BY).store(epoch, Ordering::Release);
                }
                self.word(slot, EPOCH).store(next, Ordering::Release);
            };
            if !keep(slot, usize::try_from(granule).expect("an index of ours"), &renew) {
                over.push(slot);
            }
        }
        let word = self.live[COMMITTED].load(Ordering::Acquire);
        let which = usize::from(word & 1 == 1);
        let sum = places.iter().fold(self.live[SUMS + which].load(Ordering::Acquire), |sum, (block, place)| {
            sum.wrapping_add(mix(*block, *place))
        });
        self.live[SUMS + (1 - which)].store(sum, Ordering::Release);
        self.live[COMMITTED].store(epoch << 1 | (1 - which) as u64, Ordering::Release);
        self.live[UNACCOUNTED].store(0, Ordering::Release);
        let mut state = self.lock();
        // Not before the store: a slot claimed in between must say that it counts with this commit only.
        state.placing.1.clear();
        for slot in over {
            state.used.remove(&slot);
            state.free.push(slot);
        }
    }

    /// Adds bits to a slot of a predecessor.
    pub(super) fn merge(&self, slot: u32, words: &[u64; WORDS]) {
        for (n, word) in words.iter().enumerate() {
            self.word(slot, BITS + n).fetch_or(*word, Ordering::Release);
        }
    }

    fn epoch_of(&self, slot: u32) -> u64 {
        self.word(slot, EPOCH).load(Ordering::Acquire)
    }

    fn word(&self, slot: u32, at: usize) -> &AtomicU64 {
        &self.live[HEADER + slot as usize * SLOT + at]
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, feature = "sim"))]
#[path = "journal_tests.rs"]
mod tests;
