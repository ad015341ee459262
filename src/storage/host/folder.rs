//! Folders of the host, held by a descriptor that needs no permission to read them.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::file::HostFile;
use super::{OPEN_FLAGS, access_flags, open_error, retry};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::env::{Access, FileId};

/// How a folder is held: names in it can be looked up and changed.
const HELD: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// How what lies below a held folder is looked up.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// A held folder. See [`Folder`](crate::storage::Folder) for its calls.
#[derive(Clone, Debug)]
pub struct HostFolder {
    fd: Arc<OwnedFd>,
    path: Arc<Path>,
    id: FileId,
}

impl HostFolder {
    /// Opens the folder at a path of the operator's; symbolic links are followed.
    pub(super) fn at(path: &Path) -> Result<HostFolder> {
        // The folder of a bare file name is the empty path.
        let named = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        retry(|| rustix::fs::openat(CWD, named, HELD, Mode::empty()))
            .and_then(|fd| HostFolder::new(fd, named))
            .map_err(|e| Error::io("cannot open the folder", e.into()).at_path(named))
    }

    fn new(fd: OwnedFd, path: &Path) -> rustix::io::Result<HostFolder> {
        let stat = rustix::fs::fstat(&fd)?;
        let id = FileId { dev: stat.st_dev, ino: stat.st_ino };
        Ok(HostFolder { fd: Arc::new(fd), path: path.into(), id })
    }

