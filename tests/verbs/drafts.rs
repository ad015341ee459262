//! Verbs that make a new file leave no incomplete file: after kills at every failpoint and every step, and after power
//! cuts.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use diffdisk::chain::Policy;
use diffdisk::error::Result;
use diffdisk::ops::convert::{Conversion, TargetFormat};
use diffdisk::ops::create::{ChildSpec, Locators, RootSpec};
use diffdisk::ops::{self, SourceDisk, SourceFormat};
use diffdisk::storage::Env;
use diffdisk::storage::host::Host;
use diffdisk::storage::sim::{Fault, FaultPlan, Random, SimHost};
use diffdisk::units::BlockSize;

use crate::common::temp::{is_temporary, scratch};
use crate::common::tool::{diffdisk, lock_spawns};
use crate::failpoints;
use crate::fixture::{Fill, Fixture};
use crate::sweep::FOLDER;

/// Returns the names in a folder.
fn names(folder: &Path) -> BTreeSet<OsString> {
    fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").file_name()).collect()
}

/// Command lines that make `new.vhd`, with `{}` for the folder, and whether they replace an existing file.
const MAKERS: [(&str, bool); 7] = [
    ("create {}/new.vhd --size 8M", false),
    ("create {}/new.vhd --size 1M --type fixed", false),
    ("create {}/new.vhd --parent {}/root.vhd", false),
    ("convert {}/root.vhd {}/new.vhd --to dynamic", false),
    ("convert {}/root.vhd {}/new.vhd --to fixed", false),
    ("convert {}/root.vhd {}/new.vhd --to dynamic --keep-uuid --force", true),
    ("convert {}/root.vhd {}/new.vhd --to fixed --force", true),
];

#[test]
fn a_kill_leaves_no_incomplete_file() {
    let folder = scratch("drafts");
    let at = |name: &str| folder.path().join(name);
    if Host.folder(folder.path()).and_then(|f| f.create_unnamed("probe".as_ref())).is_err() {
        eprintln!("skipped: {} is on a file system without unnamed files", folder.path().display());
        return;
    }
    let fixture = Fixture::new(&Host, folder.path());
    {
        let _lock = lock_spawns();
        fixture.dynamic("root.vhd", 4096, 1000);
        fixture.write("root.vhd", &[(0, 9, Fill::Tag("T")), (500, 1000, Fill::Tag("T"))]);
    }
    let here = folder.path().display().to_string();
    let (mut killed, mut kept) = (0, 0);
    for (line, replaces) in MAKERS {
        let args: Vec<String> = line.split(' ').map(|word| word.replace("{}", &here)).collect();
        for point in failpoints::of("draft").into_iter().chain(failpoints::of("convert")) {
            if replaces {
                fixture.dynamic("new.vhd", 4096, 8);
            }
            let (before, old) = (names(folder.path()), fs::read(at("new.vhd")).ok());
            if failpoints::killed(&point, 1, &args) {
                killed += 1;
                let after = names(folder.path());
                let more: Vec<_> = after.difference(&before).map(PathBuf::from).collect();
                match point.as_str() {
                    "draft.named" => assert_eq!(more, [PathBuf::from("new.vhd")], "{line}"),
                    "draft.replaced" => assert!(more.is_empty(), "{line}: {more:?}"),
                    // This is the only failpoint at which a complete copy has a temporary name.
                    "draft.named-to-replace" => {
                        assert!(more.len() == 1 && is_temporary(&more[0]), "{line}: {more:?}");
                        fs::remove_file(folder.path().join(&more[0])).expect("it is there");
                        kept += 1;
                    }
                    _ => assert!(more.is_empty(), "{line}: killed at {point}: {more:?}"),
                }
                let whole = ["draft.named", "draft.replaced"].contains(&point.as_str());
                assert!(whole || fs::read(at("new.vhd")).ok() == old, "{line}: the old file, at {point}");
                if whole {
                    diffdisk(["check", &at("new.vhd").display().to_string(), "--chain"]).ok();
                }
            }
            let _ = fs::remove_file(at("new.vhd"));
            assert_eq!(names(folder.path()).len(), 1, "{line}: {point}");
        }
    }
    println!("{killed} kills, of which {kept} left a temporary name");
    assert!(killed >= 7 * 2 + 4, "{killed}");
}

/// An undo file gets its name only when it is complete.
#[test]
fn a_killed_repair_leaves_no_part_of_an_undo_file() {
    let folder = scratch("drafts");
    let fixture = Fixture::new(&Host, folder.path());
    fixture.dynamic("i.vhd", 4096, 100);
    let path = folder.path().join("i.vhd");
    let mut bytes = fs::read(&path).expect("the image");
    bytes[..512].fill(0);
    fs::write(&path, bytes).expect("the image is damaged");
    let args = ["check".to_owned(), path.display().to_string(), "--repair".to_owned()];
    assert!(failpoints::killed("draft.whole", 1, &args));
    assert_eq!(names(folder.path()).len(), 1);
    assert!(failpoints::killed("draft.named", 1, &args));
    assert_eq!(names(folder.path()).len(), 2, "the image and a complete undo file");
    diffdisk(&args).ok();
}

type Maker = fn(&dyn Env, &Path) -> Result<()>;

fn create_root(env: &dyn Env, folder: &Path) -> Result<()> {
    let block_size = BlockSize::from_bytes(4096).expect("a block size");
    let root = RootSpec { fixed: false, size: 100 * 512, block_size, reserve: 0, preallocate: false };
    ops::create::root(env, &folder.join("new.vhd"), &root).map(drop)
}

