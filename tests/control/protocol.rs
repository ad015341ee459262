//! Every method against its own schema, the errors of form, and batches.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use super::schema::check;
use super::{DISK, SIZE, Served};

#[test]
fn every_method_answers_as_its_schema_says() {
    let served = Served::start(&["--num-queues=3", "--serial=S1"]);
    let mut rpc = served.connect();
    let schema = rpc.call("schema", &json!({}));
    let mut tested = BTreeSet::new();
    let mut calls = vec![
        ("version", json!({})),
        ("schema", json!({})),
        ("disks", json!({})),
        ("disk", json!({"disk": DISK})),
        ("stats", json!({})),
        ("stats", json!({"disk": DISK, "format": "json"})),
        ("stats", json!({"format": "prometheus"})),
        ("resize", json!({"disk": DISK, "size": "12M"})),
        ("watch", json!({})),
        ("watch", json!({"events": ["front_end", "poisoned"]})),
        // The last call, since it ends the daemon.
        ("shutdown", json!({"timeout_s": 30})),
    ];
    let last = calls.pop().expect("shutdown");
    for (method, params) in calls.iter().chain([&last]) {
        let described = &schema["methods"][method];
        check(&described["params"], params).unwrap_or_else(|e| panic!("{method}: {e}"));
        // Wrong parameters fail, and the schema excludes them.
        let mut wrong = params.clone();
        wrong["colour"] = json!("red");
        assert!(check(&described["params"], &wrong).is_err(), "{method}");
        let error = rpc.error(method, &wrong);
        assert_eq!(error["code"], -32602, "{method}: {error}");
        check(&schema["error"], &error).unwrap_or_else(|e| panic!("{method}: {e}"));
        let result = rpc.call(method, params);
        check(&described["result"], &result).unwrap_or_else(|e| panic!("{method}: {e}"));
        // The schema excludes a result that lacks a member.
        if let Some((name, mut less)) = result.as_object().and_then(|all| Some((all.keys().next()?, all.clone())))
            && *method != "schema"
        {
            less.remove(name);
            assert!(check(&described["result"], &Value::Object(less)).is_err(), "{method} without {name}");
        }
        tested.insert((*method).to_owned());
    }
    // `snapshot.rs` calls this method, which changes the disk.
    tested.insert("snapshot".into());
    let all: BTreeSet<String> = schema["methods"].as_object().expect("methods").keys().cloned().collect();
    assert_eq!(tested, all);
    let ended = rpc.event();
    check(&schema["events"]["ended"], &ended).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((&ended["clean"], &ended["reason"]), (&json!(true), &Value::Null));
    assert_eq!(rpc.receive(), None, "the daemon ends");
    assert!(served.daemon.wait_for_exit().success());
}

#[test]
fn a_disk_is_described_as_it_is() {
    let served = Served::start(&["--num-queues=3", "--serial=S1", "--cache=writethrough"]);
    let mut rpc = served.connect();
    let disk = rpc.call("disk", &json!({"disk": DISK}));
    assert_eq!(rpc.call("disks", &json!({})), json!([disk]));
    for (member, expected) in [
        ("name", json!(DISK)),
        ("size", json!(SIZE)),
        ("path", json!(served.folder.path().join(DISK))),
        ("socket", json!(served.daemon.socket())),
        ("queues", json!(3)),
        ("queue_size", json!(1024)),
        ("serial", json!("S1")),
        ("cache", json!("writethrough")),
        ("read_only", json!(false)),
        ("state", json!("serving")),
        ("front_end", json!({"connected": false, "pid": null, "uid": null})),
        ("jobs", json!([])),
    ] {
        assert_eq!(disk[member], expected, "{member}");
    }
    let chain = disk["chain"].as_array().expect("a chain");
    assert_eq!(chain.len(), 2);
    for layer in chain {
        let path = layer["path"].as_str().expect("a path");
        let info = super::diffdisk(["info", path, "--json", served.runtime.option()]).json();
        assert_eq!(layer["uuid"], info["uuid"]);
        assert_eq!(layer["allocated"], fs::metadata(path).expect("the file").blocks() * 512);
    }
    let version = rpc.call("version", &json!({}));
    assert_eq!((&version["program"], &version["protocol"]), (&json!("diffdiskd"), &json!(1)));
    let log = served.daemon.log();
    let me = format!("client connected: process {} of user ", std::process::id());
    assert!(log.contains(&me), "peers are logged: {log}");
    served.stop();
}

