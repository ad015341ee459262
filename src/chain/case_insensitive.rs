//! Case-insensitive look-up of a path below an open folder, as in Windows: each component is the exact name or, if
//! there is none, the only name that differs in case alone.
//!
//! The exact path is tried first, by one call that cannot leave the folder in which the look-up begins. After that,
//! each component is opened relative to the folder of the component before it. No symbolic link is followed.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Access, File, Folder};

/// Maximum number of names that are compared in one folder.
const MAX_NAMES_PER_FOLDER: usize = 100_000;
/// Maximum number of names that are compared for one chain.
const MAX_NAMES_PER_CHAIN: usize = 1_000_000;

/// The result of a look-up.
pub(super) enum Lookup {
    /// The file.
    File(File),
    /// There is no file, for this reason.
    Absent(String),
}

/// The number of names that may still be compared.
pub(super) struct NameBudget {
    per_folder: usize,
    left: Cell<usize>,
}

impl Default for NameBudget {
    fn default() -> NameBudget {
        NameBudget { per_folder: MAX_NAMES_PER_FOLDER, left: Cell::new(MAX_NAMES_PER_CHAIN) }
    }
}

/// Looks up the file at the path `below`, relative to `folder`.
///
/// # Errors
/// - `Refused` if the path contains a symbolic link or does not lead to a regular file
/// - `Unsupported` if the kernel has no openat2
/// - `Io`
pub(super) fn look_up_ignoring_case(folder: &Folder, below: &Path, budget: &NameBudget) -> Result<Lookup> {
    match folder.open_beneath(below) {
        Err(e) if is_missing(&e) => {}
        found => return found.map(Lookup::File),
    }
    let mut parts = Vec::new();
    for part in below.components() {
        match part {
            Component::Normal(name) => parts.push(name),
            _ => return Ok(Lookup::Absent("not there".to_owned())),
        }
    }
    let Some((last, above)) = parts.split_last() else { return Ok(Lookup::Absent("not there".to_owned())) };
    let mut at = folder.clone();
    for name in above {
        match open_component(&at, name, budget, |name| at.subfolder(name))? {
            Ok(next) => at = next,
            Err(why) => return Ok(Lookup::Absent(why)),
        }
    }
    let file = open_component(&at, last, budget, |name| at.open(name, Access::Read))?;
    Ok(file.map_or_else(Lookup::Absent, Lookup::File))
}

/// Opens the exact name or, if there is none, the only name that differs in case alone. The inner error is the reason
/// why there is no such name.
fn open_component<T>(
    at: &Folder,
    name: &OsStr,
    budget: &NameBudget,
    open: impl Fn(&OsStr) -> Result<T>,
) -> Result<Result<T, String>> {
    match open(name) {
        // The exact name exists, but is not a folder.
        Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => return Ok(Err("not there".to_owned())),
        Err(e) if is_missing(&e) => {}
        found => return found.map(Ok),
    }
    let other = match budget.only_match(at, name) {
        Ok(other) => other,
        Err(why) => return Ok(Err(why)),
    };
    match open(&other) {
        Err(e) if is_missing(&e) => Ok(Err("not there".to_owned())),
        found => found.map(Ok),
    }
}

impl NameBudget {
    /// The only name in the folder that differs from `name` in case alone.
    fn only_match(&self, at: &Folder, name: &OsStr) -> Result<OsString, String> {
        let most = self.per_folder.min(self.left.get());
        let names = match at.list_at_most(most) {
            Ok(Some(names)) => names,
            Ok(None) => {
                self.left.set(self.left.get() - most);
                let folder = at.path().display();
                return Err(format!("not there in this case, and too many names to compare in {folder}"));
            }
            // The folder may be searched but not listed.
            Err(e) => return Err(format!("not there in this case, and {}", e.line())),
        };
        self.left.set(self.left.get() - names.len());
        let mut alike = names.into_iter().filter(|other| eq_ignoring_case(other, name));
        match (alike.next(), alike.next()) {
            (Some(only), None) => Ok(only),
            (None, _) => Err("not there".to_owned()),
            (Some(one), Some(other)) => {
                let (one, other) = (one.display(), other.display());
                Err(format!("not there in this case, and both {one} and {other} differ from it in case alone"))
            }
        }
    }
}

/// Whether an error means that there is no such file.
fn is_missing(e: &Error) -> bool {
    e.kind() == ErrorKind::NotFound || matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ENAMETOOLONG))
}

