//! The tasks of a lane, by number.

use super::request::Work;
use super::task::Task;

/// Maximum number of tasks of a lane.
pub(super) const MAX_TASKS: usize = 1024;

/// The tasks of a lane. A task has a few hundred bytes, so tasks are boxed, and boxes of finished tasks are reused.
pub(super) struct TaskTable {
    /// Waiting tasks, by number. A task that is being advanced is not in the table.
    tasks: Vec<Option<Box<Task>>>,
    free_numbers: Vec<u32>,
    #[expect(clippy::vec_box, reason = "the boxes move between `tasks` and here")]
    pool: Vec<Box<Task>>,
}

impl TaskTable {
    pub(super) fn new() -> TaskTable {
        let count = u32::try_from(MAX_TASKS).expect("a small constant");
        TaskTable {
            tasks: std::iter::repeat_with(|| None).take(MAX_TASKS).collect(),
            free_numbers: (0..count).rev().collect(),
            pool: Vec::new(),
        }
    }

    /// Number of tasks that can still be started.
    pub(super) fn free(&self) -> usize {
        self.free_numbers.len()
    }

    /// Whether no task is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.free_numbers.len() == MAX_TASKS
    }

    /// Creates a task and assigns it a number. [`TaskTable::put`] adds the task to the table.
    #[inline]
    pub(super) fn start(&mut self, tag: u64, work: Work) -> (u32, Box<Task>) {
        let number = self.free_numbers.pop().expect("the caller checked Lane::push_capacity");
        let task = match self.pool.pop() {
            Some(mut task) => {
                task.reset(tag, work);
                task
            }
            None => Box::new(Task::new(tag, work)),
        };
        (number, task)
    }

    /// The waiting tasks.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Task> {
        self.tasks.iter().filter_map(Option::as_deref)
    }

    /// The versions that waiting tasks use.
    pub(super) fn epochs(&self) -> impl Iterator<Item = u32> {
        self.iter().filter(|task| task.uses_version()).map(|task| task.epoch)
    }

    /// Returns the waiting task with a number, or `None` if there is none.
    pub(super) fn get(&self, number: u32) -> Option<&Task> {
        self.tasks[number as usize].as_deref()
    }

    /// Returns the waiting task with a number.
    #[inline]
    pub(super) fn get_mut(&mut self, number: u32) -> &mut Task {
        self.tasks[number as usize].as_deref_mut().expect("completions and wait lists name tasks in the table")
    }

    /// Takes a waiting task out of the table to advance it.
    #[inline]
    pub(super) fn take(&mut self, number: u32) -> Box<Task> {
        self.tasks[number as usize].take().expect("only a waiting task is advanced")
    }

    /// Puts a task that waits for an event into the table.
    #[inline]
    pub(super) fn put(&mut self, number: u32, task: Box<Task>) {
        self.tasks[number as usize] = Some(task);
    }

    /// Frees the number of a finished task and keeps its box for reuse.
    #[inline]
    pub(super) fn finish(&mut self, number: u32, task: Box<Task>) {
        self.free_numbers.push(number);
        self.pool.push(task);
    }
}
