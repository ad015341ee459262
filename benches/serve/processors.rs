//! Processors: how many there are, and which one a thread uses.
#![allow(unsafe_code)]

use std::io;
use std::sync::OnceLock;

/// Returns the number of processors of this machine, independent of this thread's affinity.
pub fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Pins the calling thread to a processor.
pub fn pin_this_thread(processor: usize) {
    pin(0, processor);
}

/// Pins a thread to a processor. Thread 0 is the calling thread.
pub fn pin(thread: i32, processor: usize) {
    // SAFETY: `cpu_set_t` is plain data, for which zeros are valid. The call only reads the set, and its length is passed.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(done, 0, "cannot use processor {processor}: {}", io::Error::last_os_error());
}
