//! The one image of a chain that takes writes: reserve, mark, and what commits and growth need of it.
//!
//! The life of a write: [`Writable::reserve`] gives the block a place (in memory), the data goes there,
//! [`Writable::mark`] makes its sectors visible to reads of this process, and a [`Commit`](super::Commit) tells the file.
//!
//! Does not order durable writes (`commit.rs`), nor make room (`tail.rs`), nor look at parents.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::bitmaps::{Bitmaps, Fresh, Granule};
use super::open::Image;
use super::tail::Room;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskType, bat, layout};
use crate::mutant::{self, Mutant};
use crate::storage::{File, Lock};
use crate::units::{BlockSize, SECTOR, SectorRange};

/// An image open for writing, shared by all queues of its disk.
pub struct Writable {
    image: Image,
    sparse: Option<Sparse>,
    /// Data or punches completed that no sync covers yet. Set at open: what a predecessor left in the page cache counts.
    pub(super) unsynced: AtomicBool,
    /// Granules that say more than the file does.
    dirty: Mutex<Vec<usize>>,
    poison: OnceLock<String>,
}

/// What images with a block table have besides.
struct Sparse {
    bitmaps: Bitmaps,
    block_size: BlockSize,
    fresh: Fresh,
    room: Mutex<Room>,
}

/// There is no prepared room for the block: the write waits for growth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoRoom;

impl Writable {
    /// Makes an opened image writable: takes the lock, and recovers what an unclean end left behind.
    ///
    /// Recovery (crash-safety 3.5): the trailing footer is written where it is missing, and everything between the last
    /// block and the footer is made durably zero. Stale bytes there would be taken for bitmaps of later blocks.
    ///
    /// # Errors
    /// `Busy` where somebody else has it open, `Refused` where its own bytes forbid writing (hidden, saved state,
    /// footers that disagree), `Io`.
    pub fn new(image: Image) -> Result<Writable> {
        image.file().lock(Lock::Exclusive)?;
        image.check_writable()?;
        let fixed = image.kind() == DiskType::Fixed;
        let sparse = if fixed { None } else { Some(recover(&image)?) };
        let (unsynced, dirty) = (AtomicBool::new(!mutant::is(Mutant::CleanAtOpen)), Mutex::default());
        Ok(Writable { image, sparse, unsynced, dirty, poison: OnceLock::new() })
    }

    /// What it is.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Its file.
    pub fn file(&self) -> &File {
        self.image.file()
    }

    /// The path of its file.
    pub fn path(&self) -> &std::path::Path {
        self.image.file().path()
    }

    /// The bitmaps; `None` for a fixed image, which is present everywhere.
    #[inline]
    pub fn bitmaps(&self) -> Option<&Bitmaps> {
        self.sparse.as_ref().map(|s| &s.bitmaps)
    }

    /// The place of a block, a new one if it has none: a file sector, where its bitmap begins. Never waits and makes no
    /// system call; safe to repeat.
    ///
    /// # Errors
    /// [`NoRoom`] where the prepared tail is used up.
    pub fn reserve(&self, block: u32) -> Result<u32, NoRoom> {
        let table = self.image.bat().expect("only images with a table reserve");
        if let Some(place) = table.place(block) {
            return Ok(place);
        }
        let sparse = self.sparse();
        let mut room = lock(&sparse.room);
        if let Some(place) = table.place(block) {
            return Ok(place); // another queue was faster
        }
        let place = layout::next_place(room.next, sparse.block_size, room.unplaced).map_err(|_| NoRoom)?;
        let end = u64::from(place) + u64::from(sparse.block_size.stride_sectors());
        if end > room.end {
            return Err(NoRoom);
        }
        sparse.bitmaps.prepare(block, sparse.fresh);
        room.next = end;
        room.unplaced -= 1;
        room.fresh.insert(block);
        table.set(block, place);
        Ok(place)
    }

