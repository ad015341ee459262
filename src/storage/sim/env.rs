//! The environment of the simulated host. Calls that open or change names are steps, which the fault plan can make
//! fail.

use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::engine::SimEngine;
use super::file::SimFile;
use super::folder::{SimFolder, open_file};
use super::host::SimHost;
use super::machine::{StepKind, errno};
use super::names::{NameChange, absolute};
use super::runtime_folder::SimRuntimeFolder;
use crate::error::Result;
use crate::storage::backend::{File, Folder};
use crate::storage::engine::Engine;
use crate::storage::env::Env;
use crate::storage::runtime_folder::RuntimeFolder;
use crate::storage::types::{Access, EngineKind, FilePresence, LockHolder, Origin};

impl Env for SimHost {
    fn open(&self, path: &Path, access: Access) -> Result<File> {
        open_file(&self.0, path, access, |machine, name| machine.look_up(name))
    }

    fn folder(&self, path: &Path) -> Result<Folder> {
        Ok(Folder::new(SimFolder::new(&self.0, path)))
    }

    fn file_presence(&self, path: &Path) -> FilePresence {
        let there = self.0.lock().names.get(&absolute(path)).is_some();
        if there { FilePresence::Present } else { FilePresence::Absent }
    }

    fn lock_holders(&self, files: &[&File]) -> Vec<Option<LockHolder>> {
        let machine = self.0.lock();
        let holder = |file: &&File| {
            let (inode, _) = file.as_backend::<SimFile>()?.inode_in(&self.0)?;
            machine.locks.iter().any(|(_, other, _)| *other == inode).then_some(LockHolder::Hidden)
        };
        files.iter().map(holder).collect()
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.0.with_path(path, "cannot remove the name", |machine, name| {
            machine.step(StepKind::Name)?;
            machine.look_up(name)?;
            machine.names.apply(NameChange::Remove(name.to_path_buf()));
            Ok(())
        })
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        self.0.with_path(path, "cannot resolve the path", |machine, name| {
            machine.check_alive()?;
            // A folder exists if it contains a name.
            if name != Path::new("/") && !machine.names.all().any(|(other, _)| other.starts_with(name)) {
                return Err(errno(libc::ENOENT));
            }
            Ok(name.to_path_buf())
        })
    }

    fn exists(&self, path: &Path) -> bool {
        self.0.lock().names.get(&absolute(path)).is_some()
    }

    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder> {
        Ok(RuntimeFolder::new(SimRuntimeFolder::new(&self.0, folder)))
    }

    fn origin(&self) -> Result<Origin> {
        let state = self.0.lock();
        let (boot, machine) = (state.boot_id, state.machine_id);
        Ok(Origin { boot, machine, user_id: 1000, user: "guest".into(), host: "sim".into() })
    }

    fn now(&self) -> i64 {
        self.0.lock().clock
    }

    fn monotonic_time(&self) -> Duration {
        Duration::ZERO
    }

    fn uuid(&self) -> Uuid {
        self.0.lock().uuid()
    }

    fn engine(&self, _kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        Ok(Box::new(SimEngine::new(self.0.clone(), depth)))
    }
}
