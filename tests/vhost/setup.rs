//! Setup that most tests of the daemon share: a served disk, guest memory, eventfds.

use std::fs::File;

use super::daemon::Daemon;
use super::image;

pub(crate) const MIB: u64 = 1 << 20;

/// Starts a daemon on a fixed disk of 4 MiB. Returns the daemon and its folder.
pub(crate) fn started(options: &[&str]) -> (tempfile::TempDir, Daemon) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.vhd");
    image::make_fixed(&image, 4 * MIB);
    let daemon = Daemon::start(dir.path(), &image, options);
    (dir, daemon)
}

/// Creates a memfd, as a front-end does for guest memory.
pub(crate) fn memory(len: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// Creates an eventfd whose reads block.
pub(crate) fn event() -> File {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap().into()
}
