//! Golden cases (`expected.json`) and declared warm-ups: requests written down in files, run before a version is ready.
//!
//! `expected.json`: `{"source": …, "tolerance": {"absolute": a, "relative": r}, "cases": [{"name": …, "inputs": {name:
//! tensor}, "outputs": {name: tensor}}]}` with tensors as `{"datatype", "shape", "data"}`. Floats agree where
//! `|got - expected| <= a + r * |expected|`, everything else where it is equal. A warm-up file is a request of the Open
//! Inference Protocol: `{"inputs": [{"name", "datatype", "shape", "data"}]}`. `data` is read as a request's is, by
//! `tensor::json`; golden cases may say "NaN", "Infinity" and "-Infinity", too.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::probe::Probe;
use super::selftest::floats;
use crate::error::quoted;
use crate::tensor::json::{Data, NotFinite};
use crate::tensor::{DataType, Shape, Signature, Tensor};

/// Longest golden or warm-up file, in bytes.
pub const MAX_FILE_BYTES: u64 = 16 << 20;
/// Differences listed per version; the rest is counted.
const MAX_LISTED: usize = 8;

pub struct Goldens {
    absolute: f64,
    relative: f64,
    cases: Vec<Case>,
}

struct Case {
    name: String,
    inputs: Vec<(String, Tensor)>,
    outputs: Vec<(String, Tensor)>,
}

impl Goldens {
    pub fn parse(text: &str) -> Result<Goldens, String> {
        let file: GoldenFile = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Tolerance { absolute, relative } = file.tolerance;
        if absolute < 0.0 || relative < 0.0 {
            return Err(format!("`tolerance` is {absolute} and {relative}, expected numbers from 0 up"));
        }
        let cases = file.cases.into_iter().enumerate().map(|(i, case)| read_case(i, case));
        let cases = cases.collect::<Result<Vec<_>, _>>()?;
        if cases.is_empty() {
            return Err("`cases` is empty, expected at least one".into());
        }
        Ok(Goldens { absolute, relative, cases })
    }

    pub fn len(&self) -> usize {
        self.cases.len()
    }

    /// Runs every case by itself. The error lists what differs.
    pub fn check(&self, probe: &mut Probe) -> Result<(), String> {
        let mut differences = Vec::new();
        for case in &self.cases {
            let found = self.run(case, probe).unwrap_or_else(|error| vec![error]);
            differences.extend(found.into_iter().map(|difference| format!("case `{}`: {difference}", case.name)));
        }
        let more = differences.len().saturating_sub(MAX_LISTED);
        differences.truncate(MAX_LISTED);
        match (differences.is_empty(), more) {
            (true, _) => Ok(()),
            (false, 0) => Err(differences.join("; ")),
            (false, more) => Err(format!("{}; and {more} more", differences.join("; "))),
        }
    }

    fn run(&self, case: &Case, probe: &mut Probe) -> Result<Vec<String>, String> {
        let model = std::sync::Arc::clone(probe.model());
        let signature = model.signature();
        let inputs = in_order(&case.inputs, signature)?;
        let outputs = probe.run(&[&inputs])?;
        let mut differences = Vec::new();
        for (name, expected) in &case.outputs {
            let (position, _) = signature.output(name).ok_or_else(|| format!("the model has no output `{name}`"))?;
            if let Some(difference) = self.difference(&outputs[position], expected) {
                differences.push(format!("output `{name}` {difference}"));
            }
        }
        Ok(differences)
    }

    fn difference(&self, got: &Tensor, expected: &Tensor) -> Option<String> {
        if got.dtype() != expected.dtype() || got.shape() != expected.shape() {
            return Some(format!(
                "is {} {}, expected {} {}",
                got.dtype(),
                got.shape(),
                expected.dtype(),
                expected.shape()
            ));
        }
        let (Some(a), Some(b)) = (floats(got), floats(expected)) else {
            let at = elements(got).into_iter().zip(elements(expected)).position(|(a, b)| a != b)?;
            return Some(format!("differs at element {at}"));
        };
        let at = a.iter().zip(&b).position(|(got, expected)| !self.agree(*got, *expected))?;
        Some(format!("is {} at element {at}, expected {}", a[at], b[at]))
    }

    fn agree(&self, got: f64, expected: f64) -> bool {
        // An infinite expectation makes the allowance infinite, too.
        got == expected
            || (got.is_nan() && expected.is_nan())
            || (expected.is_finite() && (got - expected).abs() <= self.absolute + self.relative * expected.abs())
    }
}

/// A tensor as written; what else a request or a case may carry is stepped over.
#[derive(Deserialize)]
struct Written<'a> {
    name: Option<String>,
    datatype: String,
    shape: Vec<i64>,
    #[serde(borrow)]
    data: &'a RawValue,
}

#[derive(Deserialize)]
struct WarmUpFile<'a> {
    #[serde(borrow)]
    inputs: Vec<Written<'a>>,
}

