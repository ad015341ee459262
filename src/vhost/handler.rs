//! The vhost-user messages of one connection, and what they make of the rings.
//!
//! A ring runs when everything it needs is there: features, memory, size, addresses, a kick, and the word to enable
//! it. The messages may bring these in any order; after each one the rings that have become complete are started.
//! What a running ring uses is changed only after the ring is drained and stopped; then it goes on where it was.
//!
//! The handler ends with its connection; when it is dropped, its rings are drained. Addresses of rings stay as the
//! front-end gave them until a ring is started, so they may come before the memory they lie in.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use log::{debug, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::inflight::{self, Region};
use super::memory::{MAX_REGIONS, MemoryTable};
use super::worker::{Ring, Worker};
use crate::device::{AtomicMemory, Device, Vring};

/// What is offered besides the features of the device: that protocol features are spoken of at all.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// One connection's view of the disk.
pub(super) struct Handler<'a> {
    device: &'a Arc<Device>,
    workers: &'a [Worker],
    /// The disk's name, for the log.
    name: &'a str,
    memory: MemoryTable,
    /// Where the front-end keeps what is in flight, if it does.
    inflight: Option<Region>,
    rings: Vec<RingSetup>,
    /// What the front-end accepted of the features; none before it did.
    features: Option<u64>,
    protocol_features: u64,
    calls: u64,
}

/// What the front-end has said about a ring.
#[derive(Default)]
struct RingSetup {
    size: u16,
    addresses: Option<Addresses>,
    /// Where it starts, or where it stopped.
    base: u16,
    kick: Option<Arc<File>>,
    call: Option<File>,
    err: Option<File>,
    enabled: bool,
    running: bool,
}

/// Where a ring lies, in the front-end's own address space.
#[derive(Clone, Copy)]
struct Addresses {
    descriptors: u64,
    available: u64,
    used: u64,
}

fn failed(why: impl Into<String>) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(why.into()))
}

fn not_offered<T>() -> VhostResult<T> {
    Err(VhostError::InvalidOperation("not offered"))
}

