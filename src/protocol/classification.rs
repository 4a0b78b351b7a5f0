//! The classification extension, for all protocols: an output that is asked for so is answered by its best classes
//! instead of its scores, as BYTES elements `score:index` or, where the output has labels, `score:index:label`.
//!
//! All that comes after the leading axis, where that counts rows, are classes, in row-major order. Best first; of equal
//! scores the lower index; NaN last. Pure.

use std::cmp::Ordering;
use std::fmt::Display;

use half::{bf16, f16};

use crate::error::{Error, Result, quoted};
use crate::request::InferResponse;
use crate::tensor::{DataType, Element, Shape, Tensor, strings};

/// The most classes that may be asked for, however many there are: the parameter is a signed number.
const MAX_COUNT: u64 = i64::MAX as u64;

/// What one answer's classes may come to: labels are much longer than scores.
const MAX_BYTES: usize = 64 << 20;

/// Which outputs are answered by classes, and by how many at most.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Classes(Vec<(String, usize)>);

impl Classes {
    /// 0 is none: the output is answered as it is. More than there are is all of them.
    pub(super) fn ask(&mut self, output: &str, count: u64) -> Result<()> {
        if count > MAX_COUNT {
            let output = quoted(output);
            let message =
                format!("parameter `classification` of output '{output}' is {count}, expected at most {MAX_COUNT}");
            return Err(Error::invalid(message));
        }
        if count > 0 {
            self.0.push((output.to_string(), usize::try_from(count).unwrap_or(usize::MAX)));
        }
        Ok(())
    }

    /// Bytes of scores to be ranked.
    pub(super) fn work(&self, response: &InferResponse) -> usize {
        let ranked = response.outputs.iter().filter(|output| self.count(&output.name).is_some());
        ranked.map(|output| output.tensor.data().len()).sum()
    }

    /// The answer with its classes.
    pub(super) fn of(&self, mut response: InferResponse) -> Result<InferResponse> {
        let mut room = MAX_BYTES;
        for (output, labels) in response.outputs.iter_mut().zip(&response.labels) {
            if let Some(count) = self.count(&output.name) {
                let ask = Ask { count, batched: response.batched, labels: labels.as_deref(), room };
                output.tensor = classify(&output.name, &output.tensor, ask)?;
                room -= output.tensor.data().len();
            }
        }
        Ok(response)
    }

    fn count(&self, output: &str) -> Option<usize> {
        self.0.iter().find(|(name, _)| name == output).map(|(_, count)| *count)
    }
}

/// What is asked of one output.
struct Ask<'a> {
    count: usize,
    /// Its leading axis counts rows.
    batched: bool,
    labels: Option<&'a [String]>,
    room: usize,
}

/// The best `count` classes of each row, or all of them, in at most `room` bytes.
fn classify(output: &str, scores: &Tensor, ask: Ask<'_>) -> Result<Tensor> {
    let Ask { count, batched, labels, room } = ask;
    let dims = scores.shape().dims();
    let (rows, axes) = match dims {
        [] => return Err(unfit(output, "it is a scalar, expected at least one axis, of classes")),
        // A model for one row alone says so by an axis of 1.
        [_, axes @ ..] if batched || dims[0] == 1 && !axes.is_empty() => (&dims[..1], axes),
        axes => (&[][..], axes),
    };
    let classes = axes.iter().try_fold(1usize, |classes, axis| classes.checked_mul(*axis));
    let classes = classes.ok_or_else(|| unfit(output, "its axes are too long"))?;
    let shape =
        Shape::new([rows, &[count.min(classes)]].concat()).map_err(|error| unfit(output, &error.to_string()))?;
    let best = Best { classes, count, labels: labels.filter(|labels| labels.len() == classes), room };
    let data = match scores.dtype() {
        DataType::Uint8 => best.of(scores, u8::cmp, u8::to_string),
        DataType::Uint16 => best.of(scores, u16::cmp, u16::to_string),
        DataType::Uint32 => best.of(scores, u32::cmp, u32::to_string),
        DataType::Uint64 => best.of(scores, u64::cmp, u64::to_string),
        DataType::Int8 => best.of(scores, i8::cmp, i8::to_string),
        DataType::Int16 => best.of(scores, i16::cmp, i16::to_string),
        DataType::Int32 => best.of(scores, i32::cmp, i32::to_string),
        DataType::Int64 => best.of(scores, i64::cmp, i64::to_string),
        DataType::Fp16 => best.of(scores, |a: &f16, b| by_number(a.to_f32(), b.to_f32()), |score| text(score.to_f32())),
        DataType::Bf16 => {
            best.of(scores, |a: &bf16, b| by_number(a.to_f32(), b.to_f32()), |score| text(score.to_f32()))
        }
        DataType::Fp32 => best.of(scores, |a: &f32, b| by_number(*a, *b), |score| text(*score)),
        DataType::Fp64 => best.of(scores, |a: &f64, b| by_number(*a, *b), |score| text(*score)),
        DataType::Bool | DataType::Bytes => {
            return Err(unfit(output, &format!("its datatype is {}, expected a number", scores.dtype())));
        }
    };
    let data = data.ok_or_else(|| {
        let output = quoted(output);
        Error::too_large(format!("the classes of output '{output}' take more than {room} bytes: ask for fewer"))
    })?;
    Tensor::new(DataType::Bytes, shape, data.into()).map_err(|error| Error::internal(error.to_string()))
}