#[test]
fn errors_have_the_codes_of_json_rpc_or_of_the_project() {
    let served = Served::start(&[]);
    let mut rpc = served.connect();
    let schema = rpc.call("schema", &json!({}));
    for (line, id, code) in [
        ("{", json!(null), -32700),
        ("[1,", json!(null), -32700),
        ("[]", json!(null), -32600),
        ("17", json!(null), -32600),
        (r#"{"jsonrpc":"2.0","id":1}"#, json!(1), -32600),
        (r#"{"jsonrpc":"2.0","id":1.5,"method":"version"}"#, json!(null), -32600),
        (r#"{"jsonrpc":"2.0","id":2,"method":"format"}"#, json!(2), -32601),
        (r#"{"jsonrpc":"2.0","id":3,"method":"disk"}"#, json!(3), -32602),
        (r#"{"jsonrpc":"2.0","id":4,"method":"disk","params":["child.vhd"]}"#, json!(4), -32602),
        (r#"{"jsonrpc":"2.0","id":5,"method":"watch","params":{"events":["rain"]}}"#, json!(5), -32602),
        (r#"{"jsonrpc":"2.0","id":6,"method":"stats","params":{"format":"xml"}}"#, json!(6), -32602),
        (r#"{"jsonrpc":"2.0","id":7,"method":"shutdown","params":{"timeout_s":0}}"#, json!(7), -32602),
        (r#"{"jsonrpc":"2.0","id":"8","method":"disk","params":{"disk":"x"}}"#, json!("8"), -3),
    ] {
        rpc.send(format!("{line}\n"));
        let answer = rpc.answer();
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&id, &json!(code)), "{line}: {answer}");
        check(&schema["error"], &answer["error"]).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert_eq!(answer["error"].get("data").is_some(), code > -100, "{line}");
        if code == -3 {
            let hint = answer["error"]["data"]["hint"].as_str().expect("a hint");
            assert!(hint.contains(DISK), "{hint}");
        }
    }
    // A notification has no answer, whatever its outcome. So the next answer is that to the last request.
    for method in ["version", "disks", "nothing"] {
        rpc.send(format!("{{\"jsonrpc\":\"2.0\",\"method\":\"{method}\"}}\n"));
    }
    rpc.call("version", &json!({}));
    served.stop();
}

#[test]
fn a_batch_is_answered_as_one_message() {
    let served = Served::start(&[]);
    let mut rpc = served.connect();
    let call = |id: u32, method: &str| json!({"jsonrpc": "2.0", "id": id, "method": method});
    let silent = json!({"jsonrpc": "2.0", "method": "disks"});
    let batch = json!([call(1, "version"), call(2, "disks"), silent, 3, call(4, "nothing"), call(5, "disks")]);
    rpc.send(format!("{batch}\n"));
    let answers = rpc.answer();
    let mut found: Vec<(Value, Value)> = answers
        .as_array()
        .expect("a batch")
        .iter()
        .map(|answer| (answer["id"].clone(), answer["error"]["code"].clone()))
        .collect();
    found.sort_by_key(|(id, _)| id.as_u64());
    let null = Value::Null;
    let expected = [
        (null.clone(), json!(-32600)),
        (json!(1), null.clone()),
        (json!(2), null.clone()),
        (json!(4), json!(-32601)),
        (json!(5), null),
    ];
    assert_eq!(found, expected);
    rpc.send(format!("{}\n", json!([silent, silent])));
    rpc.call("version", &json!({}));
    // Answers come in any order, but each exactly once.
    let many: String =
        (0..500).map(|id| format!("{}\n", call(id, if id % 2 == 0 { "disks" } else { "version" }))).collect();
    rpc.send(many);
    let mut ids: Vec<u64> = (0..500).map(|_| rpc.answer()["id"].as_u64().expect("an id")).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..500));
    served.stop();
}
