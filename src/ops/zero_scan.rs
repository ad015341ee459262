//! Search for runs of zeros in a buffer, by whole pages.

use crate::image::is_zero;

/// Size of a page, the unit of the search.
pub(super) const PAGE_BYTES: usize = 4096;

/// Minimum length of a run of zeros that becomes a hole.
const MIN_HOLE_BYTES: u64 = 64 << 10;

/// Returns the runs of nonzero pages of `bytes` as (offset, length). `bytes` begins at offset `into_page` of a page.
pub(super) fn nonzero_runs(bytes: &[u8], into_page: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    let page = move |at: usize| {
        let end = bytes.len().min((at + into_page) / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES - into_page);
        (at < bytes.len()).then(|| (end, is_zero(&bytes[at..end])))
    };
    std::iter::from_fn(move || {
        while let Some((end, true)) = page(at) {
            at = end;
        }
        let start = at;
        while let Some((end, false)) = page(at) {
            at = end;
        }
        (at > start).then(|| (start, at - start))
    })
}

/// Appends to `holes` the runs of zero pages of `bytes` that have at least [`MIN_HOLE_BYTES`], as (file offset,
/// length). `bytes` was read from offset `at` of the file.
pub(super) fn collect_zero_runs(bytes: &[u8], at: u64, holes: &mut Vec<(u64, u64)>) {
    let first = usize::try_from(at.next_multiple_of(PAGE_BYTES as u64) - at).expect("less than a page");
    let Some(pages) = bytes.get(first..) else { return };
    let (mut start, mut run) = (at + first as u64, 0);
    let mut end = |start: u64, run: u64| {
        if run >= MIN_HOLE_BYTES {
            holes.push((start, run));
        }
    };
    for page in pages.chunks_exact(PAGE_BYTES) {
        if is_zero(page) {
            run += PAGE_BYTES as u64;
        } else {
            end(start, run);
            (start, run) = (start + run + PAGE_BYTES as u64, 0);
        }
    }
    end(start, run);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_found_wherever_the_run_begins() {
        let mut bytes = vec![0; 5 * PAGE_BYTES - 512];
        let runs = |bytes: &[u8]| nonzero_runs(bytes, 512).collect::<Vec<_>>();
        assert_eq!(runs(&bytes), []);
        bytes[0] = 1; // the first page lacks 512 bytes
        bytes[3 * PAGE_BYTES - 513] = 1; // the last byte of the third
        assert_eq!(runs(&bytes), [(0, PAGE_BYTES - 512), (2 * PAGE_BYTES - 512, PAGE_BYTES)]);
        bytes[3 * PAGE_BYTES - 512] = 1;
        bytes[5 * PAGE_BYTES - 513] = 1;
        assert_eq!(runs(&bytes), [(0, PAGE_BYTES - 512), (2 * PAGE_BYTES - 512, 3 * PAGE_BYTES)]);
    }

    #[test]
    fn long_zero_runs_at_pages_become_holes() {
        let found = |bytes: &[u8], at| {
            let mut holes = Vec::new();
            collect_zero_runs(bytes, at, &mut holes);
            holes
        };
        let mut bytes = vec![0; 200 << 10];
        assert_eq!(found(&bytes, 8192), [(8192, 200 << 10)]);
        assert_eq!(found(&bytes, 8192 + 512), [(12288, 196 << 10)], "whole pages only");
        bytes[70 << 10] = 1; // in the page from 68 KiB on
        assert_eq!(found(&bytes, 4096), [(4096, 68 << 10), (4096 + (72 << 10), 128 << 10)]);
        bytes[60 << 10] = 1;
        assert_eq!(found(&bytes, 4096), [(4096 + (72 << 10), 128 << 10)], "too short to be worth it");
        assert_eq!(found(&[0; 100], 1), []);
    }
}
