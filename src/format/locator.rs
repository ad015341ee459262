//! Parent locators: eight entries in the header. Each refers to a text: the path to the parent in the notation of one
//! platform.
//!
//! A locator is a hint. A damaged one is skipped and reported as a defect; it never prevents an image from opening
//! (O11).

use std::ffi::{OsStr, OsString};
use std::ops::Range;

use crate::format::defect::Defect;
use crate::format::parent_path::{MAX_TEXT_BYTES, ParentPath, name_on_share, normalise};
use crate::units::SECTOR;

/// Maximum space that a locator can reserve for its text, in bytes.
const MAX_SPACE_BYTES: u64 = 64 << 10;

/// The notation of a locator's text.
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
    /// Returns the platform of a code.
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

    /// Returns the code in the file.
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

/// A locator entry of the dynamic header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocatorEntry {
    /// Platform code; 0 in an unused entry.
    pub platform: u32,
    /// Space for the text: in sectors if the number is less than 512, otherwise in bytes.
    pub space: u32,
    /// Length of the text, in bytes.
    pub length: u32,
    /// Kept as it is.
    pub reserved: u32,
    /// Byte offset of the text in the file.
    pub offset: u64,
}

impl LocatorEntry {
    /// An unused entry.
    pub const UNUSED: LocatorEntry = LocatorEntry { platform: 0, space: 0, length: 0, reserved: 0, offset: 0 };

    /// Creates an entry for a text of `length` bytes at `offset`. The entry records its space in bytes, rounded up to
    /// whole sectors.
    pub fn new(platform: Platform, offset: u64, length: u32) -> LocatorEntry {
        let space = length.max(1).next_multiple_of(512);
        LocatorEntry { platform: platform.code(), space, length, reserved: 0, offset }
    }

    /// Returns whether the entry is unused.
    pub fn is_unused(&self) -> bool {
        self.platform == 0
    }

    /// Returns the notation of the entry's text.
    pub fn platform(&self) -> Platform {
        Platform::from_code(self.platform)
    }

    /// Returns the space that the entry reserves for its text, in bytes: at most 64 KiB, as Windows reserves; 0 if the
    /// space is not a multiple of a sector.
    pub fn space_bytes(&self) -> u64 {
        let space = u64::from(self.space);
        let bytes = if space < SECTOR { space * SECTOR } else { space };
        if bytes.is_multiple_of(SECTOR) { bytes.min(MAX_SPACE_BYTES) } else { 0 }
    }

