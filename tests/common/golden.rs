//! The golden images: their manifest, and unpacking them with folders and holes.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The entries of the manifest.
pub(crate) struct Golden {
    images: Vec<Value>,
}

impl Golden {
    /// Reads vm-images/golden/manifest.json.
    pub(crate) fn load() -> Golden {
        let text = fs::read(folder().join("manifest.json")).expect("vm-images/golden/manifest.json is readable");
        let mut manifest: Value = serde_json::from_slice(&text).expect("the manifest is JSON");
        let Value::Array(images) = manifest["images"].take() else { panic!("the manifest lists its images") };
        assert!(images.len() >= 20, "the manifest lost images: {} left", images.len());
        Golden { images }
    }

    /// Every image, parents before children.
    pub(crate) fn images(&self) -> &[Value] {
        &self.images
    }

    /// Unpacks every image below `root` and checks its hash.
    pub(crate) fn unpack(&self, root: &Path) {
        for image in &self.images {
            let path = root.join(text(image, "file"));
            fs::create_dir_all(path.parent().expect("an image lies in a folder")).expect("a folder for the image");
            let packed = File::open(folder().join(text(image, "gz"))).expect("the packed image is there");
            let mut data = Vec::new();
            GzDecoder::new(packed).read_to_end(&mut data).expect("the packed image unpacks");
            assert_eq!(hex(&Sha256::digest(&data)), text(image, "file_sha256"), "{}", path.display());
            write_sparse(&path, &data);
        }
    }
}

/// The string at `key`.
pub(crate) fn text<'a>(image: &'a Value, key: &str) -> &'a str {
    image[key].as_str().unwrap_or_else(|| panic!("the manifest says {key} of {}", image["file"]))
}

/// The number at `key`.
pub(crate) fn number(image: &Value, key: &str) -> u64 {
    image[key].as_u64().unwrap_or_else(|| panic!("the manifest says {key} of {}", image["file"]))
}

/// The hash of a whole file, read in pieces.
pub(crate) fn sha256_of(path: &Path) -> String {
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    sha256_of_stream(&mut file)
}

/// The hash of everything `from` yields.
pub(crate) fn sha256_of_stream(from: &mut impl Read) -> String {
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 18];
    loop {
        match from.read(&mut piece).expect("the stream is readable") {
            0 => return hex(&hash.finalize()),
            n => hash.update(&piece[..n]),
        }
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vm-images/golden")
}

/// Writes `data` so that its zero pages stay holes.
fn write_sparse(path: &Path, data: &[u8]) {
    const PAGE: usize = 4096;
    let file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.set_len(data.len() as u64).expect("the file takes its length");
    for (i, page) in data.chunks(PAGE).enumerate() {
        if page.iter().any(|&b| b != 0) {
            file.write_all_at(page, (i * PAGE) as u64).expect("the file takes its data");
        }
    }
}
