//! Relinking: an image gets another parent, or none, and is whole at every moment.
//!
//! The dynamic header is the one structure of a VHD that no single write can change: two sectors, one checksum, no copy.
//! What names its place is a footer of one sector. So the header takes a detour, each step durable before the next:
//!
//! ```text
//!              both footers   home (512)     behind the blocks
//!   at first   -> home        old
//!   extended   -> home        old            (room, zero; the trailing footer at the new end)
//!   written    -> home        old            texts, new header
//!   switched   -> new         old            texts, new header
//!   settled    -> new         new, texts     texts, new header
//!   returned   -> home        new, texts     texts, new header
//!   trimmed    -> home        new, texts
//! ```
//!
//! Both footers are whole at every moment; the trailing one counts, and what either names was durable before. So a crash
//! leaves the old parent or the new one, never none and never half of each. A footer is switched in one sector; where the
//! power goes between the two, they name two headers: both are sound, and nothing is written until the image is relinked
//! again, which goes on by the trailing one. Whoever is ended in the middle begins again ([`is_settled`] tells); but for
//! that moment the image may be read and written by anyone in between.
//!
//! A type that changes (a child that becomes a root) goes with the footers.
//!
//! Texts of locators go where the old ones were, and between header and block table; what finds no room there stays
//! behind the blocks, as the format allows.

use std::ops::Range;

use super::create::ParentLink;
use super::keep::Keep;
use super::open::Image;
use super::writable::Writable;
use crate::error::{Error, ErrorKind, Result};
use crate::format::footer::time_from_unix;
use crate::format::header::{HEADER_BYTES, LOCATORS};
use crate::format::locator::MAX_TEXT_BYTES;
use crate::format::parent_path::{encode_macx, encode_parent_name, encode_w2ku, encode_w2ru};
use crate::format::{Defect, DiskType, DynamicHeader, Footer, LocatorEntry, Part, Platform};
use crate::point;
use crate::storage::{Env, File};
use crate::units::{SECTOR, SECTOR_BYTES};

/// Where the header of an image is that any program reads.
const HOME: u64 = 512;

/// Makes the image in `file` a child of another parent, or without a `link` a root. `file` is open for writing and
/// locked exclusively; whoever else has it open must not use it any more. Its blocks do not change: whether the disk
/// does is the caller's concern.
///
/// Locators keep their slots; of those that cannot be written anew, the platform is dropped. A `MacX` one becomes the
/// relative path, as vhd-util writes it.
///
/// # Errors
/// As [`check_link`]; as `Writable::new`; `NoSpace`, `Io`: the image has its old parent or its new one, and relinking it
/// again is safe.
pub fn relink(env: &dyn Env, file: &File, link: Option<&ParentLink>) -> Result<()> {
    let writable = Writable::new(env, agreed(file)?, &Keep::Nothing)?;
    let image = writable.image();
    let old = writable.footer_bytes();
    let new = New::of(image, link)?;
    let len = file.stat()?.len;
    let (texts_at, header_at, footer_at) = (len, len + new.text_bytes(), len + new.text_bytes() + HEADER_BYTES);

    extend(file, len, footer_at, &old)?;
    point::reached("relink.extended");

    let mut header = new.header.clone();
    let mut at = texts_at;
    for (slot, platform, text) in &new.texts {
        header.locators[*slot] = LocatorEntry::new(*platform, at, length(text));
        file.write_at(&padded(text), at)?;
        at += room(text);
    }
    file.write_at(&header.encode(), header_at)?;
    file.sync()?;
    point::reached("relink.written");

    let switch = |data_offset| {
        let footer = Footer { data_offset, ..new.footer.clone() }.encode();
        file.write_at(&footer, footer_at).and_then(|()| file.write_at(&footer, 0)).and_then(|()| file.sync())
    };
    switch(header_at)?;
    point::reached("relink.switched");

    let home = home_of(image);
    let (mut free, detour) = (free_room(image, home), header.locators);
    let mut header = new.header;
    for (slot, platform, text) in &new.texts {
        header.locators[*slot] = match take(&mut free, room(text)) {
            Some(at) => {
                file.write_at(&padded(text), at)?;
                LocatorEntry::new(*platform, at, length(text))
            }
            None => detour[*slot],
        };
    }
    file.write_at(&header.encode(), home)?;
    file.sync()?;
    point::reached("relink.settled");

    switch(home)?;
    point::reached("relink.returned");

    // What is open in memory is the image of before.
    drop(writable);
    Writable::new(env, Image::open(file.clone())?, &Keep::Nothing)?.trim()?;
    point::reached("relink.trimmed");
    Ok(())
}

