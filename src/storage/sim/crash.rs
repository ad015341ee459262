//! Computes the state of a machine after a crash from the changes that survive.

use std::collections::BTreeMap;

use super::inode::{Inode, InodeChange};
use super::machine::SimMachine;
use super::names::{InodeId, Names};
use super::torn_write::{self, Tear};
use super::types::DurableUnit;

/// Returns the names and files of a machine after a power cut. `survives` decides about each unit; it also gets the
/// number of the effect that changed the unit (0 for names).
pub(super) fn survivors(
    machine: &SimMachine,
    tear: Tear<'_>,
    survives: &mut dyn FnMut(u64, &dyn Fn() -> DurableUnit) -> bool,
) -> (Names, BTreeMap<InodeId, Inode>) {
    let kept: Vec<_> =
        machine.names.unsynced().filter(|c| survives(0, &|| DurableUnit::Name(c.name().to_path_buf()))).collect();
    let names = machine.names.after_crash(kept.into_iter());
    let mut inodes = BTreeMap::new();
    for (&id, inode) in &machine.inodes {
        let in_flight = machine.in_flight.iter().filter(|(_, op)| op.inode == id);
        let effects = in_flight.filter_map(|(number, op)| Some((*number, op.effect()?)));
        let landing: Vec<_> =
            effects.flat_map(|(n, effect)| inode.changes(effect).into_iter().map(move |c| (n, c))).collect();
        let mut all: Vec<_> = inode.unsynced().map(|(n, change)| (n, change.clone())).chain(landing).collect();
        torn_write::tear(inode, &mut all, tear);
        all.retain(|(n, c)| survives(*n, &|| unit(id, c)));
        inodes.insert(id, inode.after_crash(all.iter().map(|(_, change)| change)));
    }
    (names, inodes)
}

fn unit(id: InodeId, change: &InodeChange) -> DurableUnit {
    match change {
        InodeChange::Sector(at, _) => DurableUnit::Sector(id, *at),
        InodeChange::Len(len) => DurableUnit::Len(id, *len),
    }
}
