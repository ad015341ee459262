//! Targets of the comparing benches, and their output.

use serde_json::json;

/// A required bound of a measured ratio.
pub struct Target {
    pub what: String,
    pub ratio: f64,
    pub bound: Bound,
}

/// The bound of a ratio, and the side of the bound on which the ratio must lie.
#[derive(Clone, Copy)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
    Exactly(f64),
}

impl Target {
    pub fn met(&self) -> bool {
        match self.bound {
            Bound::AtLeast(bound) => self.ratio >= bound,
            Bound::AtMost(bound) => self.ratio <= bound,
            Bound::Exactly(bound) => (self.ratio - bound).abs() < 1e-9,
        }
    }
}

/// Prints for each target whether it is met.
pub fn print(targets: &[Target]) {
    println!("\n{:<108}{:>8}  {:<8}", "target", "ratio", "wanted");
    for target in targets {
        let wanted = match target.bound {
            Bound::AtLeast(b) => format!(">= {b}"),
            Bound::AtMost(b) => format!("<= {b}"),
            Bound::Exactly(b) => format!("= {b}"),
        };
        let met = if target.met() { "met" } else { "MISSED" };
        println!("{:<108}{:>8.2}  {wanted:<8} {met}", target.what, target.ratio);
    }
    let met = targets.iter().filter(|t| t.met()).count();
    println!("{met} of {} targets met", targets.len());
}

pub fn as_json(targets: &[Target]) -> serde_json::Value {
    let all = targets.iter().map(|t| {
        let (kind, bound) = match t.bound {
            Bound::AtLeast(b) => ("at least", b),
            Bound::AtMost(b) => ("at most", b),
            Bound::Exactly(b) => ("exactly", b),
        };
        json!({ "what": t.what, "ratio": t.ratio, "wanted": kind, "bound": bound, "met": t.met() })
    });
    all.collect()
}
