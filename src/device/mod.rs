//! Floor 4: virtio-blk words.
//!
//! Owns: the virtqueues a guest fills (chains of descriptors, the rings, notifications), what a virtio-blk request
//! means, and the device's features and configuration space. Leaves to others: what a disk does with a request
//! (floor 3), and sockets, threads and event loops (floor 5). Everything a guest writes is hostile: rules V1 to V18 of
//! crash-safety.md, 4.3, each named where it is enforced.
//!
//! ```text
//!   guest memory                                                          disk
//!   avail ring ─ ring ─ head ─ chain ─ pieces ─ parse ─ Request ──────► Lane
//!                                        |                                |
//!                                      guest (guest addresses to Slices)  |
//!                                                                         |
//!   used ring ◄─ ring ◄─ exchange (status byte, length, heads in flight) ◄┘ Answer
//!                          |  └─ inflight (the same heads, where a kill does not reach)
//!                        queue (one turn: reap, complete, pop, submit, signal)    config (Device: shared by queues)
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
pub mod spec;
pub mod split_ring;
#[cfg(test)]
mod testing;
pub mod virtqueue;

pub use config::Device;
pub use guest_memory::SharedMemory;
pub use inflight::{InFlightRecord, InFlightRegion};
pub use queue::{Queue, ServeResult};

/// The regions of a guest's memory.
pub type MemoryRegions = vm_memory::GuestMemoryMmap<()>;
/// The guest's memory, replaced as a whole when the front-end changes it.
pub type AtomicMemory = vm_memory::GuestMemoryAtomic<MemoryRegions>;
/// What the front-end said about one virtqueue.
pub type Vring = vhost_user_backend::VringRwLock<AtomicMemory>;
