//! A session: from the first write of a daemon to its clean end, the image's stamp and the live journal name each
//! other.
//!
//! ```text
//!   begin       create the journal, write the stamp; no mark is acknowledged before
//!   renew       announce a new generation in the journal, write it into the stamp, confirm it in the journal
//!   move_stamp  write the stamp and the footer at the new end of the file, in one write
//!   end         end all slots by one store; trim truncates the file with the stamp; then the journal is removed
//! ```
//!
//! The generation is renewed by each commit with new bits, after a replay, and before the first mark of new bits in
//! each second is acknowledged.
//!
//! A session begins with the first write or a poison, so a guest that only reads does not change the file. The stamp is
//! in the sector before the footer. If a block ends there, the stamp is written together with a second footer after the
//! first one. Stamp and footer are one write within one page, so a kill leaves both or neither. A local file system
//! needs no sync, as a stamp is valid only during the boot of the machine in which it was written. On a file system
//! that other machines use, the first stamp of a session is synced, since these machines must see it.
//!
//! The stamp is written under a lock, and synchronously. Two writes in flight could be carried out in either order, and
//! leave a generation that the journal does not have. There is one write per second, per commit and per step of growth.

use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use uuid::Uuid;

use super::journal::Journal;
use super::journal_validation::ReplaySlot;
use crate::error::{Error, ErrorKind, Result};
use crate::format::SessionStamp;
use crate::image::open::Image;
use crate::image::session_state::{SessionState, journal_name, live_session_error, other_machine_error};
use crate::mutant::{self, Mutant};
use crate::storage::{Env, File, Origin, RuntimeFolder};
use crate::units::{FileSector, SECTOR_BYTES};

/// The session has not begun.
const IDLE: u8 = 0;
/// The journal records marks.
const OPEN: u8 = 1;
/// There is no journal: each write is committed before it is acknowledged.
const ABANDONED: u8 = 2;

/// Bytes of a stamp and the footer after it.
pub(super) const PAIR_BYTES: usize = 2 * SECTOR_BYTES;

/// The session of an image that is open for writing.
pub(super) struct Session {
    /// The folders in which the journal may be created, in the order to try; after a replay, only the folder that has
    /// it.
    folders: Vec<RuntimeFolder>,
    origin: Origin,
    file: File,
    uuid: Uuid,
    mode: AtomicU8,
    journal: OnceLock<Journal>,
    stamp: Mutex<Option<PlacedStamp>>,
    /// The stamp of a session whose journal exists, but whose stamp could not be written yet.
    unwritten: Mutex<Option<SessionStamp>>,
    /// The second of the clock in which the generation was last renewed.
    renewed_in_second: AtomicU64,
}

/// The stamp in the file.
struct PlacedStamp {
    stamp: SessionStamp,
    /// File sector of the stamp.
    at: FileSector,
    /// The announced generation, until the write of the stamp has succeeded.
    pending: Option<u64>,
}

impl Session {
    fn new(folders: Vec<RuntimeFolder>, origin: Origin, image: &Image) -> Session {
        Session {
            folders,
            origin,
            file: image.file().clone(),
            uuid: image.uuid(),
            mode: AtomicU8::new(IDLE),
            journal: OnceLock::new(),
            stamp: Mutex::default(),
            unwritten: Mutex::default(),
            renewed_in_second: AtomicU64::new(0),
        }
    }

