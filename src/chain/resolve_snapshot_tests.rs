//! Tests of the resolution of a snapshot: each row of its table, and what is refused.

use uuid::Uuid;

use super::super::open_mode::OpenMode;
use super::super::snapshot_note::SnapshotMember;
use super::super::unfinished_snapshot::unfinished_snapshot;
use super::super::{Chain, Policy};
use super::testing::*;
use super::*;
use crate::image::{ImageKind, ParentLink};
use crate::storage::host::Host;
use crate::storage::sim::SimHost;

#[test]
fn without_journals_a_switched_snapshot_is_undone() {
    let (host, note) = setup(1);
    let mut written = vec![WrittenBytes::default()];
    take(&host, &note, &mut written, Step::Switched, false).unwrap();
    let host = end(&host, End::Kill);
    assert!(resolve(&host, 0).unwrap());
    assert_eq!(check(&host, &note, &written, false), Ok(false));
}

#[test]
fn going_back_removes_the_journal_of_the_child() {
    let (host, note, written) = killed_after(1, Step::ChildrenMade);
    let child = open_writable(&host, &path(0, "new")).unwrap();
    write(&host, &child, 5, 5).unwrap();
    drop(child);
    assert_eq!(host.shm_names().len(), 2, "of both images");
    assert!(resolve(&host, 0).unwrap());
    assert_eq!(host.shm_names().len(), 1, "of the image that stays");
    assert_eq!(check(&host, &note, &written, false), Ok(false));
    assert!(!resolve(&host, 0).unwrap(), "nothing is left to resolve");
}

#[test]
fn the_kept_image_has_the_time_that_the_child_records() {
    let (host, _, _) = killed_after(1, Step::Switched);
    let before = host.open(&path(0, "disk"), Access::Read).unwrap().stat().unwrap().modified;
    assert!(resolve(&host, 0).unwrap());
    let policy = Policy { runtime: runtime(&host), ..Policy::default() };
    let chain = Chain::open(&host, &path(0, "disk"), &policy, OpenMode::Inspect).unwrap();
    assert_eq!(chain.images().len(), 2);
    assert_eq!(chain.outdated().count(), 0);
    let kept = chain.images()[1].file().stat().unwrap().modified;
    assert!(kept < before, "the last writes are later than the recorded time");
}

#[test]
fn a_served_disk_is_busy() {
    for step in [Step::Noted, Step::Switched, Step::Flushed, Step::Named] {
        let (host, _, _) = killed_after(1, step);
        let file = host.open(&path(0, "disk"), Access::Write).unwrap();
        file.lock(Lock::Exclusive).unwrap();
        let names = names(&host, 0);
        let e = resolve(&host, 0).unwrap_err();
        assert_eq!((e.kind(), e.path()), (ErrorKind::Busy, Some(&*path(0, "disk"))), "{step:?}: {e}");
        assert_eq!(self::names(&host, 0), names, "{step:?}");
    }
}

#[test]
fn a_locked_note_or_member_is_busy_and_named() {
    let (host, note, _) = killed_after(2, Step::Switched);
    let name = folder(&host, 0).path_to(&note.name(0));
    let lock = host.open(&name, Access::Write).unwrap();
    lock.lock(Lock::Exclusive).unwrap();
    for index in 0..2 {
        let e = resolve(&host, index).unwrap_err();
        assert_eq!((e.kind(), e.path()), (ErrorKind::Busy, Some(&*name)), "{e}");
    }
    drop(lock);
    let reader = host.open(&path(1, "disk"), Access::Read).unwrap();
    reader.lock(Lock::Shared).unwrap();
    let e = resolve(&host, 0).unwrap_err();
    assert!(e.kind() == ErrorKind::Busy && e.line().contains(&name.display().to_string()), "{e}");
    drop(reader);
    assert!(resolve(&host, 0).unwrap());
}

