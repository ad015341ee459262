//! SIGBUS handler: keeps an unavailable page of a mapping from ending the process.
//!
//! The kernel sends SIGBUS to a thread that accesses a mapped page which does not exist: the file was truncated, its
//! disk failed, or no memory is left for the page. Two kinds of access survive this:
//!
//! - *Shared memory* ([`Guard`]): guest memory, the in-flight region, a live journal. The handler replaces the whole
//!   mapping with anonymous zeros and marks it as lost; then the access is repeated. Every kind of access survives
//!   (plain copies, atomics, code of other crates). An access that succeeds costs nothing, since the handler runs only
//!   after a fault. Users of the mapping check [`Guard::is_lost`] before they rely on bytes that they read or wrote.
//! - *Code with a failure exit* (a `FixUp`): the handler moves the interrupted thread to that exit.
//!
//! For any other access, the handler that was installed before this one is installed again, and the access is repeated.
//! A SIGBUS that a process sent has the default action. A report about failed memory that no thread has accessed is
//! ignored.
//!
//! The handler replaces the whole mapping and not just the page: otherwise a front-end could split a mapping page by
//! page until the daemon reaches the kernel's limit of mappings.
//!
//! The handler interrupts arbitrary code. It takes no lock, allocates nothing, makes only async-signal-safe calls, and
//! reads only atomics and values that are set once: the registry of guarded mappings is a list of chunks that grows at
//! its end and is never freed.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

/// Mappings in one chunk of the registry.
const CHUNK_ENTRIES: usize = 64;

/// Registry entry, which describes a guarded mapping or is free.
struct GuardEntry {
    taken: AtomicBool,
    /// Address of the first byte; 0 while the entry guards nothing.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

struct RegistryChunk {
    entries: [GuardEntry; CHUNK_ENTRIES],
    next: AtomicPtr<RegistryChunk>,
}

impl RegistryChunk {
    const fn new() -> RegistryChunk {
        let entries = [const {
            GuardEntry {
                taken: AtomicBool::new(false),
                start: AtomicUsize::new(0),
                len: AtomicUsize::new(0),
                lost: AtomicBool::new(false),
            }
        }; CHUNK_ENTRIES];
        RegistryChunk { entries, next: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Returns the next chunk of the list.
    fn next(&self) -> Option<&'static RegistryChunk> {
        // SAFETY: `next` is null or points to a chunk that `claim_entry` leaked before it stored the pointer with
        // release order. A leaked chunk is never freed, and only shared references to it exist.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }
}

static REGISTRY: RegistryChunk = RegistryChunk::new();

/// Number of times that a guarded mapping lost a page.
static LOSS_COUNT: AtomicU32 = AtomicU32::new(0);

/// Action that was installed before this handler.
static PREVIOUS_ACTION: OnceLock<libc::sigaction> = OnceLock::new();

/// Changes the context of a thread that was interrupted in code with a failure exit, so that the thread continues at
/// that exit. Returns false if the thread was interrupted in other code. Called in a signal handler, with the context
/// that the kernel passed.
pub(super) type FixUp = unsafe fn(context: *mut c_void) -> bool;

static FIX_UP: OnceLock<FixUp> = OnceLock::new();

/// Returns the number of times that any guarded mapping lost a page. The number changes after [`Guard::is_lost`] of the
/// mapping has become true, and before any access to the mapping reads zeros in place of the lost bytes.
#[inline]
pub fn loss_count() -> u32 {
    LOSS_COUNT.load(Ordering::Acquire)
}

/// Keeps accesses to a shared mapping from ending the process.
#[derive(Debug)]
pub struct Guard(&'static GuardEntry);

impl std::fmt::Debug for GuardEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} + {:#x}", self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed))
    }
}

impl Guard {
    /// Guards the mapping of `len` bytes at `start`, which has pages of `page` bytes. Returns `None` if the SIGBUS
    /// handler cannot be installed.
    ///
    /// # Safety
    /// - The range from `start` to the end of the page with the last byte is a readable and writable mapping that
    ///   belongs to the caller, and stays mapped until the guard is dropped.
    /// - The caller forms no reference to the bytes except to atomics, since the bytes may become zeros at any time.
    ///   These zeros are private to this process.
    ///
    /// # Panics
    /// If `page` is not a power of two, or `start` is not a multiple of it.
    pub unsafe fn new(start: *mut u8, len: usize, page: usize) -> Option<Guard> {
        assert!(page.is_power_of_two() && (start as usize).is_multiple_of(page), "a mapping begins at a page");
        if !install_handler() {
            return None;
        }
        let entry = claim_entry();
        entry.lost.store(false, Ordering::Relaxed);
        // Release: a handler that reads this length sees that the previous start is gone.
        entry.len.store(len.next_multiple_of(page), Ordering::Release);
        // Release: a handler that reads this start reads the length that belongs to it.
        entry.start.store(start as usize, Ordering::Release);
        Some(Guard(entry))
    }

