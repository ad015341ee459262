//! The runtime folder: where live journals are, for the daemon that keeps them and the tool that minds them.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// What `statfs` says of tmpfs (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;

/// Where it is unless told otherwise: `/run/diffdisk` for root, else in the user's own runtime folder; where those are not
/// in memory (containers), in `/dev/shm`. `None` where nothing is.
pub(super) fn default_folder() -> Option<PathBuf> {
    let uid = rustix::process::geteuid();
    let own =
        if uid.is_root() { Some(PathBuf::from("/run")) } else { std::env::var_os("XDG_RUNTIME_DIR").map(Into::into) };
    if let Some(folder) = own.filter(|folder| in_memory(folder)) {
        return Some(folder.join("diffdisk"));
    }
    let shared = Path::new("/dev/shm");
    in_memory(shared).then(|| shared.join(format!("diffdisk-{}", uid.as_raw())))
}

fn in_memory(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|s| s.f_type == TMPFS)
}

/// Makes the folder if it is not there, for its owner alone.
///
/// # Errors
/// `Io`; `Refused` where it belongs to somebody else, who could take what is kept there away or make it up.
pub(super) fn make(folder: &Path) -> Result<()> {
    let failed = |e| Error::io("cannot make the runtime folder", e).at_path(folder);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let found = std::fs::symlink_metadata(folder).map_err(failed)?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        return Err(Error::new(ErrorKind::Refused, "the runtime folder belongs to somebody else").at_path(folder));
    }
    Ok(())
}