#[test]
fn a_lost_journal_is_refused_until_it_is_discarded() {
    let refused = |host: &SimHost, index: usize| {
        let e = resolve(host, index).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains("--discard-journal"), "{e}");
        assert!(e.line().contains("diffdisk settle /"), "{e}");
    };
    for lost in ["disk", "new"] {
        for member in 0..2 {
            let (host, note, mut written) = killed_after(2, Step::Switched);
            let image = Image::open(host.open(&path(member, lost), Access::Read).unwrap()).unwrap();
            image::remove_journal_of(&runtime(&host), &image).unwrap();
            drop(image);
            let before = [names(&host, 0), names(&host, 1)];
            refused(&host, 0);
            refused(&host, 1);
            assert_eq!([names(&host, 0), names(&host, 1)], before, "nothing changes");
            for (index, written) in written.iter_mut().enumerate() {
                assert!(resolve_within(&host, &path(index, "disk"), &runtime(&host), true, Duration::ZERO).unwrap());
                image::discard_session(&host, &runtime(&host), &path(index, "disk")).unwrap();
                written.acknowledged = written.flushed.clone();
            }
            assert_eq!(check(&host, &note, &written, false), Ok(false), "{lost} of {member}");
        }
    }
}

#[test]
fn after_one_member_went_back_no_other_goes_forward() {
    let (host, note, mut written) = killed_after(2, Step::Switched);
    let image = Image::open(host.open(&path(1, "new"), Access::Read).unwrap()).unwrap();
    image::remove_journal_of(&runtime(&host), &image).unwrap();
    drop(image);
    assert!(resolve_within(&host, &path(1, "disk"), &runtime(&host), true, Duration::ZERO).unwrap());
    assert!(resolve(&host, 0).unwrap());
    for written in &mut written {
        written.acknowledged.retain(|(sector, _)| *sector != 2);
    }
    assert_eq!(check(&host, &note, &written, false), Ok(false));
}

#[test]
fn an_image_in_use_on_another_machine_is_refused() {
    for step in [Step::ChildrenMade, Step::Switched, Step::Flushed] {
        let (host, note, written) = killed_after(2, step);
        host.move_to_another_machine(77);
        for index in 0..2 {
            let e = resolve(&host, index).unwrap_err();
            assert!(e.kind() == ErrorKind::Refused && e.line().contains("fenced"), "{step:?}: {e}");
        }
        for index in 0..2 {
            assert!(resolve_within(&host, &path(index, "disk"), &runtime(&host), true, Duration::ZERO).unwrap());
            image::discard_session(&host, &runtime(&host), &path(index, "disk")).unwrap();
        }
        assert_eq!(check(&host, &note, &written, true), Ok(step >= Step::Decided), "{step:?}");
    }
}

#[test]
fn without_the_coordinators_disk_the_state_is_unknown() {
    for step in [Step::ChildrenMade, Step::Flushed] {
        let (host, note, _) = killed_after(2, step);
        let mine = note.members[1].active_uuid;
        for name in names(&host, 0) {
            host.remove(&path(0, &name)).unwrap();
        }
        let e = resolve(&host, 1).unwrap_err();
        assert!(e.kind() == ErrorKind::Refused && e.line().contains("/a/disk"), "{e}");
        assert!(resolve_within(&host, &path(1, "disk"), &runtime(&host), true, Duration::ZERO).unwrap());
        assert_eq!((names(&host, 1), uuid_at(&host, &path(1, "disk"))), (vec!["disk".to_owned()], Some(mine)));
    }
}

#[test]
fn without_the_coordinators_note_its_disk_shows_the_decision() {
    for (step, is_forward) in [(Step::Flushed, false), (Step::Named, true)] {
        let (host, note, _) = killed_after(2, step);
        if is_forward {
            // The second disk is not named yet.
            folder(&host, 1).rename("disk".as_ref(), &folder(&host, 1), "new".as_ref()).unwrap();
            folder(&host, 1).rename("kept".as_ref(), &folder(&host, 1), "disk".as_ref()).unwrap();
        }
        host.remove(&folder(&host, 0).path_to(&note.name(0))).unwrap();
        assert!(resolve(&host, 1).unwrap());
        let uuid = uuid_at(&host, &path(1, "disk"));
        assert_eq!(uuid == Some(note.members[1].child_uuid), is_forward, "{step:?}");
    }
}

