//! A simulated host: files that tear, names that get lost, faults on demand, and every order of completions, all from
//! one seed.
//!
//! What survives the end of a machine is a choice among *units*: each sector, each length and each name that was
//! changed since it was last made durable, and each sector of the operations under way. [`SimHost::crash_with`] takes
//! any choice, [`SimHost::crash`] one from the seed, [`SimHost::kill`] ends the process alone: what was complete stays,
//! what was under way landed or not. The new host knows none of the old handles; the old one is dead, its calls fail.
//!
//! The model is harsher than ext4, XFS and btrfs (crash-safety 3.2): a new length may survive without the bytes that
//! caused it, a punched sector may come back, an fsync of a file does not make its name durable. It is kinder in one
//! thing: a sector is old or new, and a rename is done or not.
//!
//! An engine of this host completes operations in `reap` (some) and `wait` (at least one), never by itself: it has no
//! fd to sleep on, and whoever drives it calls `wait` while operations are under way.

mod engine;
mod env;
mod file;
mod folder;
mod inode;
mod inspect;
mod machine;
mod metadata;
mod names;
mod rng;
mod runtime;
#[cfg(test)]
mod tests;
mod torn_write;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::env::absolute;
pub use self::file::SimFile;
pub use self::folder::SimFolder;
use self::inode::Inode;
use self::machine::{SimMachine, StepKind};
use self::names::InodeId;
pub use self::rng::Random;
pub use self::runtime::{SimRuntimeFolder, SimShm};
pub use self::torn_write::Tear;
use super::env::{Access, File};
use crate::error::{Error, Result};
use crate::mutant::{self, Mutant};

/// In which order operations complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CompletionOrder {
    /// In any, drawn from the seed; `reap` gives some of them.
    Any,
    /// As pushed; `reap` gives all.
    Pushed,
}

/// How a step fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// EIO. A sync that fails so forgets what it should have made durable: later syncs succeed without it.
    Io,
    /// ENOSPC.
    NoSpace,
    /// Half the sectors of a write land, then it fails with EIO; a read meets the end of the file; anything else fails with EIO.
    Short,
}

/// What goes wrong, and when.
#[derive(Clone, Default, Debug)]
pub struct FaultPlan {
    /// The steps that fail (counted from 1, see [`StepCounts::steps`]), and how.
    pub fail: Vec<(u64, Fault)>,
    /// The syncs of files (counted from 1) that say yes and do nothing.
    pub lying_syncs: Vec<u64>,
    /// The syncs of files (counted from 1) that fail with EIO.
    pub failing_syncs: Vec<u64>,
    /// The operations (counted from 1, as engines submit them) that complete after all others of their engine.
    pub late: Vec<u64>,
    /// Bytes that all files together may take.
    pub capacity: Option<u64>,
    /// The file system cannot reserve room.
    pub no_allocate: bool,
    /// A write to a page that was written before takes a new page, and gives the old one back afterwards.
    pub copy_on_write: bool,
    /// The file system has no files without names.
    pub no_unnamed: bool,
}

/// Steps so far: every call on files and names that a host could fail, and every operation of an engine.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct StepCounts {
    /// All of the below.
    pub steps: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Syncs of files.
    pub syncs: u64,
    /// Those of them that failed.
    pub failed_syncs: u64,
    /// Changes of lengths, reservations, holes, zeroed ranges.
    pub ranges: u64,
    /// Openings, creations, renames, links, removals.
    pub names: u64,
    /// Syncs of folders.
    pub dir_syncs: u64,
    /// Operations that engines submitted; each is counted above, too, when it completes.
    pub submitted: u64,
}

/// Something that survives a crash or not, whatever becomes of the rest. Units of one place are in order: the last that
/// survives wins.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DurableUnit {
    /// A sector of a file (inode, sector).
    Sector(u64, u64),
    /// The length of a file (inode, bytes).
    Len(u64, u64),
    /// A name.
    Name(PathBuf),
}

