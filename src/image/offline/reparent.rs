//! Reparenting: replaces or removes the parent of an image. The image is valid at every moment.
//!
//! The dynamic header is the only structure of a VHD that cannot be changed by one atomic write: it has two sectors,
//! one checksum and no copy. But the footer, which contains the header's offset, is one sector. So a new header is
//! first used after the blocks, then moved to its usual place; each step is durable before the next:
//!
//! ```text
//!              both footers   home (512)     after the blocks
//!   initial    -> home        old
//!   extended   -> home        old            (zeros; the trailing footer at the new end)
//!   written    -> home        old            texts, new header
//!   switched   -> new         old            texts, new header
//!   settled    -> new         new, texts     texts, new header
//!   returned   -> home        new, texts     texts, new header
//!   trimmed    -> home        new, texts
//! ```
//!
//! Both footers are valid at every moment. The trailing footer is authoritative, and a header is durable before a
//! footer refers to it. So a crash leaves the old parent or the new one, and never a mixture. A footer is switched by a
//! write of one sector. If a power cut leaves the two footers with different header offsets, both headers are valid,
//! and writers refuse the image until the reparent is repeated, which continues from the trailing footer. An
//! interrupted reparent is repeated as a whole ([`is_reparent_finished`] detects one). Between two steps any program
//! may read and write the image, except if the footers differ.
//!
//! A change of the disk type (a child that becomes a root) is part of the switch of the footers.
//!
//! Texts of locators are written where the old ones were, and between header and block table. A text that does not fit
//! there stays after the blocks, as the format allows.

use std::ops::Range;

use super::offline_image::lengthen;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::format::footer::time_from_unix;
use crate::format::header::{HEADER_BYTES, LOCATORS};
use crate::format::layout::PAGE;
use crate::format::parent_path::MAX_TEXT_BYTES;
use crate::format::parent_path::{encode_macx, encode_parent_name, encode_w2ku, encode_w2ru};
use crate::format::{Defect, DiskType, DynamicHeader, Footer, Geometry, LocatorEntry, MetadataPart, Platform};
use crate::image::check::space::{unreferenced_space, whole_pages};
use crate::image::create::ParentLink;
use crate::image::open::Image;
use crate::image::write::durability::Durability;
use crate::image::write::writable::Writable;
use crate::storage::{Env, File};
use crate::units::{SECTOR, SECTOR_BYTES};

/// The offset of the dynamic header that every program can read.
const HEADER_HOME: u64 = 512;

/// Makes the image in `file` a child of another parent or, without a `link`, a root. `file` is open for writing and
/// locked exclusively; an [`Image`] opened from it before must not be used afterwards. The image's blocks do not
/// change. The caller decides whether the disk's contents may change.
///
/// Locators keep their slots; locators of platforms that cannot be written are dropped. A `MacX` locator gets the
/// relative path, as vhd-util writes it.
///
/// # Errors
/// - the errors of [`Image::open`].
/// - `Unsupported` if the image is fixed, or a path cannot be recorded in a child.
/// - `Refused` if the image must not be written, or has a session that has not ended.
/// - `NoSpace`, `Io`: the image has its old or new parent, and repeating the call is safe.
pub fn reparent(env: &dyn Env, file: &File, link: Option<&ParentLink>) -> Result<()> {
    let writable = Writable::new(env, open_reconciled(file)?, &Durability::FlushOnly)?;
    let image = writable.image();
    let old = writable.footer_bytes();
    let new = ReparentedMetadata::of(image, link)?;
    let len = file.stat()?.len;
    let (texts_at, header_at, footer_at) = (len, len + new.text_bytes(), len + new.text_bytes() + HEADER_BYTES);

    lengthen(file, len, footer_at, &old)?;
    failpoint::reached("relink.extended");

    let mut header = new.header.clone();
    let mut at = texts_at;
    for (slot, platform, text) in &new.texts {
        header.locators[*slot] = LocatorEntry::new(*platform, at, length(text));
        file.write_at(&padded_text(text), at)?;
        at += text_space(text);
    }
    file.write_at(&header.encode(), header_at)?;
    file.sync()?;
    failpoint::reached("relink.written");

    let switch = |data_offset| {
        let footer = Footer { data_offset, ..new.footer.clone() }.encode();
        file.write_at(&footer, footer_at).and_then(|()| file.write_at(&footer, 0)).and_then(|()| file.sync())
    };
    switch(header_at)?;
    failpoint::reached("relink.switched");

    let home = home_of(image);
    let (mut free, detour) = (free_text_space(image, home), header.locators);
    let mut header = new.header;
    for (slot, platform, text) in &new.texts {
        header.locators[*slot] = match take_space(&mut free, text_space(text)) {
            Some(at) => {
                file.write_at(&padded_text(text), at)?;
                LocatorEntry::new(*platform, at, length(text))
            }
            None => detour[*slot],
        };
    }
    file.write_at(&header.encode(), home)?;
    file.sync()?;
    failpoint::reached("relink.settled");

    switch(home)?;
    failpoint::reached("relink.returned");

    // `writable` has the old metadata in memory, so the image is opened again.
    let set_aside = image.sparse().map_or(Vec::new(), |sparse| sparse.metadata.locator_space().to_vec());
    drop(writable);
    let image = Image::open(file.clone())?;
    punch_set_aside(&image, &set_aside)?;
    Writable::new(env, image, &Durability::FlushOnly)?.trim()?;
    failpoint::reached("relink.trimmed");
    Ok(())
}

