//! Clients that break the rules, send half of a message, do not read, or are too many. Other clients are served as
//! before, and the daemon can be ended.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use super::Served;
use super::common::rng::Rng;
use super::rpc::Rpc;

/// Maximum number of clients, as documented.
const MAX_CLIENTS: usize = 100;
/// Maximum length of a message, as documented.
const MAX_MESSAGE: usize = 1 << 20;

/// Returns the resident memory of a process in bytes.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Waits until a process uses no processor time for half a second.
fn wait_until_idle(pid: u32) {
    let used = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
        // utime and stime, the fields 14 and 15 of proc_pid_stat(5).
        (fields[11].to_owned(), fields[12].to_owned())
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut last, mut since) = (used(), Instant::now());
    while since.elapsed() < Duration::from_millis(500) {
        assert!(Instant::now() < deadline, "the daemon does not come to rest");
        std::thread::sleep(Duration::from_millis(50));
        let now = used();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

#[test]
fn a_message_that_is_too_long_is_skipped() {
    let served = Served::start(&[]);
    let mut rpc = served.connect();
    // 2 MiB without a line break: the error comes before the end of the line.
    rpc.send(vec![b'x'; 2 << 20]);
    assert_eq!(rpc.answer()["error"]["code"], -32600);
    rpc.send("rest\n");
    rpc.call("version", &json!({}));
    // A message of the maximum length is accepted, and one byte more is not.
    for (len, fits) in [(MAX_MESSAGE, true), (MAX_MESSAGE + 1, false)] {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": "version"}).to_string();
        rpc.send(format!("{request}{}\n", " ".repeat(len - request.len())));
        assert_eq!(rpc.answer().get("result").is_some(), fits);
    }
    served.stop();
}

#[test]
fn malformed_bytes_get_errors_and_the_connection_stays() {
    let served = Served::start(&[]);
    let mut rpc = served.connect();
    let deep = |open: &str, close: &str| [open.repeat(100_000), close.repeat(100_000)].concat().into_bytes();
    for bytes in [
        b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}".to_vec(),
        b"\0\0\0".to_vec(),
        deep("[", "]"),
        deep("{\"a\":", "}"),
        b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"version\"}}".to_vec(),
        b"GET / HTTP/1.1\r".to_vec(),
    ] {
        rpc.send([bytes.as_slice(), b"\n"].concat());
        let answer = rpc.answer();
        assert_eq!((&answer["error"]["code"], &answer["id"]), (&json!(-32700), &json!(null)), "{answer}");
    }
    rpc.send("\n\r\n   \n");
    rpc.call("version", &json!({}));
    served.stop();
}

#[test]
fn random_bytes_get_an_answer_for_each_line_or_none() {
    let served = Served::start(&[]);
    let mut rng = Rng::from_env("random bytes");
    for _ in 0..20 {
        let mut rpc = served.connect();
        let mut bytes = vec![0; 20_000];
        for byte in &mut bytes {
            let syntax = rng.pick(b"[]{}\",:\n");
            *byte = if rng.below(16) == 0 { syntax } else { rng.next().to_be_bytes()[0] };
        }
        bytes.push(b'\n');
        let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()).count();
        rpc.send(&bytes);
        assert!(lines > 10);
        for _ in 0..lines {
            let code = rpc.answer()["error"]["code"].as_i64().expect("an error");
            assert!([-32700, -32600].contains(&code), "{code}");
        }
        rpc.call("version", &json!({}));
    }
    served.stop();
}

