//! The client's side of the protocol: one request at a time, and events.

use std::io::{BufRead, BufReader, ErrorKind as IoKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::message;
use super::rpc_error::RpcError;
use crate::error::{Error, ErrorKind, Result};

/// Time to wait for more bytes of the daemon while a call waits for its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to the control socket of a daemon.
pub struct ControlConnection {
    socket: BufReader<UnixStream>,
    path: PathBuf,
    last_id: u64,
}

impl ControlConnection {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// - `NotFound` if there is no socket
    /// - `Io` if no daemon listens on it, or this user may not connect
    pub fn open(path: &Path) -> Result<ControlConnection> {
        let failed = |e: std::io::Error| {
            let hint = match e.kind() {
                IoKind::NotFound => ": is the daemon running with --control?",
                IoKind::PermissionDenied => ": only the user of the daemon may connect",
                IoKind::ConnectionRefused => {
                    ": no daemon listens there; a killed daemon leaves its socket, and the next one replaces it"
                }
                _ => "",
            };
            Error::io(format!("cannot connect to the control socket{hint}"), e).at_path(path)
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
        Ok(ControlConnection { socket: BufReader::new(stream), path: path.to_path_buf(), last_id: 0 })
    }

    /// Calls a method and returns its result. Events that arrive before the answer are dropped.
    ///
    /// # Errors
    /// - the error of the answer
    /// - `Io` if the connection fails, the daemon ends, or nothing arrives for 30 seconds (no limit after
    ///   `remove_time_limit`)
    /// - `Invalid` if the answer is malformed
    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value> {
        self.last_id += 1;
        let request = message::line(&message::request(self.last_id, method, params));
        // Sending may fail although an answer has arrived: the daemon refuses a client with an error and closes the
        // connection. So an error of sending is reported only if there is no answer.
        let sent = self.socket.get_mut().write_all(&request);
        loop {
            let message = match self.next_message() {
                Ok(Some(message)) => message,
                Ok(None) | Err(_) if sent.is_err() => return sent.map(|()| Value::Null).map_err(|e| self.failed(e)),
                Ok(None) => {
                    let why =
                        "the connection ended without an answer: the daemon has ended, or the socket is that of a disk";
                    return Err(Error::new(ErrorKind::Io, why).at_path(&self.path));
                }
                Err(e) => return Err(e),
            };
            let id = message.get("id");
            if let Some(error) =
                message.get("error").filter(|_| id.is_some_and(|id| id.is_null() || *id == self.last_id))
            {
                let error: RpcError = serde_json::from_value(error.clone()).map_err(|e| self.malformed(e))?;
                return Err(error.into());
            }
            if id.is_some_and(|id| *id == self.last_id) {
                return Ok(message.get("result").cloned().unwrap_or_default());
            }
        }
    }

    /// Removes the time limit of the connection, for calls that may take long.
    ///
    /// # Errors
    /// `Io`
    pub fn remove_time_limit(&mut self) -> Result<()> {
        self.socket.get_ref().set_read_timeout(None).map_err(|e| self.failed(e))
    }

    /// Removes the time limit of the connection, waits for the next event and returns its members. Returns `None` when
    /// the daemon has closed the connection.
    ///
    /// # Errors
    /// - `Io` if the connection fails
    /// - `Invalid` if the message is malformed
    pub fn next_event(&mut self) -> Result<Option<Value>> {
        self.remove_time_limit()?;
        loop {
            match self.next_message()? {
                None => return Ok(None),
                Some(mut message) if message.get("method").is_some_and(|method| method == "event") => {
                    return Ok(Some(message["params"].take()));
                }
                Some(_) => {}
            }
        }
    }

    fn next_message(&mut self) -> Result<Option<Value>> {
        let mut line = Vec::new();
        match self.socket.read_until(b'\n', &mut line) {
            Ok(0) => Ok(None),
            Ok(_) => serde_json::from_slice(&line).map(Some).map_err(|e| self.malformed(e)),
            // The kernel reports this if the daemon closed the connection without reading everything.
            Err(e) if e.kind() == IoKind::ConnectionReset => Ok(None),
            Err(e) if e.kind() == IoKind::WouldBlock => {
                let why = format!("the daemon does not answer within {} seconds", ANSWER_TIMEOUT.as_secs());
                Err(Error::new(ErrorKind::Io, why).at_path(&self.path))
            }
            Err(e) => Err(self.failed(e)),
        }
    }

    fn failed(&self, e: std::io::Error) -> Error {
        Error::io("the connection to the daemon failed", e).at_path(&self.path)
    }

    fn malformed(&self, e: serde_json::Error) -> Error {
        Error::new(ErrorKind::Invalid, "the daemon sent a malformed message").caused_by(e).at_path(&self.path)
    }
}
