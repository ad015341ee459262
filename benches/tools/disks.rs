//! The disks of the benchmark: dense disks without zeros, the same data spread over a chain, sparse disks, and deep
//! chains.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::bench::Bench;
use crate::harness::random_stream;
use crate::layer::{BLOCK, Layer};
use crate::run::{diffdisk, run};

/// Bytes of each piece of a spread chain. Consecutive pieces are in different layers.
const CHUNK: u64 = 64 << 10;
/// Maximum size of the disk of a VHD in bytes.
const LARGEST: u64 = 2040 << 30;
/// Number of layers of the deep chain, and number of blocks per layer.
pub const LAYERS: u64 = 16;
pub const BLOCKS: u64 = 4000;

impl Bench {
    /// Creates a raw file full of data.
    pub fn dense(&self) -> PathBuf {
        let path = self.path("dense.raw");
        if !path.exists() {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(&path).expect("our own folder"));
            let mut rng = random_stream(0);
            for _ in 0..self.pace.size / 8 {
                file.write_all(&rng.next().to_be_bytes()).expect("there is room");
            }
            file.flush().expect("there is room");
        }
        warm(&path)
    }

    /// Creates a dynamic VHD with the data of the raw file.
    pub fn dense_vhd(&self) -> PathBuf {
        let path = self.path("dense.vhd");
        if !path.exists() {
            run(&mut diffdisk("convert", &[&self.dense(), &path], &["--from", "raw", "--to", "dynamic"]));
        }
        warm(&path)
    }

    /// Creates a chain with the data of the raw file spread over its layers. Returns the youngest.
    pub fn spread(&self, layers: u64) -> PathBuf {
        let name = |layer: u64| self.path(&format!("spread-{layer}.vhd"));
        let dense = File::open(self.dense()).expect("it was just made");
        let mut data = vec![0; CHUNK as usize];
        for number in 0..layers {
            let mut layer = empty_layer(name, number, self.pace.size);
            for block in 0..self.pace.size / BLOCK {
                let mut bitmap = [0; 512];
                let chunks = (0..BLOCK / CHUNK).filter(|chunk| (block + chunk) % layers == number);
                let mut found = Vec::new();
                for chunk in chunks {
                    dense.read_exact_at(&mut data, block * BLOCK + chunk * CHUNK).expect("it is as long");
                    found.push((chunk * CHUNK, data.clone()));
                    let bits = (CHUNK / 512 / 8) as usize;
                    bitmap[chunk as usize * bits..][..bits].fill(0xFF);
                }
                if number == 0 {
                    bitmap.fill(0xFF); // all bits of a root's block are set
                }
                let found: Vec<_> = found.iter().map(|(at, bytes)| (*at, bytes.as_slice())).collect();
                layer.add(block, &bitmap, &found);
            }
            layer.finish();
            warm(&name(number));
        }
        name(layers - 1)
    }

    /// Creates a raw file of 1 TiB with `bytes` bytes of data, in pieces of 1 MiB at large distances.
    pub fn sparse(&self, bytes: u64) -> PathBuf {
        let (path, mut dense) = (self.path("sparse.raw"), File::open(self.dense()).expect("it was just made"));
        let file = File::create(&path).expect("our own folder");
        file.set_len(1 << 40).expect("a sparse file");
        let (mut piece, pieces) = (vec![0; 1 << 20], bytes >> 20);
        for number in 0..pieces {
            dense.read_exact(&mut piece).expect("it is longer");
            file.write_all_at(&piece, number * ((1 << 40) / pieces)).expect("there is room");
        }
        path
    }

    /// Creates a chain of disks of the maximum size. Each layer has blocks all over the disk. In every second layer,
    /// every second block hides a block of the layer below. Returns the youngest and the oldest file.
    pub fn deep(&self) -> (PathBuf, PathBuf) {
        let name = |layer: u64| self.path(&format!("deep-{layer}.vhd"));
        let page = [7; 4096];
        for number in 0..LAYERS {
            let mut layer = empty_layer(name, number, LARGEST);
            // A child has the first three quarters of each block, and the root has whole blocks.
            let mut bitmap = [0; 512];
            bitmap[..if number == 0 { 512 } else { 384 }].fill(0xFF);
            for block in 0..BLOCKS {
                let to = if block % 2 == 0 { number } else { number / 2 * 2 };
                layer.add(block * 261 + to * 3, &bitmap, &[(0, &page)]);
            }
            layer.finish();
        }
        (name(LAYERS - 1), name(0))
    }

    /// Creates a child of `parent` that contains all the data.
    pub fn dense_child(&self, path: &Path, parent: &Path) {
        create_child(path, parent);
        let (mut layer, mut dense) = (Layer::new(path), File::open(self.dense()).expect("it was just made"));
        let mut data = vec![0; BLOCK as usize];
        for block in 0..self.pace.size / BLOCK {
            dense.read_exact(&mut data).expect("it is as long");
            layer.add(block, &[0xFF; 512], &[(0, &data)]);
        }
        layer.finish();
        warm(path);
    }
}

/// Creates an empty root.
pub fn create(path: &Path, size: u64) {
    run(&mut diffdisk("create", &[path], &["--size", &size.to_string()]));
}

/// Creates an empty child.
pub fn create_child(path: &Path, parent: &Path) {
    let mut command = diffdisk("create", &[path], &["--parent"]);
    run(command.arg(parent));
}

/// Asserts that two disks are equal, so that no incorrect tool is measured.
pub fn verify(a: (&str, &Path), b: (&str, &Path)) {
    run(&mut diffdisk("compare", &[a.1, b.1], &["--from", a.0, "--from", b.0]));
}

/// Creates an empty layer. Layer 0, the oldest, is a root.
fn empty_layer(name: impl Fn(u64) -> PathBuf, number: u64, size: u64) -> Layer {
    match number.checked_sub(1) {
        None => create(&name(0), size),
        Some(parent) => create_child(&name(number), &name(parent)),
    }
    Layer::new(&name(number))
}

/// Reads a file, so that it is in the page cache.
fn warm(path: &Path) -> PathBuf {
    let mut file = File::open(path).expect("it was just made");
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).expect("it can be read") > 0 {}
    path.to_owned()
}
