//! Submission entries, and the ring they go into: what the kernel is told.

use std::io;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use super::engine::FILE_SLOTS;
use super::op::{Action, Op};
use super::transfer::{self, IoBuffers, Transfer};

/// io_uring_register(2): operation codes that stay allowed.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_ENABLE_RINGS: u8 = 12;

/// The submission entry for what is left of an operation.
pub(super) fn submission_entry(op: &mut Op, progress: &mut Transfer) -> squeue::Entry {
    let file = types::Fixed(u32::from(op.slot.0));
    // -1 would mean the file position; what is no offset (beyond 2^63) is left to the kernel to refuse.
    let offset = progress.offset(op).min(1 << 63);
    match op.action {
        Action::Read => match progress.next_buffers(&mut op.payload) {
            IoBuffers::Single(start, len) => opcode::Read::new(file, start, len).offset(offset).build(),
            IoBuffers::Vectored(runs, count) => opcode::Readv::new(file, runs, count).offset(offset).build(),
        },
        Action::Write | Action::WriteThrough => {
            let flags = if op.action == Action::WriteThrough { libc::RWF_DSYNC } else { 0 };
            match progress.next_buffers(&mut op.payload) {
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
            // The kernel takes 32 bits.
            let len = libc::off_t::from(u32::try_from(op.len).unwrap_or(u32::MAX));
            opcode::Fadvise::new(file, len, libc::POSIX_FADV_WILLNEED).offset(offset).build()
        }
        // A length of 0: to the end.
        Action::StartWriteback => opcode::SyncFileRange::new(file, 0).flags(libc::SYNC_FILE_RANGE_WRITE).build(),
        action => opcode::Fallocate::new(file, op.len).offset(offset).mode(transfer::fallocate_mode(action)).build(),
    }
}

/// A ring with an empty table of files, and whether it is enabled yet.
pub(super) fn create_ring(count: u32) -> io::Result<(IoUring, bool)> {
    // Linux 6.0: one thread submits and reaps; completions do not interrupt it, but do wake it. DEFER_TASKRUN would make
    // them wait until it asks, and does not wake who sleeps on the ring's fd [tried: 6.18, a sync never woke a poll(2)].
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
            // Linux 5.19.
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
        // A ring that is taken over by a bug opens no files and no sockets: seccomp does not see what rings do.
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
