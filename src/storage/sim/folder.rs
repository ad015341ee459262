//! Folders of the simulated host. No folder is ever renamed there, so a held folder is its path.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

use super::env::absolute;
use super::inode::Inode;
use super::machine::{StepKind, errno};
use super::names::NameChange;
use super::{SharedMachine, SimFile, SimHost};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::env::{Access, File};

/// A held folder. See [`Folder`](crate::storage::Folder) for its calls; each is a step, and may fail by plan.
#[derive(Clone, Debug)]
pub struct SimFolder {
    host: SimHost,
    path: PathBuf,
}

impl SimFolder {
    pub(super) fn new(shared: &SharedMachine, path: &Path) -> SimFolder {
        SimFolder { host: SimHost(shared.clone()), path: path.to_path_buf() }
    }

    pub(in crate::storage) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::storage) fn absolute(&self) -> SimFolder {
        SimFolder { host: self.host.clone(), path: absolute(&self.path) }
    }

    pub(in crate::storage) fn is_same(&self, other: &SimFolder) -> bool {
        self.host.0.is_same(&other.host.0) && absolute(&self.path) == absolute(&other.path)
    }

    pub(in crate::storage) fn open(&self, name: &Path, access: Access) -> Result<File> {
        self.host.handle(&self.path.join(name), access, |world, name| world.look_up(name))
    }

    pub(in crate::storage) fn open_beneath(&self, relative: &Path) -> Result<File> {
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
        self.open(relative, Access::Read)
    }

    pub(in crate::storage) fn subfolder(&self, name: &OsStr) -> Result<SimFolder> {
        let path = self.path.join(name);
        self.host.named(&path, "cannot open the folder", |world, name| {
            world.step(StepKind::Name)?;
            // A folder is there if a name lies in it.
            let inside = |(other, _): (&Path, _)| other != name && other.starts_with(name);
            if world.names.all().any(inside) { Ok(()) } else { Err(errno(libc::ENOENT)) }
        })?;
        Ok(SimFolder { host: self.host.clone(), path })
    }

    pub(in crate::storage) fn create(&self, name: &OsStr) -> Result<File> {
        self.host.handle(&self.path.join(name), Access::Write, |world, name| {
            if world.look_up(name).is_ok() {
                return Err(errno(libc::EEXIST));
            }
            let inode = world.next_number();
            world.inodes.insert(inode, Inode::new(world.clock));
            world.names.apply(NameChange::Set(name.to_path_buf(), inode));
            Ok(inode)
        })
    }

    pub(in crate::storage) fn create_unnamed(&self, known_as: &OsStr) -> Result<File> {
        let path = self.path.join(known_as);
        if self.host.0.lock().faults.no_unnamed {
            return Err(Error::new(ErrorKind::Unsupported, "no files without names here").at_path(path));
        }
        self.host.handle(&path, Access::Write, |world, _| {
            let inode = world.next_number();
            world.inodes.insert(inode, Inode::new(world.clock));
            Ok(inode)
        })
    }

    pub(in crate::storage) fn link_unnamed(&self, file: &SimFile, name: &OsStr) -> Result<()> {
        self.host.named(&self.path.join(name), "cannot give the file its name", |world, name| {
            world.step(StepKind::Name)?;
            let (inode, _) = file.inode_in(&self.host.0).ok_or_else(|| errno(libc::EBADF))?;
            if world.look_up(name).is_ok() {
                return Err(errno(libc::EEXIST));
            }
            world.names.apply(NameChange::Set(name.to_path_buf(), inode));
            Ok(())
        })
    }

    pub(in crate::storage) fn exists(&self, name: &OsStr) -> Result<bool> {
        let path = self.path.join(name);
        self.host.named(&path, "cannot stat", |world, name| {
            world.check_alive()?;
            Ok(world.names.get(name).is_some())
        })
    }

    pub(in crate::storage) fn list_at_most(&self, most: usize) -> Result<Option<Vec<OsString>>> {
        self.host.named(&self.path, "cannot list the folder", |world, name| {
            world.step(StepKind::Name)?;
            let inside = world.names.all().filter(|(path, _)| path.parent() == Some(name));
            let names: Vec<_> =
                inside.map(|(path, _)| path.file_name().expect("a file has a name").to_os_string()).collect();
            Ok((names.len() <= most).then_some(names))
        })
    }

    pub(in crate::storage) fn link(&self, existing: &OsStr, new: &OsStr) -> Result<()> {
        let to = absolute(&self.path.join(new));
        self.host.named(&self.path.join(existing), "cannot give it a second name", |world, name| {
            world.step(StepKind::Name)?;
            let inode = world.look_up(name)?;
            if world.look_up(&to).is_ok() {
                return Err(errno(libc::EEXIST));
            }
            world.names.apply(NameChange::Set(to, inode));
            Ok(())
        })
    }

    pub(in crate::storage) fn rename(&self, from: &OsStr, to: &SimFolder, new: &OsStr) -> Result<()> {
        let to = absolute(&to.path.join(new));
        self.host.named(&self.path.join(from), "cannot rename", |world, name| {
            world.step(StepKind::Name)?;
            let inode = world.look_up(name)?;
            // Two names of one file: rename(2) does nothing.
            if world.names.get(&to) != Some(inode) {
                world.names.apply(NameChange::Rename(name.to_path_buf(), to, inode));
            }
            Ok(())
        })
    }

    pub(in crate::storage) fn remove(&self, name: &OsStr) -> Result<()> {
        self.host.named(&self.path.join(name), "cannot remove the name", |world, name| {
            world.step(StepKind::Name)?;
            world.look_up(name)?;
            world.names.apply(NameChange::Remove(name.to_path_buf()));
            Ok(())
        })
    }

    pub(in crate::storage) fn sync(&self) -> Result<()> {
        self.host.named(&self.path, "cannot make the names in the folder durable", |world, name| {
            world.step(StepKind::SyncNames)?;
            world.names.sync(name);
            Ok(())
        })
    }
}
