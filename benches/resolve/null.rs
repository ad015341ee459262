//! Requests from a virtqueue to an engine that does nothing, so that only the cost of the daemon's own code is
//! measured.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diffdisk::device::{AtomicMemory, Device, MemoryRegions, Queue, Vring};
use diffdisk::error::Result;
use diffdisk::storage::host::Host;
use diffdisk::storage::{
    Access, CachedRange, Completion, Engine, EngineKind, Env, File, FilePresence, FileSlot, Folder, GuestIovecs, Op,
    Origin, PageCache, RuntimeFolder,
};
use uuid::Uuid;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress};

use super::chains::{BLOCKS, Fragmentation, make, open, plan_all};
use super::harness::random_stream;

const SIZE: u16 = 128;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
const HEADERS: u64 = 0x6000;
const STATUS: u64 = 0x7000;
const DATA: u64 = 0x10_0000;
/// Number of requests that are in flight together.
pub const BATCH: u16 = 32;

/// Serves at least `count` reads of 4 KiB, `batch` at a time (at most [`BATCH`]), through the engine `engine`.
pub fn run_requests(path: &Path, count: u64, batch: u16, engine: NullMode) {
    let disk = open(Arc::new(NullEnv { idle: Some(engine) }), &make(path, 16, Fragmentation::Whole));
    plan_all(&disk.version());
    let device = Device::new(disk.clone(), 1, SIZE, true);
    device.ack(1 << 32);
    let memory = MemoryRegions::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("memory");
    let vring = Vring::new(AtomicMemory::new(memory.clone()), SIZE).expect("a ring");
    vring.set_queue_size(SIZE);
    vring.set_queue_info(TABLE, AVAIL, USED).expect("addresses");
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    let lane = disk.lane(EngineKind::Auto, usize::from(SIZE)).unwrap_or_else(|e| panic!("{}", e.line()));
    let mut queue = Queue::new(device, lane, 0);
    queue.start(&vring, Arc::new(memory.clone().into()), None).unwrap_or_else(|e| panic!("{}", e.line()));
    let put = |at: u64, word: u64| memory.write_obj(word.to_le(), GuestAddress(at)).expect("inside");
    let (next, write) = (1u64, 2u64);
    for i in 0..u64::from(BATCH) {
        let chain = [(HEADERS + i * 16, 16, next), (DATA + i * 4096, 4096, next | write), (STATUS + i, 1, write)];
        for (n, (addr, len, flags)) in (0..).zip(chain) {
            let at = TABLE + (i * 3 + n) * 16;
            put(at, addr);
            put(at + 8, len | flags << 32 | (i * 3 + n + 1) << 48);
        }
    }
    let (mut avail, mut rng) = (0u16, random_stream(0));
    'batches: for _ in 0..count.div_ceil(u64::from(batch)) {
        for i in 0..batch {
            put(HEADERS + u64::from(i) * 16 + 8, rng.below(BLOCKS * 512) * 8);
            let entry = AVAIL + 4 + u64::from(avail % SIZE) * 2;
            memory.write_obj((i * 3).to_le(), GuestAddress(entry)).expect("inside");
            avail = avail.wrapping_add(1);
        }
        memory.write_obj(avail.to_le(), GuestAddress(AVAIL + 2)).expect("inside");
        // A call of `serve` serves a part of the batch, so it is repeated until the batch is complete.
        for _ in 0..batch {
            queue.serve(&vring).expect("the engine works");
            let used: u16 = memory.read_obj(GuestAddress(USED + 2)).expect("inside");
            if u16::from_le(used) == avail {
                continue 'batches;
            }
        }
        panic!("every request is answered at once");
    }
    queue.stop(&vring).expect("the engine works");
}

/// The `Env` of the host, without the features that valgrind does not support, and optionally with engines that do
/// nothing.
pub struct NullEnv {
    pub idle: Option<NullMode>,
}

/// An engine that does nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum NullMode {
    /// Completes all operations at once.
    Operations,
    /// Reports every copy as done.
    Copies,
}

impl Env for NullEnv {
    fn open(&self, path: &Path, access: Access) -> Result<File> {
        Host.open(path, access)
    }
    fn folder(&self, path: &Path) -> Result<Folder> {
        Host.folder(path)
    }
    fn file_presence(&self, path: &Path) -> FilePresence {
        Host.file_presence(path)
    }
    fn remove(&self, path: &Path) -> Result<()> {
        Host.remove(path)
    }
    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        Host.canonical(path)
    }
    fn exists(&self, path: &Path) -> bool {
        Host.exists(path)
    }
    fn runtime_folder(&self, folder: &Path) -> Result<RuntimeFolder> {
        Host.runtime_folder(folder)
    }
    fn origin(&self) -> Result<Origin> {
        Host.origin()
    }
    fn now(&self) -> i64 {
        Host.now()
    }
    fn monotonic_time(&self) -> std::time::Duration {
        Host.monotonic_time()
    }
    fn uuid(&self) -> Uuid {
        Host.uuid()
    }
    fn engine(&self, kind: EngineKind, depth: usize) -> Result<Box<dyn Engine>> {
        // A blocking engine executes its operations, because `Disk::open` preallocates space by a blocking engine.
        match (kind, self.idle) {
            (EngineKind::Blocking, _) | (_, None) => Host.engine(kind, depth),
            (_, Some(idle)) => Ok(Box::new(NullEngine(Vec::new(), idle))),
        }
    }
}

struct NullEngine(Vec<Completion>, NullMode);

impl Engine for NullEngine {
    fn register(&mut self, _: FileSlot, _: &File) -> io::Result<()> {
        Ok(())
    }
    fn unregister(&mut self, _: FileSlot) -> io::Result<()> {
        Ok(())
    }
    fn page_cache(&self) -> Option<Box<dyn PageCache>> {
        Some(Box::new(NullPageCache(self.1)))
    }
    fn push(&mut self, op: Op) -> std::result::Result<(), Op> {
        self.0.push(Completion { op, result: Ok(()) });
        Ok(())
    }
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.0);
    }
    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn outstanding(&self) -> usize {
        self.0.len()
    }
    fn depth(&self) -> usize {
        usize::from(SIZE)
    }
    fn system_calls(&self) -> u64 {
        0
    }
    fn name(&self) -> &'static str {
        "nothing"
    }
}

struct NullPageCache(NullMode);

impl PageCache for NullPageCache {
    fn register(&mut self, _: FileSlot, _: &File) -> io::Result<()> {
        Ok(())
    }
    fn unregister(&mut self, _: FileSlot) {}
    fn find(&mut self, slot: FileSlot, offset: u64, len: usize) -> Option<CachedRange> {
        (self.0 == NullMode::Copies).then(|| CachedRange::new(slot, offset, len))
    }
    fn copy(&mut self, _: &CachedRange, _: &GuestIovecs, _: usize) -> bool {
        true
    }
    fn end_batch(&mut self) {}
    fn query_residency(&mut self) {}
}
