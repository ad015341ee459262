//! Finds the children of an image. Writing to the image changes the disks of its children.
//!
//! Children are found in two ways, and neither is complete:
//!
//! - by the extended attribute `user.diffdisk.children` of the parent: one line for each child, with its path relative
//!   to the parent's folder. The attribute is written when a child is created or linked; the contents of the parent's
//!   file do not change. No other program reads the attribute. A parent on a read-only file system, or on one without
//!   attributes, has none. Lines that no longer lead to a child are removed.
//! - by the headers of the files in the parent's folder: of at most [`MAX_FILES`] files, and for at most
//!   [`MAX_SEARCH_TIME`].
//!
//! A file counts as a child if its header has the parent's UUID, unless its paths lead to another image with that UUID:
//! a copy of the parent. If the paths lead to no such image, or the file cannot be opened as an image, it also counts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::open_mode::OpenMode;
use super::parent_lookup::ParentLookup;
use super::parents::{ParentSearch, Policy};
use super::paths::{absolute_path, lexically_normal, percent_decode, percent_encode, relative_path};
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::image::{Image, ImageIdentity, folder_of, is_temporary_name};
use crate::storage::{Access, Env, File, FileId};

const CHILDREN_ATTRIBUTE: &str = "user.diffdisk.children";
/// Maximum number of files in a folder whose headers are read.
const MAX_FILES: usize = 1000;
/// Maximum time for which the headers of files in a folder are read.
const MAX_SEARCH_TIME: Duration = Duration::from_millis(50);
/// Maximum number of children in the attribute.
const MAX_RECORDED: usize = 16;
/// Maximum size of the attribute: ext4 has 4 KiB for all attributes of a file.
const MAX_ATTRIBUTE_BYTES: usize = 2048;
/// Maximum number of children that an error names.
const MAX_NAMED: usize = 3;

/// Fails if `parent`, which is about to be written to, has children that can be found.
///
/// # Errors
/// - `Refused`, with the names of children
/// - `NotFound` if the folder of `parent` no longer exists
/// - `Io`
pub fn refuse_if_parent(env: &dyn Env, parent: &Image) -> Result<()> {
    let children = children_of(env, parent)?;
    if children.is_empty() {
        return Ok(());
    }
    let mut named: Vec<String> = children.iter().take(MAX_NAMED).map(|path| path.display().to_string()).collect();
    if children.len() > MAX_NAMED {
        named.push(format!("{} more", children.len() - MAX_NAMED));
    }
    let what = format!(
        "the image is the parent of {}: writing to it would change their disks. Serve a child, or serve this image \
         read-only; --allow-writable-parent serves it for writing anyway",
        named.join(", ")
    );
    Err(Error::new(ErrorKind::Refused, what).at_path(parent.file().path()))
}

/// Returns the paths of the children of `parent` that can be found. Removes stale lines of the attribute if this
/// process may change the attribute.
///
/// # Errors
/// - `NotFound` if the folder of `parent` no longer exists
/// - `Io`
pub fn children_of(env: &dyn Env, parent: &Image) -> Result<Vec<PathBuf>> {
    let folder = env.canonical(folder_of(parent.file().path()))?;
    let mut search = ChildSearch { env, parent, id: parent.file().stat()?.id, found: Vec::new() };
    let recorded = recorded_children(parent.file())?;
    let mut current = Vec::new();
    for line in &recorded {
        let path = lexically_normal(&folder.join(line));
        if !is_kernel_path(&path) && search.check_candidate(&path)? {
            current.push(line.clone());
        }
    }
    if current.len() < recorded.len() {
        // If this process may not change the attribute, its stale lines stay.
        let _ = parent.file().set_attribute(CHILDREN_ATTRIBUTE, encode_children(&current).as_deref());
    }
    let began = env.monotonic_time();
    let listed = match env.folder(&folder).and_then(|folder| folder.list()) {
        Err(e) if e.is_denied() => Vec::new(),
        listed => listed?,
    };
    for (number, name) in listed.iter().filter(|name| !is_temporary_name(name)).enumerate() {
        if number >= MAX_FILES || env.monotonic_time().saturating_sub(began) > MAX_SEARCH_TIME {
            let (folder, all) = (folder.display(), listed.len());
            log::info!("{folder}: only {number} of {all} files were searched for children of an image there");
            break;
        }
        search.check_candidate(&folder.join(name))?;
    }
    Ok(search.found.into_iter().map(|(_, path)| path).collect())
}

