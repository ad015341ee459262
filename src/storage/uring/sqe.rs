//! Setup of a ring, and its submission entries.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use crate::storage::op::{Action, FILE_SLOTS, Op};
use crate::storage::transfer::{IoBuffers, Transfer, fallocate_mode};

/// Opcodes of io_uring_register(2) that a restricted ring allows.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_ENABLE_RINGS: u8 = 12;

/// Returns the submission entry for the next call of an operation.
pub(super) fn submission_entry(op: &mut Op, transfer: &mut Transfer) -> squeue::Entry {
    let file = types::Fixed(u32::from(op.slot.0));
    // An offset of -1 would mean the file position. Invalid offsets (2^63 and more) become 2^63, which the kernel
    // rejects.
    let offset = transfer.offset(op).min(1 << 63);
    match op.action {
        Action::Read => match transfer.next_buffers(&mut op.payload) {
            IoBuffers::Single(start, len) => opcode::Read::new(file, start, len).offset(offset).build(),
            IoBuffers::Vectored(runs, count) => opcode::Readv::new(file, runs, count).offset(offset).build(),
        },
        Action::Write | Action::WriteThrough => {
            let flags = if op.action == Action::WriteThrough { libc::RWF_DSYNC } else { 0 };
            match transfer.next_buffers(&mut op.payload) {
                IoBuffers::Single(start, len) => {
                    opcode::Write::new(file, start, len).offset(offset).rw_flags(flags).build()
                }
                IoBuffers::Vectored(runs, count) => {
                    opcode::Writev::new(file, runs, count).offset(offset).rw_flags(flags).build()
                }
            }
        }
        Action::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        Action::Prefetch => {
            // The length of an fadvise entry has 32 bits.
            let len = libc::off_t::from(u32::try_from(op.len).unwrap_or(u32::MAX));
            opcode::Fadvise::new(file, len, libc::POSIX_FADV_WILLNEED).offset(offset).build()
        }
        // A length of 0 means up to the end of the file.
        Action::StartWriteback => opcode::SyncFileRange::new(file, 0).flags(libc::SYNC_FILE_RANGE_WRITE).build(),
        action => opcode::Fallocate::new(file, op.len).offset(offset).mode(fallocate_mode(action)).build(),
    }
}

/// Creates a ring with an empty file table. Returns the ring, and whether the ring is already enabled.
pub(super) fn create_ring(count: u32) -> io::Result<(IoUring, bool)> {
    // Linux 6.0: only one thread submits and reaps (SINGLE_ISSUER). Completions wake this thread from a sleep, but do
    // not interrupt it (COOP_TASKRUN). DEFER_TASKRUN is not set: completions would then wait until the thread enters
    // the kernel, and would not wake it while it polls the ring's descriptor (seen on 6.18: a sync never woke poll(2)).
    let first = IoUring::builder()
        .setup_r_disabled()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .dontfork()
        .build(count);
    let (ring, enabled) = match first {
        Ok(ring) => (ring, false),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            // These flags need Linux 5.19. On older kernels the ring is created without flags.
            let mut next = IoUring::builder();
            next.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all().dontfork();
            match next.build(count) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (IoUring::builder().dontfork().build(count)?, true),
                other => (other?, true),
            }
        }
        Err(e) => return Err(e),
    };
    let submitter = ring.submitter();
    match submitter.register_files_sparse(u32::from(FILE_SLOTS)) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => submitter.register_files(&[-1; FILE_SLOTS as usize])?,
        other => other?,
    }
    if !enabled {
        // Restricts the ring to the operations below, none of which opens files or sockets. This limits a compromised
        // process: seccomp does not see the operations of a ring.
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_op(opcode::Fadvise::CODE),
            Restriction::sqe_op(opcode::SyncFileRange::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
            Restriction::register_op(REGISTER_FILES_UPDATE),
            Restriction::register_op(REGISTER_ENABLE_RINGS),
        ])?;
    }
    Ok((ring, enabled))
}
