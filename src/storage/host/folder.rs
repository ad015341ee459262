//! An open folder of the host.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::call::{OPEN_FLAGS, access_flags, open_error, retry};
use super::file::HostFile;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::backend::{File, Folder, FolderBackend};
use crate::storage::types::{Access, FileId};

/// Flags of an open folder. `O_PATH` needs no read permission, and is enough to look up and change names.
const FOLDER_FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Rules for resolving a path below an open folder.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// Open folder: its descriptor, and the path by which it was opened.
#[derive(Clone, Debug)]
pub(super) struct HostFolder {
    fd: Arc<OwnedFd>,
    path: Arc<Path>,
    id: FileId,
}

impl HostFolder {
    /// Opens the folder at an operator's path. Symbolic links are followed.
    pub(super) fn at(path: &Path) -> Result<HostFolder> {
        // The parent of a bare file name is the empty path.
        let named = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        retry(|| rustix::fs::openat(CWD, named, FOLDER_FLAGS, Mode::empty()))
            .and_then(|fd| HostFolder::new(fd, named))
            .map_err(|e| Error::io("cannot open the folder", e.into()).at_path(named))
    }

    fn new(fd: OwnedFd, path: &Path) -> rustix::io::Result<HostFolder> {
        let stat = rustix::fs::fstat(&fd)?;
        let id = FileId { dev: stat.st_dev, ino: stat.st_ino };
        Ok(HostFolder { fd: Arc::new(fd), path: path.into(), id })
    }

    /// Returns the path of a name in the folder. If the folder is `.`, this is the name alone.
    fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        if self.path.as_os_str() == "." { name.as_ref().to_path_buf() } else { self.path.join(name) }
    }

    fn handle(&self) -> Folder {
        Folder::new(self.clone())
    }

    /// Opens a file that an operator named. If the name is a symbolic link, it is followed.
    pub(super) fn open_named(&self, name: &OsStr, access: Access) -> rustix::io::Result<OwnedFd> {
        retry(|| rustix::fs::openat(&self.fd, name, access_flags(access) | OPEN_FLAGS, Mode::empty()))
    }

    /// Opens a disk that an operator named: a regular file or a block device. A device opened for writing is opened
    /// exclusively.
    pub(super) fn open_disk(&self, name: &OsStr, access: Access) -> rustix::io::Result<OwnedFd> {
        // Without O_CREAT, O_EXCL affects block devices only (open(2)).
        let exclusive = if access == Access::Write { OFlags::EXCL } else { OFlags::empty() };
        retry(|| rustix::fs::openat(&self.fd, name, access_flags(access) | exclusive | OPEN_FLAGS, Mode::empty()))
    }

    /// Opens the folder at a path below this one.
    fn beneath(&self, relative: &Path) -> Result<HostFolder> {
        let path = self.join(relative);
        self.look_up(relative, FOLDER_FLAGS)
            .and_then(|fd| HostFolder::new(fd, &path))
            .map_err(|e| self.beneath_error(e).at_path(&path))
    }

    fn look_up(&self, relative: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.fd, relative, flags, Mode::empty(), BENEATH) {
                // The kernel returns EAGAIN if a rename anywhere raced with the resolution of `..`.
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

    /// Opens a descriptor of the same folder that can be read and synced.
    fn readable(&self) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        retry(|| rustix::fs::openat(&self.fd, ".", flags, Mode::empty()))
    }
}

