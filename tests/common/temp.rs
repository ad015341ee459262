//! Temporary folders of tests, and recognition of the programs' temporary files.
//!
//! `tempfile::tempdir` is for files that may lie anywhere, including sockets, whose paths must be short.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// Makes a folder below the target folder, whose file system must support holes.
pub(crate) fn scratch(name: &str) -> TempDir {
    let within = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tempfile::Builder::new().prefix(name).tempdir_in(within).expect("a folder for the test")
}

/// Makes a folder on tmpfs.
pub(crate) fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a folder in memory")
}

/// A runtime folder of one test, on tmpfs like `/run`. Other tests do not find the live journals in this folder.
pub(crate) struct RuntimeDir {
    folder: TempDir,
    option: String,
}

impl RuntimeDir {
    /// Makes an empty runtime folder.
    pub(crate) fn new() -> RuntimeDir {
        let folder = in_memory();
        let option = format!("--runtime-dir={}", folder.path().display());
        RuntimeDir { folder, option }
    }

    /// Returns the command-line option of both programs that selects this folder.
    pub(crate) fn option(&self) -> &str {
        &self.option
    }

    /// Returns the path of the folder.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the paths of all journals in the folder.
    pub(crate) fn journals(&self) -> Vec<PathBuf> {
        let entries = self.path().read_dir().expect("the folder is there");
        entries.map(|entry| entry.expect("an entry").path()).collect()
    }
}

/// Returns whether the file's name begins with a dot. The programs give such names to files that they later publish by
/// a rename.
pub(crate) fn is_temporary(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}
