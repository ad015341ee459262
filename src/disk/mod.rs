//! Floor 3: requests become operations.
//!
//! Owns: the disk that queues share ([`Disk`]), a queue's engine ([`Lane`]), requests in flight (`task`), group commit
//! ([`group_commit`]). Leaves to others: where sectors are (`chain`), the order of durable writes (`image`), virtqueues
//! (`device`).
//!
//! ```text
//!   Request ──> Lane::push ── Plan ──┬── Load ──┐ bitmaps that are not in memory
//!                              ^     │          │
//!                              └─────┼──────────┘
//!                                    ├── Wait for room (a fresh block, and the file has to grow)
//!                                    v
//!                                  Move   operations over slices of the request's own memory
//!                                    v
//!                                  mark   (writes; a bitmap that memory lost meanwhile is loaded again)
//!                                    ├── Await a commit (flushes; writes on a write-through disk)
//!                                    v
//!                                  Answer
//! ```
//!
//! A read of what the host has in memory is a copy, and goes none of this way (`copies`).
//! Reads one behind the other that wait for the disk are read ahead of (`ahead`).
//! Discards and zeroing are cut into pieces, of which a disk punches one at a time (`punch`).
//!
//! A lane belongs to one thread; nothing that a read of known sectors touches is shared between lanes but for reading.

mod cached_reads;
mod early_writeback;
pub mod group_commit;
mod job;
mod lane;
mod lost_names;
pub mod mailbox;
mod punch;
mod readahead;
mod request;
mod stages;
mod stalled_writes;
mod task;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub use crate::image::Allocation;
pub use lane::Lane;
pub use request::{Answer, Outcome, Request, Work, ZeroRange};

use crate::chain::{Chain, ImageChange, OpenMode, Policy, Version, refuse_change, refuse_if_parent, settle_parents};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, Commit, Durability};
use crate::mutant::{self, Mutant};
use crate::storage::{EngineKind, Env, FILE_SLOTS, FileSlot};
use group_commit::GroupCommit;
use lost_names::LostNames;
use mailbox::{LaneEvent, Mailbox};
use punch::PunchLock;
use readahead::ReadaheadPolicy;
use stalled_writes::StalledWrites;

/// How a disk is opened.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The youngest image of the chain.
    pub path: PathBuf,
    /// Whether writes are refused and nothing is ever changed.
    pub read_only: bool,
    /// What the guest is told when it asks for the disk's serial: at most 20 bytes. The image's UUID if none.
    pub serial: Option<String>,
    /// Whether to go round the host's page cache (O_DIRECT), for files whose file system allows it.
    pub direct: bool,
    /// Folders in which parents may lie, besides the image's own.
    pub allow_parents: Vec<PathBuf>,
    /// Whether a write is durable when it is answered.
    pub write_through: bool,
    /// How what was answered outlives this process.
    pub keep: Durability,
    /// Whether what a killed predecessor acknowledged and did not write is given up.
    pub discard_journal: bool,
    /// What becomes of writes that find the host full.
    pub when_full: WhenFull,
    /// How new blocks take room on the host.
    pub allocation: Allocation,
    /// Whether an image may be written to although others stand on it.
    pub allow_writable_parent: bool,
}

impl DiskOptions {
    /// To read and write, through the page cache, with parents beside the image only. A write is durable after the next
    /// flush, nothing outlives the process before, and writes for which there is no room are held.
    pub fn new(path: impl Into<PathBuf>) -> DiskOptions {
        DiskOptions {
            path: path.into(),
            read_only: false,
            serial: None,
            direct: false,
            allow_parents: Vec::new(),
            write_through: false,
            keep: Durability::FlushOnly,
            discard_journal: false,
            when_full: WhenFull::default(),
            allocation: Allocation::default(),
            allow_writable_parent: false,
        }
    }
}

/// What becomes of a write, or a commit, for which the host has no room.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WhenFull {
    /// It is held until there is room; reads go on, and so do flushes for which there is room.
    #[default]
    Park,
    /// It fails.
    Fail,
}

/// A chain that is being served.
pub struct Disk {
    env: Arc<dyn Env>,
    version: Version,
    group_commit: GroupCommit,
    punch_lock: PunchLock,
    lanes: Mutex<Vec<Weak<Mailbox>>>,
    write_through: AtomicBool,
    when_full: WhenFull,
    serial: [u8; 20],
    /// What O_DIRECT asks of memory, by slot; 1 where a file is buffered.
    memory_align: Vec<usize>,
    /// How the lanes read ahead, by slot.
    readahead_policies: Vec<ReadaheadPolicy>,
    counters: DiskCounters,
    stalled_writes: StalledWrites,
    lost_names: LostNames,
}

