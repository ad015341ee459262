//! Changed ranges between an ancestor and a child: the sectors that any layer above the ancestor holds. They are
//! computed from bitmaps, exact to the sector; no data is read.
//!
//! A sector counts as changed if it was written, even with the same bytes. The sectors of the ancestor after the end of
//! a layer above it count as changed, too, since the child reads zeros there.

use super::open::Chain;
use crate::error::Result;
use crate::format::bitmap;
use crate::image::Image;
use crate::units::{SECTOR, SectorRange};

/// Number of sectors per window of the scan: 512 MiB.
const WINDOW_SECTORS: u64 = 1 << 20;

/// A layer above the ancestor.
struct LayerCursor<'a> {
    image: &'a Image,
    /// Number of sectors of the layer that are visible from the child.
    visible: u64,
    /// The visible sectors of the ancestor after the end of this layer.
    truncated: SectorRange,
    /// The last result of `advance_to`, valid for all positions up to it; `None` after the last change.
    next_change: Option<u64>,
}

impl Chain {
    /// Calls `found` with each range that changed since image number `ancestor` of this chain, in ascending order, with
    /// adjacent ranges joined.
    ///
    /// # Errors
    /// - `Io`
    /// - the error of `found`
    pub fn changed_ranges(&self, ancestor: usize, mut found: impl FnMut(SectorRange) -> Result<()>) -> Result<()> {
        let images = self.images();
        let mut limit = self.youngest().size() / SECTOR;
        let mut layers = Vec::new();
        for image in &images[..ancestor] {
            let visible = limit.min(image.size() / SECTOR);
            let truncated = SectorRange::between(visible, limit.min(images[ancestor].size() / SECTOR));
            layers.push(LayerCursor { image, visible, truncated, next_change: Some(0) });
            limit = visible;
        }
        images.iter().take(ancestor).for_each(|image| image.file().advise_random_reads());
        let mut window = vec![0; (WINDOW_SECTORS / 64) as usize];
        let mut pending = SectorRange::default();
        let mut from = 0;
        while let Some(next) = layers.iter_mut().filter_map(|layer| layer.advance_to(from)).min() {
            from = next / WINDOW_SECTORS * WINDOW_SECTORS;
            window.fill(0);
            let range = SectorRange::between(from, from + WINDOW_SECTORS);
            layers.iter().filter(|layer| layer.next_change.is_some_and(|next| next < range.end())).for_each(|layer| {
                layer.image.prefetch_bitmaps(range.clip(SectorRange::between(0, layer.visible)));
            });
            for layer in &layers {
                layer.set_changed_bits(range, &mut window)?;
            }
            let end = u32::try_from(WINDOW_SECTORS).expect("2^20");
            let mut bit = 0;
            while bit < end {
                let (set, count) = bitmap::run(&window, bit, end);
                if set {
                    let start = from + u64::from(bit);
                    let run = SectorRange::between(start, start + u64::from(count));
                    if pending.end() == run.start() && !pending.is_empty() {
                        pending = SectorRange::between(pending.start(), run.end());
                    } else {
                        report(pending, &mut found)?;
                        pending = run;
                    }
                }
                bit += count;
            }
            from += WINDOW_SECTORS;
        }
        report(pending, &mut found)
    }
}

fn report(range: SectorRange, found: &mut impl FnMut(SectorRange) -> Result<()>) -> Result<()> {
    if range.is_empty() { Ok(()) } else { found(range) }
}

