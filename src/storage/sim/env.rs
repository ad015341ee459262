//! The simulated host as the world sees it: names, files, clock, engines. Each call is a step, and may fail by plan.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::SimHost;
use super::engine::SimEngine;
use super::folder::SimFolder;
use super::machine::{StepKind, errno};
use super::names;
use super::runtime::SimRuntimeFolder;
use crate::error::Result;
use crate::storage::engine::Engine;
use crate::storage::env::{Access, EngineKind, Env, File, FilePresence, LockHolder, Origin};
use crate::storage::folder::Folder;
use crate::storage::runtime_folder::RuntimeFolder;

/// The path from the root, without `.` and `..`; the working folder is the root.
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

impl Env for SimHost {
    fn open(&self, path: &Path, access: Access) -> Result<File> {
        self.handle(path, access, |world, name| world.look_up(name))
    }

    fn folder(&self, path: &Path) -> Result<Folder> {
        Ok(Folder::Sim(SimFolder::new(&self.0, path)))
    }

    fn file_presence(&self, path: &Path) -> FilePresence {
        let there = self.0.lock().names.get(&absolute(path)).is_some();
        if there { FilePresence::Present } else { FilePresence::Absent }
    }

    fn lock_holders(&self, files: &[&File]) -> Vec<Option<LockHolder>> {
        let world = self.0.lock();
        let held = |file: &&File| match file {
            File::Sim(file) => {
                let (inode, _) = file.inode_in(&self.0)?;
                world.locks.iter().any(|(_, other, _)| *other == inode).then_some(LockHolder::Hidden)
            }
            File::Host(_) => None,
        };
        files.iter().map(held).collect()
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.named(path, "cannot remove the name", |world, name| {
            world.step(StepKind::Name)?;
            world.look_up(name)?;
            world.names.apply(names::NameChange::Remove(name.to_path_buf()));
            Ok(())
        })
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        self.named(path, "cannot resolve the path", |world, name| {
            world.check_alive()?;
            // A folder is there when a name lies in it.
            if name != Path::new("/") && !world.names.all().any(|(other, _)| other.starts_with(name)) {
                return Err(errno(libc::ENOENT));
            }
            Ok(name.to_path_buf())
        })
    }

    fn exists(&self, path: &Path) -> bool {
        self.0.lock().names.get(&absolute(path)).is_some()
    }

    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder> {
        Ok(RuntimeFolder::Sim(SimRuntimeFolder::new(&self.0, folder)))
    }

    fn origin(&self) -> Result<Origin> {
        let world = self.0.lock();
        let (boot, machine) = (world.boot, world.machine);
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
