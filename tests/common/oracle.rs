//! 7-Zip as an independent reader of VHD chains.
//!
//! 7-Zip finds parents in the folder of the child only, and ends with an error status if it finds a defect.

use super::digest::sha256_of_output;
use std::path::Path;
use std::process::{Command, Stdio};

/// Returns the SHA-256 of the disk as 7-Zip reads it from the chain that ends in `leaf`.
pub fn sha256_of_disk(leaf: &Path) -> String {
    let folder = leaf.parent().expect("an image lies in a folder");
    let name = leaf.file_name().expect("an image has a name");
    sha256_of_output(Command::new(program()).current_dir(folder).args(["e", "-so", "-bd", "-tVHD"]).arg(name))
}

/// Returns the name of the 7-Zip program: `7zz`, or `7z` if there is no `7zz`.
fn program() -> &'static str {
    ["7zz", "7z"].into_iter().find(|name| starts(name)).expect("7-Zip is installed; `make test` installs it")
}

fn starts(name: &str) -> bool {
    let _lock = super::tool::lock_spawns();
    Command::new(name).arg("i").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}