    pub(in crate::storage) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::storage) fn is_same(&self, other: &HostFolder) -> bool {
        self.id == other.id
    }

    pub(in crate::storage) fn absolute(&self) -> Result<HostFolder> {
        // The kernel knows the path of the very descriptor; without /proc the path is resolved once more.
        let kernel = fs::read_link(format!("/proc/self/fd/{}", self.fd.as_raw_fd()));
        let path = match kernel {
            Ok(path) if path.is_absolute() => path,
            _ => {
                fs::canonicalize(&self.path).map_err(|e| Error::io("cannot resolve the path", e).at_path(&self.path))?
            }
        };
        Ok(HostFolder { path: path.into(), ..self.clone() })
    }

    /// The path of a name in the folder.
    pub(in crate::storage) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        // What the operator gave as `f` is not called `./f`.
        if self.path.as_os_str() == "." { name.as_ref().to_path_buf() } else { self.path.join(name) }
    }

    /// Opens what an operator has named: a symbolic link of that name is followed.
    pub(super) fn open_named(&self, name: &OsStr, access: Access) -> rustix::io::Result<OwnedFd> {
        retry(|| rustix::fs::openat(&self.fd, name, access_flags(access) | OPEN_FLAGS, Mode::empty()))
    }

    pub(in crate::storage) fn open(&self, name: &OsStr, access: Access) -> Result<HostFile> {
        let path = self.join(name);
        let fd = retry(|| {
            rustix::fs::openat(&self.fd, name, access_flags(access) | OPEN_FLAGS | OFlags::NOFOLLOW, Mode::empty())
        })
        .map_err(|e| match e {
            Errno::LOOP => Error::new(ErrorKind::Refused, "a symbolic link").caused_by(std::io::Error::from(e)),
            e => open_error(e),
        })
        .map_err(|e| e.at_path(&path))?;
        HostFile::new(fd, &path, access, self)
    }

    pub(in crate::storage) fn open_beneath(&self, relative: &Path) -> Result<HostFile> {
        let path = self.join(relative);
        let (Some(above), Some(name)) = (relative.parent(), relative.file_name()) else {
            let e = if relative.as_os_str().is_empty() { Errno::NOENT } else { Errno::ISDIR };
            return Err(self.beneath_error(e).at_path(path));
        };
        if above.as_os_str().is_empty() {
            return self.open(name, Access::Read); // one component needs no openat2
        }
        let folder = self.beneath(above)?;
        let fd = folder
            .look_up(Path::new(name), OFlags::RDONLY | OPEN_FLAGS)
            .map_err(|e| self.beneath_error(e).at_path(&path))?;
        HostFile::new(fd, &path, Access::Read, &folder)
    }

    /// The folder at a path below this one.
    pub(in crate::storage) fn beneath(&self, relative: &Path) -> Result<HostFolder> {
        let path = self.join(relative);
        self.look_up(relative, HELD)
            .and_then(|fd| HostFolder::new(fd, &path))
            .map_err(|e| self.beneath_error(e).at_path(&path))
    }

    fn look_up(&self, relative: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.fd, relative, flags, Mode::empty(), BENEATH) {
                // A rename elsewhere, seen while `..` was resolved: the kernel asks to try again.
                Err(Errno::AGAIN | Errno::INTR) if tries < 100 => tries += 1,
                other => return other,
            }
        }
    }

    fn beneath_error(&self, e: Errno) -> Error {
        let folder = self.path.display();
        let why = match e {
            Errno::XDEV => format!("the path leaves the folder {folder}"),
            Errno::LOOP => format!("the path passes a symbolic link below the folder {folder}"),
            Errno::NOSYS => {
                let what = "this kernel has no openat2 (Linux 5.6), which keeps parents inside the allowed folders";
                return Error::new(ErrorKind::Unsupported, what);
            }
            e => return open_error(e),
        };
        Error::new(ErrorKind::Refused, why).caused_by(std::io::Error::from(e))
    }

    pub(in crate::storage) fn create(&self, name: &OsStr) -> Result<HostFile> {
        let (path, flags) = (self.join(name), OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OPEN_FLAGS);
        let fd = retry(|| rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o644)))
            .map_err(|e| Error::io("cannot create the file", e.into()).at_path(&path))?;
        HostFile::new(fd, &path, Access::Write, self)
    }

    /// Opens a disk that an operator has named: a regular file, or a device, which is then held exclusively for writing.
    pub(super) fn open_disk(&self, name: &OsStr, access: Access) -> rustix::io::Result<OwnedFd> {
        // Without O_CREAT, O_EXCL concerns block devices only (open(2)).
        let exclusive = if access == Access::Write { OFlags::EXCL } else { OFlags::empty() };
        retry(|| rustix::fs::openat(&self.fd, name, access_flags(access) | exclusive | OPEN_FLAGS, Mode::empty()))
    }

    pub(in crate::storage) fn create_unnamed(&self, known_as: &OsStr) -> Result<HostFile> {
        let path = self.join(known_as);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd =
            retry(|| rustix::fs::openat(&self.fd, ".", flags, Mode::from_raw_mode(0o644))).map_err(|e| match e {
                // The last one is the answer of kernels before 3.11.
                Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::ISDIR => {
                    let what = "this file system has no files without names";
                    Error::new(ErrorKind::Unsupported, what).caused_by(std::io::Error::from(e)).at_path(&path)
                }
                e => Error::io("cannot create the file", e.into()).at_path(&path),
            })?;
        // The name is given through /proc: better known now than when the file is whole.
        if fs::symlink_metadata(name_in_proc(&fd)).is_err() {
            let what = "files without names need /proc, which is not mounted";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(&path));
        }
        HostFile::new(fd, &path, Access::Write, self)
    }

    pub(in crate::storage) fn link_unnamed(&self, file: &HostFile, name: &OsStr) -> Result<()> {
        rustix::fs::linkat(CWD, name_in_proc(file), &self.fd, name, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| Error::io("cannot give the file its name", e.into()).at_path(self.join(name)))
    }

    pub(in crate::storage) fn exists(&self, name: &OsStr) -> Result<bool> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(Error::io("cannot stat", e.into()).at_path(self.join(name))),
        }
    }

    pub(in crate::storage) fn list_at_most(&self, most: usize) -> Result<Option<Vec<OsString>>> {
        let fail = |e: Errno| Error::io("cannot list the folder", e.into()).at_path(&self.path);
        let mut names = Vec::new();
        for entry in Dir::new(self.readable().map_err(fail)?).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            if names.len() >= most {
                return Ok(None);
            }
            names.push(name.to_os_string());
        }
        Ok(Some(names))
    }

    /// A descriptor of the same folder that can be read and synced.
    fn readable(&self) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        retry(|| rustix::fs::openat(&self.fd, ".", flags, Mode::empty()))
    }

    pub(in crate::storage) fn link(&self, existing: &OsStr, new: &OsStr) -> Result<()> {
        rustix::fs::linkat(&self.fd, existing, &self.fd, new, AtFlags::empty()).map_err(|e| {
            let what = format!("cannot give it the second name {}", self.join(new).display());
            Error::io(what, e.into()).at_path(self.join(existing))
        })
    }

    pub(in crate::storage) fn rename(&self, from: &OsStr, to: &HostFolder, new: &OsStr) -> Result<()> {
        rustix::fs::renameat_with(&self.fd, from, &to.fd, new, RenameFlags::empty()).map_err(|e| {
            Error::io(format!("cannot rename to {}", to.join(new).display()), e.into()).at_path(self.join(from))
        })
    }

    pub(in crate::storage) fn remove(&self, name: &OsStr) -> Result<()> {
        rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())
            .map_err(|e| Error::io("cannot remove the name", e.into()).at_path(self.join(name)))
    }

    pub(in crate::storage) fn sync(&self) -> Result<()> {
        self.readable()
            .and_then(|fd| retry(|| rustix::fs::fsync(&fd)))
            .map_err(|e| Error::io("cannot make the names in the folder durable", e.into()).at_path(&self.path))
    }
}

/// A path that leads to an open file, whether it has a name or not.
fn name_in_proc(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
