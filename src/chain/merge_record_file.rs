//! Finds, reads, replaces and removes the file of a merge record.
//!
//! A record is replaced as a whole: a temporary file is written and synced, renamed, and the folder is synced.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::merge_record::MergeRecord;
use super::note_text::read_note;
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::image::folder_of;
use crate::storage::{Access, Env, Folder};

/// The result of a search for the record of an unfinished merge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExistingRecord {
    /// There is no record: no merge was begun.
    None,
    /// The record.
    Record(Box<MergeRecord>),
    /// The record at this path is damaged.
    Unreadable(PathBuf),
}

impl MergeRecord {
    /// Finds the record of an unfinished merge of the image at `child`. `present` is the UUID of the image that is at
    /// `child` now; `None` if there is no image.
    ///
    /// # Errors
    /// - `Refused` if the image at `child` is not the one that was there when the merge was begun, or if the name of a
    ///   record leads to no regular file
    /// - `Invalid` if no image is at `child`, and a record in the folder is damaged
    /// - `NotFound` if the folder of `child` does not exist
    /// - `Io`
    pub fn find(env: &dyn Env, child: &Path, present: Option<Uuid>) -> Result<ExistingRecord> {
        let folder = env.folder(folder_of(child))?.absolute()?;
        let Some(name) = child.file_name() else { return Ok(ExistingRecord::None) };
        for record_name in folder.list()? {
            let Some(uuid) = child_uuid_in_name(&record_name) else { continue };
            let path = folder.path().join(&record_name);
            let record = match (MergeRecord::load(&folder, &record_name), present) {
                (Ok(record), _) => record,
                (Err(e), Some(present)) if e.kind() == ErrorKind::Invalid && present == uuid => {
                    return Ok(ExistingRecord::Unreadable(path));
                }
                (Err(e), Some(_)) if e.kind() == ErrorKind::Invalid => {
                    log::warn!("{}", e.line());
                    continue;
                }
                (Err(e), _) => return Err(e),
            };
            let is_named = record.layers[0].path.as_os_str() == name;
            match present {
                Some(present) if present == uuid => return Ok(ExistingRecord::Record(Box::new(record))),
                None if is_named => return Ok(ExistingRecord::Record(Box::new(record))),
                Some(_) if is_named => {
                    let what = format!(
                        "another image of this name is being merged ({}): rename this image, and run the same command \
                         again to finish that merge",
                        path.display()
                    );
                    return Err(Error::new(ErrorKind::Refused, what).at_path(child));
                }
                _ => {}
            }
        }
        Ok(ExistingRecord::None)
    }

    /// Returns all valid records in a folder. Skips damaged records, names that lead to no regular file, and files that
    /// this process may not read. If the process may not list the folder, returns no records.
    ///
    /// # Errors
    /// `Io`.
    pub fn all_in(folder: &Folder) -> Result<Vec<MergeRecord>> {
        let mut records = Vec::new();
        for name in skip_inaccessible(folder.list())?.unwrap_or_default() {
            if child_uuid_in_name(&name).is_none() {
                continue;
            }
            match skip_inaccessible(MergeRecord::load(folder, &name)) {
                Err(e) if e.kind() == ErrorKind::Invalid => log::debug!("{}", e.line()),
                loaded => records.extend(loaded?),
            }
        }
        Ok(records)
    }

    /// Returns the UUID of CHILD from the file name of a record; `None` if `path` is not named like a record.
    pub fn child_uuid_of(path: &Path) -> Option<Uuid> {
        child_uuid_in_name(path.file_name()?)
    }

    fn load(folder: &Folder, name: &OsStr) -> Result<MergeRecord> {
        let file = folder.open(name, Access::Read)?;
        let read = read_note(&file)?.and_then(|text| MergeRecord::decode(&text, folder.path()));
        read.filter(|record| child_uuid_in_name(name) == Some(record.layers[0].uuid)).ok_or_else(|| {
            let what =
                "the record of a merge is damaged; `diffdisk merge CHILD --abandon` removes it if CHILD no longer exists";
            Error::new(ErrorKind::Invalid, what).at_path(file.path())
        })
    }

    /// The path of the record.
    pub fn path(&self) -> PathBuf {
        self.folder.join(self.name())
    }

    fn name(&self) -> OsString {
        format!(".{}.merge", self.layers[0].uuid).into()
    }

    fn temporary_name(&self) -> OsString {
        format!(".{}.merge.new", self.layers[0].uuid).into()
    }

    /// Replaces the record on disk durably. `home` is its folder.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: the old record, if there was one, or the new record is in place.
    pub fn save(&self, home: &Folder) -> Result<()> {
        let temporary = self.temporary_name();
        let saved = self.write(home, &temporary).and_then(|()| {
            failpoint::reached("merge.note-written");
            home.rename(&temporary, home, &self.name())
        });
        if saved.is_err() {
            let _ = home.remove(&temporary);
        }
        saved?;
        failpoint::reached("merge.note-named");
        home.sync()
    }

    fn write(&self, home: &Folder, temporary: &OsStr) -> Result<()> {
        // A killed process may have left its temporary file.
        if home.exists(temporary)? {
            home.remove(temporary)?;
        }
        let file = home.create(temporary)?;
        file.write_at(self.encode().as_bytes(), 0)?;
        file.sync()
    }

    /// Removes the record durably: the last step of a merge.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove(&self, home: &Folder) -> Result<()> {
        for name in [self.temporary_name(), self.name()] {
            if home.exists(&name)? {
                home.remove(&name)?;
            }
        }
        home.sync()
    }
}

/// The UUID of CHILD in the name of a record.
fn child_uuid_in_name(name: &OsStr) -> Option<Uuid> {
    name.to_str()?.strip_prefix('.')?.strip_suffix(".merge")?.parse().ok()
}

/// Converts errors of a missing or inaccessible file or folder to `None`.
fn skip_inaccessible<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::NotFound) || e.is_denied() => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[path = "merge_record_tests.rs"]
mod tests;
