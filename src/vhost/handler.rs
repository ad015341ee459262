//! Handles the vhost-user messages of one connection, which set up, start and stop the rings.
//!
//! Messages may set the parts of a ring in any order. After each message, the rings that have become complete are
//! started (`rings`). The handler is dropped at the end of its connection, which drains the rings.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use log::debug;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut};

use super::inflight::{self, InflightRecords};
use super::limits::MAX_QUEUE_SIZE;
use super::memory::{MAX_REGIONS, MemoryTable};
use super::passed_fd::{check_eventfd, check_writable_eventfd};
use super::rings::{Kick, RingAddresses, RingSetup, Rings, refusal};
use super::worker::Worker;
use crate::device::Device;

/// The feature bit that this floor adds to the features of the device: protocol features can be negotiated.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// State of one connection: the negotiated features and the rings.
pub(super) struct Handler<'a> {
    device: &'a Arc<Device>,
    rings: Rings<'a>,
    protocol_features: u64,
    handled_requests: u64,
}

/// Returns advice for a front-end that uses more queues than are offered.
pub(super) fn queue_count_hint(offered: usize) -> String {
    format!(
        "The disk offers {offered}: configure at most that many queues in the front-end (num-queues), or start diffdiskd with \
         a larger --num-queues"
    )
}

fn not_offered<T>() -> VhostResult<T> {
    Err(VhostError::InvalidOperation("not offered"))
}

impl<'a> Handler<'a> {
    /// Creates the handler of a new connection, and resets the features and the write cache mode that an earlier
    /// front-end set. `stop` is readable after the stop signal.
    pub(super) fn new(
        device: &'a Arc<Device>,
        workers: &'a [Worker],
        name: &'a str,
        stop: BorrowedFd<'a>,
    ) -> Handler<'a> {
        device.reset();
        Handler { device, rings: Rings::new(workers, name, stop), protocol_features: 0, handled_requests: 0 }
    }

    /// Returns whether an access to guest memory or to the in-flight region failed.
    pub(super) fn is_memory_lost(&self) -> bool {
        self.rings.is_memory_lost()
    }

    /// Returns whether the connection must be closed because requests in flight do not complete.
    pub(super) fn is_stuck(&self) -> bool {
        self.rings.is_stuck()
    }

    /// Returns the number of requests that passed the checks of the vhost crate, without requests that the daemon does
    /// not offer.
    pub(super) fn handled_requests(&self) -> u64 {
        self.handled_requests
    }

    /// Returns whether at least one ring lacks nothing but guest memory.
    pub(super) fn waits_for_memory(&self) -> bool {
        self.rings.waits_for_memory()
    }

    /// Returns whether the front-end has set the size of at least one ring.
    pub(super) fn has_rings(&self) -> bool {
        self.rings.setups.iter().any(|ring| ring.size > 0)
    }

    /// Returns whether a protocol feature was negotiated.
    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    fn ring(&mut self, index: impl TryInto<usize>) -> VhostResult<(usize, &mut RingSetup)> {
        self.handled_requests += 1;
        let offered = self.rings.setups.len();
        let index = index.try_into().ok().filter(|i| *i < offered);
        let index = index
            .ok_or_else(|| refusal(format!("the disk has no queue of this number. {}", queue_count_hint(offered))))?;
        Ok((index, &mut self.rings.setups[index]))
    }
}

