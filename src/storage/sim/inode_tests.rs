//! Tests of `inode.rs`.

use super::*;

fn write(inode: &mut Inode, seq: u64, offset: u64, bytes: &[u8]) {
    for change in inode.changes(Effect::Write(offset, bytes)) {
        inode.apply(seq, change);
    }
}

fn byte(inode: &Inode, at: u64) -> u8 {
    let mut b = [0];
    inode.read(&mut b, at);
    b[0]
}

#[test]
fn a_sync_covers_changes_up_to_its_number() {
    let mut i = Inode::default();
    write(&mut i, 1, 0, &[1; 1024]);
    write(&mut i, 2, 512, &[2; 512]);
    i.sync(1, SyncScope::All);
    let old = i.after_crash([].into_iter());
    assert_eq!((byte(&old, 0), byte(&old, 600), old.len()), (1, 1, 1024));
    assert_eq!(byte(&i.after_crash(i.unsynced().map(|(_, change)| change)), 600), 2);
    assert_eq!(byte(&i, 600), 2);
}

#[test]
fn a_change_whose_sync_failed_stays_lost_until_it_is_overwritten() {
    let mut i = Inode::default();
    write(&mut i, 1, 0, &[1; 512]);
    i.sync(1, SyncScope::All);
    write(&mut i, 2, 0, &[2; 512]);
    i.forget(2, SyncScope::All);
    i.sync(2, SyncScope::All);
    assert_eq!(byte(&i.after_crash([].into_iter()), 0), 1);
    assert_eq!(byte(&i, 0), 2);
    write(&mut i, 3, 0, &[3; 512]);
    i.sync(3, SyncScope::All);
    assert_eq!(i.unsynced().count(), 0);
    assert_eq!(byte(&i.after_crash([].into_iter()), 0), 3);
}

#[test]
fn a_sync_of_a_range_covers_only_the_range_and_the_length() {
    let mut i = Inode::default();
    write(&mut i, 1, 0, &[1; 1024]);
    write(&mut i, 2, 4096, &[2; 512]);
    i.sync(2, SyncScope::Range(4096, 4608));
    let left = i.after_crash([].into_iter());
    assert_eq!((byte(&left, 0), byte(&left, 512), byte(&left, 4096), left.len()), (0, 0, 2, 4608));
    assert_eq!(byte(&i.after_crash(i.unsynced().map(|(_, change)| change)), 600), 1);
    i.forget(2, SyncScope::Range(0, 512));
    i.sync(2, SyncScope::All);
    let left = i.after_crash([].into_iter());
    assert_eq!((byte(&left, 0), byte(&left, 512)), (0, 1), "a failed sync of a range loses only the range");
}

#[test]
fn writes_and_holes_begin_and_end_within_sectors() {
    let mut i = Inode::default();
    write(&mut i, 1, 500, &[7; 24]);
    assert_eq!((byte(&i, 499), byte(&i, 500), byte(&i, 523), i.len()), (0, 7, 7, 524));
    for change in i.changes(Effect::Clear(510, 5)) {
        i.apply(2, change);
    }
    assert_eq!((byte(&i, 509), byte(&i, 510), byte(&i, 514), byte(&i, 515)), (7, 0, 0, 7));
    i.apply(3, InodeChange::Len(516));
    i.apply(4, InodeChange::Len(600));
    assert_eq!((byte(&i, 515), byte(&i, 516)), (7, 0));
    assert_eq!(i.next_data(0), Some((0, 600)));
    assert_eq!(i.next_data(513), Some((513, 87)));
    // Bytes beyond a length that survives are lost.
    i.sync(1, SyncScope::All);
    let cut = i.after_crash([InodeChange::Len(501)].iter());
    assert_eq!((cut.len(), byte(&cut, 500), byte(&cut, 501)), (501, 7, 0));
}
