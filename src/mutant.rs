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
    AllPlaced,
    /// Bits are set when a write begins.
    EarlyMarks,
    /// A flush joins the commit that runs.
    JoinRunning,
    /// A disk that was just opened counts as clean.
    CleanAtOpen,
    /// Marks are not put into the live journal.
    NoJournal,
    /// A journal from before the host crashed is believed.
    OldJournal,
    /// Bits that no commit has taken leave memory.
    EvictDirty,
    /// Bits that a commit has taken leave memory before it is over.
    EvictTaken,
    /// What was read of a bitmap is believed although it came and left meanwhile.
    StaleBits,
}

/// All of them.
pub const ALL: [Mutant; 22] = [
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
    Mutant::AllPlaced,
    Mutant::EarlyMarks,
    Mutant::JoinRunning,
    Mutant::CleanAtOpen,
    Mutant::NoJournal,
    Mutant::OldJournal,
    Mutant::EvictDirty,
    Mutant::EvictTaken,
    Mutant::StaleBits,
];

#[cfg(feature = "mutants")]
thread_local! {
    static MADE: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Makes a mistake on this thread from now on, or none.
#[cfg(feature = "mutants")]
pub fn make(mutant: Option<Mutant>) {
    MADE.set(mutant);
}

/// Whether a mistake is to be made here.
#[cfg(feature = "mutants")]
#[inline]
pub fn is(mutant: Mutant) -> bool {
    MADE.get() == Some(mutant)
}

/// Whether a mistake is to be made here: never.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is(_: Mutant) -> bool {
    false
}
