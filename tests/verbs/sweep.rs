//! A verb on the simulated host: power cuts at every change, the end of the process at every step, a failure at every
//! step, a host that is full; each time what is left must be a sound image of the old disk or the new one, and the verb,
//! called again, must complete it.

use std::path::Path;

use diffdisk::error::Result;
use diffdisk::storage::Env;
use diffdisk::storage::sim::{DurableUnit, Fault, FaultPlan, Random, SimHost};

use crate::common::temp::is_temporary;
use crate::fixture::Fixture;

/// Where simulated images lie.
pub(crate) const FOLDER: &str = "/d";

/// What a verb is tried on.
pub(crate) struct SweepCase<'a> {
    /// For messages.
    pub(crate) name: &'a str,
    /// Makes the images.
    pub(crate) setup: &'a dyn Fn(&Fixture<'_>),
    /// The verb.
    pub(crate) verb: &'a dyn Fn(&dyn Env, &Path) -> Result<()>,
    /// Images to look at afterwards, and what each may show: at first, and when the verb is done.
    pub(crate) expected: Vec<(&'a str, Vec<u8>, Vec<u8>)>,
    /// A file's new length survives only with the bytes that made it, as on ext4, XFS and btrfs: what the growth of a
    /// fixed image, which has one footer, cannot do without.
    pub(crate) lengths_follow_data: bool,
}

fn is_len(unit: &DurableUnit) -> bool {
    matches!(unit, DurableUnit::Len(..))
}

/// Defects that a killed verb may leave: all of them go with the next writable open or the next call.
const TRANSIENT: [&str; 9] = [
    "fixed-more",
    "bits-beyond-disk",
    "front-footer-invalid",
    "trailing-footer-missing",
    "trailing-footer-invalid",
    "space-unreferenced",
    "block-beyond-disk",
    "footers-differ",
    "footer-kinds-differ",
];

