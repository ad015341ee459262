//! The result of one step of a job, such as a commit or a step of growth.

/// The action of a job's caller after a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JobStep {
    /// Carries out all operations that the step pushed, then calls the job again.
    Wait,
    /// Nothing: the job is finished.
    Done,
}
