//! Tests of `file.rs` on real files.

use super::super::direct::BOUNCE_BYTES;
use super::*;
use crate::storage::env::Env;
use crate::storage::host::Host;

fn file(bytes: &[u8]) -> (tempfile::TempDir, Arc<HostFile>) {
    let folder = tempfile::tempdir_in("/var/tmp").or_else(|_| tempfile::tempdir()).unwrap();
    let path = folder.path().join("f");
    std::fs::write(&path, bytes).unwrap();
    let file = Host.open(&path, Access::Write).unwrap();
    (folder, HostFile::of(&file).unwrap())
}

#[allow(clippy::cast_possible_truncation, reason = "the values do not matter")]
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn transfers_are_whole_or_report_the_offset() {
    let (_folder, f) = file(&pattern(1000));
    let mut b = [0; 100];
    f.read_at(&mut b, 900).unwrap();
    assert_eq!(b, pattern(1000)[900..]);
    let e = f.read_at(&mut b, 901).unwrap_err();
    assert_eq!((e.kind(), e.offset(), e.path()), (ErrorKind::Io, Some(901), Some(f.path())));
    assert!(f.read_at(&mut b, u64::MAX - 3).is_err() && f.write_at(&b, u64::MAX - 3).is_err());
    f.write_at(&[9; 7], 1500).unwrap();
    f.read_at(&mut b[..8], 1499).unwrap();
    assert_eq!(b[..8], [0, 9, 9, 9, 9, 9, 9, 9]);
    assert_eq!(f.stat().unwrap().len, 1507);
    assert_eq!(f.stat().unwrap().id, f.id());
    f.sync().unwrap();
}

#[test]
fn holes_are_punched_and_found() {
    let (_folder, f) = file(&[]);
    f.set_len(1 << 20).unwrap();
    f.write_at(&[1; 65536], 262_144).unwrap();
    f.sync().unwrap();
    assert_eq!(f.next_data(0).unwrap(), Some((262_144, 65536)));
    assert_eq!(f.next_data(262_144 + 65536).unwrap(), None);
    assert_eq!(f.next_data(1 << 21).unwrap(), None);
    let before = f.stat().unwrap().allocated;
    f.punch_hole(262_144, 32768).unwrap();
    assert_eq!(f.next_data(0).unwrap(), Some((262_144 + 32768, 32768)));
    assert!(f.stat().unwrap().allocated < before);
    f.allocate(1 << 20, 1 << 16).unwrap();
    assert_eq!(f.stat().unwrap().len, 1 << 20);
    f.write_zeros(262_144 + 32768 + 10, 1 << 30).unwrap();
    let mut b = [7; 12];
    f.read_at(&mut b, 262_144 + 32768).unwrap();
    assert_eq!(b, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
    assert_eq!(f.stat().unwrap().len, 1 << 20);
}

#[test]
fn direct_files_accept_unaligned_memory() {
    let bytes = pattern(2 * BOUNCE_BYTES + 1000);
    let (_folder, f) = file(&bytes);
    let Some(rules) = f.set_direct().unwrap() else {
        eprintln!("skipped: /var/tmp has no O_DIRECT with an alignment of a sector");
        return;
    };
    assert_eq!(f.set_direct().unwrap(), Some(rules));
    let mut whole = vec![0; bytes.len() + 1];
    for (at, len) in [(1, 10), (511, 2), (3, bytes.len() - 3), (bytes.len() - 1, 1), (512, 2 * BOUNCE_BYTES)] {
        f.read_at(&mut whole[1..=len], at as u64).unwrap();
        assert_eq!(whole[1..=len], bytes[at..at + len], "{at} {len}");
    }
    for (at, len) in [(bytes.len() - 1, 2), (bytes.len(), 1), (0, bytes.len() + 1), (1 << 30, 5)] {
        let e = f.read_at(&mut whole[..len], at as u64).unwrap_err();
        assert!(e.line().contains("end of file"), "{e}");
    }
    f.write_at(&whole[1..=BOUNCE_BYTES + 512], 1024).unwrap();
    let mut back = vec![0; BOUNCE_BYTES + 512];
    f.read_at(&mut back, 1024).unwrap();
    assert_eq!(back, whole[1..=BOUNCE_BYTES + 512]);
    assert!(f.write_at(&[0; 512], 1).is_err() && f.write_at(&[0; 5], 0).is_err());
}
