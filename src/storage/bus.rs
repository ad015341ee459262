//! SIGBUS: what the kernel sends to a thread that touches a page of a mapped file that the file does not have (any more).
//!
//! One handler for the process. It lets a copy out of memory fail (`copy.rs`) and gives a journal that was cut other memory
//! (`live.rs`). Every other SIGBUS goes to the handler that was there before, or ends the process.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use super::{copy, live};

/// Whether the signal is caught: seen to with the first call.
pub(super) fn is_caught() -> bool {
    static CAUGHT: OnceLock<bool> = OnceLock::new();
    *CAUGHT.get_or_init(install)
}

/// What was done about SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn install() -> bool {
    // SAFETY: plain data, for which zeros are a value; filled in before it is used.
    let (mut ours, mut before) = unsafe { MaybeUninit::<(libc::sigaction, libc::sigaction)>::zeroed().assume_init() };
    ours.sa_sigaction = on_bus as *const () as usize;
    // On the alternate stack, where the one before may count on it (a stack that overflows).
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both are valid; the handler is one for SA_SIGINFO. What was there is kept before ours can run.
    unsafe {
        if libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) != 0 {
            return false;
        }
        let _ = BEFORE.set(before);
        libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) == 0
    }
}

extern "C" fn on_bus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes it.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code <= 0 || code == libc::BUS_MCEERR_AO {
        // No access of ours: somebody sent it, or memory failed that nobody asked for. As if there were no handler.
        // SAFETY: both may be called in a handler; the signal comes when this one returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    // SAFETY: with SA_SIGINFO the kernel passes the registers of the interrupted thread, which is this one; errno is its.
    let rescued = unsafe {
        let errno = *libc::__errno_location();
        let rescued = copy::rescue(context.cast()) || live::rescue(address);
        *libc::__errno_location() = errno;
        rescued
    };
    if !rescued && let Some(before) = BEFORE.get() {
        // The instruction runs again, and meets who was there before. SAFETY: what the kernel gave is valid.
        unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
    }
}
