//! The session stamp: one sector that connects an image to the live journal of the daemon that has it open.
//!
//! The stamp lies directly before the trailing footer, after all blocks and metadata, where readers of VHDs do not
//! look. It contains the id of the session whose journal contains acknowledged writes that are not committed to the
//! image, and, for messages, the user and the host of that session. All numbers are big-endian:
//!
//! ```text
//!    0  "ddstamp1"              80  user name, 64 bytes      each text: as many bytes as fit, zero padded;
//!    8  session, 16 bytes      144  host name, 64 bytes      a longer text is cut
//!   24  generation, 8 bytes    208  runtime folder, 256 bytes
//!   32  boot id, 16 bytes      464  zeros
//!   48  machine, 16 bytes      496  sum of all bytes before and of the image's UUID, 16 bytes
//!   64  user id, 4 bytes; zeros
//! ```
//!
//! The sum distinguishes a stamp from other bytes and from the stamp of another image. The sum does not protect against
//! a guest that forges a stamp in its own data. Therefore a sector counts as a stamp only if no block and no metadata
//! covers it. Texts are printed only through [`escape_for_display`], and never opened as paths.

use uuid::Uuid;

use crate::units::SECTOR_BYTES;

const MAGIC: [u8; 8] = *b"ddstamp1";
const SESSION: usize = 8;
const GENERATION: usize = 24;
const BOOT: usize = 32;
const MACHINE: usize = 48;
const USER_ID: usize = 64;
const USER: std::ops::Range<usize> = 80..144;
const HOST: std::ops::Range<usize> = 144..208;
const FOLDER: std::ops::Range<usize> = 208..464;
const SUM: usize = 496;

/// A decoded session stamp.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionStamp {
    /// Id of the session, from which the name of the journal is derived.
    pub session: Uuid,
    /// A number that changes whenever the journal no longer matches older copies of the image.
    pub generation: u64,
    /// The boot id of the kernel that ran when the session began.
    pub boot: Uuid,
    /// An id derived from the machine id of the system, which stays the same over reboots.
    pub machine: Uuid,
    /// User id of the daemon.
    pub user_id: u32,
    /// User name of the daemon.
    pub user: String,
    /// Host name of the system.
    pub host: String,
    /// The folder in which the journal was created, as text.
    pub folder: String,
}

impl SessionStamp {
    /// Encodes the sector for the image with this UUID.
    pub fn encode(&self, image: Uuid) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[SESSION..SESSION + 16].copy_from_slice(self.session.as_bytes());
        bytes[GENERATION..GENERATION + 8].copy_from_slice(&self.generation.to_be_bytes());
        bytes[BOOT..BOOT + 16].copy_from_slice(self.boot.as_bytes());
        bytes[MACHINE..MACHINE + 16].copy_from_slice(self.machine.as_bytes());
        bytes[USER_ID..USER_ID + 4].copy_from_slice(&self.user_id.to_be_bytes());
        for (range, text) in [(USER, &self.user), (HOST, &self.host), (FOLDER, &self.folder)] {
            let text = &text.as_bytes()[..text.len().min(range.len())];
            bytes[range][..text.len()].copy_from_slice(text);
        }
        let sum = sum(&bytes[..SUM], image);
        bytes[SUM..].copy_from_slice(&sum);
        bytes
    }

    /// Decodes a sector of the image with this UUID; `None` if the sector holds no stamp of this image.
    pub fn decode(bytes: &[u8; SECTOR_BYTES], image: Uuid) -> Option<SessionStamp> {
        if bytes[..8] != MAGIC || bytes[SUM..] != sum(&bytes[..SUM], image) {
            return None;
        }
        let uuid = |at: usize| Uuid::from_slice(&bytes[at..at + 16]).expect("sixteen bytes");
        let text = |range: std::ops::Range<usize>| {
            let bytes = bytes[range].split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        Some(SessionStamp {
            session: uuid(SESSION),
            generation: u64::from_be_bytes(bytes[GENERATION..GENERATION + 8].try_into().expect("eight bytes")),
            boot: uuid(BOOT),
            machine: uuid(MACHINE),
            user_id: u32::from_be_bytes(bytes[USER_ID..USER_ID + 4].try_into().expect("four bytes")),
            user: text(USER),
            host: text(HOST),
            folder: text(FOLDER),
        })
    }
}

/// Escapes control characters and direction marks, so that a text from an image can be printed.
pub fn escape_for_display(text: &str) -> String {
    let escaped = text.chars().flat_map(|c| match c {
        '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => c.escape_unicode().collect(),
        c if c.is_control() => c.escape_default().collect::<Vec<_>>(),
        c => vec![c],
    });
    escaped.collect()
}

/// Returns two 64-bit sums over the bytes and the UUID; each word is mixed as in splitmix64.
fn sum(bytes: &[u8], image: Uuid) -> [u8; 16] {
    let words = bytes.as_chunks::<8>().0.iter().chain(image.as_bytes().as_chunks::<8>().0);
    let (mut a, mut b) = (0x6A09_E667_F3BC_C908u64, 0xBB67_AE85_84CA_A73Bu64);
    for word in words {
        let word = u64::from_be_bytes(*word);
        a = mix(a ^ word);
        b = mix(b.rotate_left(23).wrapping_add(word) ^ a);
    }
    let mut out = [0; 16];
    out[..8].copy_from_slice(&a.to_be_bytes());
    out[8..].copy_from_slice(&b.to_be_bytes());
    out
}

fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp() -> SessionStamp {
        SessionStamp {
            session: Uuid::from_u128(1),
            generation: u64::MAX - 1,
            boot: Uuid::from_u128(2),
            machine: Uuid::from_u128(3),
            user_id: 107,
            user: "libvirt-qemu".into(),
            host: "höst".into(),
            folder: "/run/user/107/diffdisk".into(),
        }
    }

    #[test]
    fn a_stamp_decodes_only_for_its_image() {
        let (stamp, image) = (stamp(), Uuid::from_u128(9));
        let bytes = stamp.encode(image);
        assert_eq!(SessionStamp::decode(&bytes, image), Some(stamp));
        assert_eq!(SessionStamp::decode(&bytes, Uuid::from_u128(8)), None, "the stamp of another image");
        for at in 0..SECTOR_BYTES {
            for bit in [1, 0x80] {
                let mut wrong = bytes;
                wrong[at] ^= bit;
                assert_eq!(SessionStamp::decode(&wrong, image), None, "byte {at}");
            }
        }
        for other in [[0; SECTOR_BYTES], [0xFF; SECTOR_BYTES]] {
            assert_eq!(SessionStamp::decode(&other, image), None);
        }
    }

    #[test]
    fn long_texts_are_cut_and_control_characters_are_escaped() {
        let long = SessionStamp { folder: "/ä".repeat(200), ..stamp() };
        let back = SessionStamp::decode(&long.encode(Uuid::nil()), Uuid::nil()).expect("a stamp");
        assert!(back.folder.starts_with("/ä/ä") && back.folder.len() < 300);
        assert_eq!(escape_for_display("a\x1b[31m\nb\u{202E}ä"), "a\\u{1b}[31m\\nb\\u{202e}ä");
    }
}
