//! The failpoints, read from the sources.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the failpoints of a verb: every `failpoint::reached("VERB.…")` in the sources.
pub(crate) fn of(verb: &str) -> Vec<String> {
    let mut found = Vec::new();
    for path in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        let text = fs::read_to_string(&path).expect("a source file");
        for rest in text.split("point::reached(\"").skip(1) {
            let name = rest.split('"').next().expect("a name");
            if name.split('.').next() == Some(verb) {
                assert!(!found.iter().any(|n| n == name), "{name} is the name of two failpoints");
                found.push(name.to_owned());
            }
        }
    }
    assert!(!found.is_empty(), "{verb} has no failpoints");
    found
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    files.into_iter().chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}
