//! The names of simulated files: what look-ups see, what is durable, and the changes between the two.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file without its names.
pub(super) type InodeId = u64;

/// A step from one state of the names to the next. A rename is one step: it is never seen half done.
#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Set(PathBuf, InodeId),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf, InodeId),
}

impl NameChange {
    /// The name that it is about; of a rename the new one.
    pub(super) fn name(&self) -> &Path {
        match self {
            NameChange::Set(name, _) | NameChange::Remove(name) | NameChange::Rename(_, name, _) => name,
        }
    }
}

type Table = BTreeMap<PathBuf, InodeId>;

/// See the file's first line.
#[derive(Clone, Default, Debug)]
pub(super) struct Names {
    now: Table,
    durable: Table,
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

    /// Makes the names in a folder durable.
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

fn apply(table: &mut Table, change: &NameChange) {
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
