//! A session: from the first write of a daemon until its clean end, image and live journal know each other.
//!
//! ```text
//!   begin     the journal is made, the stamp is written; only then a mark may be answered
//!   renew     journal `next` = a new generation, the stamp with it, journal `now`: in each commit with new bits, when a
//!             successor takes the journal in, and before the first mark of each second is answered
//!   move_to   the stamp goes along when the footer moves: both are one write
//!   end       all slots end by one store; the file is cut, and the stamp goes with it; then the journal is removed
//! ```
//!
//! A session begins with the first write, so a guest that only reads leaves no trace. The stamp takes the sector before the
//! footer if there is room between the last block and the footer, else it is written together with a second footer behind the
//! first. Stamp and footer are one write within one page: no kill comes between them. No sync is needed: a stamp counts only on
//! the start of the host on which it was written.
//!
//! All writes of the stamp are made under one lock and are plain calls: two under way at once could land in any order, and
//! leave a generation that the journal does not have. They are one a second, one a commit and one a step of growth.

use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use uuid::Uuid;

use super::journal::Journal;
use super::journal_replay::ReplaySlot;
use crate::error::{Error, ErrorKind, Result};
use crate::format::SessionStamp;
use crate::image::open::Image;
use crate::image::session_state::{SessionState, journal_name, live_session_error, other_machine_error};
use crate::mutant::{self, Mutant};
use crate::storage::{Env, File, Origin, RuntimeFolder};
use crate::units::{SECTOR, SECTOR_BYTES};

/// Nothing was written yet.
const IDLE: u8 = 0;
/// Marks go to the journal.
const OPEN: u8 = 1;
/// The journal cannot be had: each write is committed before it is answered.
const ABANDONED: u8 = 2;

/// Bytes of a stamp and the footer behind it.
pub(super) const PAIR_BYTES: usize = 2 * SECTOR_BYTES;

/// The session of an image that is open for writing.
pub(super) struct Session {
    /// Where its journal may be made, in the order to try; the one that has it, once there is one.
    folders: Vec<RuntimeFolder>,
    origin: Origin,
    file: File,
    uuid: Uuid,
    mode: AtomicU8,
    journal: OnceLock<Journal>,
    stamp: Mutex<Option<PlacedStamp>>,
    /// The stamp of a session whose journal is made, and which could not be written yet.
    unwritten: Mutex<Option<SessionStamp>>,
    /// The second in which the generation was renewed last.
    renewed_in_second: AtomicU64,
}

/// The stamp in the file.
struct PlacedStamp {
    stamp: SessionStamp,
    /// File sector.
    at: u64,
    /// The generation that the stamp is about to get; kept until it is written for certain.
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

