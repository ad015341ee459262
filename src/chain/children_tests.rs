//! Children of an image: found by the mark and by headers, and told from children of copies.

use super::super::OpenMode;
use super::super::testing::ChainFolder;
use super::*;
use crate::storage::host::Host;

const BLOCK: u32 = 2 << 20;

fn found(rig: &ChainFolder, parent: &str) -> Vec<PathBuf> {
    let mut found = children_of(&Host, rig.chain(parent, OpenMode::Inspect).unwrap().youngest()).unwrap();
    found.sort();
    found
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap()
}

#[test]
fn children_are_found_by_headers() {
    let rig = ChainFolder::new();
    rig.dynamic("p", BLOCK, 100);
    rig.dynamic("other", BLOCK, 100);
    std::fs::write(rig.path("text"), "no image").unwrap();
    assert_eq!(found(&rig, "p"), Vec::<PathBuf>::new());
    rig.child("a", "p", BLOCK, 100);
    rig.child("b", "a", BLOCK, 100);
    assert_eq!(found(&rig, "p"), [canonical(&rig.path("a"))]);
    assert_eq!(found(&rig, "other"), Vec::<PathBuf>::new());
    let e = refuse_if_parent(&Host, rig.chain("p", OpenMode::Inspect).unwrap().youngest()).unwrap_err();
    assert!(e.kind() == ErrorKind::Refused && e.line().contains("/a"), "{e}");
    // A copy of the parent has the same UUID, and no children.
    std::fs::copy(rig.path("p"), rig.path("copy")).unwrap();
    assert_eq!(found(&rig, "copy"), Vec::<PathBuf>::new());
    // A child whose paths lead nowhere may stand on any of them.
    rig.child_by("lost", "p", ["gone", "gone"], BLOCK, 100);
    assert_eq!(found(&rig, "copy"), [canonical(&rig.path("lost"))]);
}

#[test]
fn a_mark_leads_to_children_elsewhere_and_stale_lines_go() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let rig = ChainFolder::new();
    rig.dynamic("p", BLOCK, 100);
    let path = folder.path().join("p");
    std::fs::copy(rig.path("p"), &path).unwrap();
    let parent = Image::open(Host.open(&path, Access::Read).unwrap()).unwrap();
    let elsewhere = rig.folder().canonicalize().unwrap();
    rig.child_by("c", "p", ["gone", "gone"], BLOCK, 100);
    record_child(&Host, &parent, &elsewhere.join("c"));
    if recorded_children(parent.file()).unwrap().is_empty() {
        return println!("skipped: no attributes here");
    }
    record_child(&Host, &parent, &elsewhere.join("c"));
    record_child(&Host, &parent, &elsewhere.join("never made"));
    assert_eq!(recorded_children(parent.file()).unwrap().len(), 2);
    assert_eq!(children_of(&Host, &parent).unwrap(), [elsewhere.join("c")]);
    assert_eq!(recorded_children(parent.file()).unwrap().len(), 1, "what leads to no child is dropped");
    for n in 0..100 {
        record_child(&Host, &parent, &elsewhere.join(format!("{n:0>100}")));
    }
    assert_eq!(
        children_of(&Host, &parent).unwrap(),
        [elsewhere.join("c")],
        "the living are not pushed out by stale ones"
    );
    std::fs::remove_file(elsewhere.join("c")).unwrap();
    assert_eq!(children_of(&Host, &parent).unwrap(), Vec::<PathBuf>::new());
    assert_eq!(recorded_children(parent.file()).unwrap(), Vec::<PathBuf>::new());
    // Strings that lead into the kernel's folders are not opened, and nonsense is passed over.
    parent.file().set_attribute(CHILDREN_ATTRIBUTE, Some(b"../../../../../../proc/kmsg\n%zz\n\xFF")).unwrap();
    assert_eq!(children_of(&Host, &parent).unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn the_search_is_bounded() {
    let rig = ChainFolder::new();
    rig.dynamic("p", BLOCK, 100);
    for n in 0..MAX_FILES * 3 {
        std::fs::write(rig.path(&format!("f{n}")), [0; 600]).unwrap();
    }
    let began = std::time::Instant::now();
    assert_eq!(found(&rig, "p"), Vec::<PathBuf>::new());
    assert!(began.elapsed() < MAX_SEARCH_TIME * 40, "{:?}", began.elapsed());
}
