//! A FUSE file system with one file, served by the test process. A test implements [`FileContent`], which defines the
//! effects of reads, writes and syncs. This module implements the folder, the attributes and opening.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    Session, TimeOrNow, WriteFlags,
};

const FILE: INodeNo = INodeNo(2);

/// Behaviour of the only file of the file system.
pub(crate) trait FileContent: Send + Sync + 'static {
    /// Name of the file.
    const NAME: &'static str;
    /// Time for which the kernel may cache names and attributes.
    const TTL: Duration;

    /// Returns the length of the file in bytes.
    fn len(&self) -> u64;

    /// Returns the number of bytes that the file occupies on the medium.
    fn allocated(&self) -> u64 {
        self.len()
    }

    /// Truncates or extends the file.
    fn set_len(&self, _len: u64) {}

    /// Runs before a look-up of any other name is answered with ENOENT.
    fn before_not_found(&self, _name: &OsStr) {}

    /// Answers a read.
    fn read(&self, offset: u64, size: usize, reply: ReplyData);

    /// Answers a write.
    fn write(&self, offset: u64, data: &[u8], reply: ReplyWrite);

    /// Answers a sync.
    fn sync(&self, reply: ReplyEmpty);

    /// Answers an allocation, a punch or a zeroing.
    fn allocate(&self, _offset: u64, _len: u64, _mode: i32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}

/// Mounts a file system with the file `content` on `folder`.
///
/// # Errors
/// The file system cannot be mounted, for example without root.
pub(crate) fn mount(content: impl FileContent, folder: &Path, config: &Config) -> io::Result<BackgroundSession> {
    Session::new(OneFile(content), folder, config).and_then(Session::spawn)
}

struct OneFile<T>(T);

impl<T: FileContent> OneFile<T> {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm, size, blocks) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0, 0),
            _ => (FileType::RegularFile, 0o600, self.0.len(), self.0.allocated() / 512),
        };
        FileAttr {
            ino,
            size,
            blocks,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl<T: FileContent> Filesystem for OneFile<T> {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == OsStr::new(T::NAME) {
            return reply.entry(&T::TTL, &self.attributes(FILE), Generation(0));
        }
        self.0.before_not_found(name);
        reply.error(Errno::ENOENT);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&T::TTL, &self.attributes(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            self.0.set_len(size);
        }
        reply.attr(&T::TTL, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Without FOPEN_KEEP_CACHE an open would drop the file's page cache and wait for reads in progress.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0.read(offset, usize::try_from(size).expect("a size in memory"), reply);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.0.write(offset, data, reply);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // After this answer the kernel sends no further FLUSH, so later closes of the file wait for no reply.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.sync(reply);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, len: u64, mode: i32, reply: ReplyEmpty) {
        self.0.allocate(offset, len, mode, reply);
    }
}