    /// The session of an image: that of a killed predecessor, with what its journal holds, or one that is not begun.
    ///
    /// # Errors
    /// `Refused` if the image has a session whose journal cannot be taken in, or one of another machine; `Poisoned` if a sync of
    /// the predecessor failed; `Busy` if a process has the journal open; `Io`.
    pub(super) fn open_or_new(
        env: &dyn Env,
        folders: &[RuntimeFolder],
        required: bool,
        image: &Image,
    ) -> Result<(Session, Vec<ReplaySlot>)> {
        let session = Session::new(folders.to_vec(), env.origin()?, image);
        let stamp = match SessionState::of(env, image)? {
            SessionState::Closed => {
                // Told at the start, not at the first write.
                if let Some(folder) = folders.first().filter(|_| required) {
                    Journal::probe(folder)?;
                }
                return Ok((session, Vec::new()));
            }
            SessionState::OnOtherMachine(stamp) => return Err(other_machine_error(&stamp, image.file().path())),
            SessionState::Open(stamp) => stamp,
        };
        let name = journal_name(stamp.session);
        let mut missing = live_session_error(&stamp, &session.origin, folders, image.file().path());
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
                    missing = Error::new(e.kind(), what).at_path(image.file().path()).caused_by(e);
                    break;
                }
            }
        }
        let Some((journal, folder)) = opened else { return Err(missing) };
        let session = Session { folders: vec![folder], ..session };
        let found = journal.validate(image, &stamp)?;
        journal.record_file(image)?;
        let at = image.data_end() / SECTOR - 1;
        let _ = session.journal.set(journal);
        *session.stamp() = Some(PlacedStamp { stamp, at, pending: None });
        session.mode.store(OPEN, Ordering::Release);
        Ok((session, found))
    }

    /// The journal, if marks go to it.
    #[inline]
    pub(super) fn journal(&self) -> Option<&Journal> {
        if self.mode.load(Ordering::Acquire) == OPEN { self.journal.get() } else { None }
    }

    /// Its journal, also when marks do not go there any more.
    pub(super) fn any_journal(&self) -> Option<&Journal> {
        self.journal.get()
    }

    /// Whether it is decided where marks go.
    #[inline]
    pub(super) fn is_begun(&self) -> bool {
        self.mode.load(Ordering::Acquire) != IDLE
    }

    /// Whether marks cannot go to a journal any more: each write is committed before it is answered.
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

    /// The folder of its journal, or the one in which it is to be made.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.journal().map(Journal::folder).or_else(|| self.folders.first().map(RuntimeFolder::path))
    }

    /// The door to clock and random bits; every folder has the same.
    fn runtime(&self) -> &RuntimeFolder {
        self.folders.first().expect("a session has a folder")
    }

    /// Makes a journal in the first folder that takes one.
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

    /// Makes the journal of a new session, and the stamp that names it, which is not written yet.
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

    /// Makes the journal of a new session and the stamp that names it, unless that was done before; `None`, for good, if that
    /// cannot be had.
    pub(super) fn prepared_stamp(&self, image: &Image) -> Option<SessionStamp> {
        let made = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner).take();
        made.or_else(|| self.create_journal_and_stamp(image).inspect_err(|e| self.abandon(&e.line())).ok())
    }

    /// Begins the session by writing its stamp at file sector `at`, with a footer behind it if there is one to write.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: there is no session. If `again`, it may be tried again; if not, each write is committed before it is
    /// answered.
    pub(super) fn begin(
        &self,
        stamp: SessionStamp,
        at: u64,
        footer: Option<&[u8; SECTOR_BYTES]>,
        again: bool,
    ) -> Result<()> {
        let mut placed = self.stamp();
        let written = if mutant::enabled(Mutant::LateStamp) { Ok(()) } else { self.write(&stamp, at, footer) };
        if let Err(e) = written {
            if again {
                *self.unwritten.lock().unwrap_or_else(PoisonError::into_inner) = Some(stamp);
                return Err(e);
            }
            self.abandon(&e.line());
            // No stamp may name a journal that nobody keeps. It is not there, or nothing can be written there.
            if footer.is_none() {
                let _ = self.file.write_at(&[0; SECTOR_BYTES], at * SECTOR);
            }
            self.journal.get().map_or(Ok(()), Journal::remove)?;
            return Err(e);
        }
        *placed = Some(PlacedStamp { stamp, at, pending: None });
        self.renewed_in_second.store(self.runtime().coarse_seconds(), Ordering::Relaxed);
        self.mode.store(OPEN, Ordering::Release);
        Ok(())
    }

    /// From here on each write is committed before it is answered.
    fn abandon(&self, why: &str) {
        if self.mode.swap(ABANDONED, Ordering::AcqRel) != ABANDONED {
            let path = self.file.path().display();
            log::warn!("{path}: no live journal: {why}; each write is made durable before it is answered");
        }
    }

    /// Whether the journal is still the file that it was; gives it up if not.
    pub(super) fn check_journal(&self, journal: &Journal) -> bool {
        let lost = journal.is_lost();
        if lost {
            self.abandon("its file was cut");
        }
        !lost
    }

    fn write(&self, stamp: &SessionStamp, at: u64, footer: Option<&[u8; SECTOR_BYTES]>) -> Result<()> {
        let mut pair = [0; PAIR_BYTES];
        pair[..SECTOR_BYTES].copy_from_slice(&stamp.encode(self.uuid));
        let Some(footer) = footer else { return self.file.write_at(&pair[..SECTOR_BYTES], at * SECTOR) };
        pair[SECTOR_BYTES..].copy_from_slice(footer);
        if mutant::enabled(Mutant::SplitPair) {
            self.file.write_at(footer, (at + 1) * SECTOR)?;
            return self.file.write_at(&pair[..SECTOR_BYTES], at * SECTOR);
        }
        self.file.write_at(&pair, at * SECTOR)
    }

    fn new_generation(&self, last: u64) -> u64 {
        if mutant::enabled(Mutant::CountedGeneration) { last + 1 } else { self.runtime().random_id().as_u64_pair().0 }
    }

    /// Gives the stamp a new generation: an older copy of the image fits the journal no longer.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: which generation the file has is unknown, and the journal fits both.
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

    /// Renews the generation if that was not done in this second yet.
    ///
    /// # Errors
    /// As for [`Session::renew`].
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

    /// Gives the stamp a new generation after a journal was taken in, before anything is served.
    ///
    /// # Errors
    /// As for [`Session::renew`].
    pub(super) fn renew_after_replay(&self, image: &Image) -> Result<()> {
        if !self.is_stamped() {
            return Ok(());
        }
        #[cfg(feature = "mutants")]
        if mutant::enabled(Mutant::NewSessionOnTakeover) {
            self.mutate_session(image);
        }
        if mutant::enabled(Mutant::NoTakeoverGeneration) { Ok(()) } else { self.renew() }
    }

    /// Writes stamp and footer at a new end of the file, file sectors `at` and the one behind it. A session that has not begun
    /// begins with it.
    ///
    /// # Errors
    /// `Io`, `NoSpace`: the stamp that counts is where it was.
    pub(super) fn move_stamp(&self, image: &Image, at: u64, footer: &[u8; SECTOR_BYTES]) -> Result<()> {
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

    /// Ends all slots: the image is committed, and is going to be cut.
    pub(super) fn end(&self) {
        if let Some(journal) = self.journal().filter(|_| !mutant::enabled(Mutant::SlotsNotEnded)) {
            journal.end_all_slots();
        }
    }

    /// Wipes the stamp durably: a full host has room for that, as the sector was written.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn erase_stamp(&self) -> Result<()> {
        let mut placed = self.stamp();
        let Some(PlacedStamp { at, .. }) = &*placed else { return Ok(()) };
        self.file.write_at(&[0; SECTOR_BYTES], at * SECTOR)?;
        self.file.sync()?;
        *placed = None;
        Ok(())
    }

    /// Takes a stamp and a journal of a new session instead of the predecessor's: a mistake.
    #[cfg(feature = "mutants")]
    pub(super) fn mutate_session(&self, image: &Image) {
        let old = self.journal.get().expect("it was taken in");
        let _ = old.remove();
        if let Some(placed) = self.stamp().as_mut() {
            placed.stamp.session = self.runtime().random_id();
            let _ = self.write(&placed.stamp, placed.at, None);
            let _ = self.create_journal(placed.stamp.session, image);
        }
    }
}

/// Writes a footer behind a sector of zeros, where a stamp may come.
pub(super) fn write_zeros_and_footer(file: &File, at: u64, footer: &[u8; SECTOR_BYTES]) -> Result<()> {
    let mut pair = [0; PAIR_BYTES];
    pair[SECTOR_BYTES..].copy_from_slice(footer);
    file.write_at(&pair, at * SECTOR)
}