/// What was done, for statistics.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Commits that ended well.
    pub commits: AtomicU64,
    /// Syncs that commits used.
    pub syncs: AtomicU64,
    /// Bytes that the host was told to read ahead of streams.
    pub readahead_bytes: AtomicU64,
    /// Times that the host was told to begin to write before a flush.
    pub early_writebacks: AtomicU64,
}

impl Disk {
    /// Opens a chain. A writable image that was not closed cleanly is recovered.
    ///
    /// # Errors
    /// Whatever is wrong with a file of the chain, by name and offset; `Busy` where somebody has it open;
    /// `Refused` for writing if an unfinished merge forbids it, or if children stand on the image.
    pub fn open(env: Arc<dyn Env>, options: &DiskOptions) -> Result<Arc<Disk>> {
        let how = if options.read_only { OpenMode::Read } else { OpenMode::Write };
        // A reader must not miss what a killed daemon acknowledged; a writer takes it in, of parents, too.
        let runtime = options.keep.folders().to_vec();
        let policy = Policy { allowed: options.allow_parents.clone(), runtime, ..Policy::default() };
        if options.discard_journal {
            image::discard_session(&*env, &policy.runtime, &options.path)?;
        }
        let open = || Chain::open(&*env, &options.path, &policy, how);
        let chain = match open() {
            Err(e) if how == OpenMode::Write && e.kind() == ErrorKind::Refused => {
                match settle_parents(&*env, &options.path, &policy) {
                    Ok(settled) if settled > 0 => open()?,
                    Err(e) if e.kind() != ErrorKind::Refused => return Err(e),
                    _ => return Err(e),
                }
            }
            opened => opened?,
        };
        if how == OpenMode::Write {
            refuse_change(&*env, chain.youngest(), ImageChange::Contents, &policy.allowed, None)?;
            if !options.allow_writable_parent {
                refuse_if_parent(&*env, chain.youngest())?;
            }
        }
        let serial = serial(options.serial.as_deref(), chain.youngest().uuid())?;
        let version = match how {
            OpenMode::Write => chain.into_writable(&*env, &options.keep)?,
            _ => chain.into_frozen(),
        };
        if let Some(top) = version.top() {
            top.image.set_allocation(options.allocation);
        }
        let memory_align = memory_align(&version, options.direct)?;
        let mut reach = vec![ReadaheadPolicy::Off; usize::from(FILE_SLOTS)];
        for (slot, file) in version.files().filter(|(slot, _)| memory_align[usize::from(slot.0)] == 1) {
            reach[usize::from(slot.0)] = ReadaheadPolicy::of(file);
        }
        let disk = Disk {
            env,
            version,
            group_commit: GroupCommit::default(),
            punch_lock: PunchLock::default(),
            lanes: Mutex::default(),
            write_through: AtomicBool::new(options.write_through),
            when_full: options.when_full,
            serial,
            memory_align,
            readahead_policies: reach,
            counters: DiskCounters::default(),
            stalled_writes: StalledWrites::default(),
            lost_names: LostNames::default(),
        };
        Ok(Arc::new(disk))
    }

    /// The folder of the live journal; `None` if there is none.
    pub fn journal_folder(&self) -> Option<&Path> {
        self.version.top().and_then(|top| top.image.journal_folder())
    }

    /// Sectors that the guest sees.
    pub fn capacity(&self) -> u64 {
        self.version.sectors()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.version.top().is_none()
    }

    /// The serial, zero padded.
    pub fn serial(&self) -> &[u8; 20] {
        &self.serial
    }

    /// The layers.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// What was done so far.
    pub fn counters(&self) -> &DiskCounters {
        &self.counters
    }

    /// Whether a write is answered only when it is durable. Counts for requests that start later.
    pub fn set_write_through(&self, on: bool) {
        self.write_through.store(on, Ordering::SeqCst);
    }

