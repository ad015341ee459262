//! Number of processors, and pinning of threads to processors.
#![allow(unsafe_code)]

use std::io;
use std::sync::OnceLock;

/// Returns the number of processors that the first calling thread may use. Later calls return the same number, even
/// after the thread was pinned.
pub fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Pins the calling thread to a processor.
pub fn pin_this_thread(processor: usize) {
    pin(0, processor);
}

/// Pins the thread with the ID `thread` to a processor. The ID 0 is the calling thread.
pub fn pin(thread: i32, processor: usize) {
    // SAFETY: `cpu_set_t` is a bit array, for which all zeros are valid. `CPU_SET` is checked against the size of the
    // set. sched_setaffinity(2) reads the local variable `set` during the call only, and the length is the size of the
    // set.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(processor, &mut set);
        libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(done, 0, "cannot use processor {processor}: {}", io::Error::last_os_error());
}