#[derive(Deserialize)]
struct GoldenFile<'a> {
    tolerance: Tolerance,
    #[serde(borrow)]
    cases: Vec<WrittenCase<'a>>,
}

#[derive(Deserialize)]
struct Tolerance {
    absolute: f64,
    relative: f64,
}

#[derive(Deserialize)]
struct WrittenCase<'a> {
    name: Option<String>,
    #[serde(borrow)]
    inputs: BTreeMap<String, Written<'a>>,
    #[serde(borrow)]
    outputs: BTreeMap<String, Written<'a>>,
}

/// The inputs of a declared warm-up, in the signature's order.
pub fn read_warm_up(text: &str, signature: &Signature) -> Result<Vec<Tensor>, String> {
    let file: WarmUpFile = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let named = file
        .inputs
        .into_iter()
        .map(|input| {
            let name = input.name.clone().ok_or("an input has no `name`")?;
            let tensor =
                input.read(NotFinite::Refused).map_err(|error| format!("input `{}`: {error}", quoted(&name)))?;
            Ok((name, tensor))
        })
        .collect::<Result<Vec<_>, String>>()?;
    in_order(&named, signature)
}

/// The named tensors in the signature's order, where they are all there and fit.
pub fn in_order(named: &[(String, Tensor)], signature: &Signature) -> Result<Vec<Tensor>, String> {
    if let Some((name, _)) = named.iter().find(|(name, _)| signature.input(name).is_none()) {
        return Err(format!("the model has no input `{}`", quoted(name)));
    }
    let find = |spec: &crate::tensor::TensorSpec| {
        let (_, tensor) = named
            .iter()
            .find(|(name, _)| **name == *spec.name)
            .ok_or_else(|| format!("input `{}` is missing", spec.name))?;
        if tensor.dtype() != spec.dtype || !spec.accepts(tensor.shape()) {
            let expected = crate::tensor::wire_shape(&spec.to_wire());
            return Err(format!(
                "input `{}` is {} {}, expected {} {expected}",
                spec.name,
                tensor.dtype(),
                tensor.shape(),
                spec.dtype
            ));
        }
        Ok(tensor.clone())
    };
    signature.inputs.iter().map(find).collect()
}

fn read_case(index: usize, case: WrittenCase) -> Result<Case, String> {
    let name = case.name.map_or_else(|| index.to_string(), |name| quoted(&name));
    let side = |key: &str, tensors: BTreeMap<String, Written>| {
        let read = |(tensor, written): (String, Written)| match written.read(NotFinite::Named) {
            Ok(read) => Ok((tensor, read)),
            Err(error) => Err(format!("case `{name}`, `{key}`: `{}`: {error}", quoted(&tensor))),
        };
        tensors.into_iter().map(read).collect::<Result<Vec<_>, _>>()
    };
    if case.outputs.is_empty() {
        return Err(format!("case `{name}` expects no outputs, expected at least one"));
    }
    Ok(Case { inputs: side("inputs", case.inputs)?, outputs: side("outputs", case.outputs)?, name })
}

impl Written<'_> {
    fn read(&self, not_finite: NotFinite) -> Result<Tensor, String> {
        let dtype = DataType::parse(&self.datatype)
            .ok_or_else(|| format!("`datatype` is `{}`, expected one of the protocol's", quoted(&self.datatype)))?;
        let shape = Shape::from_wire(&self.shape).map_err(|error| error.to_string())?;
        let tensor = Data::new(dtype, shape, self.data.get()).and_then(|data| data.read(not_finite));
        tensor.map_err(|error| error.to_string())
    }
}

