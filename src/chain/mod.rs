//! Floor 2: many files as one disk.
//!
//! Owns: finding parents (`parents`, `seek`, `open`), and the answer to "where is this sector" (`resolve`). Leaves to
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

mod any_case;
mod cells;
mod changed;
mod check;
mod children;
mod extent;
mod frozen;
mod hidden;
mod merge_record;
mod open;
mod parent_time;
mod parents;
mod pending;
mod resolve;
#[cfg(test)]
mod rig;
mod seek;
mod seen;
mod settle;
mod top;
mod version;
mod warning;

pub use check::{Checked, check};
pub use children::{children_of, mark_parent, place_of, refuse_if_parent, relative};
pub use extent::{Extent, Missing, Plan, Source};
pub use frozen::{Frozen, Layer};
pub use merge_record::{Copied, Earlier, Folded, MergeRecord};
pub use open::{Chain, Use};
pub use parents::{MAX_DEPTH, Policy};
pub use pending::{Change, mark_receiver, marked_by, refuse_change, unmark_receiver, warn_of_merges};
pub use resolve::Load;
pub use seen::Seen;
pub use settle::settle_parents;
pub use top::Top;
pub use version::Version;
