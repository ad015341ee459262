//! The method `stats` and `diffdisk ctl stats` against what a guest did.

use serde_json::{Value, json};

use super::common::client::Command;
use super::ctl::text_of;
use super::rpc::Rpc;
use super::schema::check;
use super::{DISK, SIZE, Served};

/// The work of the guest: for each kind its requests and bytes.
const WORK: [(&str, u64, u64); 5] = [
    ("read", 40, 40 * 4096),
    ("write", 20, 20 * 8192),
    ("flush", 3, 0),
    ("discard", 2, 2 * 65_536),
    ("write_zeroes", 1, 4096),
];

fn work(served: &Served) -> super::common::client::Client {
    let mut guest = served.daemon.connect();
    let mut repeat = |count: u64, command: &dyn Fn(u64) -> Command<'static>| {
        for n in 0..count {
            guest.run(command(n)).expect("an answer");
        }
    };
    repeat(20, &|n| Command::Write { offset: n * 8192, data: &[7; 8192] });
    repeat(3, &|_| Command::Flush);
    repeat(20, &|n| Command::Read { offset: n * 4096, len: 4096 });
    // Sectors that were never written are in no layer.
    repeat(20, &|n| Command::Read { offset: SIZE / 2 + n * 4096, len: 4096 });
    repeat(2, &|n| Command::Discard { offset: SIZE - 131_072 + n * 65_536, len: 65_536 });
    repeat(1, &|_| Command::WriteZeroes { offset: 0, len: 4096, unmap: false });
    guest
}

fn report(rpc: &mut Rpc) -> Value {
    let schema = rpc.call("schema", &json!({}));
    let mut result = rpc.call("stats", &json!({"disk": DISK}));
    check(&schema["methods"]["stats"]["result"], &result).unwrap_or_else(|e| panic!("{e}"));
    result["disks"][0].take()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn statistics_agree_with_the_work_of_a_guest() {
    let served = Served::start(&["--num-queues=2"]);
    let mut rpc = served.connect();
    let before = report(&mut rpc);
    assert_eq!((&before["front_end_connected"], &before["commits"]), (&json!(false), &json!(0)));
    assert_eq!(before["total"]["requests"]["read"]["latency"]["p50_us"], Value::Null);
    let guest = work(&served);
    let disk = report(&mut rpc);
    for (kind, requests, bytes) in WORK {
        let total = &disk["total"]["requests"][kind];
        let counted = ["requests", "bytes", "errors"].map(|name| number(&total[name]));
        assert_eq!(counted, [requests, bytes, 0], "{kind}: {total}");
        let latency = &total["latency"];
        assert_eq!(number(&latency["count"]), requests, "{kind}");
        let times = ["p50_us", "p90_us", "p99_us", "p999_us"].map(|name| latency[name].as_f64().expect("a time"));
        assert!(times.is_sorted() && times[0] > 0.0 && times[3] < 60e6, "{kind}: {times:?}");
        let queues = disk["queues"].as_array().expect("queues");
        let sum: u64 = queues.iter().map(|queue| number(&queue["requests"][kind]["requests"])).sum();
        assert_eq!(sum, requests, "{kind}");
    }
    let (top, root) = (&disk["layers"][0], &disk["layers"][1]);
    assert!(top["path"].as_str().expect("a path").ends_with(DISK), "{top}");
    assert_eq!((number(&top["written_bytes"]), number(&root["written_bytes"])), (20 * 8192, 0));
    assert_eq!(number(&top["read_bytes"]) + number(&top["copied_bytes"]), 20 * 4096, "{top}");
    assert_eq!(number(&disk["total"]["zero_filled_bytes"]), 20 * 4096);
    assert!(number(&disk["commits"]) > 0 && number(&disk["gauges"]["file_system_available_bytes"]) > 0, "{disk}");
    assert_eq!((&disk["front_end_connected"], number(&disk["size_bytes"])), (&json!(true), SIZE));
    drop(guest);
    served.stop();
}

/// Each line is a comment, or `name{labels} value`. The numbers equal the work of the guest, as do those of the JSON
/// report.
#[test]
fn prometheus_text_parses_and_agrees_with_json() {
    let served = Served::start(&[]);
    let guest = work(&served);
    let text = served.connect().call("stats", &json!({"format": "prometheus"}));
    let text = text.as_str().expect("a text");
    let mut declared = String::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let words: Vec<&str> = comment.splitn(3, ' ').collect();
            assert!(words.len() == 3 && ["HELP", "TYPE"].contains(&words[0]), "{line}");
            words[1].clone_into(&mut declared);
            continue;
        }
        let (name, rest) = line.split_once('{').expect("labels");
        let (labels, value) = rest.rsplit_once("} ").expect("a value");
        assert!(name.starts_with(&declared) && name.bytes().all(|b| b == b'_' || b.is_ascii_lowercase()), "{line}");
        assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
        assert!(labels.starts_with(&format!("disk=\"{DISK}\"")), "{line}");
        for label in labels.split(',') {
            let (name, value) = label.split_once("=\"").expect("a label");
            assert!(!name.is_empty() && value.ends_with('"') && value.matches('"').count() == 1, "{line}");
        }
    }
    for (kind, requests, bytes) in WORK {
        for (name, expected) in [("requests_total", requests), ("request_bytes_total", bytes)] {
            let series = format!("diffdisk_{name}{{disk=\"{DISK}\",queue=\"0\",kind=\"{kind}\"}} {expected}");
            assert!(text.lines().any(|line| line == series), "{series} is missing in\n{text}");
        }
        let count = format!("diffdisk_request_duration_seconds_count{{disk=\"{DISK}\",kind=\"{kind}\"}} {requests}");
        assert!(text.lines().any(|line| line == count), "{count} is missing in\n{text}");
    }
    for line in ["front_end_connected{disk=\"child.vhd\"} 1", "depth{disk=\"child.vhd\"} 2"] {
        assert!(text.contains(&format!("\ndiffdisk_{line}\n")), "{line} is missing in\n{text}");
    }
    drop(guest);
    served.stop();
}

#[test]
fn the_table_has_the_numbers() {
    let served = Served::start(&[]);
    let guest = work(&served);
    let text = text_of(&served, &["stats", DISK]);
    println!("{text}");
    let words = |begin: &str| -> Vec<&str> {
        let line = text.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{begin}: {text}"));
        line.split_whitespace().collect()
    };
    assert!(text.starts_with("child.vhd: 8 MiB, front-end: connected\n"), "{text}");
    for (kind, requests, _) in WORK {
        let row = words(&format!("{} ", kind.replace('_', "-")));
        assert_eq!((row.len(), row[1]), (7, requests.to_string().as_str()), "{text}");
        assert!(row[4..].iter().all(|time| time.parse::<f64>().is_ok()), "{text}");
    }
    assert_eq!(words("0 ")[..6], ["0", "40", "20", "3", "2", "1"], "{text}");
    let top = text.lines().find(|line| line.ends_with(DISK)).unwrap_or_else(|| panic!("{text}"));
    assert_eq!(top.split_whitespace().nth(5), Some("20"), "{text}");
    assert!(words("commits ")[1].parse::<u64>().is_ok_and(|commits| commits > 0), "{text}");
    drop(guest);
    served.stop();
}
