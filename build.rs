//! Records the git commit that the programs are built from, for the line that the daemon logs at its start.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // In a worktree these files lie elsewhere. With a path that does not exist, cargo would run the build script each
    // time.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    // A source archive lies in no repository, or in that of another project.
    let here = git(&["ls-files", "--error-unmatch", "build.rs"]).is_some();
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).filter(|_| here);
    println!("cargo::rustc-env=DIFFDISK_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}

/// Returns the output of a git command; `None` if it fails or there is no git.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
