//! An open file of the simulated host.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::inode::SyncScope;
use super::machine::{SimMachine, StepKind, errno};
use super::names::{InodeId, absolute};
use super::shared::SharedMachine;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::backend::{File, FileBackend, Folder};
use crate::storage::types::{
    Access, AllocationMode, DirectRules, FileId, FileSystemSpace, Lock, ModifiedTime, NameStatus, Stat,
};

/// Open file of a [`SimHost`](super::SimHost).
#[derive(Debug)]
pub(super) struct SimFile {
    shared: SharedMachine,
    description: Arc<SimDescription>,
    inode: InodeId,
    access: Access,
    path: PathBuf,
    folder: Folder,
}

/// Open file description. Its lock ends when it is dropped.
#[derive(Debug)]
struct SimDescription {
    shared: SharedMachine,
    number: u64,
}

impl Drop for SimDescription {
    fn drop(&mut self) {
        self.shared.lock().locks.retain(|(handle, _, _)| *handle != self.number);
    }
}

impl SimFile {
    pub(super) fn new(
        shared: &SharedMachine,
        (number, inode): (u64, InodeId),
        access: Access,
        path: &Path,
        folder: Folder,
    ) -> SimFile {
        let description = Arc::new(SimDescription { shared: shared.clone(), number });
        SimFile { shared: shared.clone(), description, inode, access, path: path.to_path_buf(), folder }
    }

    /// Returns the implementation of `file` with its inode and access mode.
    ///
    /// # Errors
    /// If the file belongs to another host.
    pub(super) fn of(file: &File, shared: &SharedMachine) -> io::Result<(Arc<SimFile>, InodeId, Access)> {
        let file: Arc<SimFile> = file.share_backend().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "a file of another host in a simulated engine")
        })?;
        let (inode, access) = file.inode_in(shared).ok_or_else(|| errno(libc::EBADF))?;
        Ok((file, inode, access))
    }

    /// Returns the file's number and access mode, if the file belongs to that machine.
    pub(super) fn inode_in(&self, shared: &SharedMachine) -> Option<(InodeId, Access)> {
        self.shared.is_same(shared).then_some((self.inode, self.access))
    }

    fn with<T>(&self, what: &str, call: impl FnOnce(&mut SimMachine, InodeId) -> io::Result<T>) -> Result<T> {
        call(&mut self.shared.lock(), self.inode).map_err(|e| Error::io(what, e).at_path(&self.path))
    }

    fn change<T>(&self, what: &str, call: impl FnOnce(&mut SimMachine, InodeId) -> io::Result<T>) -> Result<T> {
        self.with(what, |machine, inode| match self.access {
            Access::Read => Err(errno(libc::EBADF)),
            Access::Write => call(machine, inode),
        })
    }
}

impl FileBackend for SimFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn folder(&self) -> &Folder {
        &self.folder
    }

    fn renamed(&self, path: &Path) -> Result<File> {
        Ok(File::new(SimFile {
            shared: self.shared.clone(),
            description: self.description.clone(),
            inode: self.inode,
            access: self.access,
            path: path.to_path_buf(),
            folder: self.folder.clone(),
        }))
    }

    fn is_block_device(&self) -> bool {
        false
    }

    fn stat(&self) -> Result<Stat> {
        self.with("cannot stat", |machine, id| {
            machine.check_alive()?;
            let inode = &machine.inodes[&id];
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

    fn name_status(&self) -> Result<NameStatus> {
        self.with("cannot look up the file's name", |machine, id| {
            machine.check_alive()?;
            Ok(match machine.names.get(&absolute(&self.path)) {
                Some(found) if found == id => NameStatus::Kept,
                Some(_) => NameStatus::Replaced,
                None if machine.names.all().any(|(_, inode)| inode == id) => NameStatus::Renamed,
                None => NameStatus::Removed,
            })
        })
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        self.with("cannot read", |machine, inode| machine.read(inode, into, offset)).map_err(|e| e.at_offset(offset))
    }

    fn write_at(&self, from: &[u8], offset: u64) -> Result<()> {
        self.change("cannot write", |machine, inode| machine.write_now(inode, from, offset))
            .map_err(|e| e.at_offset(offset))
    }

    fn sync(&self) -> Result<()> {
        self.with("cannot make the data durable", |machine, inode| {
            let last = machine.last_number();
            machine.sync(inode, last, SyncScope::All)
        })
    }

    fn sync_all(&self) -> Result<()> {
        self.sync()?;
        self.with("cannot make the file durable", |machine, inode| {
            machine.check_alive()?;
            machine.inode(inode).metadata.sync();
            Ok(())
        })
    }

    fn set_modified(&self, time: ModifiedTime) -> Result<()> {
        self.with("cannot set the modification time", |machine, inode| {
            machine.step(StepKind::Range)?;
            machine.inode(inode).metadata.set_modified(time);
            Ok(())
        })
    }

    fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.with("cannot read an attribute", |machine, inode| {
            machine.check_alive()?;
            Ok(machine.inode(inode).metadata.attribute(name).map(<[u8]>::to_vec))
        })
    }

    fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        self.with("cannot change an attribute", |machine, inode| {
            machine.step(StepKind::Range)?;
            machine.inode(inode).metadata.set_attribute(name, value);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change("cannot set the length", |machine, inode| machine.set_len(inode, len))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.change("cannot allocate space", |machine, inode| machine.allocate(inode, offset, len))
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.change("cannot punch a hole", |machine, inode| machine.clear(inode, offset, len, false))
    }

    fn allocation_mode(&self) -> AllocationMode {
        match self.shared.lock().faults.copy_on_write {
            true => AllocationMode::CopyOnWrite,
            false => AllocationMode::InPlace,
        }
    }

    fn is_on_shared_file_system(&self) -> bool {
        self.shared.lock().faults.shared_file_system
    }

    /// Does nothing: [`FaultPlan::copy_on_write`](super::FaultPlan) applies to all files of a machine.
    fn disable_copy_on_write(&self) -> Result<()> {
        Ok(())
    }

    fn file_system_space(&self) -> Result<FileSystemSpace> {
        let machine = self.shared.lock();
        let total = machine.faults.capacity.unwrap_or(u64::MAX);
        Ok(FileSystemSpace { available: total.saturating_sub(machine.allocated_bytes()), total })
    }

    fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.with("cannot look for data", |machine, id| {
            machine.check_alive()?;
            Ok(machine.inodes[&id].next_data(offset))
        })
    }

    fn advise_random_reads(&self) {}

    fn prefetch(&self, _: u64, _: u64) {}

    fn kernel_readahead(&self) -> u64 {
        0
    }

    /// Does nothing: any written byte may become durable at any time.
    fn start_writeback(&self, _: u64, _: u64) {}

    fn lock(&self, wanted: Lock) -> Result<()> {
        if wanted == Lock::Exclusive && self.access == Access::Read {
            let what = "an exclusive lock needs a file opened for writing";
            return Err(Error::new(ErrorKind::Unsupported, what).at_path(&self.path));
        }
        let mut machine = self.shared.lock();
        machine.check_alive().map_err(|e| Error::io("cannot lock the file", e).at_path(&self.path))?;
        machine.lock(self.description.number, self.inode, wanted).map_err(|_| {
            Error::new(ErrorKind::Busy, "another simulated process has it open with diffdisk").at_path(&self.path)
        })
    }

    /// Returns `None`: there is no page cache to bypass.
    fn set_direct(&self) -> Result<Option<DirectRules>> {
        Ok(None)
    }
}
