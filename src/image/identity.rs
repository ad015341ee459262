//! Reads the identity of an image and of its parent from its footers and header alone.

use uuid::Uuid;

use super::structures::read_footers;
use crate::error::Result;
use crate::format::{DiskType, DynamicHeader, check_header_place};
use crate::storage::File;

/// The identity of an image, read without its block table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImageIdentity {
    /// The image's UUID.
    pub uuid: Uuid,
    /// The size of the disk in bytes.
    pub size: u64,
    /// The parent's UUID; `None` for a root.
    pub parent: Option<Uuid>,
}

impl ImageIdentity {
    /// Reads the identity of the image in a file. Returns `None` if the file has no valid footer, or if a child has no
    /// valid dynamic header. An open may still refuse the image, since the other metadata is not read.
    ///
    /// # Errors
    /// `Io`.
    pub fn peek(file: &File) -> Result<Option<ImageIdentity>> {
        let len = file.stat()?.len;
        let Ok(chosen) = read_footers(file, len)? else { return Ok(None) };
        let footer = chosen.footer;
        let (uuid, size) = (footer.uuid, footer.current_size);
        if footer.disk_type != DiskType::Differencing {
            return Ok(Some(ImageIdentity { uuid, size, parent: None }));
        }
        if check_header_place(&footer, len).is_err() {
            return Ok(None);
        }
        let mut bytes = [0; 1024];
        file.read_at(&mut bytes, footer.data_offset)?;
        let header = DynamicHeader::decode(&bytes);
        Ok(header.ok().map(|header| ImageIdentity { uuid, size, parent: Some(header.parent_uuid) }))
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::super::ImageKind;
    use super::super::testing::{child, file, host_with};
    use super::*;

    #[test]
    fn identity_and_parent_are_read_from_images_only() {
        let host = host_with(child(), 100);
        let seen = ImageIdentity::peek(&file(&host)).unwrap().expect("an image");
        assert_eq!(seen.parent, Some(Uuid::from_u128(7)));
        let f = file(&host);
        f.write_at(&[0; 512], f.stat().unwrap().len - 512).unwrap();
        assert_eq!(ImageIdentity::peek(&f).unwrap(), Some(seen), "by the copy at the start");
        f.write_at(&[0; 8], 512).unwrap();
        assert_eq!(ImageIdentity::peek(&f).unwrap(), None, "no header");
        f.set_len(100).unwrap();
        assert_eq!(ImageIdentity::peek(&f).unwrap(), None);
        let root = host_with(ImageKind::Fixed, 100);
        assert_eq!(ImageIdentity::peek(&file(&root)).unwrap().map(|seen| seen.parent), Some(None));
    }
}