impl<'a> Handler<'a> {
    /// A handler for a new connection; the device forgets what an earlier front-end negotiated.
    pub(super) fn new(device: &'a Arc<Device>, workers: &'a [Worker], name: &'a str) -> Handler<'a> {
        device.reset();
        let rings = workers.iter().map(|_| RingSetup::default()).collect();
        let memory = MemoryTable::default();
        let (inflight, features) = (None, None);
        Handler { device, workers, name, memory, inflight, rings, features, protocol_features: 0, calls: 0 }
    }

    /// Counts requests that passed the vhost crate's own checks.
    pub(super) fn calls(&self) -> u64 {
        self.calls
    }

    /// Whether REPLY_ACK was negotiated.
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    fn ring(&mut self, index: impl TryInto<usize>) -> VhostResult<(usize, &mut RingSetup)> {
        self.calls += 1;
        let index = index.try_into().ok().filter(|i| *i < self.rings.len()).ok_or(VhostError::InvalidParam)?;
        Ok((index, &mut self.rings[index]))
    }

    /// Starts the ring if it has all it needs and does not run.
    fn start_if_complete(&mut self, index: usize) -> VhostResult<()> {
        let ring = &self.rings[index];
        let (Some(features), Some(addresses), Some(kick)) = (self.features, ring.addresses, &ring.kick) else {
            return Ok(());
        };
        if ring.running || !ring.enabled || ring.size == 0 || self.memory.is_empty() {
            return Ok(());
        }
        let vring = self.lay_out(ring, addresses, features)?;
        let cloned = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        let (call, err) = (cloned(&ring.call), cloned(&ring.err));
        vring.set_call(call.map_err(VhostError::ReqHandlerError)?);
        let err = err.map_err(VhostError::ReqHandlerError)?;
        let (kick, base) = (kick.clone(), ring.base);
        let record = match &self.inflight {
            Some(region) => Some(region.record(index).ok_or_else(|| failed("the in-flight region has no such queue"))?),
            None => None,
        };
        let memory = self.memory.memory();
        let started = self.workers[index].start_ring(Ring { vring, memory, record, kick, err, base });
        started.map_err(|e| failed(e.line()))?;
        debug!("disk {}: ring {index} runs from {base}", self.name);
        self.rings[index].running = true;
        Ok(())
    }

    /// A ring's state as the device works on it.
    fn lay_out(&self, ring: &RingSetup, at: Addresses, features: u64) -> VhostResult<Vring> {
        let at = self.to_guest(at, ring.size)?;
        let refused = |e| failed(format!("the ring cannot be laid out: {e}"));
        let vring = Vring::new(AtomicMemory::from(self.memory.memory()), ring.size).map_err(refused)?;
        vring.set_queue_size(ring.size);
        vring.set_queue_info(at.descriptors, at.available, at.used).map_err(refused)?;
        vring.set_queue_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        vring.set_queue_next_avail(ring.base);
        vring.set_queue_next_used(vring.queue_used_idx().map_err(refused)?);
        vring.set_enabled(true);
        vring.set_queue_ready(true);
        Ok(vring)
    }

    /// The ring's places as guest addresses; each part must lie in one region.
    fn to_guest(&self, at: Addresses, size: u16) -> VhostResult<Addresses> {
        let size = u64::from(size);
        // A split ring: 16 bytes a descriptor; flags, index and 2 bytes an entry; flags, index and 8 bytes an entry;
        // and the event index after each of the latter.
        let place = |what: &str, user, len| {
            let guest = self.memory.guest_address(user, len);
            guest.ok_or_else(|| failed(format!("the {what} at {user:#x} lies outside the guest's memory")))
        };
        Ok(Addresses {
            descriptors: place("descriptor table", at.descriptors, 16 * size)?,
            available: place("available ring", at.available, 6 + 2 * size)?,
            used: place("used ring", at.used, 6 + 8 * size)?,
        })
    }

    /// Drains and stops these rings, all at once; they keep their place. Tells which ran.
    fn stop(&mut self, range: Range<usize>) -> Vec<usize> {
        let running: Vec<usize> = range.filter(|i| self.rings[*i].running).collect();
        let answers: Vec<_> = running.iter().map(|i| self.workers[*i].stop_ring()).collect();
        for (index, answer) in running.iter().zip(answers) {
            let ring = &mut self.rings[*index];
            ring.running = false;
            match answer.recv() {
                Ok(base) => ring.base = base,
                Err(_) => warn!("disk {}: the thread of queue {index} is lost", self.name),
            }
        }
        running
    }

    fn stop_all(&mut self) -> Vec<usize> {
        self.stop(0..self.rings.len())
    }

    /// Starts every ring that is complete. One that cannot be started stays stopped until it is set up anew.
    fn start_all(&mut self) {
        for index in 0..self.rings.len() {
            if let Err(e) = self.start_if_complete(index) {
                warn!("disk {}: ring {index} does not start: {e}", self.name);
            }
        }
    }

    /// Puts another memory table in place while no ring runs.
    fn change_memory(&mut self, table: MemoryTable) {
        self.stop_all();
        self.memory = table;
        self.start_all();
    }

    /// Changes a ring while it does not run.
    fn change_ring(&mut self, index: usize, change: impl FnOnce(&mut RingSetup)) -> VhostResult<()> {
        self.stop(index..index + 1);
        change(&mut self.rings[index]);
        self.start_if_complete(index)
    }
}

impl Drop for Handler<'_> {
    fn drop(&mut self) {
        self.stop_all();
    }
}

