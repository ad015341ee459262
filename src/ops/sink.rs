//! Where a copied disk goes: a file under another name until it is whole and durable.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Chain, Plan, Policy, Source, Top, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Commit, Growth, Spec, create, drive, fresh_name, name};
use crate::storage::{Access, Env, File, Lock};
use crate::units::{SECTOR, SectorRange};

/// Bytes written between commits: bounds what a commit must carry.
const COMMIT_BYTES: u64 = 1 << 30;

/// A new file that is being filled. Dropped before [`Sink::finish`] it vanishes.
pub(super) struct Sink<'a> {
    env: &'a dyn Env,
    fresh: PathBuf,
    path: PathBuf,
    replace: bool,
    into: Form,
    named: bool,
}

enum Form {
    Raw(File),
    Image { version: Version, plan: Plan, uncommitted: u64 },
}

/// What to make.
pub(super) enum Make<'a> {
    /// A raw file of so many bytes.
    Raw(u64),
    /// An image without parent.
    Image(&'a Spec),
}

impl<'a> Sink<'a> {
    /// Begins a file that will be called `path`; with `replace` instead of a file of that name.
    ///
    /// # Errors
    /// `Refused` where the name exists (or, with `replace`, is no regular file); `Busy` where the file to be replaced is
    /// in use; else as `image::create`.
    pub(super) fn new(env: &'a dyn Env, path: &Path, make: &Make<'_>, replace: bool) -> Result<Sink<'a>> {
        let mut path = path.to_path_buf();
        match env.canonical(&path) {
            Ok(old) if replace => {
                env.open(&old, Access::Write)?.lock(Lock::Exclusive)?;
                path = old; // the file a link leads to is replaced, not the link
            }
            Ok(_) => {
                let what = "it exists already; give --force to replace it";
                return Err(Error::new(ErrorKind::Refused, what).at_path(path));
            }
            Err(_) => {}
        }
        let fresh = fresh_name(&path, env.uuid())?;
        let into = match make {
            Make::Raw(len) => {
                let file = env.create(&fresh)?;
                file.set_len(*len).map(|()| Form::Raw(file))
            }
            Make::Image(spec) => {
                create(env, &fresh, spec).map_err(|e| if e.path() == Some(&fresh) { named(&e, &path) } else { e })?;
                let version = Chain::open(env, &fresh, &Policy::default(), Access::Write);
                let version = version.and_then(|chain| chain.into_version(Access::Write));
                version.map(|version| Form::Image { version, plan: Plan::default(), uncommitted: 0 })
            }
        };
        match into {
            Ok(into) => Ok(Sink { env, fresh, path, replace, into, named: false }),
            Err(e) => {
                let _ = env.remove(&fresh);
                Err(e)
            }
        }
    }

    /// Writes a run. Ranges ascend or not, as the caller likes.
    pub(super) fn put(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        let (version, plan, uncommitted) = match &mut self.into {
            Form::Raw(file) => {
                let (start, len) = (range.start() * SECTOR, file.stat()?.len);
                // The last sector of a raw disk need not be full.
                let there = usize::try_from(len.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
                return file.write_at(&bytes[..there], start);
            }
            Form::Image { version, plan, uncommitted } => (version, plan, uncommitted),
        };
        let top = version.top().expect("opened for writing");
        loop {
            match version.plan_write(range, plan) {
                Ok(()) if plan.missing.is_empty() => break,
                Ok(()) => version.load_now(&plan.missing)?,
                Err(_) => grow(self.env, top)?,
            }
        }
        let mut rest = bytes;
        for extent in &plan.extents {
            let Source::File { offset, .. } = extent.source else { unreachable!("writes go to the top's file") };
            let (now, later) = rest.split_at(usize::try_from(extent.range.bytes()).expect("a part of the bytes"));
            rest = later;
            top.image.file().write_at(now, offset)?;
        }
        top.image.mark(range);
        *uncommitted += range.bytes();
        if *uncommitted >= COMMIT_BYTES {
            *uncommitted = 0;
            commit(self.env, top)?;
        }
        Ok(())
    }

    /// Makes all of it durable, and gives it its name.
    pub(super) fn finish(mut self) -> Result<()> {
        match &self.into {
            Form::Raw(file) => file.sync()?,
            Form::Image { version, .. } => {
                let top = version.top().expect("opened for writing");
                commit(self.env, top)?;
                top.image.trim()?;
            }
        }
        if self.replace {
            self.env.rename(&self.fresh, &self.path)?;
            self.named = true;
            return self.env.sync_dir(crate::image::folder_of(&self.path));
        }
        name(self.env, &self.fresh, &self.path)?;
        self.named = true;
        Ok(())
    }
}

impl Drop for Sink<'_> {
    fn drop(&mut self) {
        if !self.named
            && let Err(e) = self.env.remove(&self.fresh)
        {
            log::warn!("{}", e.line());
        }
    }
}

/// The same failure under the name that was asked for.
fn named(e: &Error, path: &Path) -> Error {
    let mut line = e.line();
    if let Some(start) = e.path() {
        line = line.replacen(&format!("{}: ", start.display()), "", 1);
    }
    Error::new(e.kind(), line).at_path(path)
}

fn grow(env: &dyn Env, top: &Top) -> Result<()> {
    let Some(mut growth) = Growth::begin(&top.image, top.slot) else {
        let what = "there is no room for another block, and none can be made";
        return Err(Error::new(ErrorKind::NoSpace, what).at_path(top.image.path()));
    };
    drive(env, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops))
}

fn commit(env: &dyn Env, top: &Top) -> Result<()> {
    let mut commit = Commit::new(Arc::clone(&top.image), top.slot);
    drive(env, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops))
}
