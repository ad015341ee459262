//! What a successor believes of a journal: nothing that it has not held against the image.
//!
//! A journal is taken in only if
//!
//! - its session, its boot and the image's UUID are those of the stamp and of this process;
//! - the stamp has one of the two generations that the journal names: an older copy of the image has an older one;
//! - every word of it that counts is one that a daemon could have stored;
//! - the block table sums to what the journal expects: the sum of the entries that commits have put there, and, of the blocks
//!   that slots name and no commit has placed, those whose entries a commit under way may have written;
//! - the slots of each granule have all bits that the file has: what is marked only grows, so a file with other bits went on
//!   without this journal.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use super::fit::{mix, table_sum};
use super::journal::{
    BITS, BOOT_AT, COMMITTED, EPOCH, EPOCHS, GRANULE, IMAGE_AT, Journal, MAGIC, MAGIC_AT, NEVER, NEXT, NOW, PLACE,
    PLACED_BY, SESSION_AT, SLOTS, SUMS, UNACCOUNTED, WORDS,
};
use super::open::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{SessionStamp, bitmap};
use crate::mutant::{self, Mutant};
use crate::units::{SECTOR, SECTOR_BITS, SECTOR_BYTES};

/// What a slot of a predecessor holds.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// The slot.
    pub(super) slot: u32,
    /// The granule.
    pub(super) granule: usize,
    /// Place of the granule's block.
    pub(super) place: u32,
    /// The granule's bits.
    pub(super) words: [u64; WORDS],
    counted: bool,
}

impl Journal {
    /// Holds the journal against an image and its stamp, and returns the slots that count. From here on only a stamp with the
    /// generation of this one fits.
    ///
    /// # Errors
    /// `Refused` if it does not fit; `Poisoned` if a sync of the predecessor failed; `Io`.
    pub(super) fn take_in(&self, image: &Image, stamp: &SessionStamp) -> Result<Vec<Found>> {
        let refuse = |why: &str| {
            let what = format!(
                "the live journal {} does not fit it: {why}. It may be an older copy, or a copy may have been used since; \
                 what was acknowledged after it is in that copy or lost. To give the journal up use --discard-journal",
                self.path().display()
            );
            Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
        };
        if self.at(MAGIC_AT) != MAGIC {
            return refuse("it is of another version, or damaged");
        }
        if let Some(why) = self.poisoned() {
            let what = format!(
                "it was poisoned: {why}. What was acknowledged since the last flush is lost; check it, then start with \
                 --discard-journal"
            );
            return Err(Error::new(ErrorKind::Poisoned, what).at_path(image.file().path()));
        }
        if self.uuid_at(BOOT_AT) != stamp.boot && !mutant::is(Mutant::OldJournal) {
            return refuse("the host was restarted since it was made");
        }
        if self.uuid_at(IMAGE_AT) != image.uuid() || self.uuid_at(SESSION_AT) != stamp.session {
            return refuse("it belongs to another image");
        }
        if ![self.at(NEXT), self.at(NOW)].contains(&stamp.generation) {
            return refuse("the generation of the image is another");
        }
        let found = match self.slots(image) {
            Ok(found) => found,
            Err(why) => return refuse(why),
        };
        let sum = table_sum(image);
        if !self.expects(sum, &found, image) {
            return refuse("its block table has changed");
        }
        if !mutant::is(Mutant::SlotReplacesBits) && !includes_file(&found, image)? {
            return refuse("it has sectors that the journal lacks");
        }
        // A kill may have left two generations. Only the one that was found may fit from here on: another copy may have the
        // other one.
        self.announce(stamp.generation);
        self.confirm(stamp.generation);
        self.settle(sum, &found, image);
        Ok(found)
    }