impl LayerCursor<'_> {
    /// The first sector, at or after `from`, that this layer may have changed.
    fn advance_to(&mut self, from: u64) -> Option<u64> {
        if self.next_change.is_some_and(|next| next < from || from == 0) {
            self.next_change = self.first_change_from(from);
        }
        self.next_change
    }

    fn first_change_from(&self, from: u64) -> Option<u64> {
        let (table, block_size) = (self.image.bat()?, self.image.block_size()?);
        let block = if from < self.visible { table.next_used(block_size.block_at(from)) } else { None };
        let placed = block.map(|block| block_size.sectors_of(block).start().max(from)).filter(|at| *at < self.visible);
        let cut = (from < self.truncated.end() && !self.truncated.is_empty()).then(|| self.truncated.start().max(from));
        placed.into_iter().chain(cut).min()
    }

    /// Sets the bits of the sectors of a window that this layer has changed.
    fn set_changed_bits(&self, window: SectorRange, bits: &mut [u64]) -> Result<()> {
        let within = |sector: u64| u32::try_from(sector - window.start()).expect("inside a window");
        let cut = self.truncated.clip(window);
        if !cut.is_empty() {
            bitmap::set(bits, within(cut.start()), within(cut.end()) - within(cut.start()));
        }
        let Some((table, block_size)) = self.image.bat().zip(self.image.block_size()) else { return Ok(()) };
        let visible = window.clip(SectorRange::between(0, self.visible));
        let mut rest = visible;
        while !rest.is_empty() {
            let Some(block) = table.next_used(block_size.block_at(rest.start())) else { return Ok(()) };
            let range = block_size.sectors_of(block);
            let part = range.clip(rest);
            if part.is_empty() {
                return Ok(());
            }
            rest = SectorRange::between(part.end(), visible.end());
            let words = self.image.block_bitmap(block)?.expect("the block has a place");
            let mut bit = block_size.sector_in_block(part.start());
            let end = bit + u32::try_from(part.count()).expect("a part of a block");
            while bit < end {
                let (set, count) = bitmap::run(&words, bit, end);
                if set {
                    bitmap::set(bits, within(range.start() + u64::from(bit)), count);
                }
                bit += count;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::OpenMode;
    use super::super::testing::ChainFolder;

    fn changed(chains: &ChainFolder, child: &str, ancestor: usize) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        let chain = chains.chain(child, OpenMode::Read).unwrap();
        let found = |range: crate::units::SectorRange| {
            ranges.push((range.start(), range.end()));
            Ok(())
        };
        chain.changed_ranges(ancestor, found).unwrap();
        ranges
    }

    #[test]
    fn sectors_of_every_layer_above_are_found() {
        let chains = ChainFolder::new();
        let sectors = 1_300_000;
        chains.dynamic("root", 2 << 20, sectors);
        chains.fill("root", &[(0, 5_000, 1)]);
        chains.child("a", "root", 4 << 10, sectors);
        chains.fill("a", &[(3, 5, 2), (1_048_574, 1_048_577, 2), (1_299_999, 1_300_000, 2)]);
        chains.child("b", "a", 512 << 10, sectors);
        chains.fill("b", &[(4, 9, 3), (9, 10, 3), (1_048_577, 1_048_584, 3), (200_000, 200_001, 3)]);
        assert_eq!(changed(&chains, "b", 1), [(4, 10), (200_000, 200_001), (1_048_577, 1_048_584)]);
        let both = [(3, 10), (200_000, 200_001), (1_048_574, 1_048_584), (1_299_999, 1_300_000)];
        assert_eq!(changed(&chains, "b", 2), both, "joined across layers, blocks and windows");
        assert_eq!(changed(&chains, "b", 0), []);
        assert_eq!(changed(&chains, "a", 1), [(3, 5), (1_048_574, 1_048_577), (1_299_999, 1_300_000)]);
    }

    #[test]
    fn sectors_after_the_end_of_a_shorter_layer_have_changed() {
        let chains = ChainFolder::new();
        chains.fixed("root", 1_000);
        chains.child("short", "root", 4 << 10, 600);
        chains.fill("short", &[(599, 600, 1)]);
        chains.child("leaf", "short", 4 << 10, 1_200);
        chains.fill("leaf", &[(1_100, 1_101, 1)]);
        assert_eq!(changed(&chains, "leaf", 2), [(599, 1_000), (1_100, 1_101)]);
        assert_eq!(changed(&chains, "leaf", 1), [(1_100, 1_101)], "sectors after the end of the parent were zero");
        chains.child("tiny", "leaf", 4 << 10, 100);
        assert_eq!(changed(&chains, "tiny", 3), [], "no changed sector is visible");
    }
}
