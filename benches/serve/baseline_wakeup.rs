//! Baseline of wake-ups and polling, without a server and without virtqueues: one thread reads with pread(2) for a
//! consumer thread on another processor. The consumer sleeps until it is woken, or polls memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::baseline_reads::{BLOCK, DEPTH, measure, thread_time, warm};
use crate::harness::random_stream;
use crate::processors::{pin_this_thread, processors};
use crate::sample::Sample;

/// Number of reads between two notifications: half of the queue depth. In the daemon the number depends on the time per
/// request.
const BATCH: usize = DEPTH / 2;

fn reader(path: &Path, region: u64) -> impl FnMut(&mut [u8]) {
    let file = File::open(path).expect("the image can be read");
    warm(&file, region);
    let mut rng = random_stream(0);
    move |page| {
        let at = rng.below(region / BLOCK as u64) * BLOCK as u64;
        file.read_exact_at(page, at).expect("the image can be read");
    }
}

/// Measures random reads of 4 KiB. After every 16 reads the reading thread wakes the consumer, which sleeps.
pub fn eventfd_reader(path: &Path, region: u64, time: Duration) -> Sample {
    let (mut read, bell) = (reader(path, region), EventFd::new(0).expect("an eventfd can be made"));
    let over = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin_this_thread(processors() - 1);
            while over.load(Ordering::Relaxed) == 0 {
                bell.read().expect("a bell that rang can be read");
            }
        });
        let here = scope.spawn(|| {
            pin_this_thread(0);
            let mut memory = vec![0; DEPTH * BLOCK];
            let sample = measure(time, DEPTH, || {
                for turn in memory.chunks_mut(BATCH * BLOCK) {
                    turn.chunks_mut(BLOCK).for_each(&mut read);
                    bell.write(1).expect("a bell can be rung");
                }
            });
            over.store(1, Ordering::Relaxed);
            bell.write(1).expect("a bell can be rung");
            sample
        });
        here.join().expect("reads do not panic")
    })
}

/// Measures random reads of 4 KiB. The consumer requests each read by a change of a shared word, and the reading thread
/// answers by a change of another word. Both threads poll.
pub fn polling_reader(path: &Path, region: u64, time: Duration) -> Sample {
    const OVER: u64 = u64::MAX;
    // The alignment gives each word a cache line of its own.
    #[repr(align(128))]
    #[derive(Default)]
    struct Word(AtomicU64);
    let (mut read, question, answer) = (reader(path, region), Word::default(), Word::default());
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            pin_this_thread(0);
            let (mut memory, mut last, before) = (vec![0; DEPTH * BLOCK], 0, thread_time());
            loop {
                let number = question.0.load(Ordering::Acquire);
                if number == OVER {
                    return (thread_time() - before).as_secs_f64() * 1e6 / last as f64;
                }
                if number == last {
                    std::hint::spin_loop();
                    continue;
                }
                let page = number as usize % DEPTH * BLOCK;
                read(&mut memory[page..page + BLOCK]);
                last = number;
                answer.0.store(last, Ordering::Release);
            }
        });
        let mut number = 0;
        let mut sample = measure(time, 1, || {
            number += 1;
            question.0.store(number, Ordering::Release);
            while answer.0.load(Ordering::Acquire) != number {
                std::hint::spin_loop();
            }
        });
        question.0.store(OVER, Ordering::Release);
        sample.cpu = there.join().expect("reads do not panic");
        sample
    })
}
