//! `resize`: growing and shrinking, with room for the BAT in different places, and over different parents.

use std::path::Path;

use diffdisk::chain::Policy;
use diffdisk::error::{ErrorKind, Result};
use diffdisk::ops;
use diffdisk::storage::Env;
use diffdisk::storage::sim::SimHost;

use crate::fixture::{Fill, Fixture, disk};
use crate::kill_cases::{KillCase, kill_at_every_point};
use crate::sweep::{FOLDER, SweepCase};

const T: Fill<'static> = Fill::Tag("T");
const P: Fill<'static> = Fill::Tag("P");
const Z: Fill<'static> = Fill::Zeros;
const SMALL: u32 = 4096;

fn resized(sectors: u64, shrink: bool) -> impl Fn(&dyn Env, &Path) -> Result<()> {
    move |env, folder| {
        let path = folder.join("i.vhd");
        ops::resize::resize(env, &path, sectors * 512, shrink, &Policy::default(), &mut |_| Ok(())).map(drop)
    }
}

/// Makes a dynamic root and its child. The 100 sectors of the root end in the middle of a block.
fn dynamic(fixture: &Fixture<'_>) {
    fixture.dynamic("i.vhd", SMALL, 100);
    fixture.write("i.vhd", &[(0, 3, T), (50, 60, T), (97, 100, T)]);
    fixture.child("k.vhd", "i.vhd", SMALL);
    fixture.write("k.vhd", &[(98, 99, P)]);
}

const DYNAMIC: [(u64, u64, Fill<'_>); 3] = [(0, 3, T), (50, 60, T), (97, 100, T)];

fn grown(name: &str, sectors: u64) -> SweepCase<'_> {
    let verb: &'static dyn Fn(&dyn Env, &Path) -> Result<()> = Box::leak(Box::new(resized(sectors, false)));
    let child = disk(100, &[&DYNAMIC[..], &[(98, 99, P)]].concat());
    let shows = vec![("i.vhd", disk(100, &DYNAMIC), disk(sectors, &DYNAMIC)), ("k.vhd", child.clone(), child)];
    SweepCase { name, setup: &dynamic, verb, expected: shows, lengths_follow_data: false }
}

#[test]
fn a_dynamic_root_grows_within_its_bat() {
    grown("grow in the last block", 103).sweep();
    grown("grow in the last page of the table", 5_000).sweep();
}

#[test]
fn a_dynamic_root_grows_with_a_new_bat() {
    grown("grow with a new table", 9_000).sweep();
}

/// Makes a child smaller than its parent. The parent has data in the range into which the child grows.
fn smaller_child(fixture: &Fixture<'_>) {
    fixture.dynamic("p.vhd", SMALL, 100);
    fixture.write("p.vhd", &[(0, 20, P), (22, 37, P), (90, 100, P)]);
    fixture.child("i.vhd", "p.vhd", SMALL);
    fixture.write("i.vhd", &[(1, 2, T), (22, 100, Z)]);
    resized(29, true)(fixture.env, &fixture.folder).expect("only zeros are cut off");
}

#[test]
fn a_child_hides_its_larger_parent_when_it_grows() {
    let old = disk(29, &[(0, 20, P), (1, 2, T)]);
    let verb = resized(120, false);
    let shows = vec![("i.vhd", old, disk(120, &[(0, 20, P), (1, 2, T)]))];
    SweepCase {
        name: "grow before the end of the parent",
        setup: &smaller_child,
        verb: &verb,
        expected: shows,
        lengths_follow_data: false,
    }
    .sweep();
    // The last block is not allocated.
    let setup = |fixture: &Fixture<'_>| {
        smaller_child(fixture);
        resized(22, true)(fixture.env, &fixture.folder).expect("only zeros are cut off");
        ops::compact::compact(fixture.env, &fixture.path("i.vhd"), &Policy::default(), &mut |_| Ok(()))
            .expect("it works");
    };
    let shows = vec![("i.vhd", disk(22, &[(0, 20, P), (1, 2, T)]), disk(120, &[(0, 20, P), (1, 2, T)]))];
    SweepCase {
        name: "grow over a block without a place",
        setup: &setup,
        verb: &verb,
        expected: shows,
        lengths_follow_data: false,
    }
    .sweep();
}

#[test]
fn fixed_images_grow_and_shrink() {
    let setup = |fixture: &Fixture<'_>| {
        fixture.fixed("i.vhd", 40);
        fixture.write("i.vhd", &[(0, 3, T), (9, 20, T)]);
    };
    let data = [(0, 3, T), (9, 20, T)];
    for (name, to) in [("fixed, larger by a sector", 41), ("fixed, larger", 300)] {
        let verb = resized(to, false);
        let shows = vec![("i.vhd", disk(40, &data), disk(to, &data))];
        SweepCase { name, setup: &setup, verb: &verb, expected: shows, lengths_follow_data: true }.sweep();
    }
    for (name, to) in [("fixed, smaller by a sector", 39), ("fixed, smaller", 20)] {
        let verb = resized(to, true);
        let shows = vec![("i.vhd", disk(40, &data), disk(to, &data))];
        SweepCase { name, setup: &setup, verb: &verb, expected: shows, lengths_follow_data: true }.sweep();
    }
}

