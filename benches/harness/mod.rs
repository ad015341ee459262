//! Support that the benchmarks share: rounds of measurements, their statistics, targets, command line, results, random
//! numbers.

#[path = "../../tests/common/rng.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod rng;
mod rounds;
mod run;
mod stats;
mod target;

pub(crate) use rng::Rng;
pub use rounds::{Candidate, Pace, Results};
pub(crate) use run::random_stream;
pub use run::{RunReport, Section, is_full, run, write};
pub use target::Bound;
