//! The verb `ctl`: finds the control socket of a daemon, calls a method, prints the result.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::args::CommonArgs;
use super::ctl_args::{CtlArgs, CtlVerb, StatsFormatArg};
use super::exit::Exit;
use super::output::{print_list, print_outcome, print_to_stdout};
use super::{ctl_print, ctl_stats, print, runtime_dir};
use crate::control::ControlConnection;
use crate::error::{Error, ErrorKind, Result};

/// Environment variable with the path of the control socket.
const VARIABLE: &str = "DIFFDISK_CONTROL";
/// End of the names of control sockets in the runtime folder.
const SUFFIX: &str = ".control";

/// Runs a verb of `ctl`. Returns its name and its outcome.
pub(super) fn run(args: &CtlArgs, common: &CommonArgs) -> (&'static str, Result<Exit>) {
    let (name, method) = match &args.verb {
        CtlVerb::Version => ("ctl version", "version"),
        CtlVerb::Disks => ("ctl disks", "disks"),
        CtlVerb::Disk { .. } => ("ctl disk", "disk"),
        CtlVerb::Stats { .. } => ("ctl stats", "stats"),
        CtlVerb::Snapshot(_) => ("ctl snapshot", "snapshot"),
        CtlVerb::Resize { .. } => ("ctl resize", "resize"),
        CtlVerb::Watch { .. } => ("ctl watch", "watch"),
        CtlVerb::Schema => ("ctl schema", "schema"),
        CtlVerb::Shutdown { .. } => ("ctl shutdown", "shutdown"),
    };
    (name, call(args, method, common))
}

fn call(args: &CtlArgs, method: &str, common: &CommonArgs) -> Result<Exit> {
    let mut daemon = connect(args.control.as_deref(), std::env::var_os(VARIABLE), common)?;
    if let CtlVerb::Snapshot(_) | CtlVerb::Resize { .. } = &args.verb {
        daemon.remove_time_limit()?;
    }
    let result = daemon.call(method, &params(&args.verb))?;
    match &args.verb {
        CtlVerb::Snapshot(_) if !args.json => return print_outcome(common, &ctl_print::snapshot(&result)),
        CtlVerb::Watch { .. } => return print_events(&mut daemon, args.json),
        CtlVerb::Shutdown { .. } => {
            let mut last = None;
            while let Some(event) = daemon.next_event()? {
                last = Some(event);
            }
            check_end(last.as_ref())?;
            if !args.json {
                return print_outcome(common, "the daemon has ended, and all disks are closed");
            }
        }
        _ => {}
    }
    let print = |out: &mut dyn Write| match &args.verb {
        _ if args.json => print::json(out, &result),
        CtlVerb::Version => ctl_print::version(out, &result),
        CtlVerb::Disks => ctl_print::disks(out, &result),
        CtlVerb::Disk { .. } => ctl_print::disk(out, &result),
        CtlVerb::Resize { disk, .. } => ctl_print::resized(out, disk, &result),
        CtlVerb::Stats { format: None, .. } => ctl_stats::statistics(out, &result),
        CtlVerb::Stats { format: Some(StatsFormatArg::Prometheus), .. } => ctl_print::text(out, &result),
        _ => print::json(out, &result),
    };
    print_to_stdout(print)?;
    Ok(Exit::Done)
}

/// Returns the parameters of the method.
fn params(verb: &CtlVerb) -> Value {
    let mut params = Map::new();
    let mut add = |name: &str, value: Option<Value>| params.extend(value.map(|value| (name.to_owned(), value)));
    match verb {
        CtlVerb::Version | CtlVerb::Disks | CtlVerb::Schema => {}
        CtlVerb::Disk { disk } => add("disk", Some(json!(disk))),
        CtlVerb::Stats { disk, format } => {
            add("disk", disk.as_ref().map(|disk| json!(disk)));
            let is_prometheus = *format == Some(StatsFormatArg::Prometheus);
            add("format", Some(json!(if is_prometheus { "prometheus" } else { "json" })));
        }
        CtlVerb::Snapshot(args) => {
            let disk = |(disk, keep_as): &(String, String)| json!({"disk": disk, "keep_as": keep_as});
            add("disks", Some(args.disks.iter().map(disk).collect()));
        }
        CtlVerb::Resize { disk, size } => {
            add("disk", Some(json!(disk)));
            add("size", Some(json!(size)));
        }
        CtlVerb::Watch { events } => add("events", (!events.is_empty()).then(|| json!(events))),
        CtlVerb::Shutdown { timeout_s } => add("timeout_s", timeout_s.map(|seconds| json!(seconds))),
    }
    Value::Object(params)
}

