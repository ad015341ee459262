//! Mutants: deliberate mistakes in the order of durable writes, and in the steps of changes of a running disk. The
//! tests must find each of them. Mutants exist only with the feature `mutants`, which no release has. Without the
//! feature [`enabled`] is `false` at compile time, and a mutant compiles to nothing.
//!
//! A mutant is enabled per thread, because tests run in parallel.

/// A deliberate mistake. docs/crash-safety.md describes the order of writes that most mistakes break.
/// `disk::version_swap` describes the order of a change of the version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// A commit of a child writes the bitmaps without a preceding sync of the data.
    OneBarrier,
    /// Step C2 of a commit writes the current bits instead of the bits from the start of the commit.
    CurrentBits,
    /// A flush completes when the pointers are written, before the pointers are durable.
    NoLastSync,
    /// The bitmap and the BAT are written when a write completes, instead of by a commit.
    EagerMetadata,
    /// A failed sync is ignored, and the next sync is taken as success.
    RetrySync,
    /// Recovery leaves the bytes after the last block as they are.
    NoScrub,
    /// Recovery punches the bytes after the last block, and a block is allocated there without a sync in between.
    ScrubUnsynced,
    /// Recovery punches the bytes after the last block although the trailing footer may not be durable.
    ScrubFirst,
    /// Growth sets the new length of the file before it writes the footer at the new end.
    LengthFirst,
    /// Growth overwrites the old footer before the new footer is durable.
    GrowUnsynced,
    /// Growth leaves the old footer in the space of new blocks.
    NoWipe,
    /// Growth overwrites the old footer with zeros, and a block is allocated there without a sync in between.
    WipeUnsynced,
    /// The file is truncated before the new footer is durable.
    TrimUnsynced,
    /// A commit treats the BAT entries of all blocks as written, including entries that the commit did not write.
    AllBlocksPlaced,
    /// Bits are set when a write starts, instead of when the write completes.
    EarlyMarks,
    /// A flush joins the running commit instead of the next one.
    JoinRunning,
    /// A newly opened image counts as synced, although a killed process may have left data in the page cache.
    CleanAtOpen,
    /// Marks are not recorded in the live journal.
    NoJournal,
    /// The boot id is ignored, so a journal from before a crash of the machine is replayed.
    IgnoreBootId,
    /// Dirty bitmap sectors are evicted.
    EvictDirty,
    /// Bitmap sectors that are part of a running commit are evicted.
    EvictInCommit,
    /// A bitmap sector that was read from the file is used, although another load and an eviction have made it out of
    /// date.
    StaleBits,

    // Mistakes in the rules of sessions (crash-safety 7). `tests/world/sessions.rs` finds them.
    /// The end of a session removes the journal before it removes the stamp.
    RemoveJournalFirst,
    /// The first stamp of a session is not synced, although other machines use the file system.
    StampUnsynced,
    /// The stamp is written only after the first write was acknowledged.
    LateStamp,
    /// The end of a session truncates the file before the last commit.
    TrimFirst,
    /// The stamp and the trailing footer are written by two writes instead of one.
    SplitPair,
    /// Growth does not move the stamp with the trailing footer.
    StampLeftBehind,
    /// A growth that fails after its new footer is durable truncates the file to the previous length, which removes the
    /// valid stamp.
    UndoCutsStamp,
    /// Recovery overwrites the stamp with zeros.
    ScrubStamp,
    /// A daemon that replays a journal starts a new session.
    NewSessionOnTakeover,
    /// A daemon that replays a journal does not renew the generation afterwards.
    NoTakeoverGeneration,
    /// A commit does not renew the generation.
    NoCommitGeneration,
    /// Marks do not renew the generation.
    NoMarkGeneration,
    /// Generations are consecutive numbers instead of random ones.
    CountedGeneration,
    /// The end of a session leaves the slots of the journal in use.
    SlotsNotEnded,
    /// A journal is opened although another process has it open.
    NoJournalLock,
    /// A journal with marks is removed if no stamp names it.
    StaleJournalRemoved,
    /// The stamp of a parent is not checked.
    IgnoreParentStamp,
    /// Tools do not check the stamp.
    ToolIgnoresStamp,
    /// A journal slot contains only new bits, and its replay replaces the bits in the file.
    SlotReplacesBits,

    // Mistakes in changes of the version of a running disk, with snapshots.
    /// A file slot is freed while operations of an older version use it.
    SlotFreedEarly,
    /// Commit rounds continue while the file that takes the writes is replaced.
    RoundsNotHeld,
    /// The file that takes the writes is replaced although writes to the old one are under way.
    WritesNotAwaited,
    /// A snapshot is decided before the sealed image is committed.
    SealedUncommitted,
    /// Flushes are answered between the switch and the decision of a snapshot.
    FlushBeforeDecision,

    // Mistakes in the notes of snapshots, and in their resolution (crash-safety 12).
    /// The link to the kept name is not synced before the new child is renamed over the active image.
    SnapshotKeptUnsynced,
    /// The decision is recorded in the note without a sync of the folder.
    SnapshotNoteUnsynced,
    /// An unfinished snapshot is finished in every state.
    SnapshotAlwaysForward,
    /// The state "switched" counts also after a restart of the machine.
    SnapshotSwitchedAfterBoot,
    /// Notes of unfinished snapshots are not searched.
    SnapshotIgnored,
    /// Before the decision only the previous image of the opened disk is settled, not those of the other members.
    SnapshotOnlyOwnSettled,
}

