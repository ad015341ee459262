//! A runtime folder of a test's own, so that live journals of one test are not found by another whose file system hands
//! out the same inode numbers.

use tempfile::TempDir;

/// The folder, and the option that names it.
pub(crate) struct Runtime {
    _folder: TempDir,
    option: String,
}

impl Runtime {
    /// An empty one, in memory.
    pub(crate) fn new() -> Runtime {
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let option = format!("--runtime-dir={}", folder.path().display());
        Runtime { _folder: folder, option }
    }

    /// For both programs.
    pub(crate) fn option(&self) -> &str {
        &self.option
    }
}
