//! The choice between the two footers of an image (O3).
//!
//! A valid footer at the end takes precedence. The copy at the start of the file is chosen only if the footer at the
//! end is missing or damaged, and only if the copy belongs to a dynamic or differencing disk. The start of a fixed
//! image is sector 0 of the disk, which the guest can write. So no guest can change the type of its disk, as long as
//! the file has its footer.

use crate::format::defect::Defect;
use crate::format::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::units::SECTOR;

/// The position of the chosen footer in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FooterSource {
    /// The last 512 bytes of the file.
    Trailing,
    /// The last 511 bytes of the file.
    Trailing511,
    /// The first 512 bytes of the file, since the end has no valid footer.
    Front,
}

/// The chosen footer, and the defects that do not prevent reading.
#[derive(Clone, Debug)]
pub struct ChosenFooter {
    /// The footer.
    pub footer: Footer,
    /// Its position in the file.
    pub source: FooterSource,
    /// Defects that do not prevent reading.
    pub notes: Vec<Defect>,
    /// Byte offset that the data must not exceed: the offset of the trailing footer, or the length of a file without
    /// one.
    pub data_end: u64,
}

/// Chooses between `tail`, the last 512 bytes of a file of `len` bytes (all of it if shorter), and `front`, its first
/// 512 bytes.
///
/// # Errors
/// The defect that prevents reading the image:
/// - [`Defect::FileTooShort`]
/// - [`Defect::FooterMissing`]
/// - [`Defect::FixedTooShort`]
/// - [`Defect::Poisoned`], in either footer
/// - those of [`Footer::decode`] for the footer at the end, if no usable copy replaces it
///
/// # Panics
/// If the length of `tail` is not the smaller of 512 and `len`.
pub fn choose(tail: &[u8], front: Option<&[u8; 512]>, len: u64) -> Result<ChosenFooter, Defect> {
    assert_eq!(tail.len() as u64, len.min(FOOTER_BYTES), "the tail is the last 512 bytes of the file");
    let Ok(last) = <&[u8; 512]>::try_from(tail) else {
        return Err(Defect::FileTooShort { len });
    };
    match read_trailing(last, len) {
        TrailingFooter::Valid { footer, source, at } => use_trailing(*footer, source, at, front),
        TrailingFooter::Refused(defect) => Err(defect),
        TrailingFooter::Damaged { at, reason } => {
            let note = Defect::TrailingFooterInvalid { at, reason: Box::new(reason.clone()) };
            use_front(front, len, note, reason)
        }
        TrailingFooter::None => {
            use_front(front, len, Defect::TrailingFooterMissing { len }, Defect::FooterMissing { len })
        }
    }
}

enum TrailingFooter {
    Valid {
        footer: Box<Footer>,
        source: FooterSource,
        at: u64,
    },
    /// A recognised footer that is not supported, or has a wrong checksum and belongs to a fixed disk.
    Refused(Defect),
    /// A footer with a wrong checksum, of a disk that is not fixed.
    Damaged {
        at: u64,
        reason: Defect,
    },
    None,
}

fn read_trailing(last: &[u8; 512], len: u64) -> TrailingFooter {
    let full_at = len - FOOTER_BYTES;
    match Footer::decode(last) {
        Err(Defect::FooterCookie { .. }) => {}
        decoded => return classify(decoded, FooterSource::Trailing, full_at, last[63]),
    }
    // A footer of 511 bytes is accepted only if one more byte would complete a sector, as by QEMU and libvhd.
    if (len + 1).is_multiple_of(SECTOR) {
        let short = last.last_chunk::<511>().expect("511 is less than 512");
        match Footer::decode_511(short) {
            Err(Defect::FooterCookie { .. }) => {}
            decoded => return classify(decoded, FooterSource::Trailing511, full_at + 1, short[63]),
        }
    }
    TrailingFooter::None
}

/// Classifies a decoded trailing footer. `type_byte` is the lowest byte of the disk type. The byte is used even if the
/// checksum is wrong.
fn classify(decoded: Result<Footer, Defect>, source: FooterSource, at: u64, type_byte: u8) -> TrailingFooter {
    match decoded.map_err(|defect| defect.with_base_offset(at)) {
        Ok(footer) => TrailingFooter::Valid { footer: Box::new(footer), source, at },
        Err(reason @ Defect::FooterChecksum { .. }) if u32::from(type_byte) != DiskType::Fixed.code() => {
            TrailingFooter::Damaged { at, reason }
        }
        Err(defect) => TrailingFooter::Refused(defect),
    }
}

