//! SIGBUS: what happens when a page of shared memory cannot be had.
//!
//! The kernel sends SIGBUS to a thread that touches a mapped page that does not exist any more: a file or a memory file was
//! cut, its disk failed, or the host has no memory left for it. Two kinds of access survive that here:
//!
//! - *Guest memory* ([`Guard`]): the handler maps a zeroed page of our own in place of the lost one, marks the mapping as
//!   lost, and the access is repeated. Every kind of access survives (plain copies, atomics, code of other crates), and an
//!   access that succeeds costs nothing. Whoever uses the mapping looks at [`Guard::is_lost`] afterwards.
//! - *Copies from mapped files* (`copy.rs`): the handler sets the program counter to the failure exit of the copy.
//!
//! Any other SIGBUS goes to the handler that was installed before this one.
//!
//! The handler runs in the middle of arbitrary code, so it takes no lock, allocates nothing, and reads only atomics: the
//! registry of guarded mappings is a list of chunks that grows at its end and is never freed.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

use super::copy;

/// Mappings in one chunk of the registry.
const CHUNK: usize = 64;

/// A guarded mapping, or room for one.
struct Entry {
    taken: AtomicBool,
    /// Address of the first byte; 0 while the entry guards nothing.
    start: AtomicUsize,
    len: AtomicUsize,
    /// Bytes of a page of this mapping, a power of two.
    page: AtomicUsize,
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
                page: AtomicUsize::new(0),
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
pub fn losses() -> u32 {
    LOSSES.load(Ordering::Relaxed)
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
    /// Guards the `len` bytes at `start`, which are mapped in pages of `page` bytes.
    ///
    /// # Safety
    /// The range is a mapping (or part of one) of the caller's, `start` is a multiple of `page`, and the range stays mapped
    /// until the guard is dropped. The caller can do with private zeros in place of a page that was lost.
    ///
    /// # Panics
    /// If `page` is not a power of two, or `start` not a multiple of it.
    pub unsafe fn new(start: *mut u8, len: usize, page: usize) -> Guard {
        assert!(page.is_power_of_two() && (start as usize).is_multiple_of(page), "a mapping begins at a page");
        install();
        let entry = take();
        entry.len.store(len, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.lost.store(false, Ordering::Relaxed);
        // Release: the handler that finds `start` finds what goes with it.
        entry.start.store(start as usize, Ordering::Release);
        Guard(entry)
    }

    /// Whether a page of the mapping was lost: zeros of our own stand in its place.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::SeqCst);
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

/// Installs the handler, once; returns whether it is in place.
pub(super) fn install() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| {
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
    if code <= 0 || code == libc::BUS_MCEERR_AO {
        // Not caused by an access of ours: another process sent it, or memory failed that no thread asked for.
        // SAFETY: both may be called in a handler; the signal comes when this one returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    // SAFETY: the kernel's context of this thread.
    if replace(addr) || unsafe { copy::end_copy(context) } {
        return;
    }
    if let Some(before) = BEFORE.get() {
        // The instruction runs again, and meets the handler that was there before. SAFETY: what the kernel gave is valid.
        unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
    }
}

/// Puts a page of zeros in place of the lost one at `addr`, if that lies in a guarded mapping.
fn replace(addr: usize) -> bool {
    let mut next = Some(&REGISTRY);
    while let Some(chunk) = next {
        for entry in &chunk.entries {
            let start = entry.start.load(Ordering::Acquire);
            let (len, page) = (entry.len.load(Ordering::Relaxed), entry.page.load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            // The entry may be given to another mapping meanwhile. The one of the access that failed is not: its mapping
            // is in use, so its guard lives.
            let is_same = entry.start.load(Ordering::Relaxed) == start;
            if start != 0 && is_same && addr.wrapping_sub(start) < len {
                return put_page(addr & !(page - 1), page, entry);
            }
        }
        next = chunk.next();
    }
    false
}

fn put_page(at: usize, page: usize, entry: &Entry) -> bool {
    // Whether the page is there is known before anything is used that may be made of its bytes.
    entry.lost.store(true, Ordering::Release);
    LOSSES.fetch_add(1, Ordering::Release);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: errno belongs to this thread, and is put back as the interrupted code left it. The page lies in a mapping that
    // its owner gave us to replace pages of (`Guard::new`); nobody has a reference to its bytes, which change at any time.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        let placed =
            libc::mmap(ptr::without_provenance_mut(at), page, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        *errno = before;
        placed != libc::MAP_FAILED
    }
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

    #[test]
    fn a_lost_page_becomes_zeros_and_the_others_stay() {
        let (file, start) = mapping(3);
        // SAFETY: mapped for good.
        let guard = unsafe { Guard::new(start, 3 * PAGE, PAGE) };
        // SAFETY: mapped; only reached here.
        let word = |page: usize| unsafe { AtomicU32::from_ptr(start.add(page * PAGE).cast()) };
        (0..3).for_each(|page| word(page).store(7, Ordering::Relaxed));
        let before = losses();
        file.set_len(PAGE as u64).unwrap();
        assert!(!guard.is_lost());
        assert_eq!(word(1).load(Ordering::Relaxed), 0);
        assert!(guard.is_lost() && losses() > before);
        word(2).store(9, Ordering::Relaxed);
        assert_eq!([0, 1, 2].map(|page| word(page).load(Ordering::Relaxed)), [7, 0, 9]);
        // What other crates do with such memory survives, too.
        let mut bytes = [1; 2 * PAGE];
        file.set_len(0).unwrap();
        // SAFETY: mapped; the array is another place.
        unsafe { ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), bytes.len()) };
        assert_eq!(bytes, [0; 2 * PAGE]);
    }

    #[test]
    fn a_guard_is_of_its_own_mapping_and_of_its_own_time() {
        let (file, start) = mapping(1);
        let many: Vec<Guard> = (0..3 * CHUNK)
            .map(|_| {
                let (_, start) = mapping(1);
                // SAFETY: mapped for good.
                unsafe { Guard::new(start, PAGE, PAGE) }
            })
            .collect();
        // SAFETY: mapped for good.
        let guard = unsafe { Guard::new(start, PAGE, PAGE) };
        file.set_len(0).unwrap();
        // SAFETY: mapped.
        assert_eq!(unsafe { AtomicU32::from_ptr(start.cast()) }.load(Ordering::Relaxed), 0);
        assert!(guard.is_lost() && many.iter().all(|other| !other.is_lost()));
        drop((guard, many));
        let (_, again) = mapping(1);
        // SAFETY: mapped for good.
        assert!(!unsafe { Guard::new(again, PAGE, PAGE) }.is_lost(), "an entry that is used again");
    }
}
