//! Validation of a killed daemon's journal against its image. `recover` then gives the blocks of the valid slots their
//! places, and `Writable::replay` sets the bits.
//!
//! A journal is replayed only if all of these hold:
//!
//! - The journal has the known version, the session and the boot of the stamp, and the UUID of the image. It is not
//!   poisoned.
//! - The stamp has one of the two generations in the journal. An older copy of the image has an older generation.
//! - Each valid slot contains only values that a daemon can have stored, and the BAT has no other place for its block.
//! - The BAT has the sum that the journal expects: that of the entries written by finished commits, plus that of the
//!   entries that a commit in progress may have written. The latter belong to blocks that have a slot. If some of these
//!   blocks may have no slot (`UNACCOUNTED`), the sum is not checked.
//! - For each bitmap sector that has slots, the slots together have all bits that the file has. Bits are only ever set,
//!   so a file with other bits was written without this journal.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use super::journal::Journal;
use super::journal_layout::{
    BITMAP_WORDS, BOOT_AT, COMMITTED, CURRENT_GENERATION, EPOCH_LIMIT, IMAGE_AT, JournalSlot, MAGIC, MAGIC_AT,
    NEXT_GENERATION, NOT_PLACED, SESSION_AT, SLOT_BITMAP_SECTOR, SLOT_BITS, SLOT_EPOCH, SLOT_PLACE, SLOT_PLACED_BY,
    TABLE_SUMS, UNACCOUNTED,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bat::BlockPlace;
use crate::format::{SessionStamp, bitmap};
use crate::image::journal_id::{entry_hash, table_sum};
use crate::image::open::Image;
use crate::mutant::{self, Mutant};
use crate::units::{BitmapSectorIndex, BlockIndex, SECTOR, SECTOR_BITS, SECTOR_BYTES};

/// A valid slot of a killed daemon's journal.
#[derive(Clone, Debug)]
pub(in crate::image) struct ReplaySlot {
    /// The slot.
    pub(super) slot: JournalSlot,
    /// The bitmap sector.
    pub(super) bitmap_sector: BitmapSectorIndex,
    /// Place of the block of the bitmap sector.
    pub(super) place: BlockPlace,
    /// Bits of the bitmap sector.
    pub(super) words: [u64; BITMAP_WORDS],
    /// Whether the valid sum over the BAT includes the entry of the block.
    is_accounted: bool,
}

impl Journal {
    /// Validates the journal against an image and its stamp, and returns the valid slots. Afterwards the journal fits
    /// only the generation of `stamp`.
    ///
    /// # Errors
    /// - `Refused` if the journal does not fit;
    /// - `Poisoned` if a sync of the killed daemon failed;
    /// - `Io`.
    pub(super) fn validate(&self, image: &Image, stamp: &SessionStamp) -> Result<Vec<ReplaySlot>> {
        let refuse = |why: &str| {
            let what = format!(
                "the live journal {} does not fit this image: {why}. The image may be an older copy, or a copy of it may have \
                 been used since; later acknowledged writes are in that copy or lost. To discard the journal use \
                 --discard-journal",
                self.path().display()
            );
            Err(Error::new(ErrorKind::Refused, what).at_path(image.file().path()))
        };
        if self.header_word(MAGIC_AT) != MAGIC {
            return refuse("the journal is of another version, or damaged");
        }
        if let Some(why) = self.poison_reason() {
            let what = format!(
                "it was poisoned: {why}. Writes acknowledged since the last flush may be lost. To accept that and check the \
                 image: diffdisk check {} --discard-journal",
                image.file().path().display()
            );
            return Err(Error::new(ErrorKind::Poisoned, what).at_path(image.file().path()));
        }
        if self.header_uuid(BOOT_AT) != stamp.boot && !mutant::enabled(Mutant::IgnoreBootId) {
            return refuse("the machine was restarted since the journal was created");
        }
        if self.header_uuid(IMAGE_AT) != image.uuid() || self.header_uuid(SESSION_AT) != stamp.session {
            return refuse("the journal belongs to another image");
        }
        if ![self.header_word(NEXT_GENERATION), self.header_word(CURRENT_GENERATION)].contains(&stamp.generation) {
            return refuse("the image has another generation");
        }
        let slots = match self.read_slots(image) {
            Ok(slots) => slots,
            Err(why) => return refuse(why),
        };
        let sum = table_sum(image);
        if !self.is_sum_expected(sum, &slots, image) {
            return refuse("the block table of the image has changed");
        }
        if !mutant::enabled(Mutant::SlotReplacesBits) && !include_file_bits(&slots, image)? {
            return refuse("the image has sectors that the journal lacks");
        }
        // A kill may have left two generations in the journal. From now on only the generation of this image fits, as
        // another copy of the image may have the other generation.
        self.announce_generation(stamp.generation);
        self.confirm_generation(stamp.generation);
        self.account_places(sum, &slots, image);
        Ok(slots)
    }

    /// Reads the valid slots.
    ///
    /// # Errors
    /// The reason for the message, if the journal has a value that no daemon stores, or if the BAT has another place
    /// for a block.
    fn read_slots(&self, image: &Image) -> Result<Vec<ReplaySlot>, &'static str> {
        const DAMAGED: &str = "the journal is damaged";
        let committed = self.header_word(COMMITTED) >> 1;
        let table = image.bat().ok_or(DAMAGED)?;
        let block_size = image.block_size().ok_or(DAMAGED)?;
        let bitmap_sectors = table.len() as usize * block_size.bitmap_sectors() as usize;
        if committed >= EPOCH_LIMIT || self.header_word(UNACCOUNTED) > 1 {
            return Err(DAMAGED);
        }
        let mut state = self.lock();
        state.epoch = committed + 1;
        let mut slots = Vec::new();
        for slot in JournalSlot::last_to_first() {
            let epoch = self.slot_word(slot, SLOT_EPOCH).load(Ordering::Acquire);
            if epoch <= committed {
                state.free.push(slot);
                continue;
            }
            let word = |at| self.slot_word(slot, at).load(Ordering::Acquire);
            let (index, place, placed_by) = (word(SLOT_BITMAP_SECTOR), word(SLOT_PLACE), word(SLOT_PLACED_BY));
            let index = usize::try_from(index).ok().filter(|index| *index < bitmap_sectors).ok_or(DAMAGED)?;
            let place = u32::try_from(place).ok().and_then(BlockPlace::from_entry).ok_or(DAMAGED)?;
            if epoch >= EPOCH_LIMIT || (placed_by >= EPOCH_LIMIT && placed_by != NOT_PLACED) {
                return Err(DAMAGED);
            }
            state.epoch = state.epoch.max(epoch);
            state.used.insert(slot);
            let words = std::array::from_fn(|n| word(SLOT_BITS + n));
            let (bitmap_sector, is_accounted) = (BitmapSectorIndex::new(index), placed_by <= committed);
            slots.push(ReplaySlot { slot, bitmap_sector, place, words, is_accounted });
        }
        for slot in &slots {
            let block = block_of(slot, image).ok_or(DAMAGED)?;
            if table.place(block).is_some_and(|place| place != slot.place) {
                return Err("a block has moved");
            }
        }
        Ok(slots)
    }

    /// Whether the BAT may have the sum `sum`.
    fn is_sum_expected(&self, sum: u64, slots: &[ReplaySlot], image: &Image) -> bool {
        if self.header_word(UNACCOUNTED) != 0 {
            return true;
        }
        let mut expected = self.header_word(TABLE_SUMS + usize::from(self.header_word(COMMITTED) & 1 == 1));
        let mut seen = BTreeSet::new();
        for slot in slots.iter().filter(|slot| !slot.is_accounted) {
            let block = block_of(slot, image).expect("checked by `read_slots`");
            let placed = image.bat().and_then(|table| table.place(block));
            if let Some(place) = placed.filter(|_| seen.insert(block)) {
                expected = expected.wrapping_add(entry_hash(block, place));
            }
        }
        expected == sum
    }

    /// Adds to the valid sum the BAT entries that the killed daemon's last commit wrote without recording them. `sum`
    /// is the sum over the present BAT.
    ///
    /// The store to `COMMITTED` makes all changes effective at once: before that store, all slots have their old
    /// meaning.
    fn account_places(&self, sum: u64, slots: &[ReplaySlot], image: &Image) {
        let which = usize::from(self.header_word(COMMITTED) & 1 == 1);
        if self.header_word(TABLE_SUMS + which) == sum {
            return;
        }
        let mut state = self.lock();
        let settled = state.epoch + 1;
        state.epoch = settled + 1;
        let is_in_file = |slot: &ReplaySlot| {
            let block = block_of(slot, image).expect("checked by `read_slots`");
            image.bat().is_some_and(|table| table.place(block).is_some())
        };
        for slot in slots {
            if !slot.is_accounted {
                let placed_by = if is_in_file(slot) { settled } else { NOT_PLACED };
                self.slot_word(slot.slot, SLOT_PLACED_BY).store(placed_by, Ordering::Release);
            }
            self.slot_word(slot.slot, SLOT_EPOCH).store(state.epoch, Ordering::Release);
        }
        self.store_header_word(TABLE_SUMS + (1 - which), sum);
        self.store_header_word(COMMITTED, settled << 1 | (1 - which) as u64);
        self.store_header_word(UNACCOUNTED, 0);
    }
}

