//! The order of the steps of a snapshot.
//!
//! | phase | what | writes, flushes | durable before the next phase |
//! | --- | --- | --- | --- |
//! | `Note` | the notes, in the state *begun*; a check that hard links work | pass | text, name, folder |
//! | `Child` | the new child Y, its journal, its first growth | pass | file, folder |
//! | `Register` | all lanes register Y's file | pass | |
//! | `Growth` | the growth of X under way ends | pass | |
//! | `Commit` | a commit of X, so that little is left to commit | pass | X |
//! | `Prepare` | the text of the state *switched*, under a second name | pass | text |
//! | `HoldRounds` | the commit rounds of all disks are held | flushes wait | |
//! | `HoldWrites` | the writes of all disks are held | wait | |
//! | `Switch` | that text becomes the coordinator's note | wait | nothing |
//! | `Adopt` | the lanes adopt Y over the sealed X | wait, then writes pass | |
//! | `Retire` | X is committed, and its session ends | flushes wait | X |
//! | `Decide` | the coordinator's note, in the state *decided* | flushes wait | text, name, folder |
//! | `Name` | X is linked as K; Y is renamed over A | pass | the folder after each of the two |
//! | `Clean` | the notes are removed, the coordinator's last | pass | each folder |
//! | `Freeze` | X becomes a frozen layer | pass | |
//!
//! A failure in `Switch` or before undoes the snapshot at once. Until *decided* is durable, no flush is answered that
//! covers a write to Y, so Y may be lost in a power cut. Y must not be lost in a kill, since acknowledged writes
//! survive a kill. The process that opens the disk after a kill finds the switch, since the kernel has carried out the
//! rename.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::snapshot_member::Member;
use super::snapshot_types::{KeptImage, SnapshotReport, SnapshotRequest};
use crate::chain::{SnapshotNote, SnapshotState};
use crate::disk::pending_commit::PendingCommit;
use crate::disk::version_swap::{ChangeStep, LANE_TIMEOUT, SwapPhase};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::mutant::{self, Mutant};

/// Maximum time of the commit before the switch, and of the wait for growth before that commit.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between two checks whether a step of growth has ended.
const GROWTH_POLL: Duration = Duration::from_millis(1);
/// Time between two attempts of a step between the switch and the decision.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Time for which a step between the switch and the decision is repeated after errors other than a lack of space.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// The phase of a snapshot: what is done next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Phase {
    Note,
    Child,
    Register,
    Growth,
    Commit,
    Prepare,
    HoldRounds,
    HoldWrites,
    Switch,
    Adopt,
    Retire,
    Decide,
    Name,
    Clean,
    Freeze,
    Done,
}

/// A snapshot in progress.
pub struct SnapshotRun {
    members: Vec<Member>,
    note: SnapshotNote,
    phase: Phase,
    pause: Duration,
    held_flush: Duration,
}

