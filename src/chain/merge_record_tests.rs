//! Tests of the merge record: it is written, found, and detected as damaged.

use std::os::unix::ffi::OsStrExt;

use super::super::file_stamp::FileStamp;
use super::super::merge_record::{Copied, MergedLayer};
use super::*;
use crate::storage::ModifiedTime;
use crate::storage::host::Host;

fn record(folder: &Path) -> MergeRecord {
    let stamp = |ino, (seconds, nanos)| FileStamp { ino, len: 1 << 50, modified: ModifiedTime { seconds, nanos } };
    let odd = OsStr::from_bytes(b"a b%41\n\xFF.vhd");
    let layers = vec![
        MergedLayer { uuid: Uuid::from_u128(1), stamp: stamp(7, (-5, 7)), path: odd.into() },
        MergedLayer { uuid: Uuid::from_u128(2), stamp: stamp(8, (1 << 40, 999_999_999)), path: "../x/m.vhd".into() },
    ];
    let (ancestor, ancestor_path) = (Uuid::from_u128(3), "p.vhd".into());
    let ancestor_stamp = stamp(u64::MAX, (0, 0));
    let copied = Copied::Before(77);
    MergeRecord { folder: folder.into(), layers, ancestor, ancestor_stamp, ancestor_path, copied, abandoned: false }
}

#[test]
fn a_saved_record_is_found_by_name_or_by_uuid() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().canonicalize().unwrap();
    let home = Host.folder(&at).unwrap();
    let mut record = record(&at);
    let child = at.join(&record.layers[0].path);
    assert_eq!(MergeRecord::find(&Host, &child, None).unwrap(), ExistingRecord::None);
    record.save(&home).unwrap();
    std::fs::write(at.join(record.temporary_name()), "left by a killed process").unwrap();
    record.copied = Copied::All;
    record.save(&home).unwrap();
    assert_eq!(MergeRecord::find(&Host, &child, None).unwrap(), ExistingRecord::Record(Box::new(record.clone())));
    let other = at.join("renamed.vhd");
    assert_eq!(
        MergeRecord::find(&Host, &other, Some(Uuid::from_u128(1))).unwrap(),
        ExistingRecord::Record(Box::new(record.clone()))
    );
    assert_eq!(MergeRecord::find(&Host, &other, None).unwrap(), ExistingRecord::None);
    assert_eq!(MergeRecord::find(&Host, &other, Some(Uuid::from_u128(9))).unwrap(), ExistingRecord::None);
    let e = MergeRecord::find(&Host, &child, Some(Uuid::from_u128(9))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused, "another image has the name");
    record.remove(&home).unwrap();
    assert_eq!(home.list().unwrap().len(), 0);
}

#[test]
fn a_damaged_record_is_detected() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().canonicalize().unwrap();
    let record = record(&at);
    for copied in [Copied::Nothing, Copied::All, Copied::Before(0)] {
        for abandoned in [false, true] {
            let record = MergeRecord { copied, abandoned, ..record.clone() };
            assert_eq!(MergeRecord::decode(&record.encode(), &at), Some(record));
        }
    }
    let text = record.encode();
    assert_eq!(MergeRecord::decode(&text, &at), Some(record.clone()));
    for cut in 0..text.len() {
        assert_eq!(MergeRecord::decode(&text[..cut], &at), None, "cut at {cut}");
    }
    for at_byte in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[at_byte] ^= 1;
        let read = std::str::from_utf8(&bytes).ok().and_then(|text| MergeRecord::decode(text, &at));
        assert_eq!(read, None, "byte {at_byte}");
    }
    std::fs::write(record.path(), &text[1..]).unwrap();
    let child = at.join("c.vhd");
    let found = MergeRecord::find(&Host, &child, Some(Uuid::from_u128(1))).unwrap();
    assert_eq!(found, ExistingRecord::Unreadable(record.path()));
    assert_eq!(MergeRecord::find(&Host, &child, None).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(
        MergeRecord::find(&Host, &child, Some(Uuid::from_u128(2))).unwrap(),
        ExistingRecord::None,
        "the record of another merge"
    );
    // The same record under the name of another image.
    std::fs::rename(record.path(), at.join(format!(".{}.merge", Uuid::from_u128(2)))).unwrap();
    let found = MergeRecord::find(&Host, &child, Some(Uuid::from_u128(2))).unwrap();
    assert!(matches!(found, ExistingRecord::Unreadable(_)), "{found:?}");
}