/// The block of a slot's bitmap sector.
fn block_of(slot: &ReplaySlot, image: &Image) -> Option<BlockIndex> {
    Some(image.block_size()?.block_of_bitmap_sector(slot.bitmap_sector).0)
}

/// Whether the slots have all bits that their bitmap sectors have in the file. The bits of two slots for one bitmap
/// sector are combined. False if the data of the file ends before one of the bitmap sectors.
fn include_file_bits(slots: &[ReplaySlot], image: &Image) -> Result<bool> {
    let (Some(table), Some(block_size)) = (image.bat(), image.block_size()) else { return Ok(true) };
    let sectors = block_size.sectors().min(SECTOR_BITS);
    let mut sectors_of_slots: BTreeMap<BitmapSectorIndex, [u64; BITMAP_WORDS]> = BTreeMap::new();
    for slot in slots {
        let words = sectors_of_slots.entry(slot.bitmap_sector).or_insert([0; BITMAP_WORDS]);
        words.iter_mut().zip(slot.words).for_each(|(to, word)| *to |= word);
    }
    for (index, slot) in sectors_of_slots {
        let (block, number) = block_size.block_of_bitmap_sector(index);
        let Some(place) = table.place(block) else { continue };
        let mut bytes = [0; SECTOR_BYTES];
        let at = (place.sector() + u64::from(number)).byte_offset();
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