/// Opens the image in a file that is open for writing and locked exclusively, with the copy of its footer renewed where a
/// switch of place, type or size was ended in the middle. Other contradictions are told where it is opened for writing.
///
/// # Errors
/// As `Image::open`; `Io`.
pub fn agreed(file: &File) -> Result<Image> {
    let image = Image::open(file.clone())?;
    let mut front = [0; SECTOR_BYTES];
    if image.sparse().is_none() || !image.has_whole_tail_footer() {
        return Ok(image);
    }
    file.read_at(&mut front, 0)?;
    let tail = image.footer();
    match Footer::decode(&front) {
        Ok(front) if front != *tail && front.disk_type != DiskType::Fixed => {
            // Anything else that differs is no work of ours.
            let (disk_type, data_offset) = (tail.disk_type, tail.data_offset);
            let resized =
                if front.current_size == tail.current_size { front } else { front.with_size(tail.current_size) };
            if (Footer { disk_type, data_offset, ..resized }) != *tail {
                return Ok(image);
            }
        }
        _ => return Ok(image),
    }
    file.write_at(&tail.encode(), 0)?;
    file.sync()?;
    Image::open(file.clone())
}

/// Whether an image can be linked so, which is better known before anything is changed for it.
///
/// # Errors
/// `Unsupported`: a fixed image, or a path that cannot be recorded in a child.
pub fn check_link(image: &Image, link: Option<&ParentLink>) -> Result<()> {
    New::of(image, link).map(drop)
}

/// Whether nothing is left of a relinking that was ended in the middle. Where something is, relinking it again tidies up.
pub fn is_settled(image: &Image) -> bool {
    let Some(sparse) = image.sparse() else { return true };
    let is_alike = |defect: &Defect| !matches!(defect, Defect::FootersDiffer { .. });
    let end = sparse.placed.end.next_multiple_of(SECTOR);
    image.notes().iter().all(is_alike) && home_of(image) == image.footer().data_offset && end >= image.data_end()
}

/// What an image is going to say.
struct New {
    footer: Footer,
    /// Without locators.
    header: DynamicHeader,
    /// Slot, platform and text of each locator.
    texts: Vec<(usize, Platform, Vec<u8>)>,
}

impl New {
    fn of(image: &Image, link: Option<&ParentLink>) -> Result<New> {
        let mut footer = image.footer().clone();
        let Some(mut header) = image.header().cloned() else {
            let what = "a fixed image has no place to name a parent";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(image.file().path()));
        };
        let old = std::mem::replace(&mut header.locators, [LocatorEntry::UNUSED; LOCATORS]);
        let Some(link) = link else {
            footer.disk_type = DiskType::Dynamic;
            (header.parent_uuid, header.parent_timestamp, header.parent_name) = (uuid::Uuid::nil(), 0, [0; 512]);
            return Ok(New { footer, header, texts: Vec::new() });
        };
        footer.disk_type = DiskType::Differencing;
        header.parent_uuid = link.uuid;
        header.parent_timestamp = time_from_unix(u64::try_from(link.modified).unwrap_or(0));
        header.parent_name = encode_parent_name(&link.name)?;
        Ok(New { footer, header, texts: texts(&old, link)? })
    }

    /// Bytes that the texts take in the file.
    fn text_bytes(&self) -> u64 {
        self.texts.iter().map(|(_, _, text)| room(text)).sum()
    }
}

