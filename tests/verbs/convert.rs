//! `convert` as a program: names of standard output, UUIDs of copies, messages.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use diffdisk::storage::host::Host;

use crate::common::temp::scratch;
use crate::common::tool::{DIFFDISK, diffdisk, lock_spawns, run, start};
use crate::fixture::{Fill, Fixture};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Makes a folder with a root of 100 sectors and its child.
fn chain() -> tempfile::TempDir {
    let folder = scratch("convert");
    let _lock = lock_spawns();
    let fixture = Fixture::new(&Host, folder.path());
    fixture.dynamic("root.vhd", 4096, 100);
    fixture.write("root.vhd", &[(0, 3, Fill::Tag("T")), (50, 60, Fill::Tag("T"))]);
    fixture.child("child.vhd", "root.vhd", 4096);
    folder
}

#[test]
fn every_name_of_standard_output_works() {
    let folder = chain();
    let child = text(&folder.path().join("child.vhd"));
    let wanted = diffdisk(["convert", &child, "-", "--to", "raw"]).ok().stdout;
    assert_eq!(wanted.len(), 100 * 512);
    for name in ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
        assert!(diffdisk(["convert", &child, name, "--to", "raw"]).ok().stdout == wanted, "{name} as a pipe");
        assert!(diffdisk(["convert", &child, name, "--to", "raw", "--force"]).ok().stdout == wanted, "{name}");
        let out = folder.path().join("out");
        let to = fs::File::create(&out).expect("a file");
        let mut command = Command::new(DIFFDISK);
        let mut started = start(command.args(["convert", &child, name, "--to", "raw"]).stdout(to)).expect("it runs");
        assert!(started.wait().expect("it ends").success());
        assert!(fs::read(&out).expect("its output") == wanted, "{name} as a file");
        let failed = diffdisk(["convert", &child, name, "--to", "fixed"]);
        assert!(failed.code == Some(1) && failed.stderr.contains("only --to raw"), "{}", failed.stderr);
    }
}

#[test]
fn a_copy_keeps_the_uuid_if_that_is_asked_for() {
    let folder = chain();
    let [root, child, copy] = ["root.vhd", "child.vhd", "copy.vhd"].map(|name| text(&folder.path().join(name)));
    let uuid = |path: &str| diffdisk(["info", path, "--json"]).ok().json()["uuid"].clone();
    for to in ["dynamic", "fixed"] {
        let done = diffdisk(["convert", &child, &copy, "--to", to, "--keep-uuid", "--force"]).ok();
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
        assert!(done.stderr.contains("has the UUID of") && done.stderr.contains("Keep only one"), "{}", done.stderr);
        assert_eq!((uuid(&copy) == uuid(&child), uuid(&copy) == uuid(&root)), (true, false));
        diffdisk(["check", &copy]).ok();
        diffdisk(["compare", &copy, &child]).ok();
    }
    let done = diffdisk(["convert", &child, &copy, "--to", "dynamic", "--force"]).ok();
    assert!(done.stderr.is_empty() && uuid(&copy) != uuid(&child));
    for args in [["--to", "raw", "--from", "vhd"], ["--to", "fixed", "--from", "raw"]] {
        let failed = diffdisk([&["convert", &child, "-", "--keep-uuid"], &args[..]].concat());
        assert_eq!(failed.code, Some(1));
    }
    let failed = diffdisk(["convert", &child, &copy, "--to", "raw", "--keep-uuid", "--force"]);
    assert!(failed.code == Some(1) && failed.stderr.contains("only an image has a UUID"), "{}", failed.stderr);
}

/// A message about a number from the command line names no offset in a file.
#[test]
fn messages_name_an_offset_only_for_fields_of_a_file() {
    let folder = chain();
    let root = text(&folder.path().join("root.vhd"));
    let (new, empty) = (text(&folder.path().join("new.vhd")), text(&folder.path().join("empty.raw")));
    fs::write(&empty, []).expect("a file");
    let lines: [&[&str]; 7] = [
        &["create", &new, "--size", "2041G"],
        &["create", &new, "--size", "1000"],
        &["create", &new, "--size", "1T", "--block-size", "4K"],
        &["create", &new, "--size", "2041G", "--type", "fixed"],
        &["convert", &empty, &new, "--from", "raw", "--to", "dynamic"],
        &["resize", &root, "1000"],
        &["resize", &root, "1T"],
    ];
    for line in lines {
        let failed = run(Command::new(DIFFDISK).args(line), Duration::from_secs(60));
        assert_eq!(failed.code, Some(1), "{line:?}");
        assert!(!failed.stderr.contains("at byte"), "{}", failed.stderr);
    }
    // A message about a field of an image names its offset.
    let mut image = fs::read(&root).expect("the image");
    image[512..520].fill(7);
    fs::write(&new, image).expect("a damaged copy");
    let failed = diffdisk(["info", &new]);
    assert!(failed.stderr.contains("(at byte 512)"), "{}", failed.stderr);
}
