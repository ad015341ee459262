//! A handle on a simulated file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::SharedMachine;
use super::env::absolute;
use super::folder::SimFolder;
use super::inode::SyncScope;
use super::machine::{SimMachine, StepKind, errno};
use super::names::InodeId;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::env::{Access, DirectRules, FileId, Lock, ModifiedTime, NameStatus, Stat};
use crate::storage::space::{AllocationMode, FileSystemSpace};

/// An open file of a [`SimHost`](super::SimHost). Clones share the handle, and with it the lock.
#[derive(Clone, Debug)]
pub struct SimFile(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: SharedMachine,
    number: u64,
    inode: InodeId,
    access: Access,
    path: PathBuf,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().locks.retain(|(handle, _, _)| *handle != self.number);
    }
}

impl SimFile {
    pub(super) fn new(shared: &SharedMachine, number: u64, inode: InodeId, access: Access, path: &Path) -> SimFile {
        SimFile(Arc::new(Handle { shared: shared.clone(), number, inode, access, path: path.to_path_buf() }))
    }

    /// The file, if the handle belongs to that machine.
    pub(super) fn inode_in(&self, shared: &SharedMachine) -> Option<(InodeId, Access)> {
        self.0.shared.is_same(shared).then_some((self.0.inode, self.0.access))
    }

    fn with<T>(&self, what: &str, call: impl FnOnce(&mut SimMachine, InodeId) -> io::Result<T>) -> Result<T> {
        call(&mut self.0.shared.lock(), self.0.inode).map_err(|e| Error::io(what, e).at_path(&self.0.path))
    }

    fn change<T>(&self, what: &str, call: impl FnOnce(&mut SimMachine, InodeId) -> io::Result<T>) -> Result<T> {
        self.with(what, |world, inode| match self.0.access {
            Access::Read => Err(errno(libc::EBADF)),
            Access::Write => call(world, inode),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The folder in which it was found.
    pub fn folder(&self) -> SimFolder {
        SimFolder::new(&self.0.shared, self.0.path.parent().unwrap_or(Path::new("/")))
    }

    /// See [`File::stat`](crate::storage::File::stat).
    pub fn stat(&self) -> Result<Stat> {
        self.with("cannot stat", |world, id| {
            world.check_alive()?;
            let inode = &world.inodes[&id];
            Ok(Stat {
                id: FileId { dev: 1, ino: id },
                len: inode.len(),
                allocated: inode.allocated(),
                modified: inode.metadata.modified().seconds,
                modified_nanos: inode.metadata.modified().nanos,
                mode: 0o644,
            })
        })
    }

    /// See [`File::naming`](crate::storage::File::name_status).
    pub fn name_status(&self) -> Result<NameStatus> {
        self.with("cannot look up its name", |world, id| {
            world.check_alive()?;
            Ok(match world.names.get(&absolute(&self.0.path)) {
                Some(found) if found == id => NameStatus::Kept,
                Some(_) => NameStatus::Replaced,
                None if world.names.all().any(|(_, inode)| inode == id) => NameStatus::Renamed,
                None => NameStatus::Removed,
            })
        })
    }

    /// See [`File::read_at`](crate::storage::File::read_at).
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        self.with("cannot read", |world, inode| world.read(inode, into, offset)).map_err(|e| e.at_offset(offset))
    }

    /// See [`File::write_at`](crate::storage::File::write_at).
    pub fn write_at(&self, from: &[u8], offset: u64) -> Result<()> {
        self.change("cannot write", |world, inode| world.write_now(inode, from, offset))
            .map_err(|e| e.at_offset(offset))
    }

    /// See [`File::sync`](crate::storage::File::sync).
    pub fn sync(&self) -> Result<()> {
        self.with("cannot make the data durable", |world, inode| {
            let last = world.last_number();
            world.sync(inode, last, SyncScope::All)
        })
    }

    /// See [`File::sync_all`](crate::storage::File::sync_all).
    pub fn sync_all(&self) -> Result<()> {
        self.sync()?;
        self.with("cannot make the file durable", |world, inode| {
            world.check_alive()?;
            world.inode(inode).metadata.sync();
            Ok(())
        })
    }

    /// See [`File::set_modified`](crate::storage::File::set_modified).
    pub fn set_modified(&self, time: ModifiedTime) -> Result<()> {
        self.with("cannot set the modification time", |world, inode| {
            world.step(StepKind::Range)?;
            world.inode(inode).metadata.set_modified(time);
            Ok(())
        })
    }

    /// See [`File::attribute`](crate::storage::File::attribute).
    pub fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.with("cannot read an attribute", |world, inode| {
            world.check_alive()?;
            Ok(world.inode(inode).metadata.attribute(name).map(<[u8]>::to_vec))
        })
    }

    /// See [`File::set_attribute`](crate::storage::File::set_attribute).
    pub fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        self.with("cannot change an attribute", |world, inode| {
            world.step(StepKind::Range)?;
            world.inode(inode).metadata.set_attribute(name, value);
            Ok(())
        })
    }

