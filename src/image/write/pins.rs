//! Pins: bitmap sectors that stay in memory while a request needs them.
//!
//! Without pins, a request that spans more bitmap sectors than the cache has frames might never find all of them in
//! memory: each load could evict another one. With pins each load makes progress: a loaded bitmap sector stays until
//! the request has been planned or marked.

use std::sync::Arc;

use super::writable::Writable;
use crate::units::BitmapSectorIndex;

/// Bitmap sectors that stay in memory until this is dropped.
#[derive(Default)]
pub struct Pins(Vec<(Arc<Writable>, BitmapSectorIndex)>);

impl Pins {
    /// Inserts a bitmap sector that was read from the file into the cache of `image`, and pins it. A bitmap sector
    /// whose bits are all set is not pinned, because it has no frame that could be evicted. A bitmap sector that was
    /// inserted and evicted during the read is neither inserted nor pinned, and must be read again.
    ///
    /// `read` contains the result of `Bitmaps::eviction_count` from before the read, and the sector. If `read` is
    /// `None`, the bitmap sector is pinned if it has a frame.
    pub fn insert(&mut self, image: &Arc<Writable>, index: BitmapSectorIndex, read: Option<(u32, &[u8])>) {
        let bitmaps = image.bitmaps().expect("only images with bitmaps are asked for them");
        let pinned = match read {
            Some((evictions, sector)) => bitmaps.insert(index, evictions, sector),
            None => bitmaps.pin(index),
        };
        if pinned {
            self.0.push((image.clone(), index));
        }
    }

    /// Unpins all bitmap sectors.
    pub fn release(&mut self) {
        for (image, index) in self.0.drain(..) {
            image.bitmaps().expect("only images with bitmaps are asked for them").unpin(index);
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.release();
    }
}
