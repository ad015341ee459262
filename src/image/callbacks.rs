//! The callback by which an examination reports defects to its caller, and by which the caller can end it.

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::format::Defect;

/// Receives each defect, and continues the examination or ends it with an error.
pub(super) type OnDefect<'a> = dyn FnMut(Defect) -> ControlFlow<Error> + 'a;

/// Passes a defect to `found`.
///
/// # Errors
/// The error with which `found` ends the examination.
pub(super) fn report_defect(found: &mut OnDefect<'_>, defect: Defect) -> Result<()> {
    match found(defect) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error),
    }
}
