//! Sectors that a crash finds half overwritten.
//!
//! Linux does not hold a page of the page cache still while it is on its way to the medium (ext4, XFS): a write that
//! comes meanwhile changes it under the transfer, and until the page is written once more the medium holds a mixture of
//! before and after. Seen with nothing but `pwrite` and `fdatasync` on ext4: one sector in 1,400 under constant
//! overwriting, in units of 16 bytes and more. The smallest that a table needs whole, an entry, is tried here.

use std::collections::BTreeMap;

use super::inode::{Inode, InodeChange, SectorData};
use crate::units::{SECTOR, SECTOR_BYTES};

/// Bytes that are never torn: an entry of a block table.
const UNIT: usize = 4;

/// Says, of the bytes of a sector before and after a write, which units are new: a bit each. `None`: it is not torn.
pub type Tear<'a> = &'a mut dyn FnMut(&[u8; SECTOR_BYTES], &[u8; SECTOR_BYTES]) -> Option<u128>;

/// Replaces overwrites among `changes`, which follow upon what is durable, by what `tear` makes of them.
///
/// Those behind the durable length stay whole: the new length becomes durable after a transfer that began with the page
/// complete.
pub(super) fn tear(inode: &Inode, changes: &mut [(u64, InodeChange)], tear: Tear<'_>) {
    let mut before = BTreeMap::new();
    for (_, change) in changes {
        let InodeChange::Sector(at, new) = change else { continue };
        let (at, Some(new)) = (*at, new.as_ref().map(|new| new.0)) else {
            // A hole is not written, so never in part.
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
