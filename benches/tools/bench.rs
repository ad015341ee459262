//! Contests: the same work by several programs in turn, and what must come of it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Pace;
use crate::run::{Run, run};
use crate::sample::median;
use crate::target::{Bound, Target};

/// All runs of one program at one work.
pub struct Row {
    pub work: String,
    pub system: String,
    /// Bytes of data in the work; 0 where that says nothing.
    pub bytes: u64,
    pub runs: Vec<Run>,
}

impl Row {
    pub fn median(&self, of: impl Fn(&Run) -> f64) -> f64 {
        median(self.runs.iter().map(of))
    }
}

/// One who takes part: makes ready for a run, unmeasured, and says what is to be run.
pub struct Candidate<'a> {
    system: &'static str,
    prepare: Box<dyn FnMut() -> Command + 'a>,
}

impl<'a> Candidate<'a> {
    pub fn new(system: &'static str, ready: impl FnMut() -> Command + 'a) -> Candidate<'a> {
        Candidate { system, prepare: Box::new(ready) }
    }
}

/// All that was measured.
pub struct Bench {
    pub pace: Pace,
    pub folder: PathBuf,
    pub rows: Vec<Row>,
    pub targets: Vec<Target>,
}

impl Bench {
    pub fn new(pace: Pace) -> Bench {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it lies in the target folder");
        let folder = folder.join("bench/tools");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("the target folder can be written");
        Bench { pace, folder, rows: Vec::new(), targets: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Has each run in turn.
    pub fn compare(&mut self, work: &str, bytes: u64, mut contestants: Vec<Candidate<'_>>) {
        let (first, count) = (self.rows.len(), contestants.len());
        for contestant in &contestants {
            let system = contestant.system.to_owned();
            self.rows.push(Row { work: work.to_owned(), system, bytes, runs: Vec::new() });
        }
        for round in 0..self.pace.rounds {
            for turn in 0..count {
                // Another begins in each round.
                let i = (round + turn) % count;
                let mut command = (contestants[i].prepare)();
                self.sync_file_system();
                self.rows[first + i].runs.push(run(&mut command));
            }
        }
    }

    /// Waits until the file system has nothing more to do.
    fn sync_file_system(&self) {
        let folder = File::open(&self.folder).expect("our own folder");
        rustix::fs::syncfs(&folder).expect("the file system can be synced");
    }

    pub fn row(&self, work: &str, system: &str) -> &Row {
        let found = self.rows.iter().find(|r| r.work == work && r.system == system);
        found.unwrap_or_else(|| panic!("{system} was not measured at {work}"))
    }

    /// How many times as fast as `other` one is: the median over neighbouring runs.
    pub fn speed(&self, work: &str, one: &str, other: &str) -> f64 {
        let (one, other) = (self.row(work, one), self.row(work, other));
        median(one.runs.iter().zip(&other.runs).map(|(one, other)| other.seconds / one.seconds))
    }

    /// `diffdisk` must be so many times as fast as `other`.
    pub fn require_speed(&mut self, work: &str, other: &str, least: f64) {
        let ratio = self.speed(work, "diffdisk", other);
        self.target(format!("{work}: speed of diffdisk / {other}"), ratio, Bound::AtLeast(least));
    }

    /// `diffdisk` must not take longer, nor more memory.
    pub fn require_at_most(&mut self, work: &str, seconds: f64, mebibytes: f64) {
        let row = self.row(work, "diffdisk");
        let (took, had) = (row.median(|r| r.seconds), row.median(|r| r.mebibytes));
        self.target(format!("{work}: seconds"), took, Bound::AtMost(seconds));
        self.target(format!("{work}: resident MiB at its highest"), had, Bound::AtMost(mebibytes));
    }

    fn target(&mut self, what: String, ratio: f64, bound: Bound) {
        self.targets.push(Target { what, ratio, bound });
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
