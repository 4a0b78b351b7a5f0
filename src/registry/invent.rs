//! Invented inputs for the self-test and for warming up: pseudo-random rows of a model's signature, the same at every
//! load.

use half::{bf16, f16};

use crate::tensor::{DataType, Dim, Element, Shape, Signature, Tensor, TensorSpec};

/// The most elements one invented input may have.
pub(super) const MAX_ELEMENTS: usize = 1 << 24;
const WORDS: [&str; 8] = ["0", "1", "a", "b", "yes", "no", "hello", "the quick brown fox"];
/// What free dimensions other than the leading one are tried at, in this order, until a model accepts one.
const LADDER: [usize; 9] = [8, 16, 7, 32, 64, 128, 224, 4, 1];

/// What to draw from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recipe {
    /// What every free dimension but the leading one becomes. Equal symbols thus get equal extents.
    pub extent: usize,
    /// Integers are drawn from `0..below`: token ids and categories must exist in the model.
    pub below: u64,
    /// Floats are drawn from `-scale..scale`.
    pub scale: f64,
}

/// The extents worth trying: many where some dimension besides the leading one is free.
pub fn extents(signature: &Signature) -> &'static [usize] {
    let free = |spec: &TensorSpec| spec.dims.as_ref().is_none_or(|dims| dims.iter().skip(1).any(Dim::is_free));
    if signature.inputs.iter().any(free) { &LADDER } else { &LADDER[LADDER.len() - 1..] }
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
pub struct Random(pub u64);

