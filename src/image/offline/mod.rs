//! Changes the structure of an image that is locked exclusively: its size, its parent, the places of its blocks.
//!
//! ```text
//!   resize, compact ──> bat ──> offline_image     each step leads from one valid image to another
//!   reparent                                      replaces or removes the parent
//! ```

mod bat;
pub mod compact;
pub mod offline_image;
pub mod reparent;
pub mod resize;