fn create_child(env: &dyn Env, folder: &Path) -> Result<()> {
    let child = ChildSpec {
        parent: folder.join("root.vhd"),
        size: None,
        block_size: None,
        reserve: 0,
        locators: Locators::Both,
        preallocate: false,
    };
    ops::create::child(env, &folder.join("new.vhd"), &child, &Policy::default()).map(drop)
}

fn copy(env: &dyn Env, folder: &Path, to: TargetFormat, replace: bool) -> Result<()> {
    let disk = SourceDisk::open(env, &folder.join("root.vhd"), SourceFormat::Vhd, &Policy::default())?;
    let how = Conversion { to, align: 1, replace, uuid: None };
    ops::convert::convert(env, &disk, &folder.join("new.vhd"), &how, &mut |_| Ok(()))
}

fn convert(env: &dyn Env, folder: &Path) -> Result<()> {
    copy(env, folder, TargetFormat::Dynamic(BlockSize::from_bytes(4096).expect("a block size")), false)
}

fn convert_over(env: &dyn Env, folder: &Path) -> Result<()> {
    copy(env, folder, TargetFormat::Fixed, true)
}

fn setup(replaces: bool) -> SimHost {
    let host = SimHost::new(5);
    let fixture = Fixture::new(&host, Path::new(FOLDER));
    fixture.dynamic("root.vhd", 4096, 100);
    fixture.write("root.vhd", &[(0, 3, Fill::Tag("T")), (50, 60, Fill::Tag("T"))]);
    if replaces {
        fixture.dynamic("new.vhd", 4096, 9);
    }
    host.crash_with(&|_| true)
}

/// Checks that `new.vhd` is missing, the old file, or the complete new file; it may be missing only if no file is
/// replaced. Returns whether a file with a temporary name is left.
#[track_caller]
fn check_files(host: &SimHost, wanted: &[u8], replaces: bool, when: &str) -> bool {
    let (temporary, names): (Vec<_>, Vec<_>) = host.names().into_iter().partition(|name| is_temporary(name));
    let there = names.iter().any(|name| name.ends_with("new.vhd"));
    assert!(there || !replaces, "{when}: the old file is missing");
    if there {
        let seen = Fixture::new(host, Path::new(FOLDER))
            .read_disk("new.vhd")
            .unwrap_or_else(|e| panic!("{when}: {}", e.line()));
        assert!(seen == wanted || (replaces && seen == [0; 9 * 512]), "{when}: neither the old file nor the new one");
    }
    assert_eq!(names.len(), 1 + usize::from(there), "{when}: {names:?}");
    assert!(temporary.len() <= 1, "{when}: {temporary:?}");
    !temporary.is_empty()
}

#[test]
fn a_file_gets_its_name_when_it_is_complete() {
    let makers: [(&str, Maker, bool); 4] = [
        ("create", create_root, false),
        ("create --parent", create_child, false),
        ("convert", convert, false),
        ("convert --force", convert_over, true),
    ];
    for (name, make, replaces) in makers {
        for no_unnamed in [false, true] {
            let begin = || {
                let host = setup(replaces);
                host.set_faults(FaultPlan { no_unnamed, ..FaultPlan::default() });
                host
            };
            let host = begin();
            let before = host.counts().steps;
            host.start_recording();
            make(&host, Path::new(FOLDER)).expect("it works");
            let steps = host.counts().steps - before;
            let wanted = Fixture::new(&host, Path::new(FOLDER)).read_disk("new.vhd").expect("it opens");
            assert!(!check_files(&host, &wanted, replaces, name));
            let (mut random, mut cuts) = (Random::new(17), 0);
            for (number, moment) in host.take_recording().into_iter().enumerate() {
                for fate in 0..10 {
                    let bits =
                        [0, u64::MAX].get(fate).copied().unwrap_or_else(|| random.next_u64() | random.next_u64());
                    let after = moment.crash_with(&|unit| bits >> (unit % 61) & 1 == 1);
                    let left =
                        check_files(&after, &wanted, replaces, &format!("{name}: power cut before change {number}"));
                    assert!(!left || no_unnamed || replaces, "{name}: power cut before change {number}");
                    cuts += 1;
                }
            }
            let mut left = 0;
            for step in 1..=steps {
                let host = begin();
                host.stop_at(host.counts().steps + step);
                let _ = make(&host, Path::new(FOLDER));
                let after = host.kill(&mut random);
                left += usize::from(check_files(&after, &wanted, replaces, &format!("{name}: killed at step {step}")));
            }
            // When a file is replaced, the complete copy has a temporary name between two system calls.
            assert!(no_unnamed || left <= usize::from(replaces), "{name}: a temporary name was left {left} times");
            for step in 1..=steps {
                let host = begin();
                let fail = vec![(host.counts().steps + step, Fault::Io)];
                host.set_faults(FaultPlan { no_unnamed, fail, ..FaultPlan::default() });
                let outcome = make(&host, Path::new(FOLDER));
                let when = format!("{name}: step {step} failed: {outcome:?}");
                assert!(!check_files(&host, &wanted, replaces, &when) || no_unnamed, "{when}");
            }
            println!(
                "{name}, no_unnamed {no_unnamed}: {steps} steps, {cuts} power cuts, a temporary name left by {left} kills"
            );
        }
    }
}
