//! Whether a live journal belongs to an image: where it lies, whose it is, and the sum that the block table must have.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::open::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Env, File};

/// Refuses an image, by its file and its identity, if one of the runtime `folders` holds its live journal: its daemon was
/// killed, and what it acknowledged is in the journal, not yet in the file.
///
/// # Errors
/// `Refused`, saying what to do.
pub fn refuse_if_live(env: &dyn Env, folders: &[PathBuf], file: &File, uuid: Uuid) -> Result<()> {
    let Some(path) = find(env, folders, file, uuid)? else { return Ok(()) };
    let what = format!(
        "its daemon did not end cleanly, and {} holds what it acknowledged: start diffdiskd on it again, which takes \
         that in, and end it with SIGTERM",
        path.display()
    );
    Err(Error::new(ErrorKind::Refused, what).at_path(file.path()))
}

/// The live journal of an image, in the first of the `folders` that has one.
fn find(env: &dyn Env, folders: &[PathBuf], file: &File, uuid: Uuid) -> Result<Option<PathBuf>> {
    let paths: Vec<PathBuf> = folders.iter().map(|folder| path_of(folder, file, uuid)).collect::<Result<_>>()?;
    Ok(paths.into_iter().find(|path| env.exists(path)))
}

/// The folders in which to open the journal of an image, in the order to try: one that holds it already comes first.
pub(super) fn by_preference<'a>(env: &dyn Env, folders: &'a [PathBuf], image: &Image) -> Result<Vec<&'a PathBuf>> {
    let found = find(env, folders, image.file(), image.uuid())?;
    let mut ordered: Vec<&PathBuf> = folders.iter().collect();
    ordered.sort_by_key(|folder| found.as_ref().and_then(|path| path.parent()) != Some(folder.as_path()));
    Ok(ordered)
}

/// Where the journal of an image is: named by its file and its UUID, since copies of an image have the same UUID.
pub(super) fn path_of(folder: &Path, file: &File, uuid: Uuid) -> Result<PathBuf> {
    let id = file.stat()?.id;
    Ok(folder.join(format!("{}-{:x}-{:x}.live", uuid.simple(), id.dev, id.ino)))
}

pub(super) fn identity(env: &dyn Env, image: &Image) -> Result<[u64; 6]> {
    let (boot, id) = (env.boot_id()?.as_u64_pair(), image.file().stat()?.id);
    let uuid = image.uuid().as_u64_pair();
    Ok([boot.0, boot.1, id.dev, id.ino, uuid.0, uuid.1])
}

/// A sum over the block table that does not depend on the order of changes.
pub(super) fn table_sum(image: &Image) -> u64 {
    image.bat().map_or(0, |table| table.used().fold(0, |sum: u64, (block, place)| sum.wrapping_add(mix(block, place))))
}

/// An entry's share of the sum: splitmix64's finaliser, so that swapped or shifted entries do not cancel out.
pub(super) fn mix(block: u32, place: u32) -> u64 {
    let mut z = (u64::from(block) << 32 | u64::from(place)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