#[test]
fn the_note_of_a_later_snapshot_of_the_coordinator_does_not_count() {
    let (host, note, _) = killed_after(2, Step::ChildrenMade);
    assert!(resolve(&host, 0).unwrap());
    let group = Uuid::from_u128(8);
    let later = SnapshotNote { group, state: SnapshotState::Decided, ..note.clone() };
    later.write_new(&host, &folder(&host, 0), 0).unwrap();
    assert!(resolve(&host, 1).unwrap());
    assert_eq!(names(&host, 1), ["disk"]);
    assert_eq!(uuid_at(&host, &path(1, "disk")), Some(note.members[1].active_uuid));
}

#[test]
fn the_folder_of_a_single_disk_may_be_moved() {
    for step in [Step::ChildrenMade, Step::Switched, Step::Flushed] {
        let (host, note, written) = killed_after(1, step);
        let moved = SnapshotNote {
            members: vec![SnapshotMember { folder: "/elsewhere".into(), ..note.members[0].clone() }],
            ..note.clone()
        };
        let state = SnapshotNote::load(&folder(&host, 0), note.members[0].active_uuid).unwrap().unwrap().state;
        SnapshotNote { state, ..moved }.replace(&host, &folder(&host, 0)).unwrap();
        assert!(resolve(&host, 0).unwrap());
        assert_eq!(check(&host, &note, &written, false), Ok(step >= Step::Switched));
    }
}

#[test]
fn damaged_and_outdated_notes() {
    let (host, note, _) = killed_after(1, Step::Flushed);
    let name = folder(&host, 0).path_to(&note.name(0));
    host.open(&name, Access::Write).unwrap().write_at(b"x", 30).unwrap();
    let e = resolve(&host, 0).unwrap_err();
    assert_eq!((e.kind(), e.path()), (ErrorKind::Invalid, Some(&*name)));
    let e = read(&host, &path(0, "disk"), OpenMode::Read).unwrap_err();
    assert_eq!((e.kind(), e.path()), (ErrorKind::Invalid, Some(&*name)));

    // Another child of the same parent has the name now.
    let (host, note, _) = killed_after(1, Step::Named);
    let link = ParentLink {
        uuid: note.members[0].active_uuid,
        modified: 0,
        relative: Some("kept".into()),
        absolute: None,
        name: "kept".into(),
    };
    let other = image::create(&host, &path(0, "other"), &spec(ImageKind::Differencing(link))).unwrap();
    assert!(!resolve_within(&host, &path(0, "other"), &[], false, Duration::ZERO).unwrap(), "not a disk of the note");
    folder(&host, 0).rename("other".as_ref(), &folder(&host, 0), "disk".as_ref()).unwrap();
    assert!(resolve(&host, 0).unwrap());
    assert_eq!((names(&host, 0), uuid_at(&host, &path(0, "disk"))), (vec!["disk".into(), "kept".into()], Some(other)));
}

#[test]
fn another_file_with_the_kept_name_is_refused() {
    let (host, note, written) = killed_after(1, Step::Flushed);
    folder(&host, 0).create("kept".as_ref()).unwrap();
    let e = resolve(&host, 0).unwrap_err();
    assert_eq!((e.kind(), e.path()), (ErrorKind::Refused, Some(&*path(0, "kept"))), "{e}");
    host.remove(&path(0, "kept")).unwrap();
    assert!(resolve(&host, 0).unwrap());
    assert_eq!(check(&host, &note, &written, false), Ok(true));
}

#[test]
fn a_second_note_of_the_same_image_is_refused() {
    let (host, note, _) = killed_after(1, Step::Noted);
    let e = note.write_new(&host, &folder(&host, 0), 0).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Refused);
    assert!(e.line().contains("/a/disk"), "{e}");
}