/// All mutants.
pub const ALL: [Mutant; 52] = [
    Mutant::OneBarrier,
    Mutant::CurrentBits,
    Mutant::NoLastSync,
    Mutant::EagerMetadata,
    Mutant::RetrySync,
    Mutant::NoScrub,
    Mutant::ScrubUnsynced,
    Mutant::ScrubFirst,
    Mutant::LengthFirst,
    Mutant::GrowUnsynced,
    Mutant::NoWipe,
    Mutant::WipeUnsynced,
    Mutant::TrimUnsynced,
    Mutant::AllBlocksPlaced,
    Mutant::EarlyMarks,
    Mutant::JoinRunning,
    Mutant::CleanAtOpen,
    Mutant::NoJournal,
    Mutant::IgnoreBootId,
    Mutant::EvictDirty,
    Mutant::EvictInCommit,
    Mutant::StaleBits,
    Mutant::RemoveJournalFirst,
    Mutant::StampUnsynced,
    Mutant::LateStamp,
    Mutant::TrimFirst,
    Mutant::SplitPair,
    Mutant::StampLeftBehind,
    Mutant::UndoCutsStamp,
    Mutant::ScrubStamp,
    Mutant::NewSessionOnTakeover,
    Mutant::NoTakeoverGeneration,
    Mutant::NoCommitGeneration,
    Mutant::NoMarkGeneration,
    Mutant::CountedGeneration,
    Mutant::SlotsNotEnded,
    Mutant::NoJournalLock,
    Mutant::StaleJournalRemoved,
    Mutant::IgnoreParentStamp,
    Mutant::ToolIgnoresStamp,
    Mutant::SlotReplacesBits,
    Mutant::SlotFreedEarly,
    Mutant::RoundsNotHeld,
    Mutant::WritesNotAwaited,
    Mutant::SealedUncommitted,
    Mutant::FlushBeforeDecision,
    Mutant::SnapshotKeptUnsynced,
    Mutant::SnapshotNoteUnsynced,
    Mutant::SnapshotAlwaysForward,
    Mutant::SnapshotSwitchedAfterBoot,
    Mutant::SnapshotIgnored,
    Mutant::SnapshotOnlyOwnSettled,
];

#[cfg(feature = "mutants")]
thread_local! {
    static ENABLED: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Enables a mutant on this thread, or disables all with `None`.
#[cfg(feature = "mutants")]
pub fn enable(mutant: Option<Mutant>) {
    ENABLED.set(mutant);
}

/// Returns whether a mutant is enabled on this thread.
#[cfg(feature = "mutants")]
#[inline]
pub fn enabled(mutant: Mutant) -> bool {
    ENABLED.get() == Some(mutant)
}

/// Returns false: mutants need the feature `mutants`.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn enabled(_: Mutant) -> bool {
    false
}