fn print_events(daemon: &mut ControlConnection, is_json: bool) -> Result<Exit> {
    let mut last = None;
    print_list(|check| {
        let mut out = io::stdout().lock();
        while let Some(event) = daemon.next_event()? {
            let printed = if is_json { writeln!(out, "{event}") } else { ctl_print::event(&mut out, &event) };
            check(printed.and_then(|()| out.flush()))?;
            last = Some(event);
        }
        check_end(last.as_ref())
    })
}

/// Checks, by the last event before the connection ended, that the daemon has closed all disks.
///
/// # Errors
/// `Io` if it has not.
fn check_end(last: Option<&Value>) -> Result<()> {
    let ended = last.filter(|event| event["kind"] == "ended");
    let what = match ended {
        Some(event) if event["clean"] == true => return Ok(()),
        Some(event) => {
            format!("the daemon has ended, and not all disks are closed ({})", event["reason"].as_str().unwrap_or("?"))
        }
        None => "the daemon ended without closing its disks, or the connection to it was lost".to_owned(),
    };
    let todo = "acknowledged writes are recovered by the next daemon or by `diffdisk settle IMAGE`";
    Err(Error::new(ErrorKind::Io, format!("{what}; {todo}")))
}

/// Connects to the daemon: to the socket `explicit`, or else to the socket `variable`, or else to the only daemon with
/// a control socket in the runtime folders.
fn connect(explicit: Option<&Path>, variable: Option<OsString>, common: &CommonArgs) -> Result<ControlConnection> {
    let variable = variable.filter(|path| !path.is_empty()).map(PathBuf::from);
    if let Some(path) = explicit.or(variable.as_deref()) {
        return ControlConnection::open(path);
    }
    // A folder that the user names may be on any file system. Of the default folders, only those on tmpfs are used.
    let folders: Vec<PathBuf> = match &common.runtime_dir {
        Some(folder) => vec![folder.clone()],
        None => runtime_dir::existing_folders(None)?.iter().map(|folder| folder.path().to_owned()).collect(),
    };
    let sockets = folders.iter().flat_map(|folder| control_sockets(folder));
    // A killed daemon leaves its socket, to which no program can connect.
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    for path in sockets {
        match ControlConnection::open(&path) {
            Ok(daemon) => found.push((path, daemon)),
            Err(e) => failed.push(e),
        }
    }
    let choose = format!("give --control, or set {VARIABLE}");
    match found.pop() {
        Some((_, daemon)) if found.is_empty() => Ok(daemon),
        // The only socket says best why there is no daemon.
        None if failed.len() == 1 => Err(failed.remove(0)),
        None => {
            let searched: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
            let searched = if searched.is_empty() { "there is none".into() } else { searched.join(", ") };
            let why = format!("no daemon has a control socket *{SUFFIX} in the runtime folder ({searched}): {choose}");
            Err(Error::new(ErrorKind::NotFound, why))
        }
        Some((last, _)) => {
            let paths = found.into_iter().map(|(path, _)| path).chain([last]);
            let paths: Vec<String> = paths.map(|path| path.display().to_string()).collect();
            let why = format!("several daemons have a control socket ({}): {choose}", paths.join(", "));
            Err(Error::new(ErrorKind::Refused, why))
        }
    }
}

/// Returns the control sockets in a folder, in the order of their names.
fn control_sockets(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_socket = |path: &PathBuf| std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let named = |path: &PathBuf| path.to_string_lossy().ends_with(SUFFIX);
    let mut sockets: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(named).filter(is_socket).collect();
    sockets.sort();
    sockets
}
