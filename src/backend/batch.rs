//! A batch as an engine sees it: the inputs of one or more jobs, joined along the leading dimension on demand.

use bytes::Bytes;

use crate::tensor::{DataType, Ragged, SequenceAxis, Shape, Tensor};

/// Borrows the inputs of the jobs that run together. Either one job of any shapes, or several whose inputs agree in
/// everything but their leading dimension, and the axes that run along their sequences.
pub struct Batch<'a> {
    jobs: &'a [&'a [Tensor]],
    ragged: Option<&'a Ragged>,
}

/// One input across all jobs of a batch.
#[derive(Clone, Copy)]
pub struct BatchInput<'a> {
    jobs: &'a [&'a [Tensor]],
    position: usize,
    /// Where jobs may be of different lengths.
    sequence: Option<&'a SequenceAxis>,
}

impl<'a> Batch<'a> {
    /// `jobs[j][i]` is input `i` of job `j`, in the signature's order. There is at least one job.
    pub fn new(jobs: &'a [&'a [Tensor]]) -> Self {
        assert!(!jobs.is_empty(), "a batch has at least one job");
        Batch { jobs, ragged: None }
    }

    /// With shorter rows filled up to the longest job's length.
    pub fn padded(self, ragged: Option<&'a Ragged>) -> Self {
        // A lone job needs no filling, whatever its length.
        Batch { ragged: ragged.filter(|_| self.jobs.len() > 1), ..self }
    }

    /// How many jobs run together. More than one only where rows are known to be independent.
    pub fn jobs(&self) -> usize {
        self.jobs.len()
    }

    pub fn input_count(&self) -> usize {
        self.jobs[0].len()
    }

    pub fn input(&self, position: usize) -> BatchInput<'a> {
        let sequence = self.ragged.and_then(|ragged| ragged.inputs.get(position)?.as_ref());
        BatchInput { jobs: self.jobs, position, sequence }
    }

    pub fn inputs(&self) -> impl Iterator<Item = BatchInput<'a>> {
        (0..self.input_count()).map(|position| self.input(position))
    }
}

impl<'a> BatchInput<'a> {
    fn first(&self) -> &'a Tensor {
        &self.jobs[0][self.position]
    }

    fn tensors(&self) -> impl Iterator<Item = &'a Tensor> {
        let position = self.position;
        self.jobs.iter().map(move |job| &job[position])
    }

    pub fn dtype(&self) -> DataType {
        self.first().dtype()
    }

    /// The joined shape: the first job's, with the rows of all jobs and the length of the longest.
    pub fn shape(&self) -> Shape {
        let first = self.first().shape();
        if self.jobs.len() == 1 {
            return first.clone();
        }
        let mut dims = first.dims().to_vec();
        if let Some(leading) = dims.first_mut() {
            *leading = self.tensors().map(|t| t.rows().unwrap_or(0)).sum();
        }
        if let Some(sequence) = self.sequence {
            dims[sequence.axis] = self.longest(sequence.axis);
        }
        // The parts' buffers exist in memory together and filling them up adds half at most, so the joined size fits in
        // `usize`; scalars are never batched.
        Shape::new(dims).unwrap_or_else(|_| first.clone())
    }

    fn longest(&self, axis: usize) -> usize {
        self.tensors().filter_map(|tensor| tensor.shape().dims().get(axis).copied()).max().unwrap_or(0)
    }

    pub fn byte_length(&self) -> usize {
        match (self.sequence, self.dtype().size()) {
            (Some(_), Some(size)) => self.shape().elements() * size,
            _ => self.tensors().map(|t| t.data().len()).sum(),
        }
    }

    /// The input's bytes without a copy, where one job holds them all at a multiple of `align`.
    pub fn contiguous(&self, align: usize) -> Option<&'a Bytes> {
        let data = self.first().data();
        (self.jobs.len() == 1 && (data.is_empty() || (data.as_ptr() as usize).is_multiple_of(align))).then_some(data)
    }

    /// Copies the joined bytes once into `dst`, which must be [`Self::byte_length`] long.
    pub fn gather_into(&self, dst: &mut [u8]) {
        let longest = self.sequence.map(|sequence| (sequence, self.longest(sequence.axis)));
        let mut rest = dst;
        for tensor in self.tensors() {
            rest = match longest {
                None => {
                    let (here, after) = rest.split_at_mut(tensor.data().len());
                    here.copy_from_slice(tensor.data());
                    after
                }
                Some((sequence, longest)) => fill_up(rest, tensor, sequence, longest),
            };
        }
        assert!(rest.is_empty(), "the destination is as long as the inputs");
    }

    /// The elements of a `BYTES` input, in order.
    pub fn strings(&self) -> impl Iterator<Item = &'a [u8]> {
        self.tensors().flat_map(|tensor| tensor.strings())
    }
}

