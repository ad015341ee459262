//! An open folder of the simulated host. Folders are never renamed, so an open folder is represented by its path. Most
//! calls are steps, which the fault plan can make fail.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Component, Path, PathBuf};

use super::file::SimFile;
use super::inode::Inode;
use super::machine::{SimMachine, StepKind, errno};
use super::names::{InodeId, NameChange, absolute};
use super::shared::SharedMachine;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::backend::{File, Folder, FolderBackend};
use crate::storage::types::Access;

/// Open folder of a [`SimHost`](super::SimHost).
#[derive(Clone, Debug)]
pub(super) struct SimFolder {
    shared: SharedMachine,
    path: PathBuf,
}

impl SimFolder {
    pub(super) fn new(shared: &SharedMachine, path: &Path) -> SimFolder {
        SimFolder { shared: shared.clone(), path: path.to_path_buf() }
    }
}

/// Opens the file that `find` returns for `path`.
pub(super) fn open_file(
    shared: &SharedMachine,
    path: &Path,
    access: Access,
    find: impl FnOnce(&mut SimMachine, &Path) -> io::Result<InodeId>,
) -> Result<File> {
    let numbers = shared.with_path(path, "cannot open the file", |machine, name| {
        machine.step(StepKind::Name)?;
        let inode = find(machine, name)?;
        Ok((machine.next_number(), inode))
    })?;
    let folder = Folder::new(SimFolder::new(shared, path.parent().unwrap_or(Path::new("/"))));
    Ok(File::new(SimFile::new(shared, numbers, access, path, folder)))
}

impl FolderBackend for SimFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn path_to(&self, name: &Path) -> PathBuf {
        self.path.join(name)
    }

    fn absolute(&self) -> Result<Folder> {
        Ok(Folder::new(SimFolder::new(&self.shared, &absolute(&self.path))))
    }

    fn is_same(&self, other: &Folder) -> bool {
        let is_same =
            |other: &SimFolder| self.shared.is_same(&other.shared) && absolute(&self.path) == absolute(&other.path);
        other.as_backend().is_some_and(is_same)
    }

    fn open(&self, name: &OsStr, access: Access) -> Result<File> {
        open_file(&self.shared, &self.path.join(name), access, |machine, name| machine.look_up(name))
    }

    fn open_beneath(&self, relative: &Path) -> Result<File> {
        let mut depth = 0;
        for part in relative.components() {
            depth += match part {
                Component::Normal(_) => 1,
                Component::ParentDir => -1,
                Component::CurDir => 0,
                Component::RootDir | Component::Prefix(_) => i32::MIN,
            };
            if depth < 0 {
                let what = format!("the path leaves the folder {}", self.path.display());
                return Err(Error::new(ErrorKind::Refused, what).at_path(self.path.join(relative)));
            }
        }
        self.open(relative.as_os_str(), Access::Read)
    }

    fn subfolder(&self, name: &OsStr) -> Result<Folder> {
        let path = self.path.join(name);
        self.shared.with_path(&path, "cannot open the folder", |machine, name| {
            machine.step(StepKind::Name)?;
            // A folder exists if it contains a name.
            let inside = |(other, _): (&Path, _)| other != name && other.starts_with(name);
            if machine.names.all().any(inside) { Ok(()) } else { Err(errno(libc::ENOENT)) }
        })?;
        Ok(Folder::new(SimFolder { shared: self.shared.clone(), path }))
    }

    fn create(&self, name: &OsStr) -> Result<File> {
        open_file(&self.shared, &self.path.join(name), Access::Write, |machine, name| {
            if machine.look_up(name).is_ok() {
                return Err(errno(libc::EEXIST));
            }
            let inode = machine.next_number();
            machine.inodes.insert(inode, Inode::new(machine.clock));
            machine.names.apply(NameChange::Set(name.to_path_buf(), inode));
            Ok(inode)
        })
    }

    fn create_unnamed(&self, known_as: &OsStr) -> Result<File> {
        let path = self.path.join(known_as);
        if self.shared.lock().faults.no_unnamed {
            let what = "this file system has no files without names";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(path));
        }
        open_file(&self.shared, &path, Access::Write, |machine, _| {
            let inode = machine.next_number();
            machine.inodes.insert(inode, Inode::new(machine.clock));
            Ok(inode)
        })
    }

    fn link_unnamed(&self, file: &File, name: &OsStr) -> Result<()> {
        let file: &SimFile = file.as_backend().expect("the file and the folder belong to the same host");
        self.shared.with_path(&self.path.join(name), "cannot give the file its name", |machine, name| {
            machine.step(StepKind::Name)?;
            let (inode, _) = file.inode_in(&self.shared).ok_or_else(|| errno(libc::EBADF))?;
            if machine.look_up(name).is_ok() {
                return Err(errno(libc::EEXIST));
            }
            machine.names.apply(NameChange::Set(name.to_path_buf(), inode));
            Ok(())
        })
    }

    fn exists(&self, name: &OsStr) -> Result<bool> {
        self.shared.with_path(&self.path.join(name), "cannot stat", |machine, name| {
            machine.check_alive()?;
            Ok(machine.names.get(name).is_some())
        })
    }

    fn list_at_most(&self, most: usize) -> Result<Option<Vec<OsString>>> {
        self.shared.with_path(&self.path, "cannot list the folder", |machine, name| {
            machine.step(StepKind::Name)?;
            let inside = machine.names.all().filter(|(path, _)| path.parent() == Some(name));
            let names: Vec<_> =
                inside.map(|(path, _)| path.file_name().expect("a file has a name").to_os_string()).collect();
            Ok((names.len() <= most).then_some(names))
        })
    }

    fn link(&self, existing: &OsStr, new: &OsStr) -> Result<()> {
        let to = absolute(&self.path.join(new));
        self.shared.with_path(&self.path.join(existing), "cannot give the file a second name", |machine, name| {
            machine.step(StepKind::Name)?;
            let inode = machine.look_up(name)?;
            if machine.look_up(&to).is_ok() {
                return Err(errno(libc::EEXIST));
            }
            machine.names.apply(NameChange::Set(to, inode));
            Ok(())
        })
    }

    fn rename(&self, from: &OsStr, to: &Folder, new: &OsStr) -> Result<()> {
        let to: &SimFolder = to.as_backend().expect("both folders belong to the same host");
        let to = absolute(&to.path.join(new));
        self.shared.with_path(&self.path.join(from), "cannot rename", |machine, name| {
            machine.step(StepKind::Name)?;
            let inode = machine.look_up(name)?;
            // If both are names of the same file, rename(2) does nothing.
            if machine.names.get(&to) != Some(inode) {
                machine.names.apply(NameChange::Rename(name.to_path_buf(), to, inode));
            }
            Ok(())
        })
    }

    fn remove(&self, name: &OsStr) -> Result<()> {
        self.shared.with_path(&self.path.join(name), "cannot remove the name", |machine, name| {
            machine.step(StepKind::Name)?;
            machine.look_up(name)?;
            machine.names.apply(NameChange::Remove(name.to_path_buf()));
            Ok(())
        })
    }

    fn sync(&self) -> Result<()> {
        self.shared.with_path(&self.path, "cannot make the names in the folder durable", |machine, name| {
            machine.step(StepKind::SyncNames)?;
            machine.names.sync(name);
            Ok(())
        })
    }
}