impl Random {
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in [-1, 1).
    fn signed(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// One row: a tensor per input, with a leading dimension of 1 where it is free. Rows of different `number` differ.
pub fn row(signature: &Signature, recipe: Recipe, number: u64, random: &mut Random) -> Result<Vec<Tensor>, String> {
    signature.inputs.iter().map(|spec| input(spec, recipe, number, random)).collect()
}

fn input(spec: &TensorSpec, recipe: Recipe, number: u64, random: &mut Random) -> Result<Tensor, String> {
    let dims: Vec<usize> = match &spec.dims {
        None => vec![1],
        Some(dims) => dims
            .iter()
            .enumerate()
            .map(|(axis, dim)| match dim {
                Dim::Fixed(n) => *n,
                Dim::Free(_) if axis == 0 => 1,
                Dim::Free(_) => recipe.extent,
            })
            .collect(),
    };
    let shape = Shape::new(dims).map_err(|error| error.to_string())?;
    if shape.elements() > MAX_ELEMENTS {
        return Err(format!("input `{}` of shape {shape} is larger than the {MAX_ELEMENTS} elements tried", spec.name));
    }
    fill(spec.dtype, shape, recipe, number, random).map_err(|error| error.to_string())
}

/// One tensor of a given shape, as the self-test's first rows are drawn.
pub fn tensor(dtype: DataType, shape: Shape, random: &mut Random) -> Result<Tensor, String> {
    fill(dtype, shape, Recipe { extent: 1, below: 2, scale: 1.0 }, 0, random).map_err(|error| error.to_string())
}

fn fill(
    dtype: DataType,
    shape: Shape,
    recipe: Recipe,
    number: u64,
    random: &mut Random,
) -> Result<Tensor, crate::tensor::TensorError> {
    let count = shape.elements();
    // The first element counts up from row to row, so that rows differ even where there is little to draw from.
    let mut integers = |below: u64| -> Vec<u64> {
        (0..count).map(|i| if i == 0 { number % below } else { random.draw() % below }).collect()
    };
    let below = recipe.below;
    match dtype {
        DataType::Bool => {
            let bytes: Vec<u8> = integers(2).into_iter().map(|bit| bit as u8).collect();
            Tensor::new(DataType::Bool, shape, bytes.into())
        }
        DataType::Bytes => {
            let words = integers(WORDS.len() as u64);
            Tensor::from_strings(shape, words.into_iter().map(|word| WORDS[word as usize]))
        }
        // `below` is at most 128: every integer type holds what is drawn.
        DataType::Uint8 => typed(shape, integers(below), |n| n as u8),
        DataType::Uint16 => typed(shape, integers(below), |n| n as u16),
        DataType::Uint32 => typed(shape, integers(below), |n| n as u32),
        DataType::Uint64 => typed(shape, integers(below), |n| n),
        DataType::Int8 => typed(shape, integers(below.min(127)), |n| n as i8),
        DataType::Int16 => typed(shape, integers(below), |n| n as i16),
        DataType::Int32 => typed(shape, integers(below), |n| n as i32),
        DataType::Int64 => typed(shape, integers(below), |n| n as i64),
        DataType::Fp16 => typed(shape, floats(count, recipe.scale, random), f16::from_f64),
        DataType::Bf16 => typed(shape, floats(count, recipe.scale, random), bf16::from_f64),
        DataType::Fp32 => typed(shape, floats(count, recipe.scale, random), |x| x as f32),
        DataType::Fp64 => typed(shape, floats(count, recipe.scale, random), |x| x),
    }
}

fn floats(count: usize, scale: f64, random: &mut Random) -> Vec<f64> {
    (0..count).map(|_| random.signed() * scale).collect()
}

fn typed<S, T: Element + Send + 'static>(
    shape: Shape,
    drawn: Vec<S>,
    convert: impl Fn(S) -> T,
) -> Result<Tensor, crate::tensor::TensorError> {
    Tensor::from_vec(shape, drawn.into_iter().map(convert).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signature(inputs: &[(DataType, Option<&[i64]>)]) -> Signature {
        let spec = |(i, (dtype, dims)): (usize, &(DataType, Option<&[i64]>))| TensorSpec {
            name: format!("x{i}").into(),
            dtype: *dtype,
            dims: dims
                .map(|dims| dims.iter().map(|d| usize::try_from(*d).map_or(Dim::Free(None), Dim::Fixed)).collect()),
        };
        Signature { inputs: inputs.iter().enumerate().map(spec).collect(), outputs: Vec::new() }
    }

    const RECIPE: Recipe = Recipe { extent: 8, below: 2, scale: 1.0 };

    #[test]
    fn every_datatype_is_invented_in_range_and_rows_differ() {
        let all: Vec<_> = DataType::ALL.iter().map(|dtype| (*dtype, Some(&[-1, 3, -1][..]))).collect();
        let signature = signature(&all);
        let mut random = Random(1);
        let rows: Vec<_> = (0..2).map(|n| row(&signature, RECIPE, n, &mut random).unwrap()).collect();
        for (one, other) in rows[0].iter().zip(&rows[1]) {
            assert_eq!(one.shape().dims(), [1, 3, 8]);
            assert_ne!(one.data(), other.data(), "{}", one.dtype());
        }
        assert!(rows[0][8].to_vec::<i64>().unwrap_or_default().iter().all(|n| (0..2).contains(n)));
        assert!(rows[0][11].to_vec::<f32>().unwrap().iter().all(|x| x.abs() <= 1.0));
    }

    #[test]
    fn the_same_seed_gives_the_same_rows() {
        let signature = signature(&[(DataType::Fp32, Some(&[-1, 4]))]);
        let draw = || row(&signature, RECIPE, 0, &mut Random(7)).unwrap();
        assert_eq!(draw(), draw());
    }

    #[test]
    fn shapes_follow_the_signature() {
        let dims = |dims: Option<&[i64]>| row(&signature(&[(DataType::Fp32, dims)]), RECIPE, 0, &mut Random(0));
        assert_eq!(dims(Some(&[])).unwrap()[0].shape().rank(), 0);
        assert_eq!(dims(Some(&[2, -1])).unwrap()[0].shape().dims(), [2, 8]);
        assert_eq!(dims(None).unwrap()[0].shape().dims(), [1]);
        assert!(dims(Some(&[-1, 1 << 30])).unwrap_err().contains("larger"));
        assert_eq!(extents(&signature(&[(DataType::Fp32, Some(&[-1, 4]))])), [1]);
        assert_eq!(extents(&signature(&[(DataType::Fp32, Some(&[-1, -1]))])).len(), LADDER.len());
    }
}
