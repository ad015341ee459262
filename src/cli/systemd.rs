//! The interface to systemd: sockets that systemd hands over (sd_listen_fds(3)), and notifications (sd_notify(3)).
//!
//! The crate `sd-notify` is not used, because it cannot send to an abstract socket, and because it returns file
//! descriptors as numbers without ownership.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use super::inherited_fd::InheritedFds;

/// Number of the first file descriptor that systemd hands over.
const FIRST_FD: RawFd = 3;

/// Takes the sockets in `LISTEN_FDS`, in order, with their names. Returns none if `LISTEN_PID` names another process.
///
/// # Errors
/// - `InvalidInput` if a descriptor was not inherited or was taken before, or if the numbers of names and sockets
///   differ
/// - any error of fcntl(2)
pub(super) fn take_sockets(inherited: &mut InheritedFds) -> io::Result<Vec<(Option<String>, OwnedFd)>> {
    let read = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<i32>().ok());
    let ours = read("LISTEN_PID").is_some_and(|pid| u32::try_from(pid) == Ok(std::process::id()));
    let count = if ours { read("LISTEN_FDS").unwrap_or(0).clamp(0, 4096) } else { 0 };
    let count = usize::try_from(count).expect("not negative");
    let names = std::env::var_os("LISTEN_FDNAMES").filter(|_| count > 0);
    let names = names_of(names.as_deref(), count)?;
    names.into_iter().zip(FIRST_FD..).map(|(name, number)| Ok((name, inherited.take(number)?))).collect()
}

fn names_of(names: Option<&OsStr>, count: usize) -> io::Result<Vec<Option<String>>> {
    let Some(names) = names else { return Ok(vec![None; count]) };
    let names: Vec<_> = names.to_string_lossy().split(':').map(|name| Some(name.to_owned())).collect();
    if names.len() != count {
        let why = format!("LISTEN_FDNAMES has {} names for {count} sockets", names.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(names)
}

/// Sends a state such as `READY=1` to the service manager. Does nothing if `NOTIFY_SOCKET` is not set.
///
/// # Errors
/// Any error of creating a socket or sending to the socket of the service manager.
pub(super) fn notify(state: &str) -> io::Result<()> {
    match std::env::var_os("NOTIFY_SOCKET") {
        Some(name) if !name.is_empty() => send(&name, state),
        _ => Ok(()),
    }
}

fn send(name: &OsStr, state: &str) -> io::Result<()> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_many_as_sockets() {
        let names = |text: &str, count| names_of(Some(OsStr::new(text)), count).map_err(|e| e.to_string());
        assert_eq!(names("a::c", 3).unwrap(), [Some("a".into()), Some(String::new()), Some("c".into())]);
        assert_eq!(names_of(None, 2).unwrap(), [None, None]);
        assert!(names("a:b", 1).unwrap_err().contains("2 names for 1"), "as sd_listen_fds_with_names(3) refuses it");
    }

    #[test]
    fn notifications_reach_sockets_with_a_path_or_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let receives = |socket: UnixDatagram, name: &OsStr| {
            send(name, "READY=1").unwrap();
            let mut received = [0; 16];
            let n = socket.recv(&mut received).unwrap();
            assert_eq!(&received[..n], b"READY=1");
        };
        receives(UnixDatagram::bind(&path).unwrap(), path.as_os_str());
        let name = format!("diffdisk-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        receives(UnixDatagram::bind_addr(&address).unwrap(), OsStr::new(&format!("@{name}")));
        assert!(send(OsStr::new("/nonexistent/socket"), "READY=1").is_err());
    }
}