    /// Whether a write is answered only when it is durable.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::SeqCst)
    }

    fn parks_when_full(&self) -> bool {
        self.when_full == WhenFull::Park
    }

    /// What O_DIRECT asks of memory for a file; 1 where it is buffered.
    fn memory_align(&self, slot: FileSlot) -> usize {
        self.memory_align[usize::from(slot.0)]
    }

    /// How lanes read ahead in a file.
    fn readahead_policy(&self, slot: FileSlot) -> ReadaheadPolicy {
        self.readahead_policies[usize::from(slot.0)]
    }

    /// An engine and all that goes with it for one queue, to be used by one thread.
    ///
    /// # Errors
    /// Where the host gives no engine, or has no descriptors left.
    pub fn lane(self: &Arc<Self>, kind: EngineKind, depth: usize) -> Result<Lane> {
        let mut engine = self.env.engine(kind, depth)?;
        for (slot, file) in self.version.files() {
            let registered = engine.register(slot, file);
            registered.map_err(|e| Error::io("cannot register with the engine", e).at_path(file.path()))?;
        }
        let mailbox = Arc::new(Mailbox::new()?);
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&mailbox));
        Ok(Lane::new(self.clone(), engine, mailbox))
    }

    /// Makes all writes that are complete durable, and waits for it.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, or `Poisoned`: then some of them may be lost.
    pub fn commit(&self) -> Result<()> {
        let Some(top) = self.version.top() else { return Ok(()) };
        let mailbox = Arc::new(Mailbox::new()?);
        let joined = self.group_commit.join(&mailbox);
        if joined.lead {
            return self.lead_commit(top);
        }
        let _hurried = self.group_commit.mark_urgent();
        loop {
            for letter in mailbox.wait() {
                match letter {
                    LaneEvent::Committed { round, ok: true } if round == joined.round => return Ok(()),
                    LaneEvent::Committed { round, .. } if round == joined.round => {
                        top.image.check_poison()?;
                        return Err(Error::new(ErrorKind::Io, "a commit failed").at_path(top.image.path()));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Leads rounds here and now, until none waits; the result is that of the first.
    fn lead_commit(&self, top: &crate::chain::Top) -> Result<()> {
        let mut first = None;
        loop {
            let mut commit = Commit::new(top.image.clone(), top.slot);
            let result = image::run_to_completion(&*self.env, top.image.file(), top.slot, |failed, ops| {
                commit.next(failed, ops)
            });
            self.record_commit(&result, commit.barriers());
            let over = self.group_commit.finish(result.is_ok()).is_none();
            first.get_or_insert(result);
            if over {
                return first.expect("a round was led");
            }
        }
    }

    /// Commits and closes the image cleanly: the file ends right behind its last block. No lane may be left.
    ///
    /// # Errors
    /// As `commit`; the image is then recovered by the next open.
    pub fn close(&self) -> Result<()> {
        let Some(top) = self.version.top() else { return Ok(()) };
        if mutant::enabled(Mutant::TrimFirst) {
            top.image.trim()?;
        }
        self.commit()?;
        // Places of blocks that were never written are cut off now.
        top.image.end_session();
        if mutant::enabled(Mutant::RemoveJournalFirst) {
            top.image.remove_journal()?;
        }
        top.image.trim()?;
        // Not before the stamp is gone: a stamp without a journal is refused.
        top.image.remove_journal()
    }

    fn record_commit(&self, result: &Result<()>, barriers: u32) {
        self.counters.syncs.fetch_add(u64::from(barriers), Ordering::Relaxed);
        match result {
            Ok(()) => {
                self.counters.commits.fetch_add(1, Ordering::Relaxed);
            }
            Err(e) => log::error!("a commit failed: {}", e.line()),
        }
    }

    /// Tells all lanes.
    fn broadcast(&self, letter: LaneEvent) {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.retain(|lane| lane.upgrade().map(|m| m.post(letter)).is_some());
    }
}

/// What O_DIRECT asks of memory, by slot; 1 where a file is buffered. Switches to it if `direct`.
fn memory_align(version: &Version, direct: bool) -> Result<Vec<usize>> {
    let mut memory_align = vec![1; usize::from(FILE_SLOTS)];
    for (slot, file) in version.files().filter(|_| direct) {
        match file.set_direct()? {
            Some(rules) => memory_align[usize::from(slot.0)] = rules.memory,
            None => log::warn!("{}: direct I/O cannot be used here: buffered", file.path().display()),
        }
    }
    Ok(memory_align)
}

/// The serial as the guest gets it.
fn serial(given: Option<&str>, uuid: uuid::Uuid) -> Result<[u8; 20]> {
    let text = given.map_or_else(|| uuid.simple().to_string()[..20].to_owned(), str::to_owned);
    let mut serial = [0; 20];
    match serial.get_mut(..text.len()) {
        Some(room) => room.copy_from_slice(text.as_bytes()),
        None => return Err(Error::new(ErrorKind::Unsupported, format!("serial {text:?} is longer than 20 bytes"))),
    }
    Ok(serial)
}
