//! Creates images.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::atomic_file::{AtomicFile, name_exists_error};
use super::preallocate::preallocate;
use crate::error::{Error, ErrorKind, Result};
use crate::format::footer::time_from_unix;
use crate::format::header::LOCATORS;
use crate::format::parent_path::{encode_parent_name, encode_w2ku, encode_w2ru};
use crate::format::{DiskType, DynamicHeader, Footer, LocatorEntry, NewLayout, Platform, bat};
use crate::storage::{Env, File};
use crate::units::{BlockSize, SECTOR};

/// The reference to the parent that a child records.
#[derive(Clone, Debug)]
pub struct ParentLink {
    /// The parent's UUID, which an open of the chain verifies.
    pub uuid: Uuid,
    /// The parent file's modification time, in Unix seconds.
    pub modified: i64,
    /// The parent's path relative to the child's folder, for a relative locator.
    pub relative: Option<PathBuf>,
    /// The parent's absolute path, for an absolute locator.
    pub absolute: Option<PathBuf>,
    /// The parent's path relative to the child's folder, for the name in the header.
    pub name: PathBuf,
}

/// The kind of a new image.
#[derive(Clone, Debug)]
pub enum ImageKind {
    /// A fixed image: all sectors of the disk in order, without a block table.
    Fixed,
    /// A dynamic image: a root that allocates blocks when they are written.
    Dynamic,
    /// A differencing image: a child of the linked parent.
    Differencing(ParentLink),
}

/// The parameters of a new image.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// Kind of the image.
    pub kind: ImageKind,
    /// Virtual size in bytes.
    pub size: u64,
    /// Size of the image's blocks.
    pub block_size: BlockSize,
    /// Virtual size in bytes up to which the block table can grow in place.
    pub reserve: u64,
}

/// Creates an image at `path`, which must not exist. The file gets its name when the image is complete and durable.
/// Returns the UUID of the image.
///
/// # Errors
/// - `Refused` if the file exists, or if `path` does not end in a file name.
/// - `NotFound` if the folder does not exist.
/// - `Invalid` if the format does not allow the sizes.
/// - `Unsupported` if a path of the parent cannot be recorded in a child.
/// - `Io`, `NoSpace`.
pub fn create(env: &dyn Env, path: &Path, spec: &ImageSpec) -> Result<Uuid> {
    create_image(env, path, spec, false)
}

/// Creates an image as [`create`] does, with every block placed and its space allocated in the file system.
///
/// # Errors
/// - The errors of [`create`].
/// - `Unsupported` also if the file system cannot allocate space in advance, or the format cannot place all blocks.
pub fn create_preallocated(env: &dyn Env, path: &Path, spec: &ImageSpec) -> Result<Uuid> {
    create_image(env, path, spec, true)
}

fn create_image(env: &dyn Env, path: &Path, spec: &ImageSpec, whole: bool) -> Result<Uuid> {
    if env.exists(path) {
        return Err(name_exists_error(path));
    }
    let uuid = env.uuid();
    let mut draft = AtomicFile::begin(env, path, env.folder(folder_of(path))?, file_name(path)?)?;
    let filled = write_new(draft.file(), env, uuid, spec);
    let filled = filled.and_then(|()| if whole { preallocate(draft.file()) } else { Ok(()) });
    let made = filled.and_then(|()| draft.publish());
    made.map(|()| uuid).map_err(|e| draft.with_requested_path(e).at_path(path))
}

/// Returns the last component of a path.
///
/// # Errors
/// `Refused` if `path` does not end in a file name.
pub fn file_name(path: &Path) -> Result<&OsStr> {
    path.file_name().ok_or_else(|| Error::new(ErrorKind::Refused, "the path does not end in a file name").at_path(path))
}

/// Returns the folder of a path, or `.` if the path has only one component.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Writes a new image into an empty file, and makes the file durable. The caller makes the file's name durable.
///
/// # Errors
/// - `Invalid` if the format does not allow the sizes.
/// - `Unsupported` if a path of the parent cannot be recorded in a child.
/// - `Io`, `NoSpace`.
pub fn write_new(file: &File, env: &dyn Env, uuid: Uuid, spec: &ImageSpec) -> Result<()> {
    // The sizes come from the command line, so an offset in the file would mislead.
    let invalid = |defect| Error::from(defect).without_offset().at_path(file.path());
    let now = u64::try_from(env.now()).unwrap_or(0);
    let (disk_type, locators) = match &spec.kind {
        ImageKind::Fixed => (DiskType::Fixed, Vec::new()),
        ImageKind::Dynamic => (DiskType::Dynamic, Vec::new()),
        ImageKind::Differencing(link) => (DiskType::Differencing, locators(link)?),
    };
    let lengths: Vec<u32> = locators.iter().map(|(_, text)| text_len(text)).collect();
    let reserve = spec.block_size.blocks_for(spec.reserve.max(spec.size).div_ceil(SECTOR));
    let reserve = u32::try_from(reserve).unwrap_or(u32::MAX);
    let layout = NewLayout::plan(disk_type, spec.size, spec.block_size, reserve, &lengths).map_err(invalid)?;
    let footer = Footer::new(disk_type, spec.size, uuid, now).encode();
    // Bitmaps and tables are overwritten often. With copy on write, commits could fail when the file system is full.
    if let Err(e) = file.disable_copy_on_write() {
        log::warn!("{}", e.line());
    }
    file.set_len(layout.footer + SECTOR)?;
    file.write_at(&footer, layout.footer)?;
    if let Some(header_at) = layout.header {
        let mut header = DynamicHeader::new(layout.table, layout.entries, spec.block_size);
        if let ImageKind::Differencing(link) = &spec.kind {
            header.parent_uuid = link.uuid;
            header.parent_timestamp = time_from_unix(u64::try_from(link.modified).unwrap_or(0));
            header.parent_name = encode_parent_name(&link.name)?;
            assert!(locators.len() <= LOCATORS, "two at most");
            for (slot, ((platform, text), place)) in locators.iter().zip(&layout.locators).enumerate() {
                header.locators[slot] = LocatorEntry::new(*platform, place.start, text_len(text));
                file.write_at(text, place.start)?;
            }
        }
        file.write_at(&footer, 0)?;
        file.write_at(&header.encode(), header_at)?;
        write_unused_table(file, &layout)?;
    }
    file.sync()
}

/// Writes a table of unused entries, padded with ones to the end of its last page.
fn write_unused_table(file: &File, layout: &NewLayout) -> Result<()> {
    let unused = vec![0xFF; 1 << 16];
    debug_assert_eq!(bat::UNUSED.to_be_bytes(), [0xFF; 4]);
    let (mut at, end) = (layout.table, layout.table + layout.table_bytes);
    while at < end {
        let len = usize::try_from((end - at).min(unused.len() as u64)).expect("a chunk");
        file.write_at(&unused[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// Encodes the locators of a child. The relative one is first, as most readers prefer it.
fn locators(link: &ParentLink) -> Result<Vec<(Platform, Vec<u8>)>> {
    let mut locators = Vec::new();
    if let Some(path) = &link.relative {
        locators.push((Platform::W2ru, encode_w2ru(path)?));
    }
    if let Some(path) = &link.absolute {
        locators.push((Platform::W2ku, encode_w2ku(path)?));
    }
    Ok(locators)
}

fn text_len(text: &[u8]) -> u32 {
    u32::try_from(text.len()).expect("paths are limited when they are encoded")
}
