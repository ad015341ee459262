//! Resize of a running disk: the disk grows, and the image that takes the writes stays in its file.
//!
//! | phase | what | writes, flushes |
//! | --- | --- | --- |
//! | `Survey` | finds the data of a larger parent that the added sectors must hide | pass |
//! | `Commit` | a commit, so that little is left to commit | pass |
//! | `HoldRounds` | holds the commit rounds | flushes wait |
//! | `HoldWrites` | holds the writes | wait |
//! | `Rest` | commits the rest | wait |
//! | `End` | the session of the image ends: stamp, then journal | wait |
//! | `Grow` | the file grows, by the code of the offline verb | wait |
//! | `Open` | the image is opened again, for writing | wait |
//! | `Adopt` | the lanes adopt the version with the image as it is now, and the new size | wait, then pass |
//!
//! No sector of the old disk moves in the file, so reads pass in every phase, also reads that were planned before.
//!
//! An error before `End` changes neither the size nor the structure of the image. After an error in `End` or later, the
//! image is opened again with the size that it has then, and the daemon continues to serve the disk. The image is
//! poisoned if it cannot be opened again, or if the error is a failed sync: the kernel may have dropped what the sync
//! should have made durable.
//!
//! A kill in any phase leaves an image that the next open accepts, with the old or the new size (`image::offline`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pending_commit::PendingCommit;
use super::served_version::ServedVersion;
use super::shared::Disk;
use super::version_change::ChangeTurn;
use super::version_swap::{ChangeStep, LANE_TIMEOUT, SwapPhase, VersionSwap};
use crate::chain::{ImageChange, PlanBuffer, children_of, refuse_change};
use crate::error::{Error, ErrorKind, Result};
use crate::event::DiskEvent;
use crate::failpoint;
use crate::image::{self, Commit, Image, Writable};
use crate::units::{SECTOR, SectorRange};

/// Maximum time of the commit before the rounds are held.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(20);
/// Number of sectors of the parents that are looked up at a time. The cells of this range fit into the frozen cache.
const SURVEY_SECTORS: u64 = 1 << 16;

/// Result of a resize.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResizeReport {
    /// How long writes were held. Zero if the disk had the size before.
    pub pause: Duration,
    /// Size of the disk in bytes.
    pub size: u64,
}

/// Grows a running disk to `size` bytes. Waits until lanes serve the new size.
///
/// # Errors
/// Those of [`ResizeRun::begin`] and [`ResizeRun::run`].
pub fn resize(disk: &Arc<Disk>, size: u64) -> Result<ResizeReport> {
    ResizeRun::begin(disk, size)?.run()
}

/// The phase of a resize: what is done next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum ResizePhase {
    Survey,
    Commit,
    HoldRounds,
    HoldWrites,
    Rest,
    End,
    Grow,
    Open,
    Adopt,
    Done,
}

/// A resize in progress.
pub struct ResizeRun {
    disk: Arc<Disk>,
    /// The version before the resize.
    before: Arc<ServedVersion>,
    size: u64,
    phase: ResizePhase,
    swap: Option<VersionSwap>,
    commit: Option<PendingCommit>,
    /// The added sectors at which a parent has data, ascending.
    exposed: Vec<SectorRange>,
    /// Whether the session of the old image has ended, and the resize is not complete. The old image must not take
    /// writes then, and the file must be opened again.
    has_ended: bool,
    /// Why the image that is opened again must be poisoned; `None` if it need not be.
    failed_sync: Option<String>,
    /// Whether to leave everything as it is, as the end of the process does.
    is_abandoned: bool,
    // Dropped last: the next change may begin then.
    _turn: ChangeTurn,
}

