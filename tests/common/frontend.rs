//! A front-end that survives restarts of the daemon: it keeps guest memory, rings, eventfds and the in-flight region
//! while daemons are killed and started. The crate `virtio-driver` cannot send an in-flight region to a new daemon, so
//! this front-end has its own implementation of vhost-user.
//!
//! [`Machine::connect`] does the work of the front-end. Each [`Driver`] is the guest's driver of one queue, runs on a
//! thread of its own, and takes no action when the daemon restarts.
#![allow(clippy::host_endian_bytes, reason = "vhost-user and eventfd use the byte order of the host")]
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Duration;

use memmap2::MmapRaw;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use zerocopy::IntoBytes;

/// Maximum data of a request in bytes.
pub const MAX_DATA: usize = 64 << 10;
/// Maximum number of requests in flight in a queue.
pub const DEPTH: usize = 24;
/// Number of descriptors in a ring.
const QUEUE_SIZE: u16 = 128;
/// Layout of a queue's memory: descriptors, avail ring, used ring, then slots. A slot consists of a page for header and
/// status, followed by the data.
const AVAIL_OFFSET: usize = 0x1000;
const USED_OFFSET: usize = 0x2000;
const SLOTS_OFFSET: usize = 0x4000;
const SLOT_BYTES: usize = 0x1000 + MAX_DATA;
const QUEUE_BYTES: usize = SLOTS_OFFSET + DEPTH * SLOT_BYTES;
/// Guest address of the memory, and the user address that the front-end announces for the memory.
const GUEST_BASE: u64 = 0x1_0000_0000;
const USER_BASE: u64 = 0x7000_0000_0000;
/// Maximum wait for a completion.
const TIMEOUT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

const EVENT_IDX: u64 = 1 << 29;
/// VERSION_1, PROTOCOL_FEATURES, FLUSH, MQ, WRITE_ZEROES.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 9 | 1 << 12 | 1 << 14;
/// MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD.
const PROTOCOL_FEATURES: u64 = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12;

/// The index that a front-end sends in SET_VRING_BASE when it reconnects.
#[derive(Clone, Copy, Debug)]
pub enum RestoredBase {
    /// QEMU: the index of the used ring.
    Used,
    /// cloud-hypervisor: the index of the avail ring.
    Avail,
}

/// Options of a connection.
pub struct ConnectOptions<'a> {
    pub base: RestoredBase,
    /// Whether to wait for an acknowledgement of each message that has no reply, as soon as REPLY_ACK is negotiated.
    /// Otherwise the front-end sends the next message at once.
    pub wait_for_ack: bool,
    /// Called before each message.
    pub before_message: &'a mut dyn FnMut(),
}

/// Guest memory, and the state of a front-end.
pub struct Machine {
    memory: Arc<MmapRaw>,
    file: OwnedFd,
    kicks: Vec<Arc<OwnedFd>>,
    calls: Vec<Arc<OwnedFd>>,
    features: u64,
    /// The in-flight region that the first back-end created: the message body that describes the region, and the
    /// region's file.
    inflight: Option<(Vec<u8>, OwnedFd)>,
}

