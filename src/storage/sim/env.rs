//! The simulated host as the world sees it: names, files, clock, engines. Each call is a step, and may fail by plan.

use std::path::{Component, Path, PathBuf};

use uuid::Uuid;

use super::SimHost;
use super::engine::SimEngine;
use super::inode::Inode;
use super::names;
use super::runtime::SimRuntime;
use super::world::{Step, code};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::engine::Engine;
use crate::storage::env::{Access, EngineKind, Env, File, Origin};
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

    fn open_beneath(&self, root: &Path, relative: &Path) -> Result<File> {
        let mut depth = 0;
        for part in relative.components() {
            depth += match part {
                Component::Normal(_) => 1,
                Component::ParentDir => -1,
                Component::CurDir => 0,
                Component::RootDir | Component::Prefix(_) => i32::MIN,
            };
            if depth < 0 {
                let what = format!("the path leaves the allowed folder {}", root.display());
                return Err(Error::new(ErrorKind::Refused, what).at_path(root.join(relative)));
            }
        }
        self.open(&root.join(relative), Access::Read)
    }

    fn create(&self, path: &Path) -> Result<File> {
        self.handle(path, Access::Write, |world, name| {
            if world.look_up(name).is_ok() {
                return Err(code(libc::EEXIST));
            }
            let inode = world.number();
            world.inodes.insert(inode, Inode::new(world.clock));
            world.names.apply(names::Change::Set(name.to_path_buf(), inode));
            Ok(inode)
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.named(from, "cannot rename", |world, name| {
            world.step(Step::Name)?;
            let (inode, to) = (world.look_up(name)?, absolute(to));
            // Two names of one file: rename(2) does nothing.
            if world.names.get(&to) != Some(inode) {
                world.names.apply(names::Change::Rename(name.to_path_buf(), to, inode));
            }
            Ok(())
        })
    }

    fn link(&self, existing: &Path, new: &Path) -> Result<()> {
        self.named(existing, "cannot give it a second name", |world, name| {
            world.step(Step::Name)?;
            let (inode, new) = (world.look_up(name)?, absolute(new));
            if world.look_up(&new).is_ok() {
                return Err(code(libc::EEXIST));
            }
            world.names.apply(names::Change::Set(new, inode));
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.named(path, "cannot remove the name", |world, name| {
            world.step(Step::Name)?;
            world.look_up(name)?;
            world.names.apply(names::Change::Remove(name.to_path_buf()));
            Ok(())
        })
    }

    fn sync_dir(&self, folder: &Path) -> Result<()> {
        self.named(folder, "cannot make the names in the folder durable", |world, name| {
            world.step(Step::SyncNames)?;
            world.names.sync(name);
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

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        self.named(folder, "cannot list the folder", |world, name| {
            world.step(Step::Name)?;
            let inside = world.names.all().filter(|(path, _)| path.parent() == Some(name));
            Ok(inside.map(|(path, _)| folder.join(path.file_name().expect("a file has a name"))).collect())
        })
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

    fn uuid(&self) -> Uuid {
        self.0.world().uuid()
    }

    fn engine(&self, _kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        Ok(Box::new(SimEngine::new(self.0.clone(), depth)))
    }
}
