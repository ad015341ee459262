//! Sector bitmaps as 64-bit words: the most significant bit of word 0 is sector 0, as in the bytes of the file.
//!
//! Every request searches bitmaps, so runs are found a word at a time. A bitmap that threads share is an array of
//! atomic words. Bits of a shared bitmap are set and never cleared while the words belong to the same bitmap sector. A
//! bit is set with release order after the data of its sector was written, so that a thread that loads the set bit with
//! acquire order sees that data.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::BlockSize;

/// Bits in a word.
const BITS: u32 = 64;

/// Returns the number of words in the bitmap of a block. Bits after the last sector of a small block have no meaning,
/// and are kept.
pub fn words(block_size: BlockSize) -> usize {
    block_size.sectors().div_ceil(BITS) as usize
}

/// Returns the mask of the bits of `from..end` that lie in word `index`.
pub fn mask(index: usize, from: u32, end: u32) -> u64 {
    let base = index as u64 * u64::from(BITS);
    let low = u64::from(from).max(base) - base;
    let high = u64::from(end).min(base + u64::from(BITS)).saturating_sub(base);
    if low >= high {
        return 0;
    }
    // 0 <= low < high <= 64
    (u64::MAX >> low) & (u64::MAX << (u64::from(BITS) - high))
}

/// Returns the state of bit `from`, and the length of the run of bits with this state that begins at `from` and ends at
/// `end` or before. The length is 0 if `from >= end`.
///
/// # Panics
/// If `end` lies after the last word.
#[inline]
pub fn run(words: &[u64], from: u32, end: u32) -> (bool, u32) {
    run_of(|index| words[index], from, end)
}

/// Finds a run as [`run`] does, in a bitmap in which other threads set bits.
#[inline]
pub fn run_atomic(words: &[AtomicU64], from: u32, end: u32) -> (bool, u32) {
    run_of(|index| words[index].load(Ordering::Acquire), from, end)
}

/// Finds a run as [`run`] does, in the words that `word` returns.
#[inline]
pub fn run_of(word: impl Fn(usize) -> u64, from: u32, end: u32) -> (bool, u32) {
    if from >= end {
        return (false, 0);
    }
    let first = word((from / BITS) as usize);
    let set = (first << (from % BITS)) >> (BITS - 1) == 1;
    let same = if set { u64::MAX } else { 0 };
    let mut at = from;
    let mut current = first;
    loop {
        let others = (current ^ same) << (at % BITS);
        if others != 0 {
            return (set, (at + others.leading_zeros()).min(end) - from);
        }
        at = (at / BITS + 1) * BITS;
        if at >= end {
            return (set, end - from);
        }
        current = word((at / BITS) as usize);
    }
}

/// Sets `count` bits from `from`. Returns whether any of them was clear.
pub fn set(words: &mut [u64], from: u32, count: u32) -> bool {
    let mut changed = false;
    for (index, mask) in masks(from, count) {
        changed |= words[index] & mask != mask;
        words[index] |= mask;
    }
    changed
}

/// Sets bits as [`set`] does, in a bitmap that other threads read: with release order. Returns whether this call set
/// any clear bit.
pub fn set_atomic(words: &[AtomicU64], from: u32, count: u32) -> bool {
    let mut changed = false;
    for (index, mask) in masks(from, count) {
        // An overwrite finds all bits set and does not write, so the cache line stays shared.
        if words[index].load(Ordering::Acquire) & mask != mask {
            changed |= words[index].fetch_or(mask, Ordering::Release) & mask != mask;
        }
    }
    changed
}

/// Clears `count` bits from `from`.
pub fn clear(words: &mut [u64], from: u32, count: u32) {
    for (index, mask) in masks(from, count) {
        words[index] &= !mask;
    }
}

/// Returns the number of set bits in `from..end`.
pub fn count(words: &[u64], from: u32, end: u32) -> u32 {
    masks(from, end.saturating_sub(from)).map(|(index, mask)| (words[index] & mask).count_ones()).sum()
}

fn masks(from: u32, count: u32) -> impl Iterator<Item = (usize, u64)> {
    let end = from.checked_add(count).expect("the bits of a block fit in 32 bits");
    let words = (from / BITS) as usize..end.div_ceil(BITS) as usize;
    words.map(move |index| (index, mask(index, from, end)))
}