fn eq_ignoring_case(one: &OsStr, other: &OsStr) -> bool {
    match (one.to_str(), other.to_str()) {
        (Some(one), Some(other)) => one.chars().map(to_single_uppercase).eq(other.chars().map(to_single_uppercase)),
        _ => one.as_bytes().eq_ignore_ascii_case(other.as_bytes()),
    }
}

/// The upper case of a letter if it is a single letter, as in the upcase table of NTFS.
fn to_single_uppercase(letter: char) -> char {
    let mut upper = letter.to_uppercase();
    match (upper.next(), upper.next()) {
        (Some(one), None) => one,
        _ => letter,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::storage::Env;
    use crate::storage::host::Host;

    fn found(root: &Path, below: &str, budget: &NameBudget) -> String {
        match look_up_ignoring_case(&Host.folder(root).unwrap(), Path::new(below), budget) {
            Ok(Lookup::File(file)) => file.path().strip_prefix(root).unwrap().display().to_string(),
            Ok(Lookup::Absent(why)) => format!("({why})"),
            Err(e) => format!("{:?}", e.kind()),
        }
    }

    #[test]
    fn an_exact_name_wins_over_a_unique_match() {
        let d = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("f.vhd"), "x").unwrap();
        for folder in ["Gold/Sub", "two", "TWO", "gold2"] {
            fs::create_dir_all(d.path().join(folder)).unwrap();
        }
        for file in
            ["Gold/Sub/Base.VHD", "Gold/b.vhd", "Gold/B.vhd", "TWO/f.vhd", "gold2/\u{c4}.vhd", "gold2/stra\u{df}e"]
        {
            fs::write(d.path().join(file), "x").unwrap();
        }
        symlink(outside.path(), d.path().join("Link")).unwrap();
        symlink("b.vhd", d.path().join("Gold/FileLink")).unwrap();
        let look = |below: &str| found(d.path(), below, &NameBudget::default());
        for (below, file) in [
            ("Gold/Sub/Base.VHD", "Gold/Sub/Base.VHD"),
            ("gOLD/sUB/base.vhd", "Gold/Sub/Base.VHD"),
            ("gold/b.vhd", "Gold/b.vhd"),
            ("gold/B.vhd", "Gold/B.vhd"),
            ("GOLD2/\u{e4}.VHD", "gold2/\u{c4}.vhd"),
            ("gold2/STRA\u{df}E", "gold2/stra\u{df}e"),
            // An exact match of a folder is used, even if another folder has the file.
            ("TWO/F.VHD", "TWO/f.vhd"),
            ("two/f.vhd", "(not there)"),
            ("gold/Sub/other.vhd", "(not there)"),
            ("gold2/STRASSE", "(not there)"),
            ("gold/b.vhd/x", "(not there)"),
            ("link/f.vhd", "Refused"),
            ("gold/filelink", "Refused"),
            ("gold/sub", "Refused"),
            ("gold/../two/f.vhd", "(not there)"),
        ] {
            assert_eq!(look(below), file, "{below}");
        }
        for (below, one) in [("gold/B.VHD", "B.vhd"), ("Two/f.vhd", "TWO")] {
            let why = look(below);
            assert!(why.contains(one) && why.contains("differ from it in case alone"), "{below}: {why}");
        }
        assert!(eq_ignoring_case(OsStr::from_bytes(b"\xFFa"), OsStr::from_bytes(b"\xFFA")));
        assert!(!eq_ignoring_case(OsStr::from_bytes(b"\xFFa"), OsStr::from_bytes(b"\xFEa")));
    }

    #[test]
    fn the_number_of_compared_names_is_limited() {
        let d = tempfile::tempdir().unwrap();
        for name in 0..10 {
            fs::write(d.path().join(format!("file{name}")), "x").unwrap();
        }
        let look = |budget: &NameBudget| found(d.path(), "FILE3", budget);
        let budget = |folder, left| NameBudget { per_folder: folder, left: Cell::new(left) };
        assert_eq!(look(&budget(10, 10)), "file3");
        assert!(look(&budget(9, 100)).contains("too many names"));
        let together = budget(10, 25);
        assert_eq!([look(&together), look(&together)], ["file3", "file3"]);
        assert!(look(&together).contains("too many names") && together.left.get() == 0);
        assert_eq!(found(d.path(), "file3", &together), "file3", "an exact name costs nothing");
    }
}
