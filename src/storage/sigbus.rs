//! SIGBUS: what happens when a page of shared memory cannot be had.
//!
//! The kernel sends SIGBUS to a thread that touches a mapped page that does not exist (any more): a file or a memory file was
//! cut, its disk failed, or the host has no memory left for it. Two kinds of access survive that here:
//!
//! - *Shared memory* ([`Guard`]): guest memory, the in-flight region, a mapped journal. The handler puts anonymous zeros in
//!   the place of the whole mapping, marks it as lost, and the access is repeated. Every kind of access survives (plain copies,
//!   atomics, code of other crates). An access that succeeds costs nothing: the handler runs only after a fault. Users of the
//!   mapping check [`Guard::is_lost`] afterwards, before they rely on what they read or wrote.
//! - *Copies from mapped files* (`copy_down.rs`): the handler sets the program counter to the failure exit of the copy.
//!
//! Any other SIGBUS goes to the handler that was installed before this one.
//!
//! The whole mapping is replaced, not the page: a front-end could otherwise make the daemon reach the kernel's limit of
//! mappings, page by page.
//!
//! The handler runs in the middle of arbitrary code, so it takes no lock, allocates nothing, calls only `mmap`, and reads only
//! atomics: the registry of guarded mappings is a list of chunks that grows at its end and is never freed.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

use super::copy_nofault;

/// Mappings in one chunk of the registry.
const CHUNK: usize = 64;

/// A guarded mapping, or room for one.
struct Entry {
    taken: AtomicBool,
    /// Address of the first byte; 0 while the entry guards nothing.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

struct Chunk {
    entries: [Entry; CHUNK],
    next: AtomicPtr<Chunk>,
}

impl Chunk {
    const fn new() -> Chunk {
        let entries = [const {
            Entry {
                taken: AtomicBool::new(false),
                start: AtomicUsize::new(0),
                len: AtomicUsize::new(0),
                lost: AtomicBool::new(false),
            }
        }; CHUNK];
        Chunk { entries, next: AtomicPtr::new(ptr::null_mut()) }
    }

    /// The chunk after this one, if there is one.
    fn next(&self) -> Option<&'static Chunk> {
        // SAFETY: either null, or a chunk that was leaked when it was linked here, so that it lives for good.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }
}

static REGISTRY: Chunk = Chunk::new();

/// How many times a page of any guarded mapping was lost.
static LOSSES: AtomicU32 = AtomicU32::new(0);

/// The handlers that were installed before ours.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// How many times a page of any guarded mapping was lost: while the number stays the same, no [`Guard::is_lost`] changes.
#[inline]
pub fn loss_count() -> u32 {
    LOSSES.load(Ordering::Acquire)
}

/// Keeps accesses to a shared mapping from ending the process.
#[derive(Debug)]
pub struct Guard(&'static Entry);

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} + {:#x}", self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed))
    }
}

impl Guard {
    /// Guards the mapping of `len` bytes at `start`, which has pages of `page` bytes. None if SIGBUS cannot be caught.
    ///
    /// # Safety
    /// From `start` to the end of the page with the last byte lies a mapping of the caller's that is readable and writable. It
    /// stays mapped until the guard is dropped. At any moment its bytes may become zeros that other processes do not see, and
    /// the caller makes no reference to them but to atomics.
    ///
    /// # Panics
    /// If `page` is not a power of two, or `start` not a multiple of it.
    pub unsafe fn new(start: *mut u8, len: usize, page: usize) -> Option<Guard> {
        assert!(page.is_power_of_two() && (start as usize).is_multiple_of(page), "a mapping begins at a page");
        if !install_handler() {
            return None;
        }
        let entry = take();
        entry.lost.store(false, Ordering::Relaxed);
        // Release: a handler that reads this length sees that the start before it is gone.
        entry.len.store(len.next_multiple_of(page), Ordering::Release);
        // Release: a handler that reads this start reads what belongs to it.
        entry.start.store(start as usize, Ordering::Release);
        Some(Guard(entry))
    }

    /// Whether a page of the mapping was lost: zeros of our own stand in the place of all pages.
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

/// An entry of the registry that is free.
fn take() -> &'static Entry {
    let mut chunk: &'static Chunk = &REGISTRY;
    loop {
        let free = |e: &&Entry| e.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if let Some(entry) = chunk.entries.iter().find(free) {
            return entry;
        }
        chunk = chunk.next().unwrap_or_else(|| {
            let fresh: &'static mut Chunk = Box::leak(Box::new(Chunk::new()));
            let fresh = ptr::from_mut(fresh);
            match chunk.next.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: leaked above, so that it lives for good, and only reached by shared references from now on.
                Ok(_) => unsafe { &*fresh },
                // Another thread was faster: its chunk counts, and ours was never seen by anybody else.
                Err(theirs) => {
                    // SAFETY: `fresh` came out of a box above, and was not linked. `theirs` is leaked as ours would be.
                    unsafe {
                        drop(Box::from_raw(fresh));
                        &*theirs
                    }
                }
            }
        });
    }
}

