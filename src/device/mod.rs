//! Floor 4: the virtio-blk device.
//!
//! This floor owns virtqueues (descriptor chains, rings, notifications), the parsing of virtio-blk requests, the
//! features of the device, and its configuration space. Other floors own the execution of requests (floor 3), and
//! sockets, threads and event loops (floor 5). Everything that a guest writes is treated as hostile: each of the rules
//! V1 to V18 (`docs/virtio.md`, section 3) is named at the code that enforces it.
//!
//! ```text
//!   guest memory                                                                     disk
//!   avail ring ── split_ring ── head ── descriptor_chain ── parse ── Request ──────► Lane
//!                                             |                                        |
//!                                       guest_memory (guest addresses to iovecs)       |
//!                                                                                      |
//!   used ring ◄── split_ring ◄── virtqueue (status byte, used length) ◄─── Answer ◄────┘
//!                                 |   └─ inflight (heads in flight, in memory that survives a kill)
//!                                queue (one batch: poll, complete, pop, submit, interrupt)
//!                                 |
//!                                request_times (statistics: one timestamp for a batch)
//!
//!   config (Device: offered features and configuration space, shared by all queues)
//!   spec   (constants and layouts: feature bits, request types, descriptors)
//! ```

pub mod config;
pub mod descriptor_chain;
pub mod guest_memory;
pub mod inflight;
mod interrupt;
pub mod parse;
pub mod queue;
#[cfg(test)]
mod queue_tests;
mod request_times;
pub mod spec;
pub mod split_ring;
#[cfg(test)]
mod store_counter;
#[cfg(test)]
mod testing;
pub mod virtqueue;

pub use config::Device;
pub use guest_memory::{AtomicMemory, MemoryRegions, SharedMemory};
pub use inflight::{InFlightRecord, InFlightRegion};
pub use queue::{Queue, ServeResult, Vring};