/// The locators of a link, in the slots where `old` has ones of their platforms.
fn texts(old: &[LocatorEntry; LOCATORS], link: &ParentLink) -> Result<Vec<(usize, Platform, Vec<u8>)>> {
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

/// Makes the file longer: room from `len` on, and the footer at its end. As it was where that fails.
fn extend(file: &File, len: u64, footer_at: u64, footer: &[u8; SECTOR_BYTES]) -> Result<()> {
    let extended = match file.allocate(len, footer_at + SECTOR - len) {
        Err(e) if e.kind() != ErrorKind::Unsupported => Err(e),
        _ => file.write_at(footer, footer_at),
    };
    // ext4 keeps what a failed fallocate got; cutting to the present length gives it back.
    extended.inspect_err(|_| drop(file.set_len(len)))?;
    file.sync()
}

/// Where the header goes at last: where all look for it, unless something else is there.
fn home_of(image: &Image) -> u64 {
    let now = image.footer().data_offset;
    let usual = HOME..HOME + HEADER_BYTES;
    let is_free = |part: Part| matches!(part, Part::Header | Part::Locator(_));
    if now == HOME || clip(usual.clone(), &taken(image, is_free)) == usual { HOME } else { now }
}

/// Room for texts, in whole sectors, ascending: between the header and what follows it, and where the old texts were.
fn free_room(image: &Image, home: u64) -> Vec<Range<u64>> {
    let mut taken = taken(image, |part| matches!(part, Part::Header | Part::Locator(_)));
    let behind = home + HEADER_BYTES;
    taken.push(home..behind);
    let mut free = Vec::new();
    // Only up to metadata: what lies before the first block may be a stranger's.
    let table = image.table_offset().unwrap_or(0);
    if table > behind {
        free.push(clip(behind..table, &taken));
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

/// What is in the file: metadata that does not go, and blocks.
fn taken(image: &Image, goes: impl Fn(Part) -> bool) -> Vec<Range<u64>> {
    let sparse = image.sparse().expect("it has a header");
    let stays = sparse.metadata.extents().iter().filter(|extent| !goes(extent.part));
    let mut taken: Vec<_> = stays.map(|extent| extent.range.clone()).collect();
    let stride = u64::from(sparse.header.block_size.stride_sectors());
    taken.extend(sparse.table.used().map(|(_, place)| u64::from(place) * SECTOR..(u64::from(place) + stride) * SECTOR));
    taken
}

/// The start of `range`, up to the first thing in it.
fn clip(range: Range<u64>, taken: &[Range<u64>]) -> Range<u64> {
    let over = taken.iter().filter(|other| other.start < range.end && other.end > range.start);
    let end = over.map(|other| other.start.max(range.start)).min();
    range.start..end.unwrap_or(range.end)
}

fn take(free: &mut [Range<u64>], bytes: u64) -> Option<u64> {
    let found = free.iter_mut().find(|range| range.end - range.start >= bytes)?;
    found.start += bytes;
    Some(found.start - bytes)
}

/// Bytes of the file that a text takes.
fn room(text: &[u8]) -> u64 {
    padded_len(text) as u64
}

fn padded_len(text: &[u8]) -> usize {
    text.len().max(1).next_multiple_of(SECTOR_BYTES)
}

fn padded(text: &[u8]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    bytes.resize(padded_len(text), 0);
    bytes
}

fn length(text: &[u8]) -> u32 {
    u32::try_from(text.len()).expect("paths are limited when they are encoded")
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use std::path::{Path, PathBuf};

    use uuid::Uuid;

    use super::super::rig::{commit, file, grow, host_with, open};
    use super::*;
    use crate::image::{Kind, check};
    use crate::storage::sim::{FaultPlan, Random, SimHost};
    use crate::units::SectorRange;

    fn link(uuid: u128, name: &str) -> ParentLink {
        let absolute = Some(Path::new("/d").join(name));
        ParentLink {
            uuid: Uuid::from_u128(uuid),
            modified: 0,
            relative: Some(name.into()),
            absolute,
            name: name.into(),
        }
    }

    /// A child of three blocks, with data in the first one.
    fn child() -> SimHost {
        let host = host_with(Kind::Differencing(link(7, "old.vhd")), 128 * 3);
        let image = open(&host).unwrap();
        grow(&host, &image).unwrap();
        let place = image.reserve(1).unwrap();
        image.file().write_at(&[5; SECTOR_BYTES], (u64::from(place) + 1) * SECTOR).unwrap();
        assert!(image.mark(SectorRange::between(128, 129)));
        commit(&host, &image);
        image.trim().unwrap();
        host
    }

    /// UUID of the parent and the paths to it, after a look at the data.
    fn seen(host: &SimHost) -> (u128, Vec<PathBuf>) {
        let image = Image::open(file(host)).unwrap();
        let place = image.bat().unwrap().place(1).expect("the block is there");
        let (mut bits, mut data) = ([0; SECTOR_BYTES], [0; SECTOR_BYTES]);
        image.file().read_at(&mut bits, u64::from(place) * SECTOR).unwrap();
        image.file().read_at(&mut data, (u64::from(place) + 1) * SECTOR).unwrap();
        assert!(bits[0] == 0x80 && bits[1..] == [0; SECTOR_BYTES - 1] && data == [5; SECTOR_BYTES]);
        let paths = image.parent_candidates().unwrap().into_iter().map(|c| c.path.as_path().to_path_buf()).collect();
        (image.header().unwrap().parent_uuid.as_u128(), paths)
    }

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(Into::into).collect()
    }

    fn defects(host: &SimHost) -> Vec<&'static str> {
        check(file(host)).unwrap().0.defects.iter().map(|d| d.kind()).collect()
    }

    #[test]
    fn a_power_cut_leaves_the_old_parent_or_the_new_one() {
        let old = (7, paths(&["old.vhd", "/d/old.vhd"]));
        let new = (8, paths(&["the-new-parent-with-a-longer-name.vhd", "/d/the-new-parent-with-a-longer-name.vhd"]));
        let to = link(8, "the-new-parent-with-a-longer-name.vhd");
        let host = child();
        let len = file(&host).stat().unwrap().len;
        assert_eq!(seen(&host), old);
        host.record();
        relink(&host, &file(&host), Some(&to)).unwrap();
        let (moments, mut random, mut switched, mut contradictions) = (host.recorded(), Random::new(1), 0, 0);
        assert!(moments.len() > 20);
        for moment in moments {
            let count = moment.unsynced().len();
            for fate in 0..40 {
                let bits = if fate == 0 { 0 } else { random.any() | if fate == 1 { u64::MAX } else { 0 } };
                let after = moment.crash_with(&|unit| bits >> (unit % 64) & 1 == 1);
                let found = seen(&after);
                assert!(found == old || found == new, "{found:?}, fate {bits:x} of {count}");
                let is_left = Image::open(file(&after)).is_ok_and(|image| !is_settled(&image));
                assert!(is_left || found == old || defects(&after).is_empty(), "{:?}", defects(&after));
                switched += usize::from(found == new);
                // A stranger writes in between, or nobody does.
                let image = open(&after);
                let front = after.bytes(Path::new(super::super::rig::PATH)).unwrap()[..SECTOR_BYTES].to_vec();
                let is_whole = Footer::decode(front.as_slice().try_into().unwrap()).is_ok();
                assert!(is_whole && (image.is_ok() || image.as_ref().is_err_and(|e| e.kind() == ErrorKind::Refused)));
                contradictions += usize::from(image.is_err());
                if let (Ok(image), true) = (image, fate % 2 == 0) {
                    image.reserve(0).or_else(|_| grow(&after, &image).map(|()| image.reserve(0).unwrap())).unwrap();
                    assert!(image.mark(SectorRange::between(0, 1)));
                    commit(&after, &image);
                }
                relink(&after, &file(&after), Some(&to)).unwrap();
                assert_eq!(
                    (seen(&after), Image::open(file(&after)).unwrap().footer().data_offset),
                    (new.clone(), HOME)
                );
                assert!(fate % 2 == 0 || (defects(&after).is_empty() && file(&after).stat().unwrap().len == len));
            }
        }
        assert!(switched > 100 && (1..200).contains(&contradictions), "{contradictions}");
        assert_eq!((seen(&host), defects(&host).len(), file(&host).stat().unwrap().len), (new, 0, len));
    }

    #[test]
    fn a_text_without_room_stays_behind_the_blocks() {
        let host = child();
        let folder = "f".repeat(200);
        let long = PathBuf::from(format!("/{folder}/{folder}/{folder}/{folder}/{folder}/{folder}/p"));
        let to = ParentLink { absolute: Some(long.clone()), ..link(8, "p.vhd") };
        let before = file(&host).stat().unwrap().len;
        relink(&host, &file(&host), Some(&to)).unwrap();
        assert_eq!((seen(&host), defects(&host).len()), ((8, vec!["p.vhd".into(), long]), 0));
        let after = file(&host).stat().unwrap().len;
        assert!(after > before + 2048 && after < before + 4096);
        // The next one finds room in front, and the file ends behind its blocks again.
        relink(&host, &file(&host), Some(&link(9, "q.vhd"))).unwrap();
        assert_eq!((seen(&host).0, defects(&host).len(), file(&host).stat().unwrap().len), (9, 0, before));
    }

    #[test]
    fn slots_stay_and_roots_have_none() {
        let host = child();
        let f = file(&host);
        let mut header = Image::open(f.clone()).unwrap().header().unwrap().clone();
        header.locators = [LocatorEntry::UNUSED; LOCATORS];
        header.locators[6] = LocatorEntry::new(Platform::W2ru, 1536, 10);
        header.locators[2] = LocatorEntry::new(Platform::MacX, 2048, 10);
        header.locators[1] = LocatorEntry::new(Platform::Mac, 2560, 10);
        f.write_at(&header.encode(), HOME).unwrap();
        relink(&host, &f, Some(&link(8, "p q.vhd"))).unwrap();
        let image = Image::open(f.clone()).unwrap();
        let texts = image.parent_locators().unwrap();
        let slots: Vec<_> = texts.iter().map(|(slot, platform, _)| (*slot, *platform)).collect();
        assert_eq!(slots, [(0, Platform::W2ku), (2, Platform::MacX), (6, Platform::W2ru)]);
        assert_eq!((texts[1].2.as_slice(), texts[1].2.len()), (&b"file://./p%20q.vhd"[..], 18));
        assert!(image.header().unwrap().locators.iter().all(|entry| entry.offset < 4096));
        relink(&host, &f, None).unwrap();
        let image = Image::open(f.clone()).unwrap();
        assert_eq!((image.kind(), image.header().unwrap().parent_uuid), (DiskType::Dynamic, Uuid::nil()));
        assert!(image.header().unwrap().locators.iter().all(LocatorEntry::is_unused) && defects(&host).is_empty());
        relink(&host, &f, Some(&link(9, "r.vhd"))).unwrap();
        assert_eq!(seen(&host), (9, paths(&["r.vhd", "/d/r.vhd"])));
    }

    #[test]
    fn a_full_host_and_what_cannot_be_recorded_change_nothing() {
        let host = child();
        let before = host.bytes(Path::new(super::super::rig::PATH));
        let stat = file(&host).stat().unwrap();
        host.set_faults(FaultPlan { room: Some(stat.allocated), ..FaultPlan::default() });
        // More than the last page of the file still holds.
        let long = ParentLink { absolute: Some(format!("/{}/p.vhd", "f".repeat(1800)).into()), ..link(8, "p.vhd") };
        assert_eq!(relink(&host, &file(&host), Some(&long)).unwrap_err().kind(), ErrorKind::NoSpace);
        host.set_faults(FaultPlan::default());
        assert_eq!((file(&host).stat().unwrap().allocated, seen(&host).0), (stat.allocated, 7));
        assert_eq!(relink(&host, &file(&host), Some(&link(8, "a\\b"))).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(host.bytes(Path::new(super::super::rig::PATH)), before);
        let fixed = host_with(Kind::Fixed, 100);
        assert_eq!(relink(&fixed, &file(&fixed), None).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
