//! The golden images: reads their manifest and unpacks them, with folders and holes.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde_json::Value;

use super::digest::sha256_of_bytes;

/// The entries of the manifest.
pub(crate) struct Golden {
    images: Vec<Value>,
}

impl Golden {
    /// Reads vm-images/golden/manifest.json.
    pub(crate) fn load() -> Golden {
        let text = fs::read(folder().join("manifest.json")).expect("vm-images/golden/manifest.json is readable");
        let mut manifest: Value = serde_json::from_slice(&text).expect("the manifest is JSON");
        let Value::Array(images) = manifest["images"].take() else { panic!("the manifest has no list of images") };
        assert!(images.len() >= 20, "the manifest has only {} images", images.len());
        Golden { images }
    }

    /// Returns every image, parents before children.
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
            assert_eq!(sha256_of_bytes(&data), text(image, "file_sha256"), "{}", path.display());
            write_sparse(&path, &data);
        }
    }
}

/// Returns the string at `key` of an image's entry.
pub(crate) fn text<'a>(image: &'a Value, key: &str) -> &'a str {
    image[key].as_str().unwrap_or_else(|| panic!("the manifest has no {key} of {}", image["file"]))
}

/// Returns the number at `key` of an image's entry.
pub(crate) fn number(image: &Value, key: &str) -> u64 {
    image[key].as_u64().unwrap_or_else(|| panic!("the manifest has no {key} of {}", image["file"]))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vm-images/golden")
}

/// Writes `data` to a new file, with holes for pages of zeros.
fn write_sparse(path: &Path, data: &[u8]) {
    const PAGE: usize = 4096;
    let file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.set_len(data.len() as u64).expect("the length can be set");
    for (i, page) in data.chunks(PAGE).enumerate() {
        if page.iter().any(|&b| b != 0) {
            file.write_all_at(page, (i * PAGE) as u64).expect("the data can be written");
        }
    }
}
