//! The method `snapshot`: keeps the contents that running disks have at one moment.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{info, warn};
use serde::Deserialize;
use serde_json::{Value, json};

use super::context::ControlContext;
use super::event_hub::micros;
use super::keep_as;
use super::registry::{DiskRegistry, ServedDisk};
use super::rpc_error::RpcError;
use super::schema::{array, integer, object, text};
use crate::disk::{self, SnapshotReport, SnapshotRequest};
use crate::error::{Error, ErrorKind};
use crate::event::DiskEvent;

/// Parameters of `snapshot`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SnapshotParams {
    disks: Vec<DiskToKeep>,
}

/// A disk of the snapshot.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskToKeep {
    /// Name of the disk.
    disk: String,
    /// Path of the kept image, with placeholders.
    keep_as: String,
}

/// Takes the snapshot, and reports one event for each disk. The log has the outcome, since the client may have
/// disconnected.
///
/// # Errors
/// - `Invalid` if there are no disks, a disk or a path is given twice, or a path is malformed
/// - `NotFound` if a disk or the folder of a path does not exist
/// - `Refused` if a disk is read-only
/// - the errors of [`disk::snapshot`]
pub(super) fn take(context: &ControlContext, params: SnapshotParams) -> Result<Value, RpcError> {
    let taken = requests(&context.disks, params).and_then(|requests| Ok(disk::snapshot(&requests)?));
    match taken {
        Ok(report) => {
            publish(context, &report);
            Ok(result(&report))
        }
        Err(error) => {
            warn!("a snapshot failed: {}", Error::from(error.clone()).line());
            Err(error)
        }
    }
}

/// Returns the requests for [`disk::snapshot`].
fn requests(disks: &DiskRegistry, params: SnapshotParams) -> Result<Vec<SnapshotRequest>, RpcError> {
    if params.disks.is_empty() {
        return Err(invalid("a snapshot needs at least one disk".into()));
    }
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut requests: Vec<SnapshotRequest> = Vec::new();
    for DiskToKeep { disk, keep_as } in params.disks {
        let served = disks.find(&disk)?;
        if requests.iter().any(|request| request.name == disk) {
            return Err(invalid(format!("the disk {disk:?} is given twice")));
        }
        let path = keep_as::resolve(&keep_as::expand(&keep_as, &disk, unix)?, &active_path(&served)?)?;
        if let Some(other) = requests.iter().find(|request| request.keep_as == path) {
            let why = format!("the disks {:?} and {disk:?} cannot both be kept as {}", other.name, path.display());
            return Err(invalid(why).with_hint("give each disk another path, for example with {name}"));
        }
        requests.push(SnapshotRequest { disk: served.disk.clone(), name: disk, keep_as: path });
    }
    Ok(requests)
}

/// Returns the path of the image that takes the writes.
///
/// # Errors
/// `Refused` if the disk is read-only.
fn active_path(served: &ServedDisk) -> Result<PathBuf, Error> {
    let version = served.disk.version();
    let top = version.top().ok_or_else(|| {
        Error::new(
            ErrorKind::Refused,
            format!("the disk {:?} is read-only, so its contents do not change", served.name),
        )
    })?;
    Ok(top.image.path().to_path_buf())
}

fn invalid(why: String) -> RpcError {
    Error::new(ErrorKind::Invalid, why).into()
}

/// Logs the snapshot, and reports its events.
fn publish(context: &ControlContext, report: &SnapshotReport) {
    for member in &report.members {
        let (kept, uuid, pause) = (member.kept.clone(), member.uuid, report.pause);
        info!("snapshot of {} kept as {} ({uuid}); writes waited {} us", member.disk, kept.display(), micros(pause));
        context.events.reporter(&member.disk).report(DiskEvent::Snapshot { kept, uuid, pause });
    }
}

fn result(report: &SnapshotReport) -> Value {
    let members = report.members.iter().map(|member| {
        json!({"disk": member.disk, "kept": member.kept.display().to_string(), "uuid": member.uuid.to_string()})
    });
    json!({
        "pause_us": micros(report.pause),
        "held_flush_us": micros(report.held_flush),
        "members": members.collect::<Vec<Value>>(),
    })
}

pub(super) fn params_schema() -> Value {
    let mut disks = array(object(&[("disk", text()), ("keep_as", text())], &[]));
    disks["minItems"] = json!(1);
    object(&[("disks", disks)], &[])
}

pub(super) fn result_schema() -> Value {
    let member = object(&[("disk", text()), ("kept", text()), ("uuid", text())], &[]);
    object(&[("pause_us", integer()), ("held_flush_us", integer()), ("members", array(member))], &[])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use uuid::Uuid;

    use super::super::event_hub::EventHub;
    use super::*;
    use crate::disk::KeptImage;

    fn report() -> SnapshotReport {
        let member = |disk: &str| KeptImage {
            disk: disk.into(),
            kept: format!("/x/{disk}.vhd").into(),
            uuid: Uuid::from_u128(7),
        };
        SnapshotReport {
            pause: Duration::from_nanos(412_900),
            held_flush: Duration::from_millis(3),
            members: vec![member("a"), member("b")],
        }
    }

    #[test]
    fn the_result_has_times_in_microseconds_and_all_members() {
        let uuid = "00000000-0000-0000-0000-000000000007";
        let expected = json!({
            "pause_us": 412,
            "held_flush_us": 3000,
            "members": [
                {"disk": "a", "kept": "/x/a.vhd", "uuid": uuid},
                {"disk": "b", "kept": "/x/b.vhd", "uuid": uuid},
            ],
        });
        assert_eq!(result(&report()), expected);
    }

    #[test]
    fn each_disk_has_an_event() {
        let events = EventHub::new().unwrap();
        let context = ControlContext {
            version: "1",
            disks: Default::default(),
            events: events.clone(),
            shutdown: Box::new(|_| ()),
        };
        publish(&context, &report());
        let taken = events.take().events;
        assert_eq!(taken.len(), 2);
        for (event, disk) in taken.iter().zip(["a", "b"]) {
            let event: Value = serde_json::from_slice(&event.line).unwrap();
            let params = &event["params"];
            assert_eq!((&params["kind"], &params["disk"]), (&json!("snapshot"), &json!(disk)));
            assert_eq!((&params["pause_us"], &params["kept"]), (&json!(412), &json!(format!("/x/{disk}.vhd"))));
        }
    }

    #[test]
    fn a_snapshot_of_no_or_unknown_disks_is_refused() {
        let disks = DiskRegistry::default();
        let code = |params: Value| requests(&disks, serde_json::from_value(params).unwrap()).err().unwrap().code;
        assert_eq!(code(json!({"disks": []})), -8);
        assert_eq!(code(json!({"disks": [{"disk": "a", "keep_as": "b"}]})), -3);
    }
}
