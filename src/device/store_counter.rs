//! Unit test support for a kill after any store. Rings, status bytes and in-flight records count their stores here.

use std::cell::Cell;

thread_local! {
    static STORES_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Panic payload of a thread that [`count_store`] killed.
pub(super) struct Killed;

/// Lets the calling thread make `stores` further stores, and makes the thread unwind after the store that follows them.
/// If `stores` is `None`, the thread does not unwind.
pub(super) fn kill_after(stores: Option<u32>) {
    STORES_LEFT.set(stores);
}

/// Number of stores that the calling thread makes before the store after which it unwinds; `None` if it does not
/// unwind.
pub(super) fn stores_left() -> Option<u32> {
    STORES_LEFT.get()
}

/// Counts a store that the calling thread has made. Unwinds if [`kill_after`] requires that.
pub(super) fn count_store() {
    if let Some(left) = STORES_LEFT.get() {
        STORES_LEFT.set(left.checked_sub(1));
        if left == 0 {
            std::panic::resume_unwind(Box::new(Killed));
        }
    }
}
