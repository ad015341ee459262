//! Floor 5: vhost-user. Serves a disk to front-ends over a Unix socket.
//!
//! This floor owns the socket of a disk, the messages on it, the table of guest memory, and one thread per queue. The
//! contents of the rings belong to `device`, the execution of requests to `disk`.
//!
//! ```text
//!  front-end ── socket ── frame ── vhost crate ── handler ── rings ──┬── memory          guest memory regions
//!                           │                                        ├── inflight        in-flight records
//!                           │                                        ├── memory_sharing  detects private memory
//!                           │                                        └── worker          queue_thread, epoll,
//!                           │                                                            adaptive_poll, device::Queue
//!            bind ─ disk_server ─ connection: accepts, refuses a second front-end, ends on the stop signal
//! ```
//!
//! * The **control thread** (one per disk, `disk_server`) reads messages and never accesses a running ring. To change
//!   the setup of a ring, it stops the ring, changes the setup, and starts the ring again. The command that starts a
//!   ring passes everything that the ring needs to the worker.
//! * A **worker** (one per queue) exists as long as the disk is served. When a front-end disconnects, its rings are
//!   drained and its memory is unmapped. The workers then wait for the next front-end.
//! * No descriptor of a front-end can block a thread (`passed_fd`), and every wait for a worker that has started has a
//!   time limit.
//! * A handler exists as long as its connection, so the next front-end inherits no state.
//! * If guest memory is lost, the worker notifies the control thread, which ends the connection
//!   (`docs/virtio.md`, section 6).
//!
//! Protocol features offered (`handler`): MQ, REPLY_ACK, BACKEND_REQ (`backend_channel`), CONFIG, INFLIGHT_SHMFD,
//! CONFIGURE_MEM_SLOTS, RESET_DEVICE.

mod adaptive_poll;
mod backend_channel;
mod bind;
mod connection;
mod disk_server;
mod epoll;
mod frame;
mod handler;
mod inflight;
mod limits;
mod memory;
mod memory_sharing;
mod passed_fd;
mod queue_thread;
mod rings;
mod server_status;
mod socket;
mod worker;

pub use bind::SocketAccess;
pub use disk_server::{DiskServer, ServeOptions};
pub use limits::{MAX_QUEUE_SIZE, MAX_QUEUES, fds_of_disk};
pub use server_status::ServerStatus;
pub use socket::{Listener, Peer, Socket};