    /// Returns whether the mapping lost a page. All of its pages are then zeros that only this process sees.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

/// Claims a free registry entry. Appends a chunk if there is none.
fn claim_entry() -> &'static GuardEntry {
    let mut chunk: &'static RegistryChunk = &REGISTRY;
    loop {
        let free =
            |e: &&GuardEntry| e.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if let Some(entry) = chunk.entries.iter().find(free) {
            return entry;
        }
        chunk = chunk.next().unwrap_or_else(|| {
            let fresh = Box::into_raw(Box::new(RegistryChunk::new()));
            match chunk.next.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: `fresh` comes from `Box::into_raw` and is never freed now that it is linked. Only shared
                // references to it exist from here on.
                Ok(_) => unsafe { &*fresh },
                // Another thread appended a chunk first.
                Err(theirs) => {
                    // SAFETY: `fresh` comes from `Box::into_raw`, and no other thread has seen it, since it was not
                    // linked. `theirs` is a linked chunk, which is never freed.
                    unsafe {
                        drop(Box::from_raw(fresh));
                        &*theirs
                    }
                }
            }
        });
    }
}

/// Installs the handler with a fix-up. Returns false if the handler cannot be installed. There is one fix-up: later
/// calls with another one have no effect.
pub(super) fn install_fix_up(fix_up: FixUp) -> bool {
    let _ = FIX_UP.set(fix_up);
    install_handler()
}

/// Installs the handler on the first call. Returns whether it is installed.
pub(super) fn install_handler() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // SAFETY: sigaction is a C struct of integers and an address, for which all-zero bytes are a valid value.
        let (mut action, mut previous) =
            unsafe { MaybeUninit::<(libc::sigaction, libc::sigaction)>::zeroed().assume_init() };
        action.sa_sigaction = handle_sigbus as *const () as usize;
        // The previous handler may need the alternate stack (for a stack overflow).
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: both pointers are to live values of the right type, and the handler has the signature that SA_SIGINFO
        // requires. The previous action is stored before the handler can run.
        unsafe {
            if libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut previous) != 0 {
                return false;
            }
            let _ = PREVIOUS_ACTION.set(previous);
            libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) == 0
        }
    })
}

extern "C" fn handle_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a pointer to a valid siginfo_t.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == libc::BUS_MCEERR_AO {
        // The failed memory was not accessed by any thread. A later access to it faults.
        return;
    }
    if code <= 0 {
        // The signal was sent by a process and not caused by an access. SAFETY: signal and raise are
        // async-signal-safe. The signal is delivered when this handler returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    // SAFETY: __errno_location returns a valid pointer to this thread's errno. `context` is the context that the kernel
    // passed to this handler, which runs on the interrupted thread, as a `FixUp` requires.
    let handled = unsafe {
        let errno = *libc::__errno_location();
        let handled = replace_guarded_mapping(addr) || FIX_UP.get().is_some_and(|fix_up| fix_up(context));
        *libc::__errno_location() = errno;
        handled
    };
    if !handled && let Some(previous) = PREVIOUS_ACTION.get() {
        // The instruction is repeated, and faults again under the previous handler. SAFETY: `previous` is an action
        // that the kernel returned for this signal, and lives for the rest of the process.
        unsafe { libc::sigaction(signal, previous, ptr::null_mut()) };
    }
}

/// Replaces the guarded mapping that contains `addr` with zeros. Returns false if there is none.
fn replace_guarded_mapping(addr: usize) -> bool {
    let mut next = Some(&REGISTRY);
    while let Some(chunk) = next {
        for entry in &chunk.entries {
            let start = entry.start.load(Ordering::Acquire);
            let len = entry.len.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            // Another thread may reuse the entry for another mapping between these loads, which the second load of
            // `start` detects. It cannot reuse the entry of the mapping that this access hit: that mapping is in use,
            // so its guard exists.
            let is_same = entry.start.load(Ordering::Relaxed) == start;
            if start != 0 && is_same && addr.wrapping_sub(start) < len {
                return map_zeros(start, len, entry);
            }
        }
        next = chunk.next();
    }
    false
}

