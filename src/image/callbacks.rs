//! The callback through which an examination reports defects to its caller, and lets it end.

use std::ops::ControlFlow;

use crate::error::{Error, Result};
use crate::format::Defect;

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
