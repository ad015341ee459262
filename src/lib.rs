//! diffdisk serves chains of differencing VHDs to virtual machines, and creates, inspects, checks and converts them.
//!
//! The disk of a guest is a chain of files: a fixed or dynamic root, and any number of differencing children. The
//! youngest child (the *top*) receives the writes. The guest sees one disk. `diffdiskd` serves the disk over
//! vhost-user-blk to QEMU, cloud-hypervisor, crosvm and other front-ends, and moves data directly between the files and
//! guest memory. `diffdisk` is the tool for the files. Both programs are thin wrappers around [`cli`]. This page is the
//! map of the crate.
//!
//! # Floors
//!
//! A module uses only modules of lower floors, itself, and the shared modules of the last row. Modules on the same
//! floor do not use each other, and the files of a floor have no import cycle. `tests/floors` checks these rules in the
//! sources. The page of each floor begins with the responsibilities of the floor and a drawing.
//!
//! ```text
//!  7  cli                 command line: arguments, output, exit codes; starts the daemon
//!  6  control             the control socket: its clients, methods and events
//!  5  vhost               vhost-user: the socket, its messages, guest memory, one thread per queue
//!  4  device  |  ops      virtio-blk: requests of a guest  |  the verbs of the tool, as functions
//!  3  disk                requests become operations: lanes, stages, group commit
//!  2  chain               many files as one disk: Top over Frozen
//!  1  image               one VHD file: open, reserve, mark, commit, grow, recover
//!  0  format  |  storage  the bytes of a VHD, without I/O  |  the kernel interface: files, locks, clock, I/O engines
//!  -  units, error, event, mutant, failpoint, random    shared by all floors
//! ```
//!
//! # Three ideas
//!
//! 1. **A chain has two parts**, Top and Frozen, so a look-up costs the same at depth 1 and at depth 64 ([`chain`]).
//! 2. **Plan, move, mark.** Planning looks up the sectors and reserves space for new blocks; it can be repeated, and
//!    does not change what the guest reads. Moving is a list of operations. Marking makes the written sectors visible.
//!    No byte on disk changes its meaning before a commit ([`disk`]).
//! 3. **A commit has three steps**: sync the data, write the pointers (one sector each), sync the pointers. One file
//!    implements this order (`image/write/commit.rs`). Writes that are acknowledged but not flushed survive a kill of
//!    the daemon in the live journal (`image/write/journal.rs`).
//!
//! # The path of a request
//!
//! ```text
//!  kick ─> vhost worker ─> device: pop chains, parse ─> disk: a task in the queue's lane
//!                                                          │ plan     chain: look up Top, then Frozen
//!                                                          │ (load    missing bitmap sectors; plan again)
//!                                                          │ (grow    the file, for a new block; plan again)
//!                                                          │ move     storage: one submit for the whole batch, and
//!                                                          │          copies of cached reads
//!                                                          │ mark     image: bits in memory, and in the live journal
//!                                                          │ (commit  flushes; writes on a write-through disk)
//!  call <─ one interrupt <── device: status, used ring <── outcome
//! ```
//!
//! # Where to find what
//!
//! | question | module |
//! | --- | --- |
//! | what the bytes of a file mean, and which files are refused | [`mod@format`] |
//! | how a file is created, opened, recovered, grown, made durable | [`image`] |
//! | how parents are found, and which parents may be opened | [`chain`] |
//! | how a request is executed and completed | [`disk`] |
//! | which contents of a virtqueue are valid | [`device`] |
//! | which messages of a front-end are valid, and when a virtqueue is served | [`vhost`] |
//! | what the verbs of the tool do | [`ops`] |
//! | system calls, io_uring, locks, and the simulated host of the tests | [`storage`] |
//! | what the daemon counts | [`disk::statistics`] |
//! | what programs can ask a running daemon | [`control`] |
//!
//! `CONTRIBUTING.md` names the file that decides each kind of failure, and the files to change for a new verb, defect,
//! feature or counter.
//!
//! # Glossary
//!
//! Each word has one meaning, in names and in sentences. A type name occurs once in the crate.
//!
//! ## Images and chains
//!
//! | word | meaning |
//! | --- | --- |
//! | sector, file sector | 512 bytes of the virtual disk; 512 bytes of a file |
//! | block | the unit of allocation: a bitmap and its data sectors |
//! | place | the file sector where a block begins |
//! | BAT | block allocation table: for each block its place, or "unused" |
//! | footer, trailing footer | 512 bytes that identify an image, at the start and the end of the file; the last one |
//! | header | the dynamic header: the position of the BAT, the block size, and the parent |
//! | bitmap, bitmap sector | one bit per sector of a block, set if the sector is in this file; 512 bytes of a bitmap |
//! | batmap | XenServer's extension: a map of the blocks whose bitmap is full |
//! | locator | a path to the parent, stored in a child |
//! | metadata extent | a range of the file that contains metadata, which no block may overlap |
//! | image format | the format of a file as its first bytes suggest: VHD, qcow2, VHDX and others |
//! | image identity | UUID, type and parent of an image, read from its footers and header alone |
//! | root, parent, child, layer | positions in a chain; any file of a chain |
//! | depth | the number of layers from the top, which has depth 0 |
//! | [top](chain::Top) | the layer that receives the writes |
//! | [frozen](chain::Frozen) | all other layers, merged into one immutable map |
//! | [version](chain::Version) | a top over frozen layers, as requests see the chain |
//! | extent, plan | a run of sectors with one source; the extents of a range, or the bitmap sectors to load first |
//! | cell, frozen cache | 4096 sectors of the disk; the results of look-ups in frozen layers, by cell |
//! | parent lookup | the search for a parent by its locators, with a check of its UUID |
//! | masked parent | a parent whose data a child hides by zeros, because QEMU marked whole blocks as present |
//! | exposed sectors | sectors of lower layers that would become visible if a disk grew without masking them |
//! | changed ranges | the sectors that were written since an ancestor got a child |
//! | merge record, receiver | the file that describes an unfinished merge; the image into which the merge copies |
//! | CHILD | the image that a merge copies, with the layers between, into the receiver: the argument of the verb |
//! | merged layer | a layer whose data a merge copies into the receiver: CHILD, or a layer between the two |
//! | snapshot note | the file that describes an unfinished snapshot of running disks |
//! | member, coordinator | a disk of a snapshot; the member whose note has the state of the snapshot |
//! | active, kept image | the image that a disk is opened by; the previous one, under the name that a snapshot gives it |
//! | decided, resolve | said of a snapshot that will be finished; finish or undo an unfinished snapshot |
//! | file stamp | inode, length and modification time of a file, by which a change is detected |
//! | [defect](format::Defect) | a violated rule of the format |
//!
//! ## Durability
//!
//! | word | meaning |
//! | --- | --- |
//! | reserve | assign file space to a block |
//! | mark | make written sectors visible: set their bits in memory and in the live journal |
//! | commit | write bitmaps and BAT durably |
//! | fresh block | a block whose BAT entry is not on disk yet |
//! | pointer | a sector of a bitmap or of the BAT, which makes other sectors visible |
//! | flush, sync | a request of the guest; fdatasync(2) of a file |
//! | poison | the state after a failed sync: nothing more is written, since the contents of the medium are unknown |
//! | growth, free tail | moving the trailing footer to a new end; the zeros between the last block and that footer |
//! | live journal, slot | a file on tmpfs with the marks since the last commit; an entry of it, for one bitmap sector |
//! | journal epoch | a number that each commit increments; a slot is valid if its epoch is after the last commit's |
//! | session | the time during which an image has a live journal |
//! | session stamp | the sector before the trailing footer that names the live journal |
//! | generation | a random number in the session stamp and the live journal, which distinguishes copies of an image |
//! | replay | apply a live journal to its image |
//! | settle | replay a live journal without serving the image; `image/write/settle.rs` does it for all floors |
//! | recover | complete the footers and zero the free tail of an image when it is opened for writing |
//! | durability | the mechanism by which acknowledged writes survive a kill: a live journal or commits |
//! | bitmap frame, clock | memory for one bitmap sector; the algorithm that selects frames to evict |
//! | pin | a reference to a bitmap sector that forbids its eviction |
//! | sparse array | an array whose pages are allocated at their first use |
//! | atomic file | a file that gets its name when it is complete and durable |
//! | undo file | a file with the bytes that a repair replaced |
//! | offline | open for one operation of the tool, and not served (of an image) |
//! | re-parent | write another parent into a child |
//!
//! ## Serving
//!
//! | word | meaning |
//! | --- | --- |
//! | guest, driver | the virtual machine; its virtio driver |
//! | front-end | the VMM process, which connects to the daemon |
//! | virtqueue, split ring | a queue of requests; its layout in guest memory |
//! | descriptor chain, head | the buffers of one request; the index of its first descriptor |
//! | kick, call | the eventfd that announces requests to the daemon; the eventfd that announces completions |
//! | vring | the ring as the vhost crates represent it |
//! | batch | the descriptor chains that are popped at once |
//! | in-flight record, region | the heads of one queue's requests in flight; the shared memory with all such records |
//! | interrupt coalescing | delaying a call so that it announces several completions |
//! | control thread, worker | the thread that handles the messages of a front-end; the thread of one queue |
//! | adaptive poll | polling before a thread sleeps, for a time that follows the load |
//! | lost memory | shared memory in which an access raised SIGBUS, now replaced by zeros |
//! | request, operation | what a guest submits; what an I/O engine executes |
//! | task, [lane](disk::Lane) | a request in flight; the state of one queue of a disk |
//! | stage, job | a step of a task; a commit or growth that a lane executes in steps |
//! | group commit, round | the commit that flushes of all queues share; one such commit |
//! | mailbox, lane event | messages to a lane from other threads; one such message |
//! | parked, stalled | waiting for an event (of a task); waiting for free space (of writes and commit rounds) |
//! | urgent | said of a lane or thread that leaves a stalled round, because it must not wait for free space |
//! | served version, epoch | a version with what lanes need to serve it; its number |
//! | adopt | plan with another version from now on (said of a lane) |
//! | gate, held | what makes the writes of a lane wait while a live operation changes the files; waiting for it |
//! | pause | the time for which writes are held |
//! | readahead | prefetch for sequential reads |
//! | early writeback | starting writeback before a flush is likely |
//! | cached read | a read that is copied from the page cache without a system call |
//! | punch, punch lock | deallocate a range of a file; the lock that admits one lane of a disk at a time |
//! | full host | a file system without space, as writes and commits of a disk find out |
//! | [disk event](event::DiskEvent) | a change in the state of a served disk, which clients of the control socket may watch |
//! | [statistics](disk::statistics) | numbers about a disk, and their report |
//! | counter, gauge | a number that is counted; a number that is computed for a report |
//! | taken, refused | passed to the lane; completed without the lane, because it is not valid (of a request) |
//! | histogram, step | counts of durations; a range of durations that is counted together |
//! | timestamp | nanoseconds by the processor's counter, shared by all requests of a batch |
//! | merge debt | space that the layers above the root take |
//!
//! ## Control
//!
//! | word | meaning |
//! | --- | --- |
//! | control socket | the socket by which programs ask a daemon about its disks, and end it |
//! | client | a program that is connected to the control socket |
//! | method, RPC call | an operation of the protocol; a client's request to carry it out |
//! | notification | a message without an answer: an RPC call without an id, or an event |
//! | server thread | the thread that serves all clients |
//! | slow call | an RPC call that may wait for a file system or changes disks, so another thread carries it out |
//! | snapshot, kept image | keeping the contents of a running disk under a new name; the image with these contents |
//! | outbox | what a client has not read yet: answers and events |
//! | subscription | the kinds of events that a client receives |
//! | registry | the disks of the daemon, by name |
//!
//! ## Storage
//!
//! | word | meaning |
//! | --- | --- |
//! | [engine](storage::Engine) | executes operations for one thread: over io_uring, by blocking calls, or simulated |
//! | file slot | the index of a file that is registered with an engine |
//! | guest iovecs | the parts of a request's data in guest memory |
//! | transfer | the state of an operation that the kernel executes in several parts |
//! | uring, nowait | the engine over io_uring; its writes that are tried by RWF_NOWAIT first |
//! | file map, map cache | the mapped regions of a file; the regions that a thread used last |
//! | page-cache reader, residency | copies from file maps; whether a page is in the page cache |
//! | copy_nofault | a copy from mapped memory that fails instead of raising SIGBUS |
//! | guard | catches SIGBUS in a range of shared memory and records the loss |
//! | shm | a file on tmpfs that is mapped and locked: the live journal |
//! | runtime folder | the folder on tmpfs with the live journals |
//! | notifier | an eventfd by which one thread wakes another: notify, drain |
//! | sim, torn write | the simulated host of the tests; a write of which a crash leaves only some sectors |
//!
//! ## Tool and tests
//!
//! | word | meaning |
//! | --- | --- |
//! | verb | a subcommand of `diffdisk` |
//! | source, sink | the disk that a verb reads; the file or device that it writes |
//! | data run, zero scan | a range of a source that has data; the search for zeros in data |
//! | write-behind | starting the writeback of a file while it is being written |
//! | folder scan | the search of folders for images related to a chain |
//! | copy up, copy down | copy data of lower layers into a child; copy data of the merged layers into the receiver |
//! | merge plan | the files and steps of a merge |
//! | salvage | copying the readable part of a damaged disk |
//! | mutant | a deliberate mistake in the order of durable writes, which tests must find ([`mutant`]) |
//! | failpoint | a point at which tests kill the process ([`failpoint`]) |

pub mod chain;
pub mod cli;
pub mod control;
pub mod device;
pub mod disk;
pub mod error;
pub mod event;
pub mod failpoint;
pub mod format;
pub mod image;
pub mod mutant;
pub mod ops;
#[cfg(any(test, feature = "sim"))]
pub mod random;
pub mod storage;
pub mod units;
pub mod vhost;
