//! Names of simulated files: current, durable, and the changes between.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// Number of a file.
pub(super) type InodeId = u64;

/// Change of the names. A rename is one change: it happens completely or not at all.
#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Set(PathBuf, InodeId),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf, InodeId),
}

impl NameChange {
    /// Returns the changed name; for a rename the new one.
    pub(super) fn name(&self) -> &Path {
        match self {
            NameChange::Set(name, _) | NameChange::Remove(name) | NameChange::Rename(_, name, _) => name,
        }
    }
}

type NameTable = BTreeMap<PathBuf, InodeId>;

/// Names of all files of a machine.
#[derive(Clone, Default, Debug)]
pub(super) struct Names {
    now: NameTable,
    durable: NameTable,
    log: Vec<NameChange>,
}

impl Names {
    pub(super) fn get(&self, name: &Path) -> Option<InodeId> {
        self.now.get(name).copied()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&Path, InodeId)> {
        self.now.iter().map(|(n, &i)| (n.as_path(), i))
    }

    pub(super) fn apply(&mut self, change: NameChange) {
        apply(&mut self.now, &change);
        self.log.push(change);
    }

    /// Makes the names in `folder` durable.
    pub(super) fn sync(&mut self, folder: &Path) {
        self.log.retain(|change| {
            let there = change.name().parent() == Some(folder);
            if there {
                apply(&mut self.durable, change);
            }
            !there
        });
    }

    pub(super) fn unsynced(&self) -> impl Iterator<Item = &NameChange> {
        self.log.iter()
    }

    pub(super) fn after_crash<'a>(&self, survived: impl Iterator<Item = &'a NameChange>) -> Names {
        let mut left = self.durable.clone();
        survived.for_each(|change| apply(&mut left, change));
        Names { now: left.clone(), durable: left, log: Vec::new() }
    }
}

fn apply(table: &mut NameTable, change: &NameChange) {
    match change {
        NameChange::Set(name, inode) => drop(table.insert(name.clone(), *inode)),
        NameChange::Remove(name) => drop(table.remove(name)),
        NameChange::Rename(from, to, inode) => {
            if table.get(from) == Some(inode) {
                table.remove(from);
            }
            table.insert(to.clone(), *inode);
        }
    }
}

/// Returns the path from the root, without `.` and `..`. The working folder is the root.
pub(super) fn absolute(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => drop(out.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    out
}
