//! A guest for tests: a vhost-user-blk client on the `virtio-driver` crate, with many requests in flight.
//!
//! Shared memory is one memfd divided into slots of 1 MiB. Each request in flight owns one slot. [`Client::submit`]
//! queues a [`Command`], and [`Client::wait`] returns the next completion of any queue. `read` and `write` submit and
//! wait, in requests of at most one slot. `flush`, `discard` and `write_zeroes` submit one request and wait.
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

/// Maximum size of a request in bytes.
pub(crate) const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Maximum wait for a completion.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Options of a connection.
pub(crate) struct Options {
    /// virtio features to accept if they are offered.
    pub(crate) features: u64,
    /// Number of queues.
    pub(crate) queues: usize,
    /// Number of descriptors per queue.
    pub(crate) queue_size: u16,
    /// Maximum number of requests in flight, over all queues.
    pub(crate) depth: usize,
}

impl Default for Options {
    fn default() -> Options {
        let ring = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        Options { features: ring.bits() | VirtioBlkFeatureFlags::all().bits(), queues: 1, queue_size: 128, depth: 16 }
    }
}

/// A request. Offsets and lengths are in bytes and multiples of 512.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Command<'a> {
    /// Read `len` bytes, at most [`MAX_REQUEST_BYTES`].
    Read { offset: u64, len: usize },
    /// Write `data`, at most [`MAX_REQUEST_BYTES`].
    Write { offset: u64, data: &'a [u8] },
    /// Make completed writes durable.
    Flush,
    /// Discard the range, whose data the guest no longer needs.
    Discard { offset: u64, len: u64 },
    /// Zero the range; with `unmap` its space may be deallocated.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// A finished request.
#[derive(Debug)]
pub(crate) struct Completed {
    /// The ticket that [`Client::submit`] returned for the request.
    pub(crate) ticket: u64,
    /// Success, or the error for the status byte: EIO, ENOTSUP, or EPROTO for an undefined status.
    pub(crate) result: io::Result<()>,
    /// Data of a successful read; empty otherwise.
    pub(crate) data: Vec<u8>,
}

#[derive(Clone, Copy)]
struct InFlight {
    ticket: u64,
    read: usize,
}

/// A connected guest.
pub(crate) struct Client {
    // Declared before `transport`, so that the queues are dropped before the transport, which owns their memory.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    memory: MmapMut,
    _memfd: File,
    slots: Vec<Option<InFlight>>,
    next_ticket: u64,
}

impl Client {
    /// Connects to `socket` with one queue and at most 16 requests in flight.
    pub(crate) fn connect(socket: &Path) -> io::Result<Client> {
        Client::connect_with(socket, &Options::default())
    }

    /// Connects to `socket` with the given options.
    pub(crate) fn connect_with(socket: &Path, options: &Options) -> io::Result<Client> {
        let path = socket.to_str().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let transport = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, options.features)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, options.queues, options.queue_size)?;
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        let memfd: File = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC)?.into();
        memfd.set_len((options.depth * MAX_REQUEST_BYTES) as u64)?;
        // SAFETY: only this client and the back-end have the memfd, and neither truncates it, so every page of the
        // mapping exists. The back-end, another process, writes only to the buffers of requests in flight. This client
        // accesses a slot only while no request in flight uses the slot, so no byte is accessed by both at once.
        let memory = unsafe { MmapMut::map_mut(&memfd)? };
        transport.map_mem_region(memory.as_ptr() as usize, memory.len(), memfd.as_raw_fd(), 0)?;
        let slots = vec![None; options.depth];
        Ok(Client { queues, transport, memory, _memfd: memfd, slots, next_ticket: 0 })
    }

    /// Reads the device's configuration space.
    pub(crate) fn config(&self) -> io::Result<VirtioBlkConfig> {
        self.transport.get_config()
    }

    /// Returns the size of the disk in bytes.
    pub(crate) fn capacity(&self) -> io::Result<u64> {
        let sectors = self.config()?.capacity;
        Ok(u64::from(sectors) * 512)
    }

    /// Returns the negotiated features of virtio-blk.
    pub(crate) fn features(&self) -> VirtioBlkFeatureFlags {
        VirtioBlkFeatureFlags::from_bits_truncate(self.transport.get_features())
    }

    /// Returns the number of requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Returns whether one more request can be submitted.
    pub(crate) fn has_room(&self) -> bool {
        self.slots.iter().any(Option::is_none)
    }

    /// Queues one request and notifies the back-end. Returns the ticket of the request. Fails with `WouldBlock` if
    /// every slot is in use.
    pub(crate) fn submit(&mut self, queue: usize, command: Command<'_>) -> io::Result<u64> {
        let slot = self.slots.iter().position(Option::is_none).ok_or(io::ErrorKind::WouldBlock)?;
        let room = &mut self.memory[slot * MAX_REQUEST_BYTES..(slot + 1) * MAX_REQUEST_BYTES];
        let ring = &mut self.queues[queue];
        let mut read = 0;
        match command {
            Command::Read { offset, len } => {
                let buffer = room.get_mut(..len).ok_or(io::ErrorKind::InvalidInput)?;
                // Overwrites old data, so that a byte which the back-end fails to write is noticed.
                buffer.fill(0xA5);
                read = len;
                ring.read(offset, buffer, slot)?;
            }
            Command::Write { offset, data } => {
                let buffer = room.get_mut(..data.len()).ok_or(io::ErrorKind::InvalidInput)?;
                buffer.copy_from_slice(data);
                ring.write(offset, buffer, slot)?;
            }
            Command::Flush => ring.flush(slot)?,
            Command::Discard { offset, len } => ring.discard(offset, len, slot)?,
            Command::WriteZeroes { offset, len, unmap } => ring.write_zeroes(offset, len, unmap, slot)?,
        }
        if ring.avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify()?;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.slots[slot] = Some(InFlight { ticket, read });
        Ok(ticket)
    }

    /// Waits for the next completion of any queue. Fails with `TimedOut` after 30 s, and with `NotFound` if no request
    /// is in flight.
    pub(crate) fn wait(&mut self) -> io::Result<Completed> {
        self.wait_for(TIMEOUT)
    }

    /// Waits up to `timeout` for the next completion of any queue. Fails with `TimedOut` after that time, and with
    /// `NotFound` if no request is in flight.
    pub(crate) fn wait_for(&mut self, timeout: Duration) -> io::Result<Completed> {
        if self.in_flight() == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(done) = self.poll() {
                return Ok(done);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.sleep_until_signalled(left)?;
        }
    }

    /// Returns a completion if one is available.
    pub(crate) fn poll(&mut self) -> Option<Completed> {
        let done = self.queues.iter_mut().find_map(|queue| queue.completions().next())?;
        let slot = done.context;
        let InFlight { ticket, read } = self.slots[slot].take().expect("a completion belongs to a slot in flight");
        let result = if done.ret == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-done.ret)) };
        let data = if done.ret == 0 {
            self.memory[slot * MAX_REQUEST_BYTES..slot * MAX_REQUEST_BYTES + read].to_vec()
        } else {
            Vec::new()
        };
        Some(Completed { ticket, result, data })
    }

    /// Sleeps until the completion eventfd of a queue is signalled, or until the timeout. Returns at once if a queue
    /// has completed a request since the eventfd was last read.
    fn sleep_until_signalled(&self, timeout: Duration) -> io::Result<()> {
        let fds: Vec<_> = (0..self.queues.len()).map(|i| self.transport.get_completion_fd(i)).collect();
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd.as_ref(), PollFlags::IN)).collect();
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        rustix::event::poll(&mut polled, Some(&timeout))?;
        for (fd, polled) in fds.iter().zip(&polled) {
            if !polled.revents().is_empty() {
                fd.read()?;
            }
        }
        Ok(())
    }

    /// Submits one request and waits for its completion. Panics if another request is in flight.
    pub(crate) fn run(&mut self, command: Command<'_>) -> io::Result<Vec<u8>> {
        assert_eq!(self.in_flight(), 0, "run() would take another request's completion");
        self.submit(0, command)?;
        let done = self.wait()?;
        done.result.map(|()| done.data)
    }

    /// Reads `len` bytes, one request at a time.
    pub(crate) fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let piece = MAX_REQUEST_BYTES.min(len - data.len());
            data.extend(self.run(Command::Read { offset: offset + data.len() as u64, len: piece })?);
        }
        Ok(data)
    }

    /// Writes `data`, one request at a time.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (i, piece) in data.chunks(MAX_REQUEST_BYTES).enumerate() {
            self.run(Command::Write { offset: offset + (i * MAX_REQUEST_BYTES) as u64, data: piece })?;
        }
        Ok(())
    }

    /// Makes completed writes durable.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.run(Command::Flush).map(drop)
    }

    /// Discards a range.
    pub(crate) fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.run(Command::Discard { offset, len }).map(drop)
    }

    /// Zeroes a range.
    pub(crate) fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.run(Command::WriteZeroes { offset, len, unmap }).map(drop)
    }

    /// Reads the whole disk in requests of `piece` bytes, over all queues, with as many requests in flight as there are
    /// slots.
    pub(crate) fn read_all(&mut self, piece: usize) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.capacity()?).map_err(io::Error::other)?;
        let mut disk = vec![0; len];
        let mut next = 0;
        let mut places = std::collections::HashMap::new();
        while next < len || self.in_flight() > 0 {
            while next < len && self.has_room() {
                let count = piece.min(len - next);
                let queue = (next / piece) % self.queues.len();
                places.insert(self.submit(queue, Command::Read { offset: next as u64, len: count })?, next);
                next += count;
            }
            let done = self.wait()?;
            done.result?;
            let at = places.remove(&done.ticket).expect("a ticket comes back once");
            disk[at..at + done.data.len()].copy_from_slice(&done.data);
        }
        Ok(disk)
    }
}
