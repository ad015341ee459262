//! The arguments of `diffdisk ctl snapshot`: disks, and for each the path of `--keep-as` that belongs to it.
//!
//! A path belongs to a disk by its position on the command line, which derived parsers do not record.

use clap::builder::NonEmptyStringValueParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};

/// The disks of a snapshot.
#[derive(Debug)]
pub(super) struct SnapshotArgs {
    /// Name of each disk, and the path under which its contents are kept.
    pub(super) disks: Vec<(String, String)>,
}

/// Examples for the help.
pub(super) const EXAMPLES: &str = "\
Examples:
  diffdisk ctl snapshot vda --keep-as monday.vhd
  diffdisk ctl snapshot vda --keep-as vda-1.vhd vdb --keep-as vdb-1.vhd
  diffdisk ctl snapshot vda vdb --keep-as '{name}-{time}.vhd'";

/// Ids of the arguments.
const DISK: &str = "disk";
const KEEP_AS: &str = "keep_as";

impl Args for SnapshotArgs {
    fn augment_args(command: Command) -> Command {
        let disk = Arg::new(DISK)
            .value_name("DISK")
            .help("Name of a disk, as `diffdisk ctl disks` prints it")
            .required(true)
            .num_args(1..)
            .action(ArgAction::Append)
            .value_parser(NonEmptyStringValueParser::new());
        let keep_as = Arg::new(KEEP_AS)
            .long("keep-as")
            .value_name("PATH")
            .help(
                "New path of the kept image, in the folder of the disk's image; a relative path counts from that \
                 folder. {name} stands for the name of the disk, {time} for the time in UTC, such as \
                 20261130T235959Z",
            )
            .required(true)
            .action(ArgAction::Append)
            .value_parser(NonEmptyStringValueParser::new());
        command.arg(disk).arg(keep_as)
    }

    fn augment_args_for_update(command: Command) -> Command {
        SnapshotArgs::augment_args(command)
    }
}

impl FromArgMatches for SnapshotArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<SnapshotArgs, Error> {
        let words = |id: &str, wrap: fn(String) -> SnapshotWord| {
            let values = matches.get_many::<String>(id).into_iter().flatten().cloned().map(wrap);
            matches.indices_of(id).into_iter().flatten().zip(values).collect::<Vec<_>>()
        };
        let mut words = [words(DISK, SnapshotWord::Disk), words(KEEP_AS, SnapshotWord::KeepAs)].concat();
        words.sort_by_key(|(index, _)| *index);
        let disks = pair(words.into_iter().map(|(_, word)| word));
        disks.map(|disks| SnapshotArgs { disks }).map_err(|why| Error::raw(ErrorKind::WrongNumberOfValues, why))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        SnapshotArgs::from_arg_matches(matches).map(|new| *self = new)
    }
}

/// An argument of the verb.
#[derive(Clone, Debug)]
enum SnapshotWord {
    Disk(String),
    KeepAs(String),
}

/// Pairs each disk with its path: each disk is followed by a path, or the only path, before or after all disks, serves
/// for all.
///
/// # Errors
/// The message for the user, if a disk has no path or a path has no disk.
fn pair(words: impl Iterator<Item = SnapshotWord>) -> Result<Vec<(String, String)>, String> {
    // Each path, with the disks between the previous path and this one; then the disks after the last path.
    let (mut groups, mut open): (Vec<(Vec<String>, String)>, Vec<String>) = (Vec::new(), Vec::new());
    for word in words {
        match word {
            SnapshotWord::Disk(disk) => open.push(disk),
            SnapshotWord::KeepAs(path) => groups.push((std::mem::take(&mut open), path)),
        }
    }
    if let [(disks, path)] = groups.as_mut_slice()
        && (disks.is_empty() || open.is_empty())
    {
        disks.append(&mut open);
        return Ok(disks.drain(..).map(|disk| (disk, path.clone())).collect());
    }
    let hint = "give one --keep-as after each disk, or a single one after all disks";
    let nameless = |disk: &String| Err(format!("there is no --keep-as for the disk '{disk}': {hint}"));
    let mut pairs = Vec::new();
    for (mut disks, path) in groups {
        match (disks.pop(), disks.first()) {
            (Some(disk), None) => pairs.push((disk, path)),
            (_, Some(disk)) => return nameless(disk),
            (None, None) => return Err(format!("there is no disk for --keep-as '{path}': {hint}")),
        }
    }
    open.first().map_or(Ok(pairs), nameless)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::{ToolArgs, Verb};
    use super::super::ctl_args::CtlVerb;
    use super::*;

    /// Parses the words of a command line.
    fn parse(words: &str) -> Result<Vec<(String, String)>, Error> {
        let parsed = ToolArgs::try_parse_from("diffdisk ctl snapshot".split(' ').chain(words.split(' ')))?;
        match parsed.verb {
            Verb::Ctl(ctl) => match ctl.verb {
                CtlVerb::Snapshot(args) => Ok(args.disks),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn disks_and_paths_are_paired_by_position() {
        for (words, expected) in [
            ("a --keep-as x", vec![("a", "x")]),
            ("--keep-as x a", vec![("a", "x")]),
            ("a --keep-as x b --keep-as y", vec![("a", "x"), ("b", "y")]),
            ("a --keep-as=x --control s b --json --keep-as y c --keep-as z", vec![("a", "x"), ("b", "y"), ("c", "z")]),
            ("a b --keep-as {name}-{time}.vhd", vec![("a", "{name}-{time}.vhd"), ("b", "{name}-{time}.vhd")]),
            ("--keep-as {name} a b", vec![("a", "{name}"), ("b", "{name}")]),
            // The daemon refuses one disk twice.
            ("a a --keep-as x", vec![("a", "x"), ("a", "x")]),
        ] {
            let expected: Vec<_> =
                expected.into_iter().map(|(disk, path)| (disk.to_owned(), path.to_owned())).collect();
            assert_eq!(parse(words).unwrap(), expected, "{words}");
        }
    }

    #[test]
    fn a_disk_without_a_path_and_a_path_without_a_disk_are_wrong_usage() {
        for (words, why) in [
            ("a --keep-as x b", "there is no --keep-as for the disk 'b'"),
            ("a b --keep-as x c --keep-as y", "there is no --keep-as for the disk 'a'"),
            ("a --keep-as x b c --keep-as y", "there is no --keep-as for the disk 'b'"),
            ("a --keep-as x --keep-as y", "there is no disk for --keep-as 'y'"),
            ("--keep-as x a --keep-as y b", "there is no disk for --keep-as 'x'"),
            ("a", "--keep-as"),
            ("--keep-as x", "DISK"),
            ("a --keep-as=", "--keep-as"),
        ] {
            let e = parse(words).unwrap_err();
            assert_eq!(e.exit_code(), 2, "{words}");
            assert!(e.to_string().contains(why), "{words}: {e}");
        }
    }
}
