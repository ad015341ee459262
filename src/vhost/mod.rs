//! Floor 5: vhost-user. What front-ends say to a disk, and the threads that serve its rings.
//!
//! This floor owns the socket of a disk, the messages on it, the table of guest memory, and one thread per queue. It
//! leaves what stands in the rings to `device`, and what becomes of the bytes to `disk`.
//!
//! ```text
//!  front-end ── socket ── frame ── vhost crate ── handler ── rings ──┬── memory    the guest's regions, mapped and checked
//!                           │                                        ├── inflight  the record that survives us, kept by
//!                           │                                        │             the front-end
//!                           │                                        ├── unshared  guest memory that only the guest sees
//!                           │                                        └── worker    one a queue: queue_thread, edges,
//!                           │                                                      device::Queue, lane
//!                 bind ─ daemon ─ connection: accepts, refuses a second front-end, ends on the stop signal
//! ```
//!
//! * The **control thread** (one a disk, `daemon`) reads messages and never touches a running ring. It stops a ring,
//!   changes it, and starts it again; everything a ring needs travels to its worker in a command.
//! * A **worker** (one a queue) lives as long as the disk. A front-end that leaves takes its rings and its memory
//!   with it, after they are drained; the workers wait for the next one.
//! * No descriptor of a front-end can hold a thread (`passed_fd`), and no wait for a worker is without an end.
//! * A handler lives as long as a connection: nothing of one front-end is left for the next but the disk.
//!
//! What is negotiated: MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS, RESET_DEVICE.

mod adaptive_poll;
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
mod socket;
mod worker;

pub use bind::SocketAccess;
pub use disk_server::{DiskServer, ServeOptions};
pub use limits::{MAX_QUEUE_SIZE, MAX_QUEUES, fds_of_disk};
pub use socket::{Listener, Socket};