    /// Says that the data of a range is in its final place: from here on reads find it, and the next commit makes it
    /// durable. Blocks of the range have places, their bitmaps are there.
    pub fn mark(&self, range: SectorRange) {
        if let Some(sparse) = &self.sparse {
            let mut rest = range;
            while !rest.is_empty() {
                let block = sparse.block_size.range_of(sparse.block_size.block_of(rest.start()));
                let part = rest.clip(block);
                sparse.bitmaps.mark(part, |granule| lock(&self.dirty).push(granule));
                rest = rest.skip(part.count());
            }
        }
        self.touched();
        if mutant::is(Mutant::EagerMetadata) {
            self.write_eagerly();
        }
    }

    /// A mistake: what is dirty goes to the file before its data is durable.
    fn write_eagerly(&self) {
        for granule in self.dirty().clone() {
            let (block, _, at) = self.bitmap_place(granule);
            let _ = self.file().write_at(&self.granule(granule).snapshot(), at);
            if let Some((at, bytes)) = self.bat_sector(block / bat::ENTRIES_PER_SECTOR, &[block]) {
                let _ = self.file().write_at(&bytes, at);
            }
        }
    }

    /// Says that bytes changed that no bit speaks for (a punch in present sectors).
    pub fn touched(&self) {
        // Mostly set already: a look is cheaper than a store to a line that all queues share.
        if !self.unsynced.load(Ordering::SeqCst) {
            self.unsynced.store(true, Ordering::SeqCst);
        }
    }

    /// Refuses further writes until the image is opened anew. The first reason stays.
    pub fn poison(&self, why: &str) {
        if self.poison.set(why.to_owned()).is_ok() {
            log::error!("{}: {why}; writes are refused until it is opened and checked", self.path().display());
        }
    }

    /// Whether it was poisoned.
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.poison.get().is_some()
    }

    /// # Errors
    /// `Poisoned`, with the first reason.
    pub fn check_poison(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorKind::Poisoned, why.clone()).at_path(self.path())),
        }
    }

    /// The footer as it stands at both ends.
    pub fn footer_bytes(&self) -> [u8; SECTOR as usize] {
        self.image.footer().encode()
    }

    /// A file sector behind which `blocks` > 0 more blocks, placed from sector `from` on, do not reach; `None` where not
    /// even one of them could be named by an entry. Room that is reckoned so is at most a page a block too large.
    pub(super) fn end_after(&self, from: u64, blocks: u64, unplaced: u64) -> Option<u64> {
        let block_size = self.sparse().block_size;
        let first = u64::from(layout::next_place(from, block_size, unplaced).ok()?);
        let page = layout::PAGE / SECTOR;
        let step = u64::from(block_size.stride_sectors()).next_multiple_of(page);
        first.checked_add(blocks.checked_mul(step)?)
    }

    pub(super) fn room(&self) -> MutexGuard<'_, Room> {
        lock(&self.sparse().room)
    }

    /// Whether a step of growth is due.
    pub fn wants_room(&self) -> bool {
        self.sparse.as_ref().is_some_and(|s| self.is_short(&lock(&s.room)))
    }

    pub(super) fn dirty(&self) -> MutexGuard<'_, Vec<usize>> {
        lock(&self.dirty)
    }

    pub(super) fn granule(&self, granule: usize) -> &Granule {
        self.sparse().bitmaps.get(granule).expect("a dirty granule is there")
    }

    /// Notes a granule as dirty again.
    pub(super) fn dirtied(&self, granule: usize) {
        if self.granule(granule).note_dirty() {
            self.dirty().push(granule);
        }
    }

    /// Where in the file a granule's sector is, in bytes. Its block has a place.
    pub fn granule_offset(&self, granule: usize) -> u64 {
        self.bitmap_place(granule).2
    }

    /// The block of a granule, the block's place, and the byte offset of the granule's sector.
    pub(super) fn bitmap_place(&self, granule: usize) -> (u32, u32, u64) {
        let (block, sector) = self.sparse().bitmaps.block_of(granule);
        let place = self.image.bat().and_then(|t| t.place(block)).expect("a dirty granule's block has a place");
        (block, place, (u64::from(place) + u64::from(sector)) * SECTOR)
    }

    /// Sector `sector` of the block table with what the file knows and the places of `blocks`, and where it goes.
    /// `None` where the file knows the places of all `blocks`.
    pub(super) fn bat_sector(&self, sector: u32, blocks: &[u32]) -> Option<(u64, [u8; SECTOR as usize])> {
        let (table, room) = (self.image.bat()?, self.room());
        if !blocks.iter().any(|b| room.fresh.contains(b)) {
            return None;
        }
        let first = sector * bat::ENTRIES_PER_SECTOR;
        let mut bytes = [0; SECTOR as usize];
        for (n, to) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let block = first + u32::try_from(n).expect("below 128");
            let entry = match table.len().checked_sub(block) {
                None | Some(0) => self.image.table_padding(),
                Some(_) if room.fresh.contains(&block) && !blocks.contains(&block) => bat::UNUSED,
                Some(_) => table.place(block).unwrap_or(bat::UNUSED),
            };
            *to = entry.to_be_bytes();
        }
        Some((self.image.table_offset()? + u64::from(sector) * SECTOR, bytes))
    }

    /// Says that the file knows the places of the blocks of these granules.
    pub(super) fn placed(&self, granules: impl Iterator<Item = usize>) {
        let Some(sparse) = &self.sparse else { return };
        let mut room = lock(&sparse.room);
        for granule in granules {
            self.granule(granule).set_placed();
            room.fresh.remove(&sparse.bitmaps.block_of(granule).0);
        }
        if mutant::is(Mutant::AllPlaced) {
            room.fresh.clear();
        }
    }

    /// The file sector after the last block the file knows.
    pub(super) fn used_end(&self) -> Result<u64> {
        let Some(sparse) = &self.sparse else { return Ok(self.image.data_end() / SECTOR) };
        let (room, table) = (lock(&sparse.room), self.image.bat().expect("sparse images have a table"));
        let stride = u64::from(sparse.block_size.stride_sectors());
        let known = table.used().filter(|(block, _)| !room.fresh.contains(block));
        let last = known.map(|(_, place)| u64::from(place) + stride).max().unwrap_or(0);
        Ok(last.max(self.image.metadata_end().div_ceil(SECTOR)))
    }

    fn sparse(&self) -> &Sparse {
        self.sparse.as_ref().expect("a fixed image has no blocks")
    }
}

