//! Repairs defects that have one possible repair, crash-safely, and saves the bytes that it replaces.
//!
//! The guest's disk reads the same before, during and after a repair, unless the caller chooses a footer of another
//! disk ([`FooterChoice`]). A repair changes only copies (footers), derived data (XenServer's batmap), bits and entries
//! that no reader uses, and unreferenced space.
//!
//! ```text
//!   1  undo       save what is going to be replaced, durably (undo_file.rs)
//!   2  front      the footer's copy at the start               sync   the trailing footer is valid meanwhile
//!   3  tail       the footer at the present or future end      sync   the copy at the start is valid meanwhile
//!   4  pointers   wrong claims of batmap, bits and entries     sync   before the space that they refer to is freed
//!   5  space      punch unreferenced space, cut the file after its last block    sync
//! ```
//!
//! Each step leaves an image with no more defects than before, and a repeated repair finds the remaining ones. A second
//! round frees the space that the first round's corrected pointers no longer refer to.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;

use uuid::Uuid;

use super::check_blocks::bits_beyond_disk;
use super::space::{are_places_trusted, unreferenced_space, whole_pages};
use super::undo_file::UndoFile;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::format::bat::{self, BlockPlace};
use crate::format::footer::FOOTER_BYTES;
use crate::format::{Defect, Footer, bitmap};
use crate::image::batmap::Batmap;
use crate::image::open::{Image, SparseImage};
use crate::image::structures::read_footers;
use crate::image::unrecognized::find_padded_footer;
use crate::storage::{Env, File};
use crate::units::{BlockIndex, SECTOR, SECTOR_BYTES};

/// Maximum number of rounds of a repair. Each round repairs the defects that the previous one exposed.
const ROUNDS: usize = 4;

/// The choice between two valid footers that contradict each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FooterChoice {
    /// The copy at the start.
    Front,
    /// The footer at the end.
    End,
}

/// Offsets in the file and the bytes to write there.
type ByteWrites = Vec<(u64, Vec<u8>)>;

/// The changes of one round.
#[derive(Debug, Default)]
struct RepairPlan {
    front: Option<[u8; SECTOR_BYTES]>,
    tail: Option<(u64, [u8; SECTOR_BYTES])>,
    pointers: ByteWrites,
    holes: Vec<Range<u64>>,
    len: Option<u64>,
}

/// Repairs the image in a file that is locked exclusively. If two footers contradict each other, the one that `take`
/// chooses is copied over the other. Returns the path of the undo file; `None` if nothing was changed. In an image that
/// has lost sectors, only the footer that `take` rejects is replaced.
///
/// # Errors
/// - `Io`, `NoSpace`.
/// - `Invalid`, `Refused`, `Unsupported` if the image cannot be opened at all. At most padding was removed, or a footer
///   replaced as `take` requested.
pub fn repair(env: &dyn Env, file: &File, take: Option<FooterChoice>) -> Result<Option<PathBuf>> {
    let mut undo = None;
    if let Some((plan, uuid)) = RepairPlan::plan_before_open(file, take)? {
        plan.save_and_apply(undo.insert(UndoFile::begin(env, file, uuid)?), file)?;
    }
    for _ in 0..ROUNDS {
        let mut defects = Vec::new();
        let image = Image::examine(file.clone(), &mut |defect| {
            defects.push(defect);
            ControlFlow::<Error>::Continue(())
        })?;
        let plan = if image.lost().is_empty() { RepairPlan::new(&image, &defects)? } else { RepairPlan::default() };
        if plan.is_empty() {
            break;
        }
        let undo = match &mut undo {
            Some(undo) => undo,
            none => none.insert(UndoFile::begin(env, file, image.uuid())?),
        };
        plan.save_and_apply(undo, file)?;
    }
    let path = undo.map(UndoFile::finish).transpose()?;
    if path.is_some() {
        failpoint::reached("check.undo-finished");
    }
    Ok(path)
}