/// Makes a root in whose file the blocks at the end of the disk come first. When a smaller size frees these blocks,
/// other blocks must move.
fn shrinkable(fixture: &Fixture<'_>) {
    fixture.dynamic("i.vhd", SMALL, 100);
    fixture.write("i.vhd", &[(90, 100, Z)]);
    fixture.write("i.vhd", &[(40, 52, Z)]);
    fixture.write("i.vhd", &[(0, 3, T), (8, 24, T)]);
}

#[test]
fn a_dynamic_root_shrinks_and_frees_space() {
    let data = [(0, 3, T), (8, 24, T)];
    let shows = || vec![("i.vhd", disk(100, &data), disk(42, &data))];
    SweepCase {
        name: "shrink",
        setup: &shrinkable,
        verb: &resized(42, true),
        expected: shows(),
        lengths_follow_data: false,
    }
    .sweep();
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    shrinkable(&fixture);
    let len = || host.bytes(&fixture.path("i.vhd")).expect("it is there").len();
    let before = len();
    resized(42, true)(&host, &fixture.folder).expect("only zeros are cut off");
    assert!(len() + 2 * 4096 < before, "{before} bytes, now {}", len());
}

#[test]
fn a_batmap_never_claims_absent_sectors() {
    let setup = |fixture: &Fixture<'_>| {
        shrinkable(fixture);
        crate::xenserver::make(fixture, "i.vhd");
    };
    let data = [(0, 3, T), (8, 24, T)];
    for (name, to, shrink) in [("grow with a batmap", 9_000, false), ("shrink with a batmap", 42, true)] {
        let shows = vec![("i.vhd", disk(100, &data), disk(to, &data))];
        SweepCase { name, setup: &setup, verb: &resized(to, shrink), expected: shows, lengths_follow_data: false }
            .sweep();
    }
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    setup(&fixture);
    assert_eq!(crate::xenserver::whole(&fixture, "i.vhd"), [0, 1, 2, 5, 6, 11, 12]);
    resized(9_000, false)(&host, &fixture.folder).expect("it grows");
    assert_eq!(crate::xenserver::whole(&fixture, "i.vhd"), [0; 0]);
}

#[test]
fn data_is_not_cut_off() {
    let host = SimHost::new(1);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    dynamic(&fixture);
    let path = fixture.path("i.vhd");
    let try_to = |size: u64, shrink| {
        let e = ops::resize::resize(&host, &path, size, shrink, &Policy::default(), &mut |_| Ok(())).unwrap_err();
        (e.kind(), e.line())
    };
    let before = host.bytes(&path);
    let (kind, line) = try_to(55 * 512, true);
    assert!(kind == ErrorKind::Refused && line.contains(&format!("byte {}", 55 * 512)), "{line}");
    let (kind, line) = try_to(98 * 512, false);
    assert!(kind == ErrorKind::Refused && line.contains("--shrink"), "{line}");
    for size in [0, 511, 513, (2040 << 30) + 512] {
        assert_eq!(try_to(size, true).0, ErrorKind::Invalid, "{size}");
    }
    assert_eq!(try_to(2040 << 30, false).0, ErrorKind::Refused, "a BAT of more than 16 MiB");
    assert_eq!(host.bytes(&path), before, "a refused resize changes the image");
}

#[test]
fn killed_at_every_point() {
    let tap = |fixture: &Fixture<'_>| {
        shrinkable(fixture);
        crate::xenserver::make(fixture, "i.vhd");
    };
    let fixed = |fixture: &Fixture<'_>| {
        fixture.fixed("i.vhd", 40);
        fixture.write("i.vhd", &[(0, 3, T)]);
    };
    let data = disk(40, &[(0, 3, T)]);
    let shrunk = [(0, 3, T), (8, 24, T)];
    let acts = [
        KillCase {
            name: "grow",
            setup: &dynamic,
            args: &["resize", "i.vhd", "1M"],
            expected: vec![("i.vhd", disk(100, &DYNAMIC), disk(2048, &DYNAMIC))],
        },
        KillCase {
            name: "grow with a new table",
            setup: &dynamic,
            args: &["resize", "i.vhd", "6M"],
            expected: vec![("i.vhd", disk(100, &DYNAMIC), disk(12288, &DYNAMIC))],
        },
        KillCase {
            name: "shrink",
            setup: &shrinkable,
            args: &["resize", "i.vhd", "21K", "--shrink"],
            expected: vec![("i.vhd", disk(100, &shrunk), disk(42, &shrunk))],
        },
        KillCase {
            name: "shrink with a batmap",
            setup: &tap,
            args: &["resize", "i.vhd", "21K", "--shrink"],
            expected: vec![("i.vhd", disk(100, &shrunk), disk(42, &shrunk))],
        },
        KillCase {
            name: "fixed, larger",
            setup: &fixed,
            args: &["resize", "i.vhd", "30K"],
            expected: vec![("i.vhd", data.clone(), disk(60, &[(0, 3, T)]))],
        },
        KillCase {
            name: "fixed, smaller",
            setup: &fixed,
            args: &["resize", "i.vhd", "2K", "--shrink"],
            expected: vec![("i.vhd", data, disk(4, &[(0, 3, T)]))],
        },
    ];
    kill_at_every_point(&["resize"], &acts);
}
