//! Limits of this floor: queues, queue sizes, and the file descriptors that a served disk needs.

/// Maximum number of queues of a disk.
pub const MAX_QUEUES: u16 = 64;
/// Maximum number of descriptors of a queue, the limit of a split ring.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// File descriptors per queue: the engine's io_uring, the epoll instance, two eventfds, the descriptors that a
/// front-end passes (kick, call, error) with their duplicates, and a reserve.
const PER_QUEUE: u64 = 10;
/// File descriptors per disk: the socket, the lock of the socket's name, a connection with its duplicates and its
/// back-end channel, a connection that is refused, and the descriptors of one message (32 memory regions).
const PER_DISK: u64 = 48;
/// File descriptors per file of a chain: that of the file, and one more while the file is opened or registered.
const PER_FILE: u64 = 2;

/// Returns the maximum number of file descriptors that a disk with `queues` queues and `files` files needs, if the
/// front-end shares at most 32 memory regions.
pub fn fds_of_disk(queues: u16, files: usize) -> u64 {
    u64::from(queues) * PER_QUEUE + PER_DISK + files as u64 * PER_FILE
}
