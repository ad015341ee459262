//! Methods of an open file.

use std::ffi::OsStr;
use std::path::Path;

use super::backend::{File, Folder};
use super::types::{AllocationMode, DirectRules, FileSystemSpace, Lock, ModifiedTime, NameStatus, Stat};
use crate::error::{Error, Result};

impl File {
    /// Returns the path by which the file was opened, or the path that [`File::renamed`] has given to this handle.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns the folder in which the file was found or created. The folder stays open as long as the file.
    pub fn folder(&self) -> Folder {
        self.0.folder().clone()
    }

    /// Returns another handle on the open file, with another path in the same folder: the name that the file is about
    /// to get, or has got. The name on the file system does not change. Both handles share the open file description
    /// and its lock.
    ///
    /// # Errors
    /// `Io` if the process has no file descriptors left.
    pub fn renamed(&self, path: &Path) -> Result<File> {
        self.0.renamed(path)
    }

    /// Returns the file's name in its folder.
    pub fn name(&self) -> &OsStr {
        self.path().file_name().expect("a file is opened by a name")
    }

    /// Returns whether the file is a block device.
    pub fn is_block_device(&self) -> bool {
        self.0.is_block_device()
    }

    /// Returns the current metadata. The length of a block device is its capacity.
    ///
    /// # Errors
    /// `Io`.
    pub fn stat(&self) -> Result<Stat> {
        self.0.stat()
    }

    /// Returns whether the path of this handle still refers to the file.
    ///
    /// # Errors
    /// `Io`.
    pub fn name_status(&self) -> Result<NameStatus> {
        self.0.name_status()
    }

    /// Fills `into` from byte `offset`.
    ///
    /// # Errors
    /// `Io`, also if the file ends before `into` is full.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(into, offset)
    }

    /// Writes all of `from` at byte `offset`.
    ///
    /// # Errors
    /// - `NoSpace`
    /// - `Io`
    pub fn write_at(&self, from: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(from, offset)
    }

    /// Makes the bytes durable, with the metadata that is needed to read them back (fdatasync).
    ///
    /// # Errors
    /// - `NoSpace` if the file system (for example NFS) reports only now that there is no space for the bytes
    /// - `Io`
    pub fn sync(&self) -> Result<()> {
        self.0.sync().map_err(Error::from_sync)
    }

    /// Makes the bytes and all metadata durable, including the modification time (fsync).
    ///
    /// # Errors
    /// `NoSpace`, `Io`, for the reasons listed at [`File::sync`].
    pub fn sync_all(&self) -> Result<()> {
        self.0.sync_all().map_err(Error::from_sync)
    }

    /// Sets the modification time (futimens). A later write changes the time again. The time is durable after
    /// [`File::sync_all`].
    ///
    /// # Errors
    /// `Io`.
    pub fn set_modified(&self, time: ModifiedTime) -> Result<()> {
        self.0.set_modified(time)
    }

    /// Reads an extended attribute. Returns `None` if the file does not have it, or the file system has no attributes.
    ///
    /// # Errors
    /// `Io`.
    pub fn attribute(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.0.attribute(name)
    }

    /// Sets an extended attribute, or removes it if `value` is `None`. The bytes of the file and its modification time
    /// do not change. The attribute is durable after [`File::sync_all`].
    ///
    /// # Errors
    /// - `Unsupported` if the file system has no such attributes
    /// - `NoSpace` if there is no space for the attribute
    /// - `Io`, also if this user may not change the file
    pub fn set_attribute(&self, name: &str, value: Option<&[u8]>) -> Result<()> {
        self.0.set_attribute(name, value)
    }

    /// Truncates the file to `len` bytes, or extends it with zeros.
    ///
    /// # Errors
    /// - `NoSpace`
    /// - `Io`
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }

    /// Allocates space for a range without changing the file's length or bytes.
    ///
    /// # Errors
    /// - `Unsupported` if the file system cannot preallocate
    /// - `NoSpace`
    /// - `Io`
    pub fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.0.allocate(offset, len)
    }

    /// Makes a range read as zeros. Its space is freed if the file system can do that; otherwise zeros are written.
    ///
    /// # Errors
    /// - `NoSpace`
    /// - `Io`
    pub fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch_hole(offset, len)
    }

    /// Returns how the file system allocates space for this file.
    pub fn allocation_mode(&self) -> AllocationMode {
        self.0.allocation_mode()
    }

    /// Returns whether the file system may be in use by other machines, which see a write of this machine only after a
    /// sync.
    pub fn is_on_shared_file_system(&self) -> bool {
        self.0.is_on_shared_file_system()
    }

    /// Disables copy on write for this file. Has an effect only on an empty file, and only on a file system with copy
    /// on write.
    ///
    /// # Errors
    /// `Io`.
    pub fn disable_copy_on_write(&self) -> Result<()> {
        self.0.disable_copy_on_write()
    }

    /// Returns the total and available space of the file system.
    ///
    /// # Errors
    /// `Io`.
    pub fn file_system_space(&self) -> Result<FileSystemSpace> {
        self.0.file_system_space()
    }

    /// Returns offset and length of the first range at or after `offset` that is not a hole. The range ends at the next
    /// hole or at the end of the file. Returns `None` if no such range is left.
    ///
    /// # Errors
    /// `Io`.
    pub fn next_data(&self, offset: u64) -> Result<Option<(u64, u64)>> {
        self.0.next_data(offset)
    }

    /// Advises the kernel that reads will be small and scattered, which disables its readahead.
    pub fn advise_random_reads(&self) {
        self.0.advise_random_reads()
    }

    /// Advises the kernel to begin reading a range into the page cache. Prefetches of several ranges run at the same
    /// time.
    pub fn prefetch(&self, offset: u64, len: u64) {
        self.0.prefetch(offset, len)
    }

    /// Returns the kernel's readahead for a sequential stream in bytes, or 0 if it is unknown.
    pub fn kernel_readahead(&self) -> u64 {
        self.0.kernel_readahead()
    }

    /// Advises the kernel to begin writing a dirty range to the medium, before a sync. The kernel may also drop the
    /// range from the page cache.
    pub fn start_writeback(&self, offset: u64, len: u64) {
        self.0.start_writeback(offset, len)
    }

    /// Returns the number of bytes of address space in which the file is mapped for reads from the page cache.
    pub fn mapped_bytes(&self) -> u64 {
        self.0.mapped_bytes()
    }

    /// Takes a lock, or changes the kind of lock that is held. The lock ends with the open file description. If a
    /// conflicting lock belongs to a process that has ended but has I/O in flight, waits up to 30 s for the end of this
    /// I/O.
    ///
    /// # Errors
    /// - `Busy` if another open file description, usually of another process, holds a conflicting lock; the message
    ///   contains the holder if the holder can be found
    /// - `Unsupported` for an exclusive lock on a file that was opened with [`Access::Read`](super::Access::Read)
    /// - `Io`
    pub fn lock(&self, lock: Lock) -> Result<()> {
        self.0.lock(lock)
    }

    /// Enables O_DIRECT and returns the alignment that it requires. Returns `None` and changes nothing if the file
    /// system does not report the alignment, requires more than 512 bytes for offsets or 4096 bytes for memory, or
    /// rejects O_DIRECT.
    ///
    /// # Errors
    /// `Io`.
    pub fn set_direct(&self) -> Result<Option<DirectRules>> {
        self.0.set_direct()
    }
}
