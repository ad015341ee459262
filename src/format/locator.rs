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

/// The most room for a text that is taken as set aside, in bytes.
const MAX_SPACE_BYTES: u64 = 64 << 10;

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
        let space = length.max(1).next_multiple_of(512);
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

    /// Room that is set aside for its text, in bytes: at most the 64 KiB that Windows sets aside. 0 if the field has no
    /// meaning.
    pub fn space_bytes(&self) -> u64 {
        let space = u64::from(self.space);
        let bytes = if space < SECTOR { space * SECTOR } else { space };
        if bytes.is_multiple_of(SECTOR) { bytes.min(MAX_SPACE_BYTES) } else { 0 }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::random::Random;

    fn le(text: &str) -> Vec<u8> {
        text.encode_utf16().map(u16::to_be_bytes).flat_map(|[high, low]| [low, high]).collect()
    }

    fn name(text: &str) -> [u8; 512] {
        let mut name = [0; 512];
        let units = text.encode_utf16().flat_map(u16::to_be_bytes);
        name.iter_mut().zip(units).for_each(|(to, byte)| *to = byte);
        name
    }

    #[test]
    fn platforms_and_codes() {
        for code in [0x5732_7275, 0x5732_6B75, 0x4D61_6358, 0x4D61_6320, 0x5769_3272, 0x5769_326B, 7] {
            assert_eq!(Platform::from_code(code).code(), code);
        }
        assert_eq!(Platform::from_code(0x5732_7275), Platform::W2ru);
        assert_eq!(Platform::from_code(0x4D61_6358), Platform::MacX);
        let entry = LocatorEntry::new(Platform::W2ru, 1536, 513);
        assert_eq!((entry.space, entry.length, entry.platform()), (1024, 513, Platform::W2ru));
        assert_eq!(LocatorEntry::new(Platform::MacX, 1536, 0).space, 512);
    }

    #[test]
    fn entries_at_their_limits() {
        let len = 1 << 20;
        let entry = |offset, length| LocatorEntry { offset, length, ..LocatorEntry::new(Platform::W2ru, 0, 0) };
        let range = |offset, length| entry(offset, length).text_range(3, len);
        assert_eq!(range(512, 4096), Ok(Some(512..4608)));
        assert_eq!(range(512, 4095), Ok(Some(512..4607)));
        assert_eq!(range(512, 4097), Err(Defect::LocatorLength { slot: 3, length: 4097 }));
        assert_eq!(range(511, 8), Err(Defect::LocatorPlace { slot: 3, offset: 511, length: 8 }));
        assert_eq!(range(513, 8), Ok(Some(513..521)));
        assert_eq!(range(len - 8, 7), Ok(Some(len - 8..len - 1)));
        assert_eq!(range(len - 8, 8), Ok(Some(len - 8..len)));
        assert!(range(len - 8, 9).is_err() && range(u64::MAX, 1).is_err() && range(u64::MAX - 1, 4096).is_err());
        assert_eq!(range(512, 0), Ok(None));
        assert_eq!(LocatorEntry::UNUSED.text_range(0, len), Ok(None));
        let strange = LocatorEntry { platform: 9, ..entry(512, 8) };
        assert_eq!(strange.text_range(1, len), Err(Defect::LocatorPlatform { slot: 1, code: 9 }));
    }

    #[test]
    fn texts_with_traps() {
        assert_eq!(texts(Platform::W2ru, &le(".\\b\u{e4}se.vhd\0\0")), [".\\b\u{e4}se.vhd".as_bytes()]);
        let mut odd = le("a.vhd");
        odd.push(b'x');
        assert_eq!(texts(Platform::W2ku, &odd), [b"a.vhd"]);
        assert_eq!(texts(Platform::W2ru, &[0x00, 0xD8, b'a', 0]), ["\u{FFFD}a".as_bytes()]);
        assert_eq!(texts(Platform::W2ru, &[b'a', 0, 0x00, 0xD8]), ["a\u{FFFD}".as_bytes()]);
        assert_eq!(texts(Platform::W2ru, &le("\u{1F4BE}.vhd")), ["\u{1F4BE}.vhd".as_bytes()]);
        assert_eq!(texts(Platform::Wi2r, b"b.vhd\0junk"), [b"b.vhd"]);
        assert_eq!(texts(Platform::MacX, b"file://./a%20b%2"), [&b"file://./a b%2"[..], b"file://./a%20b%2"]);
        assert_eq!(texts(Platform::MacX, b"file://./100%.vhd"), [b"file://./100%.vhd"]);
        assert_eq!(texts(Platform::MacX, b"%+1%f"), [b"%+1%f"]);
        assert_eq!((texts(Platform::Mac, b"x").len(), texts(Platform::Unknown(1), b"x").len()), (0, 0));
        assert_eq!(texts(Platform::W2ru, b"x"), [b""]);
        assert_eq!(header_name(&name("p\u{e4}.vhd")), "p\u{e4}.vhd".as_bytes());
        assert_eq!(header_name(&[b'a'; 512]).len(), 256 * 3, "no terminator");
    }

    #[test]
    fn candidates_in_their_order() {
        let (relative, absolute) = (le(".\\..\\p\\base.vhd"), le("C:\\VMs\\corpus\\base.vhd"));
        let unc = le("\\\\server\\share\\base.vhd");
        let locators = [
            (0, Platform::MacX, &b"file://./base.vhd"[..]),
            (1, Platform::W2ku, &unc),
            (6, Platform::W2ku, &absolute),
            (7, Platform::W2ru, &relative),
        ];
        let (all, notes) = candidates(locators, &name("x\\base2.vhd"));
        let at = |slot, path: &str| Candidate { slot, path: ParentPath::Relative(path.into()) };
        let expected = [
            at(Some(0), "base.vhd"),
            at(Some(7), "../p/base.vhd"),
            at(None, "x/base2.vhd"),
            at(None, "base2.vhd"),
            Candidate { slot: Some(6), path: ParentPath::Absolute("/VMs/corpus/base.vhd".into()) },
        ];
        assert_eq!(all, expected);
        assert!(
            matches!(&notes[..], [Defect::ParentPath { slot: Some(1), text, .. }] if text.starts_with("\\\\server"))
        );
        assert_eq!(candidates([], &[0; 512]), (vec![], vec![]));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut random = Random::new();
        for _ in 0..3000 {
            let mut data = vec![0; random.below(64) as usize];
            random.fill(&mut data);
            let mut name = [0; 512];
            random.fill(&mut name);
            for code in [*b"W2ru", *b"Wi2k", *b"MacX", *b"Mac "] {
                let platform = Platform::from_code(u32::from_be_bytes(code));
                for candidate in candidates([(0, platform, &data[..])], &name).0 {
                    assert!(candidate.path.as_path().file_name().is_some());
                }
            }
        }
    }
}
