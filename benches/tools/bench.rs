//! The image tool beside other programs at the same work, and what must come of it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{self, Bound, Pace, Results};
use crate::run::{Run, run};

/// A program that takes part in a comparison. Its function prepares a run, unmeasured, and returns the command to measure.
pub struct Candidate<'a> {
    system: &'static str,
    prepare: Box<dyn FnMut() -> Command + 'a>,
}

impl<'a> Candidate<'a> {
    pub fn new(system: &'static str, prepare: impl FnMut() -> Command + 'a) -> Candidate<'a> {
        Candidate { system, prepare: Box::new(prepare) }
    }
}

/// The folder of the files, and all that was measured.
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

    /// Measures the candidates in turn. `bytes` are the data in the work; 0 if a speed says nothing.
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

    /// `diffdisk` must be so many times as fast as `other`.
    pub fn require_speed(&mut self, work: &str, other: &str, least: f64) {
        let ratio = self.results.ratio(work, other, "diffdisk", |run| run.seconds);
        self.results.target(format!("{work}: speed of diffdisk / {other}"), ratio, Bound::AtLeast(least));
    }

    /// `diffdisk` must not take longer, nor more memory.
    pub fn require_at_most(&mut self, work: &str, seconds: f64, mebibytes: f64) {
        let row = self.results.row(work, "diffdisk");
        let (took, had) = (row.median(|r| r.seconds), row.median(|r| r.mebibytes));
        self.results.target(format!("{work}: seconds"), took, Bound::AtMost(seconds));
        self.results.target(format!("{work}: resident MiB at its highest"), had, Bound::AtMost(mebibytes));
    }
}

/// Waits until the file system has nothing more to write.
fn sync_file_system(folder: &Path) {
    let folder = File::open(folder).expect("our own folder");
    rustix::fs::syncfs(&folder).expect("the file system can be synced");
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
