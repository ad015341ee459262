//! The served disks. All disks with data have the same data, in one file or spread over the layers of a chain.
//!
//! Read-only disks and the disks of [`Disks::writable`] are created once and kept in `target/bench/disks`. The striped
//! chains, the copy in large folios and the writable disks are read into the page cache before use. Children into which
//! fresh blocks are written are created for every run.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, seek};

use crate::server::{Kind, Server};

/// Bytes of a chunk. Consecutive chunks are in different layers. A chunk has the size of a cluster of qcow2, which is
/// the minimum unit that QEMU writes without copying.
pub const CHUNK: u64 = 64 << 10;
/// Number of chunks in a block of a VHD (2 MiB). The chunks of a block alternate between two adjacent layers, and the
/// chunks of the next block alternate between the next two layers. So every block has many runs, and a chain needs only
/// twice the space of its data.
const CHUNKS: u64 = 32;

/// Returns the layer of a chunk.
fn layer_of(chunk: u64, layers: u64) -> u64 {
    (chunk / CHUNKS * 2 + chunk % 2) % layers
}
/// Version of the disks that [`Disks`] creates. The version must be increased when the contents of the disks change.
const LAYOUT: &str = "2";

/// A format of images. The format determines the programs that create and serve the images.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Vhd,
    Qcow2,
    Vpc,
    Raw,
}

impl Format {
    pub fn server(self) -> Kind {
        match self {
            Format::Vhd => Kind::ours(),
            Format::Qcow2 => Kind::Qemu("qcow2"),
            Format::Vpc => Kind::Qemu("vpc"),
            Format::Raw => Kind::Qemu("raw"),
        }
    }
}

/// Interleaved data: `piece` bytes in the oldest layer, as many in the next, and so on in rotation.
#[derive(Clone, Copy)]
pub struct Interleaving {
    pub layers: u64,
    pub piece: u64,
}

/// Order in which a file is read into the page cache. The order determines the sizes of the folios.
#[derive(Clone, Copy)]
pub enum ReadOrder {
    /// Sequential, with folio sizes of the kernel's choice. A file without holes gets folios of 2 MiB, each of which is
    /// mapped as one huge page. A file in which data and holes alternate gets smaller folios.
    Sequential,
    /// First every second chunk, then the other chunks, similar to a guest's reads. All files then have folios of the
    /// same size.
    Interleaved,
}

/// The folder of the disks.
pub struct Disks {
    folder: PathBuf,
    settled: RefCell<HashSet<PathBuf>>,
    order: Cell<ReadOrder>,
    /// Bytes of data.
    pub size: u64,
}

impl Disks {
    pub fn new(size: u64) -> Disks {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it lies in the target folder");
        let folder = std::env::var_os("DIFFDISK_BENCH_FOLDER").map_or(target.join("bench/disks"), PathBuf::from);
        let folder = folder.join(format!("{LAYOUT}-{}", size >> 20));
        fs::create_dir_all(&folder).expect("the target folder can be written");
        Disks { folder, settled: RefCell::default(), order: Cell::new(ReadOrder::Sequential), size }
    }

    /// Creates a chain of `layers` images, with the data spread over all images. Returns the youngest.
    pub fn striped_chain(&self, format: Format, layers: u64) -> PathBuf {
        let name = |layer: u64| self.folder.join(format!("{}-{layers}-{layer}", suffix(format)));
        let (top, ready) = (name(layers - 1), name(0).with_extension("ready"));
        if !ready.exists() {
            eprintln!("making {} of {layers} layers", suffix(format));
            for layer in 0..layers {
                let image = name(layer);
                let _ = fs::remove_file(&image);
                let parent = layer.checked_sub(1).map(&name);
                create(format, &image, parent.as_deref(), self.size, &[]);
                self.fill(format, &image, |chunk| layer_of(chunk, layers) == layer);
            }
            self.verify(format, &top);
            fs::write(&ready, "").expect("the target folder can be written");
        }
        (0..layers).for_each(|layer| self.populate_once(name(layer)));
        top
    }

    /// Returns the files of a chain that [`Disks::striped_chain`] created, oldest first.
    pub fn files(&self, format: Format, layers: u64) -> Vec<PathBuf> {
        (0..layers).map(|layer| self.folder.join(format!("{}-{layers}-{layer}", suffix(format)))).collect()
    }

    /// Requires that each file is read into the page cache again before its next use, in the given order. The placement
    /// of the pages in memory is random and affects the speed, so comparisons of similar speeds repeat the reading.
    pub fn invalidate_cache(&self, order: ReadOrder) {
        self.settled.borrow_mut().clear();
        self.order.set(order);
    }

    /// Returns a copy of the disk as a single VHD. The copy is read into the page cache sequentially, regardless of the
    /// current order.
    pub fn in_large_folios(&self) -> PathBuf {
        let (single, copy) = (self.striped_chain(Format::Vhd, 1), self.folder.join("vhd-1-large"));
        if !copy.exists() {
            // An interrupted copy must not count as complete.
            fs::copy(single, self.scratch()).expect("there is room");
            fs::rename(self.scratch(), &copy).expect("the target folder can be written");
        }
        populate_cache(&copy, ReadOrder::Sequential);
        copy
    }

