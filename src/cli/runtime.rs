//! The runtime folder: where live journals are, for the daemon that keeps them and the tool that minds them.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::host::Host;
use crate::storage::{Env, Runtime};

/// What `statfs` says of tmpfs (linux/magic.h).
const TMPFS: i64 = 0x0102_1994;

/// The folder for a daemon, made if it is not there; `None`, with a warning, if acknowledged writes cannot outlive the process
/// there.
///
/// # Errors
/// The folder that was asked for cannot be used. One of the default name is passed over: another user may have made it.
pub(super) fn for_daemon(asked: Option<&Path>) -> Result<Option<Runtime>> {
    let Some(folder) = asked.map(Path::to_path_buf).or_else(default_folder) else {
        log::warn!("no runtime folder: each write is made durable before it is answered; see --runtime-dir");
        return Ok(None);
    };
    match make(&folder).and_then(|()| Host.runtime(&folder)) {
        Ok(runtime) => Ok(Some(runtime)),
        Err(e) if asked.is_none() || e.kind() == ErrorKind::Unsupported => {
            log::warn!("no live journal: {}; each write is made durable before it is answered", e.line());
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// The folder for a tool; `None` if there is none.
///
/// # Errors
/// The folder that was asked for is there and cannot be used.
pub(super) fn for_tool(asked: Option<&Path>) -> Result<Option<Runtime>> {
    let Some(folder) = asked.map(Path::to_path_buf).or_else(default_folder) else { return Ok(None) };
    match Host.runtime(&folder) {
        Ok(runtime) => Ok(Some(runtime)),
        Err(e) if asked.is_none() || e.kind() == ErrorKind::NotFound => {
            log::debug!("no runtime folder: {}", e.line());
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Where it is unless told otherwise: `/run/diffdisk` for root, else in the user's own runtime folder; where those are not
/// in memory (containers), in `/dev/shm`. `None` where nothing is.
fn default_folder() -> Option<PathBuf> {
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
fn make(folder: &Path) -> Result<()> {
    let failed = |e| Error::io("cannot make the runtime folder", e).at_path(folder);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)
}
