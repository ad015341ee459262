//! `merge`: copies CHILD, and all layers between CHILD and an ancestor, into the ancestor.
//!
//! ```text
//!   before   grandchild ──> CHILD ──> layer between ──> ancestor
//!   after    grandchild ──────────────────────────────> ancestor, with the disk of CHILD
//! ```
//!
//! The *layers* are CHILD and the images between CHILD and the ancestor. The file of the ancestor receives the data of
//! the layers and keeps its name. The layers are removed, and the children of CHILD are linked to the ancestor. A run
//! that copies data locks the ancestor and the children exclusively, and the layers against writers. A run that finds
//! everything copied locks the ancestor against writers, and each other file when it changes or removes the file.
//!
//! Each step is durable before the next:
//!
//! 1. Check that the file system has space for the data, and make room in the ancestor's file for the blocks that the
//!    data adds.
//! 2. Save the merge record ([`MergeRecord`](crate::chain::MergeRecord)). Mark the ancestor as partly overwritten
//!    ([`mark_receiver`](crate::chain::mark_receiver)), if the file system has extended attributes. Save in the merge
//!    record that copying has begun.
//! 3. Copy the layers into the ancestor, with commits of the ancestor. Progress is saved in the merge record only after
//!    the commit that makes it durable.
//! 4. Close the ancestor. Save in the merge record that everything is copied. Remove the mark from the ancestor.
//! 5. Link each child of CHILD to the ancestor ([`reparent`](crate::image::reparent()), which keeps the child valid at
//!    every moment).
//! 6. Remove the layers, youngest first.
//! 7. Remove the merge record.
//!
//! The same command continues an interrupted merge. **Why continuing is safe:** Before step 5 every reader of CHILD or
//! of its children sees the same disk, because the merge changes only sectors that the layers hide. In step 5 a child
//! has CHILD or the ancestor as its parent, and both disks have the same contents. In step 6 no image refers to the
//! removed layer, and every remaining layer still has its parents. All steps may be repeated.
//!
//! The merge record is compared with the files by UUID and by [`FileStamp`](crate::chain::FileStamp). The UUID is
//! compared after the file was opened and recovered, since a power cut may leave the ancestor without its trailing
//! footer. If the file stamp of a layer or of the ancestor differs from the recorded one (because the file was written
//! to, or restored from a backup), everything is copied again. This is safe while CHILD exists and hides the ancestor.
//! If CHILD no longer exists, the merge is refused. Copying changes the file stamp of the ancestor as well, so an
//! interrupted copy continues only if nothing was written after the last save of the merge record.
//!
//! An unfinished merge can be abandoned ([`abandon()`]). Until the merge is finished or abandoned, `chain` refuses
//! every use of its images that would read wrong data, or would prevent the merge from being finished or abandoned.
//!
//! After the merge, the modification times that children record for their parents (format 4.3) are valid: each child of
//! CHILD records the new time of the ancestor, and the time of the child's own file is preserved.

mod abandon;
mod copy_down;
mod plan;
mod resume;
mod run;

pub use abandon::{Abandoned, abandon};
pub use run::{Merged, PreparedMerge};