impl FolderBackend for HostFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn path_to(&self, name: &Path) -> PathBuf {
        self.join(name)
    }

    fn absolute(&self) -> Result<Folder> {
        // The link in /proc contains the path of the descriptor. Without /proc, the path is resolved again.
        let kernel = fs::read_link(format!("/proc/self/fd/{}", self.fd.as_raw_fd()));
        let path = match kernel {
            Ok(path) if path.is_absolute() => path,
            _ => {
                fs::canonicalize(&self.path).map_err(|e| Error::io("cannot resolve the path", e).at_path(&self.path))?
            }
        };
        Ok(Folder::new(HostFolder { path: path.into(), ..self.clone() }))
    }

    fn is_same(&self, other: &Folder) -> bool {
        other.as_backend::<HostFolder>().is_some_and(|other| self.id == other.id)
    }

    fn open(&self, name: &OsStr, access: Access) -> Result<File> {
        let path = self.join(name);
        let flags = access_flags(access) | OPEN_FLAGS | OFlags::NOFOLLOW;
        let fd = retry(|| rustix::fs::openat(&self.fd, name, flags, Mode::empty()))
            .map_err(|e| match e {
                Errno::LOOP => Error::new(ErrorKind::Refused, "a symbolic link").caused_by(std::io::Error::from(e)),
                e => open_error(e),
            })
            .map_err(|e| e.at_path(&path))?;
        HostFile::new(fd, &path, access, self.handle()).map(File::new)
    }

    fn open_beneath(&self, relative: &Path) -> Result<File> {
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
        HostFile::new(fd, &path, Access::Read, Folder::new(folder)).map(File::new)
    }

    fn subfolder(&self, name: &OsStr) -> Result<Folder> {
        self.beneath(Path::new(name)).map(Folder::new)
    }

    fn create(&self, name: &OsStr) -> Result<File> {
        let (path, flags) = (self.join(name), OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OPEN_FLAGS);
        let fd = retry(|| rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o644)))
            .map_err(|e| Error::io("cannot create the file", e.into()).at_path(&path))?;
        HostFile::new(fd, &path, Access::Write, self.handle()).map(File::new)
    }

    fn create_unnamed(&self, known_as: &OsStr) -> Result<File> {
        let path = self.join(known_as);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd =
            retry(|| rustix::fs::openat(&self.fd, ".", flags, Mode::from_raw_mode(0o644))).map_err(|e| match e {
                // Kernels before 3.11 return EISDIR.
                Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::ISDIR => {
                    let what = "this file system has no files without names";
                    Error::new(ErrorKind::Unsupported, what).caused_by(std::io::Error::from(e)).at_path(&path)
                }
                e => Error::io("cannot create the file", e.into()).at_path(&path),
            })?;
        // `link_unnamed` needs /proc. This is checked now, since the caller writes the whole file before it calls
        // `link_unnamed`.
        if fs::symlink_metadata(proc_path(&fd)).is_err() {
            let what = "files without names need /proc, which is not mounted";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(&path));
        }
        HostFile::new(fd, &path, Access::Write, self.handle()).map(File::new)
    }

    fn link_unnamed(&self, file: &File, name: &OsStr) -> Result<()> {
        let file: &HostFile = file.as_backend().expect("the file and the folder belong to the same host");
        rustix::fs::linkat(CWD, proc_path(file), &self.fd, name, AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| Error::io("cannot give the file its name", e.into()).at_path(self.join(name)))
    }

    fn exists(&self, name: &OsStr) -> Result<bool> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(Error::io("cannot stat", e.into()).at_path(self.join(name))),
        }
    }

    fn list_at_most(&self, most: usize) -> Result<Option<Vec<OsString>>> {
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

    fn link(&self, existing: &OsStr, new: &OsStr) -> Result<()> {
        rustix::fs::linkat(&self.fd, existing, &self.fd, new, AtFlags::empty()).map_err(|e| {
            let what = format!("cannot give the file the second name {}", self.join(new).display());
            Error::io(what, e.into()).at_path(self.join(existing))
        })
    }

    fn rename(&self, from: &OsStr, to: &Folder, new: &OsStr) -> Result<()> {
        let to: &HostFolder = to.as_backend().expect("both folders belong to the same host");
        rustix::fs::renameat_with(&self.fd, from, &to.fd, new, RenameFlags::empty()).map_err(|e| {
            Error::io(format!("cannot rename to {}", to.join(new).display()), e.into()).at_path(self.join(from))
        })
    }

    fn remove(&self, name: &OsStr) -> Result<()> {
        rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())
            .map_err(|e| Error::io("cannot remove the name", e.into()).at_path(self.join(name)))
    }

    fn sync(&self) -> Result<()> {
        self.readable()
            .and_then(|fd| retry(|| rustix::fs::fsync(&fd)))
            .map_err(|e| Error::io("cannot make the names in the folder durable", e.into()).at_path(&self.path))
    }
}

/// Returns a path that leads to an open file, even if the file has no name.
fn proc_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
