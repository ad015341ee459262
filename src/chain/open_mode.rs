//! What a chain is opened for, and with that the locks on its files.

use crate::error::Result;
use crate::image::Image;
use crate::storage::File;

/// What a chain is opened for, and so who else may have its files open meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// To look at headers. No locks: somebody may be writing.
    Inspect,
    /// To read. Nobody may be writing.
    Read,
    /// To read what is left of it, where files have lost sectors. Otherwise as `Read`.
    Salvage,
    /// To write the youngest image. Nobody else may have that open, nobody may be writing a parent.
    Write,
}

impl OpenMode {
    /// Opens the image in a file for this.
    pub(super) fn open_image(self, file: File) -> Result<Image> {
        if self == OpenMode::Salvage { Image::salvage(file) } else { Image::open(file) }
    }
}
