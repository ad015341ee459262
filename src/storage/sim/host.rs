//! The simulated machine as tests control it: crashes, kills, faults, clock.

use std::path::PathBuf;

use uuid::Uuid;

use super::crash::survivors;
use super::inode::InodeChange;
use super::machine::SimMachine;
use super::shared::SharedMachine;
use super::torn_write::Tear;
use super::types::{CompletionOrder, DurableUnit, FaultPlan, StepCounts};
use crate::mutant::{self, Mutant};
use crate::random::Random;

/// Simulated machine, as the [module page](super) describes it. Clones refer to the same machine.
#[derive(Clone, Debug)]
pub struct SimHost(pub(super) SharedMachine);

impl SimHost {
    /// Creates an empty machine.
    pub fn new(seed: u64) -> SimHost {
        SimHost::from(SimMachine::new(Random::new(seed)))
    }

    pub(super) fn from(machine: SimMachine) -> SimHost {
        SimHost(SharedMachine::new(machine))
    }

    /// Returns all changes that are not durable, in order: names, then, for each file by its number, the changes of the
    /// file and the effects of its operations in flight.
    pub fn unsynced(&self) -> Vec<DurableUnit> {
        let mut units = Vec::new();
        survivors(&self.0.lock(), &mut |_, _| None, &mut |_, unit| {
            units.push(unit());
            false
        });
        units
    }

    /// Returns the machine after a power cut. `survives` decides about each unit by its index in
    /// [`unsynced`](Self::unsynced). This machine keeps running, so any number of outcomes can be tried from the same
    /// state.
    pub fn crash_with(&self, survives: &dyn Fn(usize) -> bool) -> SimHost {
        self.crash_torn(survives, &mut |_, _| None)
    }

    /// Like [`crash_with`](Self::crash_with), but `tear` may replace overwritten sectors by mixtures of old and new
    /// bytes.
    pub fn crash_torn(&self, survives: &dyn Fn(usize) -> bool, tear: Tear<'_>) -> SimHost {
        // `survives` is called before the machine is locked, since it may use the machine.
        let mut fates = (0..self.unsynced().len()).map(survives).collect::<Vec<_>>().into_iter();
        let machine = self.0.lock();
        let (names, inodes) = survivors(&machine, tear, &mut |_, _| fates.next().expect("one fate for each unit"));
        let next = machine.after_power_cut(inodes, names);
        SimHost::from(next)
    }

    /// Cuts the power: ends this machine and returns the machine after the crash. The survivors are drawn from
    /// `random`: many, few, or about half of the units. In some crashes pages of 4 KiB survive or vanish as a whole, in
    /// others sector by sector.
    pub fn crash(&self, random: &mut Random) -> SimHost {
        let (yes, whole_pages, salt) = (random.below(9), random.chance(1, 4), random.next_u64());
        let units = self.unsynced();
        let fate = |i: usize| {
            let place = match &units[i] {
                DurableUnit::Sector(inode, sector) if whole_pages => inode << 32 ^ (sector / 8),
                _ => i as u64 | 1 << 63,
            };
            Random::new(salt ^ place.wrapping_mul(0xD6E8_FEB8_6659_FD93)).chance(yes, 8)
        };
        let next = self.crash_with(&fate);
        if mutant::enabled(Mutant::IgnoreBootId) {
            next.0.lock().shm = self.0.lock().shm_copy();
        }
        self.halt();
        next
    }

    /// Kills the process: ends this machine and returns the machine that the next process finds. Each sector of an
    /// operation in flight was either written or not, except that a write which extends the file is atomic.
    pub fn kill(&self, random: &mut Random) -> SimHost {
        let mut machine = self.0.lock();
        let (mut inodes, names) = (machine.inodes.clone(), machine.names.clone());
        for op in std::mem::take(&mut machine.in_flight).into_values() {
            let Some(effect) = op.effect() else { continue };
            let seq = machine.next_number();
            let inode = inodes.get_mut(&op.inode).expect("files live as long as the machine");
            let (yes, changes) = (random.below(5), inode.changes(effect));
            // In the page cache a new length appears together with the bytes that caused it: a write that grows the
            // file is atomic.
            let as_one = changes.iter().any(|c| matches!(c, InodeChange::Len(_))).then(|| random.chance(yes, 4));
            for change in changes {
                if as_one.unwrap_or_else(|| random.chance(yes, 4)) {
                    inode.apply(seq, change);
                }
            }
        }
        let next = machine.after_kill(inodes, names);
        machine.dead = true;
        SimHost::from(next)
    }

    /// Returns an independent copy of the machine, including its shared memory.
    pub fn fork(&self) -> SimHost {
        let machine = self.0.lock();
        let mut copy = machine.clone();
        copy.shm = machine.shm_copy();
        SimHost::from(copy)
    }

    /// Makes every later call fail.
    pub fn halt(&self) {
        self.0.lock().dead = true;
    }

    /// Returns whether the machine has ended: by `halt`, `crash` or `kill`, or at the step set by
    /// [`stop_at`](Self::stop_at).
    pub fn is_dead(&self) -> bool {
        self.0.lock().dead
    }

    /// Ends the machine at the beginning of step number `step`, counted from 1.
    pub fn stop_at(&self, step: u64) {
        self.0.lock().stop_at = Some(step);
    }

    /// Sets the faults to inject from now on.
    pub fn set_faults(&self, plan: FaultPlan) {
        self.0.lock().faults = plan;
    }

    /// Sets whether engines find some of the data in the page cache and copy it.
    pub fn set_cached_reads(&self, enabled: bool) {
        self.0.lock().cached_reads = enabled;
    }

    /// Sets the order in which operations complete.
    pub fn set_order(&self, order: CompletionOrder) {
        self.0.lock().order = order;
    }

    /// Advances the clock.
    pub fn advance_clock(&self, seconds: i64) {
        self.0.lock().clock += seconds;
    }

    /// Turns this machine into another one that has the same files mounted, with another machine id, another boot id
    /// and no shared memory.
    pub fn move_to_another_machine(&self, number: u128) {
        let mut machine = self.0.lock();
        (machine.machine_id, machine.boot_id) = (Uuid::from_u128(number), Uuid::from_u128(number));
        machine.shm.clear();
    }

    /// Returns the names of all shared memory.
    pub fn shm_names(&self) -> Vec<PathBuf> {
        self.0.lock().shm.keys().cloned().collect()
    }

    /// Returns the number of steps so far.
    pub fn counts(&self) -> StepCounts {
        self.0.lock().counts
    }
}
