//! Named points in the verbs that change files, at which tests kill the process (feature `mutants`, never in a release).
//! Without the feature a failpoint leaves no trace in the program.
//!
//! A name is `verb.what-is-done`, said once in the sources: `tests/verbs` reads them there and leaves none out.

/// The variable that says where to die: `NAME`, or `NAME:COUNT` for the COUNT-th time that the failpoint is reached.
#[cfg(feature = "mutants")]
const VARIABLE: &str = "DIFFDISK_KILL_AT";

/// Ends the process as SIGKILL does, if a test asked for that here.
#[cfg(feature = "mutants")]
pub fn reached(name: &str) {
    use std::cell::Cell;
    thread_local! {
        static TIMES: Cell<u64> = const { Cell::new(0) };
    }
    let Ok(asked) = std::env::var(VARIABLE) else { return };
    let (asked, count) = asked.split_once(':').map_or((&*asked, 1), |(at, n)| (at, n.parse().expect("a count")));
    if asked != name {
        return;
    }
    TIMES.set(TIMES.get() + 1);
    if TIMES.get() == count {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .expect("a signal to us");
    }
}

/// Ends the process, if a test asked for that here: never.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn reached(_: &str) {}