impl ResizeRun {
    /// Checks that the disk can have `size` bytes. Changes nothing yet.
    ///
    /// # Errors
    /// - `Busy` if another change of the disk is in progress, or the disk is closed.
    /// - `Invalid` if the format does not allow the size.
    /// - `Invalid` if the note of an unfinished snapshot is damaged.
    /// - `Refused` if the disk is read-only or larger than `size`, if an earlier snapshot is not complete, if the block
    ///   table would be too large, or if an unfinished merge or snapshot forbids the change.
    /// - `Poisoned` if the image refuses writes.
    /// - `Io`.
    pub fn begin(disk: &Arc<Disk>, size: u64) -> Result<ResizeRun> {
        let turn = ChangeTurn::take(disk)?;
        let before = disk.version();
        let Some(top) = before.top() else {
            return Err(Error::new(ErrorKind::Refused, "the size of a read-only disk cannot be changed"));
        };
        let (image, path) = (top.image.image(), top.image.path());
        let refused = |what: String| Err(Error::new(ErrorKind::Refused, what).at_path(path));
        top.image.check_poison()?;
        if before.sealed().is_some() {
            return refused("an earlier snapshot of the disk is not complete; restart the daemon".to_owned());
        }
        image::check_size(image, size)?;
        if size < image.size() {
            let what =
                format!("the disk has {} bytes; it can be made smaller only while it is not served", image.size());
            return refused(format!("{what}, by `diffdisk resize --shrink`"));
        }
        refuse_change(disk.env(), image, ImageChange::Size, &disk.options().allow_parents, None)?;
        Ok(ResizeRun {
            disk: disk.clone(),
            size,
            phase: if size == image.size() { ResizePhase::Done } else { ResizePhase::Survey },
            before: before.clone(),
            swap: None,
            commit: None,
            exposed: Vec::new(),
            has_ended: false,
            failed_sync: None,
            is_abandoned: false,
            _turn: turn,
        })
    }

    /// Takes the next step. Waits for the storage, but never for a lane.
    ///
    /// # Errors
    /// Those of [`ResizeRun::run`], without `Busy`. The resize must be dropped then.
    pub fn step(&mut self) -> Result<ChangeStep> {
        let awaited = match self.phase {
            ResizePhase::HoldRounds => Some(SwapPhase::RoundsHeld),
            ResizePhase::HoldWrites => Some(SwapPhase::Held),
            ResizePhase::Adopt => Some(SwapPhase::Open),
            _ => None,
        };
        if let Some(phase) = awaited
            && !self.swap_reaches(phase)?
        {
            return Ok(ChangeStep::Wait);
        }
        let next = match self.phase {
            ResizePhase::Survey => {
                self.survey()?;
                self.commit = Some(PendingCommit::begin(&self.disk)?);
                ResizePhase::Commit
            }
            ResizePhase::Commit => {
                let commit = self.commit.as_mut().expect("the phase before has begun it");
                let Some(result) = commit.poll(&self.disk) else { return Ok(ChangeStep::Wait) };
                self.commit = None;
                result?;
                self.swap = Some(VersionSwap::in_place(&self.disk));
                ResizePhase::HoldRounds
            }
            ResizePhase::HoldRounds => ResizePhase::HoldWrites,
            ResizePhase::HoldWrites => ResizePhase::Rest,
            ResizePhase::Rest => {
                self.commit_rest()?;
                failpoint::reached("live-resize.committed");
                ResizePhase::End
            }
            ResizePhase::End => {
                self.has_ended = true;
                self.note_failed_sync(ResizeRun::end_session)?;
                ResizePhase::Grow
            }
            ResizePhase::Grow => {
                self.note_failed_sync(ResizeRun::grow)?;
                failpoint::reached("live-resize.grown");
                ResizePhase::Open
            }
            ResizePhase::Open => {
                self.note_failed_sync(ResizeRun::open_again)?;
                failpoint::reached("live-resize.opened");
                ResizePhase::Adopt
            }
            ResizePhase::Adopt => {
                self.adopted();
                ResizePhase::Done
            }
            ResizePhase::Done => return Ok(ChangeStep::Done),
        };
        self.phase = next;
        Ok(ChangeStep::Again)
    }