fn use_trailing(
    footer: Footer,
    source: FooterSource,
    at: u64,
    front: Option<&[u8; 512]>,
) -> Result<ChosenFooter, Defect> {
    let mut notes = Vec::new();
    if source == FooterSource::Trailing511 {
        notes.push(Defect::ShortFooter { at });
    }
    if footer.disk_type == DiskType::Fixed {
        if footer.current_size > at {
            return Err(Defect::FixedTooShort { size: footer.current_size, data: at });
        }
        if footer.current_size < at {
            notes.push(Defect::FixedMore { size: footer.current_size, data: at });
        }
        return Ok(ChosenFooter { footer, source, notes, data_end: at });
    }
    match front.map_or(Err(Defect::FooterCookie { at: 0 }), Footer::decode) {
        Err(poisoned @ Defect::Poisoned { .. }) => return Err(poisoned),
        Err(reason) => notes.push(Defect::FrontFooterInvalid { reason: Box::new(reason) }),
        Ok(copy) => match first_difference(&footer, &copy) {
            _ if footer.disk_type != copy.disk_type => {
                let (front, end) = (copy.disk_type.word(), footer.disk_type.word());
                notes.push(Defect::FooterKindsDiffer { at, front, end });
            }
            Some(field) => notes.push(Defect::FootersDiffer { at, field }),
            None if copy != footer => notes.push(Defect::FooterCopyStale),
            None => {}
        },
    }
    Ok(ChosenFooter { footer, source, notes, data_end: at })
}

/// Returns the first field with consequences in which two footers of one disk type differ.
fn first_difference(a: &Footer, b: &Footer) -> Option<&'static str> {
    match () {
        () if a.current_size != b.current_size => Some("size"),
        () if a.uuid != b.uuid => Some("UUID"),
        () if a.data_offset != b.data_offset => Some("data offset"),
        () => None,
    }
}

