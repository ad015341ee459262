//! The mode in which a chain is opened, which decides the locks on its files.

use crate::error::Result;
use crate::image::Image;
use crate::storage::File;

/// The purpose for which a chain is opened. The mode decides the locks on the files of the chain, and whether an image
/// that has lost sectors is accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// Reads metadata. Takes no locks, so another process may be writing.
    Inspect,
    /// Reads the disk. Fails if another process holds a file of the chain locked for writing.
    Read,
    /// Reads the remaining sectors of files that have lost some. Otherwise like `Read`.
    Salvage,
    /// Writes the youngest image. Fails if another process holds any lock on that image, or holds a parent locked for
    /// writing.
    Write,
}

impl OpenMode {
    /// Opens the image in a file in this mode.
    pub(super) fn open_image(self, file: File) -> Result<Image> {
        if self == OpenMode::Salvage { Image::salvage(file) } else { Image::open(file) }
    }
}
