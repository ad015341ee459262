//! A guest that generates load on a vhost-user-blk socket. The guest uses the `virtio-driver` crate and memory that is
//! allocated before the run, and neither copies data nor allocates memory during the run.
//!
//! The guest kicks once per batch of added requests, and sleeps on the call eventfd or polls the used ring.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use crate::harness::{Rng, random_stream};
use crate::sample::{Latencies, Sample};

/// Bytes of guest memory for each queue. Sufficient for eight requests of 1 MiB, and for a full queue of requests of
/// 4 KiB.
const MEMORY: usize = 8 << 20;
/// Maximum time without a completed request, after which the run fails.
const TIMEOUT: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
/// Number of entries of a queue. A request uses three entries.
const QUEUE_SIZE: u16 = 512;

/// Order of the offsets of a load's requests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Random, with repetition.
    Random,
    /// A pseudo-random permutation: no block is used again before every block has been used once.
    Shuffled,
    /// Sequential.
    Sequential,
}

/// Condition that ends a load.
#[derive(Clone, Copy)]
pub enum Until {
    /// The load ends after this time.
    Time(Duration),
    /// The load ends after this number of requests, or after ten minutes.
    Count(u64),
}

/// Parameters of a load.
#[derive(Clone, Copy)]
pub struct Load {
    /// Whether the requests write.
    pub write: bool,
    /// Bytes per request.
    pub block: usize,
    /// Maximum number of requests in flight.
    pub depth: usize,
    pub order: Order,
    /// Length of the used range at the start of the disk in bytes. A power of two.
    pub region: u64,
    /// Number of writes before each flush. The flush is submitted after all of them have completed.
    pub flush_every: Option<u64>,
    /// Whether the guest polls its ring instead of sleeping on the call eventfd.
    pub poll: bool,
    pub until: Until,
}

impl Load {
    /// Returns a load of random reads of 4 KiB, with 32 requests in flight.
    pub fn random_read(region: u64, time: Duration) -> Load {
        let until = Until::Time(time);
        Load {
            write: false,
            block: 4096,
            depth: 32,
            order: Order::Random,
            region,
            flush_every: None,
            poll: false,
            until,
        }
    }
}

/// A guest that is connected to a server.
pub struct Guest {
    // `queues` is declared before `transport`, so that it is dropped first: `transport` owns the memory of the queues.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    memory: MmapMut,
    _memfd: File,
    rng: Rng,
    next: u64,
}