fn use_front(front: Option<&[u8; 512]>, len: u64, note: Defect, otherwise: Defect) -> Result<ChosenFooter, Defect> {
    match front.map(Footer::decode) {
        Some(Ok(footer)) if footer.disk_type != DiskType::Fixed => {
            Ok(ChosenFooter { footer, source: FooterSource::Front, notes: vec![note], data_end: len })
        }
        Some(Err(poisoned @ Defect::Poisoned { .. })) => Err(poisoned),
        _ => Err(otherwise),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn footer(disk_type: DiskType) -> Footer {
        Footer::new(disk_type, 1 << 20, Uuid::from_u128(1), 0)
    }

    fn damaged(disk_type: DiskType) -> [u8; 512] {
        let mut bytes = footer(disk_type).encode();
        bytes[300] ^= 1;
        bytes
    }

    const LEN: u64 = 1 << 21;

    #[test]
    fn two_equal_footers() {
        let f = footer(DiskType::Dynamic);
        let c = choose(&f.encode(), Some(&f.encode()), LEN).unwrap();
        assert_eq!((c.footer, c.source, c.data_end), (f, FooterSource::Trailing, LEN - 512));
        assert_eq!(c.notes, []);
    }

    #[test]
    fn the_start_of_a_fixed_disk_is_never_used() {
        let f = footer(DiskType::Fixed);
        let forged = footer(DiskType::Differencing).encode();
        let size = f.current_size;
        let c = choose(&f.encode(), Some(&forged), size + 512).unwrap();
        assert_eq!((c.footer.disk_type, c.notes.len()), (DiskType::Fixed, 0));
        let c = choose(&f.encode(), Some(&forged), LEN).unwrap();
        assert_eq!(c.notes, [Defect::FixedMore { size, data: LEN - 512 }]);
        let mut poison = f.encode();
        poison[..8].copy_from_slice(b"v_poison");
        assert!(choose(&f.encode(), Some(&poison), LEN).is_ok());
        let broken = choose(&damaged(DiskType::Fixed), Some(&forged), LEN);
        assert!(matches!(broken, Err(Defect::FooterChecksum { at, .. }) if at == LEN - 512), "{broken:?}");
    }

    #[test]
    fn the_copy_replaces_a_missing_or_damaged_footer_of_a_dynamic_disk() {
        let f = footer(DiskType::Differencing);
        let c = choose(&[0xC7; 512], Some(&f.encode()), LEN).unwrap();
        assert_eq!((&c.footer, c.source, c.data_end), (&f, FooterSource::Front, LEN));
        assert_eq!(c.notes, [Defect::TrailingFooterMissing { len: LEN }]);
        let c = choose(&damaged(DiskType::Differencing), Some(&f.encode()), LEN).unwrap();
        assert_eq!(c.source, FooterSource::Front);
        assert!(matches!(c.notes[..], [Defect::TrailingFooterInvalid { at, .. }] if at == LEN - 512));
        let fixed = footer(DiskType::Fixed).encode();
        for front in [None, Some(&fixed), Some(&[0; 512]), Some(&damaged(DiskType::Dynamic))] {
            let none = choose(&[0; 512], front, LEN);
            assert_eq!(none.unwrap_err(), Defect::FooterMissing { len: LEN });
        }
    }

    #[test]
    fn the_copy_never_replaces_a_footer_that_is_not_supported() {
        let good = footer(DiskType::Dynamic).encode();
        let mut poison = good;
        poison[..8].copy_from_slice(b"v_poison");
        assert_eq!(choose(&poison, Some(&good), LEN).unwrap_err(), Defect::Poisoned { at: LEN - 512 });
        assert_eq!(choose(&good, Some(&poison), LEN).unwrap_err(), Defect::Poisoned { at: 0 });
        assert_eq!(choose(&[0; 512], Some(&poison), LEN).unwrap_err(), Defect::Poisoned { at: 0 });
        let huge = Footer { current_size: u64::MAX, ..footer(DiskType::Dynamic) }.encode();
        assert!(matches!(choose(&huge, Some(&good), LEN), Err(Defect::DiskSize { .. })));
    }

    #[test]
    fn valid_footers_that_differ() {
        let tail = footer(DiskType::Dynamic);
        let fronts = [
            ("size", tail.with_size(2 << 20)),
            ("UUID", Footer { uuid: Uuid::from_u128(2), ..tail.clone() }),
            ("data offset", Footer { data_offset: 1024, ..tail.clone() }),
        ];
        for (field, front) in fronts {
            let c = choose(&tail.encode(), Some(&front.encode()), LEN).unwrap();
            assert_eq!(c.footer, tail);
            assert_eq!(c.notes, [Defect::FootersDiffer { at: LEN - 512, field }]);
        }
        let other = Footer { disk_type: DiskType::Differencing, ..tail.clone() };
        let c = choose(&tail.encode(), Some(&other.encode()), LEN).unwrap();
        let kinds = Defect::FooterKindsDiffer { at: LEN - 512, front: "differencing", end: "dynamic" };
        assert_eq!((c.footer, c.notes), (tail.clone(), vec![kinds]));
        let stale = Footer { timestamp: 99, ..tail.clone() };
        let c = choose(&tail.encode(), Some(&stale.encode()), LEN).unwrap();
        assert_eq!(c.notes, [Defect::FooterCopyStale]);
        let c = choose(&tail.encode(), Some(&damaged(DiskType::Dynamic)), LEN).unwrap();
        assert!(matches!(c.notes[..], [Defect::FrontFooterInvalid { .. }]));
    }

    #[test]
    fn footers_of_511_bytes_end_one_byte_before_a_sector() {
        let f = footer(DiskType::Fixed).encode();
        let mut tail = [7; 512];
        tail[1..].copy_from_slice(&f[..511]);
        let size = 1 << 20;
        let c = choose(&tail, None, size + 511).unwrap();
        assert_eq!((c.source, c.data_end), (FooterSource::Trailing511, size));
        assert_eq!(c.notes, [Defect::ShortFooter { at: size }]);
        assert!(choose(&tail, None, size + 512).is_err());
    }

    #[test]
    fn lengths_at_their_limits() {
        let f = footer(DiskType::Fixed).encode();
        let size = 1 << 20;
        assert!(choose(&f, None, size + 513).is_ok());
        assert!(choose(&f, None, size + 512).is_ok());
        let short = Defect::FixedTooShort { size, data: size - 1 };
        assert_eq!(choose(&f, None, size + 511).unwrap_err(), short);
        for len in [0u16, 1, 511] {
            let tail = vec![b'c'; len.into()];
            assert_eq!(choose(&tail, None, len.into()).unwrap_err(), Defect::FileTooShort { len: len.into() });
        }
        assert_eq!(choose(&[0; 512], None, 512).unwrap_err(), Defect::FooterMissing { len: 512 });
    }
}
