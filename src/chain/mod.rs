//! Floor 2: many files as one disk.
//!
//! Owns: finding parents (`parents`, `parent_lookup`, `open`), checking the links between files (`check`), and the file
//! and offset of each sector of the disk (`resolve`). Leaves to others: moving bytes (`disk`, `ops`), the bytes of one
//! file (`image`).
//!
//! ```text
//!      child ──> Top      the one writable layer, with its own changing table and bitmaps
//!     parent ─┐
//! grandparent ├> Frozen   all other layers, merged into one map that never changes
//!       root ─┘
//!
//!   Version = Top over Frozen.  A read looks up Top, then Frozen: at most two look-ups at any depth.
//! ```

mod case_insensitive;
mod changed_ranges;
mod check;
mod children;
mod extent;
mod file_stamp;
mod frozen;
mod frozen_cache;
mod masked_parent;
mod merge_receiver;
mod merge_record;
mod merge_record_file;
mod note_text;
mod open;
mod open_mode;
mod parent_lookup;
mod parent_time;
mod parents;
mod paths;
mod plan;
mod resolve;
mod resolve_snapshot;
mod settle;
mod snapshot_note;
mod snapshot_note_file;
#[cfg(test)]
mod testing;
mod top;
mod unfinished_merge;
mod unfinished_snapshot;
mod version;
mod warning;

pub use check::{CheckedFile, check};
pub use children::{children_of, record_child, refuse_if_parent};
pub use extent::{Extent, Source};
pub use file_stamp::FileStamp;
pub use frozen::{Frozen, Layer};
pub use frozen_cache::FrozenCacheHandle;
pub use merge_receiver::{mark_receiver, receiver_mark, unmark_receiver};
pub use merge_record::{Copied, MergeRecord, MergedLayer};
pub use merge_record_file::ExistingRecord;
pub use open::Chain;
pub use open_mode::OpenMode;
pub use parents::{MAX_DEPTH, Policy};
pub use paths::{absolute_path, relative_path};
pub use plan::{Missing, PlanBuffer};
pub use resolve::Load;
pub use resolve_snapshot::resolve_snapshot;
pub use settle::settle_parents;
pub use snapshot_note::{SnapshotMember, SnapshotNote, SnapshotState};
pub use top::Top;
pub use unfinished_merge::{ImageChange, refuse_change, warn_of_unfinished_merges};
pub use unfinished_snapshot::{UnfinishedSnapshot, refuse_unfinished_snapshot, unfinished_snapshot};
pub use version::Version;
