//! Callbacks through which an examination and long work report to their caller, and let it end them.

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::format::Defect;

/// Receives the number of bytes done since the last call, and ends the work by an error.
pub type OnProgress<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Receives each defect, and ends the examination by an error or lets it continue.
pub(super) type OnDefect<'a> = dyn FnMut(Defect) -> ControlFlow<Error> + 'a;

/// Reports a defect.
///
/// # Errors
/// The error by which `found` ends the examination.
pub(super) fn report_defect(found: &mut OnDefect<'_>, defect: Defect) -> Result<()> {
    match found(defect) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}