/// Brings an image into the state that reserve and growth rely on: footers equal, the tail durably zero.
fn recover(image: &Image) -> Result<Sparse> {
    let (block_size, table) = (image.block_size().expect("not fixed"), image.bat().expect("not fixed"));
    let file = image.file();
    let next = image.used_end().div_ceil(SECTOR);
    let end = image.data_end().div_ceil(SECTOR).max(next);
    // The front copy first: while the trailing footer is missing it is the only one.
    let (footer, mut front) = (image.footer().encode(), [0; SECTOR as usize]);
    file.read_at(&mut front, 0)?;
    if front != footer {
        log::warn!("{}: the footer's copy at the start was not up to date; renewed", file.path().display());
        file.write_at(&footer, 0)?;
        file.sync()?;
    }
    if !image.has_whole_tail_footer() {
        log::warn!("{}: the trailing footer is missing: it was not closed cleanly; recovered", file.path().display());
        file.write_at(&footer, end * SECTOR)?;
    }
    // A killed predecessor may have left the trailing footer in the page cache alone, and the one that is durable in what
    // is punched next: there must be one at every moment.
    if (end > next && !mutant::is(Mutant::ScrubFirst)) || !image.has_whole_tail_footer() {
        file.sync()?;
    }
    if end > next && !mutant::is(Mutant::NoScrub) {
        file.punch(next * SECTOR, (end - next) * SECTOR)?;
        if !mutant::is(Mutant::ScrubUnsynced) {
            file.sync()?;
        }
    }
    let blocks = block_size.blocks_for(image.size() / SECTOR);
    let placed = table.used().filter(|(block, _)| u64::from(*block) < blocks).count() as u64;
    let room = Room { next, end, unplaced: blocks - placed, fresh: Default::default(), growing: false };
    let fresh = if image.kind() == DiskType::Differencing { Fresh::Clear } else { Fresh::Set };
    Ok(Sparse { bitmaps: Bitmaps::new(table.len(), block_size), block_size, fresh, room: Mutex::new(room) })
}

/// A lock whose holders leave sound state behind even when they panic: each change is one assignment or insertion.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
