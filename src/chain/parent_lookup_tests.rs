//! Tests of `parent_lookup.rs`: which file is the parent, and the error if none is.

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

/// Two folders of virtual machines and one of golden images in a temporary folder whose path has no symbolic link.
struct LookupFolders {
    chains: ChainFolder,
    root: PathBuf,
}

impl LookupFolders {
    fn new() -> LookupFolders {
        let chains = ChainFolder::new();
        let root = chains.folder().canonicalize().unwrap();
        for folder in ["gold", "vm", "other"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        LookupFolders { chains, root }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Creates a child at `path` of the image at `parent` that records these paths.
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
    let e = outcome.expect_err("the open must be refused");
    assert_eq!(e.kind(), ErrorKind::Refused, "{e}");
    words.iter().for_each(|word| assert!(e.line().contains(word), "{word}: {e}"));
}

#[test]
fn a_diverged_copy_is_not_used_as_parent() {
    let place = LookupFolders::new();
    place.chains.dynamic("gold/base.vhd", BLOCK, 100);
    // A diverged copy: the same name, the same UUID.
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
    // A recorded path leads to another image, so no search by name follows.
    fs::remove_file(&gold).unwrap();
    place.chains.dynamic("gold/base.vhd", BLOCK, 100);
    let e = place.open("vm/both", &["gold"]).unwrap_err();
    assert!(e.kind() == ErrorKind::Invalid && e.line().contains("UUID"), "{e}");
    // No recorded path leads to a file: now the search by name finds the copy.
    fs::remove_file(&gold).unwrap();
    for child in ["vm/both", "vm/relative", "vm/absolute"] {
        assert_eq!(place.open(child, &[]).unwrap(), "vm/base.vhd", "{child}");
    }
}

#[test]
fn a_parent_may_be_behind_symbolic_links() {
    let place = LookupFolders::new();
    place.chains.dynamic("gold/base.vhd", BLOCK, 100);
    place.copy("gold/base.vhd", "vm/base.vhd");
    std::os::unix::fs::symlink(place.at("gold"), place.at("link")).unwrap();
    place.child("vm/c", "gold/base.vhd", None, Some(&place.at("link/base.vhd")), "base.vhd");
    refused(place.open("vm/c", &[]), &["may be", "link/base.vhd", "symbolic link"]);
    // A symbolic link in a recorded path below the folder is not followed, and no other file is used by its name.
    std::os::unix::fs::symlink("../gold", place.at("vm/way")).unwrap();
    place.child("vm/d", "gold/base.vhd", Some("way/base.vhd"), None, "base.vhd");
    refused(place.open("vm/d", &[]), &["symbolic link"]);
    // File systems of the kernel are not searched, and their files do not count as the parent.
    for kernel in ["/proc/self/exe", "/sys/kernel/base.vhd", "/dev/base.vhd"] {
        let child = format!("vm/{}", &kernel[1..4]);
        place.child(&child, "gold/base.vhd", None, Some(Path::new(kernel)), "base.vhd");
        assert_eq!(place.open(&child, &[]).unwrap(), "vm/base.vhd", "{kernel}");
    }
}

#[test]
fn names_are_searched_in_allowed_folders() {
    let place = LookupFolders::new();
    place.chains.dynamic("gold/base.vhd", BLOCK, 100);
    place.chains.dynamic("other/base.vhd", BLOCK, 100);
    place.child("vm/c", "gold/base.vhd", Some("gone/base.vhd"), None, "base.vhd");
    let e = place.open("vm/c", &[]).unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.line().contains("rebase --unsafe"), "{e}");
    assert_eq!(place.open("vm/c", &["gold"]).unwrap(), "gold/base.vhd");
    // An image of the same name with another UUID is skipped; one with the same UUID is ambiguous.
    assert_eq!(place.open("vm/c", &["other", "gold"]).unwrap(), "gold/base.vhd");
    assert_eq!(
        place.open("vm/c", &["gold", "gold"]).unwrap(),
        "gold/base.vhd",
        "one file in a folder that is allowed twice"
    );
    place.copy("gold/base.vhd", "vm/base.vhd");
    refused(place.open("vm/c", &["gold"]), &["vm/base.vhd", "gold/base.vhd", "rebase --unsafe"]);
    assert_eq!(place.open("vm/c", &[]).unwrap(), "vm/base.vhd");
}

#[test]
fn paths_of_windows_ignore_case() {
    let place = LookupFolders::new();
    place.chains.dynamic("gold/Base.VHD", BLOCK, 100);
    place.child("vm/c", "gold/Base.VHD", Some("../GOLD/base.vhd"), None, "BASE.vhd");
    // Paths outside the allowed folders are case-sensitive.
    assert_eq!(place.open("vm/c", &[]).unwrap_err().kind(), ErrorKind::NotFound);
    // The search by name finds it: the path of an allowed folder itself is case-sensitive.
    assert_eq!(place.open("vm/c", &["gold"]).unwrap(), "gold/Base.VHD");
    assert_eq!(place.open("vm/c", &["."]).unwrap(), "gold/Base.VHD", "each component of the path ignores case");
    place.copy("gold/Base.VHD", "gold/BASE.vhd");
    place.copy("gold/Base.VHD", "gold/base.VHD");
    let e = place.open("vm/c", &["."]).unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.line().contains("in case alone"), "{e}");
}

#[test]
fn an_image_with_another_uuid_is_not_the_parent() {
    let chains = ChainFolder::new();
    chains.dynamic("stranger", BLOCK, 100);
    chains.dynamic("parent", BLOCK, 100);
    let own = chains.folder().file_name().unwrap().to_str().unwrap().to_owned();
    chains.child_by("both", "parent", ["stranger", &format!("../{own}/parent")], BLOCK, 100);
    let chain = chains.chain("both", OpenMode::Inspect).unwrap();
    assert_eq!(chain.images()[1].file().path().file_name().unwrap(), "parent", "the next path is tried");
    chains.child_by("wrong", "parent", ["stranger", "parent"], BLOCK, 100);
    let e = chains.chain("wrong", OpenMode::Inspect).unwrap_err();
    assert!(e.kind() == ErrorKind::Invalid && e.line().contains("UUID"), "the name is not tried: {e}");
    chains.child_by("lost", "parent", ["gone", "../nowhere"], BLOCK, 100);
    let e = chains.chain("lost", OpenMode::Inspect).unwrap_err();
    let line = e.line();
    assert!(e.kind() == ErrorKind::NotFound && line.contains("gone (not there)"), "{line}");
    assert!(line.contains("nowhere (not there)") && line.contains("--allow-parents"), "{line}");
}