/// A machine, shared by its handles and engines.
#[derive(Clone, Debug)]
struct SharedMachine(Arc<Mutex<SimMachine>>);

impl SharedMachine {
    fn lock(&self) -> MutexGuard<'_, SimMachine> {
        // A test that fails while it holds the lock is told by its own message, not by the next one's.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_same(&self, other: &SharedMachine) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// See the module. Cloning it gives the same machine.
#[derive(Clone, Debug)]
pub struct SimHost(SharedMachine);

impl SimHost {
    /// An empty machine.
    pub fn new(seed: u64) -> SimHost {
        SimHost::from(SimMachine::new(Random::new(seed)))
    }

    fn from(world: SimMachine) -> SimHost {
        SimHost(SharedMachine(Arc::new(Mutex::new(world))))
    }

    /// What is not durable now, in the order it happened: names, then files by number, then what is under way.
    pub fn unsynced(&self) -> Vec<DurableUnit> {
        let mut units = Vec::new();
        survivors(&self.0.lock(), &mut |_, _| None, &mut |_, unit| {
            units.push(unit());
            false
        });
        units
    }

    /// The machine after a power cut in which the units (as [`unsynced`](Self::unsynced) lists them) survived that
    /// `survives` says. This machine goes on: any number of fates can be tried from one moment.
    pub fn crash_with(&self, survives: &dyn Fn(usize) -> bool) -> SimHost {
        self.crash_torn(survives, &mut |_, _| None)
    }

    /// The same, in which sectors that were being overwritten may be mixtures.
    pub fn crash_torn(&self, survives: &dyn Fn(usize) -> bool, tear: Tear<'_>) -> SimHost {
        // Asked before the machine is locked: the choice may look at it.
        let mut fates = (0..self.unsynced().len()).map(survives).collect::<Vec<_>>().into_iter();
        let world = self.0.lock();
        let (names, inodes) = survivors(&world, tear, &mut |_, _| fates.next().expect("one fate for each unit"));
        let heir = world.after_power_cut(inodes, names);
        SimHost::from(heir)
    }

    /// A power cut: the machine after it, and the end of this one. Much, little, or about half survives; in some
    /// crashes pages of 4 KiB stay whole, in others they are torn.
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
        let heir = self.crash_with(&fate);
        if mutant::enabled(Mutant::IgnoreBootId) {
            heir.0.lock().shm = self.0.lock().shm_copy();
        }
        self.halt();
        heir
    }

    /// The end of the process alone: the machine after it, in which operations under way landed or not, sector by
    /// sector.
    pub fn kill(&self, random: &mut Random) -> SimHost {
        let mut world = self.0.lock();
        let (mut inodes, names) = (world.inodes.clone(), world.names.clone());
        for op in std::mem::take(&mut world.in_flight).into_values() {
            let Some(effect) = op.effect() else { continue };
            let seq = world.next_number();
            let inode = inodes.get_mut(&op.inode).expect("files live as long as the machine");
            let (yes, changes) = (random.below(5), inode.changes(effect));
            // The page cache gets a new length only with the bytes that made it: a write that grows the file lands as one.
            let as_one = changes.iter().any(|c| matches!(c, inode::InodeChange::Len(_))).then(|| random.chance(yes, 4));
            for change in changes {
                if as_one.unwrap_or_else(|| random.chance(yes, 4)) {
                    inode.apply(seq, change);
                }
            }
        }
        let heir = world.after_kill(inodes, names);
        world.dead = true;
        SimHost::from(heir)
    }

    /// A machine that is the same in all, what lives in memory included, and goes its own way.
    pub fn fork(&self) -> SimHost {
        let world = self.0.lock();
        let mut twin = world.clone();
        twin.shm = world.shm_copy();
        SimHost::from(twin)
    }

    /// From now on every call fails.
    pub fn halt(&self) {
        self.0.lock().dead = true;
    }

