//! File systems of a test's own, mounted for as long as the test lasts. They need root; without it such a test is skipped.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Unmounts when dropped.
pub(crate) struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Mounts `kind` at `place`; `None`, and a word about it, if that is not allowed here.
pub(crate) fn mounted(kind: &str, place: &Path, options: &str) -> Option<Mounted> {
    let options = std::ffi::CString::new(options).unwrap();
    match mount("diffdisk-test", place, kind, MountFlags::empty(), options.as_c_str()) {
        Ok(()) => Some(Mounted(place.to_owned())),
        Err(e) => {
            eprintln!("skipped: {kind} cannot be mounted here: {e}");
            None
        }
    }
}

pub(crate) fn tmpfs(place: &Path, options: &str) -> Option<Mounted> {
    mounted("tmpfs", place, options)
}
