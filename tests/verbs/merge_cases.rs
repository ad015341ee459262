//! The chains that the tests of `merge` use.

use crate::chain_spec::{ChainSpec, Layer};

/// A merge to test.
#[derive(Clone, Debug)]
pub(crate) struct MergeCase {
    pub(crate) name: &'static str,
    pub(crate) chain: ChainSpec,
    /// Indices of the merged layers, youngest first, and of the layer that they are merged into.
    pub(crate) merged_layers: Vec<usize>,
    pub(crate) into: usize,
    /// Indices of the remaining descendants, whose disks must not change.
    pub(crate) kept: Vec<usize>,
}

fn layer(name: &'static str, parent: Option<usize>, writes: &[(u64, u64, u8)]) -> Layer {
    Layer { name, parent, fixed: false, block: 4096, sectors: 128, writes: writes.to_vec() }
}

/// Returns a root with data in whole blocks and in parts of blocks.
fn root() -> Layer {
    layer("root.vhd", None, &[(0, 20, 1), (32, 40, 1), (45, 50, 1), (120, 128, 1)])
}

/// Returns a child with data over its parent's data and over unallocated space, in whole blocks and in parts, and with
/// zeros that hide its parent's data.
fn child(parent: usize) -> Layer {
    let writes =
        [(3, 9, 2), (12, 14, 0), (32, 40, 0), (47, 48, 2), (60, 64, 2), (72, 80, 0), (88, 112, 2), (127, 128, 2)];
    layer("child.vhd", Some(parent), &writes)
}

/// Returns all cases. A unit is `scale` sectors, and block sizes are multiplied by `scale`.
pub(crate) fn all(scale: u32) -> Vec<MergeCase> {
    let chain = |layers: Vec<Layer>| ChainSpec { layers, scale };
    let grand =
        |parent: usize| layer("grand.vhd", Some(parent), &[(4, 5, 3), (33, 34, 3), (90, 100, 0), (116, 117, 3)]);
    let case = |name, layers, folded: &[usize], into, kept: &[usize]| {
        let (folded, kept) = (folded.to_vec(), kept.to_vec());
        MergeCase { name, chain: chain(layers), merged_layers: folded, into, kept }
    };
    let other = |parent: usize| layer("other.vhd", Some(parent), &[(0, 128, 4)]);
    let middle =
        |parent: usize| layer("middle.vhd", Some(parent), &[(0, 2, 5), (8, 16, 5), (36, 48, 5), (104, 125, 0)]);
    vec![
        case("leaf", vec![root(), child(0)], &[1], 0, &[]),
        case("inner", vec![root(), child(0), grand(1)], &[1], 0, &[2]),
        case("two grandchildren", vec![root(), child(0), grand(1), other(1)], &[1], 0, &[2, 3]),
        case("into a child", vec![root(), middle(0), child(1)], &[2], 1, &[]),
        case("into a child, inner", vec![root(), middle(0), child(1), grand(2)], &[2], 1, &[3]),
        case("two levels", vec![root(), middle(0), child(1), grand(2)], &[2, 1], 0, &[3]),
        case("two levels, leaf", vec![root(), middle(0), child(1)], &[2, 1], 0, &[]),
        case("fixed root", vec![Layer { fixed: true, ..root() }, child(0), grand(1)], &[1], 0, &[2]),
        case("larger blocks", vec![root(), Layer { block: 16 << 10, ..child(0) }, grand(1)], &[1], 0, &[2]),
        case("smaller blocks", vec![Layer { block: 16 << 10, ..root() }, child(0)], &[1], 0, &[]),
        case(
            "a smaller layer between",
            vec![root(), Layer { sectors: 40, writes: vec![(30, 36, 6)], ..middle(0) }, child(1), grand(2)],
            &[2, 1],
            0,
            &[3],
        ),
        case(
            "a smaller child",
            vec![root(), Layer { sectors: 44, writes: vec![(3, 9, 2)], ..child(0) }, grand(1)],
            &[1],
            0,
            &[2],
        ),
        case("an empty child", vec![root(), Layer { writes: vec![], ..child(0) }, grand(1)], &[1], 0, &[2]),
    ]
}