fn unfit(output: &str, why: &str) -> Error {
    Error::invalid(format!("output '{}' has no classes to rank: {why}", quoted(output)))
}

struct Best<'a> {
    /// In a row.
    classes: usize,
    /// Asked for.
    count: usize,
    /// As many as there are classes.
    labels: Option<&'a [String]>,
    room: usize,
}

impl Best<'_> {
    /// `None` where the classes take more than the room.
    fn of<T: Element>(
        &self,
        scores: &Tensor,
        order: impl Fn(&T, &T) -> Ordering,
        text: impl Fn(&T) -> String,
    ) -> Option<Vec<u8>> {
        let scores = scores.to_vec::<T>().unwrap_or_default();
        let mut data = Vec::new();
        let mut ranks: Vec<usize> = Vec::with_capacity(self.classes);
        // Without classes there is no row to look at.
        for row in scores.chunks_exact(self.classes.max(1)) {
            let better = |a: &usize, b: &usize| order(&row[*b], &row[*a]).then(a.cmp(b));
            ranks.clear();
            ranks.extend(0..row.len());
            if self.count < ranks.len() {
                ranks.select_nth_unstable_by(self.count, better);
                ranks.truncate(self.count);
            }
            ranks.sort_unstable_by(better);
            for index in &ranks {
                let label = self.labels.map(|labels| &labels[*index]).filter(|label| !label.is_empty());
                let label = label.map(|label| format!(":{label}")).unwrap_or_default();
                strings::push(&mut data, format!("{}:{index}{label}", text(&row[*index])).as_bytes())?;
                if data.len() > self.room {
                    return None;
                }
            }
        }
        Some(data)
    }
}

/// Numbers as they are, NaN below all of them.
fn by_number<T: PartialOrd>(a: T, b: T) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| {
        let is_number = |x: &T| x.partial_cmp(x).is_some();
        is_number(&a).cmp(&is_number(&b))
    })
}

