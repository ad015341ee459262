//! Messages of JSON-RPC 2.0: requests of clients, answers, and notifications of events.

use serde_json::{Map, Value, json};

use super::rpc_error::{INVALID_REQUEST, PARSE_ERROR, RpcError};

/// Maximum length of a message in bytes, without the line break.
pub(super) const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Maximum number of requests in a batch.
pub(super) const MAX_BATCH: usize = 64;

/// A request.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct RpcCall {
    /// The id, which the answer repeats. `None` for a notification, which gets no answer.
    pub(super) id: Option<Value>,
    pub(super) method: String,
    /// The parameters by name; empty if there are none.
    pub(super) params: Map<String, Value>,
    /// Whether there are parameters, and they are given by position. No method has such parameters.
    pub(super) is_positional: bool,
}

/// The error of a message, or of an element of a batch, that is no valid request or exceeds a limit.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Rejected {
    /// The id of the request, or null if it cannot be determined.
    pub(super) id: Value,
    pub(super) error: Box<RpcError>,
}

/// A message of a client.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Message {
    Single(Result<RpcCall, Rejected>),
    Batch(Vec<Result<RpcCall, Rejected>>),
}

impl Message {
    /// Parses a line. A malformed line becomes a rejected request.
    pub(super) fn parse(line: &[u8]) -> Message {
        // The parser limits the depth of nesting, and with it its use of the stack.
        let value = match serde_json::from_slice(line) {
            Ok(value) => value,
            Err(e) => return Message::reject(PARSE_ERROR, format!("not JSON: {e}")),
        };
        match value {
            Value::Array(all) if all.is_empty() => Message::reject(INVALID_REQUEST, "an empty batch"),
            Value::Array(all) if all.len() > MAX_BATCH => {
                let why = format!("a batch has at most {MAX_BATCH} requests, and this one has {}", all.len());
                Message::reject(INVALID_REQUEST, why)
            }
            Value::Array(all) => Message::Batch(all.into_iter().map(parse_call).collect()),
            value => Message::Single(parse_call(value)),
        }
    }

    /// Returns the message for a line that is too long.
    pub(super) fn too_long() -> Message {
        Message::reject(INVALID_REQUEST, format!("a message has at most {MAX_MESSAGE_BYTES} bytes"))
    }

    fn reject(code: i64, why: impl Into<String>) -> Message {
        Message::Single(Err(Rejected { id: Value::Null, error: Box::new(RpcError::of_form(code, why)) }))
    }
}

fn parse_call(value: Value) -> Result<RpcCall, Rejected> {
    let reject =
        |id: &Value, why: &str| Rejected { id: id.clone(), error: Box::new(RpcError::of_form(INVALID_REQUEST, why)) };
    let Value::Object(mut members) = value else {
        return Err(reject(&Value::Null, "a request is an object"));
    };
    let id = members.remove("id");
    // A number that is not an integer could change on its way back.
    let known = match &id {
        None | Some(Value::Null | Value::String(_)) => id.clone().unwrap_or_default(),
        Some(Value::Number(number)) if !number.is_f64() => Value::Number(number.clone()),
        Some(_) => return Err(reject(&Value::Null, "the id is a string, an integer or null")),
    };
    if members.get("jsonrpc") != Some(&Value::from("2.0")) {
        return Err(reject(&known, "the member jsonrpc is \"2.0\""));
    }
    let Some(Value::String(method)) = members.remove("method") else {
        return Err(reject(&known, "the member method is a string"));
    };
    let (params, is_positional) = match members.remove("params") {
        None => (Map::new(), false),
        Some(Value::Object(params)) => (params, false),
        Some(Value::Array(params)) => (Map::new(), !params.is_empty()),
        Some(_) => return Err(reject(&known, "the member params is an object")),
    };
    Ok(RpcCall { id, method, params, is_positional })
}

/// Creates the answer to the request with this id.
pub(super) fn answer(id: &Value, outcome: Result<Value, RpcError>) -> Value {
    let mut answer = json!({"jsonrpc": "2.0", "id": id});
    match outcome {
        Ok(result) => answer["result"] = result,
        Err(error) => answer["error"] = json!(error),
    }
    answer
}

/// Creates the request of a client.
pub(super) fn request(id: u64, method: &str, params: &Value) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
}

/// Creates the notification of an event.
pub(super) fn notification(params: &Value) -> Vec<u8> {
    line(&json!({"jsonrpc": "2.0", "method": "event", "params": params}))
}