    /// See [`File::set_len`](crate::storage::File::set_len).
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.change("cannot set the length", |world, inode| world.set_len(inode, len))
    }

    /// See [`File::allocate`](crate::storage::File::allocate).
    pub fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.change("cannot reserve room", |world, inode| world.allocate(inode, offset, len))
    }

    /// See [`File::punch`](crate::storage::File::punch_hole).
    pub fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.change("cannot punch a hole", |world, inode| world.clear(inode, offset, len, false))
    }

    /// See [`File::room_rule`](crate::storage::File::allocation_mode).
    pub fn allocation_mode(&self) -> AllocationMode {
        match self.0.shared.lock().faults.copy_on_write {
            true => AllocationMode::CopyOnWrite,
            false => AllocationMode::InPlace,
        }
    }

    /// All files of a machine are alike: [`FaultPlan::copy_on_write`](super::FaultPlan) decides.
    pub fn disable_copy_on_write(&self) -> Result<()> {
        Ok(())
    }

    /// See [`File::host_room`](crate::storage::File::file_system_space).
    pub fn file_system_space(&self) -> Result<FileSystemSpace> {
        let world = self.0.shared.lock();
        let total = world.faults.capacity.unwrap_or(u64::MAX);
        Ok(FileSystemSpace { available: total.saturating_sub(world.allocated_bytes()), total })
    }

    /// See [`File::next_data`](crate::storage::File::next_data).
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.with("cannot look for data", |world, id| {
            world.check_alive()?;
            Ok(world.inodes[&id].next_data(offset))
        })
    }

    /// Nothing is read ahead here.
    pub fn advise_random_reads(&self) {}

    /// Nothing has to be waited for here.
    pub fn prefetch(&self, _: u64, _: u64) {}

    /// See [`File::host_readahead`](crate::storage::File::kernel_readahead).
    pub fn kernel_readahead(&self) -> u64 {
        0
    }

    /// A crash may find anything written here at any time as it is.
    pub fn start_writeback(&self, _: u64, _: u64) {}

    /// See [`File::lock`](crate::storage::File::lock).
    pub fn lock(&self, wanted: Lock) -> Result<()> {
        if wanted == Lock::Exclusive && self.0.access == Access::Read {
            let what = "an exclusive lock needs a file opened for writing";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(&self.0.path));
        }
        let mut world = self.0.shared.lock();
        world.check_alive().map_err(|e| Error::io("cannot lock the file", e).at_path(&self.0.path))?;
        world.lock(self.0.number, self.0.inode, wanted).map_err(|_| {
            Error::new(ErrorKind::Busy, "another simulated process has it open with diffdisk").at_path(&self.0.path)
        })
    }

    /// There is no page cache to go round: `None`.
    pub fn set_direct(&self) -> Result<Option<DirectRules>> {
        Ok(None)
    }
}
