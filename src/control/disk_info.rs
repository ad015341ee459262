//! The methods `disks` and `disk`: what a disk is, which files it consists of, and its state.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::registry::ServedDisk;
use super::schema::{array, boolean, integer, nullable, object, one_of_texts, text};
use crate::units::SECTOR;

/// Parameters of methods that concern one disk.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DiskParams {
    /// Name of the disk.
    pub(super) disk: String,
}

/// A served disk, as clients receive it. In texts, bytes that are not UTF-8 become replacement characters.
#[derive(Serialize)]
pub(super) struct DiskInfo {
    name: String,
    /// Path of the youngest image.
    path: String,
    /// Size of the disk in bytes.
    size: u64,
    read_only: bool,
    serial: String,
    cache: &'static str,
    /// Path of the socket. `None` if a connection was handed over.
    socket: Option<String>,
    queues: u16,
    queue_size: u16,
    engine: &'static str,
    front_end: FrontEndInfo,
    state: DiskState,
    /// The files, youngest first.
    chain: Vec<LayerInfo>,
    /// Running operations on the chain. There are none.
    jobs: [(); 0],
}

#[derive(Serialize)]
struct FrontEndInfo {
    connected: bool,
    pid: Option<i32>,
    uid: Option<u32>,
}

#[derive(Serialize)]
struct LayerInfo {
    path: String,
    uuid: String,
    /// Bytes that the file occupies in the file system. `None` if the file system does not report them.
    allocated: Option<u64>,
}

/// Whether a disk takes writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DiskState {
    Serving,
    /// The file system is full, so writes wait or fail.
    Full,
    /// The top is poisoned, for example because a sync failed. Writes fail until the image is opened again.
    Poisoned,
}

impl DiskState {
    pub(super) fn of(served: &ServedDisk) -> DiskState {
        if served.disk.is_poisoned() {
            DiskState::Poisoned
        } else if served.disk.is_full() {
            DiskState::Full
        } else {
            DiskState::Serving
        }
    }
}

/// Describes a disk. Waits for the file systems of its files.
pub(super) fn describe(served: &ServedDisk) -> DiskInfo {
    let (disk, server) = (&served.disk, &served.server);
    let version = disk.version();
    let chain: Vec<LayerInfo> = version
        .images()
        .map(|image| LayerInfo {
            path: image.file().path().display().to_string(),
            uuid: image.uuid().to_string(),
            allocated: image.file().stat().ok().map(|stat| stat.allocated),
        })
        .collect();
    let front_end = server.front_end();
    DiskInfo {
        name: served.name.clone(),
        path: chain.first().map(|layer| layer.path.clone()).unwrap_or_default(),
        size: disk.capacity().saturating_mul(SECTOR),
        read_only: disk.is_read_only(),
        serial: String::from_utf8_lossy(disk.serial()).trim_end_matches('\0').to_owned(),
        cache: if server.write_back() { "writeback" } else { "writethrough" },
        socket: server.socket().map(|path| path.display().to_string()),
        queues: server.queues(),
        queue_size: server.queue_size(),
        engine: server.engine(),
        front_end: FrontEndInfo {
            connected: front_end.is_some(),
            pid: front_end.and_then(|peer| peer.pid()),
            uid: front_end.and_then(|peer| peer.uid()),
        },
        state: DiskState::of(served),
        chain,
        jobs: [],
    }
}

pub(super) fn params_schema() -> Value {
    object(&[("disk", text())], &[])
}

/// Returns the schema of a disk.
pub(super) fn result_schema() -> Value {
    let front_end =
        object(&[("connected", boolean()), ("pid", nullable(integer())), ("uid", nullable(integer()))], &[]);
    let layer = object(&[("path", text()), ("uuid", text()), ("allocated", nullable(integer()))], &[]);
    let texts = |texts: &[&str]| one_of_texts(texts.iter().map(|text| json!(text)).collect());
    let members = [
        ("name", text()),
        ("path", text()),
        ("size", integer()),
        ("read_only", boolean()),
        ("serial", text()),
        ("cache", texts(&["writeback", "writethrough"])),
        ("socket", nullable(text())),
        ("queues", integer()),
        ("queue_size", integer()),
        ("engine", text()),
        ("front_end", front_end),
        ("state", json!({"enum": [DiskState::Serving, DiskState::Full, DiskState::Poisoned]})),
        ("chain", array(layer)),
        ("jobs", array(json!({"type": "object"}))),
    ];
    object(&members, &[])
}
