//! The mode in which a chain is opened, which decides the locks on its files.

use crate::error::Result;
use crate::image::Image;
use crate::storage::File;

/// The purpose for which a chain is opened. It decides the locks on its files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// To read headers. No locks: another process may be writing.
    Inspect,
    /// To read. Fails while another process writes to a file of the chain.
    Read,
    /// To read what is left of files that have lost sectors. Otherwise as `Read`.
    Salvage,
    /// To write the youngest image. Fails while another process has it open, or writes to a parent.
    Write,
}

impl OpenMode {
    /// Opens the image in a file in this mode.
    pub(super) fn open_image(self, file: File) -> Result<Image> {
        if self == OpenMode::Salvage { Image::salvage(file) } else { Image::open(file) }
    }
}