    /// Opens the session of a killed daemon and returns the valid slots of its journal, or creates a session that has
    /// not begun.
    ///
    /// # Errors
    /// - `Refused` if the session is of another machine, or if its journal is not found or does not fit;
    /// - `Poisoned` if a sync of the killed daemon failed;
    /// - `Busy` if a process has the journal open;
    /// - `NoSpace` if a journal is `required` and the first folder has no space for one;
    /// - `Io`.
    pub(super) fn open_or_new(
        env: &dyn Env,
        folders: &[RuntimeFolder],
        required: bool,
        image: &Image,
    ) -> Result<(Session, Vec<ReplaySlot>)> {
        let session = Session::new(folders.to_vec(), env.origin()?, image);
        let stamp = match SessionState::of(env, image)? {
            SessionState::Closed => {
                // The space is checked now, so that the daemon fails at its start and not at the first write.
                if let Some(folder) = folders.first().filter(|_| required) {
                    Journal::probe(folder)?;
                }
                return Ok((session, Vec::new()));
            }
            SessionState::OnOtherMachine(stamp) => return Err(other_machine_error(&stamp, image.file().path())),
            SessionState::Open(stamp) => stamp,
        };
        let name = journal_name(stamp.session);
        let mut error = live_session_error(&stamp, &session.origin, folders, image.file().path());
        let mut opened = None;
        for folder in folders {
            match Journal::open(folder, &name) {
                Ok(journal) => {
                    opened = Some((journal, folder.clone()));
                    break;
                }
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => {
                    let what = "its live journal cannot be used";
                    error = Error::new(e.kind(), what).at_path(image.file().path()).caused_by(e);
                    break;
                }
            }
        }
        let Some((journal, folder)) = opened else { return Err(error) };
        let session = Session { folders: vec![folder], ..session };
        let slots = journal.validate(image, &stamp)?;
        journal.record_file(image)?;
        let at = FileSector::containing(image.data_end()) - 1;
        let _ = session.journal.set(journal);
        *session.stamp() = Some(PlacedStamp { stamp, at, pending: None });
        session.mode.store(OPEN, Ordering::Release);
        Ok((session, slots))
    }

    /// The journal, if it records marks.
    #[inline]
    pub(super) fn journal(&self) -> Option<&Journal> {
        if self.mode.load(Ordering::Acquire) == OPEN { self.journal.get() } else { None }
    }

    /// The journal, even if it does not record marks any more.
    pub(super) fn any_journal(&self) -> Option<&Journal> {
        self.journal.get()
    }

    /// Whether the session has begun, or was abandoned.
    #[inline]
    pub(super) fn is_begun(&self) -> bool {
        self.mode.load(Ordering::Acquire) != IDLE
    }

    /// Whether there is no journal any more, so that each write is committed before it is acknowledged.
    #[inline]
    pub(super) fn is_abandoned(&self) -> bool {
        self.mode.load(Ordering::Acquire) == ABANDONED
    }

    /// Whether the file has a stamp.
    pub(super) fn is_stamped(&self) -> bool {
        self.stamp().is_some()
    }

