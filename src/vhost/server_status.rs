//! The properties and the state of a served disk that other floors read while the control thread serves it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::backend_channel::BackendChannel;
use super::socket::Peer;
use crate::disk::Disk;
use crate::event::DiskEvent;

/// Socket, queues and connected front-end of a served disk.
#[derive(Debug)]
pub struct ServerStatus {
    socket: Option<PathBuf>,
    queues: u16,
    queue_size: u16,
    write_back: bool,
    engine: &'static str,
    front_end: Mutex<Option<Peer>>,
    /// The back-end channel of the connected front-end, if it has set one and accepts messages about the configuration.
    backend_channel: Mutex<Option<BackendChannel>>,
}

impl ServerStatus {
    /// Creates the state of a disk without a front-end.
    pub(super) fn new(
        socket: Option<PathBuf>,
        (queues, queue_size): (u16, u16),
        write_back: bool,
        engine: &'static str,
    ) -> ServerStatus {
        ServerStatus {
            socket,
            queues,
            queue_size,
            write_back,
            engine,
            front_end: Mutex::default(),
            backend_channel: Mutex::default(),
        }
    }

    /// Path of the socket. `None` if a connection was handed over.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// Number of queues that are offered.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Expected size of a queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Whether the device offers the guest a write cache.
    pub fn write_back(&self) -> bool {
        self.write_back
    }

    /// Name of the I/O engine.
    pub fn engine(&self) -> &'static str {
        self.engine
    }

    /// The connected front-end.
    pub fn front_end(&self) -> Option<Peer> {
        *self.front_end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the back-end channel of the connected front-end.
    pub(super) fn set_backend_channel(&self, channel: Option<BackendChannel>) {
        *self.backend_channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
    }

    /// Notifies the front-end that the configuration space has changed, for example the capacity. Does not wait.
    /// Returns whether the message was sent. Returns false if no front-end is connected, the front-end has set no
    /// back-end channel or does not accept such messages, or the socket does not accept the message.
    pub fn send_config_change(&self) -> bool {
        let channel = self.backend_channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.as_ref().is_some_and(BackendChannel::send_config_change)
    }

    /// Records that a front-end connected (`connected`) or disconnected, and reports the event.
    pub(super) fn set_front_end(&self, peer: Peer, connected: bool, disk: &Disk) {
        *self.front_end.lock().unwrap_or_else(PoisonError::into_inner) = connected.then_some(peer);
        self.set_backend_channel(None);
        disk.events().report(DiskEvent::FrontEnd { connected, pid: peer.pid(), uid: peer.uid() });
    }
}
