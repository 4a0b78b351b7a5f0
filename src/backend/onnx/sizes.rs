//! Sizes that a file's constants mention. An axis may be declared free and run at one size only, and that size then
//! shows in the shape of a weight or in a constant of a reshape.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::graph::{Index, integers};

/// Most sizes told: each may cost its reader a run of the model.
const MAX_SIZES: usize = 16;

/// The largest size told.
const MAX_SIZE: i64 = 4096;

/// Constants of more elements hold data, not shapes.
const MAX_ELEMENTS: usize = 8;

/// Most frequent first, then smallest; 1 is left out.
pub(super) fn mentioned(index: &Index) -> Vec<usize> {
    let mut counts = BTreeMap::<usize, usize>::new();
    for tensor in index.constants() {
        let values = integers(tensor).filter(|values| values.len() <= MAX_ELEMENTS).unwrap_or_default();
        for size in tensor.dims.iter().copied().chain(values).filter(|n| (2..=MAX_SIZE).contains(n)) {
            // Within the range just checked.
            *counts.entry(size as usize).or_default() += 1;
        }
    }
    let mut sizes: Vec<_> = counts.into_iter().collect();
    sizes.sort_by_key(|(size, count)| (Reverse(*count), *size));
    sizes.into_iter().map(|(size, _)| size).take(MAX_SIZES).collect()
}

#[cfg(test)]
mod tests {
    use crate::backend::onnx::Description;
    use crate::backend::onnx::build::{FLOAT, Model};

    #[test]
    fn sizes_of_weights_and_of_small_constants() {
        let model = Model::new()
            .input("x", FLOAT, &["n", "m"])
            .weights("w", &[3, 7], &[0.0; 21])
            .integers("shape", &[3], &[-1, 7, 1 << 40])
            .integers("table", &[9], &[5; 9])
            .node("Identity", &["x"], &["y"])
            .output("y", FLOAT, &["n", "m"]);
        assert_eq!(Description::read(model.bytes()).unwrap().mentioned_sizes, [3, 7, 9]);
    }
}
