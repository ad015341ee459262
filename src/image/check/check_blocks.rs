//! The part of a check that reads blocks: compares bitmaps with the batmap, the end of the disk and the data.
//!
//! A bitmap is read only if it can break a rule. Most bitmaps of a child cannot, if diffdisk or XenServer placed the
//! blocks. Data is read only under clear bits of a root, only outside of holes, and at most [`MAX_DATA_BYTES`] of it.

use super::report::{Report, Suspects};
use crate::error::Result;
use crate::format::bat::BlockPlace;
use crate::format::layout::PAGE;
use crate::format::{Defect, DiskType, bitmap};
use crate::image::batmap::Batmap;
use crate::image::open::Image;
use crate::storage::{is_seek_unsupported, is_zero};
use crate::units::{BlockIndex, FileSector, SECTOR, SECTOR_BITS, SECTOR_BYTES};

/// Maximum number of bytes of data that are read in one image.
const MAX_DATA_BYTES: u64 = 64 << 20;
/// Sectors of data per read.
const CHUNK_SECTORS: u32 = 128;
/// Bitmaps per batch of prefetches.
const PREFETCHED_BITMAPS: usize = 256;
/// Maximum number of suspects that are reported.
const MAX_SUSPECTS: usize = 4096;
/// The file sector from which on the places of blocks are not tested for alignment. Near the format's limit of 2^32
/// sectors a writer that otherwise aligns blocks may pack them, so that all blocks fit (crash-safety 3).
const PACKED_FROM: FileSector = FileSector::new(0xE000_0000);

/// Receives the position that a scan of the file has reached, in bytes, and ends the scan by an error.
pub(super) type OnPosition<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// The program that placed the blocks of an image, as far as its metadata identifies it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PlacementWriter {
    /// Diffdisk: data is aligned to a page, and mostly to more than a page, except after [`PACKED_FROM`].
    Diffdisk,
    /// XenServer: data is aligned to a page. Other programs may have added blocks without changing the creator.
    XenServer,
    /// A program that is not identified, and may place blocks anywhere.
    Unknown,
}

fn writer_of(image: &Image) -> PlacementWriter {
    let footer = image.footer();
    let ours = footer.creator == *b"win " && footer.creator_version == 0x000A_0000 && footer.creator_host == *b"Wi2k";
    match image.table_offset() {
        // Windows has the same creator, but puts the table directly after the header, at an offset that is not aligned
        // to a page.
        Some(table) if ours && table.is_multiple_of(PAGE) => PlacementWriter::Diffdisk,
        Some(_) if footer.creator_is_tap() => PlacementWriter::XenServer,
        _ => PlacementWriter::Unknown,
    }
}

/// Checks the batmap and every block that can break a rule. Reports the file offset reached so far to `come_to`.
///
/// # Errors
/// `Io`; the error that `come_to` returns.
pub(super) fn check_blocks(image: &Image, report: &mut Report, come_to: &mut OnPosition<'_>) -> Result<()> {
    let Some(sparse) = image.sparse() else { return Ok(()) };
    image.file().advise_random_reads();
    check_batmap(image, report)?;
    let (child, writer) = (image.kind() == DiskType::Differencing, writer_of(image));
    let block_size = sparse.header.block_size;
    let bitmap_sectors = block_size.bitmap_sectors();
    let aligned = |place: BlockPlace| place.data(block_size).byte_offset().is_multiple_of(PAGE);
    let odd = |place: BlockPlace| {
        child && place.sector() < PACKED_FROM && (writer == PlacementWriter::Unknown || !aligned(place))
    };
    let (mut suspects, mut budget) = (Vec::new(), MAX_DATA_BYTES);
    let entries = &sparse.placed.entries;
    // A single packed block may be page-aligned by chance. Of two adjacent packed blocks of 2 MiB (XenServer's block
    // size) at most one is, because their distance is not a multiple of a page.
    let aligns = entries.windows(2).any(|pair| aligned(pair[0].0) && aligned(pair[1].0));
    // All bitmaps of a root are read; of a child, only those that can break a rule.
    let wanted = |&&(place, block): &&(BlockPlace, BlockIndex)| {
        !child || image.sectors_on_disk(block) < block_size.sectors() || odd(place)
    };
    let wanted = entries.iter().filter(wanted);
    let mut ahead = wanted.clone();
    for (number, &(place, block)) in wanted.enumerate() {
        if number % PREFETCHED_BITMAPS == 0 {
            come_to(place.sector().byte_offset())?;
            let bytes = u64::from(bitmap_sectors) * SECTOR;
            ahead
                .by_ref()
                .take(PREFETCHED_BITMAPS)
                .for_each(|(place, _)| image.file().prefetch(place.sector().byte_offset(), bytes));
        }
        let sectors = image.sectors_on_disk(block);
        let odd = odd(place);
        let words = image.read_bitmap(place)?;
        let whole = bitmap::run(&words, 0, sectors) == (true, sectors);
        let at = place.sector().byte_offset();
        let bits =
            bits_beyond_disk(&words, sectors, block_size.sectors()).map(|(from, end)| bitmap::count(&words, from, end));
        let bits = bits.sum();
        if bits > 0 {
            report.add(Defect::BitsBeyondDisk { block, bits, at });
        }
        if odd && whole && suspects.len() < MAX_SUSPECTS {
            suspects.push((block, place));
        }
        if !child && !whole && budget > 0 {
            let found = data_under_clear_bits(image, block, place, &words, sectors, &mut budget)?;
            found.into_iter().for_each(|defect| report.add(defect));
        }
    }
    if let Some(&(block, place)) = suspects.first() {
        let placed_by_another = writer == PlacementWriter::Diffdisk || (writer == PlacementWriter::XenServer && aligns);
        if placed_by_another {
            let at = place.sector().byte_offset();
            report.add(Defect::PlacedByAnother { block, blocks: suspects.len() as u64, at });
        }
        report.suspects = Some(Suspects { placed_by_another, blocks: suspects });
    }
    Ok(())
}

