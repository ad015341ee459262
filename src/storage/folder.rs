//! An open folder: its names are looked up, made, changed and removed in the folder that was opened, wherever its path
//! leads later.
//!
//! A path is resolved anew by every call that takes one. Between two such calls another process may exchange a folder on
//! the way, and the second call acts on another folder. A held folder does not change.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use super::env::{Access, File};
use super::host::HostFolder;
#[cfg(feature = "sim")]
use super::sim::SimFolder;
use crate::error::{Error, ErrorKind, Result};

/// A held folder. Cloning it is cheap and shares the descriptor.
///
/// A name is one component of a path. No call follows a symbolic link. All errors name the path, which begins with
/// [`Folder::path`]. Names are as durable as the host makes them: a created, renamed, linked or removed name is sure to
/// survive a crash only after [`Folder::sync`].
#[derive(Clone, Debug)]
pub enum Folder {
    /// A folder of the host.
    Host(HostFolder),
    /// A folder of the simulated host.
    #[cfg(feature = "sim")]
    Sim(SimFolder),
}

macro_rules! each_kind {
    ($self:ident, $f:ident => $call:expr) => {
        match $self {
            Folder::Host($f) => $call,
            #[cfg(feature = "sim")]
            Folder::Sim($f) => $call,
        }
    };
}

impl Folder {
    /// Path by which it was opened.
    pub fn path(&self) -> &Path {
        each_kind!(self, f => f.path())
    }

    /// The path of a name in the folder, as an operator would write it.
    pub fn path_to(&self, name: &OsStr) -> PathBuf {
        match self {
            Folder::Host(f) => f.join(name),
            #[cfg(feature = "sim")]
            Folder::Sim(f) => f.path().join(name),
        }
    }

    /// The same folder under its absolute path without symbolic links, as it is now.
    ///
    /// # Errors
    /// `Io`, `NotFound`.
    pub fn absolute(&self) -> Result<Folder> {
        match self {
            Folder::Host(f) => f.absolute().map(Folder::Host),
            #[cfg(feature = "sim")]
            Folder::Sim(f) => Ok(Folder::Sim(f.absolute())),
        }
    }

    /// Whether the two are one folder.
    pub fn is_same(&self, other: &Folder) -> bool {
        match (self, other) {
            (Folder::Host(a), Folder::Host(b)) => a.is_same(b),
            #[cfg(feature = "sim")]
            (Folder::Sim(a), Folder::Sim(b)) => a.is_same(b),
            #[cfg(feature = "sim")]
            _ => false,
        }
    }

    /// Adds it to folders that are each there once.
    pub fn add_if_missing(self, folders: &mut Vec<Folder>) {
        if folders.iter().all(|known| !known.is_same(&self)) {
            folders.push(self);
        }
    }

    /// Opens the regular file of a name.
    ///
    /// # Errors
    /// - `NotFound`.
    /// - `Refused` for a symbolic link and for anything else that is not a regular file.
    /// - `Io`.
    pub fn open(&self, name: &OsStr, access: Access) -> Result<File> {
        self.one(name)?;
        match self {
            Folder::Host(f) => f.open(name, access).map(File::Host),
            #[cfg(feature = "sim")]
            Folder::Sim(f) => f.open(Path::new(name), access),
        }
    }

    /// Opens a regular file below the folder for reading. [`File::folder`] is then the folder in which it was found.
    ///
    /// # Errors
    /// - `NotFound`.
    /// - `Refused` if `relative` is absolute, leaves the folder, passes a symbolic link or names no regular file.
    /// - `Unsupported` if the kernel has no openat2.
    /// - `Io`.
    pub fn open_beneath(&self, relative: &Path) -> Result<File> {
        match self {
            Folder::Host(f) => f.open_beneath(relative).map(File::Host),
            #[cfg(feature = "sim")]
            Folder::Sim(f) => f.open_beneath(relative),
        }
    }

    /// Opens the folder of a name.
    ///
    /// # Errors
    /// As [`Folder::open_beneath`].
    pub fn subfolder(&self, name: &OsStr) -> Result<Folder> {
        self.one(name)?;
        match self {
            Folder::Host(f) => f.beneath(Path::new(name)).map(Folder::Host),
            #[cfg(feature = "sim")]
            Folder::Sim(f) => f.subfolder(name).map(Folder::Sim),
        }
    }