impl Guest {
    /// Connects to `socket` with `queues` queues.
    pub fn connect(socket: &Path, queues: usize) -> io::Result<Guest> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::all().bits();
        let path = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let transport = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, QUEUE_SIZE)?;
        let memfd: File = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)?.into();
        memfd.set_len((MEMORY * queues.len()) as u64)?;
        // SAFETY: the file must not be truncated while it is mapped. Only this guest and the server have the memfd, and
        // neither of them truncates it.
        let mut memory = unsafe { MmapMut::map_mut(&memfd)? };
        // All pages are allocated before the first measurement.
        memory.fill(0x5a);
        transport.map_mem_region(memory.as_ptr() as usize, memory.len(), memfd.as_raw_fd(), 0)?;
        Ok(Guest { queues, transport, memory, _memfd: memfd, rng: random_stream(0), next: 0 })
    }

    /// Runs a load on the first queue.
    pub fn run(&mut self, load: &Load) -> io::Result<Sample> {
        let Guest { queues, transport, memory, rng, next, .. } = self;
        let mut lane = QueueRun { ring: &mut queues[0], transport: &**transport, queue: 0, rng, next };
        lane.run(load, &mut memory[..MEMORY])
    }

    /// Reads the first `size` bytes of the disk, so that they are in the page cache.
    pub fn warm(&mut self, size: u64) -> io::Result<()> {
        self.next = 0;
        let until = Until::Count(size >> 20);
        let load = Load {
            block: 1 << 20,
            depth: 4,
            order: Order::Sequential,
            until,
            ..Load::random_read(size, Duration::ZERO)
        };
        self.run(&load)?;
        self.next = 0;
        Ok(())
    }

    /// Runs a load on every queue at the same time. The load of queue `i` runs in a thread of its own on processor `i`.
    pub fn run_on_all(&mut self, load: &Load) -> io::Result<Vec<Sample>> {
        let Guest { queues, transport, memory, .. } = self;
        let transport = SyncTransport(&**transport);
        let pieces = memory.chunks_mut(MEMORY);
        std::thread::scope(|scope| {
            let threads: Vec<_> = queues
                .iter_mut()
                .zip(pieces)
                .enumerate()
                .map(|(queue, (ring, memory))| {
                    let (ring, transport) = (SendQueue(ring), &transport);
                    scope.spawn(move || {
                        crate::processors::pin_this_thread(queue);
                        let SendQueue(ring) = { ring };
                        let (rng, next) = (&mut random_stream(1 + queue as u64), &mut 0);
                        let SyncTransport(transport) = *transport;
                        QueueRun { ring, transport, queue, rng, next }.run(load, memory)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("a guest's thread does not panic")).collect()
        })
    }

    /// Writes `data` (up to 1 MiB) at `offset`, and waits for the completion.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory[..data.len()].copy_from_slice(data);
        self.queues[0].write(offset, &self.memory[..data.len()], 0)?;
        self.finish()
    }

    /// Reads `len` bytes at `offset`.
    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        self.queues[0].read(offset, &mut self.memory[..len], 0)?;
        self.finish()?;
        Ok(&self.memory[..len])
    }

    /// Flushes, and waits for the completion.
    pub fn flush(&mut self) -> io::Result<()> {
        self.queues[0].flush(0)?;
        self.finish()
    }

    fn finish(&mut self) -> io::Result<()> {
        let Guest { queues, transport, rng, next, .. } = self;
        let mut lane = QueueRun { ring: &mut queues[0], transport: &**transport, queue: 0, rng, next };
        lane.kick()?;
        let mut done = Vec::new();
        while done.is_empty() {
            lane.reap(&mut done)?;
            if done.is_empty() {
                lane.sleep()?;
            }
        }
        Ok(())
    }
}

/// A reference to the transport that the threads of several queues share.
struct SyncTransport<'a>(&'a VirtioBlkTransport);
// SAFETY: shared access from several threads must be free of data races. `run_on_all` gives each thread only a shared
// reference, and `QueueRun` calls only the methods that return the eventfds of its queue. These methods only read
// fields, and no field changes after the connection is set up.
unsafe impl Sync for SyncTransport<'_> {}

/// A queue, borrowed by the thread that runs its load.
struct SendQueue<'a>(&'a mut VirtioBlkQueue<'static, usize>);
// SAFETY: the queue must not depend on its thread, and two threads must not use it at the same time. The borrow is
// exclusive, so only one thread uses the queue. The `Virtqueue` in the queue is Send. The only other field is the box
// of request contexts, and the contexts are `usize` here, which does not depend on a thread.
unsafe impl Send for SendQueue<'_> {}

/// The state of one queue during a load.
struct QueueRun<'a> {
    ring: &'a mut VirtioBlkQueue<'static, usize>,
    transport: &'a VirtioBlkTransport,
    queue: usize,
    rng: &'a mut Rng,
    next: &'a mut u64,
}

