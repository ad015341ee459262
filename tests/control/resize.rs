//! The method `resize`, its event, and `diffdisk ctl resize`.

use serde_json::{Value, json};

use super::ctl::text_of;
use super::schema::check;
use super::{DISK, SIZE, Served, diffdisk};

#[test]
fn a_disk_grows_while_a_guest_uses_it() {
    let served = Served::start(&[]);
    let mut rpc = served.connect();
    let schema = rpc.call("schema", &json!({}));
    rpc.call("watch", &json!({"events": ["resized"]}));
    let mut guest = served.daemon.connect();
    guest.write(4096, &[7; 4096]).expect("a write");
    let mut last = SIZE;
    for (size, bytes) in [(json!("9M"), 9 << 20), (json!((9 << 20) + 512), (9 << 20) + 512), (json!("20M"), 20 << 20)] {
        let params = json!({"disk": DISK, "size": size});
        check(&schema["methods"]["resize"]["params"], &params).unwrap_or_else(|e| panic!("{e}"));
        let result = rpc.call("resize", &params);
        check(&schema["methods"]["resize"]["result"], &result).unwrap_or_else(|e| panic!("{e}"));
        // The front-end of the test sets no back-end channel.
        assert_eq!((&result["size"], &result["front_end_told"]), (&json!(bytes), &json!(false)), "{result}");
        let event = rpc.event();
        check(&schema["events"]["resized"], &event).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((&event["disk"], &event["size"]), (&json!(DISK), &json!(bytes)));
        assert_eq!(rpc.call("disk", &json!({"disk": DISK}))["size"], bytes);
        assert_eq!(guest.read(last, 512).expect("a read"), [0; 512]);
        guest.write(last, &[9; 512]).expect("a write");
        last = bytes;
    }
    // A resize to the present size changes nothing.
    let same = rpc.call("resize", &json!({"disk": DISK, "size": last}));
    assert_eq!(same, json!({"pause_us": 0, "size": last, "front_end_told": false}));
    for (params, code) in [
        (json!({"disk": DISK, "size": "1M"}), -1),
        (json!({"disk": DISK, "size": last + 1}), -8),
        (json!({"disk": "x", "size": last}), -3),
        (json!({"disk": DISK, "size": "much"}), -32602),
        (json!({"disk": DISK, "size": -1}), -32602),
        (json!({"disk": DISK}), -32602),
    ] {
        assert_eq!(rpc.error("resize", &params)["code"], code, "{params}");
    }
    let line = text_of(&served, &["resize", DISK, "24M"]);
    let (begin, end) = (
        format!("{DISK}: 24 MiB (25165824 bytes); writes waited for "),
        "PATCH /drives (Firecracker), or restart it\n",
    );
    assert!(line.starts_with(&begin) && line.ends_with(end) && line.lines().count() == 1, "{line}");
    let result: Value = serde_json::from_str(&text_of(&served, &["resize", DISK, "25M", "--json"])).expect("JSON");
    assert_eq!(result["size"], 25 << 20);
    drop(guest);
    let image = served.folder.path().join(DISK).to_str().expect("a plain path").to_owned();
    let folder = served.stop();
    assert_eq!(diffdisk(["info", &image, "--json"]).json()["virtual_size"], 25 << 20);
    diffdisk(["check", &image]).ok();
    drop(folder);
}

/// A daemon that is killed during a resize leaves an image that the next daemon serves, at whichever step it is killed.
#[cfg(feature = "mutants")]
#[test]
fn a_daemon_that_is_killed_during_a_resize_loses_nothing() {
    let points = ["committed", "session-ended", "trimmed", "journal-removed", "grown", "opened"];
    let inner = ["resize.new-table-written", "resize.table-moved", "resize.size-switched", "resize.file-cut"];
    let points = points.map(|point| format!("live-resize.{point}")).into_iter().chain(inner.map(str::to_owned));
    for point in points {
        let served = Served::start_with(&[], &[("DIFFDISK_KILL_AT", &point)]);
        let mut guest = served.daemon.connect();
        guest.write(4096, &[7; 4096]).expect("a write");
        let mut rpc = served.connect();
        let size = 64_u64 << 30;
        rpc.send(format!(
            "{}\n",
            json!({"jsonrpc": "2.0", "id": 1, "method": "resize", "params": {"disk": DISK, "size": size}})
        ));
        assert_eq!(rpc.receive(), None, "{point}: the daemon is killed");
        drop(guest);
        let mut served = served;
        served.daemon.restart_without_variables();
        let mut guest = served.daemon.connect();
        assert_eq!(guest.read(4096, 4096).expect("a read"), [7; 4096], "{point}");
        let now = served.connect().call("disk", &json!({"disk": DISK}))["size"].as_u64().expect("a number");
        assert!(now == SIZE || now == size, "{point}: {now}");
        served.connect().call("resize", &json!({"disk": DISK, "size": size}));
        guest.write(size - 512, &[8; 512]).expect("a write");
        drop(guest);
        let image = served.folder.path().join(DISK).to_str().expect("a plain path").to_owned();
        let folder = served.stop();
        diffdisk(["check", &image]).ok();
        drop(folder);
    }
}
