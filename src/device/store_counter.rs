//! Unit test support for a kill after any store. Rings, status bytes and in-flight records count their stores here.

use std::cell::Cell;

thread_local! {
    static STORES_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Panic payload of a thread that [`count_store`] killed.
pub(super) struct Killed;

/// Makes the calling thread unwind after `stores` further stores, or never if `stores` is `None`.
pub(super) fn kill_after(stores: Option<u32>) {
    STORES_LEFT.set(stores);
}

/// Number of stores left until the calling thread is killed.
pub(super) fn stores_left() -> Option<u32> {
    STORES_LEFT.get()
}

/// Counts a store of the calling thread.
pub(super) fn count_store() {
    if let Some(left) = STORES_LEFT.get() {
        STORES_LEFT.set(left.checked_sub(1));
        if left == 0 {
            std::panic::resume_unwind(Box::new(Killed));
        }
    }
}
