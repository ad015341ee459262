//! Writing to an image that no daemon serves. Blocks are allocated as needed, and commits make the writes durable.

use std::sync::Arc;

use super::write_behind::WriteBehind;
use crate::chain::{Chain, PlanBuffer, Source, Top, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Commit, Durability, Growth, NeedsGrowth, Pins, punch_unwritten, run_to_completion};
use crate::storage::{Env, File};
use crate::units::SectorRange;

/// Maximum number of bytes written between two commits. This limits the size of a commit.
const COMMIT_BYTES: u64 = 1 << 30;

/// A function that plans a change: [`Version::plan_write`] or [`Version::plan_zero`].
type PlanChange = fn(&Version, SectorRange, &mut PlanBuffer) -> Result<(), NeedsGrowth>;

/// An image that is being written to, and its parents.
pub(super) struct ImageWriter<'a> {
    env: &'a dyn Env,
    version: Version,
    plan: PlanBuffer,
    /// Bytes of the disk written since the last commit.
    uncommitted: u64,
    write_behind: WriteBehind,
    /// End of all blocks and metadata when the file was opened.
    initial_end: u64,
}

impl<'a> ImageWriter<'a> {
    /// Makes the youngest image of a chain writable. The chain must have been opened for writing.
    ///
    /// # Errors
    /// - `Refused` if the image must not be written, or if its live journal is not found or does not belong to the
    ///   image
    /// - `Poisoned` if a sync of a killed daemon failed
    /// - `Busy` if another process has the live journal open
    /// - `NoSpace`, `Io`
    pub(super) fn open(env: &'a dyn Env, chain: Chain, keep: &Durability) -> Result<ImageWriter<'a>> {
        let version = chain.into_writable(env, keep)?;
        let initial_end = version.top().expect("opened for writing").image.image().used_end();
        Ok(ImageWriter {
            env,
            version,
            plan: PlanBuffer::default(),
            uncommitted: 0,
            write_behind: WriteBehind::default(),
            initial_end,
        })
    }

    /// Grows the file, so that it has space for `blocks` more blocks. If the file system lacks the space for all of
    /// them, the file does not grow. A file that needs no growth is not changed.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`.
    pub(super) fn grow_for(&mut self, blocks: u64) -> Result<()> {
        let top = self.top();
        let Some(mut growth) = Growth::begin_for(&top.image, top.slot, blocks) else { return Ok(()) };
        run_to_completion(self.env, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops))
    }

    /// Returns the current state of the disk.
    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    /// Returns the image that is written to.
    pub(super) fn top(&self) -> &Top {
        self.version.top().expect("opened for writing")
    }

    /// Writes a range. Ranges may be written in any order. The data is durable after the next [`ImageWriter::commit`].
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

    /// Sets the bits of a range and makes its sectors zero, so that the range hides the parents. Where the
    /// file system can free ranges of a file, the zeros need no data space. The change is durable after the next
    /// [`ImageWriter::commit`].
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`.
    pub(super) fn put_zeros(&mut self, range: SectorRange) -> Result<()> {
        self.write_with(range, |file, extent, offset| file.punch_hole(offset, extent.bytes()))
    }

    /// Repeats `planner` until the plan is complete. Between two attempts, reads the missing bitmap sectors or grows
    /// the file.
    fn plan_with(&mut self, planner: PlanChange, range: SectorRange) -> Result<()> {
        let mut pins = Pins::default();
        loop {
            match planner(&self.version, range, &mut self.plan) {
                Ok(()) if self.plan.missing.is_empty() => return Ok(()),
                Ok(()) => self.version.load_now(&self.plan.missing, &mut pins)?,
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
        // Marks need not survive a kill, because the user runs an interrupted verb again.
        let _ = self.version.mark_now(range)?;
        self.uncommitted += range.bytes();
        if self.uncommitted >= COMMIT_BYTES || top.image.take_commit_due() {
            self.commit()?;
        }
        Ok(())
    }

    /// Makes a range read as zeros. Allocates blocks only for parts in which a parent has data. The change is durable
    /// after the next [`ImageWriter::commit`].
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`.
    pub(super) fn zero(&mut self, range: SectorRange) -> Result<()> {
        self.plan_with(Version::plan_zero, range)?;
        let top = self.version.top().expect("opened for writing");
        for extent in &self.plan.extents {
            let Source::File { offset, .. } = extent.source else {
                unreachable!("zeroed ranges lie in the top's file")
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

    /// Returns the bytes of the disk that were written since the last commit.
    pub(super) fn uncommitted(&self) -> u64 {
        self.uncommitted
    }

    /// Frees unused space, and truncates the file after its blocks and metadata. The caller must have committed all
    /// writes.
    ///
    /// # Errors
    /// `Io`, `Poisoned`; with copy on write also `NoSpace`.
    pub(super) fn close(&self) -> Result<()> {
        let image = &self.top().image;
        if image.bitmaps().is_some() {
            punch_unwritten(image.file(), self.initial_end)?;
        }
        image.trim()
    }

    /// Commits, closes, and returns `outcome`. If `outcome` is an error, errors of commit and close are only logged.
    ///
    /// # Errors
    /// - the error in `outcome`
    /// - `NoSpace`, `Io`, `Poisoned` if the commit or the close fails
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

    /// Makes all writes durable, and visible to later readers of the file.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Poisoned`.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.uncommitted = 0;
        let top = self.version.top().expect("opened for writing");
        let mut commit = Commit::new(Arc::clone(&top.image), top.slot);
        run_to_completion(self.env, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops))
    }
}

/// Logs the error of a cleanup that follows another error, which the caller returns.
pub(super) fn log_secondary_error(outcome: Result<()>) {
    if let Err(e) = outcome {
        log::warn!("{}", e.line());
    }
}

fn grow(env: &dyn Env, top: &Top) -> Result<()> {
    let Some(mut growth) = Growth::begin(&top.image, top.slot) else {
        let what = "no space for another block, and the file cannot grow";
        return Err(Error::new(ErrorKind::NoSpace, what).at_path(top.image.path()));
    };
    run_to_completion(env, top.image.file(), top.slot, |failed, ops| growth.next(failed, ops))
}