    /// Whether it was ended: by hand, by a crash, or at its last step.
    pub fn is_dead(&self) -> bool {
        self.0.lock().dead
    }

    /// Ends the machine as step number `step` (counted from 1) begins.
    pub fn stop_at(&self, step: u64) {
        self.0.lock().stop_at = Some(step);
    }

    /// Says what goes wrong from now on.
    pub fn set_faults(&self, plan: FaultPlan) {
        self.0.lock().faults = plan;
    }

    /// Whether engines find some of what is read in memory, and copy it, if they can.
    pub fn set_cached_reads(&self, copies: bool) {
        self.0.lock().cached_reads = copies;
    }

    /// Says in which order operations complete.
    pub fn set_order(&self, order: CompletionOrder) {
        self.0.lock().order = order;
    }

    /// Lets so many seconds pass.
    pub fn advance_clock(&self, seconds: i64) {
        self.0.lock().clock += seconds;
    }

    /// Makes it another machine, as one on which the files are mounted, too: the boot is another, and nothing is in memory.
    pub fn move_to_another_machine(&self, number: u128) {
        let mut world = self.0.lock();
        (world.machine, world.boot) = (uuid::Uuid::from_u128(number), uuid::Uuid::from_u128(number));
        world.shm.clear();
    }

    /// The names of what outlives a process in memory.
    pub fn shm_names(&self) -> Vec<PathBuf> {
        self.0.lock().shm.keys().cloned().collect()
    }

    /// What happened so far.
    pub fn counts(&self) -> StepCounts {
        self.0.lock().counts
    }

    fn named<T>(
        &self,
        path: &Path,
        what: &str,
        call: impl FnOnce(&mut SimMachine, &Path) -> io::Result<T>,
    ) -> Result<T> {
        call(&mut self.0.lock(), &absolute(path)).map_err(|e| Error::io(what, e).at_path(path))
    }

    fn handle(
        &self,
        path: &Path,
        access: Access,
        find: impl FnOnce(&mut SimMachine, &Path) -> io::Result<InodeId>,
    ) -> Result<File> {
        let (number, inode) = self.named(path, "cannot open the file", |world, name| {
            world.step(StepKind::Name)?;
            let inode = find(world, name)?;
            Ok((world.next_number(), inode))
        })?;
        Ok(File::Sim(SimFile::new(&self.0, number, inode, access, path)))
    }
}

/// What is left of a machine: asks for each unit (with the number of the step that changed it; names have none) whether
/// it survives.
fn survivors(
    world: &SimMachine,
    torn: Tear<'_>,
    survives: &mut dyn FnMut(u64, &dyn Fn() -> DurableUnit) -> bool,
) -> (names::Names, BTreeMap<InodeId, Inode>) {
    let kept: Vec<_> =
        world.names.unsynced().filter(|c| survives(0, &|| DurableUnit::Name(c.name().to_path_buf()))).collect();
    let names = world.names.after_crash(kept.into_iter());
    let mut inodes = BTreeMap::new();
    for (&id, inode) in &world.inodes {
        let flying = world.in_flight.iter().filter(|(_, op)| op.inode == id);
        let effects = flying.filter_map(|(number, op)| Some((*number, op.effect()?)));
        let landing: Vec<_> =
            effects.flat_map(|(n, effect)| inode.changes(effect).into_iter().map(move |c| (n, c))).collect();
        let mut all: Vec<_> = inode.unsynced().map(|(n, change)| (n, change.clone())).chain(landing).collect();
        torn_write::tear(inode, &mut all, torn);
        all.retain(|(n, c)| survives(*n, &|| unit(id, c)));
        inodes.insert(id, inode.after_crash(all.iter().map(|(_, change)| change)));
    }
    (names, inodes)
}

fn unit(id: InodeId, change: &inode::InodeChange) -> DurableUnit {
    match change {
        inode::InodeChange::Sector(at, _) => DurableUnit::Sector(id, *at),
        inode::InodeChange::Len(len) => DurableUnit::Len(id, *len),
    }
}