impl Machine {
    /// Makes a machine whose disk has `queues` queues.
    pub fn new(queues: usize, event_idx: bool) -> Machine {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, (queues * QUEUE_BYTES) as u64).expect("guest memory");
        let memory = Arc::new(MmapRaw::map_raw(&file).expect("guest memory is mapped"));
        let event = || Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an event fd"));
        let events = || (0..queues).map(|_| event()).collect();
        let features = FEATURES | if event_idx { EVENT_IDX } else { 0 };
        Machine { memory, file, kicks: events(), calls: events(), features, inflight: None }
    }

    /// Returns the driver of a queue. Must be called once per queue.
    pub fn driver(&self, queue: usize) -> Driver {
        Driver {
            memory: self.memory.clone(),
            at: queue * QUEUE_BYTES,
            kick: self.kicks[queue].clone(),
            call: self.calls[queue].clone(),
            event_idx: self.features & EVENT_IDX != 0,
            added: 0,
            last_used: 0,
        }
    }

    /// Connects to the back-end on `socket`, negotiates, and sends the memory and the current state of the rings.
    ///
    /// # Errors
    /// The socket cannot be connected, the back-end closed the connection, or a reply took more than 30 seconds.
    ///
    /// # Panics
    /// The back-end refused a message, or does not offer a feature that this front-end needs.
    pub fn connect(&mut self, socket: &Path, manners: &mut ConnectOptions<'_>) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut channel = MessageChannel { stream: &stream, acknowledged: false, manners };
        channel.set(3, &[], None)?;
        let offered = channel.get(1)?;
        assert_eq!(offered & self.features, self.features, "features");
        let offered = channel.get(15)?;
        assert_eq!(offered & PROTOCOL_FEATURES, PROTOCOL_FEATURES, "protocol features");
        channel.set(16, PROTOCOL_FEATURES.as_bytes(), None)?;
        channel.acknowledged = channel.manners.wait_for_ack;
        channel.set(2, self.features.as_bytes(), None)?;
        let region = [GUEST_BASE, (self.kicks.len() * QUEUE_BYTES) as u64, USER_BASE, 0];
        channel.set(5, &[[1u32, 0].as_bytes(), region.as_bytes()].concat(), Some(self.file.as_fd()))?;
        if self.inflight.is_none() {
            let queues = u16::try_from(self.kicks.len()).expect("few queues");
            let shape = [[0u64, 0].as_bytes(), [queues, QUEUE_SIZE, 0, 0].as_bytes()].concat();
            channel.send(31, 1, &shape, None)?;
            let (region, file) = channel.read_reply(31)?;
            self.inflight = Some((region, file.expect("a region has a file")));
        }
        let (region, file) = self.inflight.as_ref().expect("asked for above");
        channel.set(32, region, Some(file.as_fd()))?;
        for (queue, (kick, call)) in (0u32..).zip(self.kicks.iter().zip(&self.calls)) {
            let user = USER_BASE + u64::from(queue) * QUEUE_BYTES as u64;
            let at = queue as usize * QUEUE_BYTES;
            let base = match channel.manners.base {
                RestoredBase::Used => atomic_u16(&self.memory, at + USED_OFFSET + 2),
                RestoredBase::Avail => atomic_u16(&self.memory, at + AVAIL_OFFSET + 2),
            };
            channel.set(8, [queue, u32::from(QUEUE_SIZE)].as_bytes(), None)?;
            let places = [user, user + USED_OFFSET as u64, user + AVAIL_OFFSET as u64, 0];
            channel.set(9, &[[queue, 0].as_bytes(), places.as_bytes()].concat(), None)?;
            channel.set(10, [queue, u32::from(base.load(Ordering::Acquire))].as_bytes(), None)?;
            channel.set(13, u64::from(queue).as_bytes(), Some(call.as_fd()))?;
            channel.set(12, u64::from(queue).as_bytes(), Some(kick.as_fd()))?;
            channel.set(18, [queue, 1].as_bytes(), None)?;
        }
        // The back-end replies to GET_QUEUE_NUM only after it has handled all earlier messages.
        channel.get(17)?;
        Ok(stream)
    }
}

struct MessageChannel<'a, 'b> {
    stream: &'a UnixStream,
    acknowledged: bool,
    manners: &'a mut ConnectOptions<'b>,
}

