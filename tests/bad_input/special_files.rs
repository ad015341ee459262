//! Files that are not regular: O1 of the opener's rules, for the image given on the command line.

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::common::tool::leave_socket;
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
        Case::new("O1 a socket", regular, |dir| {
            let path = dir.join("sock.vhd");
            leave_socket(&path);
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