/// Frees the unreferenced parts of the space that was set aside for the old locators.
fn punch_set_aside(image: &Image, set_aside: &[Range<u64>]) -> Result<()> {
    for gap in unreferenced_space(image)? {
        for room in set_aside {
            let pages = room.start / PAGE * PAGE..room.end.next_multiple_of(PAGE);
            let hole = whole_pages(&(gap.start.max(pages.start)..gap.end.min(pages.end)));
            if !hole.is_empty() {
                image.file().punch_hole(hole.start, hole.end - hole.start)?;
            }
        }
    }
    Ok(())
}

/// Opens the image in a file that is open for writing and locked exclusively. If an interrupted switch of header
/// offset, disk type or size left the footers different, updates the copy from the trailing footer first. Other
/// contradictions between the footers remain, and an open for writing refuses them.
///
/// # Errors
/// The errors of [`Image::open`], and `Io`.
pub fn open_reconciled(file: &File) -> Result<Image> {
    let image = Image::open(file.clone())?;
    let mut front = [0; SECTOR_BYTES];
    if image.sparse().is_none() || !image.has_whole_tail_footer() {
        return Ok(image);
    }
    file.read_at(&mut front, 0)?;
    let tail = image.footer();
    match Footer::decode(&front) {
        Ok(front) if front != *tail && front.disk_type != DiskType::Fixed => {
            // A reparent changes disk type and header offset together; other differences were made by other programs.
            if front.disk_type != tail.disk_type && front.data_offset == tail.data_offset {
                return Ok(image);
            }
            let (disk_type, data_offset, geometry) = (tail.disk_type, tail.data_offset, tail.geometry);
            let resized =
                if front.current_size == tail.current_size { front } else { front.with_size(tail.current_size) };
            if (Footer { disk_type, data_offset, geometry, ..resized }) != *tail {
                return Ok(image);
            }
        }
        _ => return Ok(image),
    }
    file.write_at(&tail.encode(), 0)?;
    file.sync()?;
    Image::open(file.clone())
}

/// Checks, without changing anything, whether an image can get the parent `link`.
///
/// # Errors
/// `Unsupported` if the image is fixed, or a path cannot be recorded in a child.
pub fn check_reparent(image: &Image, link: Option<&ParentLink>) -> Result<()> {
    ReparentedMetadata::of(image, link).map(drop)
}

/// Returns whether no interrupted reparent has left traces in the image. Repeating the reparent removes them. Other
/// causes of the same traces are not distinguished: footers that differ, or space between the last block and the
/// footer.
pub fn is_reparent_finished(image: &Image) -> bool {
    let Some(sparse) = image.sparse() else { return true };
    let is_alike = |d: &Defect| !matches!(d, Defect::FootersDiffer { .. } | Defect::FooterKindsDiffer { .. });
    let end = sparse.placed.end.next_multiple_of(SECTOR);
    image.notes().iter().all(is_alike) && home_of(image) == image.footer().data_offset && end >= image.data_end()
}

/// The footer, header and locator texts that an image gets.
struct ReparentedMetadata {
    footer: Footer,
    /// The header without locators.
    header: DynamicHeader,
    /// Slot, platform and text of each locator.
    texts: Vec<(usize, Platform, Vec<u8>)>,
}

impl ReparentedMetadata {
    fn of(image: &Image, link: Option<&ParentLink>) -> Result<ReparentedMetadata> {
        let mut footer = image.footer().clone();
        let Some(mut header) = image.header().cloned() else {
            let what = "a fixed image cannot have a parent";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(image.file().path()));
        };
        let old = std::mem::replace(&mut header.locators, [LocatorEntry::UNUSED; LOCATORS]);
        let Some(link) = link else {
            footer.disk_type = DiskType::Dynamic;
            // QEMU reads only roots, and may compute a root's size from the geometry.
            footer.geometry = Geometry::for_creator(footer.creator, footer.current_size);
            (header.parent_uuid, header.parent_timestamp, header.parent_name) = (uuid::Uuid::nil(), 0, [0; 512]);
            return Ok(ReparentedMetadata { footer, header, texts: Vec::new() });
        };
        footer.disk_type = DiskType::Differencing;
        header.parent_uuid = link.uuid;
        header.parent_timestamp = time_from_unix(u64::try_from(link.modified).unwrap_or(0));
        header.parent_name = encode_parent_name(&link.name)?;
        Ok(ReparentedMetadata { footer, header, texts: locator_texts(&old, link)? })
    }

    /// Returns the number of bytes that the texts take in the file.
    fn text_bytes(&self) -> u64 {
        self.texts.iter().map(|(_, _, text)| text_space(text)).sum()
    }
}

