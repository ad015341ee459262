//! Parent traps: at least forty children whose parent strings point outside the allowed folders. Each child is opened
//! under strace, and every file that the program opens must be an allowed one.

use std::fs;
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::chain::{BLOCK, SIZE, chain, ring};
use crate::common::temp;
use crate::common::tool::{self, DIFFDISK, DIFFDISKD};
use crate::common::vhd_bytes::{VhdFile, VhdSpec, id, utf16le, write_file};
use crate::measure::{self, Run};

/// The contents of every sector of the files outside the allowed folders. The programs must never print these contents.
const SECRET: &str = "SECRET";
/// Minimum number of traps.
const CLASSES: usize = 40;

/// Folders and files that a run may open in addition to the child's own folder: those that the loader, the C library
/// and the Rust runtime read. `allowed` adds the state of the daemon.
const SYSTEM: [&str; 9] = [
    "/lib/",
    "/lib64/",
    "/usr/lib/",
    "/usr/share/zoneinfo/",
    "/etc/ld.so.",
    "/etc/localtime",
    "/sys/devices/system/",
    "/sys/fs/cgroup",
    "/sys/kernel/mm/",
];
/// Files in the process's own folder in /proc that the runtime reads.
const OWN_PROC: [&str; 7] = ["maps", "cgroup", "mountinfo", "fd", "status", "limits", "auxv"];

/// One trap.
struct Trap {
    name: String,
    /// Creates the files that the child's strings point at. Returns the child.
    build: Box<dyn Fn(&TrapFolders) -> PathBuf>,
    /// Whether the programs must find a valid parent in the child's folder despite the trap.
    reads: bool,
}

/// The folders of a trap: the folder of the child, which is allowed, and a folder next to it, which is not allowed. The
/// folder that is not allowed contains `secret.vhd`, an image with the UUID that the child records for its parent.
struct TrapFolders {
    inside: PathBuf,
    outside: PathBuf,
}

impl TrapFolders {
    fn within(root: &Path) -> TrapFolders {
        let place = TrapFolders { inside: root.join("inside"), outside: root.join("outside") };
        for folder in [&place.inside, &place.outside] {
            fs::create_dir(folder).expect("a folder");
        }
        let secret = VhdSpec { tag: SECRET.into(), ..VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0, 1, 2]) };
        VhdFile::create(&place.outside.join("secret.vhd"), secret);
        write_file(&place.outside.join("secret.raw"), SECRET.repeat(4096).as_bytes());
        place
    }

    /// Replaces `@` in a trap's string by the path of the folder that is not allowed.
    fn path(&self, text: &str) -> String {
        text.replace('@', &self.outside.display().to_string())
    }

    fn child(&self) -> VhdFile {
        VhdFile::create(&self.inside.join("c.vhd"), VhdSpec::child(SIZE, BLOCK, id(1), ""))
    }
}

fn trap(name: impl Into<String>, build: impl Fn(&TrapFolders) -> PathBuf + 'static) -> Trap {
    Trap { name: name.into(), build: Box::new(build), reads: false }
}

/// Stores a parent string in a locator or, for the code `name`, in the header.
fn set(place: &TrapFolders, child: &VhdFile, slot: u64, code: &str, text: &str) {
    let text = place.path(text);
    match code {
        "name" => drop(child.set_parent_name(&text.encode_utf16().collect::<Vec<_>>())),
        "MacX" => drop(child.set_locator_data(slot, b"MacX", text.as_bytes())),
        "W2ku" => drop(child.set_locator_data(slot, b"W2ku", &utf16le(&text))),
        "W2ru" => drop(child.set_locator_data(slot, b"W2ru", &utf16le(&text))),
        _ => unreachable!("no such platform"),
    }
}

/// Returns a trap whose child has a single parent string.
fn with_string(code: &'static str, text: &'static str) -> Trap {
    trap(format!("{code} {text}"), move |place| {
        let child = place.child();
        set(place, &child, 0, code, text);
        child.path
    })
}

