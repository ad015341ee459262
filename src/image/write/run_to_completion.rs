//! Runs a job synchronously, on an engine of its own: for tools, and for opening and closing an image.

use std::io;

use super::job_step::JobStep;
use crate::error::{Error, Result};
use crate::storage::{EngineKind, Env, File, FileSlot, Op};

/// Maximum number of operations in flight.
const DEPTH: usize = 64;

/// Calls `next` for steps, and carries out their operations, until the job is finished. `next` receives the first
/// failure among the operations of the previous step.
///
/// # Errors
/// Any error of `next`, and the errors of the engine.
pub fn run_to_completion(
    env: &dyn Env,
    file: &File,
    slot: FileSlot,
    mut next: impl FnMut(Option<io::Error>, &mut Vec<Op>) -> Result<JobStep>,
) -> Result<()> {
    let broken = |e| Error::io("the engine failed", e).at_path(file.path());
    let mut engine = env.engine(EngineKind::Blocking, DEPTH)?;
    engine.register(slot, file).map_err(broken)?;
    let (mut ops, mut done, mut failed) = (Vec::new(), Vec::new(), None);
    while next(failed.take(), &mut ops)? == JobStep::Wait {
        let mut rest = ops.drain(..).peekable();
        while rest.peek().is_some() || engine.outstanding() > 0 {
            while engine.outstanding() < engine.depth() {
                let Some(op) = rest.next() else { break };
                engine.push(op).expect("fewer operations are in flight than the engine's depth");
            }
            engine.wait().map_err(broken)?;
            engine.reap(&mut done);
            for completion in done.drain(..) {
                if let Err(e) = completion.result {
                    failed.get_or_insert(e);
                }
            }
        }
    }
    Ok(())
}
