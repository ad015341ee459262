//! The table of methods: names, schemas, and the functions that carry them out.
//!
//! A new method is one row of [`METHODS`]. Its parameters are a struct that serde parses, and refuses if a member is
//! unknown; its schemas stand next to the struct.

use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::context::ControlContext;
use super::message::{MAX_BATCH, MAX_MESSAGE_BYTES, RpcCall};
use super::rpc_error::{INVALID_PARAMS, RpcError};
use super::schema::{self, array, integer, object, text};
use super::watch::{Subscription, WatchParams};
use super::{disk_info, resize, snapshot, stats, watch};

/// Version of the protocol. It changes if a method, a member or an event changes its meaning or is removed.
const PROTOCOL: u64 = 1;
/// Longest time in seconds that `shutdown` accepts.
const MAX_SHUTDOWN_SECONDS: u64 = 86_400;

/// The outcome of a method: the result, or the error for the answer.
pub(super) type Outcome = Result<Value, RpcError>;
/// The parameters of a call, by name.
pub(super) type Params = Map<String, Value>;

/// A method of the protocol.
pub(super) struct Method {
    pub(super) name: &'static str,
    summary: &'static str,
    params: fn() -> Value,
    result: fn() -> Value,
    /// Whether calls are logged with the caller, because they change something.
    pub(super) is_logged: bool,
    pub(super) run: Run,
}

/// The function of a method, and the thread that calls it.
#[derive(Clone, Copy)]
pub(super) enum Run {
    /// Called by the server thread, so it must not wait.
    Here(fn(&ControlContext, Params) -> Outcome),
    /// Called by the thread for slow calls, because it may wait for a file system.
    Apart(fn(&ControlContext, Params) -> Outcome),
    /// Called by a thread of its own, because it changes disks and may take long.
    Change(fn(&ControlContext, Params) -> Outcome),
    /// Called by the server thread; changes the subscription of the client.
    Subscribe(fn(&ControlContext, Params, &mut Subscription) -> Outcome),
}

/// All methods.
pub(super) const METHODS: &[Method] = &[
    Method {
        name: "version",
        summary: "Returns program, version of the program, and version of the protocol.",
        params: no_members,
        result: || object(&[("program", text()), ("version", text()), ("protocol", integer())], &[]),
        is_logged: false,
        run: Run::Here(version),
    },
    Method {
        name: "schema",
        summary: "Returns JSON Schemas of all methods, events and errors.",
        params: no_members,
        result: || json!({"type": "object"}),
        is_logged: false,
        run: Run::Here(|_, params| parse(params).map(|NoParams {}| document())),
    },
    Method {
        name: "disks",
        summary: "Describes all disks.",
        params: no_members,
        result: || array(disk_info::result_schema()),
        is_logged: false,
        run: Run::Apart(disks),
    },
    Method {
        name: "disk",
        summary: "Describes one disk.",
        params: disk_info::params_schema,
        result: disk_info::result_schema,
        is_logged: false,
        run: Run::Apart(disk),
    },
    Method {
        name: "stats",
        summary: "Returns the statistics of one disk or all disks, as JSON or as text in Prometheus' format.",
        params: stats::params_schema,
        result: stats::result_schema,
        is_logged: false,
        run: Run::Apart(statistics),
    },
    Method {
        name: "snapshot",
        summary: "Keeps the contents of disks at one moment, each in an image of its own. The guests continue.",
        params: snapshot::params_schema,
        result: snapshot::result_schema,
        is_logged: true,
        run: Run::Change(|context, params| snapshot::take(context, parse(params)?)),
    },
    Method {
        name: "resize",
        summary: "Makes a disk larger while it is served, and tells its front-end.",
        params: resize::params_schema,
        result: resize::result_schema,
        is_logged: true,
        run: Run::Change(|context, params| resize::run(context, parse(params)?)),
    },
    Method {
        name: "watch",
        summary: "Selects the kinds of events that this client receives as notifications, instead of those before.",
        params: watch::params_schema,
        result: watch::result_schema,
        is_logged: false,
        run: Run::Subscribe(|context, params, subscription| {
            parse(params).map(|params: WatchParams| subscription.replace(params, &context.events))
        }),
    },
    Method {
        name: "shutdown",
        summary: "Ends the daemon as SIGTERM does: drains the queues, commits, and closes the images.",
        params: || {
            object(&[], &[("timeout_s", json!({"type": "integer", "minimum": 1, "maximum": MAX_SHUTDOWN_SECONDS}))])
        },
        result: || json!({"type": "null"}),
        is_logged: true,
        run: Run::Here(shutdown),
    },
];

/// Returns the method with this name.
pub(super) fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name)
}

/// Returns the parameters of a call.
///
/// # Errors
/// [`INVALID_PARAMS`] if they were given by position.
pub(super) fn params(call: &mut RpcCall) -> Result<Params, RpcError> {
    match call.is_positional {
        true => Err(RpcError::of_form(INVALID_PARAMS, "parameters are given by name, in an object")),
        false => Ok(std::mem::take(&mut call.params)),
    }
}

fn parse<T: DeserializeOwned>(params: Params) -> Result<T, RpcError> {
    serde_json::from_value(Value::Object(params)).map_err(|e| RpcError::of_form(INVALID_PARAMS, e.to_string()))
}

/// Parameters of methods that have none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

fn no_members() -> Value {
    object(&[], &[])
}

fn version(context: &ControlContext, params: Params) -> Outcome {
    let NoParams {} = parse(params)?;
    Ok(json!({"program": "diffdiskd", "version": context.version, "protocol": PROTOCOL}))
}

fn disks(context: &ControlContext, params: Params) -> Outcome {
    let NoParams {} = parse(params)?;
    Ok(json!(context.disks.all().iter().map(|served| disk_info::describe(served)).collect::<Vec<_>>()))
}

fn disk(context: &ControlContext, params: Params) -> Outcome {
    let params: disk_info::DiskParams = parse(params)?;
    let served = context.disks.find(&params.disk)?;
    Ok(json!(disk_info::describe(&served)))
}

fn statistics(context: &ControlContext, params: Params) -> Outcome {
    let params: stats::StatsParams = parse(params)?;
    let disks = match &params.disk {
        Some(name) => vec![context.disks.find(name)?],
        None => context.disks.all(),
    };
    Ok(stats::collect(&disks, params.format))
}

/// Parameters of `shutdown`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ShutdownParams {
    timeout_s: Option<u64>,
}

fn shutdown(context: &ControlContext, params: Params) -> Outcome {
    let ShutdownParams { timeout_s } = parse(params)?;
    if timeout_s.is_some_and(|seconds| !(1..=MAX_SHUTDOWN_SECONDS).contains(&seconds)) {
        return Err(RpcError::of_form(INVALID_PARAMS, format!("timeout_s is 1 to {MAX_SHUTDOWN_SECONDS}")));
    }
    (context.shutdown)(timeout_s.map(Duration::from_secs));
    Ok(Value::Null)
}

/// Returns the result of `schema`.
fn document() -> Value {
    let describe = |method: &Method| {
        let (params, result) = ((method.params)(), (method.result)());
        (method.name.to_owned(), json!({"summary": method.summary, "params": params, "result": result}))
    };
    let methods: Map<String, Value> = METHODS.iter().map(describe).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Control protocol of diffdiskd",
        "protocol": PROTOCOL,
        "max_message_bytes": MAX_MESSAGE_BYTES,
        "max_batch": MAX_BATCH,
        "methods": methods,
        "events": watch::event_schemas(),
        "error": schema::error(),
    })
}