/// The elements' bytes, to find the first that differs.
fn elements(tensor: &Tensor) -> Vec<&[u8]> {
    match tensor.dtype().size() {
        None => tensor.strings().collect(),
        Some(size) => tensor.data().chunks(size).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::signature;
    use super::*;

    /// y = 2x and the sign of x.
    fn probe() -> Probe {
        let signature = signature(
            &[("x", DataType::Fp32, &[-1])],
            &[("y", DataType::Fp32, &[-1]), ("sign", DataType::Bytes, &[-1])],
        );
        super::super::tests::probe(&signature, |inputs| {
            let x = inputs[0].to_vec::<f32>().unwrap();
            let shape = inputs[0].shape().clone();
            let sign = x.iter().map(|x| if *x < 0.0 { "-" } else { "+" }).collect::<Vec<_>>();
            Ok(vec![
                Tensor::from_vec(shape.clone(), x.iter().map(|x| 2.0 * x).collect()).unwrap(),
                Tensor::from_strings(shape, sign).unwrap(),
            ])
        })
    }

    fn check(x: &str, y: &str, sign: &str) -> Result<(), String> {
        let tensor = |datatype, data| format!(r#"{{"datatype": "{datatype}", "shape": [2], "data": {data}}}"#);
        let text = format!(
            r#"{{"source": "by hand", "tolerance": {{"absolute": 1e-5, "relative": 1e-4}}, "cases": [{{"name": "a",
            "inputs": {{"x": {}}}, "outputs": {{"y": {}, "sign": {}}}}}]}}"#,
            tensor("FP32", x),
            tensor("FP32", y),
            tensor("BYTES", sign)
        );
        Goldens::parse(&text).unwrap().check(&mut probe())
    }

    #[test]
    fn agreement_is_within_the_tolerance_and_exact_for_the_rest() {
        assert_eq!(check("[1, -3]", "[2.0001, -6.0005]", r#"["+", "-"]"#), Ok(()));
        assert_eq!(
            check("[1, -3]", "[2, -6.1]", r#"["+", "+"]"#).unwrap_err(),
            format!(
                "case `a`: output `sign` differs at element 1; case `a`: output `y` is -6 at element 1, expected {}",
                f64::from(-6.1f32)
            )
        );
        assert_eq!(check(r#"["NaN", "Infinity"]"#, r#"["NaN", "Infinity"]"#, r#"["+", "+"]"#), Ok(()));
        assert!(check("[1, 1]", r#"[2, "Infinity"]"#, r#"["+", "+"]"#).is_err());
        assert!(check(r#"[1, "NaN"]"#, "[2, 2]", r#"["+", "+"]"#).is_err());
    }

    #[test]
    fn malformed_files_say_what_is_wrong() {
        let error = |text: &str| Goldens::parse(text).err().unwrap();
        assert!(error("{").contains("EOF"));
        assert!(error(r#"{"cases": []}"#).contains("missing field `tolerance`"));
        assert!(error(r#"{"tolerance": {"absolute": -1, "relative": 0}, "cases": []}"#).contains("from 0 up"));
        assert!(error(r#"{"tolerance": {"absolute": 0, "relative": 0}, "cases": []}"#).contains("`cases` is empty"));
        let case = |tensor: &str| {
            let text =
                r#"{"tolerance": {"absolute": 0, "relative": 0}, "cases": [{"inputs": {"x": T}, "outputs": {}}]}"#;
            error(&text.replace('T', tensor))
        };
        assert!(case(r#"{"datatype": "FP32", "shape": [1], "data": [1]}"#).contains("expects no outputs"));
        assert!(case("{}").contains("missing field `datatype`"));
        let warm_up = |input: &str| read_warm_up(&format!(r#"{{"inputs": [{input}]}}"#), probe().model().signature());
        assert!(warm_up(r#"{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}"#).is_ok());
        for (input, part) in [
            ("", "input `x` is missing"),
            (r#"{"name": "z", "datatype": "FP32", "shape": [1], "data": [1]}"#, "no input `z`"),
            (
                r#"{"name": "x", "datatype": "INT8", "shape": [1], "data": [200]}"#,
                "element 0 is a number out of range, expected INT8",
            ),
            (r#"{"name": "x", "datatype": "INT8", "shape": [1], "data": [2]}"#, "is INT8 [1], expected FP32 [-1]"),
            (r#"{"name": "x", "datatype": "FP32", "shape": [2], "data": [1]}"#, "does not have the shape [2]"),
            (r#"{"name": "x", "datatype": "F32", "shape": [2], "data": [1]}"#, "`datatype`"),
            (r#"{"name": "x", "datatype": "FP32", "shape": [2], "data": [[1], [2]]}"#, "does not have the shape [2]"),
            (
                r#"{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[1], [2]]}"#,
                "does not have the shape [1,2]",
            ),
            (
                r#"{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[1, [2]]]}"#,
                "does not have the shape [1,2]",
            ),
            (
                r#"{"name": "x", "datatype": "FP32", "shape": [1], "data": ["NaN"]}"#,
                "element 0 is a string, expected FP32",
            ),
            (
                r#"{"name": "x", "datatype": "FP32", "shape": [1], "data": [1e39]}"#,
                "element 0 is a number out of range",
            ),
            (
                r#"{"name": "x", "datatype": "BOOL", "shape": [1], "data": [1]}"#,
                "element 0 is a number, expected true or false",
            ),
        ] {
            assert!(warm_up(input).unwrap_err().contains(part), "{input}: {:?}", warm_up(input));
        }
    }

    #[test]
    fn numbers_are_read_as_in_requests() {
        let read = |dtype: &str, shape: &str, data: &str| {
            let text = format!(r#"{{"datatype": "{dtype}", "shape": {shape}, "data": {data}}}"#);
            serde_json::from_str::<Written>(&text).unwrap().read(NotFinite::Refused)
        };
        assert_eq!(read("INT64", "[2]", "[2.0, 3e0]").unwrap().to_vec::<i64>().unwrap(), [2, 3]);
        assert_eq!(read("INT64", "[1]", "[2.5]").unwrap_err(), "element 0 is a number with a fraction, expected INT64");
        assert!(read("FP16", "[1]", "[1e5]").is_err(), "nothing written as a number is infinite");
        assert_eq!(read("BOOL", "[2]", "[true, false]").unwrap().data()[..], [1, 0]);
        assert_eq!(read("FP32", "[2, 1]", "[[1], [2]]").unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0]);
    }
}