impl RepairPlan {
    /// Plans the repairs that precede an examination of the image: removes the padding after a fixed disk, or replaces
    /// the footer that `take` rejects. Also returns the image's UUID.
    fn plan_before_open(file: &File, take: Option<FooterChoice>) -> Result<Option<(RepairPlan, Uuid)>> {
        let len = file.stat()?.len;
        let chosen = match read_footers(file, len)? {
            Err(Defect::FooterMissing { .. }) => {
                let footer = find_padded_footer(file, len)?;
                let end = |footer: &Footer| footer.current_size + FOOTER_BYTES;
                return Ok(footer.map(|f| (RepairPlan { len: Some(end(&f)), ..RepairPlan::default() }, f.uuid)));
            }
            Err(_) => return Ok(None),
            Ok(chosen) => chosen,
        };
        let differ = |d: &Defect| matches!(d, Defect::FootersDiffer { .. } | Defect::FooterKindsDiffer { .. });
        let Some(take) = take.filter(|_| chosen.notes.iter().any(differ)) else { return Ok(None) };
        let plan = match take {
            FooterChoice::End => RepairPlan { front: Some(chosen.footer.encode()), ..RepairPlan::default() },
            FooterChoice::Front => {
                let mut front = [0; SECTOR_BYTES];
                file.read_at(&mut front, 0)?;
                RepairPlan { tail: Some((chosen.data_end, front)), ..RepairPlan::default() }
            }
        };
        Ok(Some((plan, chosen.footer.uuid)))
    }

    fn save_and_apply(&self, undo: &mut UndoFile, file: &File) -> Result<()> {
        self.save_to(undo)?;
        failpoint::reached("check.undo-kept");
        self.apply(file)
    }

    fn new(image: &Image, defects: &[Defect]) -> Result<RepairPlan> {
        let footer = image.footer().encode();
        let mut plan = RepairPlan::default();
        if defects.iter().any(concerns_front_footer) {
            plan.front = Some(footer);
        }
        let believed = are_places_trusted(defects);
        if believed && let Some(sparse) = image.sparse() {
            let zeros = defects.iter().any(|defect| matches!(defect, Defect::EntryZero { .. }));
            plan.pointers = corrected_pointers(image, sparse, zeros)?;
        }
        // Space is freed only in a round that changes no pointer.
        let free = if believed && plan.pointers.is_empty() { unreferenced_space(image)? } else { Vec::new() };
        let sector = |offset: u64| offset.next_multiple_of(SECTOR);
        let (used, end) = (sector(image.used_end()), image.data_end());
        let cut = free.iter().any(|gap| gap.end == end);
        if cut {
            plan.tail = Some((used, footer));
            plan.len = Some(used + SECTOR);
        } else {
            let place = defects.iter().find_map(|defect| match defect {
                Defect::TrailingFooterInvalid { at, .. } | Defect::ShortFooter { at } => Some(sector(*at)),
                Defect::TrailingFooterMissing { len } => Some(sector(*len)),
                _ => None,
            });
            plan.tail = place.map(|place| (place.max(used), footer));
        }
        for gap in free.iter().filter(|gap| gap.end != end) {
            plan.holes.push(whole_pages(gap));
        }
        Ok(plan)
    }

    fn is_empty(&self) -> bool {
        self.front.is_none() && self.tail.is_none() && self.pointers.is_empty() && self.holes.is_empty()
    }

    fn apply(&self, file: &File) -> Result<()> {
        if let Some(front) = &self.front {
            file.write_at(front, 0)?;
            file.sync()?;
            failpoint::reached("check.front-footer-written");
        }
        if let Some((at, tail)) = &self.tail {
            file.write_at(tail, *at)?;
            file.sync()?;
            failpoint::reached("check.tail-footer-written");
        }
        for (at, bytes) in &self.pointers {
            file.write_at(bytes, *at)?;
            failpoint::reached("check.pointer-written");
        }
        if !self.pointers.is_empty() {
            file.sync()?;
            failpoint::reached("check.pointers-synced");
        }
        for hole in &self.holes {
            file.punch_hole(hole.start, hole.end - hole.start)?;
            failpoint::reached("check.hole-punched");
        }
        if let Some(len) = self.len {
            file.set_len(len)?;
            failpoint::reached("check.end-cut");
        }
        if self.len.is_some() || !self.holes.is_empty() {
            file.sync()?;
            failpoint::reached("check.space-given-back");
        }
        Ok(())
    }

    fn save_to(&self, undo: &mut UndoFile) -> Result<()> {
        if self.front.is_some() {
            undo.save(0..SECTOR)?;
        }
        if let Some((at, _)) = self.tail {
            undo.save(at..at + SECTOR)?;
        }
        for (at, bytes) in &self.pointers {
            undo.save(*at..*at + bytes.len() as u64)?;
        }
        for hole in &self.holes {
            undo.save_nonzero(hole.clone())?;
        }
        if let Some(len) = self.len {
            undo.save_nonzero(len..u64::MAX)?;
        }
        undo.seal()
    }
}

fn concerns_front_footer(defect: &Defect) -> bool {
    matches!(defect, Defect::FootersDiffer { .. } | Defect::FrontFooterInvalid { .. } | Defect::FooterCopyStale)
}

