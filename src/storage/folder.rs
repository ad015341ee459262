//! Methods of an open folder.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use super::backend::{File, Folder};
use super::types::Access;
use crate::error::{Error, ErrorKind, Result};

impl Folder {
    /// Returns the path by which the folder was opened.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns [`Folder::path`] joined with a name. If the folder is `.`, this is the name alone.
    pub fn path_to(&self, name: &OsStr) -> PathBuf {
        self.0.path_to(Path::new(name))
    }

    /// Returns the same folder with its current absolute path, which contains no symbolic links.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Io`
    pub fn absolute(&self) -> Result<Folder> {
        self.0.absolute()
    }

    /// Returns whether both handles refer to the same folder.
    pub fn is_same(&self, other: &Folder) -> bool {
        self.0.is_same(other)
    }

    /// Appends the folder to `folders`, unless it is already there.
    pub fn add_if_missing(self, folders: &mut Vec<Folder>) {
        if folders.iter().all(|known| !known.is_same(&self)) {
            folders.push(self);
        }
    }

    /// Opens the regular file `name`.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Refused` for a symbolic link, or anything else that is not a regular file
    /// - `Io`
    pub fn open(&self, name: &OsStr, access: Access) -> Result<File> {
        self.check_name(name)?;
        self.0.open(name, access)
    }

    /// Opens a regular file below the folder for reading. [`File::folder`] then returns the folder that contains it.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Refused` if `relative` is absolute, leaves the folder, passes a symbolic link, or is not a regular file
    /// - `Unsupported` if the kernel has no openat2
    /// - `Io`
    pub fn open_beneath(&self, relative: &Path) -> Result<File> {
        self.0.open_beneath(relative)
    }

    /// Opens the folder `name`.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Refused` for a symbolic link
    /// - `Unsupported` if the kernel has no openat2
    /// - `Io`, also if `name` is not a folder
    pub fn subfolder(&self, name: &OsStr) -> Result<Folder> {
        self.check_name(name)?;
        self.0.subfolder(name)
    }

    /// Creates a file and opens it for reading and writing.
    ///
    /// # Errors
    /// - `Io`, with `EEXIST` if the name exists
    /// - `NoSpace`
    pub fn create(&self, name: &OsStr) -> Result<File> {
        self.check_name(name)?;
        self.0.create(name)
    }

    /// Creates a file without a name and opens it for reading and writing. The file is deleted with its last handle,
    /// unless [`Folder::link_unnamed`] gives it a name. [`File::path`] and errors contain the name `known_as`.
    ///
    /// # Errors
    /// - `Unsupported` if the file system has no files without names
    /// - `NoSpace`
    /// - `Io`
    pub fn create_unnamed(&self, known_as: &OsStr) -> Result<File> {
        self.check_name(known_as)?;
        self.0.create_unnamed(known_as)
    }

    /// Gives a file from [`Folder::create_unnamed`] a name in this folder.
    ///
    /// # Errors
    /// - `Io`, with `EEXIST` if the name exists
    /// - `NoSpace`
    ///
    /// # Panics
    /// If the file and the folder belong to different hosts.
    pub fn link_unnamed(&self, file: &File, name: &OsStr) -> Result<()> {
        self.check_name(name)?;
        self.0.link_unnamed(file, name)
    }

    /// Returns whether the name exists. Symbolic links are not followed.
    ///
    /// # Errors
    /// `Io`.
    pub fn exists(&self, name: &OsStr) -> Result<bool> {
        self.check_name(name)?;
        self.0.exists(name)
    }

    /// Returns all names, in no particular order.
    ///
    /// # Errors
    /// `Io`.
    pub fn list(&self) -> Result<Vec<OsString>> {
        Ok(self.list_at_most(usize::MAX)?.expect("no folder has so many names"))
    }

    /// Returns all names, in no particular order, or `None` if there are more than `most`.
    ///
    /// # Errors
    /// `Io`.
    pub fn list_at_most(&self, most: usize) -> Result<Option<Vec<OsString>>> {
        self.0.list_at_most(most)
    }

    /// Gives a file a second name in the folder.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Io`, with `EEXIST` if the new name exists
    /// - `NoSpace`
    pub fn link(&self, existing: &OsStr, new: &OsStr) -> Result<()> {
        self.check_name(existing)?;
        self.check_name(new)?;
        self.0.link(existing, new)
    }

    /// Renames a file to `new` in the folder `to`, replacing a file of that name.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `NoSpace`
    /// - `Io`
    ///
    /// # Panics
    /// If the two folders belong to different hosts.
    pub fn rename(&self, from: &OsStr, to: &Folder, new: &OsStr) -> Result<()> {
        self.check_name(from)?;
        to.check_name(new)?;
        self.0.rename(from, to, new)
    }

    /// Removes a name.
    ///
    /// # Errors
    /// - `NotFound`
    /// - `Io`
    pub fn remove(&self, name: &OsStr) -> Result<()> {
        self.check_name(name)?;
        self.0.remove(name)
    }

    /// Makes the names in the folder durable.
    ///
    /// # Errors
    /// `Io`.
    pub fn sync(&self) -> Result<()> {
        self.0.sync()
    }

    /// Fails unless `name` is a single path component: any other path would be looked up in another folder.
    fn check_name(&self, name: &OsStr) -> Result<()> {
        let mut parts = Path::new(name).components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(only)), None) if only == name => Ok(()),
            _ => Err(Error::new(ErrorKind::Refused, "not a file name").at_path(self.path().join(name))),
        }
    }
}
