//! `children`, which lists the children of an image, and `info`, which names the process that uses it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::common::daemon::Daemon;
use crate::common::temp::scratch;
use crate::common::tool::{DIFFDISK, diffdisk, on_path, run};

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn children_are_listed_by_the_uuid_that_they_record() {
    let folder = scratch("children");
    let at = |name: &str| folder.path().join(name);
    for name in ["here", "there"] {
        fs::create_dir(at(name)).expect("a folder");
    }
    let root = text(&at("here/root.vhd"));
    diffdisk(["create", &root, "--size", "1M"]).ok();
    let list = |more: &[&str]| -> Value { diffdisk([&["children", &root, "--json"], more].concat()).ok().json() };
    assert_eq!(list(&[]), serde_json::json!([]));
    assert!(
        String::from_utf8_lossy(&diffdisk(["children", &root]).ok().stdout)
            .contains("no children in the folders searched")
    );
    for name in ["here/b.vhd", "here/a.vhd", "there/c.vhd"] {
        diffdisk(["create", &text(&at(name)), "--parent", &root]).ok();
    }
    // None of these is a child: a grandchild, a child of another image, a damaged image, a FIFO, a dangling link. The
    // link `second-name.vhd` leads to a child, which is listed once.
    let policy = ["--allow-parents", &text(&at("here"))];
    diffdisk([&["create", &text(&at("there/g.vhd")), "--parent", &text(&at("there/c.vhd"))], &policy[..]].concat())
        .ok();
    diffdisk(["create", &text(&at("here/other.vhd")), "--size", "1M"]).ok();
    diffdisk(["create", &text(&at("here/o.vhd")), "--parent", &text(&at("here/other.vhd"))]).ok();
    fs::write(at("here/broken.vhd"), &fs::read(at("here/a.vhd")).expect("a child")[..600]).expect("a broken file");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("here/fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("a FIFO");
    symlink("nowhere", at("here/dangling.vhd")).expect("a link");
    symlink("a.vhd", at("here/second-name.vhd")).expect("a link");

    let uuid = |name: &str| diffdisk(["info", &text(&at(name)), "--json"]).ok().json()["uuid"].clone();
    let child = |name: &str| {
        let path = at(name).canonicalize().expect("it is there");
        serde_json::json!({"path": text(&path), "uuid": uuid(name)})
    };
    let here = [child("here/a.vhd"), child("here/b.vhd")];
    assert_eq!(list(&[]), Value::from(here.to_vec()));
    let there = text(&at("there"));
    let all = [&here[..], &[child("there/c.vhd")]].concat();
    assert_eq!(list(&["--in", &there]), Value::from(all.clone()));
    assert_eq!(list(&["--in", &there, "--in", &there, "--in", &text(&at("here"))]), Value::from(all));
    let said = diffdisk(["children", &root]).ok().stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with(uuid("here/a.vhd").as_str().expect("a text")) && lines[0].ends_with("/here/a.vhd"));
    // The image is given by a link in another folder.
    symlink("../here/root.vhd", at("there/link.vhd")).expect("a link");
    assert_eq!(diffdisk(["children", &text(&at("there/link.vhd")), "--json"]).ok().json(), Value::from(here.to_vec()));

    for (args, why) in [
        (["children", &text(&at("here/broken.vhd")), "--json"], "not a VHD"),
        (["children", &text(&at("none.vhd")), "--json"], "No such file"),
        (["children", &root, "--in=/nonexistent"], "/nonexistent"),
    ] {
        let failed = diffdisk(args);
        assert!(failed.code == Some(1) && failed.stderr.contains(why), "{failed:?}");
    }
}

#[test]
fn info_names_the_process_that_has_an_image_in_use() {
    let folder = scratch("in-use");
    // Other users may read the folder.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("a folder of ours");
    let [root, child] = ["root.vhd", "child.vhd"].map(|name| text(&folder.path().join(name)));
    diffdisk(["create", &root, "--size", "1M"]).ok();
    diffdisk(["create", &child, "--parent", &root]).ok();
    let info = |args: &[&str]| diffdisk([&["info", &child][..], args].concat()).ok();
    assert!(info(&["--json"]).json()["in_use"].is_null());
    assert!(!String::from_utf8_lossy(&info(&[]).stdout).contains("in use"));

    let daemon = Daemon::start(Path::new(&child), &[]);
    let seen = info(&["--json", "--chain"]).json();
    assert_eq!(seen["in_use"]["pid"], daemon.pid());
    let since = seen["in_use"]["since"].as_str().expect("a time").to_owned();
    let now = run(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M"]), Duration::from_secs(9)).ok().stdout;
    assert!(since.len() == 20 && since[..13] >= *"2026-01-01T00" && since[..15] <= *String::from_utf8_lossy(&now));
    for image in seen["chain"].as_array().expect("a list") {
        assert_eq!(image["in_use"], seen["in_use"], "the daemon has both files open");
    }
    let said = String::from_utf8_lossy(&info(&[]).stdout).into_owned();
    let line = format!("in use:         by diffdiskd (process {}), since {since}\n", daemon.pid());
    assert!(said.contains(&line), "{said}");
    if rustix::process::geteuid().is_root() && on_path("setpriv") {
        let mut other = Command::new("setpriv");
        other.args(["--reuid=65534", "--regid=65534", "--clear-groups", DIFFDISK, "info", &child]);
        let said = run(&mut other, Duration::from_secs(60)).ok().stdout;
        assert!(String::from_utf8_lossy(&said).contains("in use:         by another process\n"));
        let seen = run(other.arg("--json"), Duration::from_secs(60)).ok().json();
        assert_eq!(seen["in_use"], serde_json::json!({"pid": null, "since": null}));
    } else {
        eprintln!("skipped: another user's view needs root and setpriv");
    }
    daemon.stop();
    assert!(info(&["--json"]).json()["in_use"].is_null());
}
