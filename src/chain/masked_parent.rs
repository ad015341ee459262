//! Finds blocks of a child that hide data of its parents, as QEMU leaves them.
//!
//! QEMU opens a differencing VHD as if it were a dynamic one. At the first write to a block it marks the whole block
//! present, so that zeros replace all of the parent's data in the block. A guest that zeroes its disk leaves the same
//! bytes. Such zeros are attributed to QEMU with certainty only if another program than the image's creator placed the
//! block.

use std::sync::Arc;

use super::extent::Source;
use super::frozen::{Frozen, Layer};
use super::plan::PlanBuffer;
use super::version::Version;
use crate::error::Result;
use crate::format::Defect;
use crate::format::bat::BlockPlace;
use crate::image::{Image, Suspects, is_zero};
use crate::storage::FileSlot;
use crate::units::OnProgress;
use crate::units::{BlockIndex, SECTOR, SECTOR_BYTES, SectorRange};

/// Maximum number of bytes that are read from one image and its parents together.
const MAX_BYTES_READ: u64 = 256 << 20;
/// Number of bytes per read.
const CHUNK: usize = 64 << 10;

/// Finds the blocks among `suspects` of a child that hold zeros over data of the parents. If the alignment proves that
/// another program placed the suspects, adds a defect for each block found, and removes the defect that only reports
/// that program if all suspects were compared. Otherwise adds one defect with the number of blocks found, if there are
/// any.
///
/// # Errors
/// - the errors of [`Image::open`] for a parent
/// - `Io`
/// - the error of `watch`, which is called before each block
pub(super) fn find_masked(
    child: &Image,
    parents: &[Image],
    suspects: &Suspects,
    defects: &mut Vec<Defect>,
    watch: &mut OnProgress<'_>,
) -> Result<()> {
    let open = |(number, image): (u16, &Image)| {
        Ok(Layer { slot: FileSlot(number), image: Arc::new(Image::open(image.file().clone())?) })
    };
    let layers = (0..).zip(parents).map(open).collect::<Result<Vec<_>>>()?;
    let mut scan = MaskScan {
        child,
        parents: Version::new(None, Frozen::new(layers), child.size() / SECTOR),
        plan: PlanBuffer::default(),
        bytes_left: MAX_BYTES_READ,
        bytes: vec![0; CHUNK],
    };
    let mut found = Vec::new();
    for &(block, place) in &suspects.blocks {
        watch(0)?;
        if let Some(sector) = scan.first_masked_sector(block, place, suspects.placed_by_another)? {
            found.push((block, sector, place.sector().byte_offset()));
        }
        if scan.bytes_left == 0 {
            log::info!(
                "{}: only some of its blocks were compared with the parents: the limit of data to read was reached",
                child.file().path().display()
            );
            break;
        }
    }
    if !suspects.placed_by_another {
        let blocks = found.len() as u64;
        defects.extend(found.first().map(|&(block, _, at)| Defect::ZerosOverParent { block, blocks, at }));
        return Ok(());
    }
    // If all suspects were compared with the parents, the defects of single blocks replace the defect that only reports
    // that another program placed the blocks.
    if scan.bytes_left > 0 {
        defects.retain(|defect| !matches!(defect, Defect::PlacedByAnother { .. }));
    }
    defects.extend(found.into_iter().map(|(block, sector, at)| Defect::ParentHidden { block, sector, at }));
    Ok(())
}

struct MaskScan<'a> {
    child: &'a Image,
    parents: Version,
    plan: PlanBuffer,
    bytes_left: u64,
    bytes: Vec<u8>,
}

impl MaskScan<'_> {
    /// Returns the first sector of a block that is zero over data of the parents. A block that is zero as a whole
    /// counts only if `all` is set: QEMU places a block only to write data to it.
    fn first_masked_sector(&mut self, block: BlockIndex, place: BlockPlace, all: bool) -> Result<Option<u64>> {
        let block_size = self.child.block_size().expect("an image with suspects has blocks");
        let range = block_size.sectors_of(block);
        let disk = range.clip(SectorRange::between(0, self.child.size() / SECTOR));
        let data = place.data(block_size).byte_offset();
        let (mut rest, mut hides, mut any) = (disk, None, all);
        while !rest.is_empty() && self.bytes_left > 0 && !(any && hides.is_some()) {
            let piece = rest.first((CHUNK / SECTOR_BYTES) as u64);
            rest = rest.skip(piece.count());
            let at = data + (piece.start() - range.start()) * SECTOR;
            let zeros = self.zero_runs(piece, at)?;
            any |= zeros.iter().map(|zeros| zeros.count()).sum::<u64>() < piece.count();
            for zeros in zeros {
                if hides.is_none() {
                    hides = self.first_data(zeros)?.map(|sector| sector - range.start());
                }
            }
        }
        Ok(hides.filter(|_| any))
    }

    /// Returns the runs of zero sectors in `piece`, a range of the child's disk. The data of the range is at byte `at`
    /// of the child's file.
    fn zero_runs(&mut self, piece: SectorRange, at: u64) -> Result<Vec<SectorRange>> {
        let bytes = &mut self.bytes[..usize::try_from(piece.bytes()).expect("a chunk")];
        bytes.fill(0);
        let there = self.child.data_end().saturating_sub(at).min(bytes.len() as u64);
        self.child.file().read_at(&mut bytes[..usize::try_from(there).expect("a chunk")], at)?;
        self.bytes_left = self.bytes_left.saturating_sub(there);
        let mut runs: Vec<SectorRange> = Vec::new();
        for (sector, _) in (piece.start()..).zip(bytes.chunks(SECTOR_BYTES)).filter(|(_, bytes)| is_zero(bytes)) {
            match runs.last_mut() {
                Some(last) if last.end() == sector => *last = SectorRange::between(last.start(), sector + 1),
                _ => runs.push(SectorRange::between(sector, sector + 1)),
            }
        }
        Ok(runs)
    }

    /// Returns the first sector of a run that is not zero in the parents.
    fn first_data(&mut self, run: SectorRange) -> Result<Option<u64>> {
        self.parents.plan_read_now(run, &mut self.plan)?;
        for extent in &self.plan.extents {
            let Source::File { slot, offset } = extent.source else { continue };
            let bytes = &mut self.bytes[..usize::try_from(extent.range.bytes()).expect("a chunk")];
            self.parents.file(slot).read_at(bytes, offset)?;
            self.bytes_left = self.bytes_left.saturating_sub(extent.range.bytes());
            let mut sectors = (extent.range.start()..).zip(bytes.chunks(SECTOR_BYTES));
            if let Some((sector, _)) = sectors.find(|(_, bytes)| !is_zero(bytes)) {
                return Ok(Some(sector));
            }
        }
        Ok(None)
    }
}
