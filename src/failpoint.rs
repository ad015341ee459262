//! Failpoints in the verbs that change files, at which tests kill the process (feature `mutants`, never in a release).
//! Without the feature a failpoint compiles to nothing.
//!
//! The name of a failpoint has the form `action.step`, for example `merge.copied`, and occurs once in the sources.
//! `tests/verbs` collects the names from the sources, so that each failpoint is tested.

/// Environment variable that selects a failpoint: `NAME`, or `NAME:COUNT` for the COUNT-th time that a thread reaches
/// the failpoint.
#[cfg(feature = "mutants")]
const VARIABLE: &str = "DIFFDISK_KILL_AT";

/// Kills the process by SIGKILL if the environment selects this failpoint.
#[cfg(feature = "mutants")]
pub fn reached(name: &str) {
    use std::cell::Cell;
    thread_local! {
        static TIMES: Cell<u64> = const { Cell::new(0) };
    }
    let Ok(selected) = std::env::var(VARIABLE) else { return };
    let (selected, count) =
        selected.split_once(':').map_or((&*selected, 1), |(at, n)| (at, n.parse().expect("a count")));
    if selected != name {
        return;
    }
    TIMES.set(TIMES.get() + 1);
    if TIMES.get() == count {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .expect("a process may signal itself");
    }
}

/// Does nothing: failpoints need the feature `mutants`.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn reached(_: &str) {}
