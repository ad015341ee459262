//! Floor 0: the bytes of a VHD.
//!
//! Defines the meaning of each byte of an image, the rules for these bytes (a [`Defect`] for each broken rule), and the
//! layout of new images. Other modules read and write files, and order the writes. There is no I/O here, and no number
//! from a file sizes an allocation.
//!
//! ```text
//! fixed            data ................................................ | footer
//!
//! dynamic          footer | header | BAT | gap | bitmap data | gap | bitmap data ... | zero tail | footer
//!                  copy     |        |  └─ for each block: the sector where its bitmap begins, or unused
//!                           |        └─ at header.table_offset
//!                           └─ at footer.data_offset
//!
//! differencing     footer | header | locators | BAT | as above                                   | footer
//!                  copy     └─ parent's UUID, name, and where the locators (paths to the parent) are
//!
//! XenServer        ... BAT | batmap header | batmap (a bit for each block: whole or not) | ...
//! ```
//!
//! All numbers are big-endian; only the text in locators of Windows is UTF-16 little-endian.
//!
//! | question | module |
//! | --- | --- |
//! | which rules exist, and what breaking one means | [`defect`] |
//! | kind, size and identity of the disk | [`footer`], [`footer_choice`] |
//! | where its blocks are | [`header`], [`bat`] |
//! | which sectors of a block are present | [`bitmap`] |
//! | where the parent is | [`locator`], [`parent_path`] |
//! | where new metadata and blocks go | [`layout`] |
//! | whether metadata and blocks lie where they may | [`metadata`], [`entries`] |
//! | XenServer's addition | [`batmap`] |
//! | which live journal belongs to an image that is open | [`session_stamp`] |

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
