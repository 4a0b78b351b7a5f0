//! The numbers of a tensor as f64, straight from the buffer's bytes: whatever their type, and at any address.

use half::{bf16, f16};

use crate::tensor::{DataType, Tensor};

/// Something done with all elements of a tensor: as raw little-endian bytes, with the way to read one.
pub(super) trait Visit {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy);
}

/// Calls `visitor` with the elements of a tensor of numbers. `BYTES` has none.
pub(super) fn visit(tensor: &Tensor, visitor: impl Visit) {
    let data: &[u8] = tensor.data();
    match tensor.dtype() {
        DataType::Bool | DataType::Uint8 => visitor.visit(chunks(data), |b| f64::from(u8::from_le_bytes(b))),
        DataType::Uint16 => visitor.visit(chunks(data), |b| f64::from(u16::from_le_bytes(b))),
        DataType::Uint32 => visitor.visit(chunks(data), |b| f64::from(u32::from_le_bytes(b))),
        DataType::Uint64 => visitor.visit(chunks(data), |b| u64::from_le_bytes(b) as f64),
        DataType::Int8 => visitor.visit(chunks(data), |b| f64::from(i8::from_le_bytes(b))),
        DataType::Int16 => visitor.visit(chunks(data), |b| f64::from(i16::from_le_bytes(b))),
        DataType::Int32 => visitor.visit(chunks(data), |b| f64::from(i32::from_le_bytes(b))),
        DataType::Int64 => visitor.visit(chunks(data), |b| i64::from_le_bytes(b) as f64),
        DataType::Fp16 => visitor.visit(chunks(data), |b| f64::from(f16::from_le_bytes(b))),
        DataType::Bf16 => visitor.visit(chunks(data), |b| f64::from(bf16::from_le_bytes(b))),
        DataType::Fp32 => visitor.visit(chunks(data), |b| f64::from(f32::from_le_bytes(b))),
        DataType::Fp64 => visitor.visit(chunks(data), f64::from_le_bytes),
        DataType::Bytes => {}
    }
}

pub(super) fn chunks<const N: usize>(data: &[u8]) -> &[[u8; N]] {
    data.as_chunks().0
}

#[cfg(test)]
mod tests {
    use super::super::Tally;
    use super::super::tests::{classes, counts, folded, raw};
    use super::*;
    use crate::tensor::{OutputKind, Shape};

    #[test]
    fn every_number_type_is_read_at_any_address() {
        let one = |dtype| match dtype {
            DataType::Bool | DataType::Uint8 | DataType::Int8 => vec![1],
            DataType::Uint16 | DataType::Int16 => vec![1, 0],
            DataType::Uint32 | DataType::Int32 => vec![1, 0, 0, 0],
            DataType::Uint64 | DataType::Int64 => vec![1, 0, 0, 0, 0, 0, 0, 0],
            DataType::Fp16 => 0x3c00u16.to_le_bytes().to_vec(),
            DataType::Bf16 => 0x3f80u16.to_le_bytes().to_vec(),
            DataType::Fp32 => 1f32.to_le_bytes().to_vec(),
            DataType::Fp64 => 1f64.to_le_bytes().to_vec(),
            DataType::Bytes => vec![1, 0, 0, 0, b'1'],
        };
        for dtype in DataType::ALL {
            for offset in 0..8 {
                let mut padded = vec![0; offset];
                padded.extend(one(dtype).repeat(3));
                let holder = raw(DataType::Uint8, &[padded.len()], padded);
                let t = Tensor::new(dtype, Shape::new([3]).unwrap(), holder.data().slice(offset..)).unwrap();
                let (_, d) = folded(OutputKind::Values, std::slice::from_ref(&t));
                let expected = if dtype == DataType::Bytes { 0.0 } else { 3.0 };
                assert_eq!((d.values().unwrap().sum(), d.squares().unwrap()), (expected, expected), "{dtype}");
                assert_eq!(d.tally, Tally { elements: 3, ..Tally::default() });
                assert_eq!(classes(OutputKind::Labels, &[t]), counts(&[("1", 3)]), "{dtype}");
            }
        }
    }

    #[test]
    fn half_precision_is_exact() {
        for (bits, expected) in [(1u16, 2f64.powi(-24)), (0x0400, 2f64.powi(-14)), (0xc100, -2.5), (0x7bff, 65504.0)] {
            let (_, d) = folded(OutputKind::Values, &[raw(DataType::Fp16, &[1], bits.to_le_bytes().to_vec())]);
            assert_eq!(d.values().unwrap().sum(), expected, "{bits:x}");
        }
        let special = [0x7c00u16, 0xfc00, 0x7e01].map(u16::to_le_bytes).concat();
        let (_, d) = folded(OutputKind::Values, &[raw(DataType::Fp16, &[3], special)]);
        assert_eq!(d.tally, Tally { elements: 3, nan: 1, infinite: 2, sampled_out: 0 });
    }
}
