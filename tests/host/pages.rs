//! The contents of a block device in memory: sparse, and cheap to copy, since copies share pages.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Bytes in a page.
pub(crate) const PAGE: usize = 4096;

type Page = [u8; PAGE];

/// Contents of a device or file. Bytes that were never written are zero.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pages {
    len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Pages {
    /// Returns contents of `len` zero bytes.
    pub(crate) fn zeroed(len: u64) -> Pages {
        Pages { len, pages: BTreeMap::new() }
    }

    /// Returns contents equal to `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Pages {
        let mut pages = Pages::default();
        pages.write(0, bytes);
        pages
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Returns the number of bytes of memory that the pages occupy.
    pub(crate) fn used(&self) -> u64 {
        (self.pages.len() * PAGE) as u64
    }

    /// Truncates or extends the contents.
    pub(crate) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    /// Reads up to `count` bytes at `offset`. Returns fewer bytes at the end of the contents.
    pub(crate) fn read(&self, offset: u64, count: usize) -> Vec<u8> {
        let count = usize::try_from(self.len.saturating_sub(offset)).map_or(count, |left| left.min(count));
        let mut bytes = vec![0; count];
        for (number, from, at, len) in pieces(offset, count) {
            if let Some(page) = self.pages.get(&number) {
                bytes[at..at + len].copy_from_slice(&page[from..from + len]);
            }
        }
        bytes
    }

    /// Writes bytes, and extends the contents if the write ends beyond their end.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (number, from, at, len) in pieces(offset, bytes.len()) {
            let page = self.pages.entry(number).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[from..from + len].copy_from_slice(&bytes[at..at + len]);
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    /// Zeroes a range and frees whole pages.
    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let unit = PAGE as u64;
        let (first_whole, last_whole) = (offset.next_multiple_of(unit), end / unit * unit);
        let numbers: Vec<u64> = self.pages.range(offset / unit..end.div_ceil(unit)).map(|(n, _)| *n).collect();
        for number in numbers {
            let start = number * unit;
            if start >= first_whole && start < last_whole {
                self.pages.remove(&number);
                continue;
            }
            let (from, to) = (offset.max(start) - start, end.min(start + unit) - start);
            let page = self.pages.get_mut(&number).expect("listed above");
            let in_page = |at: u64| usize::try_from(at).expect("within a page");
            Arc::make_mut(page)[in_page(from)..in_page(to)].fill(0);
        }
    }

    /// Writes the contents to a sparse file.
    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.len)?;
        for (number, page) in &self.pages {
            let at = number * PAGE as u64;
            let len = usize::try_from(self.len.saturating_sub(at)).map_or(PAGE, |left| left.min(PAGE));
            file.write_all_at(&page[..len], at)?;
        }
        Ok(())
    }
}

/// Splits a range by pages: page number, offset in the page, offset in the range, length.
fn pieces(offset: u64, count: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let place = offset + at as u64;
        let from = usize::try_from(place % PAGE as u64).expect("within a page");
        let len = (PAGE - from).min(count - at);
        let piece = (place / PAGE as u64, from, at, len);
        at += len;
        (len > 0).then_some(piece)
    })
}

#[test]
fn pages_hold_what_a_flat_array_holds() {
    let mut rng = crate::common::rng::Rng::from_env("pages");
    let (mut flat, mut pages) = (vec![0u8; 8 * PAGE], Pages::zeroed(8 * PAGE as u64));
    for step in 0..2000 {
        let at = usize::try_from(rng.below(8 * PAGE as u64)).unwrap();
        let len = usize::try_from(rng.below((flat.len() - at) as u64 + 1)).unwrap() >> rng.below(12);
        if rng.below(3) == 0 {
            flat[at..at + len].fill(0);
            pages.zero(at as u64, len as u64);
        } else {
            let bytes: Vec<u8> = (0..len).map(|_| rng.next().to_be_bytes()[0]).collect();
            flat[at..at + len].copy_from_slice(&bytes);
            pages.write(at as u64, &bytes);
        }
        assert_eq!(pages.read(0, flat.len()), flat, "step {step}");
    }
    let before = pages.clone();
    pages.set_len(5);
    pages.set_len(9);
    assert_eq!(pages.read(0, 20), [&flat[..5], &[0; 4]].concat());
    assert_eq!(before.read(0, usize::MAX), flat, "a copy does not change");
}
