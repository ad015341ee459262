//! Cost of resolving sectors: nanoseconds per `plan_read`, by depth of the chain and by the fragmentation of a block
//! over its layers. The cost must not depend on the depth.
//!
//! With `--instructions NAME COUNT` the bench only repeats one operation COUNT times, so that valgrind can count its
//! instructions (`benches/instructions.sh`).
#![allow(clippy::cast_possible_truncation, reason = "a bench's small numbers")]
#![allow(missing_docs, unreachable_pub)] // no other crate uses it

#[path = "resolve/chains.rs"]
mod chains;
#[path = "harness/mod.rs"]
#[allow(dead_code, unused_imports, reason = "a part of it is used here")]
mod harness;
#[path = "resolve/null.rs"]
mod null;

use std::hint::black_box;
use std::time::Instant;

use chains::{BLOCKS, Fragmentation, plan_all, version};
use diffdisk::chain::{FrozenCacheHandle, PlanBuffer, Version};
use diffdisk::units::SectorRange;
use harness::random_stream;
use null::NullMode;

/// Sectors per request.
const REQUEST: u64 = 8;
/// Number of requests in a measured run, and number of runs.
const REQUESTS: u64 = 200_000;
const RUNS: usize = 9;
/// Target: maximum cost for the longest chain, relative to the cost for the shortest chain.
const MAX_DEPTH_RATIO: f64 = 1.25;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [option, name, count] = &arguments[..] {
        assert_eq!(option, "--instructions");
        return instructions(name, count.parse().expect("a count"));
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    println!("{:<28}{:>10}{:>10}{:>10}{:>10}{:>14}", "ns a plan, files in chain", 3, 6, 18, 64, "64 over 3");
    let mut flat = true;
    for cut in [Fragmentation::Whole, Fragmentation::Runs(8), Fragmentation::Runs(512)] {
        let versions = [1, 4, 16, 62].map(|depth| version(&folder.path().join(format!("{cut:?}-{depth}")), depth, cut));
        versions.iter().for_each(plan_all);
        let mut best = [f64::MAX; 4];
        // The minimum is used, because other load on the machine only adds time.
        for _ in 0..RUNS {
            for (version, best) in versions.iter().zip(&mut best) {
                *best = best.min(measure(version));
            }
        }
        let ratio = best[3] / best[0];
        flat &= ratio <= MAX_DEPTH_RATIO;
        let name = match cut {
            Fragmentation::Whole => "whole blocks".to_owned(),
            Fragmentation::Runs(n) => format!("{n} runs in a block"),
        };
        println!("{name:<28}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{ratio:>14.2}", best[0], best[1], best[2], best[3]);
    }
    println!("flat in depth (at most {MAX_DEPTH_RATIO}): {}", if flat { "yes" } else { "NO" });
}

/// Returns the number of nanoseconds per plan.
fn measure(version: &Version) -> f64 {
    let mut plan = PlanBuffer::default();
    let start = Instant::now();
    run_plans(version, &mut plan, REQUESTS);
    start.elapsed().as_secs_f64() * 1e9 / REQUESTS as f64
}

fn run_plans(version: &Version, plan: &mut PlanBuffer, count: u64) {
    let (mut rng, mut cache) = (random_stream(0), FrozenCacheHandle::default());
    for _ in 0..count {
        let start = rng.below(BLOCKS * 4096 / REQUEST) * REQUEST;
        version.plan_read(black_box(SectorRange::between(start, start + REQUEST)), &mut cache, plan);
        black_box(&plan);
    }
}

fn instructions(name: &str, count: u64) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("chain");
    match name {
        "plan-3" | "plan-64" => {
            let version = version(&path, if name == "plan-3" { 1 } else { 62 }, Fragmentation::Runs(8));
            plan_all(&version);
            run_plans(&version, &mut PlanBuffer::default(), count);
        }
        "request" => null::run_requests(&path, count, null::BATCH, NullMode::Operations),
        "request-single" => null::run_requests(&path, count, 1, NullMode::Copies),
        "request-copied" => null::run_requests(&path, count, null::BATCH, NullMode::Copies),
        other => panic!("nothing is called {other}"),
    }
}
