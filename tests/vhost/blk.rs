//! A correct guest: reads and writes sectors through a virtio-blk driver in this process.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags};
use virtio_driver::{VirtioBlkConfig, VirtioBlkFeatureFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

type Memory = vm_memory::GuestMemoryMmap<()>;

/// Size in bytes of the shared buffer of one queue.
const BUFFER: usize = 64 << 10;

pub(crate) struct Guest {
    queues: Vec<VirtioBlkQueue<'static, ()>>,
    transport: Box<VirtioBlkTransport>,
    memory: Memory,
    pub(crate) config: VirtioBlkConfig,
}

impl Guest {
    pub(crate) fn connect(socket: &Path, queues: usize, size: u16) -> Guest {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioFeatureFlags::RING_INDIRECT_DESC.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::MQ.bits()
            | VirtioBlkFeatureFlags::RO.bits();
        let user = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(socket.to_str().unwrap(), features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(user);
        let mut made = VirtioBlkQueue::setup_queues(&mut *transport, queues, size).unwrap();
        for queue in &mut made {
            queue.set_used_notif_enabled(true);
        }
        let config = transport.get_config().unwrap();
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len((BUFFER * queues) as u64).unwrap();
        let backing = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
        let memory = Memory::from_ranges_with_files([(GuestAddress(0), BUFFER * queues, Some(backing))]).unwrap();
        let start = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        transport.map_mem_region(start, BUFFER * queues, file.as_raw_fd(), 0).unwrap();
        Guest { queues: made, transport, memory, config }
    }

    /// Notifies the daemon and waits for the completion of one request. Returns 0 or a negative error number.
    fn finish(&mut self, queue: usize) -> i32 {
        self.transport.get_submission_notifier(queue).notify().unwrap();
        loop {
            if let Some(done) = self.queues[queue].completions().next() {
                return done.ret;
            }
            // The daemon has made the eventfd non-blocking, so the wait is a poll.
            let counter = self.transport.get_completion_fd(queue);
            let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
            let signalled = poll(&mut [PollFd::new(&*counter, PollFlags::IN)], Some(&patience)).unwrap();
            assert!(signalled > 0, "a request was not completed");
            counter.read().unwrap();
        }
    }

    fn buffer(&self, queue: usize) -> (GuestAddress, *mut u8) {
        let at = GuestAddress((queue * BUFFER) as u64);
        (at, self.memory.get_host_address(at).unwrap())
    }

    pub(crate) fn write(&mut self, queue: usize, offset: u64, data: &[u8]) -> i32 {
        let (at, buffer) = self.buffer(queue);
        self.memory.write_slice(data, at).unwrap();
        // SAFETY: `write_slice` above has checked that `data.len()` bytes at `buffer` lie in the mapping, and
        // `self.memory` keeps the mapping alive as long as `self`. `finish` returns only after the request has
        // completed, so the daemon does not use the buffer after this call.
        unsafe { self.queues[queue].write_raw(offset, buffer, data.len(), ()) }.unwrap();
        self.finish(queue)
    }

    pub(crate) fn read(&mut self, queue: usize, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        assert!(len <= BUFFER);
        let (at, buffer) = self.buffer(queue);
        // SAFETY: the queue's part of the mapping has `BUFFER` bytes, at least `len` by the assertion above, and
        // `self.memory` keeps the mapping alive as long as `self`. No reference into it exists. `finish` returns only
        // after the request has completed, so the daemon does not use the buffer after this call.
        unsafe { self.queues[queue].read_raw(offset, buffer, len, ()) }.unwrap();
        match self.finish(queue) {
            0 => {
                let mut data = vec![0; len];
                self.memory.read_slice(&mut data, at).unwrap();
                Ok(data)
            }
            error => Err(error),
        }
    }

    pub(crate) fn flush(&mut self, queue: usize) -> i32 {
        self.queues[queue].flush(()).unwrap();
        self.finish(queue)
    }
}
