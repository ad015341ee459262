//! The record of a merge: written, found again, and broken.

use std::os::unix::ffi::OsStrExt;

use super::super::file_stamp::FileStamp;
use super::super::merge_record::{Copied, MergedLayer};
use super::*;
use crate::storage::ModifiedTime;
use crate::storage::host::Host;

fn intent(folder: &Path) -> MergeRecord {
    let seen = |ino, (seconds, nanos)| FileStamp { ino, len: 1 << 50, modified: ModifiedTime { seconds, nanos } };
    let odd = OsStr::from_bytes(b"a b%41\n\xFF.vhd");
    let layers = vec![
        MergedLayer { uuid: Uuid::from_u128(1), stamp: seen(7, (-5, 7)), path: odd.into() },
        MergedLayer { uuid: Uuid::from_u128(2), stamp: seen(8, (1 << 40, 999_999_999)), path: "../x/m.vhd".into() },
    ];
    let (ancestor, ancestor_path) = (Uuid::from_u128(3), "p.vhd".into());
    let ancestor_seen = seen(u64::MAX, (0, 0));
    let copied = Copied::Before(77);
    MergeRecord {
        folder: folder.into(),
        layers,
        ancestor,
        ancestor_stamp: ancestor_seen,
        ancestor_path,
        copied,
        abandoned: false,
    }
}

#[test]
fn what_is_saved_is_found_by_name_or_by_identity() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().canonicalize().unwrap();
    let home = Host.folder(&at).unwrap();
    let mut note = intent(&at);
    let child = at.join(&note.layers[0].path);
    assert_eq!(MergeRecord::find(&Host, &child, None).unwrap(), ExistingRecord::None);
    note.save(&home).unwrap();
    std::fs::write(at.join(note.temporary_name()), "left by a killed one").unwrap();
    note.copied = Copied::All;
    note.save(&home).unwrap();
    assert_eq!(MergeRecord::find(&Host, &child, None).unwrap(), ExistingRecord::Record(Box::new(note.clone())));
    let other = at.join("renamed.vhd");
    assert_eq!(
        MergeRecord::find(&Host, &other, Some(Uuid::from_u128(1))).unwrap(),
        ExistingRecord::Record(Box::new(note.clone()))
    );
    assert_eq!(MergeRecord::find(&Host, &other, None).unwrap(), ExistingRecord::None);
    assert_eq!(MergeRecord::find(&Host, &other, Some(Uuid::from_u128(9))).unwrap(), ExistingRecord::None);
    let e = MergeRecord::find(&Host, &child, Some(Uuid::from_u128(9))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused, "another image has the name");
    note.remove(&home).unwrap();
    assert_eq!(home.list().unwrap().len(), 0);
}

#[test]
fn a_broken_note_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().canonicalize().unwrap();
    let note = intent(&at);
    for copied in [Copied::Nothing, Copied::All, Copied::Before(0)] {
        for abandoned in [false, true] {
            let note = MergeRecord { copied, abandoned, ..note.clone() };
            assert_eq!(MergeRecord::decode(&note.encode(), &at), Some(note));
        }
    }
    let text = note.encode();
    assert_eq!(MergeRecord::decode(&text, &at), Some(note.clone()));
    for cut in 0..text.len() {
        assert_eq!(MergeRecord::decode(&text[..cut], &at), None, "cut at {cut}");
    }
    for at_byte in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[at_byte] ^= 1;
        let read = std::str::from_utf8(&bytes).ok().and_then(|text| MergeRecord::decode(text, &at));
        assert_eq!(read, None, "byte {at_byte}");
    }
    std::fs::write(note.path(), &text[1..]).unwrap();
    let child = at.join("c.vhd");
    let found = MergeRecord::find(&Host, &child, Some(Uuid::from_u128(1))).unwrap();
    assert_eq!(found, ExistingRecord::Unreadable(note.path()));
    assert_eq!(MergeRecord::find(&Host, &child, None).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(
        MergeRecord::find(&Host, &child, Some(Uuid::from_u128(2))).unwrap(),
        ExistingRecord::None,
        "another one's"
    );
    // The same under the name of another image.
    std::fs::rename(note.path(), at.join(format!(".{}.merge", Uuid::from_u128(2)))).unwrap();
    let found = MergeRecord::find(&Host, &child, Some(Uuid::from_u128(2))).unwrap();
    assert!(matches!(found, ExistingRecord::Unreadable(_)), "{found:?}");
}
