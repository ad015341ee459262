//! `merge` on the simulated host: kills and power cuts at every step, and several in a row; a fault at every step;
//! every amount of free space.

use std::path::{Path, PathBuf};

use diffdisk::chain::Policy;
use diffdisk::error::{ErrorKind, Result};
use diffdisk::ops::merge::{Merged, PreparedMerge};
use diffdisk::storage::Env;
use diffdisk::storage::sim::{Fault, FaultPlan, Random, SimHost};

use crate::chain_spec::{check_disk, defects};
use crate::common::rng::seed_or;
use crate::merge_cases::{MergeCase, all};

fn folder() -> &'static Path {
    Path::new("/disk")
}

impl MergeCase {
    fn at(&self, layer: usize) -> PathBuf {
        self.chain.path(folder(), layer)
    }

    fn host(&self) -> SimHost {
        let host = SimHost::new(1);
        self.chain.build(&host, folder()).expect("a chain");
        host.crash_with(&|_| true)
    }

    fn merge(&self, host: &SimHost) -> Result<Merged> {
        let into = self.at(self.into);
        let into = (self.merged_layers.len() > 1).then_some(into.as_path());
        PreparedMerge::prepare(host, &self.at(self.merged_layers[0]), into, false, &Policy::default())?
            .run(&mut |_| Ok(()))
    }

    /// Checks that CHILD and the kept descendants show the same disks as before the merge. If CHILD is removed, the
    /// receiver must show the disk of CHILD.
    fn check(&self, host: &SimHost) -> Result<(), String> {
        for &kept in &self.kept {
            check_disk(host, &self.at(kept), &self.chain.expected(kept))?;
        }
        let child = self.merged_layers[0];
        let (shows, here) = (self.chain.expected(child), host.exists(&self.at(child)));
        if here {
            check_disk(host, &self.at(child), &shows)
        } else {
            check_disk(host, &self.at(self.into), &self.shown())
        }
    }

    /// Returns the disk that the receiver shows after the merge.
    fn shown(&self) -> Vec<u8> {
        let mut shows = self.chain.expected(self.merged_layers[0]);
        shows.resize(usize::try_from(self.chain.sectors(self.into)).expect("small"), 0);
        shows
    }

    /// Checks that the merge is complete, that no other file is left, and that no image has a defect.
    fn check_done(&self, host: &SimHost) -> Result<(), String> {
        self.check(host)?;
        let left = (0..self.chain.layers.len()).filter(|layer| !self.merged_layers.contains(layer));
        let mut left: Vec<PathBuf> = left.map(|layer| self.at(layer)).collect();
        let mut names = host.names();
        left.sort();
        names.sort();
        if left != names {
            return Err(format!("there are {names:?}, expected {left:?}"));
        }
        for path in &left {
            let found = defects(host, path).map_err(|e| e.line())?;
            if !found.is_empty() {
                return Err(format!("{}: {found:?}", path.display()));
            }
        }
        Ok(())
    }

    /// Runs the merge again. The second run must complete the merge, unless the first one had completed it.
    fn end(&self, host: &SimHost) -> Result<(), String> {
        match self.merge(host) {
            Ok(_) => {}
            // The first merge was complete but had not returned.
            Err(e) if e.kind() == ErrorKind::NotFound && !host.exists(&self.at(self.merged_layers[0])) => {}
            Err(e) => return Err(format!("the second merge: {}", e.line())),
        }
        self.check_done(host)
    }
}

/// Returns the number of steps of a complete merge.
fn steps(case: &MergeCase) -> u64 {
    let host = case.host();
    let before = host.counts().steps;
    case.merge(&host).expect("a merge");
    let steps = host.counts().steps - before;
    assert_eq!(before, 0, "building the chain counts as steps");
    case.check_done(&host).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    steps
}