    /// The slots that count; why not, if a word is not one that a daemon stores.
    fn slots(&self, image: &Image) -> Result<Vec<Found>, &'static str> {
        const DAMAGED: &str = "it is damaged";
        let committed = self.at(COMMITTED) >> 1;
        let table = image.bat().ok_or(DAMAGED)?;
        let block_size = image.block_size().ok_or(DAMAGED)?;
        let granules = table.len() as usize * block_size.bitmap_sectors() as usize;
        if committed >= EPOCHS || self.at(UNACCOUNTED) > 1 {
            return Err(DAMAGED);
        }
        let mut state = self.lock();
        state.epoch = committed + 1;
        let mut found = Vec::new();
        for slot in (0..SLOTS).rev() {
            let epoch = self.word(slot, EPOCH).load(Ordering::Acquire);
            if epoch <= committed {
                state.free.push(slot);
                continue;
            }
            let word = |at| self.word(slot, at).load(Ordering::Acquire);
            let (granule, place, placed_by) = (word(GRANULE), word(PLACE), word(PLACED_BY));
            let granule = usize::try_from(granule).ok().filter(|g| *g < granules).ok_or(DAMAGED)?;
            let place = u32::try_from(place).map_err(|_| DAMAGED)?;
            if epoch >= EPOCHS || (placed_by >= EPOCHS && placed_by != NEVER) {
                return Err(DAMAGED);
            }
            state.epoch = state.epoch.max(epoch);
            state.used.insert(slot);
            let words = std::array::from_fn(|n| word(BITS + n));
            found.push(Found { slot, granule, place, words, counted: placed_by <= committed });
        }
        for f in &found {
            let block = block_of(f, image).ok_or(DAMAGED)?;
            if table.place(block).is_some_and(|place| place != f.place) {
                return Err("a block has moved");
            }
        }
        Ok(found)
    }

    /// Whether the block table may sum up to `sum`.
    fn expects(&self, sum: u64, found: &[Found], image: &Image) -> bool {
        if self.at(UNACCOUNTED) != 0 {
            return true;
        }
        let mut expected = self.at(SUMS + usize::from(self.at(COMMITTED) & 1 == 1));
        let mut seen = BTreeSet::new();
        for f in found.iter().filter(|f| !f.counted) {
            let block = block_of(f, image).expect("looked at before");
            let placed = image.bat().and_then(|table| table.place(block));
            if let Some(place) = placed.filter(|_| seen.insert(block)) {
                expected = expected.wrapping_add(mix(block, place));
            }
        }
        expected == sum
    }

    /// Counts in the places that a commit of the predecessor has put into the file without living to note it: `sum` is that
    /// of the table now. From here on they are as if they had always been there.
    ///
    /// As at the end of a commit, one store makes it so: until then the slots mean what they meant before.
    fn settle(&self, sum: u64, found: &[Found], image: &Image) {
        let which = usize::from(self.at(COMMITTED) & 1 == 1);
        if self.at(SUMS + which) == sum {
            return;
        }
        let mut state = self.lock();
        let settled = state.epoch + 1;
        state.epoch = settled + 1;
        let in_file = |f: &Found| {
            let block = block_of(f, image).expect("looked at before");
            image.bat().is_some_and(|table| table.place(block).is_some())
        };
        for f in found {
            if !f.counted {
                let placed_by = if in_file(f) { settled } else { NEVER };
                self.word(f.slot, PLACED_BY).store(placed_by, Ordering::Release);
            }
            self.word(f.slot, EPOCH).store(state.epoch, Ordering::Release);
        }
        self.put(SUMS + (1 - which), sum);
        self.put(COMMITTED, settled << 1 | (1 - which) as u64);
        self.put(UNACCOUNTED, 0);
    }
}

fn block_of(f: &Found, image: &Image) -> Option<u32> {
    let per_block = image.block_size()?.bitmap_sectors() as usize;
    u32::try_from(f.granule / per_block).ok()
}

/// Whether the slots have all bits that the file has of their granules. Two slots of one granule count together.
fn includes_file(found: &[Found], image: &Image) -> Result<bool> {
    let (Some(table), Some(block_size)) = (image.bat(), image.block_size()) else { return Ok(true) };
    let per_block = block_size.bitmap_sectors() as usize;
    let sectors = block_size.sectors().min(SECTOR_BITS);
    let mut slots: BTreeMap<usize, [u64; WORDS]> = BTreeMap::new();
    for f in found {
        let words = slots.entry(f.granule).or_insert([0; WORDS]);
        words.iter_mut().zip(f.words).for_each(|(to, word)| *to |= word);
    }
    for (granule, slot) in slots {
        let Some(place) = block_of_granule(granule, per_block).and_then(|block| table.place(block)) else { continue };
        let mut bytes = [0; SECTOR_BYTES];
        let at = (u64::from(place) + (granule % per_block) as u64) * SECTOR;
        if at + SECTOR > image.data_end() {
            return Ok(false);
        }
        image.file().read_at(&mut bytes, at)?;
        let mut words = [0; WORDS];
        bitmap::decode(&bytes, &mut words);
        words.iter_mut().zip(slot).for_each(|(word, slot)| *word &= !slot);
        if bitmap::count(&words, 0, sectors) > 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

fn block_of_granule(granule: usize, per_block: usize) -> Option<u32> {
    u32::try_from(granule / per_block).ok()
}
