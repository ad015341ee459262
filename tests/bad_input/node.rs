//! Files that are not files: O1 of the opener's rules, for the image given on the command line.

use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::verdict::{Case, refused};

pub(crate) fn cases() -> Vec<Case> {
    let regular = refused(&["regular file", "not a file", "directory", "no such device", "device"]);
    vec![
        Case::new("O1 a missing file", refused(&["no such file", "not found"]), |dir| dir.join("missing.vhd")),
        Case::new("O1 a folder", regular, |dir| dir.to_path_buf()),
        Case::new("O1 a FIFO without a writer", regular, |dir| {
            let path = dir.join("fifo.vhd");
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
            path
        }),
        Case::new("O1 a socket", regular, |_| {
            // In a short path of its own: a socket's name has 107 bytes at most.
            let path = tempfile::tempdir().expect("a folder").keep().join("sock.vhd");
            drop(UnixListener::bind(&path).expect("a socket"));
            path
        }),
        Case::new("O1 /dev/zero", regular, |_| "/dev/zero".into()),
        Case::new("O1 /dev/null", regular, |_| "/dev/null".into()),
        Case::new("O1 /dev/tty", regular, |_| "/dev/tty".into()),
        Case::new(
            "O1 /proc/self/mem",
            refused(&["regular file", "footer", "/proc", "short", "small", "cannot"]),
            |_| "/proc/self/mem".into(),
        ),
    ]
}