/// Returns the runs of bits after the end of the disk that contain wrongly set bits. The disk ends at bit `sectors` of
/// a block of `all` sectors.
///
/// A bitmap sector whose bits are all set is not reported: QEMU, Xen Orchestra and diffdisk (in a root) set the bits of
/// a whole block or bitmap sector at once.
pub(in crate::image) fn bits_beyond_disk(words: &[u64], sectors: u32, all: u32) -> impl Iterator<Item = (u32, u32)> {
    let first = sectors / SECTOR_BITS * SECTOR_BITS;
    let parts = (first..all).step_by(SECTOR_BITS as usize).map(move |from| (from, all.min(from + SECTOR_BITS)));
    let partial = parts.filter(|(from, end)| bitmap::run(words, *from, *end) != (true, end - from));
    let beyond = partial.map(move |(from, end)| (from.max(sectors), end));
    beyond.filter(|(from, end)| bitmap::count(words, *from, *end) > 0)
}

/// Checks the batmap: its checksum, which tapdisk requires, and each block that it declares complete.
fn check_batmap(image: &Image, report: &mut Report) -> Result<()> {
    let Some(batmap) = Batmap::read(image)? else { return Ok(()) };
    if let Err(defect) = batmap.verify() {
        report.add(defect);
    }
    for block in batmap.wrong_claims(image)? {
        report.add(Defect::BatmapWrong { at: batmap.offset(block), block });
    }
    Ok(())
}

/// Finds the first sector of a block that contains data although its bit is clear. Reads at most `budget` bytes, and
/// subtracts the bytes that were read. Returns `None` and sets `budget` to 0 if the next read would exceed it.
fn data_under_clear_bits(
    image: &Image,
    block: BlockIndex,
    place: BlockPlace,
    words: &[u64],
    sectors: u32,
    budget: &mut u64,
) -> Result<Option<Defect>> {
    let data = place.data(image.block_size().expect("it has blocks")).byte_offset();
    let end = (data + u64::from(sectors) * SECTOR).min(image.data_end());
    let (mut at, mut bytes) = (data, [0; CHUNK_SECTORS as usize * SECTOR_BYTES]);
    let number = |offset: u64| u32::try_from(offset / SECTOR).expect("inside a block");
    while at < end {
        let (start, stop) = match image.file().next_data(at) {
            Ok(Some((start, len))) if start < end => (start, (start + len).min(end)),
            Ok(_) => return Ok(None),
            Err(e) if is_seek_unsupported(&e) => return Ok(None),
            Err(e) => return Err(e),
        };
        let (mut sector, last) = (number(start - data), number((stop - data).next_multiple_of(SECTOR)));
        while sector < last {
            let (set, run) = bitmap::run(words, sector, last);
            if set {
                sector += run;
                continue;
            }
            let count = run.min(CHUNK_SECTORS);
            let offset = data + u64::from(sector) * SECTOR;
            let len = (u64::from(count) * SECTOR).min(image.data_end() - offset);
            if len > *budget {
                *budget = 0;
                return Ok(None);
            }
            *budget -= len;
            let bytes = &mut bytes[..usize::try_from(len).expect("a chunk")];
            image.file().read_at(bytes, offset)?;
            if let Some(found) = (0u32..).zip(bytes.chunks(SECTOR_BYTES)).find(|(_, s)| !is_zero(s)) {
                let sector = u64::from(sector + found.0);
                return Ok(Some(Defect::DataUnderClearBit { block, sector, at: data + sector * SECTOR }));
            }
            sector += count;
        }
        at = stop;
    }
    Ok(None)
}
