//! JSON Schemas of methods and events, and the parts that they are built from.

use serde_json::{Map, Value, json};

use super::rpc_error;

/// Returns the schema of an object. Other members than these are not allowed.
pub(super) fn object(required: &[(&str, Value)], optional: &[(&str, Value)]) -> Value {
    let members = required.iter().chain(optional);
    let properties: Map<String, Value> = members.map(|(name, schema)| ((*name).to_owned(), schema.clone())).collect();
    let required: Vec<&str> = required.iter().map(|(name, _)| *name).collect();
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

/// Returns the schema of an array.
pub(super) fn array(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

/// Returns the schema of a string.
pub(super) fn text() -> Value {
    json!({"type": "string"})
}

/// Returns the schema of one of several strings.
pub(super) fn one_of_texts(texts: Vec<Value>) -> Value {
    json!({"enum": texts})
}

/// Returns the schema of an integer that is not negative.
pub(super) fn integer() -> Value {
    json!({"type": "integer", "minimum": 0})
}

/// Returns the schema of a number that is not negative.
fn number() -> Value {
    json!({"type": "number", "minimum": 0})
}

/// Returns the schema of a truth value.
pub(super) fn boolean() -> Value {
    json!({"type": "boolean"})
}

/// Adds null to a schema of one type.
pub(super) fn nullable(mut schema: Value) -> Value {
    schema["type"] = json!([schema["type"], "null"]);
    schema
}

/// Returns the schema of values such as these examples, which have one type or are null. A value that is null in some
/// of the examples may be null, and a value that is null in all of them is always null. All members of an object are
/// required. An array without items in all examples has items of any type.
pub(super) fn of_examples(examples: &[&Value]) -> Value {
    let present: Vec<&Value> = examples.iter().copied().filter(|example| !example.is_null()).collect();
    let schema = match present.first() {
        None => return json!({"type": "null"}),
        Some(Value::Null | Value::Bool(_)) => boolean(),
        Some(Value::Number(first)) if first.is_f64() => number(),
        Some(Value::Number(_)) => integer(),
        Some(Value::String(_)) => text(),
        Some(Value::Array(_)) => {
            let items: Vec<&Value> = present.iter().filter_map(|array| array.as_array()).flatten().collect();
            array(if items.is_empty() { json!({}) } else { of_examples(&items) })
        }
        Some(Value::Object(first)) => {
            let of_member =
                |name: &String| of_examples(&present.iter().map(|example| &example[name]).collect::<Vec<_>>());
            let members: Vec<(&str, Value)> = first.keys().map(|name| (name.as_str(), of_member(name))).collect();
            object(&members, &[])
        }
    };
    if present.len() < examples.len() { nullable(schema) } else { schema }
}

/// Returns the schema of the member `error` of an answer.
pub(super) fn error() -> Value {
    let data = object(
        &[
            ("path", nullable(text())),
            ("offset", nullable(integer())),
            ("causes", array(text())),
            ("hint", nullable(text())),
        ],
        &[],
    );
    let codes = json!([
        rpc_error::PARSE_ERROR,
        rpc_error::INVALID_REQUEST,
        rpc_error::METHOD_NOT_FOUND,
        rpc_error::INVALID_PARAMS,
        rpc_error::INTERNAL_ERROR,
        -1,
        -2,
        -3,
        -4,
        -5,
        -6,
        -7,
        -8,
        -9,
    ]);
    object(&[("code", json!({"enum": codes})), ("message", text())], &[("data", data)])
}
