//! How many file descriptors a served disk takes, so that a limit that is too low ends the start and not a guest.

/// Queues that one disk may have.
pub const MAX_QUEUES: u16 = 64;
/// Entries that one queue may have (the size of a split ring at most).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Of each queue: the ring of the engine, its event loop, its two event counters, and what a front-end hands over for it
/// (kick, call, error).
const PER_QUEUE: u64 = 10;
/// Of each disk: its socket and the lock of its name, a front-end's connection with its duplicates, one that is refused, and
/// the files that one message may bring (32 regions of memory).
const PER_DISK: u64 = 48;
/// Of each file of a chain: the file, and one more while it is opened or registered.
const PER_FILE: u64 = 2;

/// File descriptors that a disk of so many queues and files takes at most.
pub fn fds_of_disk(queues: u16, files: usize) -> u64 {
    u64::from(queues) * PER_QUEUE + PER_DISK + files as u64 * PER_FILE
}
