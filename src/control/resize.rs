//! The method `resize`: grows a disk while it is served, and notifies its front-end.

use serde::Deserialize;
use serde_json::{Value, json};

use super::context::ControlContext;
use super::rpc_error::{INVALID_PARAMS, RpcError};
use super::schema::{boolean, integer, object, text};
use crate::disk::live_resize;
use crate::units::parse_byte_size;

/// Parameters of `resize`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ResizeParams {
    /// Name of the disk.
    disk: String,
    /// New size of the disk.
    size: SizeParam,
}

/// A size: a number of bytes, or a text with an optional unit.
#[derive(Deserialize)]
#[serde(untagged)]
enum SizeParam {
    Bytes(u64),
    Text(String),
}

/// Grows a disk, and notifies its front-end if the size has changed. Waits for the storage and for the queues of the
/// disk.
///
/// # Errors
/// - `INVALID_PARAMS` if the text is no size
/// - `NotFound` if the disk does not exist
/// - the errors of [`live_resize::resize`]
pub(super) fn run(context: &ControlContext, params: ResizeParams) -> Result<Value, RpcError> {
    let size = match params.size {
        SizeParam::Bytes(bytes) => bytes,
        SizeParam::Text(text) => parse_byte_size(&text).map_err(|e| RpcError::of_form(INVALID_PARAMS, e))?,
    };
    let served = context.disks.find(&params.disk)?;
    let before = served.disk.capacity();
    let resized = live_resize::resize(&served.disk, size);
    // The size may have changed even if the resize fails.
    let has_changed = served.disk.capacity() != before;
    let front_end_told = has_changed && served.server.send_config_change();
    let report = resized.inspect_err(|e| log::warn!("disk {}: a resize failed: {}", served.name, e.line()))?;
    let pause = u64::try_from(report.pause.as_micros()).unwrap_or(u64::MAX);
    log::info!("disk {}: has {} bytes now; writes waited for {pause} us", served.name, report.size);
    Ok(json!({"pause_us": pause, "size": report.size, "front_end_told": front_end_told}))
}

pub(super) fn params_schema() -> Value {
    let size = json!({"oneOf": [{"type": "integer", "minimum": 0}, text()]});
    object(&[("disk", text()), ("size", size)], &[])
}

pub(super) fn result_schema() -> Value {
    object(&[("pause_us", integer()), ("size", integer()), ("front_end_told", boolean())], &[])
}
