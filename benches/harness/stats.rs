//! Statistics over repeated measurements.

/// Returns the median.
pub fn median(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = numbers.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Returns half the distance between the smallest and the largest number, as a share of the median.
pub fn spread(numbers: &[f64]) -> f64 {
    let (low, high) = (numbers.iter().copied().fold(f64::MAX, f64::min), numbers.iter().copied().fold(0.0, f64::max));
    (high - low) / 2.0 / median(numbers.iter().copied())
}
