//! Checks that the blocks of a BAT overlap neither metadata nor each other (O12, O13), and finds unreferenced space.

use std::ops::{ControlFlow, Range};

use crate::format::bat::BlockPlace;
use crate::format::defect::Defect;
use crate::format::footer_choice::{ChosenFooter, FooterSource};
use crate::format::header::DynamicHeader;
use crate::format::layout::{self, PAGE};
use crate::format::metadata::MetadataMap;
use crate::units::{BlockIndex, BlockSize, FileSector};

/// The rules for the entries of a BAT: the values against which the entries are checked.
#[derive(Clone, Debug)]
pub struct EntryRules<'a> {
    /// The metadata that no block may overlap.
    pub metadata: &'a MetadataMap,
    /// Size of a block.
    pub block_size: BlockSize,
    /// Number of blocks of the disk. The entry of a later block is reported as [`Defect::BlockBeyondDisk`], and its
    /// space counts as used unless it ends more than `slack` bytes after `data_end`.
    pub blocks: u64,
    /// Byte offset at which the data ends. Blocks of the disk that end after this offset count as
    /// [`PlacedBlocks::truncated`].
    pub data_end: u64,
    /// Number of bytes that a block after the end of the disk may extend beyond `data_end`, for its space to count as
    /// used.
    pub slack: u64,
}

impl<'a> EntryRules<'a> {
    /// Returns the rules for an image with this footer and header.
    pub fn new(chosen: &ChosenFooter, header: &DynamicHeader, metadata: &'a MetadataMap) -> EntryRules<'a> {
        let slack = match chosen.source {
            FooterSource::Front => header.block_size.bytes().into(),
            FooterSource::Trailing | FooterSource::Trailing511 => 0,
        };
        EntryRules {
            metadata,
            block_size: header.block_size,
            blocks: header.block_size.blocks_for(chosen.footer.sectors()),
            data_end: chosen.data_end,
            slack,
        }
    }
}

/// The places of all blocks in a BAT.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlacedBlocks {
    /// (place, block) for each block of the disk that has a place, ordered by place.
    pub entries: Vec<(BlockPlace, BlockIndex)>,
    /// The places of blocks after the end of the disk, without those that end more than [`EntryRules::slack`] bytes
    /// after the data. These blocks are never read, and their space is never reused.
    pub beyond_disk: Vec<BlockPlace>,
    /// The first byte after all metadata, all blocks in `entries` and all blocks in `beyond_disk`.
    pub end: u64,
    /// Number of blocks at the end of `entries` that end after the end of the data. Their bitmaps decide whether bytes
    /// are lost (O12).
    pub truncated: usize,
}

impl PlacedBlocks {
    /// Returns whether any block, on the disk or after its end, overlaps a range of the file.
    pub fn covers(&self, range: &Range<u64>, block_size: BlockSize) -> bool {
        self.byte_ranges(block_size).any(|block| block.start < range.end && range.start < block.end)
    }

    /// Returns the byte ranges of all blocks, on the disk and after its end.
    fn byte_ranges(&self, block_size: BlockSize) -> impl Iterator<Item = Range<u64>> {
        let places = self.entries.iter().map(|(place, _)| place).chain(&self.beyond_disk);
        places.map(move |place| place.byte_range(block_size))
    }
}

/// Checks (block, place) pairs against the rules (O12, O13). Calls `found` with each defect, until `found` returns
/// `Break`. To stop at the first defect that makes the image unreadable, `found` returns `Break` for a defect with the
/// consequence [`NotReadable`](super::Consequence::NotReadable).
///
/// # Errors
/// The value of the `Break` that `found` returned.
pub fn check_entries<B>(
    entries: impl IntoIterator<Item = (BlockIndex, BlockPlace)>,
    rules: &EntryRules<'_>,
    mut found: impl FnMut(Defect) -> ControlFlow<B>,
) -> Result<PlacedBlocks, B> {
    let mut report = |defect| match found(defect) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(value) => Err(value),
    };
    let mut placed =
        PlacedBlocks { entries: Vec::new(), beyond_disk: Vec::new(), end: rules.metadata.end(), truncated: 0 };
    for (block, entry) in entries {
        let range = entry.byte_range(rules.block_size);
        if !block.is_within(rules.blocks) {
            if range.end <= rules.data_end.saturating_add(rules.slack) {
                placed.end = placed.end.max(range.end);
                placed.beyond_disk.push(entry);
            }
            report(Defect::BlockBeyondDisk { block, entry, blocks: rules.blocks })?;
            continue;
        }
        if let Some(part) = rules.metadata.overlapping(&range) {
            report(Defect::BlockInMetadata { block, entry, part })?;
        }
        placed.truncated += usize::from(range.end > rules.data_end);
        placed.end = placed.end.max(range.end);
        placed.entries.push((entry, block));
    }
    placed.entries.sort_unstable();
    // All blocks have the same length. So if any two blocks overlap, two neighbours overlap.
    for pair in placed.entries.windows(2) {
        let ((other_entry, other), (entry, block)) = (pair[0], pair[1]);
        if entry == other_entry {
            report(Defect::BlockDuplicate { block, other, entry })?;
        } else if entry.sector() < other_entry.end(rules.block_size) {
            report(Defect::BlockOverlap { block, entry, other, other_entry })?;
        }
    }
    Ok(placed)
}

