//! The environment of the running Linux system.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use uuid::Uuid;

use super::call::open_error;
use super::file::HostFile;
use super::folder::HostFolder;
use super::runtime_folder::HostRuntimeFolder;
use super::{file_presence, lock_holder, origin};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::backend::{File, Folder};
use crate::storage::blocking::BlockingEngine;
use crate::storage::engine::Engine;
use crate::storage::env::Env;
use crate::storage::runtime_folder::RuntimeFolder;
use crate::storage::types::{Access, EngineKind, FilePresence, LockHolder, Origin};
use crate::storage::uring::UringEngine;

/// The running Linux system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

impl Env for Host {
    fn open(&self, path: &Path, access: Access) -> Result<File> {
        let (folder, name) = split_path(path)?;
        let fd = folder.open_named(name, access).map_err(|e| open_error(e).at_path(path))?;
        HostFile::new(fd, path, access, Folder::new(folder)).map(File::new)
    }

    fn folder(&self, path: &Path) -> Result<Folder> {
        HostFolder::at(path).map(Folder::new)
    }

    fn file_presence(&self, path: &Path) -> FilePresence {
        file_presence::file_presence(path)
    }

    fn open_disk(&self, path: &Path, access: Access) -> Result<File> {
        let (folder, name) = split_path(path)?;
        let fd = folder.open_disk(name, access).map_err(|e| match e {
            Errno::BUSY => {
                let what = "the block device is in use: it is mounted, or used by LVM, RAID, swap or another program";
                Error::new(ErrorKind::Busy, what).at_path(path)
            }
            // A file that `open` refuses for this error may be a block device here.
            Errno::NXIO | Errno::NODEV => {
                let what = "neither a regular file nor a block device with a driver";
                Error::new(ErrorKind::Refused, what).caused_by(std::io::Error::from(e)).at_path(path)
            }
            e => open_error(e).at_path(path),
        })?;
        HostFile::new_disk(fd, path, access, Folder::new(folder)).map(File::new)
    }

    fn lock_holders(&self, files: &[&File]) -> Vec<Option<LockHolder>> {
        let files: Vec<Option<&HostFile>> = files.iter().map(|file| file.as_backend()).collect();
        lock_holder::lock_holders(&files)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).map_err(|e| Error::io("cannot remove the name", e).at_path(path))
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        fs::canonicalize(path).map_err(|e| Error::io("cannot resolve the path", e).at_path(path))
    }

    fn exists(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok()
    }

    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder> {
        HostRuntimeFolder::open_folder(folder).map(RuntimeFolder::new)
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
                ONCE.call_once(|| {
                    log::warn!("io_uring is not available ({e}): using blocking calls, which are slower")
                });
                Ok(Box::new(BlockingEngine::new(depth)))
            }
            Err(e) => Err(Error::io("cannot set up io_uring", e)),
        }
    }
}

/// Splits an operator's path into the folder, which is opened, and the name in it.
fn split_path(path: &Path) -> Result<(HostFolder, &OsStr)> {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, Mode, OFlags};

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
        // The file must not stay non-blocking: io_uring would return EAGAIN instead of waiting.
        let file = Host.open(&p("f"), Access::Read).unwrap();
        let flags = rustix::fs::fcntl_getfl(file.as_backend::<HostFile>().unwrap()).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
    }

    #[test]
    fn paths_resolve_as_an_operator_expects() {
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
