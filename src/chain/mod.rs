//! Floor 2: many files as one disk.
//!
//! Owns: finding parents (`parents`, `open`), and the answer to "where is this sector" (`resolve`). Leaves to
//! others: moving bytes (`disk`, `ops`), one file's bytes (`image`).
//!
//! ```text
//!      child ──> Top      the one writable layer: its own table and bitmaps, changing
//!     parent ─┐
//! grandparent ├> Frozen   all the others, merged into one map that never changes
//!       root ─┘
//!
//!   Version = Top over Frozen.  A read asks Top, then Frozen: two look-ups at depth 1 or at depth 64.
//! ```

mod cells;
mod changed;
mod check;
mod extent;
mod frozen;
mod hidden;
mod open;
mod parents;
mod pending;
mod resolve;
#[cfg(test)]
mod rig;
mod settle;
mod top;
mod version;

pub use check::{Checked, check};
pub use extent::{Extent, Missing, Plan, Source};
pub use frozen::{Frozen, Layer};
pub use open::{Chain, Use};
pub use parents::{MAX_DEPTH, Policy};
pub use pending::{MAX_NOTE_BYTES, folded_by_note, refuse_if_receiving};
pub use resolve::Load;
pub use settle::settle_parents;
pub use top::Top;
pub use version::Version;
