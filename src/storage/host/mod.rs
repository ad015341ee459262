//! The host itself: Linux files, names, clock and entropy.

mod file;
mod lock;
pub(super) mod mapped;
mod origin;

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use uuid::Uuid;

pub use self::file::HostFile;
pub(super) use self::mapped::{Place, Region};
use super::blocking::Blocking;
use super::engine::Engine;
use super::env::{Access, EngineKind, Env, File, Origin};
use super::ring::Ring;
use super::runtime::{HostRuntime, Runtime};
use crate::error::{Error, ErrorKind, Result};

/// How every file is opened: not passed on to children, not waiting for the other end of a FIFO, not becoming our
/// terminal.
const CAREFUL: OFlags = OFlags::CLOEXEC.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// The running Linux system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

impl Env for Host {
    fn open(&self, path: &Path, access: Access) -> Result<File> {
        let mode = match access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
        };
        let fd = retry(|| rustix::fs::openat(CWD, path, mode | CAREFUL, Mode::empty()))
            .map_err(|e| open_error(e).at_path(path))?;
        HostFile::new(fd, path, access).map(File::Host)
    }

    fn open_beneath(&self, root: &Path, relative: &Path) -> Result<File> {
        let folder =
            retry(|| rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()))
                .map_err(|e| Error::io("cannot open the folder", e.into()).at_path(root))?;
        let path = root.join(relative);
        let rules = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        let mut tries = 0;
        let fd = loop {
            match rustix::fs::openat2(&folder, relative, OFlags::RDONLY | CAREFUL, Mode::empty(), rules) {
                // A rename elsewhere, seen while `..` was resolved: the kernel asks to try again.
                Err(Errno::AGAIN | Errno::INTR) if tries < 100 => tries += 1,
                Err(e) => return Err(beneath_error(e, root).at_path(path)),
                Ok(fd) => break fd,
            }
        };
        HostFile::new(fd, &path, Access::Read).map(File::Host)
    }

    fn create(&self, path: &Path) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | CAREFUL;
        let fd = retry(|| rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(0o644)))
            .map_err(|e| Error::io("cannot create the file", e.into()).at_path(path))?;
        HostFile::new(fd, path, Access::Write).map(File::Host)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::empty())
            .map_err(|e| Error::io(format!("cannot rename to {}", to.display()), e.into()).at_path(from))
    }

    fn link(&self, existing: &Path, new: &Path) -> Result<()> {
        fs::hard_link(existing, new)
            .map_err(|e| Error::io(format!("cannot give it the second name {}", new.display()), e).at_path(existing))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).map_err(|e| Error::io("cannot remove the name", e).at_path(path))
    }

    fn sync_dir(&self, folder: &Path) -> Result<()> {
        // The parent of a bare file name is the empty path.
        let named = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        retry(|| rustix::fs::openat(CWD, named, flags, Mode::empty()))
            .and_then(|fd| retry(|| rustix::fs::fsync(fd.as_fd())))
            .map_err(|e| Error::io("cannot make the names in the folder durable", e.into()).at_path(named))
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        fs::canonicalize(path).map_err(|e| Error::io("cannot resolve the path", e).at_path(path))
    }

    fn exists(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok()
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(folder).and_then(|entries| entries.map(|e| Ok(e?.path())).collect());
        entries.map_err(|e| Error::io("cannot list the folder", e).at_path(folder))
    }

    fn runtime(&self, folder: &Path) -> Result<Runtime> {
        HostRuntime::open_folder(folder).map(Runtime::Host)
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

    fn uuid(&self) -> Uuid {
        Uuid::new_v4()
    }

    fn engine(&self, kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        if kind == EngineKind::Blocking {
            return Ok(Box::new(Blocking::new(depth)));
        }
        match Ring::new(depth) {
            Ok(ring) => Ok(Box::new(ring)),
            Err(e) if kind == EngineKind::Auto => {
                static ONCE: std::sync::Once = std::sync::Once::new();
                ONCE.call_once(|| log::warn!("no io_uring here ({e}): using blocking calls, which are slower"));
                Ok(Box::new(Blocking::new(depth)))
            }
            Err(e) => Err(Error::io("cannot set up io_uring", e)),
        }
    }
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

fn beneath_error(e: Errno, root: &Path) -> Error {
    let why = match e {
        Errno::XDEV => format!("the path leaves the allowed folder {}", root.display()),
        Errno::LOOP => format!("the path passes a symbolic link below the allowed folder {}", root.display()),
        Errno::NOSYS => {
            let what = "this kernel has no openat2 (Linux 5.6), which keeps parents inside the allowed folders";
            return Error::new(ErrorKind::Unsupported, what);
        }
        e => return open_error(e),
    };
    Error::new(ErrorKind::Refused, why).caused_by(std::io::Error::from(e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

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
        let fd = fs::File::from(rustix::fs::openat(CWD, p("f"), OFlags::RDONLY | CAREFUL, Mode::empty()).unwrap());
        let f = HostFile::new(fd.into(), &p("f"), Access::Read).unwrap();
        assert!(!rustix::fs::fcntl_getfl(&f).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn beneath_stays_beneath() {
        let d = tempfile::tempdir().unwrap();
        let root = d.path().join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(d.path().join("outside"), "secret").unwrap();
        fs::write(root.join("in"), "fine").unwrap();
        symlink("in", root.join("link")).unwrap();
        symlink("..", root.join("up")).unwrap();
        for good in ["in", "sub/../in", "./in"] {
            Host.open_beneath(&root, Path::new(good)).unwrap();
        }
        for bad in ["../outside", "sub/../../outside", "link", "up/outside", "/etc/passwd", "sub", ".", "../root/in"] {
            assert_eq!(kind(Host.open_beneath(&root, Path::new(bad))), ErrorKind::Refused, "{bad}");
        }
        assert_eq!(kind(Host.open_beneath(&root, &root.join("in"))), ErrorKind::Refused);
        assert_eq!(kind(Host.open_beneath(&root, Path::new("none"))), ErrorKind::NotFound);
        assert_eq!(kind(Host.open_beneath(&root, Path::new(""))), ErrorKind::NotFound);
    }

    #[test]
    fn names_change() {
        let d = tempfile::tempdir().unwrap();
        let p = |name: &str| d.path().join(name);
        let a = Host.create(&p("a")).unwrap();
        assert_eq!(a.stat().unwrap().mode & !0o644, 0);
        assert_eq!(Host.create(&p("a")).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        Host.link(&p("a"), &p("b")).unwrap();
        assert_eq!(Host.link(&p("a"), &p("b")).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        Host.create(&p("c")).unwrap();
        Host.rename(&p("c"), &p("b")).unwrap();
        let b = Host.open(&p("b"), Access::Read).unwrap();
        assert_ne!(a.stat().unwrap().id, b.stat().unwrap().id);
        Host.remove(&p("a")).unwrap();
        assert_eq!(kind(Host.remove(&p("a"))), ErrorKind::NotFound);
        Host.sync_dir(d.path()).unwrap();
        Host.sync_dir(Path::new("")).unwrap();
        assert_eq!(Host.list(d.path()).unwrap(), [p("b")]);
        assert_eq!(kind(Host.list(&p("none"))), ErrorKind::NotFound);
        assert_eq!(Host.canonical(&p("./b")).unwrap(), fs::canonicalize(d.path()).unwrap().join("b"));
        assert!(Host.now() > 1_700_000_000);
        assert_ne!(Host.uuid(), Host.uuid());
    }
}