    /// Returns the byte range of the entry's text in a file of `len` bytes; `None` if there is no text. `slot` is the
    /// index of the entry, for the defect.
    ///
    /// # Errors
    /// If the entry must be skipped (O11):
    /// - [`Defect::LocatorPlatform`]
    /// - [`Defect::LocatorLength`]
    /// - [`Defect::LocatorPlace`]
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

/// Decodes the text of a locator to paths in bytes. A URL with escapes gives two paths: the decoded one, and the one
/// with the escapes, which libvhd uses. An opaque platform gives none.
pub fn decode_texts(platform: Platform, data: &[u8]) -> Vec<Vec<u8>> {
    match platform {
        Platform::W2ru | Platform::W2ku => {
            vec![utf16(data.as_chunks::<2>().0.iter().map(|&[low, high]| u16::from_be_bytes([high, low])))]
        }
        Platform::Wi2r | Platform::Wi2k => vec![until_nul(data).to_vec()],
        Platform::MacX => {
            let plain = until_nul(data).to_vec();
            let decoded = percent_decoded(&plain);
            if decoded == plain { vec![plain] } else { vec![decoded, plain] }
        }
        Platform::Mac | Platform::Unknown(_) => Vec::new(),
    }
}

/// Decodes the parent's name in the header.
pub fn header_name(name: &[u8; 512]) -> Vec<u8> {
    utf16(name.as_chunks::<2>().0.iter().map(|&unit| u16::from_be_bytes(unit)))
}

/// Decodes UTF-16 up to the first NUL. A lone surrogate becomes U+FFFD.
fn utf16(units: impl Iterator<Item = u16>) -> Vec<u8> {
    let text = char::decode_utf16(units.take_while(|&unit| unit != 0));
    text.map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect::<String>().into_bytes()
}

fn until_nul(data: &[u8]) -> &[u8] {
    data.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Decodes `%XX`. Other bytes, and malformed escapes, stay as they are.
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

/// The paths and names of the parent that an image records.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct RecordedParent {
    /// Distinct paths in the order to try: relative ones, the path in the header if it names a folder, absolute ones
    /// (format 4.4).
    pub paths: Vec<ParentPath>,
    /// Distinct file names, beginning with the one in the header. They are tried if no path leads to a file.
    pub names: Vec<OsString>,
    /// Defects of texts that give no usable path.
    pub notes: Vec<Defect>,
}

impl RecordedParent {
    /// Decodes the texts of the locators, each with its slot and platform, and the name in the header.
    pub fn read<'a>(
        locators: impl IntoIterator<Item = (usize, Platform, &'a [u8])>,
        name: &[u8; 512],
    ) -> RecordedParent {
        let (mut relative, mut absolute, mut found) = (Vec::new(), Vec::new(), RecordedParent::default());
        let name = header_name(name);
        let texts = locators.into_iter().flat_map(|(slot, platform, data)| {
            decode_texts(platform, data).into_iter().map(move |text| (Some(slot), text))
        });
        let header = (!name.is_empty()).then_some((None, name));
        let mut header_file = None;
        for (slot, text) in texts.chain(header) {
            let file_name = match normalise(&text) {
                Ok(path) => {
                    let file_name = path.as_path().file_name().map(OsStr::to_os_string);
                    let is_bare = path.as_path().components().count() == 1;
                    match &path {
                        // A bare name in the header is not used as a path: most programs write it wherever the parent
                        // is.
                        ParentPath::Relative(_) if slot.is_none() && is_bare => {}
                        ParentPath::Relative(_) => push_unique(&mut relative, path),
                        ParentPath::Absolute(_) => push_unique(&mut absolute, path),
                    }
                    file_name
                }
                Err(why) => {
                    let shown = String::from_utf8_lossy(&text).into_owned();
                    found.notes.push(Defect::ParentPath { slot, text: shown, why });
                    name_on_share(&text)
                }
            };
            match slot {
                None => header_file = file_name,
                Some(_) => file_name.into_iter().for_each(|name| push_unique(&mut found.names, name)),
            }
        }
        if let Some(first) = header_file {
            found.names.retain(|name| *name != first);
            found.names.insert(0, first);
        }
        absolute.into_iter().for_each(|path| push_unique(&mut relative, path));
        RecordedParent { paths: relative, ..found }
    }
}

fn push_unique<T: PartialEq>(all: &mut Vec<T>, one: T) {
    if !all.contains(&one) {
        all.push(one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

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
    fn unusual_texts_are_decoded() {
        assert_eq!(decode_texts(Platform::W2ru, &le(".\\b\u{e4}se.vhd\0\0")), [".\\b\u{e4}se.vhd".as_bytes()]);
        let mut odd = le("a.vhd");
        odd.push(b'x');
        assert_eq!(decode_texts(Platform::W2ku, &odd), [b"a.vhd"]);
        assert_eq!(decode_texts(Platform::W2ru, &[0x00, 0xD8, b'a', 0]), ["\u{FFFD}a".as_bytes()]);
        assert_eq!(decode_texts(Platform::W2ru, &[b'a', 0, 0x00, 0xD8]), ["a\u{FFFD}".as_bytes()]);
        assert_eq!(decode_texts(Platform::W2ru, &le("\u{1F4BE}.vhd")), ["\u{1F4BE}.vhd".as_bytes()]);
        assert_eq!(decode_texts(Platform::Wi2r, b"b.vhd\0junk"), [b"b.vhd"]);
        assert_eq!(decode_texts(Platform::MacX, b"file://./a%20b%2"), [&b"file://./a b%2"[..], b"file://./a%20b%2"]);
        assert_eq!(decode_texts(Platform::MacX, b"file://./100%.vhd"), [b"file://./100%.vhd"]);
        assert_eq!(decode_texts(Platform::MacX, b"%+1%f"), [b"%+1%f"]);
        assert_eq!((decode_texts(Platform::Mac, b"x").len(), decode_texts(Platform::Unknown(1), b"x").len()), (0, 0));
        assert_eq!(decode_texts(Platform::W2ru, b"x"), [b""]);
        assert_eq!(header_name(&name("p\u{e4}.vhd")), "p\u{e4}.vhd".as_bytes());
        assert_eq!(header_name(&[b'a'; 512]).len(), 256 * 3, "no terminator");
    }

    #[test]
    fn paths_are_ordered() {
        let (relative, absolute) = (le(".\\..\\p\\base.vhd"), le("C:\\VMs\\corpus\\base.vhd"));
        let unc = le("\\\\server\\share\\base.vhd");
        let locators = [
            (0, Platform::MacX, &b"file://./base.vhd"[..]),
            (1, Platform::W2ku, &unc),
            (6, Platform::W2ku, &absolute),
            (7, Platform::W2ru, &relative),
        ];
        let recorded = RecordedParent::read(locators, &name("x\\base2.vhd"));
        let expected = ["base.vhd", "../p/base.vhd", "x/base2.vhd"].map(|path| ParentPath::Relative(path.into()));
        let absolute = ParentPath::Absolute("/VMs/corpus/base.vhd".into());
        assert_eq!(recorded.paths, [&expected[..], &[absolute]].concat());
        assert_eq!(recorded.names, ["base2.vhd", "base.vhd"], "the name in the header is the first");
        assert!(
            matches!(&recorded.notes[..], [Defect::ParentPath { slot: Some(1), text, .. }] if text.starts_with("\\\\server"))
        );
        assert_eq!(RecordedParent::read([], &[0; 512]), RecordedParent::default());
    }

    #[test]
    fn a_bare_name_in_the_header_is_not_a_path() {
        let bare = RecordedParent::read([], &name("base.vhd"));
        assert_eq!((bare.paths.len(), &bare.names[..]), (0, &["base.vhd".into()][..]));
        let windows = RecordedParent::read([], &name("C:\\VMs\\base.vhd"));
        assert_eq!(windows.paths, [ParentPath::Absolute("/VMs/base.vhd".into())]);
        assert_eq!(windows.names, ["base.vhd"]);
        let share = RecordedParent::read([], &name("\\\\server\\share\\VMs\\base.vhd"));
        assert_eq!((share.paths.len(), share.notes.len(), &share.names[..]), (0, 1, &["base.vhd".into()][..]));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut random = Random::from_env(20_060_101);
        for _ in 0..3000 {
            let mut data = vec![0; random.index(64)];
            random.fill(&mut data);
            let mut name = [0; 512];
            random.fill(&mut name);
            for code in [*b"W2ru", *b"Wi2k", *b"MacX", *b"Mac "] {
                let platform = Platform::from_code(u32::from_be_bytes(code));
                let recorded = RecordedParent::read([(0, platform, &data[..])], &name);
                assert!(recorded.paths.iter().all(|path| path.as_path().file_name().is_some()));
                assert!(recorded.names.iter().all(|name| !name.as_encoded_bytes().contains(&b'/')));
            }
        }
    }
}
