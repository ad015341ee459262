//! Floor 6: the control socket. Programs ask the daemon about its disks, watch events, and end the daemon.
//!
//! The protocol is JSON-RPC 2.0, one message a line, over a Unix stream socket (`docs/control.md`). This floor owns the
//! socket's clients, the messages, the methods and the delivery of events. The floors below report events to it
//! ([`EventHub`]), and are read by its methods.
//!
//! ```text
//!                                ┌─ client ──────────────────────────────────────┐
//!   socket ── server ──────────> │ line_buffer ─> message ─> methods ─> outbox ─>│ ──> socket
//!             (one thread)       └────────────────────────────┬──────────^───────┘
//!                                                             │          │
//!                          registry <── disk_info, stats, <───┤     slow_calls   answers of other threads
//!                          (name -> Disk,   snapshot          └────────> │
//!                           ServerStatus)
//!   image, disk, vhost ──> event_hub ──> server ──> outbox of each client that watches
//!
//!   connection   the client's side of the protocol, for `diffdisk ctl`
//!   rpc_error, schema   errors and the schema of the methods
//!   keep_as      the paths of kept images, for `snapshot`
//! ```
//!
//! * One thread serves all clients, and waits only in `epoll_wait`. No other thread waits for it: the threads of queues
//!   only append an event to a queue of limited length.
//! * The memory that a client can make the daemon use is limited: the bytes of a message, the requests that wait, the
//!   answers that the client has not read, and its events. Requests wait while their client does not read.
//! * A method that may wait for a file system runs on a second thread, and one that changes disks on a thread of its
//!   own. If a file system does not respond, only such methods wait. The end of the daemon waits at most a second for
//!   the server thread, and not for the other threads.

mod client;
mod connection;
mod context;
mod disk_info;
mod event_hub;
mod keep_as;
mod line_buffer;
mod message;
mod methods;
mod outbox;
mod registry;
mod resize;
mod rpc_error;
mod schema;
mod server;
mod slow_calls;
mod snapshot;
mod stats;
mod watch;

pub use connection::ControlConnection;
pub use context::{ControlContext, ShutdownRequest};
pub use event_hub::EventHub;
pub use registry::{DiskRegistry, ServedDisk};
pub use server::{ControlServer, MAX_CLIENTS, fds_of_control};