impl SnapshotRun {
    /// Checks that the snapshot can be taken. Changes nothing yet.
    ///
    /// # Errors
    /// `Busy`, `Refused`, `Invalid`, `Poisoned`, `NotFound`, `Io`, for the reasons listed at [`super::snapshot`].
    pub fn begin(requests: &[SnapshotRequest]) -> Result<SnapshotRun> {
        if requests.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "a snapshot needs at least one disk"));
        }
        // Taking a turn never waits, so two snapshots of the same disks cannot wait for each other.
        let members = requests.iter().map(Member::begin).collect::<Result<Vec<Member>>>()?;
        let note = SnapshotNote {
            group: members[0].disk.env().uuid(),
            members: members.iter().map(Member::entry).collect(),
            state: SnapshotState::Begun,
        };
        let (phase, pause, held_flush) = (Phase::Note, Duration::ZERO, Duration::ZERO);
        Ok(SnapshotRun { members, note, phase, pause, held_flush })
    }

    /// Takes the next step. Waits for the storage, but never for a lane.
    ///
    /// # Errors
    /// Those of [`super::snapshot`]. The snapshot must be dropped then, except that a step between the switch and the
    /// decision may be repeated if no sync failed.
    pub fn step(&mut self) -> Result<ChangeStep> {
        let awaited = match self.phase {
            Phase::Register => Some(SwapPhase::Registered),
            Phase::HoldRounds => Some(SwapPhase::RoundsHeld),
            Phase::HoldWrites => Some(SwapPhase::Held),
            Phase::Adopt => Some(SwapPhase::Open),
            _ => None,
        };
        if let Some(phase) = awaited
            && !self.swaps_reach(phase)?
        {
            return Ok(ChangeStep::Wait);
        }
        let next = match self.phase {
            Phase::Note => {
                for (index, member) in self.members.iter_mut().enumerate() {
                    let written = self.note.write_new(member.disk.env(), &member.folder, index);
                    // `Refused` means that another snapshot has a note of that name.
                    member.has_note = !written.as_ref().is_err_and(|e| e.kind() == ErrorKind::Refused);
                    written?;
                    self.note.check_links(&member.folder, index)?;
                    failpoint::reached("snapshot.a-note-written");
                }
                Phase::Child
            }
            Phase::Child => {
                self.members.iter_mut().try_for_each(Member::create_child)?;
                failpoint::reached("snapshot.child-created");
                Phase::Register
            }
            Phase::Register => Phase::Growth,
            // A commit repeats its syncs while a step of growth syncs.
            Phase::Growth if self.members.iter().any(|member| member.old().is_growth_syncing()) => {
                return Ok(ChangeStep::Wait);
            }
            Phase::Growth => {
                for member in &mut self.members {
                    member.commit = Some(PendingCommit::begin(&member.disk)?);
                }
                Phase::Commit
            }
            Phase::Commit => {
                for member in &mut self.members {
                    let Some(commit) = &mut member.commit else { continue };
                    let Some(result) = commit.poll(&member.disk) else { return Ok(ChangeStep::Wait) };
                    member.commit = None;
                    result?;
                }
                Phase::Prepare
            }
            Phase::Prepare => {
                self.prepare()?;
                failpoint::reached("snapshot.switch-prepared");
                Phase::HoldRounds
            }
            Phase::HoldRounds => Phase::HoldWrites,
            Phase::HoldWrites => Phase::Switch,
            Phase::Switch => {
                self.switch()?;
                Phase::Adopt
            }
            Phase::Adopt => {
                failpoint::reached("snapshot.children-in-use");
                let pauses = self.members.iter_mut().map(|member| member.swap().pause());
                self.pause = pauses.max().unwrap_or_default();
                Phase::Retire
            }
            Phase::Retire => {
                if !mutant::enabled(Mutant::SealedUncommitted) {
                    self.members.iter().try_for_each(Member::retire_old)?;
                }
                failpoint::reached("snapshot.old-committed");
                Phase::Decide
            }
            Phase::Decide => {
                self.note.state = SnapshotState::Decided;
                let coordinator = &self.members[0];
                self.note.replace(coordinator.disk.env(), &coordinator.folder)?;
                failpoint::reached("snapshot.flushes-released");
                let held = self.members.iter_mut().map(Member::release_rounds);
                self.held_flush = held.max().unwrap_or_default();
                Phase::Name
            }
            Phase::Name => {
                for (index, member) in self.members.iter().enumerate() {
                    self.note.name_files(member.disk.env(), &member.folder, index)?;
                    member.record_child();
                }
                failpoint::reached("snapshot.all-named");
                Phase::Clean
            }
            Phase::Clean => {
                for (index, member) in self.members.iter().enumerate().rev() {
                    self.note.remove(&member.folder, index)?;
                    failpoint::reached("snapshot.a-note-removed");
                }
                Phase::Freeze
            }
            Phase::Freeze => {
                self.members.iter().try_for_each(Member::freeze_old)?;
                Phase::Done
            }
            Phase::Done => return Ok(ChangeStep::Done),
        };
        self.phase = next;
        Ok(ChangeStep::Again)
    }

    /// Whether the disks take writes in the new children.
    pub fn is_switched(&self) -> bool {
        self.phase > Phase::Switch
    }

    /// Ends the snapshot without undoing it, as the end of the process does. For tests of kills.
    pub fn abandon(mut self) {
        self.phase = Phase::Done;
    }

    /// Writes the text that becomes the coordinator's note in the switch.
    fn prepare(&mut self) -> Result<()> {
        let coordinator = &self.members[0];
        let env = coordinator.disk.env();
        let has_journal = self.members.iter().all(|member| member.child().image.journal_folder().is_some());
        let state = SnapshotState::Switched { boot: env.origin()?.boot, has_journal };
        let switched = SnapshotNote { state, ..self.note.clone() };
        switched.prepare(env, &coordinator.folder)
    }

    /// Replaces the file that takes the writes on all disks. No write and no commit is under way.
    fn switch(&mut self) -> Result<()> {
        self.note.switch(&self.members[0].folder)?;
        // None of the calls below fails, so either all disks are switched or none.
        self.phase = Phase::Adopt;
        for member in &mut self.members {
            member.swap().step()?;
            if mutant::enabled(Mutant::FlushBeforeDecision) {
                member.release_rounds();
            }
        }
        Ok(())
    }

    /// Takes steps of the swaps up to a phase. Returns whether all swaps have reached the phase.
    fn swaps_reach(&mut self, phase: SwapPhase) -> Result<bool> {
        for member in &mut self.members {
            while member.swap().phase() < phase {
                if member.swap().step()? == ChangeStep::Wait {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Takes the steps, and waits for the lanes between them. Repeats steps as described at `must_repeat`.
    ///
    /// # Errors
    /// Those of [`super::snapshot`].
    pub(super) fn run(mut self) -> Result<SnapshotReport> {
        let mut deadline = Instant::now() + LANE_TIMEOUT;
        let mut failing_since = Instant::now();
        loop {
            match self.step() {
                Ok(ChangeStep::Done) => return Ok(self.report()),
                Ok(ChangeStep::Again) => {
                    failing_since = Instant::now();
                    let timeout =
                        if matches!(self.phase, Phase::Growth | Phase::Commit) { COMMIT_TIMEOUT } else { LANE_TIMEOUT };
                    deadline = Instant::now() + timeout;
                }
                Ok(ChangeStep::Wait) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    match self.phase {
                        Phase::Adopt if left.is_zero() => {
                            // The disks are switched. Writes wait, since the queue may still read with the old
                            // version.
                            log::warn!("{}; the snapshot waits for it", self.late_error().line());
                            deadline = Instant::now() + LANE_TIMEOUT;
                        }
                        _ if left.is_zero() => return Err(self.late_error()),
                        _ => self.wait(left),
                    }
                }
                // The other flushes of the guest wait, as on any full file system.
                Err(e) if self.must_repeat(&e, failing_since.elapsed()) => {
                    log::warn!("{}; the snapshot waits", e.line());
                    for member in &self.members {
                        member.fail_flushes_that_must_not_wait();
                    }
                    std::thread::sleep(RETRY_PAUSE);
                }
                Err(e) => return Err(self.explain(e)),
            }
        }
    }

    /// Adds to an error what it means for the disks, if the snapshot is not undone.
    fn explain(&self, e: Error) -> Error {
        let what = match self.phase {
            Phase::Retire | Phase::Decide => "the disk refuses writes until the daemon is restarted",
            Phase::Name | Phase::Clean => {
                "the snapshot is taken, but not all files have their names: restart the daemon, which completes them"
            }
            Phase::Freeze => "the snapshot is complete, but the disk needs a restart of the daemon before the next one",
            _ => return e,
        };
        Error::new(e.kind(), what).at_path(self.members[0].kept_path()).caused_by(e)
    }

    /// Whether a step is repeated after an error: the snapshot is switched and not decided, no sync has failed, no old
    /// image refuses writes, and at least one disk is not closed. A step that fails with `NoSpace` is repeated without
    /// a time limit. After another error, the step is repeated only within `RETRY_TIMEOUT` from the end of the step
    /// before.
    fn must_repeat(&self, e: &Error, failing_for: Duration) -> bool {
        let is_undecided = matches!(self.phase, Phase::Retire | Phase::Decide);
        let is_lost = e.is_from_sync() || self.members.iter().any(|member| member.old().is_poisoned());
        let is_closed = self.members.iter().all(|member| member.disk.is_closed.load(Ordering::SeqCst));
        let may_pass = e.kind() == ErrorKind::NoSpace || failing_for < RETRY_TIMEOUT;
        is_undecided && !is_lost && !is_closed && may_pass
    }

    /// Waits for a disk for which the current phase waits, at most for `left`.
    fn wait(&mut self, left: Duration) {
        for member in &mut self.members {
            if let Some(commit) = &member.commit {
                return commit.wait(left);
            }
        }
        if self.phase == Phase::Growth {
            // A step of growth ends without an event for this thread.
            return std::thread::sleep(GROWTH_POLL.min(left));
        }
        let first = self.members.iter_mut().map(Member::swap).min_by_key(|swap| swap.phase());
        first.into_iter().for_each(|swap| swap.wait(left));
    }

    fn late_error(&mut self) -> Error {
        let busy = |what| Error::new(ErrorKind::Busy, what);
        if matches!(self.phase, Phase::Growth | Phase::Commit) {
            return busy("a commit takes longer than a minute; try again later");
        }
        let first = self.members.iter_mut().map(Member::swap).min_by_key(|swap| swap.phase());
        first.map_or_else(|| busy("the disks do not respond"), |swap| swap.late_error())
    }

    fn report(&self) -> SnapshotReport {
        let kept = |member: &Member| KeptImage {
            disk: member.name.clone(),
            kept: member.kept_path(),
            uuid: member.old().image().uuid(),
        };
        let members = self.members.iter().map(kept).collect();
        SnapshotReport { pause: self.pause, held_flush: self.held_flush, members }
    }
}

impl Drop for SnapshotRun {
    /// Ends a snapshot that is not done. Before the switch, undoes the snapshot. Between the switch and the decision,
    /// the snapshot cannot be undone, and the old images may not be committed. Flushes and the close of the disks must
    /// fail from now on, and the next open finishes or undoes the snapshot. After the decision, the disks continue to
    /// work, and the next open completes the names.
    fn drop(&mut self) {
        if self.phase <= Phase::Switch {
            for (index, member) in self.members.iter_mut().enumerate().rev() {
                // If the child cannot be removed, the note stays: the next open of the disk removes both.
                if member.remove_child()
                    && member.has_note
                    && let Err(e) = self.note.remove(&member.folder, index)
                {
                    log::warn!("{}; the next open of the disk removes the note of the snapshot", e.line());
                }
            }
        } else if self.phase <= Phase::Decide {
            // The journal of the child is not poisoned, so the next open can settle the old images, and then finish
            // the snapshot.
            for member in &self.members {
                member.child().image.refuse_writes("a snapshot failed after the switch to the new file");
            }
        }
    }
}