/// Finds the space before byte `end` that neither metadata nor blocks use. Gaps that align the next block, gaps of less
/// than two pages, and space that is reserved for locators count as used.
pub fn unreferenced(metadata: &MetadataMap, placed: &PlacedBlocks, block_size: BlockSize, end: u64) -> Vec<Range<u64>> {
    let mut taken: Vec<Range<u64>> = metadata.extents().iter().map(|extent| extent.range.clone()).collect();
    taken.extend(placed.byte_ranges(block_size));
    taken.extend(metadata.locator_space().iter().cloned());
    taken.sort_unstable_by_key(|range| range.start);
    let mut free = Vec::new();
    let mut at = 0;
    for range in taken.into_iter().chain(std::iter::once(end..end)) {
        let gap = at..range.start.min(end);
        let place = layout::place_from(FileSector::at_or_after(at), block_size, layout::alignment(block_size));
        // A gap of less than two pages is too small to report; it may align a block to a page.
        let aligns = gap.end < end && place == Some(FileSector::containing(gap.end));
        if gap.end.saturating_sub(gap.start) >= 2 * PAGE && !aligns {
            free.push(gap);
        }
        at = at.max(range.end);
    }
    free
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::bat;
    use crate::format::footer::{DiskType, Footer};
    use crate::format::metadata_part::MetadataPart;
    use crate::random::Random;
    use uuid::Uuid;

    const LEN: u64 = 64 << 20;

    fn footer(size: u64) -> Footer {
        Footer::new(DiskType::Differencing, size, Uuid::from_u128(1), 0)
    }

    fn header(table: u64, entries: u32) -> DynamicHeader {
        DynamicHeader::new(table, entries, BlockSize::from_bytes(4096).unwrap())
    }

    fn place(entry: u32) -> BlockPlace {
        BlockPlace::from_entry(entry).unwrap()
    }

    /// Makes pairs for `check_entries` from (block, entry).
    fn indexed(entries: &[(u32, u32)]) -> impl Iterator<Item = (BlockIndex, BlockPlace)> {
        entries.iter().filter_map(|&(block, entry)| Some((BlockIndex::new(block), BlockPlace::from_entry(entry)?)))
    }

    /// Makes `PlacedBlocks::entries` from (entry, block).
    fn placed<const N: usize>(entries: [(u32, u32); N]) -> Vec<(BlockPlace, BlockIndex)> {
        entries.map(|(entry, block)| (place(entry), BlockIndex::new(block))).to_vec()
    }

    fn all(entries: &[(u32, u32)], limit: u64) -> (PlacedBlocks, Vec<&'static str>) {
        let (metadata, _) = MetadataMap::new(&footer(4096), &header(1536, 8), None, LEN);
        let block_size = BlockSize::from_bytes(4096).unwrap();
        let rules = EntryRules { metadata: &metadata, block_size, blocks: 8, data_end: limit, slack: 0 };
        let mut kinds = Vec::new();
        let placed = check_entries(indexed(entries), &rules, |defect| {
            kinds.push(defect.kind());
            ControlFlow::<()>::Continue(())
        });
        (placed.unwrap(), kinds)
    }

    #[test]
    fn entries_at_their_limits() {
        // Blocks of 4 KiB take 9 sectors; the metadata ends at sector 4.
        let end = 13 * 512;
        assert_eq!(
            all(&[(0, 4)], end),
            (PlacedBlocks { entries: placed([(4, 0)]), beyond_disk: vec![], end, truncated: 0 }, vec![])
        );
        assert_eq!(all(&[(0, 4)], end + 1).1, [""; 0]);
        assert_eq!(
            (all(&[(0, 4)], end - 1).0.truncated, all(&[(0, 4)], end - 1).1.len()),
            (1, 0),
            "its bitmap decides whether bytes are lost"
        );
        assert_eq!((all(&[(0, 3)], end).1, all(&[(0, 5)], 14 * 512).1), (vec!["block-in-metadata"], vec![]));
        assert_eq!(all(&[(0, 0)], end).1, ["block-in-metadata"]);
        assert_eq!(all(&[(0, bat::MAX_ENTRY)], u64::MAX).1, [""; 0]);
        assert_eq!(
            all(&[(0, bat::UNUSED), (9, bat::UNUSED)], end),
            (PlacedBlocks { entries: vec![], beyond_disk: vec![], end: 2048, truncated: 0 }, vec![])
        );
        assert_eq!(all(&[(0, 13), (1, 4)], LEN).0.entries, placed([(4, 1), (13, 0)]));
        assert_eq!(all(&[(0, 12), (1, 4)], LEN).1, ["block-overlap"]);
        assert_eq!(all(&[(0, 4), (7, 4)], LEN).1, ["block-duplicate"]);
        assert_eq!(all(&[(7, 13), (8, 13)], LEN).1, ["block-beyond-disk"]);
        assert_eq!((all(&[(8, 22)], LEN).0.end, all(&[(8, 22)], 1024).0.end), (31 * 512, 2048));
    }

    #[test]
    fn checking_stops_when_the_caller_breaks() {
        let (metadata, _) = MetadataMap::new(&footer(4096), &header(1536, 8), None, LEN);
        let block_size = BlockSize::from_bytes(4096).unwrap();
        let rules = EntryRules { metadata: &metadata, block_size, blocks: 8, data_end: LEN, slack: 0 };
        let first = check_entries(indexed(&[(0, 0), (1, 1)]), &rules, ControlFlow::Break);
        assert_eq!(
            first,
            Err(Defect::BlockInMetadata {
                block: BlockIndex::new(0),
                entry: place(0),
                part: MetadataPart::FrontFooter
            })
        );
    }

    #[test]
    fn without_a_trailing_footer_one_block_may_end_after_the_file() {
        let f = footer(4 * 4096);
        let h = header(1536, 8);
        let (metadata, _) = MetadataMap::new(&f, &h, None, LEN);
        let missing = crate::format::choose(&[0; 512], Some(&f.encode()), LEN).unwrap();
        let rules = EntryRules::new(&missing, &h, &metadata);
        assert_eq!((rules.data_end, rules.slack, rules.blocks), (LEN, 4096, 4));
        let there = crate::format::choose(&f.encode(), Some(&f.encode()), LEN).unwrap();
        let rules = EntryRules::new(&there, &h, &metadata);
        assert_eq!((rules.data_end, rules.slack), (LEN - 512, 0));
    }

    #[test]
    fn overlaps_agree_with_every_pair_compared() {
        let mut random = Random::from_env(20_060_101);
        let mut below = |end: u32| u32::try_from(random.below(end.into())).unwrap();
        for _ in 0..2000 {
            let entries: Vec<(u32, u32)> = (0..below(8)).map(|block| (block, 4 + below(120))).collect();
            let pairs = || entries.iter().flat_map(|a| entries.iter().map(move |b| (a, b)));
            let clash = pairs().any(|(a, b)| a.0 != b.0 && a.1.abs_diff(b.1) < 9);
            let (placed, kinds) = all(&entries, LEN);
            assert_eq!(!kinds.is_empty(), clash, "{entries:?}");
            let end = entries.iter().map(|&(_, entry)| u64::from(entry + 9) * 512).max().unwrap_or(2048);
            assert_eq!(placed.end, end);
        }
    }

    #[test]
    fn gaps_that_align_larger_blocks_count_as_used() {
        let block_size = BlockSize::DEFAULT;
        let header = DynamicHeader::new(4096, 1024, block_size);
        let (metadata, _) = MetadataMap::new(&footer(1 << 30), &header, None, LEN);
        let free = |places: &[u32], end: u64| {
            let entries = places.iter().copied().map(place).zip((0..).map(BlockIndex::new)).collect();
            let gaps = unreferenced(
                &metadata,
                &PlacedBlocks { entries, beyond_disk: vec![], end: 0, truncated: 0 },
                block_size,
                end * 512,
            );
            gaps.into_iter().map(|gap| (gap.start / 512, gap.end / 512)).collect::<Vec<_>>()
        };
        // The table ends at sector 16; blocks take 4097 sectors.
        assert_eq!(free(&[127, 4351], 8448), []);
        assert_eq!(free(&[23, 4127, 8319], 8319 + 4097), [], "aligned to pages first");
        assert_eq!(
            free(&[127 - 8, 4351], 8448),
            [(16, 119), (4216, 4351)],
            "the first block is not aligned, the gap is too large"
        );
        assert_eq!(free(&[127, 4351 + 128], 8448 + 128), [(4224, 4479)], "a gap larger than alignment needs");
        assert_eq!(free(&[127, 8575], 12672), [(4224, 8575)], "a lost block");
        assert_eq!(free(&[127], 4351), [(4224, 4351)], "a gap before the end aligns nothing");
    }

    #[test]
    fn unused_space_is_found() {
        let (metadata, _) = MetadataMap::new(&footer(4096), &header(1536, 8), None, LEN);
        let block_size = BlockSize::from_bytes(4096).unwrap();
        let free = |entries, end| {
            let placed = PlacedBlocks { entries, beyond_disk: vec![place(60)], end: 0, truncated: 0 };
            unreferenced(&metadata, &placed, block_size, end)
        };
        assert_eq!(free(placed([(4, 0), (13, 1)]), 22 * 512), []);
        assert_eq!(free(placed([(11, 0), (27, 1)]), 36 * 512), [], "gaps that align");
        assert_eq!(free(placed([(4, 0), (29, 1)]), 60 * 512), [13 * 512..29 * 512, 38 * 512..60 * 512]);
        assert_eq!(free(placed([(4, 0), (900, 1)]), 13 * 512), [], "nothing after the end counts");
        let whole = free(vec![], 64 * 512);
        assert_eq!(
            (whole.len(), whole[0].clone()),
            (1, 2048..60 * 512),
            "the space of a block after the end of the disk is used"
        );
    }
}
