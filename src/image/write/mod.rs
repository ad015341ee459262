//! Writes to an image: places for blocks, marks for sectors, commits, growth, and the live journal.
//!
//! ```text
//!   settle, trim                    the end of a session
//!   commit, growth                  jobs in steps; run_to_completion carries them out
//!   writable                        reserve and mark
//!   recover, session, durability    recovery after an unclean end; how writes survive a kill of this process
//!   journal, bitmap, free_tail      the state that the modules above change
//! ```
//!
//! A failed sync of a commit, of growth or of a first stamp poisons the image (`Writable::poison` in `writable`,
//! crash-safety 6.1).

pub mod allocation;
pub mod bitmap;
#[cfg(all(test, feature = "sim"))]
mod clock_tests;
pub mod commit;
pub mod discard_session;
pub mod durability;
mod free_tail;
pub mod gauges;
pub mod growth;
mod growth_error;
mod growth_policy;
pub mod job_step;
pub mod journal;
pub mod journal_layout;
mod journal_validation;
#[cfg(feature = "mutants")]
mod mutants;
pub mod pins;
pub(super) mod recover;
mod retire;
pub mod run_to_completion;
mod session;
pub mod settle;
pub mod stale_journals;
mod trim;
pub mod writable;
mod writable_session;