    fn populate_once(&self, path: PathBuf) {
        if !self.settled.borrow().contains(&path) {
            populate_cache(&path, self.order.get());
            self.settled.borrow_mut().insert(path);
        }
    }

    /// Creates a chain of VHDs with interleaved data, in which ranges without data are holes. Returns the files of the
    /// chain, youngest first.
    pub fn interleaved(&self, Interleaving { layers, piece }: Interleaving) -> Vec<PathBuf> {
        let name = |layer: u64| self.folder.join(format!("turns-{layers}-{}-{layer}", piece >> 10));
        let files: Vec<_> = (0..layers).rev().map(name).collect();
        let ready = name(0).with_extension("ready");
        if !ready.exists() {
            eprintln!("making {layers} layers, interleaved in pieces of {} KiB", piece >> 10);
            for layer in 0..layers {
                let image = name(layer);
                let _ = fs::remove_file(&image);
                let parent = layer.checked_sub(1).map(&name);
                create(Format::Vhd, &image, parent.as_deref(), self.size, &[]);
                self.fill(Format::Vhd, &image, |chunk| chunk * CHUNK / piece % layers == layer);
                punch_holes(&image);
            }
            self.verify(Format::Vhd, &files[0]);
            fs::write(&ready, "").expect("the target folder can be written");
        }
        files
    }

    /// Creates a child of a single image with all the data. `options` are options of `qemu-img create`.
    pub fn fresh_child(&self, format: Format, options: &[&str]) -> PathBuf {
        let (parent, child) = (self.striped_chain(format, 1), self.folder.join(format!("{}-fresh", suffix(format))));
        let _ = fs::remove_file(&child);
        create(format, &child, Some(&parent), self.size, options);
        child
    }

    /// Creates a child of `size` bytes over an empty root.
    pub fn empty_child(&self, format: Format, size: u64) -> PathBuf {
        let name = |what: &str| self.folder.join(format!("{}-{what}-{}", suffix(format), size >> 30));
        let (root, child) = (name("empty"), name("empty-child"));
        if !root.exists() {
            create(format, &root, None, size, &[]);
        }
        let _ = fs::remove_file(&child);
        create(format, &child, Some(&root), size, &[]);
        child
    }

    /// Returns the path of a temporary file that exists during one run only.
    pub fn scratch(&self) -> PathBuf {
        self.folder.join("scratch")
    }

    /// Creates a writable image with all the data: for VHD a child over a root, for other formats one file. The file is
    /// read into the page cache in the order [`ReadOrder::Interleaved`], because folio sizes change the cost of writes:
    /// on large folios of ext4 small writes cost ten times as much, and long writes cost half as much.
    pub fn writable(&self, format: Format) -> PathBuf {
        let name = self.folder.join(format!("{}-written", suffix(format)));
        let ready = name.with_extension("ready");
        if !ready.exists() {
            eprintln!("making {} to be written", suffix(format));
            let parent = (format == Format::Vhd).then(|| self.striped_chain(format, 1));
            let _ = fs::remove_file(&name);
            create(format, &name, parent.as_deref(), self.size, &[]);
            self.fill(format, &name, |_| true);
            fs::write(&ready, "").expect("the target folder can be written");
        }
        populate_cache(&name, ReadOrder::Interleaved);
        name
    }

    /// Creates a chain of `layers` images of 1 TiB without data. Returns the youngest.
    pub fn sparse_chain(&self, format: Format, layers: u64) -> PathBuf {
        let name = |layer: u64| self.folder.join(format!("{}-sparse-{layer}", suffix(format)));
        for layer in 0..layers {
            if !name(layer).exists() {
                let parent = layer.checked_sub(1).map(&name);
                create(format, &name(layer), parent.as_deref(), 1 << 40, &[]);
            }
        }
        name(layers - 1)
    }

    /// Writes the chunks for which `own` returns true, through a server of the format.
    fn fill(&self, format: Format, image: &Path, own: impl Fn(u64) -> bool) {
        let server = Server::start(&format.server(), image);
        let mut guest = server.connect(1);
        let mut data = vec![0; CHUNK as usize];
        for chunk in (0..self.size / CHUNK).filter(|c| own(*c)) {
            for (i, page) in data.chunks_mut(4096).enumerate() {
                page.fill((chunk % 251) as u8);
                page[..8].copy_from_slice(&(chunk * CHUNK + i as u64 * 4096).to_be_bytes());
            }
            guest.write(chunk * CHUNK, &data).expect("the disk can be filled");
        }
        guest.flush().expect("the disk can be flushed");
        drop(guest);
        server.stop();
    }

