//! The method `snapshot` and `diffdisk ctl snapshot`: parameters, errors, and wrong usage.

use std::ffi::OsStr;
use std::fs;

use serde_json::{Value, json};

use super::ctl::{assert_fails, ctl};
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
    served.daemon.wait_for_log("no snapshot: no disk has the name \"other\"", 2);
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
    // A client that leaves at once: the outcome is in the log.
    let mut leaving = served.connect();
    let request = json!({"jsonrpc": "2.0", "id": 1, "method": "snapshot", "params": params});
    leaving.send(format!("{request}\n"));
    drop(leaving);
    served.daemon.wait_for_log("no snapshot: the disk", 3);
    // A notification, and requests at once: each request has one answer.
    let notification = json!({"jsonrpc": "2.0", "method": "snapshot", "params": params});
    rpc.send(format!("{notification}\n"));
    served.daemon.wait_for_log("no snapshot: the disk", 4);
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
    // The words are right, and there is no daemon.
    for words in [
        &["snapshot", "a", "--keep-as", "x", "b", "--keep-as", "y"][..],
        &["snapshot", "a", "b", "--keep-as", "{name}-{time}.vhd"],
    ] {
        assert_fails(&ctl(words, Some(OsStr::new("/nonexistent"))), "ctl snapshot", "/nonexistent: cannot connect");
    }
}