/// Records in the attribute of `parent` that the image at `child` is its child, if possible. `child` need not exist
/// yet.
pub fn record_child(env: &dyn Env, parent: &Image, child: &Path) {
    if let Err(e) = try_record_child(env, parent, child) {
        log::debug!("{}: a child cannot be recorded in its attribute: {}", parent.file().path().display(), e.line());
    }
}

fn try_record_child(env: &dyn Env, parent: &Image, child: &Path) -> Result<()> {
    let folder = env.canonical(folder_of(parent.file().path()))?;
    let line = relative_path(&folder, &absolute_path(env, child)?);
    // Another process may change the attribute between the read and the write, since no system call does both. So the
    // attribute is read back, and written again if the line is missing.
    for _ in 0..4 {
        let mut lines = recorded_children(parent.file())?;
        if lines.contains(&line) {
            return Ok(());
        }
        lines.push(line.clone());
        if encode_children(&lines).is_some_and(|text| text.len() > MAX_ATTRIBUTE_BYTES) || lines.len() > MAX_RECORDED {
            children_of(env, parent)?;
            lines = recorded_children(parent.file())?;
            lines.push(line.clone());
        }
        while lines.len() > MAX_RECORDED
            || (lines.len() > 1 && encode_children(&lines).is_some_and(|t| t.len() > MAX_ATTRIBUTE_BYTES))
        {
            lines.remove(0);
        }
        parent.file().set_attribute(CHILDREN_ATTRIBUTE, encode_children(&lines).as_deref())?;
    }
    Ok(())
}

struct ChildSearch<'a> {
    env: &'a dyn Env,
    parent: &'a Image,
    id: FileId,
    found: Vec<(FileId, PathBuf)>,
}

impl ChildSearch<'_> {
    /// Whether a child is, or may be, at `path`: a file without read permission may be one.
    fn check_candidate(&mut self, path: &Path) -> Result<bool> {
        let file = match self.env.open(path, Access::Read) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound) => return Ok(false),
            Err(e) if e.is_denied() => return Ok(true),
            Err(e) => return Err(e),
        };
        let id = file.stat()?.id;
        if self.found.iter().any(|(found, _)| *found == id) {
            return Ok(true);
        }
        let parent = ImageIdentity::peek(&file)?.and_then(|identity| identity.parent);
        if id == self.id || parent != Some(self.parent.uuid()) || !self.resolves_to_parent(file)? {
            return Ok(false);
        }
        self.found.push((id, path.to_path_buf()));
        Ok(true)
    }

    /// Whether the paths in a child lead to the parent's file. Also true if the paths lead to no image with the
    /// parent's UUID, or if the child cannot be opened.
    fn resolves_to_parent(&self, child: File) -> Result<bool> {
        let Ok(child) = Image::open(child) else { return Ok(true) };
        if child.kind() != DiskType::Differencing {
            return Ok(false);
        }
        let allowed = vec![folder_of(self.parent.file().path()).to_path_buf()];
        let policy = Policy { allowed, ..Policy::default() };
        match ParentSearch::new(self.env, child.file(), &policy, OpenMode::Inspect)?.find_parent(&child) {
            Ok(ParentLookup::Parent(parent)) => Ok(parent.file().stat()?.id == self.id),
            _ => Ok(true),
        }
    }
}

/// Whether a path is in a file system of the kernel. Such a file system contains no images, and opening a file in it
/// may have side effects.
fn is_kernel_path(path: &Path) -> bool {
    ["/proc", "/sys", "/dev"].iter().any(|folder| path.starts_with(folder))
}

/// The paths in the attribute of a file; empty if there is no attribute, or if it cannot be decoded.
fn recorded_children(parent: &File) -> Result<Vec<PathBuf>> {
    let value = parent.attribute(CHILDREN_ATTRIBUTE)?.unwrap_or_default();
    let text = std::str::from_utf8(&value).unwrap_or_default();
    Ok(text.lines().take(MAX_RECORDED).filter_map(percent_decode).collect())
}

fn encode_children(lines: &[PathBuf]) -> Option<Vec<u8>> {
    let text: Vec<String> = lines.iter().map(|line| percent_encode(line)).collect();
    (!text.is_empty()).then(|| text.join("\n").into_bytes())
}

#[cfg(test)]
#[path = "children_tests.rs"]
mod tests;
