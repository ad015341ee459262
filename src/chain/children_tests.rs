//! Tests of `children.rs`: children of an image are found by its attribute and by the headers of the files in its
//! folder; children of a copy of the image do not count.

use super::super::OpenMode;
use super::super::testing::ChainFolder;
use super::*;
use crate::storage::host::Host;

const BLOCK: u32 = 2 << 20;

fn found(chains: &ChainFolder, parent: &str) -> Vec<PathBuf> {
    let mut found = children_of(&Host, chains.chain(parent, OpenMode::Inspect).unwrap().youngest()).unwrap();
    found.sort();
    found
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap()
}

#[test]
fn children_are_found_by_headers() {
    let chains = ChainFolder::new();
    chains.dynamic("p", BLOCK, 100);
    chains.dynamic("other", BLOCK, 100);
    std::fs::write(chains.path("text"), "not an image").unwrap();
    assert_eq!(found(&chains, "p"), Vec::<PathBuf>::new());
    chains.child("a", "p", BLOCK, 100);
    chains.child("b", "a", BLOCK, 100);
    assert_eq!(found(&chains, "p"), [canonical(&chains.path("a"))]);
    assert_eq!(found(&chains, "other"), Vec::<PathBuf>::new());
    let e = refuse_if_parent(&Host, chains.chain("p", OpenMode::Inspect).unwrap().youngest()).unwrap_err();
    assert!(e.kind() == ErrorKind::Refused && e.line().contains("/a"), "{e}");
    // A copy of the parent has the same UUID, and no children.
    std::fs::copy(chains.path("p"), chains.path("copy")).unwrap();
    assert_eq!(found(&chains, "copy"), Vec::<PathBuf>::new());
    // A child whose paths lead to no file may be a child of any copy.
    chains.child_by("lost", "p", ["gone", "gone"], BLOCK, 100);
    assert_eq!(found(&chains, "copy"), [canonical(&chains.path("lost"))]);
}

#[test]
fn the_attribute_leads_to_children_elsewhere_and_stale_lines_are_removed() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let chains = ChainFolder::new();
    chains.dynamic("p", BLOCK, 100);
    let path = folder.path().join("p");
    std::fs::copy(chains.path("p"), &path).unwrap();
    let parent = Image::open(Host.open(&path, Access::Read).unwrap()).unwrap();
    let elsewhere = chains.folder().canonicalize().unwrap();
    chains.child_by("c", "p", ["gone", "gone"], BLOCK, 100);
    record_child(&Host, &parent, &elsewhere.join("c"));
    if recorded_children(parent.file()).unwrap().is_empty() {
        return println!("skipped: this file system has no extended attributes");
    }
    record_child(&Host, &parent, &elsewhere.join("c"));
    record_child(&Host, &parent, &elsewhere.join("never made"));
    assert_eq!(recorded_children(parent.file()).unwrap().len(), 2);
    assert_eq!(children_of(&Host, &parent).unwrap(), [elsewhere.join("c")]);
    assert_eq!(recorded_children(parent.file()).unwrap().len(), 1, "a line that leads to no child is removed");
    for n in 0..100 {
        record_child(&Host, &parent, &elsewhere.join(format!("{n:0>100}")));
    }
    assert_eq!(
        children_of(&Host, &parent).unwrap(),
        [elsewhere.join("c")],
        "stale lines do not displace existing children"
    );
    std::fs::remove_file(elsewhere.join("c")).unwrap();
    assert_eq!(children_of(&Host, &parent).unwrap(), Vec::<PathBuf>::new());
    assert_eq!(recorded_children(parent.file()).unwrap(), Vec::<PathBuf>::new());
    // Paths into file systems of the kernel are not opened, and malformed lines are skipped.
    parent.file().set_attribute(CHILDREN_ATTRIBUTE, Some(b"../../../../../../proc/kmsg\n%zz\n\xFF")).unwrap();
    assert_eq!(children_of(&Host, &parent).unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn the_search_of_a_folder_is_limited() {
    let chains = ChainFolder::new();
    chains.dynamic("p", BLOCK, 100);
    for n in 0..MAX_FILES * 3 {
        std::fs::write(chains.path(&format!("f{n}")), [0; 600]).unwrap();
    }
    let began = std::time::Instant::now();
    assert_eq!(found(&chains, "p"), Vec::<PathBuf>::new());
    assert!(began.elapsed() < MAX_SEARCH_TIME * 40, "{:?}", began.elapsed());
}