    /// Makes a new file for reading and writing.
    ///
    /// # Errors
    /// `Io` with `EEXIST` if the name exists; `NoSpace`.
    pub fn create(&self, name: &OsStr) -> Result<File> {
        self.one(name)?;
        match self {
            Folder::Host(f) => f.create(name).map(File::Host),
            #[cfg(feature = "sim")]
            Folder::Sim(f) => f.create(name),
        }
    }

    /// Makes a new file without a name, for reading and writing. It vanishes with its last handle unless
    /// [`Folder::link_unnamed`] gives it a name. [`File::path`] and errors call it `known_as`.
    ///
    /// # Errors
    /// - `Unsupported` if the file system has no files without names.
    /// - `NoSpace`, `Io`.
    pub fn create_unnamed(&self, known_as: &OsStr) -> Result<File> {
        self.one(known_as)?;
        match self {
            Folder::Host(f) => f.create_unnamed(known_as).map(File::Host),
            #[cfg(feature = "sim")]
            Folder::Sim(f) => f.create_unnamed(known_as),
        }
    }

    /// Gives a file of [`Folder::create_unnamed`] a name in this folder.
    ///
    /// # Errors
    /// `Io` with `EEXIST` if the name exists.
    pub fn link_unnamed(&self, file: &File, name: &OsStr) -> Result<()> {
        self.one(name)?;
        match (self, file) {
            (Folder::Host(f), File::Host(file)) => f.link_unnamed(file, name),
            #[cfg(feature = "sim")]
            (Folder::Sim(f), File::Sim(file)) => f.link_unnamed(file, name),
            #[cfg(feature = "sim")]
            _ => panic!("a file of another host"),
        }
    }

    /// Whether the name exists, also as a symbolic link.
    ///
    /// # Errors
    /// `Io`.
    pub fn exists(&self, name: &OsStr) -> Result<bool> {
        self.one(name)?;
        each_kind!(self, f => f.exists(name))
    }

    /// All names, in no order.
    ///
    /// # Errors
    /// `Io`.
    pub fn list(&self) -> Result<Vec<OsString>> {
        Ok(self.list_at_most(usize::MAX)?.expect("no folder has so many names"))
    }

    /// All names, in no order; `None` if there are more than `most`.
    ///
    /// # Errors
    /// `Io`.
    pub fn list_at_most(&self, most: usize) -> Result<Option<Vec<OsString>>> {
        each_kind!(self, f => f.list_at_most(most))
    }

    /// Gives a file a second name in the folder.
    ///
    /// # Errors
    /// `Io` with `EEXIST` if the new name exists.
    pub fn link(&self, existing: &OsStr, new: &OsStr) -> Result<()> {
        self.one(existing)?;
        self.one(new)?;
        each_kind!(self, f => f.link(existing, new))
    }

    /// Gives a file a new name in `to`, replacing a file that has the name.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    ///
    /// # Panics
    /// If the two folders are not of one host.
    pub fn rename(&self, from: &OsStr, to: &Folder, new: &OsStr) -> Result<()> {
        self.one(from)?;
        to.one(new)?;
        match (self, to) {
            (Folder::Host(f), Folder::Host(to)) => f.rename(from, to, new),
            #[cfg(feature = "sim")]
            (Folder::Sim(f), Folder::Sim(to)) => f.rename(from, to, new),
            #[cfg(feature = "sim")]
            _ => panic!("two folders of different hosts"),
        }
    }

    /// Removes a name.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn remove(&self, name: &OsStr) -> Result<()> {
        self.one(name)?;
        each_kind!(self, f => f.remove(name))
    }

    /// Makes the names durable.
    ///
    /// # Errors
    /// `Io`.
    pub fn sync(&self) -> Result<()> {
        each_kind!(self, f => f.sync())
    }

    /// Fails if `name` is not one component: it would be looked up in another folder.
    fn one(&self, name: &OsStr) -> Result<()> {
        let mut parts = Path::new(name).components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(only)), None) if only == name => Ok(()),
            _ => Err(Error::new(ErrorKind::Refused, "not a file name").at_path(self.path().join(name))),
        }
    }
}