/// As C prints a float by default, which is what clients read: six digits after the point.
fn text(score: impl Display) -> String {
    format!("{score:.6}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;

    fn scores<T: Element + Send + 'static>(dims: &[usize], elements: Vec<T>) -> Tensor {
        Tensor::from_vec(Shape::new(dims).unwrap(), elements).unwrap()
    }

    fn best(scores: &Tensor, count: usize, labels: Option<&[String]>) -> (Vec<usize>, Vec<String>) {
        ranked(scores, count, scores.shape().rank() > 1, labels)
    }

    fn ranked(scores: &Tensor, count: usize, batched: bool, labels: Option<&[String]>) -> (Vec<usize>, Vec<String>) {
        let classes = classify("y", scores, Ask { count, batched, labels, room: MAX_BYTES }).unwrap();
        let texts = classes.strings().map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
        (classes.shape().dims().to_vec(), texts)
    }

    #[test]
    fn the_best_classes_come_first_as_c_prints_them() {
        let rows = scores(&[2, 3], vec![0.25f32, 3.3, -1.0, 7.0, 7.0, 8.5]);
        assert_eq!(
            best(&rows, 2, None),
            (vec![2, 2], ["3.300000:1", "0.250000:0", "8.500000:2", "7.000000:0"].map(String::from).into())
        );
        let labels = ["a", "b:c", ""].map(String::from);
        assert_eq!(best(&rows, 1, Some(&labels)).1, ["3.300000:1:b:c", "8.500000:2"]);
        assert_eq!(best(&rows, 1, Some(&labels[..2])).1, ["3.300000:1", "8.500000:2"], "labels of something else");
        assert_eq!(best(&rows, usize::MAX, None).0, [2, 3]);
        assert_eq!(
            best(&scores(&[3], vec![u64::MAX, u64::MAX - 1, 0]), 2, None).1,
            ["18446744073709551615:0", "18446744073709551614:1"]
        );
        assert_eq!(best(&scores(&[2], vec![-1i8, -2]), 9, None).1, ["-1:0", "-2:1"]);
        let halves = [1.5f32, f32::INFINITY].map(f16::from_f32).to_vec();
        assert_eq!(best(&scores(&[1, 2], halves), 2, None).1, ["inf:1", "1.500000:0"]);
        let wide = scores(&[4], vec![f64::NAN, f64::NEG_INFINITY, 1e3, f64::NAN]);
        assert_eq!(best(&wide, 4, None).1, ["1000.000000:2", "-inf:1", "nan:0", "nan:3"]);
    }

    #[test]
    fn counts_are_bounded_and_none_is_no_request() {
        let mut classes = Classes::default();
        classes.ask("y", 0).unwrap();
        assert_eq!(classes, Classes::default());
        classes.ask("y", MAX_COUNT).unwrap();
        assert_eq!(classes.ask("z", MAX_COUNT + 1).unwrap_err().kind(), Kind::InvalidInput);
        assert_eq!((classes.count("y").is_some(), classes.count("z")), (true, None));
    }

    #[test]
    fn axes_without_anything_to_rank_stay_empty() {
        for dims in [&[2, 0][..], &[0, 3], &[0]] {
            let (shape, classes) = best(&scores::<f32>(dims, vec![]), 2, None);
            assert_eq!((shape.len(), classes.len()), (dims.len(), 0), "{dims:?}");
        }
        assert_eq!(best(&scores(&[2, 1, 1], vec![1f32, 2.0]), 5, None).0, [2, 1]);
    }

    #[test]
    fn all_axes_but_that_of_rows_are_classes() {
        let image = scores(&[1, 1000, 1, 1], (0..1000i32).collect());
        let labels: Vec<String> = (0..1000).map(|class| format!("c{class}")).collect();
        for batched in [true, false] {
            let (shape, classes) = ranked(&image, 3, batched, Some(&labels));
            assert_eq!((&shape[..], &classes[0][..], &classes[2][..]), (&[1, 3][..], "999:999:c999", "997:997:c997"));
        }
        let grid = scores(&[2, 2, 2], vec![1i8, 2, 3, 4, 8, 7, 6, 5]);
        for (batched, shape, classes) in
            [(true, &[2, 2][..], &["4:3", "3:2", "8:0", "7:1"][..]), (false, &[2], &["8:4", "7:5"])]
        {
            let (found, texts) = ranked(&grid, 2, batched, None);
            assert_eq!((&found[..], texts), (shape, classes.iter().map(|text| text.to_string()).collect()));
        }
        let flat = scores(&[2], vec![1i8, 2]);
        assert_eq!(ranked(&flat, 2, true, None), (vec![2, 1], ["1:0", "2:0"].map(String::from).into()));
        assert_eq!(ranked(&flat, 2, false, None), (vec![2], ["2:1", "1:0"].map(String::from).into()));
        assert_eq!(ranked(&scores(&[1], vec![7i8]), 2, false, None).0, [1]);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let refused = |tensor: Tensor| {
            let error =
                classify("y", &tensor, Ask { count: 1, batched: false, labels: None, room: MAX_BYTES }).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput);
            error.message().to_string()
        };
        let strings = Tensor::from_strings(Shape::new([1]).unwrap(), ["x"]).unwrap();
        assert_eq!(refused(strings), "output 'y' has no classes to rank: its datatype is BYTES, expected a number");
        let flags = Tensor::new(DataType::Bool, Shape::new([1]).unwrap(), vec![1].into()).unwrap();
        assert!(refused(flags).contains("BOOL"));
        assert!(refused(Tensor::from_vec(Shape::scalar(), vec![1f32]).unwrap()).contains("scalar"));
    }

    #[test]
    fn long_labels_are_bounded() {
        let labels = vec!["l".repeat(100); 4];
        let rows = scores(&[2, 4], vec![0f32; 8]);
        let ranked = |room| classify("y", &rows, Ask { count: 4, batched: true, labels: Some(&labels), room });
        let bytes = ranked(MAX_BYTES).unwrap().data().len();
        assert!(ranked(bytes).is_ok());
        assert_eq!(ranked(bytes - 1).unwrap_err().kind(), Kind::TooLarge);
    }

    proptest! {
        #[test]
        fn fewer_classes_are_the_first_of_more(
            elements in proptest::collection::vec(-3i32..3, 12), count in 1usize..6,
        ) {
            let rows = scores(&[2, 6], elements);
            let (_, all) = best(&rows, 6, None);
            let (_, few) = best(&rows, count, None);
            let expected: Vec<String> = all.chunks(6).flat_map(|row| row[..count].to_vec()).collect();
            prop_assert_eq!(few, expected);
        }
    }
}
