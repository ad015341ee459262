//! The method `snapshot` and `diffdisk ctl snapshot`: parameters, errors, and wrong usage.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::common::client::{Client, MAX_REQUEST_BYTES};
use super::common::daemon::Daemon;
use super::common::pattern::{assert_same, sectors};
use super::common::tool::{Finished, diffdisk};
use super::ctl::{assert_fails, ctl};
use super::rpc::Rpc;
use super::schema::check;
use super::{DISK, Served};

#[test]
fn parameters_match_the_schema_or_are_refused() {
    let served = Served::start(&[]);
    let mut rpc = served.connect();
    let schema = rpc.call("schema", &json!({}));
    let described = &schema["methods"]["snapshot"];
    let disk = |keep_as: &str| json!({"disk": DISK, "keep_as": keep_as});
    let elsewhere = served.folder.path().join("none/x.vhd");
    for (params, is_valid, code, why) in [
        (json!({}), false, -32602, "disks"),
        (json!({"disks": DISK}), false, -32602, "invalid type"),
        (json!({"disks": [DISK]}), false, -32602, "invalid type"),
        (json!({"disks": [{"disk": DISK}]}), false, -32602, "keep_as"),
        (json!({"disks": [{"disk": DISK, "keep_as": 1}]}), false, -32602, "invalid type"),
        (json!({"disks": [{"disk": DISK, "keep_as": "x", "colour": "red"}]}), false, -32602, "colour"),
        (json!({"disks": [disk("x")], "colour": "red"}), false, -32602, "colour"),
        (json!({"disks": []}), false, -8, "at least one disk"),
        (json!({"disks": [disk("x"), disk("y")]}), true, -8, "given twice"),
        (json!({"disks": [disk("{uuid}.vhd")]}), true, -8, "{uuid} is no placeholder"),
        (json!({"disks": [disk("{name")]}), true, -8, "a { without a }"),
        (json!({"disks": [disk("")]}), true, -8, "does not end in a file name"),
        (json!({"disks": [disk("sub/")]}), true, -8, "does not end in a file name"),
        (json!({"disks": [{"disk": "other", "keep_as": "x"}]}), true, -3, "no disk has the name"),
        (json!({"disks": [disk("x"), {"disk": "other", "keep_as": "y"}]}), true, -3, "no disk has the name"),
        (json!({"disks": [disk(elsewhere.to_str().expect("a plain path"))]}), true, -3, "cannot resolve the path"),
    ] {
        assert_eq!(check(&described["params"], &params).is_ok(), is_valid, "{params}");
        let error = rpc.error("snapshot", &params);
        assert_eq!(error["code"], code, "{params}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(why)), "{params}: {error}");
        check(&schema["error"], &error).unwrap_or_else(|e| panic!("{params}: {e}"));
    }
    served.daemon.wait_for_log("requests snapshot", 1);
    served.daemon.wait_for_log("a snapshot failed: no disk has the name \"other\"", 2);
    // The disk refuses a name that exists, or any snapshot if it cannot take one. Its error has all details.
    let error = rpc.error("snapshot", &json!({"disks": [disk("root.vhd")]}));
    assert!(error["code"] == -1 || error["code"] == -7, "{error}");
    check(&schema["error"], &error).unwrap_or_else(|e| panic!("{e}"));
    assert!(error["data"]["causes"].is_array(), "{error}");
    let names =
        fs::read_dir(served.folder.path()).expect("the folder").map(|entry| entry.expect("an entry").file_name());
    let mut images: Vec<_> = names.filter(|name| !name.to_string_lossy().starts_with("vm.control")).collect();
    images.sort();
    assert_eq!(images, [DISK, "root.vhd"], "nothing is created");
    let watched = rpc.call("watch", &json!({"events": ["snapshot"]}));
    assert_eq!(watched["events"], json!(["snapshot"]));
    served.stop();
}

#[test]
fn an_error_of_the_disk_reaches_the_client_and_the_exit_code() {
    let served = Served::start(&["--read-only"]);
    let mut rpc = served.connect();
    let params = json!({"disks": [{"disk": DISK, "keep_as": "x"}]});
    let error = rpc.error("snapshot", &params);
    assert_eq!(error["code"], -1, "{error}");
    let control = Some(served.control.as_os_str());
    assert_fails(&ctl(&["snapshot", DISK, "--keep-as", "x"], control), "ctl snapshot", "is read-only");
    assert_fails(&ctl(&["snapshot", "b", "--keep-as", "x", "--json"], control), "ctl snapshot", "the disks are");
    // If a client disconnects at once, the outcome is in the log.
    let mut leaving = served.connect();
    let request = json!({"jsonrpc": "2.0", "id": 1, "method": "snapshot", "params": params});
    leaving.send(format!("{request}\n"));
    drop(leaving);
    served.daemon.wait_for_log("a snapshot failed: the disk", 3);
    // A notification has no answer. Each of many requests at the same time has one answer.
    let notification = json!({"jsonrpc": "2.0", "method": "snapshot", "params": params});
    rpc.send(format!("{notification}\n"));
    served.daemon.wait_for_log("a snapshot failed: the disk", 4);
    let many = |id: u64| format!("{}\n", json!({"jsonrpc": "2.0", "id": id, "method": "snapshot", "params": params}));
    rpc.send((0..200).map(many).collect::<String>());
    let mut ids = Vec::new();
    for _ in 0..200 {
        let answer: Value = rpc.answer();
        let code = &answer["error"]["code"];
        assert!(*code == -1 || *code == -2, "refused, or too many at once: {answer}");
        ids.push(answer["id"].as_u64().expect("an id"));
    }
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..200));
    served.stop();
}