/// Encodes the locators of a link. Each keeps the slot of its platform in `old`, or gets a free one.
fn locator_texts(old: &[LocatorEntry; LOCATORS], link: &ParentLink) -> Result<Vec<(usize, Platform, Vec<u8>)>> {
    let slot_of = |platform| old.iter().position(|entry| entry.platform() == platform);
    let mut texts: Vec<(usize, Platform, Vec<u8>)> = Vec::new();
    if let Some(slot) = slot_of(Platform::MacX) {
        texts.push((slot, Platform::MacX, encode_macx(&link.name)?));
    }
    let relative = link.relative.as_deref().map(|path| encode_w2ru(path).map(|text| (Platform::W2ru, text)));
    let absolute = link.absolute.as_deref().map(|path| encode_w2ku(path).map(|text| (Platform::W2ku, text)));
    let mut homeless = Vec::new();
    for found in [relative, absolute].into_iter().flatten() {
        let (platform, text) = found?;
        match slot_of(platform) {
            Some(slot) => texts.push((slot, platform, text)),
            None => homeless.push((platform, text)),
        }
    }
    for (platform, text) in homeless {
        let slot = (0..LOCATORS).find(|slot| texts.iter().all(|(used, _, _)| used != slot));
        texts.push((slot.expect("three platforms in eight slots"), platform, text));
    }
    texts.sort_unstable_by_key(|(slot, _, _)| *slot);
    Ok(texts)
}

/// Returns the header's final offset: the usual one, unless other data occupies it.
fn home_of(image: &Image) -> u64 {
    let now = image.footer().data_offset;
    let usual = HEADER_HOME..HEADER_HOME + HEADER_BYTES;
    let is_free = |part: MetadataPart| matches!(part, MetadataPart::Header | MetadataPart::Locator(_));
    if now == HEADER_HOME || clip(usual.clone(), &occupied(image, is_free)) == usual { HEADER_HOME } else { now }
}

/// Returns the space for texts, in whole sectors, ascending: the space from the header to the next structure, and the
/// space of the old texts.
fn free_text_space(image: &Image, home: u64) -> Vec<Range<u64>> {
    let mut taken = occupied(image, |part| matches!(part, MetadataPart::Header | MetadataPart::Locator(_)));
    let after_header = home + HEADER_BYTES;
    taken.push(home..after_header);
    let mut free = Vec::new();
    // After the header, texts are placed only before the table. If the table is before the header, the space up to the
    // first block may contain another program's data.
    let table = image.table_offset().unwrap_or(0);
    if table > after_header {
        free.push(clip(after_header..table, &taken));
    }
    let metadata = &image.sparse().expect("it has a header").metadata;
    let locators = image.header().into_iter().flat_map(|header| header.locators.iter().enumerate());
    for (_, entry) in locators.filter(|(slot, _)| metadata.has_locator(*slot)) {
        let sectors =
            if u64::from(entry.space) < SECTOR { entry.space.into() } else { u64::from(entry.space) / SECTOR };
        let room = (sectors * SECTOR).min(MAX_TEXT_BYTES.into());
        let end = (entry.offset + room).min(image.data_end()) / SECTOR * SECTOR;
        let start = entry.offset.next_multiple_of(SECTOR);
        free.push(clip(start..end.max(start), &taken));
    }
    free.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in free.into_iter().filter(|range| !range.is_empty()) {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Returns the occupied ranges of the file: blocks, and the metadata for which `goes` returns false.
fn occupied(image: &Image, goes: impl Fn(MetadataPart) -> bool) -> Vec<Range<u64>> {
    let sparse = image.sparse().expect("it has a header");
    let stays = sparse.metadata.extents().iter().filter(|extent| !goes(extent.part));
    let mut taken: Vec<_> = stays.map(|extent| extent.range.clone()).collect();
    taken.extend(sparse.table.used().map(|(_, place)| place.byte_range(sparse.header.block_size)));
    taken
}

/// Returns the part of `range` before the first of the `taken` ranges that overlap it.
fn clip(range: Range<u64>, taken: &[Range<u64>]) -> Range<u64> {
    let over = taken.iter().filter(|other| other.start < range.end && other.end > range.start);
    let end = over.map(|other| other.start.max(range.start)).min();
    range.start..end.unwrap_or(range.end)
}

fn take_space(free: &mut [Range<u64>], bytes: u64) -> Option<u64> {
    let found = free.iter_mut().find(|range| range.end - range.start >= bytes)?;
    found.start += bytes;
    Some(found.start - bytes)
}

/// Returns the number of bytes that a text takes in the file.
fn text_space(text: &[u8]) -> u64 {
    padded_len(text) as u64
}

fn padded_len(text: &[u8]) -> usize {
    text.len().max(1).next_multiple_of(SECTOR_BYTES)
}

fn padded_text(text: &[u8]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    bytes.resize(padded_len(text), 0);
    bytes
}

fn length(text: &[u8]) -> u32 {
    u32::try_from(text.len()).expect("paths are limited when they are encoded")
}

#[cfg(all(test, feature = "sim"))]
#[path = "reparent_tests.rs"]
mod tests;