fn map_zeros(start: usize, len: usize, entry: &GuardEntry) -> bool {
    // The mapping is marked before the zeros appear, so that no thread takes them for the lost bytes.
    entry.lost.store(true, Ordering::Release);
    LOSS_COUNT.fetch_add(1, Ordering::Release);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the caller of `Guard::new` guarantees that the range is a mapping of the caller's own, which stays mapped
    // while the guard exists. The guard exists, because the faulting access uses the mapping. The only references to
    // its bytes are to atomics, for which zeros are a valid value. mmap is async-signal-safe on Linux: it is a plain
    // system call.
    let placed = unsafe { libc::mmap(ptr::without_provenance_mut(start), len, protection, flags, -1, 0) };
    if placed == libc::MAP_FAILED {
        // The kernel may have unmapped the range already, and another thread's mapping may take its addresses. SAFETY:
        // abort is async-signal-safe.
        unsafe { libc::abort() }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use memmap2::MmapRaw;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const PAGE: usize = 4096;

    /// Maps a memory file of `pages` pages. The mapping is never unmapped.
    fn mapping(pages: usize) -> (File, *mut u8) {
        let file = File::from(memfd_create("lost", MemfdFlags::CLOEXEC).unwrap());
        file.set_len((pages * PAGE) as u64).unwrap();
        let mapping = std::mem::ManuallyDrop::new(MmapRaw::map_raw(&file).unwrap());
        (file, mapping.as_mut_ptr())
    }

    /// Guards `pages` pages at `start`, which [`mapping`] returned.
    fn guard(start: *mut u8, pages: usize) -> Guard {
        // SAFETY: the mapping is never unmapped, and the tests access it only by atomics and raw pointers.
        unsafe { Guard::new(start, pages * PAGE, PAGE) }.unwrap()
    }

    fn word<'a>(start: *mut u8, page: usize) -> &'a AtomicU32 {
        // SAFETY: the page is never unmapped, it is aligned, and the tests access its first word only as an atomic, or
        // by raw pointers while no other thread does.
        unsafe { AtomicU32::from_ptr(start.add(page * PAGE).cast()) }
    }

    #[test]
    fn a_mapping_that_lost_a_page_becomes_zeros() {
        let (file, start) = mapping(3);
        let guard = guard(start, 3);
        (0..3).for_each(|page| word(start, page).store(7, Ordering::Relaxed));
        let before = loss_count();
        file.set_len(PAGE as u64).unwrap();
        assert_eq!(word(start, 0).load(Ordering::Relaxed), 7);
        assert!(!guard.is_lost());
        assert_eq!(word(start, 1).load(Ordering::Relaxed), 0);
        assert!(guard.is_lost() && loss_count() > before);
        word(start, 2).store(9, Ordering::Relaxed);
        assert_eq!([0, 1, 2].map(|page| word(start, page).load(Ordering::Relaxed)), [0, 0, 9]);
    }

    #[test]
    fn plain_copies_survive() {
        let (file, start) = mapping(2);
        let guard = guard(start, 2);
        word(start, 0).store(7, Ordering::Relaxed);
        file.set_len(0).unwrap();
        let mut bytes = [1; 2 * PAGE];
        // SAFETY: the mapping is never unmapped, and the array does not overlap it.
        unsafe { ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), bytes.len()) };
        assert!(bytes == [0; 2 * PAGE] && guard.is_lost());
    }

    #[test]
    fn a_loss_concerns_only_its_own_mapping_and_guard() {
        let (file, start) = mapping(1);
        let many: Vec<Guard> = (0..3 * CHUNK_ENTRIES).map(|_| guard(mapping(1).1, 1)).collect();
        let one = guard(start, 1);
        file.set_len(0).unwrap();
        assert_eq!(word(start, 0).load(Ordering::Relaxed), 0);
        assert!(one.is_lost() && many.iter().all(|other| !other.is_lost()));
        drop((one, many));
        assert!(!guard(mapping(1).1, 1).is_lost(), "a reused entry is not lost");
    }
}