#[test]
fn of_1000_clients_100_are_served_and_the_others_are_refused() {
    let served = Served::start(&[]);
    // This process needs more than the usual 1024 descriptors.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("a higher limit");
    let mut all: Vec<Rpc> = (0..1000).map(|_| served.connect()).collect();
    let mut refused = 0;
    for (number, rpc) in all.iter_mut().enumerate() {
        if number < MAX_CLIENTS {
            rpc.call("version", &json!({}));
        } else {
            let error = rpc.answer();
            assert_eq!(error["error"]["code"], -2, "{error}");
            assert_eq!(rpc.receive(), None, "the connection is closed");
            refused += 1;
        }
    }
    assert_eq!(refused, 900);
    let log = served.daemon.log();
    assert_eq!(log.matches("are refused").count(), 1, "one line for all: {log}");
    // When a client leaves, another client is served.
    all.swap_remove(0);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut rpc = served.connect();
        rpc.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"version\"}\n");
        if rpc.answer().get("result").is_some() {
            break;
        }
        assert!(Instant::now() < deadline, "a place becomes free");
    }
    served.stop();
}

/// Twenty clients send requests and never read. Twenty others send half a message and wait. Meanwhile the daemon's
/// memory stays bounded, another client is served, and the daemon ends.
#[test]
fn clients_that_do_not_read_or_finish_block_no_other_and_not_the_end() {
    let served = Served::start(&[]);
    let mut good = served.connect();
    good.call("schema", &json!({}));
    let before = resident(served.daemon.pid());
    let mut half: Vec<Rpc> = (0..20).map(|_| served.connect()).collect();
    half.iter_mut().for_each(|rpc| rpc.send(r#"{"jsonrpc":"2.0","id":1,"meth"#));
    let batch = json!(vec![json!({"jsonrpc": "2.0", "id": 1, "method": "schema"}); 64]);
    let requests = [
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"schema\"}\n".repeat(100),
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"disks\"}\n".repeat(100),
        "]\n".repeat(1000),
        format!("{batch}\n"),
    ];
    let mut deaf = Vec::new();
    for request in requests.iter().cycle().take(20) {
        let mut stream = UnixStream::connect(&served.control).expect("the daemon listens");
        stream.set_nonblocking(true).expect("a socket");
        // Sends until the daemon reads no more, which shows that the daemon holds the client's requests back.
        let mut sent = 0;
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut last = Instant::now();
        while last.elapsed() < Duration::from_millis(300) {
            assert!(sent < 64 << 20 && Instant::now() < deadline, "the daemon reads without an end: {sent} bytes");
            match stream.write(request.as_bytes()) {
                Ok(count) => (sent, last) = (sent + count, Instant::now()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    good.call("version", &json!({}));
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => panic!("{e}"),
            }
        }
        deaf.push(stream);
    }
    good.call("disks", &json!({}));
    // When the daemon is idle, it has handled all requests that it will handle before the clients read.
    wait_until_idle(served.daemon.pid());
    let grown = resident(served.daemon.pid()).saturating_sub(before);
    assert!(grown < 128 << 20, "20 clients that do not read take {grown} bytes");
    for rpc in &mut half {
        rpc.send("od\":\"version\"}\n");
        assert!(rpc.answer().get("result").is_some());
    }
    let begun = Instant::now();
    served.stop();
    assert!(begun.elapsed() < Duration::from_secs(20), "the end took {:?}", begun.elapsed());
    drop(deaf);
}

#[test]
fn a_client_that_has_ended_its_side_gets_its_answers() {
    let served = Served::start(&[]);
    let mut rpc = served.connect();
    rpc.send(
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"disks\"}\n{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"version\"}\n{",
    );
    rpc.stream.get_ref().shutdown(std::net::Shutdown::Write).expect("a socket");
    let mut ids = [rpc.answer()["id"].as_u64(), rpc.answer()["id"].as_u64()];
    ids.sort_unstable();
    assert_eq!(ids, [Some(1), Some(2)]);
    assert_eq!(rpc.receive(), None, "then the connection is closed");
    // The daemon closes the connection of a client that has gone, even if it has no event to send to this client.
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", served.daemon.pid())).expect("the daemon").count();
    let before = descriptors();
    for _ in 0..50 {
        drop(served.connect());
        let mut watcher = served.connect();
        watcher.call("watch", &json!({}));
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while descriptors() > before {
        assert!(Instant::now() < deadline, "{} descriptors, before {before}", descriptors());
        std::thread::sleep(Duration::from_millis(10));
    }
    served.stop();
}
