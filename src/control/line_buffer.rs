//! Splits the bytes of a client into lines. A line that is longer than a message may be is skipped, so the buffer does
//! not grow with it.

use super::message::MAX_MESSAGE_BYTES;

/// Capacity that an empty buffer keeps.
const KEPT_CAPACITY: usize = 64 << 10;

/// Bytes that were received and not handled yet.
#[derive(Debug, Default)]
pub(super) struct LineBuffer {
    bytes: Vec<u8>,
    /// Number of bytes at the start that were handled.
    start: usize,
    /// Number of bytes that were searched for a line break.
    searched: usize,
    /// Whether the current line is too long; its bytes are dropped.
    is_skipping: bool,
}

/// A line of a client, without its line break.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Line {
    Whole(Vec<u8>),
    TooLong,
}

impl LineBuffer {
    /// Appends received bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.is_empty() && self.bytes.capacity() > KEPT_CAPACITY {
            self.bytes = Vec::new();
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Returns whether a call of [`next_line`](Self::next_line) may return a line.
    pub(super) fn has_line(&mut self) -> bool {
        self.find_break().is_some() || self.is_too_long()
    }

    /// Removes the next line that is not blank. Returns [`Line::TooLong`] as soon as a line is too long, even if it is
    /// not complete. Returns `None` if no other line is complete.
    pub(super) fn next_line(&mut self) -> Option<Line> {
        loop {
            let Some(end) = self.find_break() else {
                if self.is_skipping || self.is_too_long() {
                    let is_new = !std::mem::replace(&mut self.is_skipping, true);
                    self.bytes.clear();
                    (self.start, self.searched) = (0, 0);
                    return is_new.then_some(Line::TooLong);
                }
                return None;
            };
            let line = &self.bytes[self.start..end];
            let (was_skipped, is_blank) = (self.is_skipping, line.trim_ascii().is_empty());
            let found = if line.len() > MAX_MESSAGE_BYTES { Line::TooLong } else { Line::Whole(line.to_vec()) };
            self.is_skipping = false;
            self.start = end + 1;
            self.searched = self.start;
            if !was_skipped && !is_blank {
                return Some(found);
            }
        }
    }

    /// Returns the position of the next line break.
    fn find_break(&mut self) -> Option<usize> {
        let found = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
        match found {
            Some(at) => {
                self.searched += at;
                Some(self.searched)
            }
            None => {
                self.searched = self.bytes.len();
                None
            }
        }
    }

    fn is_too_long(&self) -> bool {
        !self.is_skipping && self.bytes.len() - self.start > MAX_MESSAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(text: &str) -> Option<Line> {
        Some(Line::Whole(text.as_bytes().to_vec()))
    }

    #[test]
    fn lines_are_found_however_the_bytes_arrive() {
        let text = b"one\n\n  \r\ntwo\r\nthree\n4";
        for piece in 1..text.len() {
            let mut buffer = LineBuffer::default();
            let mut lines = Vec::new();
            for bytes in text.chunks(piece) {
                buffer.push(bytes);
                while let Some(line) = buffer.next_line() {
                    lines.push(line);
                }
                assert!(!buffer.has_line());
            }
            assert_eq!(lines, [whole("one"), whole("two\r"), whole("three")].map(Option::unwrap), "{piece}");
        }
    }

    #[test]
    fn a_long_line_is_reported_once_and_not_kept() {
        let mut buffer = LineBuffer::default();
        let mut found = Vec::new();
        for _ in 0..64 {
            buffer.push(&[b'x'; 64 << 10]);
            found.extend(std::iter::from_fn(|| buffer.next_line()));
            assert!(buffer.bytes.len() <= MAX_MESSAGE_BYTES + (64 << 10));
        }
        buffer.push(b"rest\nnext\n");
        found.extend(std::iter::from_fn(|| buffer.next_line()));
        assert_eq!(found, [Line::TooLong, whole("next").unwrap()]);
    }

    #[test]
    fn the_limit_is_exact() {
        for (len, fits) in [(MAX_MESSAGE_BYTES, true), (MAX_MESSAGE_BYTES + 1, false)] {
            let mut buffer = LineBuffer::default();
            buffer.push(&[vec![b'x'; len], b"\ny\n".to_vec()].concat());
            assert!(buffer.has_line());
            assert_eq!(matches!(buffer.next_line(), Some(Line::Whole(_))), fits);
            assert_eq!(buffer.next_line(), whole("y"));
        }
    }
}
