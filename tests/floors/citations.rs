//! Checks that docs/ contains everything that comments cite: sections ("crash-safety 5.2", "format 4.4"), rules (O12,
//! V4), promises (S1), assumptions (A4) and tests (R9).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Documents of which comments cite numbered sections.
const DOCUMENTS: &[&str] = &["crash-safety", "format", "virtio", "performance", "space", "page-cache"];

/// Letters of numbered rules, and the document that lists them.
const RULES: &[(char, &str)] =
    &[('O', "format"), ('V', "virtio"), ('S', "crash-safety"), ('A', "crash-safety"), ('R', "crash-safety")];

#[test]
fn cited_sections_and_rules_stand_in_the_documents() {
    let (sections, rules) = (sections(), rules());
    let (mut bad, mut cited) = (Vec::new(), 0);
    for path in sources() {
        let text = fs::read_to_string(&path).expect("a source file");
        for (number, line) in text.lines().enumerate() {
            let Some(comment) = line.trim_start().strip_prefix("//") else { continue };
            let found: Vec<String> = section_citations(comment).into_iter().chain(rule_citations(comment)).collect();
            cited += found.len();
            let unknown = found.iter().filter(|found| !sections.contains(*found) && !rules.contains(*found));
            bad.extend(unknown.map(|found| format!("{}:{}: {found}", path.display(), number + 1)));
        }
    }
    assert!(bad.is_empty(), "citations of what docs/ does not have:\n{}", bad.join("\n"));
    assert!(cited > 100, "only {cited} citations were found");
}

#[test]
fn citations_are_recognised() {
    let of = |comment: &str| [section_citations(comment), rule_citations(comment)].concat();
    assert_eq!(of(" see crash-safety 5.2, and format 4."), ["crash-safety 5.2", "format 4"]);
    assert_eq!(of(" (crash-safety 4.1, 6.2; R9: S1, S2)"), ["crash-safety 4.1", "crash-safety 6.2", "R9", "S1", "S2"]);
    assert_eq!(of(" the header (O15) and V4 to V6"), ["O15", "V4", "V6"]);
    assert!(of(" the old format has 3 fields, U32 and COOKIE_V1").is_empty());
}

/// Returns a citation such as "crash-safety 5.2" for each section of each document that comments may cite.
fn sections() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for document in DOCUMENTS {
        for line in read(document).lines().filter(|line| line.starts_with('#')) {
            let number = line.trim_start_matches('#').trim_start().split(' ').next().unwrap_or_default();
            if number.starts_with(|c: char| c.is_ascii_digit()) {
                found.insert(format!("{document} {}", number.trim_end_matches('.')));
            }
        }
    }
    found
}

/// Returns the rules with which a line of a document begins: in the first column of a table, in a list, or in bold.
fn rules() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (letter, document) in RULES {
        for line in read(document).lines() {
            let start = line.trim_start_matches(['|', ' ', '-', '*']);
            let digits = start
                .strip_prefix(*letter)
                .map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
            found.extend(digits.filter(|digits| !digits.is_empty()).map(|digits| format!("{letter}{digits}")));
        }
    }
    found
}

/// Returns the sections that a comment cites: the name of a document, then numbers separated by commas. A number
/// without a point counts as a section only if no word follows the number directly.
fn section_citations(comment: &str) -> Vec<String> {
    let mut found = Vec::new();
    for document in DOCUMENTS {
        for (at, _) in comment.match_indices(&format!("{document} ")) {
            if comment[..at].ends_with(|c: char| c.is_alphanumeric() || c == '-' || c == '.') {
                continue;
            }
            let mut rest = &comment[at + document.len() + 1..];
            if rest.starts_with("1.") && *document == "virtio" {
                continue; // "virtio 1.x" names the standard
            }
            loop {
                let number: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
                rest = &rest[number.len()..];
                let number = number.trim_end_matches('.');
                let closed = rest.is_empty() || rest.starts_with([',', ';', ')', ':', ' ']) && !rest.starts_with(" f");
                let plain = !number.contains('.') && rest.starts_with(' ') && !rest.starts_with(" (");
                if number.is_empty() || !closed || plain {
                    break;
                }
                found.push(format!("{document} {number}"));
                match rest.strip_prefix(", ") {
                    Some(next) if next.starts_with(|c: char| c.is_ascii_digit()) => rest = next,
                    _ => break,
                }
            }
        }
    }
    found
}

/// Returns the rules that a comment cites, each a word of one letter and digits.
fn rule_citations(comment: &str) -> Vec<String> {
    let is_rule = |word: &&str| {
        let mut chars = word.chars();
        let letter = chars.next().is_some_and(|c| RULES.iter().any(|(letter, _)| *letter == c));
        let digits = chars.as_str();
        letter && (1..=2).contains(&digits.len()) && digits.chars().all(|c| c.is_ascii_digit())
    };
    comment.split(|c: char| !c.is_alphanumeric() && c != '_').filter(is_rule).map(str::to_owned).collect()
}

fn read(document: &str) -> String {
    let path = root().join("docs").join(format!("{document}.md"));
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Returns all Rust files of the crate, its tests and benches, except those of `tests/floors`.
fn sources() -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), ["src", "tests", "benches"].map(|folder| root().join(folder)).to_vec());
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the crate") {
            let path = entry.expect("an entry").path();
            match path.extension() {
                _ if path.is_dir() && !path.ends_with("floors") => open.push(path),
                Some(extension) if extension == "rs" => found.push(path),
                _ => {}
            }
        }
    }
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
