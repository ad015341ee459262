//! The failpoints of the verbs, read from the sources.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::tool::{DIFFDISK, run};

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

/// Runs `diffdisk` with `args` and kills it when it reaches `point` for the `count`-th time. Returns false if the
/// program succeeds without reaching `point` that often.
#[track_caller]
pub(crate) fn killed<S: AsRef<OsStr>>(point: &str, count: u32, args: impl IntoIterator<Item = S>) -> bool {
    let mut command = Command::new(DIFFDISK);
    let done = run(command.args(args).env("DIFFDISK_KILL_AT", format!("{point}:{count}")), Duration::from_secs(60));
    assert!(!done.killed, "{point}: hangs");
    assert!(matches!(done.code, None | Some(0)), "{point}: {}", done.stderr);
    done.code.is_none()
}

#[test]
fn a_verb_without_failpoints_is_an_error() {
    assert!(std::panic::catch_unwind(|| of("info")).is_err());
}