/// Writes a tensor with its sequence axis filled up to `longest`; what is left of the destination.
fn fill_up<'d>(mut rest: &'d mut [u8], tensor: &Tensor, sequence: &SequenceAxis, longest: usize) -> &'d mut [u8] {
    let (before, along) = tensor.shape().dims().split_at(sequence.axis);
    let step = along[1..].iter().product::<usize>() * sequence.fill.len();
    let mut data = &tensor.data()[..];
    for _ in 0..before.iter().product() {
        let (row, later) = data.split_at(along[0] * step);
        let (here, after) = rest.split_at_mut(longest * step);
        let (copied, filled) = here.split_at_mut(row.len());
        copied.copy_from_slice(row);
        filled.chunks_exact_mut(sequence.fill.len()).for_each(|element| element.copy_from_slice(&sequence.fill));
        (data, rest) = (later, after);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `rows` rows of `width` elements each at an offset that misaligns most types.
    fn part(rows: usize, width: usize, seed: u8, offset: usize, strings: bool) -> Tensor {
        let shape = Shape::new([rows, width]).unwrap();
        if strings {
            return Tensor::from_strings(shape, (0..rows * width).map(|i| vec![seed; i % 3])).unwrap();
        }
        let mut raw = vec![0; offset];
        raw.extend((0..rows * width * 4).map(|i| seed.wrapping_add(i as u8)));
        Tensor::new(DataType::Fp32, shape, Bytes::from(raw).slice(offset..)).unwrap()
    }

    proptest! {
        #[test]
        fn splitting_a_gather_gives_the_parts_back(
            rows in proptest::collection::vec(0usize..4, 1..6), width in 0usize..4, offset in 0usize..5, strings in any::<bool>(),
        ) {
            let parts: Vec<[Tensor; 1]> =
                rows.iter().enumerate().map(|(i, n)| [part(*n, width, i as u8, offset, strings)]).collect();
            let jobs: Vec<&[Tensor]> = parts.iter().map(|p| p.as_slice()).collect();
            let input = Batch::new(&jobs).input(0);
            let mut joined = vec![0; input.byte_length()];
            input.gather_into(&mut joined);
            let whole = Tensor::new(input.dtype(), input.shape(), joined.into()).unwrap();
            let split = whole.split_rows(&rows).unwrap();
            prop_assert!(split.iter().zip(&parts).all(|(a, [b])| a == b));
            prop_assert_eq!(input.strings().count(), if strings { rows.iter().sum::<usize>() * width } else { 0 });
        }
    }

    proptest! {
        #[test]
        fn cutting_a_filled_up_gather_gives_the_parts_back(
            sizes in proptest::collection::vec((1usize..4, 0usize..6), 2..6), width in 1usize..3, fill in any::<u16>(),
        ) {
            let sequence = SequenceAxis { axis: 1, fill: fill.to_le_bytes().into() };
            let ragged = Ragged { inputs: vec![Some(sequence)], outputs: vec![vec![1]], even: true };
            let part = |(number, (rows, length)): (usize, &(usize, usize))| {
                let elements = (0..rows * length * width).map(|i| (number * 1000 + i) as u16).collect();
                [Tensor::from_vec(Shape::new([*rows, *length, width]).unwrap(), elements).unwrap()]
            };
            let parts: Vec<[Tensor; 1]> = sizes.iter().enumerate().map(part).collect();
            let jobs: Vec<&[Tensor]> = parts.iter().map(|p| p.as_slice()).collect();
            let input = Batch::new(&jobs).padded(Some(&ragged)).input(0);
            let mut joined = vec![0; input.byte_length()];
            input.gather_into(&mut joined);
            let filled = joined.chunks_exact(2).filter(|element| *element == fill.to_le_bytes()).count();
            let whole = Tensor::new(input.dtype(), input.shape(), joined.into()).unwrap();
            let rows: Vec<usize> = sizes.iter().map(|(rows, _)| *rows).collect();
            let split = whole.split_rows(&rows).unwrap();
            for ((whole, [part]), (_, length)) in split.iter().zip(&parts).zip(&sizes) {
                prop_assert_eq!(&ragged.cut(0, whole, *length).unwrap(), part);
            }
            let real: usize = parts.iter().map(|[part]| part.shape().elements()).sum();
            prop_assert!(filled >= whole.shape().elements() - real);
        }
    }

    #[test]
    fn contiguous_only_when_one_job_is_aligned() {
        let tensor = [Tensor::from_vec(Shape::new([2]).unwrap(), vec![1f32, 2.0]).unwrap()];
        assert!(Batch::new(&[&tensor]).input(0).contiguous(4).is_some());
        assert!(Batch::new(&[&tensor, &tensor]).input(0).contiguous(4).is_none());
        let shifted = [Tensor::new(DataType::Uint8, Shape::new([7]).unwrap(), tensor[0].data().slice(1..)).unwrap()];
        assert!(Batch::new(&[&shifted]).input(0).contiguous(4).is_none());
        assert!(Batch::new(&[&shifted]).input(0).contiguous(1).is_some());
    }
}
