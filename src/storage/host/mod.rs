//! The host itself: Linux files, names, clock and entropy.

mod direct;
mod file;
pub(super) mod file_map;
mod folder;
mod lock;
mod lock_holder;
mod metadata;
mod origin;
mod presence;
mod space;
mod zeros;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;
use rustix::io::Errno;
use uuid::Uuid;

pub use self::file::HostFile;
pub(super) use self::file_map::{MapRegion, Residency};
pub use self::folder::HostFolder;
use super::blocking::BlockingEngine;
use super::engine::{Engine, host_file};
use super::env::{Access, EngineKind, Env, File, FilePresence, LockHolder, Origin};
use super::folder::Folder;
use super::runtime_folder::{HostRuntimeFolder, RuntimeFolder};
use super::uring::UringEngine;
use crate::error::{Error, ErrorKind, Result};

/// How every file is opened: not passed on to children, not waiting for the other end of a FIFO, not becoming our
/// terminal.
const OPEN_FLAGS: OFlags = OFlags::CLOEXEC.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// The running Linux system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

impl Env for Host {
    fn open(&self, path: &Path, access: Access) -> Result<File> {
        let (folder, name) = parted(path)?;
        let fd = folder.open_named(name, access).map_err(|e| open_error(e).at_path(path))?;
        HostFile::new(fd, path, access, &folder).map(File::Host)
    }

    fn folder(&self, path: &Path) -> Result<Folder> {
        HostFolder::at(path).map(Folder::Host)
    }

    fn file_presence(&self, path: &Path) -> FilePresence {
        presence::presence(path)
    }

    fn open_disk(&self, path: &Path, access: Access) -> Result<File> {
        let (folder, name) = parted(path)?;
        let fd = folder.open_disk(name, access).map_err(|e| match e {
            Errno::BUSY => {
                let what = "the block device is in use: it is mounted, or held by LVM, RAID, swap or another program";
                Error::new(ErrorKind::Busy, what).at_path(path)
            }
            e => open_error(e).at_path(path),
        })?;
        HostFile::new_disk(fd, path, access, &folder).map(File::Host)
    }

    fn lock_holders(&self, files: &[&File]) -> Vec<Option<LockHolder>> {
        let files: Vec<_> = files.iter().map(|file| host_file(file).ok()).collect();
        lock_holder::lock_holders(&files)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).map_err(|e| Error::io("cannot remove the name", e).at_path(path))
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        fs::canonicalize(path).map_err(|e| Error::io("cannot resolve the path", e).at_path(path))
    }

    fn exists(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok()
    }

    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder> {
        HostRuntimeFolder::open_folder(folder).map(RuntimeFolder::Host)
    }

    fn origin(&self) -> Result<Origin> {
        origin::origin()
    }

    fn now(&self) -> i64 {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
        }
    }

    fn monotonic_time(&self) -> Duration {
        static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
        BEGAN.elapsed()
    }

    fn uuid(&self) -> Uuid {
        Uuid::new_v4()
    }

    fn engine(&self, kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        if kind == EngineKind::Blocking {
            return Ok(Box::new(BlockingEngine::new(depth)));
        }
        match UringEngine::new(depth) {
            Ok(ring) => Ok(Box::new(ring)),
            Err(e) if kind == EngineKind::Auto => {
                static ONCE: std::sync::Once = std::sync::Once::new();
                ONCE.call_once(|| log::warn!("no io_uring here ({e}): using blocking calls, which are slower"));
                Ok(Box::new(BlockingEngine::new(depth)))
            }
            Err(e) => Err(Error::io("cannot set up io_uring", e)),
        }
    }
}

/// The folder of an operator's path, held open, and the name in it.
fn parted(path: &Path) -> Result<(HostFolder, &OsStr)> {
    let fail = |e: Errno| open_error(e).at_path(path);
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(fail(if path.as_os_str().is_empty() { Errno::NOENT } else { Errno::ISDIR }));
    };
    let folder = HostFolder::at(above).map_err(|e| match e.raw_os_error() {
        Some(code) => fail(Errno::from_raw_os_error(code)),
        None => e,
    })?;
    Ok((folder, name))
}

/// Calls again while a signal interrupts.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// What opening by an operator's path failed with. Sockets (ENXIO), FIFOs without a reader (ENXIO), folders (EISDIR)
/// and devices without a driver (ENODEV) fail here already.
fn open_error(e: Errno) -> Error {
    match e {
        Errno::NXIO | Errno::ISDIR | Errno::NODEV => {
            Error::new(ErrorKind::Refused, "not a regular file").caused_by(std::io::Error::from(e))
        }
        e => Error::io("cannot open the file", e.into()),
    }
}

/// The flags of an access.
fn access_flags(access: Access) -> OFlags {
    match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, Mode};

    use super::*;

    fn kind<T>(r: Result<T>) -> ErrorKind {
        match r {
            Ok(_) => panic!("this must fail"),
            Err(e) => e.kind(),
        }
    }

    #[test]
    fn only_regular_files_open() {
        let d = tempfile::tempdir().unwrap();
        let p = |name: &str| d.path().join(name);
        rustix::fs::mknodat(CWD, p("fifo"), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let _socket = UnixListener::bind(p("socket")).unwrap();
        for access in [Access::Read, Access::Write] {
            for path in [p("fifo"), p("socket"), d.path().to_path_buf(), "/dev/null".into(), "/dev/zero".into()] {
                let e = Host.open(&path, access).unwrap_err();
                assert_eq!(e.kind(), ErrorKind::Refused, "{e:?}");
                assert!(e.line().contains("not a regular file"), "{e}");
                assert_eq!(e.path(), Some(path.as_path()));
            }
            assert_eq!(kind(Host.open(&p("none"), access)), ErrorKind::NotFound);
        }
        fs::write(p("f"), "x").unwrap();
        symlink("f", p("link")).unwrap();
        Host.open(&p("link"), Access::Write).unwrap();
        // The file must not stay non-blocking: a ring would get EAGAIN where it should wait.
        #[cfg_attr(
            not(feature = "sim"),
            allow(irrefutable_let_patterns, reason = "the simulated host is the other kind")
        )]
        let File::Host(f) = Host.open(&p("f"), Access::Read).unwrap() else { unreachable!("a file of the host") };
        assert!(!rustix::fs::fcntl_getfl(&f).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn paths_are_the_operators() {
        let d = tempfile::tempdir().unwrap();
        let p = |name: &str| d.path().join(name);
        fs::write(p("a"), "x").unwrap();
        let a = Host.open(&p("a"), Access::Read).unwrap();
        assert!(a.folder().is_same(&Host.folder(d.path()).unwrap()));
        assert_eq!((a.name(), a.path()), (std::ffi::OsStr::new("a"), p("a").as_path()));
        assert_eq!(Host.canonical(&p("./a")).unwrap(), fs::canonicalize(d.path()).unwrap().join("a"));
        for (path, expected) in [("", ErrorKind::NotFound), ("..", ErrorKind::Refused), ("/", ErrorKind::Refused)] {
            assert_eq!(kind(Host.open(Path::new(path), Access::Read)), expected, "{path}");
        }
        assert_eq!(kind(Host.open(&p("none/a"), Access::Read)), ErrorKind::NotFound);
        assert_eq!(kind(Host.folder(&p("none"))), ErrorKind::NotFound);
        assert!(Host.exists(&p("a")));
        Host.remove(&p("a")).unwrap();
        assert_eq!(kind(Host.remove(&p("a"))), ErrorKind::NotFound);
        assert!(Host.now() > 1_700_000_000);
        assert_ne!(Host.uuid(), Host.uuid());
    }
}
