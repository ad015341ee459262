//! A copy that returns false, instead of ending the process, if a page of an unguarded mapping cannot be read or
//! written.
//!
//! A page of a mapped file is unavailable if the file was truncated or its disk fails: the kernel then sends SIGBUS.
//! If the page belongs to guarded memory, the handler (`sigbus.rs`) replaces that memory by zeros, and the copy
//! continues. Otherwise the handler calls [`fix_up`]. If the interrupted instruction belongs to the copy, `fix_up`
//! moves the instruction pointer to the copy's failure exit. gVisor's `safecopy` and the kernel's own copies to user
//! space use the same technique.
//!
//! The copy exists only for x86-64; elsewhere [`is_available`] returns false.
#![allow(unsafe_code)]

use std::ffi::c_void;

use crate::storage::sigbus;

/// Returns whether the copy can be used. The first call installs the SIGBUS handler.
pub(super) fn is_available() -> bool {
    cfg!(target_arch = "x86_64") && sigbus::install_fix_up(fix_up)
}

/// Copies `len` bytes. Returns false if a page of either side is unavailable and not in guarded memory; then a part of
/// the bytes may have been copied.
///
/// # Safety
/// - [`is_available`] has returned true.
/// - `from` points to `len` mapped readable bytes and `to` to `len` mapped writable bytes; the two ranges do not
///   overlap.
/// - No reference to either range exists during the call.
#[inline]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> bool {
    // SAFETY: the caller guarantees that both ranges are mapped and do not overlap, that no reference to them exists,
    // and that `is_available` has installed the fix-up. `arch::copy` requires nothing else.
    unsafe { arch::copy(from, to, len) }
}

/// Makes the copy return false if the thread was interrupted in one. Returns whether the thread was interrupted in a
/// copy.
///
/// # Safety
/// `context` is the context that the kernel passed to a signal handler which is running on this thread.
unsafe fn fix_up(context: *mut c_void) -> bool {
    // SAFETY: the caller passes the context of a signal handler that is running on this thread, as `arch::fix_up`
    // requires.
    unsafe { arch::fix_up(context) }
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::ffi::c_void;

    // The code uses no stack and no callee-saved register, so jumping from any of its instructions to the failure exit
    // returns to the caller correctly.
    std::arch::global_asm!(
        ".pushsection .text.diffdisk_copy,\"ax\",@progbits",
        ".globl diffdisk_copy",
        ".hidden diffdisk_copy",
        ".globl diffdisk_copy_failed",
        ".hidden diffdisk_copy_failed",
        ".p2align 4",
        "diffdisk_copy:", // rdi: to, rsi: from, rdx: bytes
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep movsq",
        "mov ecx, edx",
        "and ecx, 7",
        "rep movsb",
        "mov eax, 1",
        "ret",
        "diffdisk_copy_failed:",
        "xor eax, eax",
        "ret",
        ".popsection",
    );

    unsafe extern "C" {
        fn diffdisk_copy(to: *mut u8, from: *const u8, len: usize) -> u32;
        /// Code, not data: the failure exit of the copy. Only its address is used.
        static diffdisk_copy_failed: u8;
    }

    /// Implements [`fix_up`](super::fix_up).
    pub(super) unsafe fn fix_up(context: *mut c_void) -> bool {
        let (start, failed) = (diffdisk_copy as *const () as usize, (&raw const diffdisk_copy_failed) as usize);
        // SAFETY: the caller guarantees that `context` is the context of this thread's signal handler, which on Linux
        // is a valid ucontext_t that only this handler accesses until it returns.
        let at = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
        let inside = usize::try_from(*at).is_ok_and(|at| (start..failed).contains(&at));
        if inside {
            *at = failed as i64;
        }
        inside
    }

    #[inline]
    pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> bool {
        // SAFETY: the code above follows the C calling convention and accesses only the two ranges, which the caller
        // guarantees to be mapped. `fix_up` handles a fault in that code; the caller guarantees that `is_available` has
        // installed it.
        unsafe { diffdisk_copy(to, from, len) != 0 }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod arch {
    use std::ffi::c_void;

    pub(super) unsafe fn fix_up(_: *mut c_void) -> bool {
        false
    }

    pub(super) unsafe fn copy(_: *const u8, _: *mut u8, _: usize) -> bool {
        unreachable!("not available on this architecture")
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn copies_any_length_and_alignment() {
        assert!(is_available());
        let from: Vec<u8> = (0..100u8).collect();
        for len in 0..80 {
            for at in 0..9 {
                let mut to = [0xEE; 100];
                // SAFETY: both ranges lie in their arrays, which are not borrowed during the call.
                assert!(unsafe { copy(from.as_ptr().wrapping_add(at), to.as_mut_ptr().wrapping_add(9 - at), len) });
                assert_eq!(to[9 - at..][..len], from[at..][..len]);
                assert!(to[..9 - at].iter().chain(&to[9 - at + len..]).all(|&byte| byte == 0xEE));
            }
        }
    }

    #[test]
    fn an_unavailable_page_ends_only_the_copy() {
        assert!(is_available());
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mapping = memmap2::MmapRaw::map_raw(&file).unwrap();
        let mapped = mapping.as_mut_ptr();
        let mut memory = [7u8; 8192];
        for (len, works) in [(8192, true), (4096, false)] {
            file.set_len(len).unwrap();
            // SAFETY: `mapping` lives until the end of the test, and the array is not borrowed during the calls.
            let (read, written) =
                unsafe { (copy(mapped, memory.as_mut_ptr(), 8192), copy(memory.as_ptr(), mapped, 8192)) };
            assert_eq!((read, written), (works, works), "a file of {len} bytes");
            // SAFETY: `mapping` lives until the end of the test, and the array is not borrowed during the call.
            assert!(unsafe { copy(mapped, memory.as_mut_ptr(), 4096) }, "the first page is always available");
        }
    }
}
