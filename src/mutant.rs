//! Deliberate mistakes in the order of durable writes, for the tests that must find them (feature `mutants`, never in a
//! release). Without the feature every question is answered `false` at compile time and leaves no trace in the program.
//!
//! A mistake belongs to the thread that made it: tests run side by side.

/// A mistake (crash-safety 3.13 says why each is one).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// Bitmaps of a child are written without a sync before them.
    OneBarrier,
    /// C2 writes the bits as they are, not as they were when the commit began.
    CurrentBits,
    /// A flush is answered when the pointers are written, not when they are durable.
    NoLastSync,
    /// Bitmap and table are written as a write is answered.
    EagerMetadata,
    /// After a failed sync the next one is believed.
    RetrySync,
    /// What lies behind the last block stays there on open.
    NoScrub,
    /// It is punched, but not durably before the room is given out.
    ScrubUnsynced,
    /// It is punched while the trailing footer may not be durable yet.
    ScrubFirst,
    /// The file gets its new length before the footer at its end.
    LengthFirst,
    /// The old footer is wiped before the new one is durable.
    GrowUnsynced,
    /// The old footer stays where new blocks go.
    NoWipe,
    /// It is wiped, but not durably before the room is given out.
    WipeUnsynced,
    /// The file is cut before the new footer is durable.
    TrimUnsynced,
    /// A commit counts all places as known to the file, those of blocks that it did not cover, too.
    AllBlocksPlaced,
    /// Bits are set when a write begins.
    EarlyMarks,
    /// A flush joins the commit that runs.
    JoinRunning,
    /// A disk that was just opened counts as clean.
    CleanAtOpen,
    /// Marks are not put into the live journal.
    NoJournal,
    /// The boot id is ignored: a journal from before the host crashed is believed.
    IgnoreBootId,
    /// Bits that no commit has taken leave memory.
    EvictDirty,
    /// Bits that a commit has taken leave memory before it is over.
    EvictInCommit,
    /// What was read of a bitmap is believed although it came and left meanwhile.
    StaleBits,
    /// The journal is removed before the stamp.
    RemoveJournalFirst,
    /// The stamp is written after the first answer.
    LateStamp,
    /// The file is cut before the last commit.
    TrimFirst,
    /// Stamp and footer are two writes.
    SplitPair,
    /// The stamp stays where it was when the footer moves.
    StampLeftBehind,
    /// Growth that fails late cuts the file at its old end, with the stamp that counts.
    UndoCutsStamp,
    /// Recovery makes the stamp zero, too.
    ScrubStamp,
    /// Who takes a journal in begins a session of its own.
    NewSessionOnTakeover,
    /// Who takes a journal in leaves the generation.
    NoTakeoverGeneration,
    /// A commit leaves the generation.
    NoCommitGeneration,
    /// Marks leave the generation.
    NoMarkGeneration,
    /// Generations are counted.
    CountedGeneration,
    /// Slots are not ended at a clean end.
    SlotsNotEnded,
    /// A journal that a process has open is opened by another.
    NoJournalLock,
    /// A journal with marks that no stamp names is removed.
    StaleJournalRemoved,
    /// A parent's stamp is not looked at.
    IgnoreParentStamp,
    /// Tools do not look at the stamp.
    ToolIgnoresStamp,
    /// A slot has new bits only, and replaces those of the file.
    SlotReplacesBits,
}

/// All of them.
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

/// Makes a mistake on this thread from now on, or none.
#[cfg(feature = "mutants")]
pub fn enable(mutant: Option<Mutant>) {
    ENABLED.set(mutant);
}

/// Whether a mistake is to be made here.
#[cfg(feature = "mutants")]
#[inline]
pub fn enabled(mutant: Mutant) -> bool {
    ENABLED.get() == Some(mutant)
}

/// Whether a mistake is to be made here: never.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn enabled(_: Mutant) -> bool {
    false
}
