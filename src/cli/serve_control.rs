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

/// Creates the control socket at `path`. Clients may connect, and are served after [`start`]. Returns `None` if a stop
/// signal arrives before.
///
/// # Errors
/// - `Busy` if another daemon uses the socket
/// - `Refused` if `path` exists and is not a socket
/// - `NotFound` if the folder does not exist
/// - `Io`
pub(super) fn bind(path: &Path, stop: &StopSocket) -> Result<Option<Listener>> {
    // Only the owner may connect.
    let bind = || Listener::bind(path, SocketAccess::default());
    let listener = retry_while_busy(PREDECESSOR_SOCKET_TIMEOUT, "control socket", &stop.stop, bind)?;
    if listener.is_some() {
        info!("control socket on {}", path.display());
    }
    Ok(listener)
}

/// Starts the thread that serves the clients of the control socket.
///
/// # Errors
/// `Io` if a thread cannot be started, or the process has no file descriptors left.
pub(super) fn start(
    listener: Listener,
    disks: &Arc<DiskRegistry>,
    events: Arc<EventHub>,
    stop: &StopSocket,
) -> Result<ControlServer> {
    let context = ControlContext { version: VERSION, disks: disks.clone(), events, shutdown: shutdown_request(stop)? };
    ControlServer::start(listener, context)
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