    /// Asserts that each page of the disk contains its own offset, so that no incorrect server is measured.
    fn verify(&self, format: Format, image: &Path) {
        let server = Server::start(&format.server(), image);
        let mut guest = server.connect(1);
        for chunk in 0..self.size / CHUNK {
            let at = chunk * CHUNK;
            let data = guest.read(at, CHUNK as usize).expect("the disk can be read");
            for (i, page) in data.chunks(4096).enumerate() {
                assert_eq!(page[..8], (at + i as u64 * 4096).to_be_bytes(), "{} at {at}", image.display());
                assert_eq!(page[4095], (chunk % 251) as u8, "{} at {at}", image.display());
            }
        }
        drop(guest);
        server.stop();
    }
}

/// Deallocates the ranges of a file that lseek(2) reports as holes. Their space may have been reserved.
fn punch_holes(path: &Path) {
    let file = File::options().read(true).write(true).open(path).expect("our own file");
    let len = file.metadata().expect("our own file").len();
    let mut at = 0;
    while at < len {
        let hole = seek(&file, SeekFrom::Hole(at)).expect("the file system knows holes");
        let end = seek(&file, SeekFrom::Data(hole)).unwrap_or(len);
        if end > hole {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&file, how, hole, end - hole).expect("the file system can punch");
        }
        at = end;
    }
}

/// Evicts a file from the page cache.
pub fn drop_page_cache(path: &Path) {
    let file = File::open(path).expect("the image can be read");
    file.sync_all().expect("the image can be synced");
    fadvise(&file, 0, None, Advice::DontNeed).expect("the host takes advice");
}

/// Removes a file and waits until no block device has completed a discard for 100 ms, at most 20 s. If the file system
/// discards freed space, a kernel thread does so after unlink(2), on the processor of the last process that had the
/// file open. The discard of a file with many extents takes about a second.
pub fn remove_and_wait(path: &Path) {
    fs::remove_file(path).expect("it was made a moment ago");
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        let before = discards();
        std::thread::sleep(Duration::from_millis(100));
        if discards() == before {
            break;
        }
    }
}

/// Returns the number of discards that the kernel has completed on all block devices.
fn discards() -> u64 {
    /// Zero-based index of the column with the number of completed discards (Documentation/admin-guide/iostats.rst of
    /// the kernel).
    const DISCARDS: usize = 14;
    let table = fs::read_to_string("/proc/diskstats").unwrap_or_default();
    table.lines().filter_map(|line| line.split_whitespace().nth(DISCARDS)?.parse::<u64>().ok()).sum()
}

/// Evicts a file from the page cache, and reads it into the page cache in the given order.
pub fn populate_cache(path: &Path, order: ReadOrder) {
    drop_page_cache(path);
    let file = File::open(path).expect("the image can be read");
    let (passes, piece) = match order {
        ReadOrder::Sequential => (1, 1 << 20),
        ReadOrder::Interleaved => (2, CHUNK),
    };
    let (runs, mut memory) = (runs_of_data(path, 1), vec![0; piece as usize]);
    for pass in 0..passes {
        for (start, end) in runs.iter().map(|(start, len)| (*start, start + len)) {
            for number in (start / piece..end.div_ceil(piece)).filter(|number| number % passes == pass) {
                let (from, to) = (start.max(number * piece), end.min((number + 1) * piece));
                file.read_exact_at(&mut memory[..(to - from) as usize], from).expect("the image can be read");
            }
        }
    }
}

/// Returns the runs of data in a file that have at least `least` bytes, as (offset, length).
pub fn runs_of_data(path: &Path, least: u64) -> Vec<(u64, u64)> {
    let file = File::open(path).expect("our own file");
    let (mut at, mut runs) = (0, Vec::new());
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(start)).expect("a hole ends a file at last");
        if at - start >= least {
            runs.push((start, at - start));
        }
    }
    runs
}

fn suffix(format: Format) -> &'static str {
    match format {
        Format::Vhd => "vhd",
        Format::Qcow2 => "qcow2",
        Format::Vpc => "vpc",
        Format::Raw => "raw",
    }
}

fn create(format: Format, image: &Path, parent: Option<&Path>, size: u64, options: &[&str]) {
    let size = size.to_string();
    let mut command;
    if format == Format::Vhd {
        command = Command::new(env!("CARGO_BIN_EXE_diffdisk"));
        command.args(["create", "--quiet"]).arg(image);
        match parent {
            Some(parent) => command.arg("--parent").arg(parent),
            None => command.args(["--size", &size]),
        };
    } else {
        command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", suffix(format)]);
        if let Some(parent) = parent {
            command.args(["-F", suffix(format), "-b"]).arg(parent);
        }
        let all = if format == Format::Vpc { &["subformat=dynamic,force_size=on"] } else { options };
        for option in all {
            command.args(["-o", option]);
        }
        command.arg(image).arg(&size);
    }
    let done = command.stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|e| panic!("{}: {e}; run `make bench`", command.get_program().display()));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}