/// Returns the corrected batmap, sectors of the last block's bitmap, and sectors of the table. Entries of blocks after
/// the end of the disk become unused; with `zeros`, entries of 0 become unused, too.
fn corrected_pointers(image: &Image, sparse: &SparseImage, zeros: bool) -> Result<ByteWrites> {
    let mut writes = ByteWrites::new();
    if let Some(mut batmap) = Batmap::read(image)? {
        let wrong = batmap.wrong_claims(image)?;
        if !wrong.is_empty() || batmap.verify().is_err() {
            wrong.into_iter().for_each(|block| batmap.clear(block));
            writes.extend(batmap.encoded());
        }
    }
    let blocks = sparse.header.block_size.blocks_for(image.size() / SECTOR);
    let last = BlockIndex::new(u32::try_from(blocks - 1).expect("the table has an entry for each block"));
    if let Some(place) = image.bat().and_then(|table| table.place(last)) {
        writes.extend(corrected_last_bitmap(image, last, place)?);
    }
    // The entry of a block after the end of the disk is dropped, whatever its place is: no reader uses it, and places
    // are trusted by the entries of the disk's blocks alone.
    let mut sectors = if zeros { sectors_without_zero_entries(image, sparse)? } else { BTreeMap::new() };
    for (block, _) in sparse.table.used().filter(|(block, _)| !block.is_within(blocks)) {
        let at = sparse.header.table_offset + u64::from(bat::sector_of(block)) * SECTOR;
        let bytes = match sectors.entry(at) {
            Entry::Occupied(read) => read.into_mut(),
            Entry::Vacant(none) => {
                let mut bytes = vec![0; SECTOR_BYTES];
                image.file().read_at(&mut bytes, at)?;
                none.insert(bytes)
            }
        };
        let entry = bat::entry_in_sector(block) * 4;
        bytes[entry..entry + 4].copy_from_slice(&bat::UNUSED.to_be_bytes());
    }
    writes.extend(sectors);
    Ok(writes)
}

/// Returns the table sectors that have entries of 0, by offset, with those entries replaced by unused ones.
fn sectors_without_zero_entries(image: &Image, sparse: &SparseImage) -> Result<BTreeMap<u64, Vec<u8>>> {
    let (mut changed, mut bytes) = (BTreeMap::new(), vec![0; SECTOR_BYTES]);
    for sector in 0..sparse.header.entries.div_ceil(bat::ENTRIES_PER_SECTOR) {
        let at = sparse.header.table_offset + u64::from(sector) * SECTOR;
        image.file().read_at(&mut bytes, at)?;
        let entries = (sparse.header.entries - sector * bat::ENTRIES_PER_SECTOR).min(bat::ENTRIES_PER_SECTOR);
        let entries = &mut bytes.as_chunks_mut::<4>().0[..entries as usize];
        let mut any = false;
        for entry in entries.iter_mut().filter(|entry| **entry == [0; 4]) {
            *entry = bat::UNUSED.to_be_bytes();
            any = true;
        }
        if any {
            changed.insert(at, bytes.clone());
        }
    }
    Ok(changed)
}

/// Returns the sectors of the last block's bitmap that change if wrongly set bits after the end of the disk are
/// cleared.
fn corrected_last_bitmap(image: &Image, block: BlockIndex, place: BlockPlace) -> Result<ByteWrites> {
    let block_size = image.block_size().expect("it has blocks");
    let (sectors, all) = (image.sectors_on_disk(block), block_size.sectors());
    let words = image.read_bitmap(place)?;
    let mut right = words.clone();
    bits_beyond_disk(&words, sectors, all).for_each(|(from, end)| bitmap::clear(&mut right, from, end - from));
    if right == words {
        return Ok(ByteWrites::new());
    }
    let mut bytes = vec![0; block_size.bitmap_sectors() as usize * SECTOR_BYTES];
    let at = place.sector().byte_offset();
    // The rest of the bitmap's last sector, after the last bit, is preserved.
    image.file().read_at(&mut bytes, at)?;
    let old = bytes.clone();
    bitmap::encode(right.into_iter(), &mut bytes);
    let changed = (0u64..).zip(old.chunks(SECTOR_BYTES).zip(bytes.chunks(SECTOR_BYTES))).filter(|(_, (a, b))| a != b);
    Ok(changed.map(|(number, (_, new))| (at + number * SECTOR, new.to_vec())).collect())
}

#[cfg(all(test, feature = "sim"))]
#[path = "repair_tests.rs"]
mod tests;
