//! Temporary folders and files: where a test puts its own, and how unfinished files of the programs are recognised.
//!
//! `tempfile::tempdir` is for files that may lie anywhere, including sockets, whose paths must be short.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// Makes a folder below the target folder: on a real file system, on which holes are holes.
pub(crate) fn scratch(name: &str) -> TempDir {
    let within = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tempfile::Builder::new().prefix(name).tempdir_in(within).expect("a folder for the test")
}

/// Makes a folder on tmpfs.
pub(crate) fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a folder in memory")
}

/// A runtime folder of the test's own, on tmpfs as `/run` is. No other test finds its live journals, even if another file system
/// hands out the same inode numbers.
pub(crate) struct RuntimeDir {
    folder: TempDir,
    option: String,
}

impl RuntimeDir {
    /// Makes an empty one.
    pub(crate) fn new() -> RuntimeDir {
        let folder = in_memory();
        let option = format!("--runtime-dir={}", folder.path().display());
        RuntimeDir { folder, option }
    }

    /// The command-line option that names it, for both programs.
    pub(crate) fn option(&self) -> &str {
        &self.option
    }

    /// The folder itself.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Lists the journals in it.
    pub(crate) fn journals(&self) -> Vec<PathBuf> {
        let entries = self.path().read_dir().expect("the folder is there");
        entries.map(|entry| entry.expect("an entry").path()).collect()
    }
}

/// Returns whether a file is one that the programs are still writing and publish by a rename: its name begins with a dot.
pub(crate) fn is_temporary(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}
