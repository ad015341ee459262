//! `compact`: frees the space of redundant blocks, zeros and gaps.

use std::path::Path;

use super::open_exclusive;
use super::source::{CHUNK_BYTES, CHUNK_SECTORS, Progress};
use super::zero_scan::collect_zero_runs;
use crate::chain::{Chain, ImageChange, PlanBuffer, Policy, Source, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::failpoint;
use crate::format::{DiskType, bitmap};
use crate::image::{Offline, SavedMtime, is_zero, next_data};
use crate::storage::{Buffer, Env};
use crate::units::{BlockIndex, BlockSize, SECTOR, SectorRange};

/// Result of a compaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Compacted {
    /// Number of blocks that were removed.
    pub freed_blocks: u64,
    /// Bytes that were freed in the file system.
    pub freed_bytes: u64,
}

/// Frees space that the image at `path` does not need: blocks with the same contents as the parents (in a root, blocks
/// of zeros), runs of zeros in other blocks, gaps between blocks, and space after all blocks and metadata. The contents
/// of the disk and of the disks of its children never change.
///
/// # Errors
/// After any error the image is valid. The same call completes the work.
/// - `Unsupported` for a fixed image
/// - `Refused` if a live journal has writes that the image lacks, or if an unfinished merge forbids the change
/// - `Invalid`, `Refused`, `Unsupported`, `Busy`, `NotFound`, `Io` for a file of the chain
/// - `NoSpace`, `Io`; errors of `progress`
pub fn compact(env: &dyn Env, path: &Path, policy: &Policy, progress: &mut Progress<'_>) -> Result<Compacted> {
    let chain = open_exclusive::chain(env, path, ImageChange::Allocation, policy)?;
    if chain.youngest().kind() == DiskType::Fixed {
        let what = "a fixed image has no blocks to give back; `convert --to dynamic` makes a copy without its zeros";
        return Err(Error::new(ErrorKind::Unsupported, what).at_path(path));
    }
    let file = chain.youngest().file().clone();
    SavedMtime::preserve(&file, || compact_locked(chain, progress))
}

fn compact_locked(chain: Chain, progress: &mut Progress<'_>) -> Result<Compacted> {
    let before = chain.youngest().file().stat()?.allocated;
    let (image, beneath) = chain.into_parts();
    let mut offline = Offline::new(&image)?;
    failpoint::reached("compact.recovered");
    let blocks: Vec<BlockIndex> = offline.blocks().collect();
    let mut look = BlockInspector::new(&offline, &beneath);
    let (mut idle, mut holes) = (Vec::new(), Vec::new());
    let mut done = 0;
    for block in &blocks {
        holes.clear();
        match look.is_redundant(*block, &mut holes)? {
            true => idle.push(*block),
            false => holes.iter().try_for_each(|(at, len)| offline.file().punch_hole(*at, *len))?,
        }
        done += u64::from(look.block_size.bytes());
        progress(done)?;
    }
    offline.free_blocks(&idle)?;
    offline.close_gaps(&mut |_| progress(done))?;
    offline.finish_compact()?;
    let given_back = before.saturating_sub(offline.file().stat()?.allocated);
    Ok(Compacted { freed_blocks: idle.len() as u64, freed_bytes: given_back })
}

/// Compares blocks of an image with the layers beneath, to find redundant blocks.
struct BlockInspector<'a> {
    offline: &'a Offline,
    beneath: &'a Version,
    block_size: BlockSize,
    plan: PlanBuffer,
    own: Buffer,
    below: Buffer,
}

impl<'a> BlockInspector<'a> {
    fn new(offline: &'a Offline, beneath: &'a Version) -> BlockInspector<'a> {
        let block_size = offline.block_size().expect("it is not fixed");
        let plan = PlanBuffer::default();
        BlockInspector {
            offline,
            beneath,
            block_size,
            plan,
            own: Buffer::zeroed(CHUNK_BYTES),
            below: Buffer::zeroed(CHUNK_BYTES),
        }
    }

    /// Returns whether the disk would have the same contents without `block`. Appends runs of zeros in the block to
    /// `holes`, as (file offset, length).
    fn is_redundant(&mut self, block: BlockIndex, holes: &mut Vec<(u64, u64)>) -> Result<bool> {
        let words = self.offline.bitmap(block)?;
        let whole = self.block_size.sectors_of(block);
        let range = whole.clip(SectorRange::between(0, self.offline.size() / SECTOR));
        let (mut rest, mut idle) = (range, true);
        while !rest.is_empty() {
            let from = self.block_size.sector_in_block(rest.start());
            let end = from + u32::try_from(rest.count()).expect("a part of a block");
            let (set, count) = bitmap::run(&words, from, end);
            let run = rest.first(u64::from(count));
            rest = rest.skip(run.count());
            if set {
                idle &= self.matches_beneath(block, run, holes)?;
            }
        }
        Ok(idle)
    }

    /// Returns whether a range of set bits has the same contents as the layers beneath. Appends runs of zeros in the
    /// whole range to `holes`, even after a difference was found.
    fn matches_beneath(&mut self, block: BlockIndex, run: SectorRange, holes: &mut Vec<(u64, u64)>) -> Result<bool> {
        let (_, data) = self.offline.block(block).expect("it has a place");
        let (mut rest, mut same) = (run, true);
        while !rest.is_empty() {
            let piece = rest.first(CHUNK_SECTORS);
            rest = rest.skip(piece.count());
            let at = data + u64::from(self.block_size.sector_in_block(piece.start())) * SECTOR;
            let len = usize::try_from(piece.bytes()).expect("at most a chunk");
            let own = &mut self.own[..len];
            let hole = next_data(self.offline.file(), at..at + len as u64)?.is_none();
            match hole {
                true => own.fill(0),
                false => {
                    self.offline.file().read_at(own, at)?;
                    collect_zero_runs(own, at, holes);
                }
            }
            if !same {
                continue;
            }
            self.beneath.plan_read_now(piece, &mut self.plan)?;
            same = if self.plan.extents.iter().all(|e| e.source == Source::Zero) {
                hole || is_zero(own)
            } else {
                let below = &mut self.below[..len];
                self.beneath.read_now(piece, below, &mut self.plan)?;
                own == below
            };
        }
        Ok(same)
    }
}
