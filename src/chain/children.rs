//! The images that stand on an image: whoever writes to it changes their disks.
//!
//! They are found in two ways, and neither is complete:
//!
//! - by the mark that making or linking a child leaves on the parent if possible: the extended attribute
//!   `user.diffdisk.children`, a line for each child with its path from the parent's folder. No other program reads it, and
//!   no byte of the image changes. A parent on a read-only file system, or on one without attributes, gets none. Lines that
//!   lead to no child any more are dropped.
//! - by the headers of the files in the parent's folder, up to [`MAX_FILES`] of them and for [`MAX_SEARCH_TIME`].
//!
//! A file is a child if its header names the parent's UUID and its paths lead to this file, not to a copy of it.

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
/// Files of the folder whose headers are looked at, at most.
const MAX_FILES: usize = 1000;
/// How long they are looked at, at most.
const MAX_SEARCH_TIME: Duration = Duration::from_millis(50);
/// Children in a mark, at most, and its bytes: ext4 keeps all attributes of a file in 4 KiB.
const MAX_RECORDED: usize = 16;
const MAX_ATTRIBUTE_BYTES: usize = 2048;
/// Children that an error names.
const MAX_NAMED: usize = 3;

/// Fails if images stand on `parent`, which is going to be written to.
///
/// # Errors
/// - `Refused` naming them
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
        "it is the parent of {}: writing to it changes what they show. Serve a child, or this one read-only; \
         --allow-writable-parent serves it nevertheless",
        named.join(", ")
    );
    Err(Error::new(ErrorKind::Refused, what).at_path(parent.file().path()))
}

/// Returns the paths of images that stand on `parent`, as far as they can be found. Stale lines of the mark are dropped.
///
/// # Errors
/// `Io`.
pub fn children_of(env: &dyn Env, parent: &Image) -> Result<Vec<PathBuf>> {
    let folder = env.canonical(folder_of(parent.file().path()))?;
    let mut search = ChildSearch { env, parent, id: parent.file().stat()?.id, found: Vec::new() };
    let marked = recorded_children(parent.file())?;
    let mut alive = Vec::new();
    for line in &marked {
        let path = lexically_normal(&folder.join(line));
        if !is_kernel_path(&path) && search.check_candidate(&path)? {
            alive.push(line.clone());
        }
    }
    if alive.len() < marked.len() {
        // Without the right to change it, the mark stays and is looked at again.
        let _ = parent.file().set_attribute(CHILDREN_ATTRIBUTE, encode_children(&alive).as_deref());
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

/// Notes on `parent` that the image at `child` stands on it, if that is possible. `child` need not be there yet.
pub fn record_child(env: &dyn Env, parent: &Image, child: &Path) {
    if let Err(e) = try_record_child(env, parent, child) {
        log::debug!("{}: it is not marked as a parent: {}", parent.file().path().display(), e.line());
    }
}

fn try_record_child(env: &dyn Env, parent: &Image, child: &Path) -> Result<()> {
    let folder = env.canonical(folder_of(parent.file().path()))?;
    let line = relative_path(&folder, &absolute_path(env, child)?);
    // Another process may change the mark between the two calls, and there is no call for both.
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
    /// Whether a child is at `path`, or may be: what is closed to us cannot be told.
    fn check_candidate(&mut self, path: &Path) -> Result<bool> {
        let file = match self.env.open(path, Access::Read) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound) => return Ok(false),
            Err(e) if e.is_denied() => return Ok(true),
            Err(e) => return Err(e),
        };
        let id = file.stat()?.id;
        if self.found.iter().any(|(known, _)| *known == id) {
            return Ok(true);
        }
        let named = ImageIdentity::peek(&file)?.and_then(|glance| glance.parent);
        if id == self.id || named != Some(self.parent.uuid()) || !self.resolves_to_parent(file)? {
            return Ok(false);
        }
        self.found.push((id, path.to_path_buf()));
        Ok(true)
    }

    /// Whether the paths in a child lead to the parent's file; true if they lead to no image of this UUID.
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

/// Whether a path leads to what the kernel makes up: no image lies there, and opening may have effects.
fn is_kernel_path(path: &Path) -> bool {
    ["/proc", "/sys", "/dev"].iter().any(|folder| path.starts_with(folder))
}

/// The lines of the mark on a file; none if there is no mark, or none of ours.
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
