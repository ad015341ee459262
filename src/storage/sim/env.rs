//! The simulated host as the world sees it: names, files, clock, engines. Each call is a step, and may fail by plan.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::SimHost;
use super::engine::SimEngine;
use super::folder::SimFolder;
use super::names;
use super::runtime::SimRuntime;
use super::world::{Step, code};
use crate::error::Result;
use crate::storage::engine::Engine;
use crate::storage::env::{Access, EngineKind, Env, File, Holder, Origin, Presence};
use crate::storage::folder::Folder;
use crate::storage::runtime::Runtime;

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

    fn presence(&self, path: &Path) -> Presence {
        let there = self.0.world().names.get(&absolute(path)).is_some();
        if there { Presence::Present } else { Presence::Absent }
    }

    fn holders(&self, files: &[&File]) -> Vec<Option<Holder>> {
        let world = self.0.world();
        let held = |file: &&File| match file {
            File::Sim(file) => {
                let (inode, _) = file.inode_in(&self.0)?;
                world.locks.iter().any(|(_, other, _)| *other == inode).then_some(Holder::Unseen)
            }
            File::Host(_) => None,
        };
        files.iter().map(held).collect()
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.named(path, "cannot remove the name", |world, name| {
            world.step(Step::Name)?;
            world.look_up(name)?;
            world.names.apply(names::Change::Remove(name.to_path_buf()));
            Ok(())
        })
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        self.named(path, "cannot resolve the path", |world, name| {
            world.alive()?;
            // A folder is there when a name lies in it.
            if name != Path::new("/") && !world.names.all().any(|(other, _)| other.starts_with(name)) {
                return Err(code(libc::ENOENT));
            }
            Ok(name.to_path_buf())
        })
    }

    fn exists(&self, path: &Path) -> bool {
        self.0.world().names.get(&absolute(path)).is_some()
    }

    fn runtime(&self, folder: &Path) -> Result<Runtime> {
        Ok(Runtime::Sim(SimRuntime::new(&self.0, folder)))
    }

    fn origin(&self) -> Result<Origin> {
        let world = self.0.world();
        let (boot, machine) = (world.boot, world.machine);
        Ok(Origin { boot, machine, user_id: 1000, user: "guest".into(), host: "sim".into() })
    }

    fn now(&self) -> i64 {
        self.0.world().clock
    }

    fn uptime(&self) -> Duration {
        Duration::ZERO
    }

    fn uuid(&self) -> Uuid {
        self.0.world().uuid()
    }

    fn engine(&self, _kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        Ok(Box::new(SimEngine::new(self.0.clone(), depth)))
    }
}
