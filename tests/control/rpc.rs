//! A client that sends any bytes.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// Maximum wait for a message.
const TIMEOUT: Duration = Duration::from_secs(30);

pub struct Rpc {
    pub stream: BufReader<UnixStream>,
    /// Events that arrived while the test waited for an answer.
    events: VecDeque<Value>,
}

impl Rpc {
    pub fn connect(path: &Path) -> Rpc {
        let stream = UnixStream::connect(path).expect("the daemon listens");
        stream.set_read_timeout(Some(TIMEOUT)).expect("a time limit");
        Rpc { stream: BufReader::new(stream), events: VecDeque::new() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).expect("the daemon reads");
    }

    /// Returns the next message. `None` if the daemon closed the connection.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => None,
            Err(e) => panic!("no message: {e}"),
        }
    }

    /// Returns the next answer.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        loop {
            let message = self.receive().expect("the connection stays");
            if message.get("method").is_none() {
                return message;
            }
            self.events.push_back(message["params"].clone());
        }
    }

    /// Calls a method. Returns its answer.
    #[track_caller]
    pub fn request(&mut self, method: &str, params: &Value) -> Value {
        let request = json!({"jsonrpc": "2.0", "id": method, "method": method, "params": params});
        self.send(format!("{request}\n"));
        let answer = self.answer();
        assert_eq!((&answer["jsonrpc"], &answer["id"]), (&json!("2.0"), &json!(method)), "{answer}");
        answer
    }

    /// Calls a method. Returns its result.
    #[track_caller]
    pub fn call(&mut self, method: &str, params: &Value) -> Value {
        let mut answer = self.request(method, params);
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer.as_object_mut().and_then(|answer| answer.remove("result")).expect("a result")
    }

    /// Calls a method that fails. Returns the error.
    #[track_caller]
    pub fn error(&mut self, method: &str, params: &Value) -> Value {
        let mut answer = self.request(method, params);
        assert!(answer.get("result").is_none(), "{method}: {answer}");
        answer["error"].take()
    }

    /// Returns the members of the next event.
    #[track_caller]
    pub fn event(&mut self) -> Value {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        let message = self.receive().expect("the connection stays");
        assert_eq!(message["method"], "event", "{message}");
        message["params"].clone()
    }
}
