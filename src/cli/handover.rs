//! Assigns the sockets that the starting process hands over to disks.
//!
//! `--fd` belongs to the only disk on the command line. Sockets in `LISTEN_FDS` are assigned by name or path, never by
//! order: a socket belongs to the disk whose name (its id, or else its file name) equals the socket's name in
//! `LISTEN_FDNAMES` (`FileDescriptorName=`), or whose `socket` is the path on which the socket listens. Service
//! managers give sockets default names, for example the name of the unit. If exactly one socket is left and has a
//! default name, and exactly one disk has neither a socket nor `--fd` nor the key `socket`, the socket is assigned to
//! that disk. All other cases are refused: a guest must not get the disk of another guest.

use std::path::{Path, PathBuf};

use super::disk_args::DiskArgs;
use super::inherited_fd::InheritedFds;
use super::systemd;
use crate::error::{Error, ErrorKind, Result};
use crate::image::folder_of;
use crate::vhost::Socket;

/// Name and path of a socket in `LISTEN_FDS`, by which the socket is assigned to a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
struct OfferedSocket {
    name: Option<String>,
    path: Option<PathBuf>,
}

/// Takes all sockets that were handed over. The result has one entry for each disk.
///
/// # Errors
/// * `Refused`: a socket belongs to no disk or to several, a disk has two sockets, a disk with a socket in
///   `LISTEN_FDS` has `socket-group` or `socket-mode`, or a descriptor is not a Unix stream socket.
/// * `Io`: a descriptor was not handed over or is not a socket, or `LISTEN_FDS` and `LISTEN_FDNAMES` are inconsistent.
pub(super) fn take_sockets(disks: &[DiskArgs], mut inherited: InheritedFds) -> Result<Vec<Option<Socket>>> {
    let mut taken: Vec<Option<Socket>> = disks.iter().map(|_| None).collect();
    for (disk, taken) in disks.iter().zip(&mut taken) {
        if let Some(fd) = disk.fd {
            let owned = inherited.take(fd).map_err(|e| Error::io(format!("cannot use file descriptor {fd}"), e))?;
            *taken = Some(Socket::from_fd(owned)?);
        }
    }
    let handed_over =
        systemd::take_sockets(&mut inherited).map_err(|e| Error::io("cannot use the sockets in LISTEN_FDS", e))?;
    let (mut sockets, mut offered) = (Vec::new(), Vec::new());
    for (name, fd) in handed_over {
        let socket = Socket::from_fd(fd)?;
        offered.push(OfferedSocket { name, path: socket.path() });
        sockets.push(socket);
    }
    let places = assign(disks, &offered).map_err(|why| Error::new(ErrorKind::Refused, why))?;
    for (socket, place) in sockets.into_iter().zip(places) {
        taken[place] = Some(socket);
    }
    Ok(taken)
}

/// Returns the index of the disk that each socket serves.
fn assign(disks: &[DiskArgs], offered: &[OfferedSocket]) -> Result<Vec<usize>, String> {
    let mut places = vec![None; offered.len()];
    for (place, socket) in places.iter_mut().zip(offered) {
        *place = by_name_or_path(disks, socket)?;
    }
    if let (1, Some(rest)) = (places.iter().filter(|p| p.is_none()).count(), places.iter().position(Option::is_none)) {
        let mut without = (0..disks.len()).filter(|disk| {
            disks[*disk].socket.is_none() && disks[*disk].fd.is_none() && !places.contains(&Some(*disk))
        });
        if let (Some(only), None, true) = (without.next(), without.next(), has_default_name(&offered[rest])) {
            places[rest] = Some(only);
        }
    }
    let mut all = Vec::new();
    for (socket, place) in offered.iter().zip(&places) {
        let Some(disk) = *place else {
            let names: Vec<String> = disks.iter().map(|d| format!("{:?}", d.name())).collect();
            return Err(format!(
                "{} in LISTEN_FDS belongs to no disk: set FileDescriptorName= of its unit to the id of a disk, or set \
                 socket= of a disk to its path. The disks are {}",
                socket.describe(),
                names.join(", ")
            ));
        };
        if let Some(other) = all.iter().position(|d| *d == disk) {
            let (name, other) = (disks[disk].name(), offered[other].describe());
            return Err(format!("disk {name:?} has two sockets in LISTEN_FDS: {other}, and {}", socket.describe()));
        }
        if let (Some(fd), name) = (disks[disk].fd, disks[disk].name()) {
            return Err(format!("disk {name:?} has two sockets: file descriptor {fd}, and {}", socket.describe()));
        }
        if disks[disk].has_socket_access() {
            let name = disks[disk].name();
            return Err(format!(
                "disk {name:?} has socket-group or socket-mode, which do not apply to a socket that was handed over"
            ));
        }
        all.push(disk);
    }
    Ok(all)
}

fn by_name_or_path(disks: &[DiskArgs], socket: &OfferedSocket) -> Result<Option<usize>, String> {
    let by_name = disks.iter().position(|d| socket.name.as_ref() == Some(&d.name()));
    let listens = |d: &DiskArgs| matches!((&d.socket, &socket.path), (Some(a), Some(b)) if is_same_path(a, b));
    let by_path = disks.iter().position(listens);
    if let Some(named) = by_name {
        let (described, name) = (socket.describe(), disks[named].name());
        if let Some(other) = by_path.filter(|other| *other != named) {
            let other = disks[other].name();
            return Err(format!(
                "{described} in LISTEN_FDS has the name of disk {name:?} and the path of disk {other:?}"
            ));
        }
        if let (Some(path), None) = (&disks[named].socket, by_path) {
            let path = path.display();
            return Err(format!("{described} in LISTEN_FDS has the name of disk {name:?}, whose socket is {path}"));
        }
    }
    Ok(by_name.or(by_path))
}