/// Decodes the bytes of the file into `words`.
///
/// # Panics
/// If there are fewer bytes than words.
pub fn decode(bytes: &[u8], words: &mut [u64]) {
    let (chunks, _) = bytes.as_chunks::<8>();
    assert!(chunks.len() >= words.len(), "fewer bytes than the bitmap has");
    for (word, &bytes) in words.iter_mut().zip(chunks) {
        *word = u64::from_be_bytes(bytes);
    }
}

/// Encodes words as bytes of the file. Bytes after the last word stay as they are.
///
/// # Panics
/// If there are fewer bytes than words.
pub fn encode(words: impl ExactSizeIterator<Item = u64>, bytes: &mut [u8]) {
    let (chunks, _) = bytes.as_chunks_mut::<8>();
    assert!(chunks.len() >= words.len(), "fewer bytes than the bitmap has");
    for (to, word) in chunks.iter_mut().zip(words) {
        *to = word.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn bit(words: &[u64], at: u32) -> bool {
        let mut bytes = vec![0; words.len() * 8];
        encode(words.iter().copied(), &mut bytes);
        bytes[(at / 8) as usize] >> (7 - at % 8) & 1 == 1
    }

    #[test]
    fn the_first_bit_of_the_first_byte_is_sector_0() {
        let mut words = [0; 2];
        decode(&[0x80, 0, 0, 0, 0, 0, 0, 1, 0x40, 0, 0, 0, 0, 0, 0, 0, 9], &mut words);
        assert_eq!(words, [1 << 63 | 1, 1 << 62]);
        assert_eq!((run(&words, 0, 128), run(&words, 1, 128)), ((true, 1), (false, 62)));
        assert_eq!((run(&words, 63, 128), run(&words, 64, 128)), ((true, 1), (false, 1)));
        assert_eq!(
            (run(&words, 66, 128), run(&words, 66, 70), run(&words, 9, 9)),
            ((false, 62), (false, 4), (false, 0))
        );
    }

    #[test]
    fn masks_at_the_edges() {
        assert_eq!((mask(0, 0, 64), mask(0, 0, 1), mask(0, 63, 64)), (u64::MAX, 1 << 63, 1));
        assert_eq!((mask(1, 0, 64), mask(1, 0, 65), mask(1, 100, 4096)), (0, 1 << 63, u64::MAX >> 36));
        assert_eq!((mask(0, 5, 5), mask(0, 9, 5), mask(3, 0, u32::MAX)), (0, 0, u64::MAX));
    }

    #[test]
    fn agrees_with_bits_one_by_one() {
        let mut random = Random::from_env(20_060_101);
        let mut below = |end: u32| u32::try_from(random.below(end.into())).unwrap();
        for _ in 0..300 {
            let mut model = [false; 256];
            let mut words = [0; 4];
            let shared: [AtomicU64; 4] = Default::default();
            for _ in 0..below(12) {
                let from = below(257);
                let n = below(257 - from);
                let range = from as usize..(from + n) as usize;
                if below(4) == 0 {
                    clear(&mut words, from, n);
                    model[range].fill(false);
                    shared.iter().zip(words).for_each(|(to, word)| to.store(word, Ordering::Relaxed));
                } else {
                    let changed = model[range.clone()].iter().any(|&bit| !bit);
                    assert_eq!((set(&mut words, from, n), set_atomic(&shared, from, n)), (changed, changed));
                    model[range].fill(true);
                }
            }
            for at in 0..256u32 {
                assert_eq!(bit(&words, at), model[at as usize]);
                let end = at + below(257 - at);
                let state = at < end && model[at as usize];
                let length = model[at as usize..end as usize].iter().take_while(|&&bit| bit == state).count();
                let expected = (state, u32::try_from(length).unwrap());
                assert_eq!((run(&words, at, end), run_atomic(&shared, at, end)), (expected, expected), "{at}..{end}");
                let ones = model[at as usize..end as usize].iter().filter(|&&bit| bit).count();
                assert_eq!(count(&words, at, end) as usize, ones);
            }
        }
    }

    #[test]
    fn bits_after_a_small_block_are_kept() {
        let size = BlockSize::from_bytes(4096).unwrap();
        let mut map = vec![0; words(size)];
        let mut bytes = [0xA5; 512];
        decode(&bytes, &mut map);
        set(&mut map, 0, 8);
        encode(map.into_iter(), &mut bytes);
        assert_eq!((bytes[0], bytes[1], bytes[511]), (0xFF, 0xA5, 0xA5));
        assert_eq!(words(BlockSize::DEFAULT), 64);
    }
}
