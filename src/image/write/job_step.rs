//! The result of one step of a job, such as a commit or a step of growth.

/// The action that a step requires of the job's caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobStep {
    /// The caller carries out all operations that the step pushed, then runs the next step.
    Wait,
    /// The job is finished.
    Done,
}