/// Returns whether a socket has no name, or a name that service managers give to sockets without `FileDescriptorName=`
/// (sd_listen_fds(3)).
fn has_default_name(socket: &OfferedSocket) -> bool {
    match socket.name.as_deref() {
        None | Some("" | "unknown" | "connection" | "stored") => true,
        Some(name) => name.ends_with(".socket"),
    }
}

/// Returns whether two paths name the same socket, even if a folder in one of them is a symbolic link (`/var/run`).
fn is_same_path(a: &Path, b: &Path) -> bool {
    let folder = |path: &Path| std::fs::canonicalize(folder_of(path)).ok();
    a == b || (a.file_name() == b.file_name() && folder(a).is_some_and(|a| Some(a) == folder(b)))
}

impl OfferedSocket {
    fn describe(&self) -> String {
        let name = self.name.as_ref().map_or("a socket without a name".into(), |name| format!("the socket {name:?}"));
        match &self.path {
            Some(path) => format!("{name} on {}", path.display()),
            None => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(name: &str, path: &str) -> OfferedSocket {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        OfferedSocket { name: some(name), path: some(path).map(PathBuf::from) }
    }

    fn disk(id: &str, socket: &str) -> DiskArgs {
        let socket = (!socket.is_empty()).then(|| PathBuf::from(socket));
        DiskArgs { id: Some(id.into()), socket, ..DiskArgs::new("/x.vhd".into()) }
    }

    #[test]
    fn sockets_are_matched_by_name_or_path() {
        let disks = [disk("a", ""), disk("b", ""), disk("c", "/run/c")];
        let sockets = [offered("vm.socket", "/run/c"), offered("b", "/run/1"), offered("a", "/run/2")];
        assert_eq!(assign(&disks, &sockets), Ok(vec![2, 1, 0]));
        assert_eq!(assign(&disks, &[offered("c", "/run/c")]), Ok(vec![2]));
        assert_eq!(assign(&[DiskArgs::new("/x/y.vhd".into())], &[offered("y.vhd", "")]), Ok(vec![0]));
        // A unit with several ListenStream= gives all sockets the same name, so the paths distinguish them.
        let disks = [disk("a", "/run/a"), disk("b", "/run/b")];
        assert_eq!(assign(&disks, &[offered("vm.socket", "/run/b"), offered("vm.socket", "/run/a")]), Ok(vec![1, 0]));
    }

    #[test]
    fn one_socket_with_a_default_name_serves_the_one_disk() {
        for name in ["", "unknown", "connection", "disk.socket"] {
            assert_eq!(assign(&[disk("a", "")], &[offered(name, "/run/1")]), Ok(vec![0]), "{name:?}");
        }
        // One of several sockets may have a default name, too, if all others are matched.
        let sockets = [offered("disk.socket", "/run/1"), offered("a", "/run/2")];
        assert_eq!(assign(&[disk("a", ""), disk("b", "")], &sockets), Ok(vec![1, 0]));
    }

    #[test]
    fn sockets_that_match_no_disk_or_several_are_refused() {
        let (a, b) = (disk("a", ""), disk("b", "/run/b"));
        let refused = |disks: &[DiskArgs], sockets: &[OfferedSocket], why: &str| {
            let error = assign(disks, sockets).unwrap_err();
            assert!(error.contains(why), "{error}");
        };
        refused(&[a.clone(), disk("c", "")], &[offered("", "/run/1"), offered("", "/run/2")], "belongs to no disk");
        refused(&[a.clone(), disk("c", "")], &[offered("", "/run/1")], "belongs to no disk");
        refused(std::slice::from_ref(&a), &[offered("other", "/run/1")], "\"other\" on /run/1");
        refused(std::slice::from_ref(&a), &[offered("", "/run/1"), offered("", "/run/2")], "belongs to no disk");
        refused(&[a.clone(), b.clone()], &[offered("a", "/run/b")], "name of disk \"a\" and the path of disk \"b\"");
        refused(std::slice::from_ref(&b), &[offered("b", "/run/x")], "whose socket is /run/b");
        refused(std::slice::from_ref(&b), &[offered("", "/run/x")], "belongs to no disk");
        refused(std::slice::from_ref(&a), &[offered("a", "/run/1"), offered("a", "/run/2")], "two sockets");
        let moded = DiskArgs { socket_mode: Some(0o660), ..a };
        refused(&[moded], &[offered("a", "")], "socket-mode");
        let connected = DiskArgs { fd: Some(7), ..disk("a", "") };
        refused(&[connected], &[offered("a", "")], "descriptor 7");
    }

    #[test]
    fn paths_through_symbolic_links_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        std::os::unix::fs::symlink("run", dir.path().join("link")).unwrap();
        let place = |name: &str| dir.path().join(name);
        assert!(is_same_path(&place("run/s"), &place("link/s")) && !is_same_path(&place("run/s"), &place("run/t")));
        assert!(!is_same_path(&place("none/s"), &place("neither/s")));
    }
}
