//! Which of the two footers counts (O3).
//!
//! The one at the end. The one at the start lies where the guest of a fixed disk writes its sector 0: it is used only
//! where the end has none and only for sparse disks, and it never overrules. So no guest can change the kind of its disk.

use crate::format::defect::Defect;
use crate::format::footer::{DiskType, FOOTER_BYTES, Footer};
use crate::units::SECTOR;

/// Where the chosen footer was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FooterSource {
    /// The last 512 bytes.
    TailFull,
    /// The last 511 bytes.
    Tail511,
    /// The first 512 bytes, since the end has none.
    FrontOnly,
}

/// The footer that counts, and what was noticed on the way.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The footer.
    pub footer: Footer,
    /// Where it was read.
    pub source: FooterSource,
    /// False where the two copies are both valid and contradict each other: nothing may be written before a repair.
    pub agree: bool,
    /// What is wrong but does not prevent reading.
    pub notes: Vec<Defect>,
    /// Where the data must end: the offset of the trailing footer, or the length of the file where it is missing.
    pub data_end: u64,
}

/// Chooses between `tail`, the last 512 bytes of a file of `len` bytes (all of it if shorter), and `front`, its first
/// 512 bytes.
///
/// # Errors
/// The [`Defect`] for which the file cannot be opened at all.
///
/// # Panics
/// Where `tail` has not the length it must have.
pub fn choose(tail: &[u8], front: Option<&[u8; 512]>, len: u64) -> Result<Chosen, Defect> {
    assert_eq!(tail.len() as u64, len.min(FOOTER_BYTES), "the tail is the last 512 bytes of the file");
    let Ok(last) = <&[u8; 512]>::try_from(tail) else {
        return Err(Defect::FileTooShort { len });
    };
    match read_tail(last, len) {
        Tail::Valid { footer, source, at } => with_tail(*footer, source, at, front),
        Tail::Refused(defect) => Err(defect),
        Tail::Damaged { at, reason } => {
            let note = Defect::TrailingFooterInvalid { at, reason: Box::new(reason.clone()) };
            with_front(front, len, note, reason)
        }
        Tail::None => with_front(front, len, Defect::TrailingFooterMissing { len }, Defect::FooterMissing { len }),
    }
}

enum Tail {
    Valid {
        footer: Box<Footer>,
        source: FooterSource,
        at: u64,
    },
    /// A footer that says what it is, and that is not for us.
    Refused(Defect),
    /// A footer with a wrong sum, of a disk that is not fixed.
    Damaged {
        at: u64,
        reason: Defect,
    },
    None,
}

fn read_tail(last: &[u8; 512], len: u64) -> Tail {
    let full_at = len - FOOTER_BYTES;
    match Footer::decode(last) {
        Err(Defect::FooterCookie { .. }) => {}
        decoded => return judge(decoded, FooterSource::TailFull, full_at, last[63]),
    }
    // Like QEMU and libvhd, where the missing byte would have completed a sector.
    if (len + 1).is_multiple_of(SECTOR) {
        let short = last.last_chunk::<511>().expect("511 is less than 512");
        match Footer::decode_511(short) {
            Err(Defect::FooterCookie { .. }) => {}
            decoded => return judge(decoded, FooterSource::Tail511, full_at + 1, short[63]),
        }
    }
    Tail::None
}

/// `type_byte` is the lowest byte of the type, which counts even where the sum is wrong.
fn judge(decoded: Result<Footer, Defect>, source: FooterSource, at: u64, type_byte: u8) -> Tail {
    match decoded.map_err(|defect| defect.placed(at)) {
        Ok(footer) => Tail::Valid { footer: Box::new(footer), source, at },
        Err(reason @ Defect::FooterChecksum { .. }) if u32::from(type_byte) != DiskType::Fixed.code() => {
            Tail::Damaged { at, reason }
        }
        Err(defect) => Tail::Refused(defect),
    }
}

fn with_tail(footer: Footer, source: FooterSource, at: u64, front: Option<&[u8; 512]>) -> Result<Chosen, Defect> {
    let mut notes = Vec::new();
    if source == FooterSource::Tail511 {
        notes.push(Defect::ShortFooter { at });
    }
    if footer.disk_type == DiskType::Fixed {
        if footer.current_size > at {
            return Err(Defect::FixedTooShort { size: footer.current_size, data: at });
        }
        return Ok(Chosen { footer, source, agree: true, notes, data_end: at });
    }
    let mut agree = true;
    match front.map_or(Err(Defect::FooterCookie { at: 0 }), Footer::decode) {
        Err(poisoned @ Defect::Poisoned { .. }) => return Err(poisoned),
        Err(reason) => notes.push(Defect::FrontFooterInvalid { reason: Box::new(reason) }),
        Ok(copy) => match difference(&footer, &copy) {
            Some(field) => {
                agree = false;
                notes.push(Defect::FootersDiffer { at, field });
            }
            None if copy != footer => notes.push(Defect::FooterCopyStale),
            None => {}
        },
    }
    Ok(Chosen { footer, source, agree, notes, data_end: at })
}

/// The first field with consequences in which two footers differ.
fn difference(a: &Footer, b: &Footer) -> Option<&'static str> {
    match () {
        () if a.disk_type != b.disk_type => Some("disk type"),
        () if a.current_size != b.current_size => Some("size"),
        () if a.uuid != b.uuid => Some("UUID"),
        () if a.data_offset != b.data_offset => Some("data offset"),
        () => None,
    }
}

fn with_front(front: Option<&[u8; 512]>, len: u64, note: Defect, otherwise: Defect) -> Result<Chosen, Defect> {
    match front.map(Footer::decode) {
        Some(Ok(footer)) if footer.disk_type != DiskType::Fixed => {
            Ok(Chosen { footer, source: FooterSource::FrontOnly, agree: true, notes: vec![note], data_end: len })
        }
        Some(Err(poisoned @ Defect::Poisoned { .. })) => Err(poisoned),
        _ => Err(otherwise),
    }
}
