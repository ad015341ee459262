//! What the tests of `resize`, `compact`, `flatten` and `rebase` share: killing the real program at every failpoint.

use std::path::{Path, PathBuf};

use diffdisk::storage::sim::SimHost;

use crate::common::temp::{self, is_temporary};
use crate::common::tool::diffdisk;
use crate::failpoints;
use crate::fixture::Fixture;
use crate::sweep::FOLDER;

/// What the program is killed in: the images are made by `setup`, and `args` is the command line in their folder.
pub(crate) struct KillCase<'a> {
    pub(crate) name: &'a str,
    pub(crate) setup: &'a dyn Fn(&Fixture<'_>),
    pub(crate) args: &'a [&'a str],
    /// Images to look at, and what they may show: at first, and when the verb is done.
    pub(crate) expected: Vec<(&'a str, Vec<u8>, Vec<u8>)>,
}

/// The disk, as `diffdisk convert` reads it.
pub(crate) fn read_disk(path: &Path) -> Vec<u8> {
    diffdisk(["convert".as_ref(), path.as_os_str(), "-".as_ref(), "--to".as_ref(), "raw".as_ref()]).ok().stdout
}

impl KillCase<'_> {
    fn args(&self, folder: &Path) -> Vec<PathBuf> {
        let in_folder = |arg: &&str| if arg.ends_with(".vhd") { folder.join(arg) } else { PathBuf::from(arg) };
        self.args.iter().map(in_folder).collect()
    }

    /// Makes the images on a simulated host and copies them: a lock of this process would live on for a moment in every
    /// program that another test starts meanwhile.
    fn make(&self, folder: &Path) {
        let host = SimHost::new(3);
        (self.setup)(&Fixture::new(&host, Path::new(FOLDER)));
        for path in host.names() {
            let bytes = host.bytes(&path).expect("it is there");
            std::fs::write(folder.join(path.file_name().expect("a name")), bytes).expect("a copy");
        }
    }

    /// Kills it at a failpoint, looks, and calls it again. Whether it came to that failpoint.
    fn kill(&self, point: &str) -> bool {
        let folder = temp::scratch("verbs");
        self.make(folder.path());
        let killed = failpoints::killed(point, 1, self.args(folder.path()));
        if killed {
            for (name, old, new) in &self.expected {
                let seen = read_disk(&folder.path().join(name));
                assert!(seen == *old || seen == *new, "{}: killed at {point}: {name} shows neither disk", self.name);
            }
        }
        diffdisk(self.args(folder.path())).ok();
        for (name, _, new) in &self.expected {
            let path = folder.path().join(name);
            assert!(read_disk(&path) == *new, "{}: after {point}: {name} is not what it should be", self.name);
            diffdisk(["check".as_ref(), path.as_os_str(), "--chain".as_ref()]).ok();
        }
        for entry in std::fs::read_dir(folder.path()).expect("a folder") {
            let path = entry.expect("an entry").path();
            assert!(!is_temporary(&path), "{}: {point} leaves {}", self.name, path.display());
        }
        killed
    }
}

/// Every failpoint of a verb is reached in one of its acts, and killing it there does no harm.
pub(crate) fn kill_at_every_point(verbs: &[&str], acts: &[KillCase<'_>]) {
    for verb in verbs {
        let points = failpoints::of(verb);
        assert!(points.len() >= 6, "{verb} has {} points", points.len());
        for point in points {
            let reached = acts.iter().filter(|act| act.kill(&point)).count();
            assert!(reached > 0, "no act reaches {point}");
        }
    }
}
