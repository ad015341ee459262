//! Tests of `defect.rs`.

use std::collections::BTreeSet;

use super::*;

fn place(entry: u32) -> BlockPlace {
    BlockPlace::from_entry(entry).unwrap()
}

#[test]
fn severity_and_repairability_come_from_the_table() {
    let leak = Defect::SpaceUnreferenced { offset: 8192, bytes: 4096 };
    assert_eq!((leak.severity(), leak.repairable()), (Severity::Leak, true));
    let bad = Defect::BlockDuplicate { block: BlockIndex::new(1), other: BlockIndex::new(2), entry: place(9) };
    assert_eq!((bad.severity(), bad.repairable()), (Severity::Corruption, false));
    assert_eq!(Defect::Hidden { at: 0 }.severity(), Severity::Cosmetic);
    assert!(Severity::Corruption > Severity::Leak);
}

#[test]
fn base_offset_is_set_only_in_defects_of_decoders() {
    assert_eq!(Defect::HeaderCookie { at: 0 }.with_base_offset(512).offset(), Some(512));
    let entry = Defect::BlockOverlap {
        block: BlockIndex::new(1),
        entry: place(9),
        other: BlockIndex::new(2),
        other_entry: place(8),
    };
    assert_eq!(entry.clone().with_base_offset(512), entry);
}

#[test]
fn errors_have_the_kind_and_the_offset() {
    let e = Error::from(Defect::FooterCookie { at: 0 }.with_base_offset(4096));
    assert_eq!((e.kind(), e.offset()), (ErrorKind::Invalid, Some(4096)));
    assert_eq!(Error::from(Defect::ParentRaw).kind(), ErrorKind::Refused);
    assert_eq!(Error::from(Defect::ParentMissing { tried: Vec::new() }).kind(), ErrorKind::NotFound);
    assert_eq!(Error::from(Defect::NoPlace { end: 1 << 41 }).kind(), ErrorKind::NoSpace);
    let e =
        Error::from(Defect::BlockDuplicate { block: BlockIndex::new(7), other: BlockIndex::new(3), entry: place(16) });
    assert_eq!(e.offset(), Some(8192));
    assert!(e.to_string().starts_with("blocks 7 and 3 share one place"), "{e}");
    let nested = Defect::TrailingFooterInvalid { at: 9, reason: Box::new(Defect::FooterCookie { at: 9 }) };
    assert!(nested.to_string().contains("damaged (no footer here"), "{nested}");
}

#[test]
fn names_are_unique_and_rules_are_documented() {
    let names: BTreeSet<_> = ROWS.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), ROWS.len());
    let page = include_str!("../../docs/format.md");
    for rule in ROWS.iter().filter_map(|(_, rule)| *rule) {
        assert!(page.contains(&format!("| {rule} |")), "{rule}");
    }
}
