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

use super::journal::{
    BITMAP_WORDS, BOOT_AT, COMMITTED, CURRENT_GENERATION, EPOCH_LIMIT, IMAGE_AT, JOURNAL_SLOTS, Journal, MAGIC,
    MAGIC_AT, NEXT_GENERATION, NOT_PLACED, SESSION_AT, SLOT_BITMAP_SECTOR, SLOT_BITS, SLOT_EPOCH, SLOT_PLACE,
    SLOT_PLACED_BY, TABLE_SUMS, UNACCOUNTED,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{SessionStamp, bitmap};
use crate::image::journal_id::{entry_hash, table_sum};
use crate::image::open::Image;
use crate::mutant::{self, Mutant};
use crate::units::{SECTOR, SECTOR_BITS, SECTOR_BYTES};

/// What a slot of a predecessor holds.
#[derive(Clone, Debug)]
pub(in crate::image) struct ReplaySlot {
    /// The slot.
    pub(super) slot: u32,
    /// The granule.
    pub(super) bitmap_sector: usize,
    /// Place of the granule's block.
    pub(super) place: u32,
    /// The granule's bits.
    pub(super) words: [u64; BITMAP_WORDS],
    is_accounted: bool,
}

impl Journal {
    /// Holds the journal against an image and its stamp, and returns the slots that count. From here on only a stamp with the
    /// generation of this one fits.
    ///
    /// # Errors
    /// `Refused` if it does not fit; `Poisoned` if a sync of the predecessor failed; `Io`.
    pub(super) fn validate(&self, image: &Image, stamp: &SessionStamp) -> Result<Vec<ReplaySlot>> {
        let refuse = |why: &str| {
            let what = format!(
                "the live journal {} does not fit it: {why}. It may be an older copy, or a copy may have been used since; \
                 what was acknowledged after it is in that copy or lost. To give the journal up use --discard-journal",
                self.path().display()
            );
            Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
        };
        if self.header_word(MAGIC_AT) != MAGIC {
            return refuse("it is of another version, or damaged");
        }
        if let Some(why) = self.poison_reason() {
            let what = format!(
                "it was poisoned: {why}. What was acknowledged since the last flush is lost; check it, then start with \
                 --discard-journal"
            );
            return Err(Error::new(ErrorKind::Poisoned, what).at_path(image.file().path()));
        }
        if self.header_uuid(BOOT_AT) != stamp.boot && !mutant::enabled(Mutant::IgnoreBootId) {
            return refuse("the host was restarted since it was made");
        }
        if self.header_uuid(IMAGE_AT) != image.uuid() || self.header_uuid(SESSION_AT) != stamp.session {
            return refuse("it belongs to another image");
        }
        if ![self.header_word(NEXT_GENERATION), self.header_word(CURRENT_GENERATION)].contains(&stamp.generation) {
            return refuse("the generation of the image is another");
        }
        let found = match self.read_slots(image) {
            Ok(found) => found,
            Err(why) => return refuse(why),
        };
        let sum = table_sum(image);
        if !self.is_sum_expected(sum, &found, image) {
            return refuse("its block table has changed");
        }
        if !mutant::enabled(Mutant::SlotReplacesBits) && !include_file_bits(&found, image)? {
            return refuse("it has sectors that the journal lacks");
        }
        // A kill may have left two generations. Only the one that was found may fit from here on: another copy may have the
        // other one.
        self.announce_generation(stamp.generation);
        self.confirm_generation(stamp.generation);
        self.account_places(sum, &found, image);
        Ok(found)
    }

    /// The slots that count; why not, if a word is not one that a daemon stores.
    fn read_slots(&self, image: &Image) -> Result<Vec<ReplaySlot>, &'static str> {
        const DAMAGED: &str = "it is damaged";
        let committed = self.header_word(COMMITTED) >> 1;
        let table = image.bat().ok_or(DAMAGED)?;
        let block_size = image.block_size().ok_or(DAMAGED)?;
        let granules = table.len() as usize * block_size.bitmap_sectors() as usize;
        if committed >= EPOCH_LIMIT || self.header_word(UNACCOUNTED) > 1 {
            return Err(DAMAGED);
        }
        let mut state = self.lock();
        state.epoch = committed + 1;
        let mut found = Vec::new();
        for slot in (0..JOURNAL_SLOTS).rev() {
            let epoch = self.slot_word(slot, SLOT_EPOCH).load(Ordering::Acquire);
            if epoch <= committed {
                state.free.push(slot);
                continue;
            }
            let word = |at| self.slot_word(slot, at).load(Ordering::Acquire);
            let (granule, place, placed_by) = (word(SLOT_BITMAP_SECTOR), word(SLOT_PLACE), word(SLOT_PLACED_BY));
            let granule = usize::try_from(granule).ok().filter(|g| *g < granules).ok_or(DAMAGED)?;
            let place = u32::try_from(place).map_err(|_| DAMAGED)?;
            if epoch >= EPOCH_LIMIT || (placed_by >= EPOCH_LIMIT && placed_by != NOT_PLACED) {
                return Err(DAMAGED);
            }
            state.epoch = state.epoch.max(epoch);
            state.used.insert(slot);
            let words = std::array::from_fn(|n| word(SLOT_BITS + n));
            found.push(ReplaySlot { slot, bitmap_sector: granule, place, words, is_accounted: placed_by <= committed });
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
    fn is_sum_expected(&self, sum: u64, found: &[ReplaySlot], image: &Image) -> bool {
        if self.header_word(UNACCOUNTED) != 0 {
            return true;
        }
        let mut expected = self.header_word(TABLE_SUMS + usize::from(self.header_word(COMMITTED) & 1 == 1));
        let mut seen = BTreeSet::new();
        for f in found.iter().filter(|f| !f.is_accounted) {
            let block = block_of(f, image).expect("looked at before");
            let placed = image.bat().and_then(|table| table.place(block));
            if let Some(place) = placed.filter(|_| seen.insert(block)) {
                expected = expected.wrapping_add(entry_hash(block, place));
            }
        }
        expected == sum
    }

    /// Counts in the places that a commit of the predecessor has put into the file without living to note it: `sum` is that
    /// of the table now. From here on they are as if they had always been there.
    ///
    /// As at the end of a commit, one store makes it so: until then the slots mean what they meant before.
    fn account_places(&self, sum: u64, found: &[ReplaySlot], image: &Image) {
        let which = usize::from(self.header_word(COMMITTED) & 1 == 1);
        if self.header_word(TABLE_SUMS + which) == sum {
            return;
        }
        let mut state = self.lock();
        let settled = state.epoch + 1;
        state.epoch = settled + 1;
        let in_file = |f: &ReplaySlot| {
            let block = block_of(f, image).expect("looked at before");
            image.bat().is_some_and(|table| table.place(block).is_some())
        };
        for f in found {
            if !f.is_accounted {
                let placed_by = if in_file(f) { settled } else { NOT_PLACED };
                self.slot_word(f.slot, SLOT_PLACED_BY).store(placed_by, Ordering::Release);
            }
            self.slot_word(f.slot, SLOT_EPOCH).store(state.epoch, Ordering::Release);
        }
        self.store_header_word(TABLE_SUMS + (1 - which), sum);
        self.store_header_word(COMMITTED, settled << 1 | (1 - which) as u64);
        self.store_header_word(UNACCOUNTED, 0);
    }
}

fn block_of(f: &ReplaySlot, image: &Image) -> Option<u32> {
    let per_block = image.block_size()?.bitmap_sectors() as usize;
    u32::try_from(f.bitmap_sector / per_block).ok()
}

/// Whether the slots have all bits that the file has of their granules. Two slots of one granule count together.
fn include_file_bits(found: &[ReplaySlot], image: &Image) -> Result<bool> {
    let (Some(table), Some(block_size)) = (image.bat(), image.block_size()) else { return Ok(true) };
    let per_block = block_size.bitmap_sectors() as usize;
    let sectors = block_size.sectors().min(SECTOR_BITS);
    let mut slots: BTreeMap<usize, [u64; BITMAP_WORDS]> = BTreeMap::new();
    for f in found {
        let words = slots.entry(f.bitmap_sector).or_insert([0; BITMAP_WORDS]);
        words.iter_mut().zip(f.words).for_each(|(to, word)| *to |= word);
    }
    for (granule, slot) in slots {
        let Some(place) = block_of_bitmap_sector(granule, per_block).and_then(|block| table.place(block)) else {
            continue;
        };
        let mut bytes = [0; SECTOR_BYTES];
        let at = (u64::from(place) + (granule % per_block) as u64) * SECTOR;
        if at + SECTOR > image.data_end() {
            return Ok(false);
        }
        image.file().read_at(&mut bytes, at)?;
        let mut words = [0; BITMAP_WORDS];
        bitmap::decode(&bytes, &mut words);
        words.iter_mut().zip(slot).for_each(|(word, slot)| *word &= !slot);
        if bitmap::count(&words, 0, sectors) > 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

fn block_of_bitmap_sector(granule: usize, per_block: usize) -> Option<u32> {
    u32::try_from(granule / per_block).ok()
}
