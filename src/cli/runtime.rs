//! The runtime folder: where live journals are, for the daemon that keeps them and the tool that minds them.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where it is unless told otherwise: `/run/diffdisk` for root, else in the user's own runtime folder.
pub(super) fn default_folder() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(PathBuf::from("/run/diffdisk"));
    }
    std::env::var_os("XDG_RUNTIME_DIR").map(|folder| Path::new(&folder).join("diffdisk"))
}

/// Makes the folder if it is not there, for its owner alone.
///
/// # Errors
/// `Io`.
pub(super) fn make(folder: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|e| Error::io("cannot make the runtime folder", e).at_path(folder))
}
