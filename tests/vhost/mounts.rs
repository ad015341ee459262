//! File systems mounted by one test for its own duration. Mounting needs root; without root the test is skipped.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A mounted file system. Dropping this value unmounts it.
pub(crate) struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Mounts a file system of type `kind` at `place`. If mounting is not allowed, prints the reason and returns `None`.
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
