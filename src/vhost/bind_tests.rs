//! Tests of `bind.rs`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};

use super::*;
use crate::vhost::Socket;

const OWNER: SocketAccess = SocketAccess { group: None, mode: 0o600 };

fn made(path: &Path) -> Socket {
    Socket::bind(path, OWNER).unwrap()
}

fn refused(path: &Path) -> ErrorKind {
    Socket::bind(path, OWNER).unwrap_err().kind()
}

#[test]
fn a_socket_is_private_and_removed_when_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let socket = made(&path);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    UnixStream::connect(&path).unwrap();
    assert_eq!(refused(&path), ErrorKind::Busy);
    drop(socket);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "neither the socket nor its lock is left");
}

#[test]
fn socket_and_lock_are_removed_although_the_folder_was_renamed() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    fs::create_dir(&old).unwrap();
    let socket = made(&old.join("s"));
    fs::rename(&old, &new).unwrap();
    assert_eq!(fs::read_dir(&new).unwrap().count(), 2);
    drop(socket);
    assert_eq!(fs::read_dir(&new).unwrap().count(), 0);
}

#[test]
fn the_kernel_lists_the_socket_under_the_given_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _socket = made(&path);
    let bound = fs::read_to_string("/proc/net/unix").unwrap();
    assert!(bound.lines().any(|line| line.ends_with(path.to_str().unwrap())), "{bound}");
}

#[test]
fn only_a_stream_socket_without_a_listener_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(UnixStream::connect(&path).is_err());
    let socket = made(&path);
    UnixStream::connect(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    drop(socket);
    assert_eq!(fs::read(&path).unwrap(), b"precious", "not ours any more");
    assert_eq!(refused(&path), ErrorKind::Refused);
    fs::remove_file(&path).unwrap();
    let datagrams = UnixDatagram::bind(&path).unwrap();
    assert_eq!(refused(&path), ErrorKind::Refused, "in use, though not as a stream");
    drop(datagrams);
    drop(made(&path));
}

#[test]
fn a_listener_with_a_full_queue_is_busy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let _waits = UnixStream::connect(&path).unwrap();
    assert_eq!(refused(&path), ErrorKind::Busy);
}

#[test]
fn a_socket_that_is_bound_and_locked_is_not_stale() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let folder = rustix::fs::open(dir.path(), OFlags::PATH, Mode::empty()).unwrap();
    let place = SocketLocation { path: &path, folder: Arc::new(folder), name: OsStr::new("s") };
    let lock = NameLock::acquire(&place).unwrap();
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    assert_eq!(refused(&path), ErrorKind::Busy);
    assert!(path.exists());
    drop(lock);
    drop(made(&path));
}

#[test]
fn the_lock_file_of_a_killed_daemon_is_reused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    fs::write(dir.path().join("s.lock"), "").unwrap();
    drop(made(&path));
    assert!(!dir.path().join("s.lock").exists());
}

#[test]
fn of_concurrent_binds_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    for _ in 0..50 {
        let all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| Socket::bind(&path, OWNER))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let kinds: Vec<_> = all.iter().map(|r| r.as_ref().map(|_| ()).map_err(Error::kind)).collect();
        assert_eq!(kinds.iter().filter(|k| k.is_ok()).count(), 1, "{kinds:?}");
        assert!(kinds.iter().all(|k| matches!(k, Ok(()) | Err(ErrorKind::Busy))), "{kinds:?}");
        UnixStream::connect(&path).unwrap();
    }
}

#[test]
fn group_and_mode_are_as_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let own = rustix::process::getegid().as_raw();
    // Root may set any group, other users only one of their own groups.
    let group = if rustix::process::geteuid().is_root() { own + 7 } else { own };
    let _socket = Socket::bind(&path, SocketAccess { group: Some(group), mode: 0o660 }).unwrap();
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.gid(), found.permissions().mode() & 0o777), (group, 0o660));
}

#[test]
fn a_path_may_be_longer_than_an_address_but_its_folder_must_exist() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120));
    assert_eq!(refused(&deep.join("s")), ErrorKind::NotFound);
    fs::create_dir(&deep).unwrap();
    let socket = made(&deep.join("s"));
    assert_eq!(socket.path(), Some(deep.join("s")));
    assert_eq!(refused(&deep.join("s")), ErrorKind::Busy);
}
