//! Mutants: deliberate mistakes in the order of durable writes, which the tests must find (feature `mutants`, never in a
//! release). Without the feature [`enabled`] is `false` at compile time, and a mutant compiles to nothing.
//!
//! A mutant is enabled per thread, because tests run in parallel.

/// A deliberate mistake. docs/crash-safety.md describes the order of writes that it breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// A commit of a child writes bitmaps without a sync of the data before.
    OneBarrier,
    /// Step C2 writes the current bits instead of those from the start of the commit.
    CurrentBits,
    /// A flush completes when the pointers are written, before they are durable.
    NoLastSync,
    /// Bitmap and BAT are written when a write completes, instead of by a commit.
    EagerMetadata,
    /// A failed sync is ignored, and the next sync is taken as success.
    RetrySync,
    /// Open leaves the bytes after the last block as they are.
    NoScrub,
    /// Open punches the bytes after the last block without a sync before that space is allocated.
    ScrubUnsynced,
    /// Open punches the bytes after the last block although the trailing footer may not be durable.
    ScrubFirst,
    /// Growth sets the new length of the file before it writes the footer at the new end.
    LengthFirst,
    /// Growth wipes the old footer before the new one is durable.
    GrowUnsynced,
    /// Growth leaves the old footer in the space of new blocks.
    NoWipe,
    /// Growth wipes the old footer without a sync before that space is allocated.
    WipeUnsynced,
    /// The file is truncated before the new footer is durable.
    TrimUnsynced,
    /// A commit counts the BAT entries of all blocks as written, even of blocks that it did not cover.
    AllBlocksPlaced,
    /// Bits are set when a write starts, instead of when it completes.
    EarlyMarks,
    /// A flush joins the running commit instead of the next one.
    JoinRunning,
    /// An image counts as synced when it is opened, although a killed process may have left data in the page cache.
    CleanAtOpen,
    /// Marks are not recorded in the live journal.
    NoJournal,
    /// The boot id is ignored, so a journal from before a crash of the machine is replayed.
    IgnoreBootId,
    /// Dirty bitmap sectors are evicted.
    EvictDirty,
    /// Bitmap sectors that are part of a running commit are evicted.
    EvictInCommit,
    /// Bits read from a bitmap are used although the bitmap was loaded and evicted meanwhile.
    StaleBits,
    /// The end of a session removes the journal before the stamp.
    RemoveJournalFirst,
    /// The stamp is written after the first write was acknowledged.
    LateStamp,
    /// The end of a session truncates the file before the last commit.
    TrimFirst,
    /// Stamp and footer are written by two writes instead of one.
    SplitPair,
    /// The stamp is not moved with the footer.
    StampLeftBehind,
    /// A growth that fails after its footer is durable truncates the file to its old end, and so removes the valid stamp.
    UndoCutsStamp,
    /// Recovery overwrites the stamp with zeros.
    ScrubStamp,
    /// A daemon that replays a journal starts a new session.
    NewSessionOnTakeover,
    /// A daemon that replays a journal does not renew the generation.
    NoTakeoverGeneration,
    /// A commit does not renew the generation.
    NoCommitGeneration,
    /// Marks do not renew the generation.
    NoMarkGeneration,
    /// Generations are consecutive numbers instead of random ones.
    CountedGeneration,
    /// The clean end of a session does not end the journal's slots.
    SlotsNotEnded,
    /// A journal is opened although another process has it open.
    NoJournalLock,
    /// A journal with marks is removed if no stamp names it.
    StaleJournalRemoved,
    /// The stamp of a parent is not checked.
    IgnoreParentStamp,
    /// Tools do not check the stamp.
    ToolIgnoresStamp,
    /// A slot contains only new bits, and replaces the bits in the file.
    SlotReplacesBits,
}

/// All mutants.
pub const ALL: [Mutant; 40] = [
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
];

#[cfg(feature = "mutants")]
thread_local! {
    static ENABLED: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Enables a mutant on this thread, or none.
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