/// Returns a trap whose child names `p.vhd` in the child's folder. `lay` creates an entry of that name that is not a
/// valid parent, or creates nothing.
fn with_file(name: &'static str, lay: impl Fn(&TrapFolders, &Path) + 'static) -> Trap {
    trap(format!("p.vhd is {name}"), move |place| {
        lay(place, &place.inside.join("p.vhd"));
        let child = place.child();
        set(place, &child, 0, "W2ru", ".\\p.vhd");
        set(place, &child, 1, "name", "p.vhd");
        child.path
    })
}

/// Returns a trap whose child has bad parent strings and, as the last one, the name of a valid parent in the child's
/// folder.
fn sound_parent_despite(code: &'static str, text: &'static str) -> Trap {
    let build = move |place: &TrapFolders| {
        VhdFile::create(&place.inside.join("p.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0]));
        let child = place.child();
        set(place, &child, 0, code, text);
        set(place, &child, 7, "W2ru", ".\\p.vhd");
        child.path
    };
    Trap { name: format!("sound parent in spite of {code} {text}"), build: Box::new(build), reads: true }
}

/// Returns a trap whose child has a single parent string, which names a valid parent in the child's folder.
fn sound_parent_by(what: &'static str, code: &'static str, text: &'static str) -> Trap {
    let build = move |place: &TrapFolders| {
        VhdFile::create(&place.inside.join("p.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0]));
        let child = place.child();
        set(place, &child, 0, code, text);
        child.path
    };
    Trap { name: what.to_owned(), build: Box::new(build), reads: true }
}

fn strings() -> Vec<Trap> {
    vec![
        with_string("W2ru", "..\\outside\\secret.vhd"),
        with_string("W2ru", ".\\..\\outside\\secret.vhd"),
        with_string("W2ru", "../outside/secret.vhd"),
        with_string("W2ru", "..\\..\\..\\..\\..\\..\\..\\..\\..\\..\\etc\\passwd"),
        with_string("W2ru", "@/secret.vhd"),
        with_string("W2ru", ".\\c.vhd\\..\\..\\outside\\secret.vhd"),
        with_string("W2ru", "."),
        with_string("W2ru", ".."),
        with_string("W2ru", "\\"),
        with_string("W2ru", ""),
        with_string("W2ku", "@/secret.vhd"),
        with_string("W2ku", "C:@/secret.vhd"),
        with_string("W2ku", "/etc/passwd"),
        with_string("W2ku", "\\etc\\passwd"),
        with_string("W2ku", "\\\\server\\share\\secret.vhd"),
        with_string("W2ku", "\\\\?\\C:@\\secret.vhd"),
        with_string("W2ku", "\\\\.\\PhysicalDrive0"),
        with_string("W2ku", "/proc/self/cwd/../outside/secret.vhd"),
        with_string("W2ku", "/proc/self/root@/secret.vhd"),
        with_string("W2ku", "/dev/stdin"),
        with_string("W2ku", "/dev/zero"),
        with_string("MacX", "file:///etc/passwd"),
        with_string("MacX", "file://localhost/etc/passwd"),
        with_string("MacX", "file://@/secret.vhd"),
        with_string("MacX", "file://localhost@/secret.vhd"),
        with_string("MacX", "file://../outside/secret.vhd"),
        with_string("MacX", "file://./%2e%2e/outside/secret.vhd"),
        with_string("MacX", "file://./..%2foutside%2fsecret.vhd"),
        with_string("MacX", "file://./%252e%252e/outside/secret.vhd"),
        with_string("MacX", "@/secret.vhd"),
        with_string("MacX", "http://127.0.0.1/secret.vhd"),
        with_string("name", "../outside/secret.vhd"),
        with_string("name", "..\\outside\\secret.vhd"),
        with_string("name", "@/secret.vhd"),
        with_string("name", "/etc/passwd"),
        with_string("name", "../../etc/passwd"),
        with_string("name", "json:{\"driver\":\"file\",\"filename\":\"@/secret.vhd\"}"),
        with_string("name", "/proc/self/environ"),
    ]
}

fn files() -> Vec<Trap> {
    vec![
        with_file("a link out of the folder", |place, p| symlink(place.outside.join("secret.vhd"), p).expect("a link")),
        with_file("a relative link out of the folder", |_, p| symlink("../outside/secret.vhd", p).expect("a link")),
        with_file("a link to a link out of the folder", |place, p| {
            symlink("hop", p).expect("a link");
            symlink(place.outside.join("secret.vhd"), place.inside.join("hop")).expect("a link");
        }),
        with_file("a link to /etc/passwd", |_, p| symlink("/etc/passwd", p).expect("a link")),
        with_file("a link to /proc/self/environ", |_, p| symlink("/proc/self/environ", p).expect("a link")),
        with_file("a link to /dev/zero", |_, p| symlink("/dev/zero", p).expect("a link")),
        with_file("a link to itself", |_, p| symlink("p.vhd", p).expect("a link")),
        with_file("a ring of links", |place, p| {
            symlink("hop", p).expect("a link");
            symlink("p.vhd", place.inside.join("hop")).expect("a link");
        }),
        with_file("a FIFO", |_, p| mknodat(CWD, p, FileType::Fifo, Mode::RUSR, 0).expect("a FIFO")),
        with_file("a folder", |_, p| fs::create_dir(p).expect("a folder")),
        with_file("a socket", |_, p| tool::leave_socket(p)),
        with_file("a device", |_, p| {
            let zero = rustix::fs::makedev(1, 5);
            // Only root may create a device node. Without root, `p.vhd` is a link to an existing device.
            mknodat(CWD, p, FileType::CharacterDevice, Mode::RUSR, zero)
                .or_else(|_| symlink("/dev/zero", p).map_err(|_| rustix::io::Errno::IO))
                .expect("a device");
        }),
        with_file("of another id", |_, p| drop(VhdFile::create(p, VhdSpec::dynamic(SIZE, BLOCK).with_uuid(id(77))))),
        with_file("not there", |_, _| ()),
        trap("another recorded path is that of a file outside", |place| {
            VhdFile::create(&place.inside.join("p.vhd"), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0]));
            let child = place.child();
            set(place, &child, 0, "W2ru", "..\\outside\\secret.vhd");
            set(place, &child, 7, "W2ru", ".\\p.vhd");
            child.path
        }),
        trap("the folder of the child has a copy of a file outside", |place| {
            fs::copy(place.outside.join("secret.vhd"), place.inside.join("secret.vhd")).expect("a copy");
            let child = place.child();
            set(place, &child, 0, "W2ku", "C:@\\secret.vhd");
            set(place, &child, 1, "name", "C:@\\secret.vhd");
            child.path
        }),
        trap("two names that differ in case", |place| {
            for name in ["P.vhd", "p.VHD"] {
                VhdFile::create(&place.inside.join(name), VhdSpec::dynamic(SIZE, BLOCK).with_blocks(&[0]));
            }
            let child = place.child();
            set(place, &child, 0, "W2ru", ".\\p.vhd");
            child.path
        }),
        trap("a linked folder of another case on the way", |place| {
            symlink(&place.outside, place.inside.join("Sub")).expect("a link");
            let child = place.child();
            set(place, &child, 0, "W2ru", ".\\sub\\secret.vhd");
            child.path
        }),
        trap("a linked folder on the way", |place| {
            symlink(&place.outside, place.inside.join("sub")).expect("a link");
            let child = place.child();
            set(place, &child, 0, "W2ru", ".\\sub\\secret.vhd");
            child.path
        }),
        trap("a parent without an id, /etc/passwd by name", |place| raw(place, "/etc/passwd")),
        trap("a parent without an id, a raw file outside", |place| raw(place, "@/secret.raw")),
        trap("a parent without an id, a raw file inside", |place| {
            fs::copy(place.outside.join("secret.raw"), place.inside.join("disk.raw")).expect("a copy");
            raw(place, "disk.raw")
        }),
        trap("its own parent", |place| ring(&place.inside, 1)),
        trap("a ring of two", |place| ring(&place.inside, 2)),
        trap("a ring of three", |place| ring(&place.inside, 3)),
        trap("too deep a chain", |place| chain(&place.inside, crate::chain::MAX_DEPTH + 1)),
    ]
}

/// Creates a child as XenServer does for a raw parent, with an all-zero parent UUID and `text` as every parent string.
fn raw(place: &TrapFolders, text: &str) -> PathBuf {
    let child = VhdFile::create(&place.inside.join("c.vhd"), VhdSpec::child(SIZE, BLOCK, [0; 16], ""));
    for (slot, code) in (0..).zip(["MacX", "W2ku", "W2ru", "name"]) {
        set(place, &child, slot, code, text);
    }
    child.path
}

fn in_spite() -> Vec<Trap> {
    vec![
        sound_parent_despite("W2ku", "@/secret.vhd"),
        sound_parent_despite("MacX", "file://@/secret.vhd"),
        sound_parent_despite("MacX", "file:///dev/zero"),
        sound_parent_despite("name", "../outside/secret.vhd"),
        sound_parent_despite("name", "\u{0}\u{0}/etc/passwd"),
        sound_parent_despite("W2ku", "/proc/self/fd/0"),
        sound_parent_despite("W2ku", "\\\\server\\share\\secret.vhd"),
        sound_parent_by("a file name in another case", "W2ru", ".\\P.VHD"),
        sound_parent_by("a folder in another case", "W2ru", ".\\SUB\\..\\P.vhd"),
        sound_parent_by("the name at the end of a path of Windows", "W2ku", "C:\\VMs\\p.vhd"),
        sound_parent_by("the name at the end of a share", "name", "\\\\server\\share\\p.vhd"),
    ]
}

#[test]
fn no_parent_string_opens_a_file_outside() {
    tool::require(&["strace"]);
    let traps: Vec<_> = [strings(), files(), in_spite()].into_iter().flatten().collect();
    assert!(traps.len() >= CLASSES, "only {} traps", traps.len());
    let failed: Vec<_> = traps
        .iter()
        .filter_map(|trap| {
            let result = catch_unwind(AssertUnwindSafe(|| run_trap(trap)));
            result.err().map(|panic| {
                let message =
                    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
                format!("{}: {}", trap.name, message.unwrap_or("panicked"))
            })
        })
        .collect();
    println!("{} traps, {} failed", traps.len(), failed.len());
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
}

/// Opens the trap's child with `info`, `info --chain` and `convert`, and with the daemon if the parent must be refused.
fn run_trap(trap: &Trap) {
    let folder = temp::scratch("trap");
    let place = TrapFolders::within(folder.path());
    let leaf = (trap.build)(&place);
    let leaf_text = leaf.display().to_string();
    let state = tempfile::tempdir().expect("a folder for the daemon");
    let allowed = [place.inside.clone(), state.path().to_path_buf()];

    let alone = traced(&[DIFFDISK, "info", &leaf_text], std::slice::from_ref(&leaf));
    assert_eq!(alone.code, 0, "info of the file alone: {}", alone.stderr);
    let socket = format!("--socket-path={}", state.path().join("sock").display());
    let image = format!("--blk-file={leaf_text}");
    // The daemon and the tool look for live journals in the runtime folder.
    let runtime = format!("--runtime-dir={}", state.path().display());
    let mut runs = vec![
        ("info --chain", vec![DIFFDISK, "info", "--chain", &leaf_text, &runtime]),
        ("convert", vec![DIFFDISK, "convert", &leaf_text, "-", "--to", "raw", &runtime]),
    ];
    if !trap.reads {
        runs.push(("diffdiskd", vec![DIFFDISKD, &socket, &image, &runtime]));
    }
    for (who, args) in runs {
        let run = traced(&args, &allowed);
        let shown = String::from_utf8_lossy(&run.stdout);
        assert!(!shown.contains(SECRET) && !shown.contains("root:"), "{who}: shows what lies outside");
        if trap.reads {
            assert_eq!(run.code, 0, "{who}: {}", run.stderr);
            assert!(who != "convert" || shown.starts_with("<R s=0>"), "{who}: the sound parent's data is missing");
        } else if who == "info --chain" && run.code == 0 {
            // `info` prints only the child, and a warning with the reason why the parent is refused.
            assert!(run.stderr.starts_with("warn: "), "{who}: {}", run.stderr);
            assert!(!shown.contains("└─"), "{who}: shows a parent: {shown}");
        } else {
            assert_eq!(run.code, 1, "{who}: exit code: {}", run.stderr);
            assert!(run.stdout.is_empty(), "{who}: showed {} bytes", run.stdout.len());
            run.error_line(who);
            assert!(!run.stderr.contains(SECRET), "{who}: {}", run.stderr);
        }
    }
}

/// Runs a program under strace. Panics if it opened (to read or write) a file that is neither below `allowed` nor one
/// of the system's.
fn traced(args: &[&str], allowed: &[PathBuf]) -> Run {
    let log = tempfile::NamedTempFile::new().expect("a file for the trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-qq", "-e", "trace=open,openat,openat2,open_by_handle_at", "-o"]).arg(log.path());
    // LC_ALL=C prevents reads of locale files, whose names differ between hosts.
    let run = measure::run(command.args(args).env("LC_ALL", "C"));
    run.assert_sane(args[1]);
    let trace = fs::read_to_string(log.path()).expect("the trace is text");
    assert!(trace.contains("open"), "strace recorded no open call");
    // An open with O_PATH reads nothing of a file. The programs use it to test whether a file exists.
    for line in trace.lines().filter(|line| !line.contains("O_PATH")) {
        // A successful call ends in the descriptor and, in angle brackets, the real path of the file.
        let Some((_, file)) = line.rsplit_once(") = ").and_then(|(_, result)| result.split_once('<')) else { continue };
        let file = file.trim_end().trim_end_matches('>');
        // The folder of an image may be listed: merge records lie in the folders of their images.
        let is_own_folder = line.contains("O_DIRECTORY") && allowed.iter().any(|allowed| allowed.starts_with(file));
        assert!(is_own_folder || may_open(file, allowed), "opened {file}: {line}");
    }
    run
}

fn may_open(file: &str, allowed: &[PathBuf]) -> bool {
    let own_proc = || {
        let mut parts = file.strip_prefix("/proc/").unwrap_or_default().split('/');
        parts.next().is_some_and(|pid| pid.parse::<u32>().is_ok())
            && parts.next().is_some_and(|name| OWN_PROC.contains(&name))
            && parts.next().is_none()
    };
    allowed.iter().any(|folder| Path::new(file).starts_with(folder))
        || SYSTEM.iter().any(|prefix| file.starts_with(prefix))
        || own_proc()
}

#[test]
fn the_trace_detects_files_outside() {
    tool::require(&["strace"]);
    let folder = temp::scratch("trace");
    let place = TrapFolders::within(folder.path());
    symlink("../outside/secret.vhd", place.inside.join("link")).expect("a link");
    let caught = |file: PathBuf| {
        let allowed = [place.inside.clone()];
        let result = catch_unwind(AssertUnwindSafe(|| traced(&["cat", &file.display().to_string()], &allowed)));
        result.err().map(|panic| *panic.downcast::<String>().expect("a sentence"))
    };
    assert_eq!(caught(write_file(&place.inside.join("fine"), b"x")), None);
    let secret = place.outside.join("secret.vhd").display().to_string();
    for (file, real) in [(secret.clone().into(), &*secret), (place.inside.join("link"), &*secret)] {
        let message = caught(file).expect("the trace missed a file outside");
        assert!(message.starts_with(&format!("opened {real}: ")), "{message}");
    }
    assert!(caught("/etc/passwd".into()).expect("the trace missed /etc/passwd").starts_with("opened /etc/passwd: "));
}
