//! Rows of different lengths in one batch: which axes of a model's inputs and outputs run along the sequence, and what
//! the shorter rows are filled up with.
//!
//! Pure. Lengths share a batch within a bucket only, so that little is computed for nothing.

use super::Tensor;

/// The axis of one input that runs along the sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceAxis {
    /// Never the leading one.
    pub axis: usize,
    /// One element as the binary layout has it: what the shorter rows are filled up with.
    pub fill: Box<[u8]>,
}

/// How a model's rows of different lengths share a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ragged {
    /// Per input of the signature; `None` where it does not depend on the length. No input of BYTES has an axis.
    pub inputs: Vec<Option<SequenceAxis>>,
    /// Per output of the signature: its axes that run along the sequence, to be cut back to the row's length.
    pub outputs: Vec<Vec<usize>>,
    /// Whether all sequences of a request must be equally long: so declared. Otherwise a request of uneven ones is not
    /// filled up.
    pub even: bool,
}

/// Two inputs of one request whose sequences are not equally long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uneven {
    /// Position in the signature, and length.
    pub first: (usize, usize),
    pub other: (usize, usize),
}

impl Ragged {
    /// The length of a request's sequences. `inputs` have the ranks of the signature.
    pub fn length(&self, inputs: &[Tensor]) -> Result<usize, Uneven> {
        let mut lengths = self.inputs.iter().zip(inputs).enumerate().filter_map(|(position, (sequence, tensor))| {
            let length = tensor.shape().dims().get(sequence.as_ref()?.axis)?;
            Some((position, *length))
        });
        let Some(first) = lengths.next() else { return Ok(0) };
        match lengths.find(|(_, length)| *length != first.1) {
            None => Ok(first.1),
            Some(other) => Err(Uneven { first, other }),
        }
    }

    /// A row's part of output number `position`, cut back from what it was filled up to. `None` where the output is
    /// not as long as that.
    pub fn cut(&self, position: usize, part: &Tensor, length: usize) -> Option<Tensor> {
        let axes = self.outputs.get(position)?;
        axes.iter().try_fold(part.clone(), |part, axis| part.truncated(*axis, length))
    }
}

/// The longest length of the bucket that `length` falls into: powers of two, and three quarters of them. The longest of
/// a bucket is at most half again as long as the shortest.
pub fn bucket(length: usize) -> usize {
    if length < 4 {
        return length;
    }
    // No length is near the largest power of two: a shape's elements are counted in an `isize`.
    let whole = length.next_power_of_two();
    let three_quarters = whole / 4 * 3;
    if length <= three_quarters { three_quarters } else { whole }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Shape, strings};

    fn tensor(dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims).unwrap();
        let elements = (0..shape.elements() as i64).collect();
        Tensor::from_vec(shape, elements).unwrap()
    }

    fn along(axis: usize) -> Option<SequenceAxis> {
        Some(SequenceAxis { axis, fill: 0i64.to_le_bytes().into() })
    }

    #[test]
    fn buckets_waste_little_and_never_shrink() {
        assert_eq!(
            [0, 1, 3, 4, 5, 6, 7, 8, 9, 12, 13, 33, 48, 49].map(bucket),
            [0, 1, 3, 4, 6, 6, 8, 8, 12, 12, 16, 48, 48, 64]
        );
        let shortest = |longest: usize| (1..=longest).find(|length| bucket(*length) == longest).unwrap();
        for length in 1..5000 {
            let longest = bucket(length);
            assert!(longest >= length && bucket(longest) == longest && longest <= bucket(length + 1));
            assert!(longest * 2 <= shortest(longest) * 3, "{length}");
        }
    }

    #[test]
    fn all_sequences_of_a_request_are_equally_long() {
        let ragged = Ragged { inputs: vec![along(1), None, along(2)], outputs: vec![], even: true };
        assert_eq!(ragged.length(&[tensor(&[2, 5]), tensor(&[2, 9]), tensor(&[2, 1, 5])]), Ok(5));
        assert_eq!(
            ragged.length(&[tensor(&[2, 5]), tensor(&[2, 9]), tensor(&[2, 1, 4])]),
            Err(Uneven { first: (0, 5), other: (2, 4) })
        );
    }

    #[test]
    fn outputs_are_cut_along_every_sequence_axis() {
        let ragged = Ragged { inputs: vec![], outputs: vec![vec![1, 3], vec![]], even: true };
        let cut = ragged.cut(0, &tensor(&[2, 3, 1, 3]), 2).unwrap();
        assert_eq!(cut.shape().dims(), [2, 2, 1, 2]);
        assert_eq!(cut.to_vec::<i64>().unwrap(), [0, 1, 3, 4, 9, 10, 12, 13]);
        assert_eq!(ragged.cut(1, &tensor(&[2, 3]), 2), Some(tensor(&[2, 3])));
        assert_eq!(ragged.cut(0, &tensor(&[2, 3, 1, 1]), 2), None, "shorter than what was sent");
    }

    #[test]
    fn one_row_is_cut_without_a_copy_and_strings_are_cut_too() {
        let whole = tensor(&[1, 5, 2]);
        let cut = whole.truncated(1, 3).unwrap();
        assert_eq!(cut.data().as_ptr(), whole.data().as_ptr());
        assert_eq!(cut.to_vec::<i64>().unwrap(), [0, 1, 2, 3, 4, 5]);
        let words = Tensor::from_strings(Shape::new([2, 3]).unwrap(), ["a", "bb", "", "d", "e", "f"]).unwrap();
        let cut = words.truncated(1, 2).unwrap();
        assert_eq!(cut.strings().collect::<Vec<_>>(), [&b"a"[..], b"bb", b"d", b"e"]);
        assert_eq!(strings::iter(cut.data()).count(), 4);
        assert!(whole.truncated(3, 1).is_none() && whole.truncated(1, 6).is_none());
    }
}
