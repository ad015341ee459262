//! Writes to an image that no guest has: into its blocks, new ones where it has none, by its own order of commits.

use std::sync::Arc;

use super::write_behind::WriteBehind;
use crate::chain::{Chain, PlanBuffer, Source, Top, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Commit, Durability, Growth, NeedsGrowth, Pins, punch_unwritten, run_to_completion};
use crate::storage::{Env, File};
use crate::units::SectorRange;

/// Bytes written between commits: bounds what a commit must carry.
const COMMIT_BYTES: u64 = 1 << 30;

/// What a change of a range takes: [`Version::plan_write`] or [`Version::plan_zero`].
type PlanChange = fn(&Version, SectorRange, &mut PlanBuffer) -> Result<(), NeedsGrowth>;

/// An image that is being written to, and the chain beneath it.
pub(super) struct ImageWriter<'a> {
    env: &'a dyn Env,
    version: Version,
    plan: PlanBuffer,
    uncommitted: u64,
    write_behind: WriteBehind,
    /// Byte behind which the file had nothing when it was opened.
    initial_end: u64,
}

impl<'a> ImageWriter<'a> {
    /// Makes the youngest image of a chain writable that was opened to be written.
    ///
    /// # Errors
    /// As `Writable::new`.
    pub(super) fn open(env: &'a dyn Env, chain: Chain, keep: &Durability) -> Result<ImageWriter<'a>> {
        let version = chain.into_writable(env, keep)?;
        let was_used = version.top().expect("opened for writing").image.image().used_end();
        Ok(ImageWriter {
            env,
            version,
            plan: PlanBuffer::default(),
            uncommitted: 0,
            write_behind: WriteBehind::default(),
            initial_end: was_used,
        })
    }

    /// Makes room for so many more blocks now, all of them or none.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`.
    pub(super) fn grow_for(&mut self, blocks: u64) -> Result<()> {
        let top = self.top();
        let Some(mut growth) = Growth::begin_for(&top.image, top.slot, blocks) else { return Ok(()) };
        run_to_completion(self.env, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops))
    }

    /// The disk as it is now.
    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    /// The image that is written to.
    pub(super) fn top(&self) -> &Top {
        self.version.top().expect("opened for writing")
    }

    /// Writes a run. Ranges ascend or not, as the caller likes. Durable after the next [`Writer::commit`].
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`.
    pub(super) fn put(&mut self, range: SectorRange, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        self.write_with(range, |file, extent, offset| {
            let (now, later) = rest.split_at(usize::try_from(extent.bytes()).expect("a part of the bytes"));
            rest = later;
            file.write_at(now, offset)
        })
    }

    /// Makes a run present and zero, whatever lies beneath it. Takes room for bitmaps, none for the zeros.
    ///
    /// # Errors
    /// As [`Writer::put`].
    pub(super) fn put_zeros(&mut self, range: SectorRange) -> Result<()> {
        self.write_with(range, |file, extent, offset| file.punch_hole(offset, extent.bytes()))
    }

    /// Asks `planner` until it has all that it needs: bitmaps are read, and room is made.
    fn plan_with(&mut self, planner: PlanChange, range: SectorRange) -> Result<()> {
        let mut held = Pins::default();
        loop {
            match planner(&self.version, range, &mut self.plan) {
                Ok(()) if self.plan.missing.is_empty() => return Ok(()),
                Ok(()) => self.version.load_now(&self.plan.missing, &mut held)?,
                Err(_) => grow(self.env, self.top())?,
            }
        }
    }

    fn write_with(
        &mut self,
        range: SectorRange,
        mut write: impl FnMut(&File, SectorRange, u64) -> Result<()>,
    ) -> Result<()> {
        self.plan_with(Version::plan_write, range)?;
        let top = self.version.top().expect("opened for writing");
        for extent in &self.plan.extents {
            let Source::File { offset, .. } = extent.source else { unreachable!("writes go to the top's file") };
            write(top.image.file(), extent.range, offset)?;
            self.write_behind.add(top.image.file(), offset, extent.range.bytes());
        }
        // Killed, this tool begins anew: nothing has to outlive it.
        let _ = self.version.mark_now(range)?;
        self.uncommitted += range.bytes();
        if self.uncommitted >= COMMIT_BYTES || top.image.take_commit_due() {
            self.commit()?;
        }
        Ok(())
    }

    /// Makes a run read as zeros, with as little room as that takes: none where nothing beneath has data. Durable after
    /// the next [`Writer::commit`].
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`.
    pub(super) fn zero(&mut self, range: SectorRange) -> Result<()> {
        self.plan_with(Version::plan_zero, range)?;
        let top = self.version.top().expect("opened for writing");
        for extent in &self.plan.extents {
            let Source::File { offset, .. } = extent.source else {
                unreachable!("what is zeroed lies in the top's file")
            };
            top.image.file().punch_hole(offset, extent.range.bytes())?;
            top.image.note_unsynced();
        }
        for marked in &self.plan.marks {
            let _ = self.version.mark_now(*marked)?;
            self.uncommitted += marked.bytes();
        }
        Ok(())
    }

    /// Bytes of the disk that were written since the last commit.
    pub(super) fn uncommitted(&self) -> u64 {
        self.uncommitted
    }

    /// Gives back the room that was made and not used: the file ends behind its last block. After a commit.
    ///
    /// # Errors
    /// `Io`, `Poisoned`.
    pub(super) fn close(&self) -> Result<()> {
        let image = &self.top().image;
        if image.bitmaps().is_some() {
            punch_unwritten(image.file(), self.initial_end)?;
        }
        image.trim()
    }

    /// Ends the work, also where it failed: what was done is durable, and what was reserved and not used is given back.
    ///
    /// # Errors
    /// What the work failed with; as [`Writer::close`].
    pub(super) fn finish<T>(mut self, outcome: Result<T>) -> Result<T> {
        let closed = self.commit().and_then(|()| self.close());
        match outcome {
            Ok(done) => closed.map(|()| done),
            Err(e) => {
                log_secondary_error(closed);
                Err(e)
            }
        }
    }

    /// Makes all of it durable.
    ///
    /// # Errors
    /// `Io`, `Poisoned`.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.uncommitted = 0;
        let top = self.version.top().expect("opened for writing");
        let mut commit = Commit::new(Arc::clone(&top.image), top.slot);
        run_to_completion(self.env, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops))
    }
}

/// What fails while a failure is dealt with is not what the work failed with.
pub(super) fn log_secondary_error(outcome: Result<()>) {
    if let Err(e) = outcome {
        log::warn!("{}", e.line());
    }
}

fn grow(env: &dyn Env, top: &Top) -> Result<()> {
    let Some(mut growth) = Growth::begin(&top.image, top.slot) else {
        let what = "there is no room for another block, and none can be made";
        return Err(Error::new(ErrorKind::NoSpace, what).at_path(top.image.path()));
    };
    run_to_completion(env, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops))
}
