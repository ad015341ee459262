//! Checks an image against every rule, repairs what needs no guess, and undoes repairs.
//!
//! ```text
//!   check_image ──> Report        every rule; check_blocks reads the blocks' bitmaps
//!   repair ──> undo_file          what a repair replaces is kept first
//!   apply_undo                    restores the image from the undo file
//! ```

pub mod apply_undo;
pub(super) mod check_blocks;
pub mod check_image;
pub mod repair;
pub mod report;
pub(super) mod space;
mod undo_file;
