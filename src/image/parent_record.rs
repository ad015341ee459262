//! Reads the parent locators and the parent name of a child.

use super::open::Image;
use crate::error::Result;
use crate::format::locator::RecordedParent;
use crate::format::{DiskType, Platform};
use crate::units::SECTOR;

impl Image {
    /// Returns the recorded paths and names of the parent; empty for a root. Locators that cannot be decoded are
    /// skipped.
    ///
    /// # Errors
    /// `Io`.
    pub fn recorded_parent(&self) -> Result<RecordedParent> {
        let Some(sparse) = self.sparse().filter(|_| self.kind() == DiskType::Differencing) else {
            return Ok(RecordedParent::default());
        };
        let texts = self.parent_locators()?;
        let texts = texts.iter().map(|(slot, platform, text)| (*slot, *platform, text.as_slice()));
        let recorded = RecordedParent::read(texts, &sparse.header.parent_name);
        for note in &recorded.notes {
            log::debug!("{}: {note}", self.file().path().display());
        }
        Ok(recorded)
    }

    /// Reads the bytes of each valid parent locator, with its slot and platform; none for a root.
    ///
    /// # Errors
    /// `Io`.
    pub fn parent_locators(&self) -> Result<Vec<(usize, Platform, Vec<u8>)>> {
        let mut texts = Vec::new();
        let Some(sparse) = self.sparse().filter(|_| self.kind() == DiskType::Differencing) else {
            return Ok(texts);
        };
        for (slot, locator) in sparse.header.locators.iter().enumerate() {
            if !sparse.metadata.has_locator(slot) {
                continue;
            }
            if let Ok(Some(range)) = locator.text_range(slot, self.data_end().max(SECTOR)) {
                let len = usize::try_from(range.end - range.start).expect("at most 4096 by the rules");
                let mut text = vec![0; len];
                self.file().read_at(&mut text, range.start)?;
                texts.push((slot, locator.platform(), text));
            }
        }
        Ok(texts)
    }
}
