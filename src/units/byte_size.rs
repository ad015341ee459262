//! Parsing of sizes that users type: `512`, `64K`, `10M`, `2G`, `1T`.

/// Parses a size in bytes: a number with an optional unit, which is a power of 1024 (`K`, `KB` and `KiB` are the same).
///
/// # Errors
/// Why the text is no size, in words for the user.
pub fn parse_byte_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.to_ascii_uppercase();
    let shift = match unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit) {
        "" if !unit.starts_with('I') => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("a size is a whole number with an optional unit: 512, 64K, 10M, 2G, 1T".to_owned()),
    };
    let number: u64 =
        number.parse().map_err(|_| "a size is a whole number with an optional unit: 512, 64K".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the size does not fit in 64 bits".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        assert_eq!((parse_byte_size("512"), parse_byte_size("3kb")), (Ok(512), Ok(3072)));
        assert_eq!((parse_byte_size("2GiB"), parse_byte_size("1T")), (Ok(2 << 30), Ok(1 << 40)));
        for bad in ["", "K", "-1", "1.5G", "1 G", "16777216T", "1iB"] {
            assert!(parse_byte_size(bad).is_err(), "{bad}");
        }
    }
}
