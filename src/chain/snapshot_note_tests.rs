//! Tests of the text of a snapshot note: what is encoded is decoded, and any damage is detected.

use super::*;
use crate::random::Random;

fn note(state: SnapshotState) -> SnapshotNote {
    let member = |number: u128, name: &[u8]| {
        let named = |end: &str| OsStr::from_bytes(&[name, end.as_bytes()].concat()).to_os_string();
        SnapshotMember {
            folder: Path::new("/vms").join(OsStr::from_bytes(name)),
            active: named(""),
            kept: named(".kept"),
            child: named(".new"),
            active_uuid: Uuid::from_u128(number),
            child_uuid: Uuid::from_u128(number + 100),
        }
    };
    let members = vec![member(1, b"a b%41\n\xFF.vhd"), member(2, b"-"), member(3, "ä.vhd".as_bytes())];
    SnapshotNote { group: Uuid::from_u128(9), members, state }
}

fn states() -> [SnapshotState; 4] {
    let switched = |has_journal| SnapshotState::Switched { boot: Uuid::from_u128(u128::MAX), has_journal };
    [SnapshotState::Begun, switched(true), switched(false), SnapshotState::Decided]
}

/// Returns the text with the checksum of its present lines.
fn with_valid_checksum(text: &str) -> String {
    let end = text.trim_end_matches('\n').rfind('\n').map_or(0, |at| at + 1);
    append_checksum(text[..end].to_owned())
}

#[test]
fn a_decoded_note_is_the_encoded_one() {
    for state in states() {
        let note = note(state);
        let text = note.encode();
        assert!(text.bytes().all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)), "{text}");
        assert_eq!(SnapshotNote::decode(&text), Some(note));
    }
}

#[test]
fn damage_is_detected() {
    let text = note(states()[1]).encode();
    for cut in 0..text.len() {
        assert_eq!(SnapshotNote::decode(&text[..cut]), None, "cut at {cut}");
    }
    for at in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[at] ^= 1;
        let decoded = std::str::from_utf8(&bytes).ok().and_then(SnapshotNote::decode);
        assert_eq!(decoded, None, "byte {at}");
    }
}

#[test]
fn texts_that_no_note_has_are_refused() {
    let good = note(SnapshotState::Begun);
    let refused = |change: &dyn Fn(&mut SnapshotNote)| {
        let mut note = good.clone();
        change(&mut note);
        assert_eq!(SnapshotNote::decode(&note.encode()), None, "{note:?}");
    };
    refused(&|note| note.members.clear());
    refused(&|note| note.members[1].active_uuid = note.members[0].active_uuid);
    refused(&|note| note.members[1].child_uuid = note.members[1].active_uuid);
    for name in ["", ".", "..", "a/b", "/a", "a/", "a\0"] {
        refused(&|note| note.members[0].active = name.into());
        refused(&|note| note.members[1].kept = name.into());
        refused(&|note| note.members[2].child = name.into());
    }
    refused(&|note| note.members[0].folder = "vms".into());
    refused(&|note| note.members[0].kept = note.members[0].active.clone());
    let text = good.encode();
    for (from, to) in [
        ("snapshot 1", "snapshot 2"),
        ("state begun\n", ""),
        ("state begun\n", "state begun\nstate begun\n"),
        ("state begun\n", "state begun now\n"),
        ("state begun\n", "state switched\n"),
        ("state begun\n", "state switched 1 journal\n"),
        ("state begun\n", "\nstate begun\n"),
        ("-0000000000", "-000000000A"),
        (" -.kept", " -.kept x"),
        ("%20", "%+2"),
    ] {
        let changed = with_valid_checksum(&text.replacen(from, to, 1));
        assert_ne!(changed, text, "{from}");
        assert_eq!(SnapshotNote::decode(&changed), None, "{changed}");
    }
}

#[test]
fn random_texts_never_cause_a_panic() {
    let mut random = Random::new(17);
    let good: Vec<String> = states().map(|state| note(state).encode()).to_vec();
    for _ in 0..20_000 {
        let mut bytes = good[random.index(good.len())].clone().into_bytes();
        for _ in 0..=random.index(4) {
            let at = random.index(bytes.len());
            match random.index(3) {
                0 => bytes[at] = (random.next_u64() & 0xFF) as u8,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, b" \n%0/"[random.index(5)]),
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        for text in [text.to_string(), with_valid_checksum(&text)] {
            if let Some(note) = SnapshotNote::decode(&text) {
                assert_eq!(note.encode(), text);
            }
        }
    }
}