#[test]
fn power_cuts_at_every_step() {
    let mut ends = 0;
    for case in all(1) {
        let steps = steps(&case);
        let mut random = Random::new(steps);
        for step in 1..=steps {
            let host = case.host();
            host.stop_at(step);
            let ended = case.merge(&host);
            assert!(ended.is_err() || step == steps, "{}: complete although stopped at {step}", case.name);
            for fate in 0..6 {
                let after = match fate {
                    0 => host.crash_with(&|_| false),
                    1 => host.crash_with(&|_| true),
                    2 => host.crash_with(&|unit| unit % 2 == 0),
                    3 => host.crash_with(&|unit| unit % 2 == 1),
                    4 => host.kill(&mut random),
                    _ => host.crash(&mut random),
                };
                let fine = case.check(&after).and_then(|()| case.end(&after));
                fine.unwrap_or_else(|e| panic!("{}, step {step} of {steps}, outcome {fate}: {e}", case.name));
                ends += 1;
            }
        }
    }
    println!("{ends} kills and power cuts");
    assert!(ends > 10_000);
}

#[test]
fn crashes_in_a_row() {
    let cases = all(1);
    let lengths: Vec<u64> = cases.iter().map(steps).collect();
    let mut random = Random::new(seed_or(20_061_111));
    let rounds = std::env::var("DIFFDISK_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(600);
    for round in 0..rounds {
        let number = random.index(cases.len());
        let (case, mut host) = (&cases[number], cases[number].host());
        let mut trace = Vec::new();
        for _ in 0..2 + random.below(6) {
            let stop = 1 + random.below(lengths[number]);
            host.stop_at(stop);
            let ended = case.merge(&host).map_err(|e| e.kind());
            trace.push((stop, ended.is_ok()));
            host.halt();
            host = if random.chance(1, 3) { host.kill(&mut random) } else { host.crash(&mut random) };
            case.check(&host).unwrap_or_else(|e| panic!("{}, round {round}, {trace:?}: {e}", case.name));
            if !host.exists(&case.at(case.merged_layers[0])) && ended.is_ok() {
                break;
            }
        }
        case.end(&host).unwrap_or_else(|e| panic!("{}, round {round}, {trace:?}: {e}", case.name));
    }
}

#[test]
fn every_step_fails_once() {
    for case in all(1) {
        let steps = steps(&case);
        let mut random = Random::new(steps);
        for fault in [Fault::Io, Fault::NoSpace, Fault::Short] {
            for step in 1..=steps {
                let host = case.host();
                host.set_faults(FaultPlan { fail: vec![(step, fault)], ..FaultPlan::default() });
                let outcome = case.merge(&host).map_err(|e| e.line());
                let tell = |e: String| panic!("{}, step {step} is {fault:?}, {outcome:?}: {e}", case.name);
                let after = host.kill(&mut random);
                let done = if outcome.is_ok() { case.check_done(&after) } else { case.check(&after) };
                done.and_then(|()| case.end(&after)).unwrap_or_else(tell);
            }
        }
    }
}

#[test]
fn every_amount_of_free_space() {
    for case in all(1) {
        let taken = |host: &SimHost| {
            let size = |path: PathBuf| host.open(&path, diffdisk::storage::Access::Read)?.stat().map(|s| s.allocated);
            host.names().into_iter().map(|path| size(path).expect("a file")).sum::<u64>()
        };
        let mut failed = 0;
        for pages in 0.. {
            let host = case.host();
            let room = taken(&host) + pages * 4096;
            host.set_faults(FaultPlan { capacity: Some(room), ..FaultPlan::default() });
            let outcome = case.merge(&host);
            host.set_faults(FaultPlan::default());
            let tell = |e: String| panic!("{}, space for {pages} pages, {outcome:?}: {e}", case.name);
            let Err(e) = &outcome else {
                case.check_done(&host).unwrap_or_else(tell);
                break;
            };
            assert_eq!(e.kind(), ErrorKind::NoSpace, "{}: {}", case.name, e.line());
            case.check(&host).unwrap_or_else(tell);
            for layer in 0..case.chain.layers.len() {
                let found = defects(&host, &case.at(layer)).expect("it opens");
                assert!(found.is_empty(), "{}: layer {layer} has {found:?} with space for {pages} pages", case.name);
            }
            case.end(&host).unwrap_or_else(tell);
            failed += 1;
        }
        assert!(failed > 0, "{}: the merge needed no space", case.name);
    }
}
