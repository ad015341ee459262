//! The kinds of metadata in an image file.

use std::fmt;

/// A kind of metadata in an image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MetadataPart {
    /// The copy of the footer at the start.
    FrontFooter,
    /// The dynamic header.
    Header,
    /// The BAT, in whole sectors.
    Table,
    /// The header of XenServer's batmap.
    BatmapHeader,
    /// XenServer's batmap.
    Batmap,
    /// The text of a parent locator, in whole sectors.
    Locator(usize),
}

impl fmt::Display for MetadataPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetadataPart::FrontFooter => f.write_str("footer at the start"),
            MetadataPart::Header => f.write_str("dynamic header"),
            MetadataPart::Table => f.write_str("block table"),
            MetadataPart::BatmapHeader => f.write_str("header of the batmap"),
            MetadataPart::Batmap => f.write_str("batmap"),
            MetadataPart::Locator(slot) => write!(f, "parent locator {slot}"),
        }
    }
}
