//! Tests of `folder.rs` on real folders.

use std::os::unix::fs::symlink;

use super::*;
use crate::storage::env::Env;
use crate::storage::host::Host;

fn kind<T>(r: Result<T>) -> ErrorKind {
    match r {
        Ok(_) => panic!("this must fail"),
        Err(e) => e.kind(),
    }
}

fn n(name: &str) -> &OsStr {
    OsStr::new(name)
}

#[test]
fn paths_beneath_a_folder_cannot_leave_it() {
    let d = tempfile::tempdir().unwrap();
    let root = d.path().join("root");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(d.path().join("outside"), "secret").unwrap();
    fs::write(root.join("in"), "fine").unwrap();
    fs::write(root.join("sub/deep"), "fine").unwrap();
    symlink("in", root.join("link")).unwrap();
    symlink("..", root.join("up")).unwrap();
    let folder = Host.folder(&root).unwrap();
    let open = |path: &str| folder.open_beneath(Path::new(path));
    for good in ["in", "sub/../in", "./in"] {
        open(good).unwrap();
    }
    let deep = open("sub/deep").unwrap();
    assert!(deep.folder().is_same(&folder.subfolder(n("sub")).unwrap()), "the folder in which it was found");
    for bad in ["../outside", "sub/../../outside", "link", "up/outside", "/etc/passwd", "sub", ".", "../root/in"] {
        assert_eq!(kind(open(bad)), ErrorKind::Refused, "{bad}");
    }
    assert_eq!(kind(folder.open_beneath(&root.join("in"))), ErrorKind::Refused);
    assert_eq!((kind(open("none")), kind(open(""))), (ErrorKind::NotFound, ErrorKind::NotFound));
    assert_eq!(
        (kind(folder.subfolder(n("up"))), kind(folder.subfolder(n("..")))),
        (ErrorKind::Refused, ErrorKind::Refused)
    );
}

#[test]
fn names_are_created_linked_renamed_and_removed() {
    let d = tempfile::tempdir().unwrap();
    let folder = Host.folder(d.path()).unwrap();
    let a = folder.create(n("a")).unwrap();
    assert_eq!(a.stat().unwrap().mode & !0o644, 0);
    assert_eq!(folder.create(n("a")).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    folder.link(n("a"), n("b")).unwrap();
    assert_eq!(folder.link(n("a"), n("b")).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    folder.create(n("c")).unwrap();
    folder.rename(n("c"), &folder, n("b")).unwrap();
    assert_ne!(a.stat().unwrap().id, folder.open(n("b"), Access::Read).unwrap().stat().unwrap().id);
    folder.remove(n("a")).unwrap();
    assert_eq!(kind(folder.remove(n("a"))), ErrorKind::NotFound);
    folder.sync().unwrap();
    Host.folder(Path::new("")).unwrap().sync().unwrap();
    assert_eq!(folder.list().unwrap(), [n("b")]);
    assert_eq!(folder.list_at_most(0).unwrap(), None);
    symlink("b", d.path().join("link")).unwrap();
    symlink("none", d.path().join("broken")).unwrap();
    assert_eq!([n("b"), n("broken"), n("none")].map(|name| folder.exists(name).unwrap()), [true, true, false]);
    assert_eq!(kind(folder.open(n("link"), Access::Read)), ErrorKind::Refused);
    for bad in ["", ".", "..", "a/b", "/b", "b/"] {
        assert_eq!(kind(folder.open(n(bad), Access::Read)), ErrorKind::Refused, "{bad:?}");
        assert_eq!(kind(folder.remove(n(bad))), ErrorKind::Refused, "{bad:?}");
    }
}

#[test]
fn an_open_folder_stays_the_same_when_its_path_changes() {
    let d = tempfile::tempdir().unwrap();
    let p = |name: &str| d.path().join(name);
    for folder in ["a", "b", "c"] {
        fs::create_dir(p(folder)).unwrap();
    }
    fs::write(p("a/f"), "first").unwrap();
    fs::write(p("b/f"), "second, must not be changed").unwrap();
    let held = Host.folder(&p("a")).unwrap();
    fs::rename(p("a"), p("moved")).unwrap();
    symlink("b", p("a")).unwrap();
    assert_eq!(held.open(n("f"), Access::Read).unwrap().stat().unwrap().len, 5);
    assert_eq!(held.absolute().unwrap().path(), d.path().canonicalize().unwrap().join("moved"));
    assert_eq!(held.path(), p("a"), "the path by which it was opened");
    let other = Host.folder(&p("c")).unwrap();
    held.rename(n("f"), &other, n("g")).unwrap();
    held.create(n("f")).unwrap();
    held.link(n("f"), n("h")).unwrap();
    held.remove(n("f")).unwrap();
    held.sync().unwrap();
    assert_eq!(fs::read(p("c/g")).unwrap(), b"first");
    assert!(p("moved/h").exists() && !p("moved/f").exists());
    assert_eq!(fs::read_dir(p("b")).unwrap().count(), 1);
    assert_eq!(fs::read(p("b/f")).unwrap(), b"second, must not be changed");
    let file = held.open(n("h"), Access::Write).unwrap();
    assert!(file.folder().is_same(&held));
}
