//! Kills the real program at every failpoint; shared by the tests of `resize`, `compact`, `flatten` and `rebase`.

use std::path::{Path, PathBuf};

use diffdisk::storage::sim::SimHost;

use crate::common::temp::{self, is_temporary};
use crate::common::tool::diffdisk;
use crate::failpoints;
use crate::fixture::Fixture;
use crate::sweep::FOLDER;

/// A command line to kill: `setup` makes the images, and `args` is run in their folder.
pub(crate) struct KillCase<'a> {
    pub(crate) name: &'a str,
    pub(crate) setup: &'a dyn Fn(&Fixture<'_>),
    pub(crate) args: &'a [&'a str],
    /// Images to check, each with its disk before and after the verb.
    pub(crate) expected: Vec<(&'a str, Vec<u8>, Vec<u8>)>,
}

/// Reads a disk by `diffdisk convert`.
pub(crate) fn read_disk(path: &Path) -> Vec<u8> {
    diffdisk(["convert".as_ref(), path.as_os_str(), "-".as_ref(), "--to".as_ref(), "raw".as_ref()]).ok().stdout
}

impl KillCase<'_> {
    fn args(&self, folder: &Path) -> Vec<PathBuf> {
        let in_folder = |arg: &&str| if arg.ends_with(".vhd") { folder.join(arg) } else { PathBuf::from(arg) };
        self.args.iter().map(in_folder).collect()
    }

    /// Makes the images on a simulated host and copies them to `folder`. If this process opened them in `folder`, a
    /// program that another test starts at the same time could hold the locks on them for a moment.
    fn make(&self, folder: &Path) {
        let host = SimHost::new(3);
        (self.setup)(&Fixture::new(&host, Path::new(FOLDER)));
        for path in host.names() {
            let bytes = host.bytes(&path).expect("it is there");
            std::fs::write(folder.join(path.file_name().expect("a name")), bytes).expect("a copy");
        }
    }

    /// Kills the program at a failpoint, checks the images, runs the program again, and checks the final images.
    /// Returns whether the failpoint was reached.
    fn kill(&self, point: &str) -> bool {
        let folder = temp::scratch("verbs");
        self.make(folder.path());
        let killed = failpoints::killed(point, 1, self.args(folder.path()));
        if killed {
            for (name, old, new) in &self.expected {
                let seen = read_disk(&folder.path().join(name));
                assert!(
                    seen == *old || seen == *new,
                    "{}: killed at {point}: {name} shows neither the old nor the new disk",
                    self.name
                );
            }
        }
        diffdisk(self.args(folder.path())).ok();
        for (name, _, new) in &self.expected {
            let path = folder.path().join(name);
            assert!(read_disk(&path) == *new, "{}: after {point}: {name} does not show the new disk", self.name);
            diffdisk(["check".as_ref(), path.as_os_str(), "--chain".as_ref()]).ok();
        }
        for entry in std::fs::read_dir(folder.path()).expect("a folder") {
            let path = entry.expect("an entry").path();
            assert!(!is_temporary(&path), "{}: {point} leaves {}", self.name, path.display());
        }
        killed
    }
}

/// Kills each case at each failpoint of the verbs. Each failpoint must be reached by at least one case.
pub(crate) fn kill_at_every_point(verbs: &[&str], acts: &[KillCase<'_>]) {
    for verb in verbs {
        let points = failpoints::of(verb);
        assert!(points.len() >= 6, "{verb} has only {} failpoints", points.len());
        for point in points {
            let reached = acts.iter().filter(|act| act.kill(&point)).count();
            assert!(reached > 0, "no case reaches {point}");
        }
    }
}
