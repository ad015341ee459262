//! Tests of `parent_lookup.rs`: which file is the parent, and which of three messages tells that none is.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::testing::ChainFolder;
use super::super::{Chain, OpenMode, Policy};
use crate::error::{Error, ErrorKind};
use crate::image::{self, Image, ImageKind, ImageSpec, ParentLink};
use crate::storage::host::Host;
use crate::storage::{Access, Env};
use crate::units::{BlockSize, SECTOR};

const BLOCK: u32 = 2 << 20;

/// Two folders of machines and one of golden images in one temporary folder, whose path has no link.
struct LookupFolders {
    rig: ChainFolder,
    root: PathBuf,
}

impl LookupFolders {
    fn new() -> LookupFolders {
        let rig = ChainFolder::new();
        let root = rig.folder().canonicalize().unwrap();
        for folder in ["gold", "vm", "other"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        LookupFolders { rig, root }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A child at `path` of the image at `parent`, which records these.
    fn child(&self, path: &str, parent: &str, relative: Option<&str>, absolute: Option<&Path>, name: &str) {
        let uuid = Image::open(Host.open(&self.at(parent), Access::Read).unwrap()).unwrap().uuid();
        let (relative, absolute) = (relative.map(Into::into), absolute.map(Path::to_path_buf));
        let link = ParentLink { uuid, modified: 0, relative, absolute, name: name.into() };
        let block_size = BlockSize::from_bytes(BLOCK).unwrap();
        let spec = ImageSpec { kind: ImageKind::Differencing(link), size: 100 * SECTOR, block_size, reserve: 0 };
        image::create(&Host, &self.at(path), &spec).unwrap();
    }

    fn open(&self, child: &str, allowed: &[&str]) -> Result<String, Error> {
        let allowed = allowed.iter().map(|folder| self.at(folder)).collect();
        let chain = Chain::open(&Host, &self.at(child), &Policy { allowed, ..Policy::default() }, OpenMode::Inspect)?;
        let parent = chain.images()[1].file().path();
        Ok(parent.strip_prefix(&self.root).expect("below the folder").display().to_string())
    }

    fn copy(&self, from: &str, to: &str) {
        fs::copy(self.at(from), self.at(to)).unwrap();
    }
}

fn refused(outcome: Result<String, Error>, words: &[&str]) {
    let e = outcome.expect_err("it must be refused");
    assert_eq!(e.kind(), ErrorKind::Refused, "{e}");
    words.iter().for_each(|word| assert!(e.line().contains(word), "{word}: {e}"));
}

#[test]
fn no_twin_is_taken_for_the_parent() {
    let place = LookupFolders::new();
    place.rig.dynamic("gold/base.vhd", BLOCK, 100);
    // A copy that went its own way: same name, same UUID.
    place.copy("gold/base.vhd", "vm/base.vhd");
    let gold = place.at("gold/base.vhd");
    for (child, relative, absolute, name) in [
        ("vm/both", Some("../gold/base.vhd"), Some(gold.as_path()), "../gold/base.vhd"),
        ("vm/relative", Some("../gold/base.vhd"), None, "../gold/base.vhd"),
        ("vm/absolute", None, Some(gold.as_path()), "base.vhd"),
    ] {
        place.child(child, "gold/base.vhd", relative, absolute, name);
        let folder = format!("--allow-parents {}", place.at("gold").display());
        refused(place.open(child, &[]), &[&gold.display().to_string(), &folder, "rebase --unsafe"]);
        assert_eq!(place.open(child, &["gold"]).unwrap(), "gold/base.vhd", "{child}");
    }
    // A recorded path that is there and another image: the name is no way round it.
    fs::remove_file(&gold).unwrap();
    place.rig.dynamic("gold/base.vhd", BLOCK, 100);
    let e = place.open("vm/both", &["gold"]).unwrap_err();
    assert!(e.kind() == ErrorKind::Invalid && e.line().contains("UUID"), "{e}");
    // No recorded path is there: now the name is what is left.
    fs::remove_file(&gold).unwrap();
    for child in ["vm/both", "vm/relative", "vm/absolute"] {
        assert_eq!(place.open(child, &[]).unwrap(), "vm/base.vhd", "{child}");
    }
}

#[test]
fn links_on_the_way_and_closed_folders_may_hide_the_parent() {
    let place = LookupFolders::new();
    place.rig.dynamic("gold/base.vhd", BLOCK, 100);
    place.copy("gold/base.vhd", "vm/base.vhd");
    std::os::unix::fs::symlink(place.at("gold"), place.at("link")).unwrap();
    place.child("vm/c", "gold/base.vhd", None, Some(&place.at("link/base.vhd")), "base.vhd");
    refused(place.open("vm/c", &[]), &["may be", "link/base.vhd", "symbolic link"]);
    // A link at a recorded path below the folder: not followed, and no reason to take another file by its name.
    std::os::unix::fs::symlink("../gold", place.at("vm/way")).unwrap();
    place.child("vm/d", "gold/base.vhd", Some("way/base.vhd"), None, "base.vhd");
    refused(place.open("vm/d", &[]), &["symbolic link"]);
    // The kernel's own folders are not looked into, and hide nothing.
    for kernel in ["/proc/self/exe", "/sys/kernel/base.vhd", "/dev/base.vhd"] {
        let child = format!("vm/{}", &kernel[1..4]);
        place.child(&child, "gold/base.vhd", None, Some(Path::new(kernel)), "base.vhd");
        assert_eq!(place.open(&child, &[]).unwrap(), "vm/base.vhd", "{kernel}");
    }
}

#[test]
fn names_are_looked_for_in_allowed_folders() {
    let place = LookupFolders::new();
    place.rig.dynamic("gold/base.vhd", BLOCK, 100);
    place.rig.dynamic("other/base.vhd", BLOCK, 100);
    place.child("vm/c", "gold/base.vhd", Some("gone/base.vhd"), None, "base.vhd");
    let e = place.open("vm/c", &[]).unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.line().contains("rebase --unsafe"), "{e}");
    assert_eq!(place.open("vm/c", &["gold"]).unwrap(), "gold/base.vhd");
    // An image of the name with another UUID is passed over, one with the same UUID is not.
    assert_eq!(place.open("vm/c", &["other", "gold"]).unwrap(), "gold/base.vhd");
    assert_eq!(place.open("vm/c", &["gold", "gold"]).unwrap(), "gold/base.vhd", "one file, however often");
    place.copy("gold/base.vhd", "vm/base.vhd");
    refused(place.open("vm/c", &["gold"]), &["vm/base.vhd", "gold/base.vhd", "rebase --unsafe"]);
    assert_eq!(place.open("vm/c", &[]).unwrap(), "vm/base.vhd");
}

#[test]
fn paths_of_windows_match_without_regard_to_case() {
    let place = LookupFolders::new();
    place.rig.dynamic("gold/Base.VHD", BLOCK, 100);
    place.child("vm/c", "gold/Base.VHD", Some("../GOLD/base.vhd"), None, "BASE.vhd");
    // Paths of folders that are not allowed are compared as they are.
    assert_eq!(place.open("vm/c", &[]).unwrap_err().kind(), ErrorKind::NotFound);
    // The name is what finds it here: the allowed folder's own path is the operator's.
    assert_eq!(place.open("vm/c", &["gold"]).unwrap(), "gold/Base.VHD");
    assert_eq!(place.open("vm/c", &["."]).unwrap(), "gold/Base.VHD", "by each component of the path");
    place.copy("gold/Base.VHD", "gold/BASE.vhd");
    place.copy("gold/Base.VHD", "gold/base.VHD");
    let e = place.open("vm/c", &["."]).unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.line().contains("in case alone"), "{e}");
}

#[test]
fn another_image_is_not_the_parent() {
    let rig = ChainFolder::new();
    rig.dynamic("stranger", BLOCK, 100);
    rig.dynamic("parent", BLOCK, 100);
    let own = rig.folder().file_name().unwrap().to_str().unwrap().to_owned();
    rig.child_by("both", "parent", ["stranger", &format!("../{own}/parent")], BLOCK, 100);
    let chain = rig.chain("both", OpenMode::Inspect).unwrap();
    assert_eq!(chain.images()[1].file().path().file_name().unwrap(), "parent", "the next path is tried");
    rig.child_by("wrong", "parent", ["stranger", "parent"], BLOCK, 100);
    let e = rig.chain("wrong", OpenMode::Inspect).unwrap_err();
    assert!(e.kind() == ErrorKind::Invalid && e.line().contains("UUID"), "the name is not: {e}");
    rig.child_by("lost", "parent", ["gone", "../nowhere"], BLOCK, 100);
    let e = rig.chain("lost", OpenMode::Inspect).unwrap_err();
    let line = e.line();
    assert!(e.kind() == ErrorKind::NotFound && line.contains("gone (not there)"), "{line}");
    assert!(line.contains("nowhere (not there)") && line.contains("--allow-parents"), "{line}");
}