/// Whether SIGBUS is caught. The first call installs the handler.
pub(super) fn install_handler() -> bool {
    static CAUGHT: OnceLock<bool> = OnceLock::new();
    *CAUGHT.get_or_init(|| {
        // SAFETY: plain data, for which zeros are a value; filled in before it is used.
        let (mut ours, mut before) =
            unsafe { MaybeUninit::<(libc::sigaction, libc::sigaction)>::zeroed().assume_init() };
        ours.sa_sigaction = on_bus as *const () as usize;
        // On the alternate stack, which the handler before may need (a stack that overflows).
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: both are valid; the handler is one for SA_SIGINFO. What was there is kept before ours can run.
        unsafe {
            if libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) != 0 {
                return false;
            }
            let _ = BEFORE.set(before);
            libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) == 0
        }
    })
}

extern "C" fn on_bus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == libc::BUS_MCEERR_AO {
        // Memory failed that no thread has asked for. If one does, that access fails.
        return;
    }
    if code <= 0 {
        // Not caused by an access of ours: another process sent it.
        // SAFETY: both may be called in a handler; the signal comes when this one returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    // SAFETY: `context` is what the kernel passed to this handler, which runs on the interrupted thread; errno is that thread's.
    let handled = unsafe {
        let errno = *libc::__errno_location();
        let handled = replace(addr) || copy_nofault::fix_up(context);
        *libc::__errno_location() = errno;
        handled
    };
    if !handled && let Some(before) = BEFORE.get() {
        // The instruction runs again, and meets the handler that was there before.
        // SAFETY: `before` is what the kernel returned for this signal.
        unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
    }
}

/// Puts zeros in the place of the guarded mapping in which `addr` lies, if there is one.
fn replace(addr: usize) -> bool {
    let mut next = Some(&REGISTRY);
    while let Some(chunk) = next {
        for entry in &chunk.entries {
            let start = entry.start.load(Ordering::Acquire);
            let len = entry.len.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            // The entry may pass to another mapping meanwhile, but not if it is the one of the access that failed: that
            // mapping is in use, so its guard lives.
            let is_same = entry.start.load(Ordering::Relaxed) == start;
            if start != 0 && is_same && addr.wrapping_sub(start) < len {
                return put_zeros(start, len, entry);
            }
        }
        next = chunk.next();
    }
    false
}

fn put_zeros(start: usize, len: usize, entry: &Entry) -> bool {
    // Before there are zeros, so that nobody takes them for the bytes that were lost.
    entry.lost.store(true, Ordering::Release);
    LOSSES.fetch_add(1, Ordering::Release);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is a mapping that its owner gave us to replace (`Guard::new`). It is still mapped: the access that
    // failed uses it, so its guard lives. Nobody has a reference to its bytes but to atomics, for which any bits are a value.
    let placed = unsafe { libc::mmap(ptr::without_provenance_mut(start), len, protection, flags, -1, 0) };
    if placed == libc::MAP_FAILED {
        // The range may be unmapped by now, and another mapping may take it.
        // SAFETY: may be called in a handler.
        unsafe { libc::abort() }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap};

    use super::*;

    const PAGE: usize = 4096;

    /// A mapping of a memory file of `pages` pages, for good.
    fn mapping(pages: usize) -> (File, *mut u8) {
        let file = File::from(memfd_create("lost", MemfdFlags::CLOEXEC).unwrap());
        file.set_len((pages * PAGE) as u64).unwrap();
        // SAFETY: a fresh mapping at a place that the kernel chooses.
        let start = unsafe {
            mmap(ptr::null_mut(), pages * PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0).unwrap()
        };
        (file, start.cast())
    }

    /// A guard of `pages` pages at `start`, which [`mapping`] made.
    fn guard(start: *mut u8, pages: usize) -> Guard {
        // SAFETY: such a mapping lives for good, and the tests reach it by atomics and raw pointers only.
        unsafe { Guard::new(start, pages * PAGE, PAGE) }.unwrap()
    }

    fn word<'a>(start: *mut u8, page: usize) -> &'a AtomicU32 {
        // SAFETY: mapped for good, aligned, and only reached as atomics.
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
    fn copies_by_others_survive() {
        let (file, start) = mapping(2);
        let guard = guard(start, 2);
        word(start, 0).store(7, Ordering::Relaxed);
        file.set_len(0).unwrap();
        let mut bytes = [1; 2 * PAGE];
        // SAFETY: mapped for good; the array is another place.
        unsafe { ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), bytes.len()) };
        assert!(bytes == [0; 2 * PAGE] && guard.is_lost());
    }

    #[test]
    fn a_guard_is_of_its_own_mapping_and_of_its_own_time() {
        let (file, start) = mapping(1);
        let many: Vec<Guard> = (0..3 * CHUNK).map(|_| guard(mapping(1).1, 1)).collect();
        let one = guard(start, 1);
        file.set_len(0).unwrap();
        assert_eq!(word(start, 0).load(Ordering::Relaxed), 0);
        assert!(one.is_lost() && many.iter().all(|other| !other.is_lost()));
        drop((one, many));
        assert!(!guard(mapping(1).1, 1).is_lost(), "an entry that is used again");
    }
}