impl QueueRun<'_> {
    fn run(&mut self, load: &Load, memory: &mut [u8]) -> io::Result<Sample> {
        assert!(load.depth * load.block <= memory.len() && load.region.is_power_of_two());
        self.ring.set_used_notif_enabled(false);
        let mut began = vec![Instant::now(); load.depth];
        let mut free: Vec<usize> = (0..load.depth).rev().collect();
        let mut done = Vec::with_capacity(load.depth);
        let mut latencies = Latencies::default();
        let (mut added, mut over) = (0u64, 0u64);
        let start = Instant::now();
        let (count, end) = match load.until {
            Until::Time(time) => (u64::MAX, start + time),
            Until::Count(count) => (count, start + Duration::from_secs(600)),
        };
        let mut now = start;
        loop {
            let most = match load.flush_every {
                None => count,
                // Requests that follow the next flush are added only when the flush has completed.
                Some(every) => count.min((over / every + 1) * every),
            };
            let any = !free.is_empty() && added < most && now < end;
            while added < most && now < end {
                let Some(slot) = free.pop() else { break };
                let buffer = &mut memory[slot * load.block..(slot + 1) * load.block];
                let offset = self.offset(load);
                if load.write {
                    buffer[..8].copy_from_slice(&offset.to_be_bytes());
                    self.ring.write(offset, buffer, slot)?;
                } else {
                    self.ring.read(offset, buffer, slot)?;
                }
                began[slot] = now;
                added += 1;
            }
            if any {
                self.kick()?;
            }
            if free.len() == load.depth {
                break;
            }
            self.reap(&mut done)?;
            if done.is_empty() {
                if load.poll {
                    std::hint::spin_loop();
                    continue;
                }
                self.sleep()?;
                self.reap(&mut done)?;
            }
            now = Instant::now();
            over += done.len() as u64;
            for slot in done.drain(..) {
                latencies.add(now - began[slot]);
                free.push(slot);
            }
            if load.flush_every.is_some_and(|every| over.is_multiple_of(every) && over == added) {
                self.flush(&mut done, load.poll)?;
                now = Instant::now();
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        Ok(Sample::new(over, seconds, &latencies))
    }

    fn flush(&mut self, done: &mut Vec<usize>, poll: bool) -> io::Result<()> {
        self.ring.flush(0)?;
        self.kick()?;
        while done.is_empty() {
            self.reap(done)?;
            if done.is_empty() && !poll {
                self.sleep()?;
            }
        }
        done.clear();
        Ok(())
    }

    fn offset(&mut self, load: &Load) -> u64 {
        let blocks = load.region / load.block as u64;
        let index = match load.order {
            Order::Sequential => *self.next % blocks,
            Order::Shuffled => permute(*self.next % blocks, blocks),
            Order::Random => self.rng.below(blocks),
        };
        *self.next += 1;
        index * load.block as u64
    }

    /// Kicks the server for the added requests, unless it has suppressed notifications.
    fn kick(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() {
            self.transport.get_submission_notifier(self.queue).notify()?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> io::Result<()> {
        for completion in self.ring.completions() {
            if completion.ret != 0 {
                return Err(io::Error::from_raw_os_error(-completion.ret));
            }
            done.push(completion.context);
        }
        Ok(())
    }

    /// Enables notifications of the server, and sleeps until the server sends one. Does not sleep if a request has
    /// completed already.
    fn sleep(&mut self) -> io::Result<()> {
        self.ring.set_used_notif_enabled(true);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if !self.ring.completions().has_next() {
            let fd = self.transport.get_completion_fd(self.queue);
            let mut polled = [PollFd::new(&*fd, PollFlags::IN)];
            if rustix::event::poll(&mut polled, Some(&TIMEOUT))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            fd.read()?;
        }
        self.ring.set_used_notif_enabled(false);
        Ok(())
    }
}

/// Maps `index` by a permutation of the numbers below `blocks`, which must be a power of two. The mapping is a
/// permutation because each step of the computation is invertible.
pub fn permute(index: u64, blocks: u64) -> u64 {
    let (mask, half) = (blocks - 1, blocks.trailing_zeros().div_ceil(2));
    let mut x = index;
    for odd in [0x9e37_79b1, 0x85eb_ca6b, 0xc2b2_ae35] {
        x = x.wrapping_mul(odd) & mask;
        x ^= x >> half;
    }
    x
}
