//! Floor 0: the bytes of a VHD.
//!
//! Owns: what each byte of an image means, which bytes are acceptable (a [`Defect`] for every way they are not), and
//! where things go in a file. Leaves to others: reading and writing them, and in which order they become durable.
//! There is no I/O here, and nothing is allocated by a number that a file names.
//!
//! ```text
//! fixed            data ................................................ | footer
//!
//! dynamic          footer | header | BAT | gap | bitmap data | gap | bitmap data ... | zero tail | footer
//!                  copy     |        |  └─ per block: the sector where its bitmap begins, or unused
//!                           |        └─ its place: header.table_offset
//!                           └─ its place: footer.data_offset
//!
//! differencing     footer | header | locators | BAT | as above                                   | footer
//!                  copy     └─ parent's UUID, name, and where the locators (paths to the parent) are
//!
//! XenServer's      ... BAT | batmap header | batmap (per block: whole or not) | ...
//! ```
//!
//! All numbers are big-endian; the text in locators alone is UTF-16 little-endian.
//!
//! [`footer`] and [`footer_choice`] say which disk it is, [`header`] and [`bat`] where its blocks are, [`bitmap`] which
//! sectors of a block are there, [`locator`] and [`parent_path`] where the parent is, [`layout`] where new things go,
//! [`metadata`] and [`entries`] whether old things are where they may be, and [`batmap`] is XenServer's addition. A
//! [`session_stamp`] names the live journal of an image that a daemon has open.

pub mod bat;
pub mod batmap;
pub mod bitmap;
mod checksum;
pub mod defect;
mod defect_rule;
pub mod entries;
pub mod footer;
pub mod footer_choice;
pub mod geometry;
pub mod header;
pub mod image_format;
pub mod layout;
pub mod locator;
pub mod metadata;
pub mod metadata_part;
pub mod parent_path;
#[cfg(test)]
pub(crate) mod random;
pub mod session_stamp;

pub use batmap::BatmapHeader;
pub use defect::Defect;
pub use defect_rule::{Consequence, Severity};
pub use entries::{EntryRules, PlacedBlocks, check_entries, unreferenced};
pub use footer::{DiskType, Footer};
pub use footer_choice::{ChosenFooter, FooterSource, choose};
pub use geometry::Geometry;
pub use header::DynamicHeader;
pub use image_format::ImageFormat;
pub use layout::NewLayout;
pub use locator::{LocatorEntry, Platform, RecordedParent};
pub use metadata::{MetadataExtent, MetadataMap, check_header_place, check_table};
pub use metadata_part::MetadataPart;
pub use parent_path::ParentPath;
pub use session_stamp::SessionStamp;
