//! The attributes of the files of a served chain, by file slot.

use super::readahead::ReadaheadPolicy;
use crate::chain::Version;
use crate::error::Result;
use crate::storage::{FILE_SLOTS, File, FileSlot};

/// Attributes of one file.
#[derive(Clone, Copy, Debug)]
pub(super) struct ServedFile {
    /// Alignment of memory that O_DIRECT requires, in bytes; 1 for a buffered file.
    pub(super) memory_align: usize,
    /// The policy by which lanes prefetch extents of the file.
    pub(super) readahead: ReadaheadPolicy,
}

impl ServedFile {
    /// Returns the attributes of a file. If `direct` is true, first switches the file to O_DIRECT, if its file system
    /// supports that.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn new(file: &File, direct: bool) -> Result<ServedFile> {
        let mut served = ServedFile { memory_align: 1, readahead: ReadaheadPolicy::Off };
        if direct {
            match file.set_direct()? {
                Some(rules) => served.memory_align = rules.memory,
                None => log::warn!(
                    "{}: direct I/O cannot be used here; the file is read and written through the page cache",
                    file.path().display()
                ),
            }
        }
        if served.is_buffered() {
            served.readahead = ReadaheadPolicy::of(file);
        }
        Ok(served)
    }

    /// Whether the file is read and written through the page cache.
    pub(super) fn is_buffered(&self) -> bool {
        self.memory_align == 1
    }
}

/// The attributes of all files of a chain.
#[derive(Clone)]
pub(super) struct FileTable(Vec<ServedFile>);

impl FileTable {
    /// Collects the attributes of the files of `version`. If `direct` is true, first switches each file to O_DIRECT
    /// whose file system supports it.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn new(version: &Version, direct: bool) -> Result<FileTable> {
        let unused = ServedFile { memory_align: 1, readahead: ReadaheadPolicy::Off };
        let mut files = vec![unused; usize::from(FILE_SLOTS)];
        for (slot, file) in version.files() {
            files[slot.as_usize()] = ServedFile::new(file, direct)?;
        }
        Ok(FileTable(files))
    }

    /// Returns the table with the attributes of slot `from` also in slot `to`.
    pub(super) fn with_copy(&self, from: FileSlot, to: FileSlot) -> FileTable {
        self.with(to, *self.get(from))
    }

    /// Returns the table with other attributes in a slot.
    pub(super) fn with(&self, slot: FileSlot, file: ServedFile) -> FileTable {
        let mut table = self.clone();
        table.0[slot.as_usize()] = file;
        table
    }

    /// Returns the attributes of the file in `slot`.
    #[inline]
    pub(super) fn get(&self, slot: FileSlot) -> &ServedFile {
        &self.0[slot.as_usize()]
    }
}
