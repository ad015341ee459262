//! A verb on the simulated host: power cuts at every change, kills at every step, a fault at every step, full file
//! systems. Each time the image must be valid with the old or the new disk, and a second call of the verb must succeed.

use std::path::Path;
use std::sync::Arc;

use diffdisk::disk::{Disk, DiskOptions};
use diffdisk::error::Result;
use diffdisk::storage::Env;
use diffdisk::storage::sim::{DurableUnit, Fault, FaultPlan, Random, SimHost};

use crate::common::temp::is_temporary;
use crate::fixture::Fixture;

/// Folder of simulated images.
pub(crate) const FOLDER: &str = "/d";

/// A verb and its images.
pub(crate) struct SweepCase<'a> {
    /// Name of the case in messages.
    pub(crate) name: &'a str,
    /// Makes the images.
    pub(crate) setup: &'a dyn Fn(&Fixture<'_>),
    /// Calls the verb.
    pub(crate) verb: &'a dyn Fn(&dyn Env, &Path) -> Result<()>,
    /// Images to check, each with its disk before and after the verb.
    pub(crate) expected: Vec<(&'a str, Vec<u8>, Vec<u8>)>,
    /// Whether a file's new length survives only with the write that caused it, as on ext4, XFS and btrfs. Growth of a
    /// fixed image, which has one footer, needs this.
    pub(crate) lengths_follow_data: bool,
}

fn is_len(unit: &DurableUnit) -> bool {
    matches!(unit, DurableUnit::Len(..))
}

/// Defects that a killed verb may leave. The next writable open or the next call repairs them.
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

/// Opens an image for writing on a copy of a machine, as the daemon does. Returns the disk that the daemon would serve.
fn served(host: &SimHost, name: &str) -> std::result::Result<Vec<u8>, String> {
    let host = host.crash_with(&|_| true);
    let path = Path::new(FOLDER).join(name);
    let options = DiskOptions { allow_writable_parent: true, ..DiskOptions::new(&path) };
    let disk = Disk::open(Arc::new(host.clone()), &options).map_err(|e| e.line())?;
    disk.close().map_err(|e| e.line())?;
    drop(disk);
    Fixture::new(&host, Path::new(FOLDER)).read_disk(name).map_err(|e| e.line())
}

impl SweepCase<'_> {
    fn host(&self) -> SimHost {
        let host = SimHost::new(7);
        (self.setup)(&Fixture::new(&host, Path::new(FOLDER)));
        host.crash_with(&|_| true)
    }

    fn call(&self, host: &SimHost) -> Result<()> {
        (self.verb)(host, Path::new(FOLDER))
    }

    /// Checks that the images show the old or the new disk and have only transient defects.
    fn check(&self, host: &SimHost, when: &dyn Fn() -> String) {
        let fixture = Fixture::new(host, Path::new(FOLDER));
        for (name, old, new) in &self.expected {
            let seen =
                fixture.read_disk(name).unwrap_or_else(|e| panic!("{}: {}: {name}: {}", self.name, when(), e.line()));
            assert!(
                seen == *old || seen == *new,
                "{}: {}: {name} shows neither the old nor the new disk",
                self.name,
                when()
            );
            let disk =
                served(host, name).unwrap_or_else(|e| panic!("{}: {}: {name} is not served: {e}", self.name, when()));
            assert!(disk == seen, "{}: {}: {name} is served with another disk", self.name, when());
            let defects = fixture.defects(name);
            let bad = defects.iter().find(|kind| !TRANSIENT.contains(kind));
            assert!(bad.is_none(), "{}: {}: {name}: {defects:?}", self.name, when());
        }
    }

    /// Calls the verb again. The call must succeed and leave no defects and no temporary files.
    fn complete(&self, host: &SimHost, when: &dyn Fn() -> String) {
        self.call(host).unwrap_or_else(|e| panic!("{}: {}: called again: {}", self.name, when(), e.line()));
        let fixture = Fixture::new(host, Path::new(FOLDER));
        for (name, _, new) in &self.expected {
            let seen =
                fixture.read_disk(name).unwrap_or_else(|e| panic!("{}: {}: {name}: {}", self.name, when(), e.line()));
            assert!(seen == *new, "{}: {}: {name} does not show the new disk", self.name, when());
            assert_eq!(fixture.defects(name), [""; 0], "{}: {}: {name}", self.name, when());
        }
        let strange = host.names().into_iter().find(|name| is_temporary(name));
        assert_eq!(strange, None, "{}: {}", self.name, when());
    }

    /// Runs all parts of the sweep.
    pub(crate) fn sweep(&self) {
        let steps = self.without_faults();
        let cuts = self.power_cuts();
        self.kills(steps);
        self.failures(steps);
        self.full_hosts();
        println!("{}: {steps} steps, {cuts} power cuts", self.name);
    }

    /// Calls the verb twice without faults. Returns the number of steps of the first call.
    fn without_faults(&self) -> u64 {
        let host = self.host();
        let fixture = Fixture::new(&host, Path::new(FOLDER));
        for (name, old, _) in &self.expected {
            assert!(fixture.read_disk(name).expect("it opens") == *old, "{}: {name} at first", self.name);
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
                // None, all, or random ones of the unsynced units survive.
                let bits = [0, u64::MAX]
                    .get(fate)
                    .copied()
                    .unwrap_or_else(|| random.next_u64() & random.next_u64() | random.next_u64());
                let units = moment.unsynced_steps();
                // The unit whose bit decides whether `unit` survives: `unit` itself, or with `lengths_follow_data` the
                // length of the same step.
                let deciding_unit = |unit: usize| match self.lengths_follow_data && units[unit].0 != 0 {
                    true => {
                        units.iter().position(|(step, other)| *step == units[unit].0 && is_len(other)).unwrap_or(unit)
                    }
                    false => unit,
                };
                let after = moment.crash_with(&|unit| bits >> (deciding_unit(unit) % 61) & 1 == 1);
                let when = || format!("power cut before change {number}, survivors {bits:x}");
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
            // The verb may succeed if it ignores errors after its last change.
            let outcome = self.call(&host);
            assert!(host.is_dead(), "{}: step {step} is not reached: {outcome:?}", self.name);
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

    /// Calls the verb with faults, then without. Returns whether the first call succeeded.
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

    /// Calls the verb with every amount of free space, from none to enough.
    fn full_hosts(&self) {
        let taken = |host: &SimHost| -> u64 {
            let files = host.names().into_iter().map(|name| host.open(&name, diffdisk::storage::Access::Read));
            files.map(|file| file.expect("it opens").stat().expect("it is there").allocated).sum()
        };
        for pages in 0.. {
            let faults =
                |host: &SimHost| FaultPlan { capacity: Some(taken(host) + pages * 4096), ..FaultPlan::default() };
            if self.with_faults(faults, &format!("{pages} pages of free space")) {
                return;
            }
        }
    }
}