impl MessageChannel<'_, '_> {
    fn send(&mut self, request: u32, flags: u32, body: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        (self.manners.before_message)();
        let message = [[request, flags, u32::try_from(body.len()).expect("short")].as_bytes(), body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files: Vec<_> = file.into_iter().collect();
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        }
        let sent = sendmsg(self.stream, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
        assert_eq!(sent, message.len());
        Ok(())
    }

    fn set(&mut self, request: u32, body: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send(request, if self.acknowledged { 9 } else { 1 }, body, file)?;
        if self.acknowledged {
            let (body, _) = self.read_reply(request)?;
            assert_eq!(body, 0u64.as_bytes(), "request {request} is refused");
        }
        Ok(())
    }

    fn get(&mut self, request: u32) -> io::Result<u64> {
        self.send(request, 1, &[], None)?;
        let (body, _) = self.read_reply(request)?;
        Ok(u64::from_ne_bytes(body.try_into().expect("a number")))
    }

    fn read_reply(&mut self, request: u32) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut header = [0u32; 3];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(header.as_mut_bytes())];
        let got = recvmsg(self.stream, into, &mut control, RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL)?.bytes;
        if got < 12 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut file = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut files) = message {
                file = files.next();
            }
        }
        assert_eq!((header[0], header[1]), (request, 5), "the answer to {request}");
        let mut body = vec![0; header[2] as usize];
        let mut stream = self.stream;
        stream.read_exact(&mut body)?;
        Ok((body, file))
    }
}

fn atomic_u16(memory: &MmapRaw, at: usize) -> &AtomicU16 {
    assert!(at + 2 <= memory.len() && at.is_multiple_of(2));
    // SAFETY: the assertion has checked that the word is aligned and lies in the mapping, and `memory` is borrowed for
    // the lifetime of the result. Both sides access ring words only atomically. This process writes a status word in
    // other ways only before it publishes the request, and reads the word only after the used index has shown that the
    // request is complete.
    unsafe { AtomicU16::from_ptr(memory.as_mut_ptr().add(at).cast()) }
}

/// Type of a request, with its virtio-blk number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    Read = 0,
    Write = 1,
    Flush = 4,
    WriteZeroes = 13,
}

/// The guest's driver of one queue.
pub struct Driver {
    memory: Arc<MmapRaw>,
    at: usize,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    event_idx: bool,
    added: u16,
    last_used: u16,
}

