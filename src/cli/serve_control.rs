//! The control socket of the daemon: creates the socket, and ends the daemon when a client requests it.

use std::path::Path;
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use log::{error, info};

use super::signals::StopSocket;
use super::start::{PREDECESSOR_SOCKET_TIMEOUT, VERSION, retry_while_busy};
use crate::control::{ControlContext, ControlServer, DiskRegistry, EventHub, ShutdownRequest};
use crate::error::Result;
use crate::vhost::{Listener, SocketAccess};

/// Creates the control socket at `path` and starts its thread. Returns `None` if a stop signal arrives before.
///
/// # Errors
/// - `Busy` if another daemon uses the socket
/// - `Refused` if `path` exists and is not a socket
/// - `NotFound` if the folder does not exist
/// - `Io`
pub(super) fn start(
    path: &Path,
    disks: &Arc<DiskRegistry>,
    events: Arc<EventHub>,
    stop: &StopSocket,
) -> Result<Option<ControlServer>> {
    // Only the owner may connect.
    let bind = || Listener::bind(path, SocketAccess::default());
    let Some(listener) = retry_while_busy(PREDECESSOR_SOCKET_TIMEOUT, "control socket", &stop.stop, bind)? else {
        return Ok(None);
    };
    let context = ControlContext { version: VERSION, disks: disks.clone(), events, shutdown: shutdown_request(stop)? };
    let server = ControlServer::start(listener, context)?;
    info!("control socket on {}", path.display());
    Ok(Some(server))
}

/// Returns a function that ends the daemon as a signal does, and exits after a time limit if there is one.
fn shutdown_request(stop: &StopSocket) -> Result<ShutdownRequest> {
    let stop = stop.stopper()?;
    Ok(Box::new(move |limit| {
        if let Some(limit) = limit {
            exit_after(limit);
        }
        stop();
    }))
}

/// Exits after `limit`, unless the process has ended before. The next daemon then recovers the acknowledged writes, as
/// after a kill.
fn exit_after(limit: Duration) {
    let exit = move || {
        thread::sleep(limit);
        error!("the disks are not closed {} s after the request to end; the daemon exits", limit.as_secs());
        process::exit(1);
    };
    if let Err(e) = thread::Builder::new().name("exit".into()).spawn(exit) {
        error!("the time limit of the request to end is not kept: {e}");
    }
}