#[test]
fn wrong_usage_has_exit_code_2() {
    for (words, why) in [
        (&["a", "--keep-as", "x", "b"][..], "there is no --keep-as for the disk 'b'"),
        (&["a", "--keep-as", "x", "--keep-as", "y"], "there is no disk for --keep-as 'y'"),
        (&["a"], "--keep-as"),
        (&["--keep-as", "x"], "<DISK>"),
    ] {
        let failed = ctl(&[&["snapshot"], words].concat(), Some(OsStr::new("/nonexistent")));
        assert_eq!((failed.code, failed.stdout.as_slice()), (Some(2), &b""[..]), "{words:?}");
        assert!(failed.stderr.contains(why), "{words:?}: {}", failed.stderr);
    }
    // The usage is correct, but there is no daemon.
    for words in [
        &["snapshot", "a", "--keep-as", "x", "b", "--keep-as", "y"][..],
        &["snapshot", "a", "b", "--keep-as", "{name}-{time}.vhd"],
    ] {
        assert_fails(&ctl(words, Some(OsStr::new("/nonexistent"))), "ctl snapshot", "/nonexistent: cannot connect");
    }
}

/// Runs `diffdisk` on an image. Panics if the exit code is not 0.
#[track_caller]
fn tool(served: &Served, verb: &str, image: &Path, more: &[&str]) -> Finished {
    let image = image.to_str().expect("a plain path");
    diffdisk([&[verb, image, served.runtime.option()], more].concat()).ok()
}

/// Returns the contents of the disk, as the guest reads them.
fn contents(guest: &mut Client) -> Vec<u8> {
    guest.read_all(MAX_REQUEST_BYTES).expect("the disk is readable")
}

