//! Torn writes: sectors that are partly overwritten when the power is cut.
//!
//! Linux (ext4, XFS) does not protect a page of the page cache while it is being written to the medium. A write in that
//! time changes the page during the transfer, and the medium has a mixture of old and new bytes until the page is
//! written again. Observed with only `pwrite` and `fdatasync` on ext4: one sector in 1,400 under constant overwriting,
//! in units of 16 bytes and more. This model tears in units of 4 bytes, the smallest part that must stay whole: an
//! entry of a block table.

use std::collections::BTreeMap;

use super::inode::{Inode, InodeChange, SectorData};
use crate::units::{SECTOR, SECTOR_BYTES};

/// Bytes that are never torn.
const UNIT: usize = 4;

/// Decides how a sector is torn. Gets the bytes before and after the write, and returns a mask in which the bit of each
/// new unit is set, or `None` if the sector is not torn.
pub type Tear<'a> = &'a mut dyn FnMut(&[u8; SECTOR_BYTES], &[u8; SECTOR_BYTES]) -> Option<u128>;

/// Replaces the overwritten sectors in `changes` by the mixtures that `tear` chooses. The changes are in order, and
/// begin at the durable state.
///
/// Sectors beyond the durable length stay whole: the new length becomes durable only after a transfer that began when
/// the page was complete.
pub(super) fn tear(inode: &Inode, changes: &mut [(u64, InodeChange)], tear: Tear<'_>) {
    let mut before = BTreeMap::new();
    for (_, change) in changes {
        let InodeChange::Sector(at, new) = change else { continue };
        let (at, Some(new)) = (*at, new.as_ref().map(|new| new.0)) else {
            // A hole is not written, so it cannot be torn.
            before.insert(*at, [0; SECTOR_BYTES]);
            continue;
        };
        let old = before.insert(at, new).unwrap_or_else(|| inode.durable_sector(at));
        if (at + 1) * SECTOR > inode.durable_len() {
            continue;
        }
        if let Some(units) = tear(&old, &new) {
            let mut mixture = old;
            for (n, unit) in new.chunks_exact(UNIT).enumerate().filter(|(n, _)| units >> n & 1 == 1) {
                mixture[n * UNIT..][..UNIT].copy_from_slice(unit);
            }
            *change = InodeChange::Sector(at, Some(SectorData::new(mixture)));
        }
    }
}
