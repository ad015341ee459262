//! What a job, such as a commit or a step of growth, returns after each of its steps.

/// What a job wants after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobStep {
    /// Carry out the operations it pushed, all of them, then ask again.
    Wait,
    /// It is over.
    Done,
}
