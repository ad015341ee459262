//! `merge`: CHILD, and all between, folded into an ancestor.
//!
//! ```text
//!    before           after            before               after
//!    grandchild ─┐    grandchild ─┐
//!    CHILD ──────┤                │    CHILD ────┐
//!    parent <────┘    parent <────┘    parent <──┘          parent, with CHILD's disk
//! ```
//!
//! The ancestor's file receives, and keeps its name; CHILD and all between are removed; CHILD's own children are linked
//! to the ancestor. Nobody has the files meanwhile: the ancestor and the children are locked exclusively, what is folded
//! is locked against writing.
//!
//! Each step is durable before the next:
//!
//! 1. room for the bitmaps of all blocks that the ancestor lacks and that get data; a host that has no room for their data is
//!    refused before anything is copied;
//! 2. the record of what is being done ([`MergeRecord`]), then the receiver's mark (`chain/unfinished_merge.rs`), then a record
//!    that copying has begun;
//! 3. what the layers say is copied into the ancestor, by its own order of commits; how far it has come is noted after a
//!    commit, never before;
//! 4. the ancestor is closed, and the note says that all is copied;
//! 5. each child is linked to the ancestor ([`mod@crate::image::reparent`], whole at every moment);
//! 6. CHILD's name is removed, then those of the layers between, downwards;
//! 7. the note is removed.
//!
//! Whoever is ended anywhere starts again with the same command. Until 5 every reader of CHILD or of its children sees
//! the same disk: only sectors change that the folded layers hide. In 5 a child has CHILD or the ancestor for its parent,
//! and both show the same. In 6 nobody refers any more to what goes, and it goes from the top, so that what is still
//! there still has its parents. Doing any of it again changes nothing.
//!
//! What the note says is held against the files, by UUID and after they were opened (and recovered: an ancestor without
//! its trailing footer is what a power cut leaves). And by their state ([`FileStamp`]): where a layer or the ancestor is
//! not what the note knows any more (written to, or restored from a backup), all is copied again from the beginning, which
//! changes nothing as long as CHILD is there to hide it; without CHILD nothing more is done. Copying changes the ancestor,
//! too: a killed start goes on where it was only if nothing came behind its last note.
//!
//! A merge that was not finished may be given up (`abandon.rs`). Until it is finished or given up, `chain` refuses every
//! use of its images that would read wrong data or prevent both.
//!
//! The file times that children record (vhd-format 4.3) are right afterwards: the ancestor has a new one, which its new
//! children record; the files of these children have the times that they had before.

mod abandon;
mod copy_down;
mod plan;
mod resume;
mod run;

pub use abandon::{Abandoned, abandon};
pub use run::{Merged, PreparedMerge};