    fn stamp(&self) -> MutexGuard<'_, Option<PlacedStamp>> {
        self.stamp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of the journal, or the first one in which it may be created.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.journal().map(Journal::folder).or_else(|| self.folders.first().map(RuntimeFolder::path))
    }

    /// The source of time and random IDs, which is the same for all folders.
    fn runtime(&self) -> &RuntimeFolder {
        self.folders.first().expect("a session has a folder")
    }

    /// Creates a journal in the first folder in which that succeeds.
    fn create_journal(&self, session: Uuid, image: &Image) -> Result<Journal> {
        let mut made = Err(Error::new(ErrorKind::NotFound, "there is no runtime folder"));
        for folder in &self.folders {
            made = Journal::create(folder, session, self.origin.boot, image);
            if made.is_ok() {
                break;
            }
        }
        made
    }

    /// Creates the journal of a new session, and returns its stamp, which is not written yet.
    fn create_journal_and_stamp(&self, image: &Image) -> Result<SessionStamp> {
        let session = self.runtime().random_id();
        let journal = self.create_journal(session, image)?;
        let folder = journal.folder().display().to_string();
        let generation = self.new_generation(0);
        journal.announce_generation(generation);
        journal.confirm_generation(generation);
        let _ = self.journal.set(journal);
        Ok(SessionStamp {
            session,
            generation,
            boot: self.origin.boot,
            machine: self.origin.machine,
            user_id: self.origin.user_id,
            user: self.origin.user.clone(),
            host: self.origin.host.clone(),
            folder,
        })
    }

    /// Returns the stamp of a new session whose journal exists, and creates the journal if necessary. If that fails,
    /// abandons the session and returns `None`.
    pub(super) fn prepared_stamp(&self, image: &Image) -> Option<SessionStamp> {
        let made = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner).take();
        made.or_else(|| self.create_journal_and_stamp(image).inspect_err(|e| self.abandon(&e.line())).ok())
    }

    /// Begins the session: writes its stamp at file sector `at` and, if given, `footer` in the sector after the stamp.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the session has not begun. If `may_retry`, the caller may try again; otherwise the session is
    /// abandoned.
    pub(super) fn begin(
        &self,
        stamp: SessionStamp,
        at: FileSector,
        footer: Option<&[u8; SECTOR_BYTES]>,
        may_retry: bool,
    ) -> Result<()> {
        let mut placed = self.stamp();
        let written = if mutant::enabled(Mutant::LateStamp) { Ok(()) } else { self.write(&stamp, at, footer) };
        if let Err(e) = written {
            if may_retry {
                *self.unwritten.lock().unwrap_or_else(PoisonError::into_inner) = Some(stamp);
                return Err(e);
            }
            self.abandon(&e.line());
            // No stamp may name a removed journal, so a stamp that was written despite the error is erased. If this
            // write also fails, the stamp is taken as not written.
            if footer.is_none() {
                let _ = self.file.write_at(&[0; SECTOR_BYTES], at.byte_offset());
            }
            self.journal.get().map_or(Ok(()), Journal::remove)?;
            return Err(e);
        }
        *placed = Some(PlacedStamp { stamp, at, pending: None });
        self.renewed_in_second.store(self.runtime().coarse_seconds(), Ordering::Relaxed);
        self.mode.store(OPEN, Ordering::Release);
        Ok(())
    }

    /// Abandons the journal: from now on each write is committed before it is acknowledged.
    fn abandon(&self, why: &str) {
        if self.mode.swap(ABANDONED, Ordering::AcqRel) != ABANDONED {
            let path = self.file.path().display();
            log::warn!("{path}: no live journal: {why}; each write is made durable before it is acknowledged");
        }
    }

    /// Checks that the journal is not lost; if it is, abandons the journal and returns false.
    pub(super) fn check_journal(&self, journal: &Journal) -> bool {
        let lost = journal.is_lost();
        if lost {
            self.abandon("its file was cut off");
        }
        !lost
    }

    /// Writes the stamp at file sector `at` and, if given, the footer after it, in one write.
    fn write(&self, stamp: &SessionStamp, at: FileSector, footer: Option<&[u8; SECTOR_BYTES]>) -> Result<()> {
        let mut pair = [0; PAIR_BYTES];
        pair[..SECTOR_BYTES].copy_from_slice(&stamp.encode(self.uuid));
        let Some(footer) = footer else { return self.file.write_at(&pair[..SECTOR_BYTES], at.byte_offset()) };
        pair[SECTOR_BYTES..].copy_from_slice(footer);
        if mutant::enabled(Mutant::SplitPair) {
            self.file.write_at(footer, (at + 1).byte_offset())?;
            return self.file.write_at(&pair[..SECTOR_BYTES], at.byte_offset());
        }
        self.file.write_at(&pair, at.byte_offset())
    }

    /// A random generation.
    fn new_generation(&self, last: u64) -> u64 {
        if mutant::enabled(Mutant::CountedGeneration) { last + 1 } else { self.runtime().random_id().as_u64_pair().0 }
    }

    /// Gives the stamp a new generation. Afterwards the journal does not fit older copies of the image.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the stamp has the old or the new generation, and the journal fits both.
    pub(super) fn renew(&self) -> Result<()> {
        let mut placed = self.stamp();
        let (Some(placed), Some(journal)) = (placed.as_mut(), self.journal()) else { return Ok(()) };
        let last = placed.stamp.generation;
        let generation = *placed.pending.get_or_insert_with(|| self.new_generation(last));
        journal.announce_generation(generation);
        placed.stamp.generation = generation;
        self.write(&placed.stamp, placed.at, None)?;
        journal.confirm_generation(generation);
        placed.pending = None;
        Ok(())
    }

    /// Renews the generation, unless it was renewed in the current second of the clock.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the stamp has the old or the new generation, and the journal fits both.
    #[inline]
    pub(super) fn renew_each_second(&self) -> Result<()> {
        let (now, last) = (self.runtime().coarse_seconds(), self.renewed_in_second.load(Ordering::Relaxed));
        if now == last
            || self.renewed_in_second.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return Ok(());
        }
        if mutant::enabled(Mutant::NoMarkGeneration) {
            return Ok(());
        }
        self.renew().inspect_err(|_| self.renewed_in_second.store(last, Ordering::Relaxed))
    }

    /// Renews the generation after a replay, before the first request.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the stamp has the old or the new generation, and the journal fits both.
    pub(super) fn renew_after_replay(&self) -> Result<()> {
        if mutant::enabled(Mutant::NoTakeoverGeneration) { Ok(()) } else { self.renew() }
    }

    /// Writes the stamp at file sector `at`, and the footer after it, as the new end of the file. Begins the session if
    /// it has not begun. If the session is abandoned and the file has no stamp, writes zeros in place of the stamp.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the stamp before the old footer, if there is one, is still valid. A session that has not begun
    /// can begin later.
    pub(super) fn move_stamp(&self, image: &Image, at: FileSector, footer: &[u8; SECTOR_BYTES]) -> Result<()> {
        if let Some(stamp) = (!self.is_begun()).then(|| self.prepared_stamp(image)).flatten() {
            return self.begin(stamp, at, Some(footer), true);
        }
        let mut placed = self.stamp();
        let Some(placed) = placed.as_mut() else { return write_zeros_and_footer(&self.file, at, footer) };
        if mutant::enabled(Mutant::StampLeftBehind) {
            write_zeros_and_footer(&self.file, at, footer)?;
        } else {
            self.write(&placed.stamp, at, Some(footer))?;
        }
        placed.at = at;
        Ok(())
    }

    /// Ends all slots of the journal. The caller has committed the image, and trims it next.
    pub(super) fn end(&self) {
        if let Some(journal) = self.journal().filter(|_| !mutant::enabled(Mutant::SlotsNotEnded)) {
            journal.end_all_slots();
        }
    }

    /// Overwrites the stamp with zeros, durably. Needs no space without copy on write, as the sector is allocated.
    ///
    /// # Errors
    /// `Io`; `NoSpace` on a file system with copy on write.
    pub(super) fn erase_stamp(&self) -> Result<()> {
        let mut placed = self.stamp();
        let Some(PlacedStamp { at, .. }) = &*placed else { return Ok(()) };
        self.file.write_at(&[0; SECTOR_BYTES], at.byte_offset())?;
        self.file.sync()?;
        *placed = None;
        Ok(())
    }

    /// Mutant `NewSessionOnTakeover`: replaces the replayed journal and its stamp by those of a new session.
    #[cfg(feature = "mutants")]
    pub(super) fn mutate_session(&self, image: &Image) {
        if !mutant::enabled(Mutant::NewSessionOnTakeover) || !self.is_stamped() {
            return;
        }
        let _ = self.journal.get().expect("it was replayed").remove();
        if let Some(placed) = self.stamp().as_mut() {
            placed.stamp.session = self.runtime().random_id();
            let _ = self.write(&placed.stamp, placed.at, None);
            let _ = self.create_journal(placed.stamp.session, image);
        }
    }
}

/// Writes a sector of zeros, where a stamp may be written later, and the footer after it.
pub(super) fn write_zeros_and_footer(file: &File, at: FileSector, footer: &[u8; SECTOR_BYTES]) -> Result<()> {
    let mut pair = [0; PAIR_BYTES];
    pair[SECTOR_BYTES..].copy_from_slice(footer);
    file.write_at(&pair, at.byte_offset())
}
