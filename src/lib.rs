//! diffdisk serves chains of differencing VHDs to virtual machines, and makes, inspects, checks and converts them.
//!
//! A guest's disk is a chain of files: a fixed or dynamic root, and any number of differencing children, the youngest of
//! which (the *top*) takes the writes. The guest sees one disk. `diffdiskd` serves it over vhost-user-blk to QEMU,
//! cloud-hypervisor, crosvm and others, and moves bytes straight between the files and guest memory; `diffdisk` is the
//! tool for the files. Both programs are a few lines over [`cli`]; this page is the map of what is beneath.
//!
//! # Floors
//!
//! A module uses modules of lower floors, itself, and the two words at the bottom; neighbours on one floor do not know
//! each other. `tests/floors.rs` reads the sources and fails on any other path. Each floor's page opens with what it owns,
//! what it leaves to others, and a drawing.
//!
//! ```text
//!  7  cli                 human words: arguments, printing, exit codes; wires the daemon
//!  5  vhost               vhost-user: the socket, its messages, guest memory, a thread for each queue
//!  4  device  |  ops      virtio-blk: what a guest asks  |  the tool's verbs, as functions
//!  3  disk                requests become operations: lanes, stages, group commit
//!  2  chain               many files as one disk: Top over Frozen
//!  1  image               one VHD file: open, reserve, mark, commit, grow, recover
//!  0  format  |  storage  the bytes of a VHD, without I/O  |  the doors to the outside: files, locks, clock, engines
//!  -  units, error        words that any floor may use
//! ```
//!
//! # Words
//!
//! One word for one thing, in names and in sentences:
//!
//! | word | meaning |
//! | --- | --- |
//! | sector | 512 bytes of the virtual disk |
//! | block | what an entry of the block table (BAT) gives a place to, with its bitmap of sectors |
//! | root, parent, child; layer | places in a chain; any file of it |
//! | [top](chain::Top) / [frozen](chain::Frozen) | the one writable layer / all others, merged into one map that does not change |
//! | extent, [plan](chain::PlanBuffer) | a run of sectors with one source; extents, and what must be loaded first |
//! | reserve, mark, commit | give a block a place; make written sectors visible; tell the file, durably |
//! | fresh, pointer | a block that the file does not know yet; a sector that gives meaning to others |
//! | request, operation, task, [lane](disk::Lane) | asked by a guest; asked of the host; a request in flight; the engine of one queue |
//! | flush, sync | asked by a guest; the host's fdatasync |
//! | poison | no more writes, since a sync failed and nobody knows what is on the medium |
//! | [defect](format::Defect) | a broken rule of the format |
//!
//! # Three ideas
//!
//! 1. **A chain is two things**, Top and Frozen, so a look-up costs the same at depth 1 and at depth 64 ([`chain`]).
//! 2. **Plan, move, mark.** Planning is a pure look-up; moving is a list of operations; marking makes the written sectors
//!    visible. Nothing on disk changes its meaning before a commit ([`disk`]).
//! 3. **A commit is two syncs around pointers of one sector each**: sync the data, write the pointers, sync. One file
//!    knows this order ([`image::commit`]). What is acknowledged but not flushed outlives a killed process in the live
//!    journal ([`image::journal`]).
//!
//! # The way of a request
//!
//! ```text
//!  kick ─> vhost worker ─> device: pop chains, parse ─> disk: a task in the queue's lane
//!                                                          │ plan     chain: top splits, frozen splits
//!                                                          │ (load    bitmaps that are not in memory; plan again)
//!                                                          │ (room    a new block, and the file must grow; plan again)
//!                                                          │ move     storage: one submit for everything popped, and
//!                                                          │          copies of what the host has in memory
//!                                                          │ mark     image: bits in memory, and in the journal
//!                                                          │ (commit  flushes; writes on a write-through disk)
//!  call <─ one signal <── device: status, used ring <── outcome
//! ```
//!
//! # Where to find
//!
//! | question | module |
//! | --- | --- |
//! | what the bytes of a file mean, and which are refused | [`mod@format`] |
//! | how a file is created, opened, recovered, made to grow, made durable | [`image`] |
//! | how parents are found, and which may be opened at all | [`chain`] |
//! | how a request runs, waits and is answered | [`disk`] |
//! | what a guest may put into a ring | [`device`] |
//! | what a front-end may say, and when rings run | [`vhost`] |
//! | what the tool does | [`ops`] |
//! | system calls, io_uring, locks, and the simulated host of the tests | [`storage`] |

pub mod chain;
pub mod cli;
pub mod device;
pub mod disk;
pub mod error;
pub mod failpoint;
pub mod format;
pub mod image;
pub mod mutant;
pub mod ops;
pub mod storage;
pub mod units;
pub mod vhost;
