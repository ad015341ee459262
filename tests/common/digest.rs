//! SHA-256 of files, disks, and the output of programs.

use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::tool::{DIFFDISK, start};

/// Returns the SHA-256, in hexadecimal, of the standard output of `command`. The command must succeed.
pub fn sha256_of_output(command: &mut Command) -> String {
    let mut child = start(command.stdin(Stdio::null()).stdout(Stdio::piped())).expect("the command starts");
    let digest = sha256_of(child.stdout.take().expect("standard output is a pipe"));
    let status = child.wait().expect("the command can be waited for");
    assert!(status.success(), "{command:?} ended with {status}");
    digest
}

/// Returns the SHA-256, in hexadecimal, of the disk as `diffdisk convert --to raw` writes it.
pub fn sha256_of_disk(image: &Path) -> String {
    sha256_of_output(Command::new(DIFFDISK).arg("convert").arg(image).args(["-", "--to", "raw"]))
}

/// Returns the SHA-256, in hexadecimal, of a file.
pub fn sha256_of_file(path: &Path) -> String {
    sha256_of(File::open(path).expect("the file opens"))
}

/// Returns the SHA-256, in hexadecimal, of bytes in memory.
pub fn sha256_of_bytes(bytes: &[u8]) -> String {
    sha256_of(bytes)
}

fn sha256_of(mut source: impl io::Read) -> String {
    let mut digest = Sha256::new();
    io::copy(&mut source, &mut digest).expect("the bytes can be read");
    format!("{:x}", digest.finalize())
}
