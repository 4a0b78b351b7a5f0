//! A batch as an engine sees it: the inputs of one or more jobs, joined along the leading dimension on demand.

use bytes::Bytes;

use crate::tensor::{DataType, Shape, Tensor};

/// Borrows the inputs of the jobs that run together. Either one job of any shapes, or several whose inputs agree in
/// everything but their leading dimension.
pub struct Batch<'a> {
    jobs: &'a [&'a [Tensor]],
}

/// One input across all jobs of a batch.
#[derive(Clone, Copy)]
pub struct BatchInput<'a> {
    jobs: &'a [&'a [Tensor]],
    position: usize,
}

impl<'a> Batch<'a> {
    /// `jobs[j][i]` is input `i` of job `j`, in the signature's order. There is at least one job.
    pub fn new(jobs: &'a [&'a [Tensor]]) -> Self {
        assert!(!jobs.is_empty(), "a batch has at least one job");
        Batch { jobs }
    }

    /// How many jobs run together. More than one only where rows are known to be independent.
    pub fn jobs(&self) -> usize {
        self.jobs.len()
    }

    pub fn input_count(&self) -> usize {
        self.jobs[0].len()
    }

    pub fn input(&self, position: usize) -> BatchInput<'a> {
        BatchInput { jobs: self.jobs, position }
    }

    pub fn inputs(&self) -> impl Iterator<Item = BatchInput<'a>> {
        let jobs = self.jobs;
        (0..self.input_count()).map(move |position| BatchInput { jobs, position })
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

    /// The joined shape: the first job's, with the rows of all jobs.
    pub fn shape(&self) -> Shape {
        if self.jobs.len() == 1 {
            return self.first().shape().clone();
        }
        let rows = self.tensors().map(|t| t.rows().unwrap_or(0)).sum();
        // The parts' buffers exist in memory together, so their joined size fits in `usize`; scalars are never batched.
        self.first().shape().with_rows(rows).unwrap_or_else(|_| self.first().shape().clone())
    }

    pub fn byte_length(&self) -> usize {
        self.tensors().map(|t| t.data().len()).sum()
    }

    /// The input's bytes without a copy, where one job holds them all at a multiple of `align`.
    pub fn contiguous(&self, align: usize) -> Option<&'a Bytes> {
        let data = self.first().data();
        (self.jobs.len() == 1 && (data.is_empty() || (data.as_ptr() as usize).is_multiple_of(align))).then_some(data)
    }

    /// Copies the joined bytes once into `dst`, which must be [`Self::byte_length`] long.
    pub fn gather_into(&self, dst: &mut [u8]) {
        let mut rest = dst;
        for tensor in self.tensors() {
            let (here, after) = rest.split_at_mut(tensor.data().len());
            here.copy_from_slice(tensor.data());
            rest = after;
        }
        assert!(rest.is_empty(), "the destination is as long as the inputs");
    }

    /// The elements of a `BYTES` input, in order.
    pub fn strings(&self) -> impl Iterator<Item = &'a [u8]> {
        self.tensors().flat_map(|tensor| tensor.strings())
    }
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