    /// Takes the steps, and waits for the lanes between them.
    ///
    /// # Errors
    /// - `Busy` if a queue or a commit takes too long: nothing has changed.
    /// - `Poisoned` if the image refuses writes, for example after a failed sync.
    /// - `NoSpace`, `Io`: the disk has its old or its new size. The image is poisoned if a sync failed.
    /// - Any error of opening the image again. The image is poisoned if a second attempt to open it fails, too.
    pub fn run(mut self) -> Result<ResizeReport> {
        let mut deadline = Instant::now() + LANE_TIMEOUT;
        loop {
            match self.step()? {
                ChangeStep::Done => return Ok(self.report()),
                ChangeStep::Again => {
                    let timeout = if self.phase == ResizePhase::Commit { COMMIT_TIMEOUT } else { LANE_TIMEOUT };
                    deadline = Instant::now() + timeout;
                }
                ChangeStep::Wait => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match (self.phase, &self.commit, &mut self.swap) {
                        (_, None, Some(swap)) if !left.is_zero() => swap.wait(left),
                        (_, Some(commit), _) if !left.is_zero() => commit.wait(left),
                        // The new version is published. Writes wait, since the queue may still read with the old one.
                        (ResizePhase::Adopt, _, Some(swap)) => {
                            log::warn!("{}; the resize waits for it", swap.late_error().line());
                            deadline = Instant::now() + LANE_TIMEOUT;
                        }
                        (_, _, Some(swap)) => return Err(swap.late_error()),
                        _ => {
                            let what = "a commit takes longer than 20 seconds; try again later";
                            return Err(Error::new(ErrorKind::Busy, what).at_path(self.before.top_path()));
                        }
                    }
                }
            }
        }
    }

    /// Returns the report of a resize that is done.
    pub fn report(&self) -> ResizeReport {
        let pause = self.swap.as_ref().map_or(Duration::ZERO, VersionSwap::pause);
        ResizeReport { pause, size: self.disk.capacity() * SECTOR }
    }

    /// Ends the resize without undoing or completing it, as the end of the process does. For tests of kills.
    pub fn abandon(mut self) {
        self.is_abandoned = true;
    }

    fn old(&self) -> &Arc<Writable> {
        &self.before.writable_top().image
    }

    /// Finds the data of the frozen layers in the added sectors. The frozen layers do not change. They are larger than
    /// their child only in rare chains.
    fn survey(&mut self) -> Result<()> {
        let frozen = self.before.frozen_disk();
        let end = frozen.sectors().min(self.size / SECTOR);
        let (mut at, mut plan) = (self.before.sectors(), PlanBuffer::default());
        while at < end {
            let piece = SectorRange::between(at, (at + SURVEY_SECTORS).min(end));
            self.exposed.extend(frozen.data_ranges_now(piece, &mut plan)?);
            at = piece.end();
        }
        Ok(())
    }

    /// Takes steps of the swap up to a phase. Returns whether the swap has reached the phase.
    fn swap_reaches(&mut self, phase: SwapPhase) -> Result<bool> {
        let swap = self.swap.as_mut().expect("the commit has ended");
        while swap.phase() < phase {
            if swap.step()? == ChangeStep::Wait {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Commits what was written after the first commit. No write and no other commit is under way.
    fn commit_rest(&self) -> Result<()> {
        let (env, top) = (self.disk.env(), self.before.writable_top());
        let mut commit = Commit::new(top.image.clone(), top.slot);
        let result = image::run_to_completion(env, top.image.file(), top.slot, |failed, ops| commit.next(failed, ops));
        self.disk.record_commit(&result, commit.barriers());
        result
    }

    /// Runs a step. If its error is a failed sync, records that the image must be poisoned.
    fn note_failed_sync(&mut self, step: fn(&mut ResizeRun) -> Result<()>) -> Result<()> {
        let result = step(self);
        if let Some(e) = result.as_ref().err().filter(|e| e.is_from_sync()) {
            self.failed_sync.get_or_insert_with(|| format!("a sync failed during a resize ({})", e.line()));
        }
        result
    }

    fn end_session(&mut self) -> Result<()> {
        let old = self.old();
        old.end_session();
        failpoint::reached("live-resize.session-ended");
        old.trim()?;
        failpoint::reached("live-resize.trimmed");
        // The journal is removed after the stamp is cut off, since an image with a stamp but no journal is refused.
        old.remove_journal()?;
        failpoint::reached("live-resize.journal-removed");
        Ok(())
    }

    fn grow(&mut self) -> Result<()> {
        let image = Image::open(self.old().file().clone())?;
        let exposed = &self.exposed;
        image::grow_image(&image, self.size, &mut |range| {
            let inside = exposed.iter().map(|part| part.clip(range));
            Ok(inside.filter(|part| !part.is_empty()).collect())
        })
    }

    /// Opens the image again for writing, and makes it the top of the version that the swap publishes. Poisons the
    /// image if a sync has failed.
    fn open_again(&mut self) -> Result<()> {
        let options = self.disk.options();
        let opened = image::open_reconciled(self.old().file())?;
        let image = Arc::new(Writable::new(self.disk.env(), opened, &options.keep)?);
        image.set_allocation(options.allocation);
        image.report_events_to(options.events.clone());
        if let Some(why) = &self.failed_sync {
            image.poison(why);
        }
        let swap = self.swap.as_mut().expect("writes are held");
        swap.set_version(self.before.with_top_image(image));
        Ok(())
    }

    /// Completes the resize after the swap has published the version and opened the gates: releases the rounds, and
    /// reports the new size, if the size has changed.
    fn adopted(&mut self) {
        self.has_ended = false;
        let swap = self.swap.as_mut().expect("it is published");
        swap.release_rounds();
        // A hint to start writeback that was in flight may have poisoned the old image.
        if let Err(e) = self.old().check_poison() {
            self.disk.poison_top(&self.before, &e.line());
        }
        let size = self.disk.capacity() * SECTOR;
        if size == self.before.sectors() * SECTOR {
            return;
        }
        self.disk.events().report(DiskEvent::Resized { size });
        let image = self.old().image();
        for child in children_of(self.disk.env(), image).unwrap_or_default() {
            let path = child.display();
            log::warn!("{path}: a child of the resized image keeps its own size, but Hyper-V requires equal sizes");
        }
    }

    /// Ends a resize that has failed after the session of the image has ended: opens the image again with the size that
    /// it has, publishes it, and opens the gates. If the image cannot be opened, poisons the old image.
    fn recover(&mut self) {
        let swap = self.swap.as_mut().expect("writes are held");
        if swap.phase() < SwapPhase::Published {
            if self.phase < ResizePhase::Adopt
                && let Err(e) = self.note_failed_sync(ResizeRun::open_again)
            {
                let why = format!("the image cannot be opened again after a resize that did not end ({})", e.line());
                return self.old().poison(&why);
            }
            let swap = self.swap.as_mut().expect("writes are held");
            let _ = swap.step();
        }
        let swap = self.swap.as_mut().expect("writes are held");
        if swap.phase() == SwapPhase::Published {
            swap.open_without_reports();
        }
        self.adopted();
    }
}

impl Drop for ResizeRun {
    /// Ends a resize that is not done. The gates open in all cases, since the swap is dropped.
    fn drop(&mut self) {
        if let Some(commit) = self.commit.take() {
            commit.leave(&self.disk);
        }
        if std::thread::panicking() {
            self.failed_sync.get_or_insert_with(|| "a resize failed by a defect of the program".to_owned());
        }
        // This is necessary also while the disk is being closed: the old image must not be committed or trimmed.
        if self.has_ended && !self.is_abandoned {
            self.recover();
        }
    }
}