#[test]
fn images_of_unfinished_snapshots_are_refused_and_shown() {
    let kind = |host: &SimHost, name: &str, mode| read(host, &path(0, name), mode).map_err(|e| e.kind()).err();
    for (step, state) in [(Step::ChildrenMade, "begun"), (Step::Committed, "switched"), (Step::Flushed, "decided")] {
        let (host, _, _) = killed_after(1, step);
        // The live journal of the active image would be a reason of its own.
        image::discard_session(&host, &runtime(&host), &path(0, "disk")).unwrap();
        let folder = folder(&host, 0);
        for name in ["kept", "copy"] {
            folder.link("disk".as_ref(), name.as_ref()).unwrap();
        }
        let refused = Some(ErrorKind::Refused);
        let expected = match state {
            "begun" => [None, None, refused, refused, None, None],
            "switched" => [refused; 6],
            _ => [refused, refused, None, refused, None, refused],
        };
        let modes = [OpenMode::Read, OpenMode::Write];
        let all = ["disk", "kept", "copy"].map(|name| modes.map(|mode| kind(&host, name, mode)));
        assert_eq!(all.concat(), expected, "{state}");
        for name in ["disk", "kept", "copy"] {
            let image = Image::open(host.open(&path(0, name), Access::Read).unwrap()).unwrap();
            let shown = unfinished_snapshot(&host, &image).unwrap().unwrap();
            assert_eq!((shown.state, shown.active, shown.kept), (state, path(0, "disk"), path(0, "kept")));
        }
    }
    let (host, _, _) = killed_after(2, Step::Flushed);
    assert!(resolve(&host, 0).unwrap());
    for mode in [OpenMode::Read, OpenMode::Write] {
        assert_eq!(kind(&host, "kept", mode), None, "the note only waits for the other disk");
    }
}

#[test]
fn a_disk_without_a_note_is_left_alone() {
    let (host, _) = setup(1);
    assert!(!resolve(&host, 0).unwrap());
    assert!(!resolve_within(&host, &path(0, "missing"), &[], false, Duration::ZERO).unwrap());
    folder(&host, 0).create("text".as_ref()).unwrap();
    assert!(!resolve_within(&host, &path(0, "text"), &[], false, Duration::ZERO).unwrap());
}

#[test]
fn a_decided_snapshot_is_finished_on_a_real_host() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().canonicalize().unwrap();
    let active_uuid = image::create(&Host, &home.join("disk"), &spec(ImageKind::Dynamic)).unwrap();
    let link = ParentLink {
        uuid: active_uuid,
        modified: 0,
        relative: Some("a kept one".into()),
        absolute: None,
        name: "a kept one".into(),
    };
    let child_uuid = image::create(&Host, &home.join("new"), &spec(ImageKind::Differencing(link))).unwrap();
    let (active, kept, child) = ("disk".into(), "a kept one".into(), "new".into());
    let member = SnapshotMember { folder: home.clone(), active, kept, child, active_uuid, child_uuid };
    let note = SnapshotNote { group: Uuid::from_u128(7), members: vec![member], state: SnapshotState::Begun };
    let folder = Host.folder(&home).unwrap();
    note.write_new(&Host, &folder, 0).unwrap();
    assert_eq!(note.write_new(&Host, &folder, 0).unwrap_err().kind(), ErrorKind::Refused);
    let boot = Host.origin().unwrap().boot;
    let switched = SnapshotNote { state: SnapshotState::Switched { boot, has_journal: true }, ..note };
    switched.prepare(&Host, &folder).unwrap();
    switched.switch(&folder).unwrap();
    let e = Chain::open(&Host, &home.join("disk"), &Policy::default(), OpenMode::Read).unwrap_err();
    assert!(e.kind() == ErrorKind::Refused && e.line().contains("diffdisk settle"), "{e}");
    std::os::unix::fs::symlink("disk", home.join("link")).unwrap();
    assert!(resolve_snapshot(&Host, &home.join("link"), &[], false).unwrap());
    assert!(!resolve_snapshot(&Host, &home.join("link"), &[], false).unwrap());
    let chain = Chain::open(&Host, &home.join("disk"), &Policy::default(), OpenMode::Write).unwrap();
    let uuids: Vec<Uuid> = chain.images().iter().map(Image::uuid).collect();
    assert_eq!(uuids, [child_uuid, active_uuid]);
    let mut names: Vec<_> = std::fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a kept one", "disk", "link"]);
}
