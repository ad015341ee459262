//! A copy out of memory that may turn out not to be there.
//!
//! A page of a mapped file cannot be had if the file was cut, or if its disk fails: the kernel then sends SIGBUS. The handler
//! (`sigbus.rs`) finds that the program stood in one of the copy's few instructions, and continues at the copy's failure exit.
//! (gVisor's `safecopy` works in this way, and so do the kernel's own copies to user space.)
//!
//! Only x86-64 has such a copy so far; elsewhere [`is_ready`] says no.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::hint::black_box;

use super::sigbus;

pub(super) const PAGE: usize = 4096;
const LINE: usize = 64;

/// Whether the copy may be used: made ready with the first call.
pub(super) fn is_available() -> bool {
    cfg!(target_arch = "x86_64") && sigbus::install_handler()
}

/// Copies `len` bytes; false where a page of either side could not be had. Then part of the bytes may have been copied.
///
/// # Safety
/// `from` and `to` are the starts of `len` bytes that are mapped, to be read and to be written, and that do not overlap; no
/// reference to them exists. [`is_ready`] said yes.
#[inline]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> bool {
    // SAFETY: as the caller promises.
    unsafe { catch::copy(from, to, len) }
}

/// Has the interrupted copy fail, if the thread stood in one; false if it did not.
///
/// # Safety
/// `context` is what the kernel passed to a signal handler on this thread.
pub(super) unsafe fn fix_up(context: *mut c_void) -> bool {
    // SAFETY: as the caller promises.
    unsafe { catch::end(context) }
}

/// Has the processor begin to fetch the cache line of an address, if there is anything.
#[inline]
pub fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Has the processor find out where the pages of `len` > 0 bytes are: a walk through tables that are in none of its caches.
/// It waits for a walk before it copies, but makes several at once for hints that come one close behind the other.
#[inline]
pub(super) fn prefetch_pages(at: *const u8, len: usize) {
    (0..len).step_by(PAGE).for_each(|to| prefetch_line(at.wrapping_add(to)));
    if !(at as usize).is_multiple_of(PAGE) {
        prefetch_line(at.wrapping_add(len - 1));
    }
}

/// Has the processor begin to fetch `len` bytes, into the cache behind the first, which takes more at once. One line after the
/// other (hence the `black_box`): a burst of them holds up what comes next.
#[inline]
pub(super) fn prefetch_range(at: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for to in (0..len).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: as in `fetch_line`.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(black_box(at.wrapping_add(to)).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, len);
}

#[cfg(target_arch = "x86_64")]
mod catch {
    use std::ffi::c_void;

    // No stack is used and no register that a callee must keep: from any instruction one can go on at the second end.
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
        /// Not data: where the copy ends when it has failed.
        static diffdisk_copy_failed: u8;
    }

    /// See [`end_copy`](super::end_copy).
    pub(super) unsafe fn end(context: *mut c_void) -> bool {
        let (start, failed) = (diffdisk_copy as *const () as usize, (&raw const diffdisk_copy_failed) as usize);
        // SAFETY: by the caller's word it is the context of this thread, which the kernel continues with.
        let at = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] };
        let inside = usize::try_from(*at).is_ok_and(|at| (start..failed).contains(&at));
        if inside {
            *at = failed as i64;
        }
        inside
    }

    #[inline]
    pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> bool {
        // SAFETY: as the caller promises; the code above keeps to the C calling convention.
        unsafe { diffdisk_copy(to, from, len) != 0 }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod catch {
    use std::ffi::c_void;

    pub(super) unsafe fn end(_: *mut c_void) -> bool {
        false
    }

    pub(super) unsafe fn copy(_: *const u8, _: *mut u8, _: usize) -> bool {
        unreachable!("it is not ready on this architecture")
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn any_length_and_place() {
        assert!(is_available());
        let from: Vec<u8> = (0..100u8).collect();
        for len in 0..80 {
            for at in 0..9 {
                let mut to = [0xEE; 100];
                // SAFETY: both ranges lie in their arrays, and nothing refers to them meanwhile.
                assert!(unsafe { copy(from.as_ptr().wrapping_add(at), to.as_mut_ptr().wrapping_add(9 - at), len) });
                assert_eq!(to[9 - at..][..len], from[at..][..len]);
                assert!(to[..9 - at].iter().chain(&to[9 - at + len..]).all(|&byte| byte == 0xEE));
            }
        }
    }

    #[test]
    fn a_page_that_is_gone_ends_the_copy_and_nothing_else() {
        assert!(is_available());
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        // SAFETY: a fresh mapping, which stays until the process ends.
        let mapped = unsafe {
            let (start, shared) = (std::ptr::null_mut(), rustix::mm::MapFlags::SHARED);
            let both = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
            rustix::mm::mmap(start, 8192, both, shared, &file, 0).unwrap().cast::<u8>()
        };
        let mut memory = [7u8; 8192];
        for (len, works) in [(8192, true), (4096, false)] {
            file.set_len(len).unwrap();
            // SAFETY: mapped, whatever stands behind it; the array is not used meanwhile.
            let (read, written) =
                unsafe { (copy(mapped, memory.as_mut_ptr(), 8192), copy(memory.as_ptr(), mapped, 8192)) };
            assert_eq!((read, written), (works, works), "a file of {len} bytes");
            // SAFETY: as above.
            assert!(unsafe { copy(mapped, memory.as_mut_ptr(), 4096) }, "the first page is always there");
        }
    }
}
