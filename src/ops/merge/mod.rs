//! `merge`: writes CHILD, and all layers between, into an ancestor.
//!
//! ```text
//!   before   grandchild ──> CHILD ──> layer between ──> ancestor
//!   after    grandchild ──────────────────────────────> ancestor, with the disk of CHILD
//! ```
//!
//! The *layers* are CHILD and the images between CHILD and the ancestor. The ancestor's file receives their data and
//! keeps its name. The layers are removed, and CHILD's own children are linked to the ancestor. Meanwhile the ancestor
//! and the children are locked exclusively, and the layers against writers.
//!
//! Each step is durable before the next:
//!
//! 1. Check that the file system has space for the data, and make room for the bitmaps of all blocks that the ancestor
//!    will get.
//! 2. Save the record of the merge ([`MergeRecord`](crate::chain::MergeRecord)). Mark the ancestor as partly overwritten
//!    ([`mark_receiver`](crate::chain::mark_receiver)). Save in the record that copying has begun.
//! 3. Copy the layers into the ancestor, with its own commits. The record gets the progress after a commit, never before.
//! 4. Close the ancestor. Save in the record that everything is copied. Remove the mark.
//! 5. Link each child of CHILD to the ancestor ([`reparent`](crate::image::reparent()), valid at every moment).
//! 6. Remove the layers, youngest first.
//! 7. Remove the record.
//!
//! An interrupted merge is continued by the same command. **Why that is safe:** Before step 5 every reader of CHILD or
//! its children sees the same disk, because only sectors change that the layers hide. In step 5 a child has CHILD or
//! the ancestor as its parent, and both have the same contents. In step 6 no image refers to the removed layer, and
//! every remaining layer still has its parents. All steps may be repeated.
//!
//! The record is compared with the files: by UUID, after they were opened and recovered (a power cut may leave the
//! ancestor without its trailing footer), and by their [`FileStamp`](crate::chain::FileStamp)s. If a layer or the
//! ancestor does not have the recorded stamp (it was written to, or restored from a backup), everything is copied
//! again, which is safe while CHILD exists and hides the ancestor. If CHILD is gone, the merge is refused. Copying
//! changes the ancestor's stamp as well, so an interrupted copy continues only if nothing was written after the last
//! save of the record.
//!
//! An unfinished merge can be given up ([`abandon()`]). Until then `chain` refuses every use of its images that would
//! read wrong data or prevent the merge from being finished or given up.
//!
//! The file times that children record (format 4.3) are valid afterwards: the children of CHILD record the new time
//! of the ancestor and keep their own times.

mod abandon;
mod copy_down;
mod plan;
mod resume;
mod run;

pub use abandon::{Abandoned, abandon};
pub use run::{Merged, PreparedMerge};
