//! Granules that stay in memory while a request needs them.
//!
//! Without it a request that spans more granules than there is memory for would load one and lose another for ever. With
//! it each load brings it closer: what was loaded for it stays until it has been planned, or marked.

use std::sync::Arc;

use super::writable::Writable;

/// Granules that stay until this is dropped.
#[derive(Default)]
pub struct Pins {
    image: Option<Arc<Writable>>,
    bitmap_sectors: Vec<usize>,
}

impl Pins {
    /// Takes in what was read of a granule of `image` and holds it; where it is there already, that.
    /// `read`: the sector, and what `Bitmaps::times_absent` said before it was read.
    pub fn insert(&mut self, image: &Arc<Writable>, granule: usize, read: Option<(u32, &[u8])>) {
        let bitmaps = image.bitmaps().expect("an image with granules");
        let pinned = match read {
            Some((times, sector)) => bitmaps.insert(granule, times, sector),
            None => bitmaps.pin(granule),
        };
        if pinned {
            self.bitmap_sectors.push(granule);
            self.image.get_or_insert_with(|| image.clone());
        }
    }

    /// Holds nothing any more.
    pub fn release(&mut self) {
        if let Some(image) = self.image.take() {
            let bitmaps = image.bitmaps().expect("an image with granules");
            self.bitmap_sectors.drain(..).for_each(|granule| bitmaps.unpin(granule));
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.release();
    }
}