impl VhostUserBackendReqHandlerMut for Handler<'_> {
    fn set_owner(&mut self) -> VhostResult<()> {
        self.handled_requests += 1;
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.handled_requests += 1;
        self.rings.stop_all()?;
        for ring in &mut self.rings.setups {
            // The call and error eventfds stay, since front-ends do not set them again after a reset.
            *ring = RingSetup { call: ring.call.take(), err: ring.err.take(), ..RingSetup::default() };
        }
        self.rings.features = None;
        self.rings.inflight = None;
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        self.handled_requests += 1;
        Ok(self.device.features() | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        self.handled_requests += 1;
        let unknown = features & !(self.device.features() | PROTOCOL_FEATURES);
        if unknown != 0 {
            return Err(refusal(format!("features {unknown:#x} were not offered")));
        }
        self.rings.stop_all()?;
        self.device.ack(features & !PROTOCOL_FEATURES);
        self.rings.features = Some(features);
        if features & PROTOCOL_FEATURES == 0 {
            // Without protocol features there is no SET_VRING_ENABLE, and rings are enabled from the start.
            self.rings.setups.iter_mut().for_each(|ring| ring.enabled = true);
        }
        self.rings.start_all();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        self.handled_requests += 1;
        let table = MemoryTable::from_regions(regions, files).map_err(VhostError::ReqHandlerError)?;
        self.rings.change_memory(table)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let (index, _) = self.ring(index)?;
        // A size larger than the expected one is accepted: no message reports the expected size to the front-end, and
        // the guest may choose the size of a ring.
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= MAX_QUEUE_SIZE);
        let most = MAX_QUEUE_SIZE;
        let size = size.ok_or_else(|| refusal(format!("queue size {num} is not a power of two up to {most}")))?;
        self.rings.change_ring(index, |ring| ring.size = size)
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
        let (index, _) = self.ring(index)?;
        let addresses = RingAddresses { descriptors: descriptor, available, used };
        self.rings.change_ring(index, |ring| ring.addresses = Some(addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let (index, _) = self.ring(index)?;
        let base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        self.rings.change_ring(index, |ring| ring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let (at, _) = self.ring(index)?;
        self.rings.stop(at..at + 1)?;
        if self.rings.is_memory_lost() {
            return Err(refusal("an access to guest memory failed, so the state of the ring is unknown"));
        }
        let ring = &mut self.rings.setups[at];
        ring.kick = None;
        debug!("disk {}: ring {index} stopped at {}", self.rings.name, ring.base);
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (index, _) = self.ring(index)?;
        if let Some(kick) = &fd {
            check_eventfd(kick).map_err(|e| refusal(format!("kick descriptor of ring {index}: {e}")))?;
        }
        let kick = fd.map_or(Kick::Polled, |file| Kick::EventFd(Arc::new(file)));
        self.rings.change_ring(index, |ring| ring.kick = Some(kick))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (index, ring) = self.ring(index)?;
        if let Some(fd) = &fd {
            check_writable_eventfd(fd)
                .map_err(|e| refusal(format!("call or error descriptor of ring {index}: {e}")))?;
        }
        let copy = fd.as_ref().map(File::try_clone).transpose().map_err(VhostError::ReqHandlerError)?;
        ring.call = copy;
        if ring.running {
            self.rings.workers[index].set_call(fd);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let (index, ring) = self.ring(index)?;
        if let Some(fd) = &fd {
            check_writable_eventfd(fd)
                .map_err(|e| refusal(format!("call or error descriptor of ring {index}: {e}")))?;
        }
        let copy = fd.as_ref().map(File::try_clone).transpose().map_err(VhostError::ReqHandlerError)?;
        ring.err = copy;
        if ring.running {
            self.rings.workers[index].set_err(fd);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        self.handled_requests += 1;
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
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
            _ => Err(refusal(format!("protocol features {unknown:#x} were not offered"))),
        }
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        self.handled_requests += 1;
        Ok(self.rings.setups.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        let (index, ring) = self.ring(index)?;
        if ring.enabled == enable {
            return self.rings.start_if_complete(index);
        }
        self.rings.change_ring(index, |ring| ring.enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        self.handled_requests += 1;
        Ok(self.device.read_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        self.handled_requests += 1;
        self.device.write_config(offset, buf).map_err(|e| refusal(e.line()))
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        self.handled_requests += 1;
        inflight::create(inflight).map_err(VhostError::ReqHandlerError)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> VhostResult<()> {
        self.handled_requests += 1;
        let region = InflightRecords::map(inflight, file).map_err(|e| {
            refusal(format!("{e}. Without the region, requests in flight may be lost if this daemon is killed"))
        })?;
        self.rings.stop_all()?;
        self.rings.inflight = Some(region);
        self.rings.start_all();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        self.handled_requests += 1;
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        self.handled_requests += 1;
        let table = self.rings.memory.with_region(region, fd).map_err(VhostError::ReqHandlerError)?;
        self.rings.change_memory(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        self.handled_requests += 1;
        let table = self.rings.memory.without_region(region).map_err(VhostError::ReqHandlerError)?;
        self.rings.change_memory(table)?;
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