impl VhostUserBackendReqHandlerMut for Handler<'_> {
    fn set_owner(&mut self) -> VhostResult<()> {
        self.calls += 1;
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.calls += 1;
        self.stop_all();
        for ring in &mut self.rings {
            // The counters stay: front-ends set them once and not again after a reset.
            *ring = RingSetup { call: ring.call.take(), err: ring.err.take(), ..RingSetup::default() };
        }
        self.features = None;
        self.inflight = None;
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        self.calls += 1;
        Ok(self.device.features() | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        self.calls += 1;
        let unknown = features & !(self.device.features() | PROTOCOL_FEATURES);
        if unknown != 0 {
            return Err(failed(format!("features {unknown:#x} were not offered")));
        }
        self.stop_all();
        self.device.ack(features & !PROTOCOL_FEATURES);
        self.features = Some(features);
        if features & PROTOCOL_FEATURES == 0 {
            // Such a front-end never says that a ring is enabled.
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        self.start_all();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        self.calls += 1;
        let table = MemoryTable::from_regions(regions, files).map_err(VhostError::ReqHandlerError)?;
        self.change_memory(table);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let most = self.device.queue_size();
        let (index, _) = self.ring(index)?;
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= most);
        let size = size.ok_or_else(|| failed(format!("a queue of {num} entries: at most {most}, a power of two")))?;
        self.change_ring(index, |ring| ring.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let (index, ring) = self.ring(index)?;
        let size = ring.size;
        let addresses = Addresses { descriptors: descriptor, available, used };
        if !self.memory.is_empty() {
            self.to_guest(addresses, size)?;
        }
        self.change_ring(index, |ring| ring.addresses = Some(addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let (index, _) = self.ring(index)?;
        let base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        self.change_ring(index, |ring| ring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let (at, _) = self.ring(index)?;
        self.stop(at..at + 1);
        let ring = &mut self.rings[at];
        ring.kick = None;
        debug!("disk {}: ring {index} stopped at {}", self.name, ring.base);
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (index, _) = self.ring(index)?;
        let Some(kick) = fd else {
            return Err(failed("a ring without a kick, which the back-end is to poll, is not supported"));
        };
        self.change_ring(index, |ring| ring.kick = Some(Arc::new(kick)))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (index, ring) = self.ring(index)?;
        let copy = fd.as_ref().map(File::try_clone).transpose().map_err(VhostError::ReqHandlerError)?;
        ring.call = copy;
        if ring.running {
            self.workers[index].set_call(fd);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (index, ring) = self.ring(index)?;
        let copy = fd.as_ref().map(File::try_clone).transpose().map_err(VhostError::ReqHandlerError)?;
        ring.err = copy;
        if ring.running {
            self.workers[index].set_err(fd);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        self.calls += 1;
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        self.protocol_features = features;
        let unknown = features & !self.get_protocol_features()?.bits();
        match unknown {
            0 => Ok(()),
            _ => Err(failed(format!("protocol features {unknown:#x} were not offered"))),
        }
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        self.calls += 1;
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        let (index, ring) = self.ring(index)?;
        if ring.enabled == enable {
            return self.start_if_complete(index);
        }
        self.change_ring(index, |ring| ring.enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        self.calls += 1;
        Ok(self.device.read_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        self.calls += 1;
        self.device.write_config(offset, buf).map_err(|e| failed(e.line()))
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        self.calls += 1;
        inflight::create(inflight, self.device.queues(), self.device.queue_size()).map_err(VhostError::ReqHandlerError)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> VhostResult<()> {
        self.calls += 1;
        let region = Region::map(inflight, file, self.device.queues(), self.device.queue_size());
        let region = region.map_err(VhostError::ReqHandlerError)?;
        self.stop_all();
        self.inflight = Some(region);
        self.start_all();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        self.calls += 1;
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        self.calls += 1;
        let table = self.memory.with(region, fd).map_err(VhostError::ReqHandlerError)?;
        self.change_memory(table);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        self.calls += 1;
        let table = self.memory.without(region).map_err(VhostError::ReqHandlerError)?;
        self.change_memory(table);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        not_offered()
    }
}
