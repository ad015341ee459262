//! Parent locators: eight entries in the header, each naming a platform's way of writing the path to the parent.
//!
//! Entries are hints. A broken one is skipped with a note and never keeps an image from opening (O11).

use std::ops::Range;
use std::path::Path;

use crate::format::defect::Defect;
use crate::format::parent_path::{ParentPath, normalise};
use crate::units::SECTOR;

/// The longest text of a locator that is read (O11), in bytes.
pub const MAX_TEXT_BYTES: u32 = 4096;

/// How a locator's text is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Platform {
    /// Relative path with backslashes, UTF-16 little-endian.
    W2ru,
    /// Absolute path with backslashes, UTF-16 little-endian. vhd-util writes relative ones, too.
    W2ku,
    /// File URL, UTF-8.
    MacX,
    /// Mac alias, opaque.
    Mac,
    /// Relative path of 8-bit characters, deprecated.
    Wi2r,
    /// Absolute path of 8-bit characters, deprecated.
    Wi2k,
    /// Anything else.
    Unknown(u32),
}

impl Platform {
    /// The platform of a code.
    pub fn from_code(code: u32) -> Platform {
        match &code.to_be_bytes() {
            b"W2ru" => Platform::W2ru,
            b"W2ku" => Platform::W2ku,
            b"MacX" => Platform::MacX,
            b"Mac " => Platform::Mac,
            b"Wi2r" => Platform::Wi2r,
            b"Wi2k" => Platform::Wi2k,
            _ => Platform::Unknown(code),
        }
    }

    /// The code in the file.
    pub fn code(self) -> u32 {
        u32::from_be_bytes(match self {
            Platform::W2ru => *b"W2ru",
            Platform::W2ku => *b"W2ku",
            Platform::MacX => *b"MacX",
            Platform::Mac => *b"Mac ",
            Platform::Wi2r => *b"Wi2r",
            Platform::Wi2k => *b"Wi2k",
            Platform::Unknown(code) => return code,
        })
    }
}

/// An entry of the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocatorEntry {
    /// Code of the platform; 0 where the entry is unused.
    pub platform: u32,
    /// Room for the text: sectors where less than 512, else bytes.
    pub space: u32,
    /// Bytes of the text.
    pub length: u32,
    /// Kept as it is.
    pub reserved: u32,
    /// Byte offset of the text in the file.
    pub offset: u64,
}

impl LocatorEntry {
    /// An unused entry.
    pub const UNUSED: LocatorEntry = LocatorEntry { platform: 0, space: 0, length: 0, reserved: 0, offset: 0 };

    /// An entry for a text of `length` bytes at `offset`, with its space in bytes, whole sectors.
    pub fn new(platform: Platform, offset: u64, length: u32) -> LocatorEntry {
        let space = length.max(1).next_multiple_of(SECTOR as u32);
        LocatorEntry { platform: platform.code(), space, length, reserved: 0, offset }
    }

    /// Whether it is unused.
    pub fn is_unused(&self) -> bool {
        self.platform == 0
    }

    /// How its text is written.
    pub fn platform(&self) -> Platform {
        Platform::from_code(self.platform)
    }

    /// Where its text lies in a file of `len` bytes; `None` where there is no text to read. `slot` is its index, for
    /// the message.
    ///
    /// # Errors
    /// [`Defect`] for an entry to skip (O11).
    pub fn text_range(&self, slot: usize, len: u64) -> Result<Option<Range<u64>>, Defect> {
        if self.is_unused() {
            return Ok(None);
        }
        if let Platform::Unknown(code) = self.platform() {
            return Err(Defect::LocatorPlatform { slot, code });
        }
        if self.length > MAX_TEXT_BYTES {
            return Err(Defect::LocatorLength { slot, length: self.length });
        }
        if self.length == 0 {
            return Ok(None);
        }
        match self.offset.checked_add(self.length.into()) {
            Some(end) if self.offset >= SECTOR && end <= len => Ok(Some(self.offset..end)),
            _ => Err(Defect::LocatorPlace { slot, offset: self.offset, length: self.length }),
        }
    }
}

/// The texts that a locator's bytes may stand for, as paths in bytes: two for a URL with escapes (as it should be read,
/// and as libvhd reads it), none for what cannot be read.
pub fn texts(platform: Platform, data: &[u8]) -> Vec<Vec<u8>> {
    match platform {
        Platform::W2ru | Platform::W2ku => {
            vec![utf16(data.as_chunks::<2>().0.iter().map(|&[low, high]| u16::from_be_bytes([high, low])))]
        }
        Platform::Wi2r | Platform::Wi2k => vec![before_nul(data).to_vec()],
        Platform::MacX => {
            let plain = before_nul(data).to_vec();
            let decoded = percent_decoded(&plain);
            if decoded == plain { vec![plain] } else { vec![decoded, plain] }
        }
        Platform::Mac | Platform::Unknown(_) => Vec::new(),
    }
}

/// The text of the parent's name in the header.
pub fn header_name(name: &[u8; 512]) -> Vec<u8> {
    utf16(name.as_chunks::<2>().0.iter().map(|&unit| u16::from_be_bytes(unit)))
}

/// Up to the first NUL; half a pair of surrogates becomes U+FFFD.
fn utf16(units: impl Iterator<Item = u16>) -> Vec<u8> {
    let text = char::decode_utf16(units.take_while(|&unit| unit != 0));
    text.map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect::<String>().into_bytes()
}

fn before_nul(data: &[u8]) -> &[u8] {
    data.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// What is no escape stays.
fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let escape = match (byte, after) {
            (b'%', [high, low, ..]) => digit(*high).zip(digit(*low)),
            _ => None,
        };
        match escape {
            Some((high, low)) => {
                out.push(high << 4 | low);
                rest = &after[2..];
            }
            None => out.push(byte),
        }
    }
    out
}

/// A place where the parent may be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// The locator that says so; `None` for the name in the header.
    pub slot: Option<usize>,
    /// The place.
    pub path: ParentPath,
}

/// Where the parent may be, in the order to try: relative paths, the header's name, its last part in the child's
/// folder, absolute paths (vhd-format 4.4). Each place once. And notes on texts that no path comes out of.
pub fn candidates<'a>(
    locators: impl IntoIterator<Item = (usize, Platform, &'a [u8])>,
    name: &[u8; 512],
) -> (Vec<Candidate>, Vec<Defect>) {
    let (mut relative, mut absolute, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    let mut sort = |slot, text: &[u8]| match normalise(text) {
        Ok(path @ ParentPath::Relative(_)) => relative.push(Candidate { slot, path }),
        Ok(path @ ParentPath::Absolute(_)) => absolute.push(Candidate { slot, path }),
        Err(why) => notes.push(Defect::ParentPath { slot, text: String::from_utf8_lossy(text).into_owned(), why }),
    };
    for (slot, platform, data) in locators {
        texts(platform, data).iter().for_each(|text| sort(Some(slot), text));
    }
    let name = header_name(name);
    if !name.is_empty() {
        sort(None, &name);
        if let Some(last) =
            normalise(&name).ok().and_then(|path| path.as_path().file_name().map(Path::new).map(Into::into))
        {
            relative.push(Candidate { slot: None, path: ParentPath::Relative(last) });
        }
    }
    let mut all: Vec<Candidate> = Vec::new();
    for candidate in relative.into_iter().chain(absolute) {
        if all.iter().all(|known| known.path != candidate.path) {
            all.push(candidate);
        }
    }
    (all, notes)
}