#[test]
fn a_snapshot_keeps_the_old_contents() {
    let mut served = Served::start(&[]);
    let folder = served.folder.path().canonicalize().expect("the folder");
    let (image, kept) = (folder.join(DISK), folder.join("before-child.vhd"));
    let mut rpc = served.connect();
    let schema = rpc.call("schema", &json!({}));
    rpc.call("watch", &json!({"events": ["snapshot"]}));
    let disk_before = rpc.call("disk", &json!({"disk": DISK}));
    let mut guest = served.daemon.connect();
    guest.write(0, &sectors("flushed", 0, 2048)).expect("a write");
    guest.flush().expect("a flush");
    guest.write(3 << 20, &sectors("acknowledged", 6144, 100)).expect("a write");
    let before = contents(&mut guest);

    let control = Some(served.control.as_os_str());
    let json_of = |words: &[&str]| -> Value { ctl(&[words, &["--json"]].concat(), control).ok().json() };
    let result = json_of(&["snapshot", DISK, "--keep-as", "before-{name}"]);
    check(&schema["methods"]["snapshot"]["result"], &result).unwrap_or_else(|e| panic!("{e}"));
    let uuid = &disk_before["chain"][0]["uuid"];
    assert_eq!(result["members"], json!([{"disk": DISK, "kept": kept, "uuid": uuid}]));
    let event = rpc.event();
    check(&schema["events"]["snapshot"], &event).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((&event["disk"], &event["kept"], &event["uuid"]), (&json!(DISK), &json!(kept), uuid));
    assert_eq!(event["pause_us"], result["pause_us"]);

    // The connection of the guest continues on the new image. Only the new image changes.
    assert_same("the guest, directly after the snapshot", &contents(&mut guest), &before);
    guest.write(512 << 10, &sectors("new", 1024, 2048)).expect("a write");
    guest.discard(3 << 20, 4096).expect("a discard");
    guest.write(6 << 20, &sectors("not flushed", 12_288, 100)).expect("a write");
    let after = contents(&mut guest);
    assert_ne!(after, before);
    let raw = |image: &Path| tool(&served, "convert", image, &["-", "--to", "raw"]).stdout;
    assert_same("the kept image", &raw(&kept), &before);

    // The chain, as the daemon and as the tool see it.
    let disk = rpc.call("disk", &json!({"disk": DISK}));
    let paths: Vec<&Value> = disk["chain"].as_array().expect("a chain").iter().map(|layer| &layer["path"]).collect();
    assert_eq!(paths, [&json!(image), &json!(kept), &json!(folder.join("root.vhd"))]);
    assert_eq!((&disk["serial"], &disk["path"]), (&disk_before["serial"], &json!(image)));
    let info = tool(&served, "info", &image, &["--chain", "--json"]).json();
    assert_eq!((&info["parent"]["uuid"], &info["chain"][1]["path"]), (uuid, &json!(kept)));
    assert_ne!(info["uuid"], *uuid);
    assert!(info["parent"]["locators"].as_array().is_some_and(|all| !all.is_empty()), "{info}");

    // A name that exists is refused, and nothing changes.
    assert_fails(&ctl(&["snapshot", DISK, "--keep-as", "root.vhd"], control), "ctl snapshot", "root.vhd");
    assert_same("the guest, after a refusal", &contents(&mut guest), &after);

    // A killed daemon's successor has the new writes, and the guest sees the same disk.
    drop(guest);
    served.daemon.kill_and_restart();
    let mut guest = served.daemon.connect();
    assert_same("the guest, after a kill", &contents(&mut guest), &after);
    served.daemon.wait_for_log("control socket on", 2);
    assert_eq!(served.connect().call("disk", &json!({"disk": DISK}))["serial"], disk_before["serial"]);

    // If a client disconnects at once, its snapshot continues. Without --json, `ctl` prints one line.
    let request = json!({"jsonrpc": "2.0", "id": 1, "method": "snapshot",
        "params": {"disks": [{"disk": DISK, "keep_as": "left.vhd"}]}});
    let mut leaving = served.connect();
    leaving.send(format!("{request}\n"));
    drop(leaving);
    served.daemon.wait_for_log("left.vhd (", 1);
    let line = ctl(&["snapshot", DISK, "--keep-as", "third.vhd"], Some(served.control.as_os_str())).ok().stdout;
    let line = String::from_utf8(line).expect("text");
    let third = folder.join("third.vhd");
    let start = format!("snapshot of {DISK} kept as {}; writes waited ", third.display());
    assert!(line.starts_with(&start) && line.contains(" ms, flushes at most ") && line.ends_with(" ms\n"), "{line}");
    assert_same("the guest, after three snapshots", &contents(&mut guest), &after);

    // After a clean end the tools read the images without a daemon, and a new daemon serves the same disk.
    drop(guest);
    let Served { daemon, control, folder: _folder, runtime } = served;
    daemon.stop();
    let image_text = image.to_str().expect("a plain path");
    diffdisk(["check", image_text, "--chain"]).ok();
    assert_same("the active image", &diffdisk(["convert", image_text, "-", "--to", "raw"]).ok().stdout, &after);
    for name in ["before-child.vhd", "left.vhd", "third.vhd"] {
        let path = folder.join(name);
        let raw = diffdisk(["convert", path.to_str().expect("a plain path"), "-", "--to", "raw"]).ok().stdout;
        assert_same(name, &raw, if name == "before-child.vhd" { &before } else { &after });
    }
    let names = fs::read_dir(&folder).expect("the folder").map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.starts_with("vm.control"));
    names.sort();
    assert_eq!(names, ["before-child.vhd", DISK, "left.vhd", "root.vhd", "third.vhd"], "no note is left");
    let daemon = Daemon::start(&image, &[&format!("--control={}", control.display()), runtime.option()]);
    daemon.wait_for_log("control socket on", 1);
    let mut guest = daemon.connect();
    assert_same("the guest, after a restart", &contents(&mut guest), &after);
    let disk = Rpc::connect(&control).call("disk", &json!({"disk": DISK}));
    assert_eq!((&disk["serial"], disk["chain"].as_array().map(Vec::len)), (&disk_before["serial"], Some(5)));
    drop(guest);
    daemon.stop();
}
