//! SHA-256 of whatever comes out of programs and files.

use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use super::tool::{DIFFDISK, start};

/// SHA-256, in hexadecimal, of what `command` writes to standard output. The test fails when the command does.
pub fn sha256_of_output(command: &mut Command) -> String {
    let mut child = start(command.stdin(Stdio::null()).stdout(Stdio::piped())).expect("the command starts");
    let digest = sha256_of(child.stdout.take().expect("standard output is a pipe"));
    let status = child.wait().expect("the command can be waited for");
    assert!(status.success(), "{command:?} ended with {status}");
    digest
}

/// SHA-256, in hexadecimal, of the disk as a guest sees it, which is what `diffdisk convert --to raw` says.
pub fn sha256_of_disk(image: &Path) -> String {
    sha256_of_output(Command::new(DIFFDISK).arg("convert").arg(image).args(["-", "--to", "raw"]))
}

/// SHA-256, in hexadecimal, of a file's own bytes.
pub fn sha256_of_file(path: &Path) -> String {
    sha256_of(File::open(path).expect("the file opens"))
}

fn sha256_of(mut source: impl io::Read) -> String {
    let mut digest = Sha256::new();
    io::copy(&mut source, &mut digest).expect("the bytes can be read");
    format!("{:x}", digest.finalize())
}
