//! Comparison of the image tool with other programs, and the targets of the comparison.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{self, Bound, Pace, Results};
use crate::run::{Run, run};

/// A program that takes part in a comparison. The function `prepare` makes the preparations for a run, which are not
/// measured, and returns the command to measure.
pub struct Candidate<'a> {
    system: &'static str,
    prepare: Box<dyn FnMut() -> Command + 'a>,
}

impl<'a> Candidate<'a> {
    pub fn new(system: &'static str, prepare: impl FnMut() -> Command + 'a) -> Candidate<'a> {
        Candidate { system, prepare: Box::new(prepare) }
    }
}

/// The folder of the test files, and all measurements.
pub struct Bench {
    pub pace: Pace,
    pub folder: PathBuf,
    pub results: Results<Run>,
}

impl Bench {
    pub fn new(pace: Pace) -> Bench {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it lies in the target folder");
        let folder = folder.join("bench/tools");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("the target folder can be written");
        Bench { pace, folder, results: Results::default() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Measures the candidates in rounds. `bytes` is the number of bytes that a run processes, or 0 if the run has no
    /// speed.
    pub fn compare(&mut self, work: &str, bytes: u64, candidates: Vec<Candidate<'_>>) {
        let folder = &self.folder;
        let measured = candidates.into_iter().map(|Candidate { system, mut prepare }| {
            harness::Candidate::new(system, move || {
                let mut command = prepare();
                sync_file_system(folder);
                Run { bytes, ..run(&mut command) }
            })
        });
        self.results.compare(work, self.pace.rounds, measured.collect());
    }

    /// Adds the target that `diffdisk` is at least `least` times as fast as `other`.
    pub fn require_speed(&mut self, work: &str, other: &str, least: f64) {
        let ratio = self.results.ratio(work, other, "diffdisk", |run| run.seconds);
        self.results.target(format!("{work}: speed of diffdisk / {other}"), ratio, Bound::AtLeast(least));
    }

    /// Adds the targets that `diffdisk` needs at most `seconds` and `mebibytes`.
    pub fn require_at_most(&mut self, work: &str, seconds: f64, mebibytes: f64) {
        let row = self.results.row(work, "diffdisk");
        let (took, had) = (row.median(|r| r.seconds), row.median(|r| r.mebibytes));
        self.results.target(format!("{work}: seconds"), took, Bound::AtMost(seconds));
        self.results.target(format!("{work}: resident MiB at its highest"), had, Bound::AtMost(mebibytes));
    }
}

/// Syncs the file system that contains `folder`.
fn sync_file_system(folder: &Path) {
    let folder = File::open(folder).expect("our own folder");
    rustix::fs::syncfs(&folder).expect("the file system can be synced");
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