impl Driver {
    /// Returns the data buffer of a slot, which must have no request in flight.
    pub fn data(&mut self, slot: usize) -> &mut [u8] {
        assert!(slot < DEPTH);
        // SAFETY: the assertion bounds the slot, so its data lies in the mapping, which `self` keeps alive. Callers
        // pass only slots without a request in flight, so the back-end does not access the data. Only the driver of a
        // queue makes references to the data of the queue's slots, each queue has one driver, and `&mut self` excludes
        // a second reference.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().add(self.slot_offset(slot) + 0x1000), MAX_DATA)
        }
    }

    fn slot_offset(&self, slot: usize) -> usize {
        self.at + SLOTS_OFFSET + slot * SLOT_BYTES
    }

    fn write_at(&mut self, at: usize, bytes: &[u8]) {
        assert!(at >= self.at && at + bytes.len() <= self.at + QUEUE_BYTES);
        // SAFETY: the assertion has checked that the range lies in this queue's part of the mapping, which `self` keeps
        // alive. `bytes` is private memory of this process, so the ranges do not overlap. The back-end reads the range
        // only after `avail.idx` has been advanced.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.as_mut_ptr().add(at), bytes.len()) };
    }

    /// Adds a request for `sectors` sectors to the ring. The data of reads and writes is in [`Driver::data`].
    pub fn add(&mut self, slot: usize, kind: RequestKind, sector: u64, sectors: u32) {
        let place = self.slot_offset(slot);
        let guest = |at: usize| GUEST_BASE + at as u64;
        self.write_at(place, &[[kind as u32, 0].as_bytes(), sector.as_bytes()].concat());
        self.write_at(place + 16, &[0xff]);
        let (len, flags) = match kind {
            RequestKind::Read => (sectors * 512, 2),
            RequestKind::Write => (sectors * 512, 0),
            RequestKind::Flush => (0, 0),
            RequestKind::WriteZeroes => {
                self.write_at(place + 0x1000, &[sector.as_bytes(), [sectors, 0].as_bytes()].concat());
                (16, 0)
            }
        };
        let pieces = [(place, 16, 0u16), (place + 0x1000, len, flags), (place + 16, 1, 2)];
        let pieces: Vec<_> = pieces.into_iter().filter(|(_, len, _)| *len > 0).collect();
        let head = u16::try_from(3 * slot).expect("few slots");
        for (i, (at, len, flags)) in (head..).zip(&pieces) {
            let more = u16::from(usize::from(i - head) + 1 < pieces.len());
            let desc = [guest(*at).as_bytes(), len.as_bytes(), [flags | more, i + 1].as_bytes()].concat();
            self.write_at(self.at + 16 * usize::from(i), &desc);
        }
        atomic_u16(&self.memory, self.at + AVAIL_OFFSET + 4 + 2 * usize::from(self.added % QUEUE_SIZE))
            .store(head, Ordering::Relaxed);
        self.added = self.added.wrapping_add(1);
        atomic_u16(&self.memory, self.at + AVAIL_OFFSET + 2).store(self.added, Ordering::Release);
    }

    /// Kicks the device for the last `added` requests, unless the device has disabled notifications.
    pub fn kick(&mut self, added: u16) {
        fence(Ordering::SeqCst);
        let enabled = if self.event_idx {
            let event = atomic_u16(&self.memory, self.at + USED_OFFSET + 4 + 8 * usize::from(QUEUE_SIZE))
                .load(Ordering::Relaxed);
            self.added.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            atomic_u16(&self.memory, self.at + USED_OFFSET).load(Ordering::Relaxed) & 1 == 0
        };
        if enabled {
            rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("a kick");
        }
    }

    /// Waits for at least one completion. Returns the slot and the status byte of each completed request.
    ///
    /// # Panics
    /// No request completes within a minute.
    pub fn wait(&mut self) -> Vec<(usize, u8)> {
        loop {
            let back = self.reap();
            if !back.is_empty() {
                return back;
            }
            if self.event_idx {
                let at = self.at + AVAIL_OFFSET + 4 + 2 * usize::from(QUEUE_SIZE);
                atomic_u16(&self.memory, at).store(self.last_used, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if atomic_u16(&self.memory, self.at + USED_OFFSET + 2).load(Ordering::Relaxed) != self.last_used {
                    continue;
                }
            }
            let ready = poll(&mut [PollFd::new(&self.call, PollFlags::IN)], Some(&TIMEOUT)).expect("a poll");
            let used = atomic_u16(&self.memory, self.at + USED_OFFSET + 2).load(Ordering::Relaxed);
            assert!(
                ready > 0,
                "a request is lost: no signal; avail index {}, last used {}, used index {used}",
                self.added,
                self.last_used
            );
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
        }
    }

    fn reap(&mut self) -> Vec<(usize, u8)> {
        let mut back = Vec::new();
        let used = atomic_u16(&self.memory, self.at + USED_OFFSET + 2).load(Ordering::Acquire);
        assert!(
            self.added.wrapping_sub(self.last_used) >= used.wrapping_sub(self.last_used),
            "more requests complete than were added"
        );
        while self.last_used != used {
            let at = self.at + USED_OFFSET + 4 + 8 * usize::from(self.last_used % QUEUE_SIZE);
            let head = atomic_u16(&self.memory, at).load(Ordering::Relaxed);
            assert!(head.is_multiple_of(3) && usize::from(head) < 3 * DEPTH, "head {head} was not added");
            let slot = usize::from(head / 3);
            let status = self.slot_offset(slot) + 16;
            back.push((slot, atomic_u16(&self.memory, status).load(Ordering::Relaxed).to_ne_bytes()[0]));
            self.last_used = self.last_used.wrapping_add(1);
        }
        back
    }
}
