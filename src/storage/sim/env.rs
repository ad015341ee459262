//! The simulated host as the world sees it: names, files, clock, engines. Each call is a step, and may fail by plan.

use std::path::{Component, Path, PathBuf};
use std::sync::atomic::AtomicU64;

use uuid::Uuid;

use super::SimHost;
use super::engine::SimEngine;
use super::inode::Inode;
use super::names;
use super::world::{Step, code};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::engine::Engine;
use crate::storage::env::{Access, EngineKind, Env, File, Holder};
use crate::storage::live::Live;

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

    fn create_unnamed(&self, _folder: &Path, known_as: &Path) -> Result<File> {
        if self.0.world().faults.no_unnamed {
            return Err(Error::new(ErrorKind::Unsupported, "no files without names here").at_path(known_as));
        }
        self.handle(known_as, Access::Write, |world, _| {
            let inode = world.number();
            world.inodes.insert(inode, Inode::new(world.clock));
            Ok(inode)
        })
    }

    fn give_name(&self, file: &File, new: &Path) -> Result<()> {
        let File::Sim(file) = file else { panic!("a file of another host") };
        self.named(new, "cannot give the file its name", |world, name| {
            world.step(Step::Name)?;
            let (inode, _) = file.inode_in(&self.0).ok_or_else(|| code(libc::EBADF))?;
            if world.look_up(name).is_ok() {
                return Err(code(libc::EEXIST));
            }
            world.names.apply(names::Change::Set(name.to_path_buf(), inode));
            Ok(())
        })
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
            if world.live.remove(name).is_some() {
                return Ok(());
            }
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
        let (world, name) = (self.0.world(), absolute(path));
        world.live.contains_key(&name) || world.names.get(&name).is_some()
    }

    fn list(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        self.named(folder, "cannot list the folder", |world, name| {
            world.step(Step::Name)?;
            let inside = world.names.all().filter(|(path, _)| path.parent() == Some(name));
            Ok(inside.map(|(path, _)| folder.join(path.file_name().expect("a file has a name"))).collect())
        })
    }

    fn live(&self, path: &Path, words: usize) -> Result<Live> {
        self.named(path, "cannot open", |world, name| {
            world.alive()?;
            let fresh = || std::iter::repeat_with(|| AtomicU64::new(0)).take(words).collect();
            let found = world.live.entry(name.to_path_buf()).or_insert_with(fresh);
            assert_eq!(found.len(), words, "one size for all of a name");
            Ok(Live::Sim(found.clone()))
        })
    }

    fn boot_id(&self) -> Result<Uuid> {
        Ok(self.0.world().boot)
    }

    fn now(&self) -> i64 {
        self.0.world().clock
    }

    fn uuid(&self) -> Uuid {
        let mut world = self.0.world();
        let bits = u128::from(world.random.any()) << 64 | u128::from(world.random.any());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }

    fn engine(&self, _kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        Ok(Box::new(SimEngine::new(self.0.clone(), depth)))
    }
}
