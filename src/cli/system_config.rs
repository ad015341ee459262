//! The system configuration `/etc/diffdisk/diffdisk.toml`, which both programs read: default values of options.
//!
//! The file determines the folders in which parents are accepted. For this reason the file is refused if it belongs to
//! another user than root and the user of the process, or if other users than its owner may write to it.

use std::fs::File;
use std::io::{ErrorKind as IoKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::disk_args::toml_error;
use crate::error::{Error, ErrorKind, Result};

/// Path of the system configuration.
const CONFIG_PATH: &str = "/etc/diffdisk/diffdisk.toml";
/// Maximum number of bytes that are read from the file.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The settings in the system configuration.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct SystemConfig {
    /// Folders in which parents are accepted.
    pub(super) allow_parents: Vec<PathBuf>,
    /// The runtime folder.
    pub(super) runtime_dir: Option<PathBuf>,
}

impl SystemConfig {
    /// Reads the file. Returns the default values if the file does not exist, or if `skip` is set.
    ///
    /// # Errors
    /// * `Refused`: the file is not a regular file, belongs to neither root nor the user of the process, or is writable
    ///   for other users than its owner.
    /// * `Invalid`: the file is malformed, has an unknown key, or contains a relative path.
    /// * `Io`: the file cannot be read.
    pub(super) fn load(skip: bool) -> Result<SystemConfig> {
        if skip {
            Ok(SystemConfig::default())
        } else {
            read(Path::new(CONFIG_PATH)).map_err(|e| e.at_path(CONFIG_PATH))
        }
    }
}

fn read(path: &Path) -> Result<SystemConfig> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), IoKind::NotFound | IoKind::NotADirectory) => return Ok(SystemConfig::default()),
        Err(e) => return Err(Error::io("cannot read the system configuration", e)),
    };
    let failed = |e| Error::io("cannot read the system configuration", e);
    let found = file.metadata().map_err(failed)?;
    let refuse = |why: String| Err(Error::new(ErrorKind::Refused, why));
    if !found.is_file() {
        return refuse("not a regular file".into());
    }
    if found.uid() != 0 && found.uid() != rustix::process::geteuid().as_raw() {
        let owner = found.uid();
        return refuse(format!(
            "it belongs to user {owner}, who could have any file opened: chown it to root, or use --no-system-config"
        ));
    }
    if found.mode() & 0o022 != 0 {
        return refuse(format!(
            "others than its owner may write to it (mode {:04o}): run chmod go-w on it, or use --no-system-config",
            found.mode() & 0o7777
        ));
    }
    let mut text = String::new();
    file.take(MAX_CONFIG_BYTES).read_to_string(&mut text).map_err(failed)?;
    parse(&text).map_err(|why| Error::new(ErrorKind::Invalid, why))
}

fn parse(text: &str) -> Result<SystemConfig, String> {
    let config: SystemConfig = toml::from_str(text).map_err(|e| toml_error(text, &e))?;
    match config.allow_parents.iter().chain(&config.runtime_dir).find(|folder| !folder.is_absolute()) {
        Some(relative) => Err(format!("{} is not an absolute path", relative.display())),
        None => Ok(config),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_parsed() {
        let config = parse("allow-parents = [\"/images\", \"/more\"]\nruntime-dir = \"/run/x\"\n").unwrap();
        assert_eq!(config.allow_parents, [PathBuf::from("/images"), "/more".into()]);
        assert_eq!(config.runtime_dir, Some("/run/x".into()));
        assert_eq!(parse("").unwrap(), SystemConfig::default());
        for (bad, why) in [
            ("allow_parents = []", "line 1: unknown field"),
            ("\ncolour = 1", "line 2: unknown field"),
            ("allow-parents = \"/images\"", "line 1"),
            ("allow-parents = [\"images\"]", "absolute"),
            ("runtime-dir = \"run\"", "absolute"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn a_file_that_others_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("diffdisk.toml");
        assert_eq!(read(&path).unwrap(), SystemConfig::default(), "the file need not exist");
        fs::write(&path, "allow-parents = [\"/images\"]").unwrap();
        for (mode, fine) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let read = read(&path);
            assert_eq!(read.is_ok(), fine, "{mode:o}");
            assert!(fine || read.unwrap_err().kind() == ErrorKind::Refused);
        }
        if rustix::process::geteuid().is_root() {
            fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            std::os::unix::fs::chown(&path, Some(1234), None).unwrap();
            assert!(read(&path).unwrap_err().line().contains("user 1234"));
        }
    }
}