/// Encodes a message as a line.
pub(super) fn line(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn single(text: &str) -> Result<RpcCall, Rejected> {
        match Message::parse(text.as_bytes()) {
            Message::Single(call) => call,
            Message::Batch(_) => panic!("a batch: {text}"),
        }
    }

    #[test]
    fn requests_are_parsed() {
        let call = single(r#"{"jsonrpc":"2.0","id":7,"method":"disk","params":{"disk":"a"}}"#).unwrap();
        assert_eq!((call.id, call.method.as_str()), (Some(json!(7)), "disk"));
        assert_eq!(call.params["disk"], "a");
        let call = single(r#"{"jsonrpc":"2.0","method":"disks","params":[]}"#).unwrap();
        assert_eq!((call.id, call.is_positional), (None, false), "a notification");
        assert_eq!(single(r#"{"jsonrpc":"2.0","method":"x","id":null}"#).unwrap().id, Some(Value::Null));
        assert!(single(r#"{"jsonrpc":"2.0","method":"x","id":null,"params":[1]}"#).unwrap().is_positional);
        let id = json!(u64::MAX);
        assert_eq!(single(&format!(r#"{{"jsonrpc":"2.0","method":"x","id":{id}}}"#)).unwrap().id, Some(id));
    }

    #[test]
    fn malformed_messages_get_the_codes_of_json_rpc() {
        let deep = "[".repeat(100_000);
        let many = format!("[{}]", vec!["{}"; MAX_BATCH + 1].join(","));
        for (text, code, id) in [
            ("{", PARSE_ERROR, Value::Null),
            (&deep, PARSE_ERROR, Value::Null),
            (r#"{"jsonrpc":"2.0","method":"x","id":1} {}"#, PARSE_ERROR, Value::Null),
            ("\"\u{1}\"", PARSE_ERROR, Value::Null),
            ("[]", INVALID_REQUEST, Value::Null),
            (&many, INVALID_REQUEST, Value::Null),
            ("1", INVALID_REQUEST, Value::Null),
            ("{}", INVALID_REQUEST, Value::Null),
            (r#"{"jsonrpc":"1.0","method":"x","id":1}"#, INVALID_REQUEST, json!(1)),
            (r#"{"jsonrpc":"2.0","method":1,"id":"a"}"#, INVALID_REQUEST, json!("a")),
            (r#"{"jsonrpc":"2.0","method":"x","params":1,"id":2}"#, INVALID_REQUEST, json!(2)),
            (r#"{"jsonrpc":"2.0","method":"x","id":1.5}"#, INVALID_REQUEST, Value::Null),
            (r#"{"jsonrpc":"2.0","method":"x","id":[]}"#, INVALID_REQUEST, Value::Null),
            (r#"{"jsonrpc":"2.0","result":1,"id":3}"#, INVALID_REQUEST, json!(3)),
        ] {
            let rejected = single(text).unwrap_err();
            assert_eq!((rejected.error.code, rejected.id), (code, id), "{}", &text[..text.len().min(80)]);
        }
        for (depth, fits) in [(127, true), (128, false)] {
            let nested = Message::parse([vec![b'['; depth], vec![b']'; depth]].concat().as_slice());
            assert_eq!(matches!(nested, Message::Batch(_)), fits, "{depth}");
        }
        let invalid_utf8 = Message::parse(b"{\"jsonrpc\":\"2.0\",\"method\":\"\xff\",\"id\":1}");
        assert!(matches!(invalid_utf8, Message::Single(Err(r)) if r.error.code == PARSE_ERROR));
        assert!(matches!(Message::too_long(), Message::Single(Err(r)) if r.error.code == INVALID_REQUEST));
    }

    #[test]
    fn the_elements_of_a_batch_are_independent() {
        let text = br#"[{"jsonrpc":"2.0","method":"a","id":1}, 2, {"jsonrpc":"2.0","method":"b"}]"#;
        let Message::Batch(calls) = Message::parse(text) else { panic!("no batch") };
        let ok: Vec<bool> = calls.iter().map(Result::is_ok).collect();
        assert_eq!(ok, [true, false, true]);
    }

    #[test]
    fn answers_are_one_line() {
        let text = line(&answer(&json!("a\nb"), Ok(json!({"x": "\n"}))));
        assert_eq!(text.iter().filter(|byte| **byte == b'\n').count(), 1);
        let back: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(back, json!({"jsonrpc": "2.0", "id": "a\nb", "result": {"x": "\n"}}));
        let failed = answer(&Value::Null, Err(RpcError::of_form(PARSE_ERROR, "no")));
        assert_eq!(failed["error"], json!({"code": PARSE_ERROR, "message": "no"}));
    }

    /// Random bytes, and random changes of valid messages, are parsed or rejected without a panic.
    #[test]
    fn random_messages_never_panic() {
        let mut random = Random::from_env(1);
        let valid =
            br#"[{"jsonrpc":"2.0","method":"disk","id":1,"params":{"disk":"\u00e4"}},{"id":null,"params":[[]]}]"#;
        let (mut rejected, mut parsed) = (0, 0);
        for round in 0..20_000 {
            let mut bytes = valid.to_vec();
            if round % 2 == 0 {
                bytes = vec![0; random.index(200)];
                random.fill(&mut bytes);
            }
            for _ in 0..random.below(4) {
                let syntax = b"[]{}\",:01nte\\"[random.index(13)];
                if let Some(at) = (!bytes.is_empty()).then(|| random.index(bytes.len())) {
                    bytes[at] = if random.chance(1, 2) { syntax } else { random.next_u64().to_be_bytes()[0] };
                }
            }
            match Message::parse(&bytes) {
                Message::Single(Err(Rejected { error, .. })) => {
                    assert!([PARSE_ERROR, INVALID_REQUEST].contains(&error.code));
                    rejected += 1;
                }
                _ => parsed += 1,
            }
        }
        assert!(rejected > 1000 && parsed > 1000, "{rejected} rejected, {parsed} parsed");
    }
}