impl SweepCase<'_> {
    fn host(&self) -> SimHost {
        let host = SimHost::new(7);
        (self.setup)(&Fixture::new(&host, Path::new(FOLDER)));
        host.crash_with(&|_| true)
    }

    fn call(&self, host: &SimHost) -> Result<()> {
        (self.verb)(host, Path::new(FOLDER))
    }

    /// What is left shows the old disk or the new one, and every rule is kept that counts.
    fn check(&self, host: &SimHost, when: &dyn Fn() -> String) {
        let scene = Fixture::new(host, Path::new(FOLDER));
        for (name, old, new) in &self.expected {
            let seen =
                scene.read_disk(name).unwrap_or_else(|e| panic!("{}: {}: {name}: {}", self.name, when(), e.line()));
            assert!(seen == *old || seen == *new, "{}: {}: {name} shows neither disk", self.name, when());
            let defects = scene.defects(name);
            let bad = defects.iter().find(|kind| !TRANSIENT.contains(kind));
            assert!(bad.is_none(), "{}: {}: {name}: {defects:?}", self.name, when());
        }
    }

    /// Called again, it is done, and nothing is wrong or left over.
    fn complete(&self, host: &SimHost, when: &dyn Fn() -> String) {
        self.call(host).unwrap_or_else(|e| panic!("{}: {}: called again: {}", self.name, when(), e.line()));
        let scene = Fixture::new(host, Path::new(FOLDER));
        for (name, _, new) in &self.expected {
            let seen =
                scene.read_disk(name).unwrap_or_else(|e| panic!("{}: {}: {name}: {}", self.name, when(), e.line()));
            assert!(seen == *new, "{}: {}: {name} is not what it should be", self.name, when());
            assert_eq!(scene.defects(name), [""; 0], "{}: {}: {name}", self.name, when());
        }
        let strange = host.names().into_iter().find(|name| is_temporary(name));
        assert_eq!(strange, None, "{}: {}", self.name, when());
    }

    /// All of it.
    pub(crate) fn sweep(&self) {
        let steps = self.without_faults();
        let cuts = self.power_cuts();
        self.kills(steps);
        self.failures(steps);
        self.full_hosts();
        println!("{}: {steps} steps, {cuts} power cuts", self.name);
    }

    /// It works, and works twice. The steps that it takes.
    fn without_faults(&self) -> u64 {
        let host = self.host();
        let scene = Fixture::new(&host, Path::new(FOLDER));
        for (name, old, _) in &self.expected {
            assert!(scene.read_disk(name).expect("it opens") == *old, "{}: {name} at first", self.name);
        }
        let before = host.counts().steps;
        self.call(&host).unwrap_or_else(|e| panic!("{}: {}", self.name, e.line()));
        let steps = host.counts().steps - before;
        self.complete(&host, &|| "a second time".to_owned());
        steps
    }

    fn power_cuts(&self) -> u64 {
        let host = self.host();
        host.start_recording();
        self.call(&host).expect("it works");
        let (mut random, mut cuts) = (Random::new(11), 0);
        for (number, moment) in host.take_recording().into_iter().enumerate() {
            for fate in 0..10 {
                // Nothing, all, or this and that of what is not durable.
                let bits = [0, u64::MAX]
                    .get(fate)
                    .copied()
                    .unwrap_or_else(|| random.next_u64() & random.next_u64() | random.next_u64());
                let units = moment.unsynced_steps();
                // The unit that decides: its own, or where that is asked for the length that came with it.
                let judge_of = |unit: usize| match self.lengths_follow_data && units[unit].0 != 0 {
                    true => {
                        units.iter().position(|(step, other)| *step == units[unit].0 && is_len(other)).unwrap_or(unit)
                    }
                    false => unit,
                };
                let after = moment.crash_with(&|unit| bits >> (judge_of(unit) % 61) & 1 == 1);
                let when = || format!("power cut before change {number}, fate {bits:x}");
                self.check(&after, &when);
                self.complete(&after, &when);
                cuts += 1;
            }
        }
        cuts
    }

    fn kills(&self, steps: u64) {
        let mut random = Random::new(13);
        for step in 1..=steps {
            let host = self.host();
            host.stop_at(host.counts().steps + step);
            // What comes behind its last change may fail, and nobody is told.
            let outcome = self.call(&host);
            assert!(host.is_dead(), "{}: it does not come to step {step}: {outcome:?}", self.name);
            let after = host.kill(&mut random);
            let when = || format!("killed at step {step}");
            self.check(&after, &when);
            self.complete(&after, &when);
        }
    }

    fn failures(&self, steps: u64) {
        for fault in [Fault::NoSpace, Fault::Io, Fault::Short] {
            for step in 1..=steps {
                let faults = |host: &SimHost| FaultPlan {
                    fail: vec![(host.counts().steps + step, fault)],
                    ..FaultPlan::default()
                };
                self.with_faults(faults, &format!("{fault:?} at step {step}"));
            }
        }
    }

    /// A call on a host with faults, and then the same without them. Whether it succeeded at first.
    fn with_faults(&self, faults: impl Fn(&SimHost) -> FaultPlan, what: &str) -> bool {
        let host = self.host();
        host.set_faults(faults(&host));
        let outcome = self.call(&host);
        host.set_faults(FaultPlan::default());
        let when = || format!("{what}, which ended in {outcome:?}");
        self.check(&host, &when);
        self.complete(&host, &when);
        outcome.is_ok()
    }

    /// Some pages of room more than there is taken, from none to enough.
    fn full_hosts(&self) {
        let taken = |host: &SimHost| -> u64 {
            let files = host.names().into_iter().map(|name| host.open(&name, diffdisk::storage::Access::Read));
            files.map(|file| file.expect("it opens").stat().expect("it is there").allocated).sum()
        };
        for pages in 0.. {
            let faults =
                |host: &SimHost| FaultPlan { capacity: Some(taken(host) + pages * 4096), ..FaultPlan::default() };
            if self.with_faults(faults, &format!("{pages} pages of room")) {
                return;
            }
        }
    }
}
