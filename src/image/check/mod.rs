//! Checks an image against every rule, repairs defects that have one possible repair, and undoes repairs.
//!
//! ```text
//!   check_image ──> Report        checks every rule; check_blocks reads the blocks' bitmaps
//!   repair ──> undo_file          saves what it is about to replace, then repairs
//!   apply_undo                    restores the image from the undo file
//! ```

pub mod apply_undo;
pub(super) mod check_blocks;
pub mod check_image;
pub mod repair;
pub mod report;
pub(super) mod space;
mod undo_file;
