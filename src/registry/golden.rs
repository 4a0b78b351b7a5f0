//! Golden cases (`expected.json`) and declared warm-ups: requests written down in files, run before a version is ready.
//!
//! `expected.json`: `{"source": …, "tolerance": {"absolute": a, "relative": r}, "cases": [{"name": …, "inputs": {name:
//! tensor}, "outputs": {name: tensor}}]}` with tensors as `{"datatype", "shape", "data"}`. Floats agree where
//! `|got - expected| <= a + r * |expected|`, everything else where it is equal. A warm-up file is a request of the Open
//! Inference Protocol: `{"inputs": [{"name", "datatype", "shape", "data"}]}`.

use serde_json::{Map, Value};

use super::probe::Probe;
use super::selftest::floats;
use crate::error::quoted;
use crate::tensor::{DataType, Shape, Signature, Tensor};

/// Longest golden or warm-up file, in bytes.
pub const MAX_FILE_BYTES: u64 = 256 << 20;
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
        let root: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let tolerance = |key: &str| {
            let value = root.get("tolerance").and_then(|tolerance| tolerance.get(key)).and_then(Value::as_f64);
            value
                .filter(|x| *x >= 0.0)
                .ok_or_else(|| format!("`tolerance.{key}` is missing, expected a number from 0 up"))
        };
        let cases = root.get("cases").and_then(Value::as_array).ok_or("`cases` is missing, expected a list")?;
        let cases = cases.iter().enumerate().map(|(i, case)| read_case(i, case)).collect::<Result<Vec<_>, _>>()?;
        if cases.is_empty() {
            return Err("`cases` is empty, expected at least one".into());
        }
        Ok(Goldens { absolute: tolerance("absolute")?, relative: tolerance("relative")?, cases })
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

/// The inputs of a declared warm-up, in the signature's order.
pub fn read_warm_up(text: &str, signature: &Signature) -> Result<Vec<Tensor>, String> {
    let root: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let inputs = root.get("inputs").and_then(Value::as_array).ok_or("`inputs` is missing, expected a list")?;
    let named = inputs
        .iter()
        .map(|input| {
            let name = input.get("name").and_then(Value::as_str).ok_or("an input has no `name`")?;
            Ok((name.to_string(), read_tensor(input).map_err(|error| format!("input `{}`: {error}", quoted(name)))?))
        })
        .collect::<Result<Vec<_>, String>>()?;
    in_order(&named, signature)
}

fn in_order(named: &[(String, Tensor)], signature: &Signature) -> Result<Vec<Tensor>, String> {
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

fn read_case(index: usize, case: &Value) -> Result<Case, String> {
    let name = case.get("name").and_then(Value::as_str).map_or_else(|| index.to_string(), quoted);
    let side = |key: &str| {
        let tensors =
            case.get(key).and_then(Value::as_object).ok_or_else(|| format!("case `{name}` has no `{key}`"))?;
        read_tensors(tensors).map_err(|error| format!("case `{name}`, `{key}`: {error}"))
    };
    let outputs = side("outputs")?;
    if outputs.is_empty() {
        return Err(format!("case `{name}` expects no outputs, expected at least one"));
    }
    Ok(Case { inputs: side("inputs")?, outputs, name })
}

fn read_tensors(tensors: &Map<String, Value>) -> Result<Vec<(String, Tensor)>, String> {
    tensors
        .iter()
        .map(|(name, value)| {
            let tensor = read_tensor(value).map_err(|error| format!("`{}`: {error}", quoted(name)))?;
            Ok((name.clone(), tensor))
        })
        .collect()
}

fn read_tensor(value: &Value) -> Result<Tensor, String> {
    let dtype = value.get("datatype").and_then(Value::as_str).and_then(DataType::parse);
    let dtype = dtype.ok_or("`datatype` is missing or unknown")?;
    let dims = value.get("shape").and_then(Value::as_array).ok_or("`shape` is missing, expected a list")?;
    let dims: Option<Vec<i64>> = dims.iter().map(Value::as_i64).collect();
    let shape = Shape::from_wire(&dims.ok_or("`shape` is not a list of whole numbers")?).map_err(|e| e.to_string())?;
    let mut flat = Vec::new();
    flatten(value.get("data").ok_or("`data` is missing, expected a list")?, &mut flat);
    build(dtype, shape, &flat)
}

/// Nested lists as one; recursion is bounded by the JSON parser's own limit.
fn flatten<'a>(value: &'a Value, flat: &mut Vec<&'a Value>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| flatten(value, flat)),
        scalar => flat.push(scalar),
    }
}

fn build(dtype: DataType, shape: Shape, data: &[&Value]) -> Result<Tensor, String> {
    fn all<T>(data: &[&Value], read: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>, String> {
        data.iter()
            .map(|value| read(value).ok_or_else(|| format!("{} does not fit", quoted(&value.to_string()))))
            .collect()
    }
    fn signed<T: TryFrom<i64>>(value: &Value) -> Option<T> {
        T::try_from(value.as_i64()?).ok()
    }
    fn unsigned<T: TryFrom<u64>>(value: &Value) -> Option<T> {
        T::try_from(value.as_u64()?).ok()
    }
    let tensor = match dtype {
        DataType::Bool => {
            let bit = |value: &Value| value.as_bool().map(u8::from).or_else(|| unsigned::<u8>(value));
            Tensor::new(dtype, shape, all(data, bit)?.into())
        }
        DataType::Bytes => Tensor::from_strings(shape, all(data, |value| value.as_str().map(str::to_string))?),
        DataType::Uint8 => Tensor::from_vec(shape, all(data, unsigned::<u8>)?),
        DataType::Uint16 => Tensor::from_vec(shape, all(data, unsigned::<u16>)?),
        DataType::Uint32 => Tensor::from_vec(shape, all(data, unsigned::<u32>)?),
        DataType::Uint64 => Tensor::from_vec(shape, all(data, unsigned::<u64>)?),
        DataType::Int8 => Tensor::from_vec(shape, all(data, signed::<i8>)?),
        DataType::Int16 => Tensor::from_vec(shape, all(data, signed::<i16>)?),
        DataType::Int32 => Tensor::from_vec(shape, all(data, signed::<i32>)?),
        DataType::Int64 => Tensor::from_vec(shape, all(data, signed::<i64>)?),
        DataType::Fp16 => Tensor::from_vec(shape, all(data, |v| float(v).map(half::f16::from_f64))?),
        DataType::Bf16 => Tensor::from_vec(shape, all(data, |v| float(v).map(half::bf16::from_f64))?),
        DataType::Fp32 => Tensor::from_vec(shape, all(data, |v| float(v).map(|x| x as f32))?),
        DataType::Fp64 => Tensor::from_vec(shape, all(data, float)?),
    };
    tensor.map_err(|error| error.to_string())
}

/// A number, or one of the three that JSON has no number for.
fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(name) => match name.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
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
        assert_eq!(check("[[1], [-3]]", "[2, -6]", r#"["+", "-"]"#), Ok(()));
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
        assert!(error(r#"{"cases": []}"#).contains("`cases` is empty"));
        let case = |tensor: &str| {
            let text =
                r#"{"tolerance": {"absolute": 0, "relative": 0}, "cases": [{"inputs": {"x": T}, "outputs": {}}]}"#;
            error(&text.replace('T', tensor))
        };
        assert!(case("{}").contains("expects no outputs"));
        let warm_up = |input: &str| read_warm_up(&format!(r#"{{"inputs": [{input}]}}"#), probe().model().signature());
        assert!(warm_up(r#"{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}"#).is_ok());
        for (input, part) in [
            ("", "input `x` is missing"),
            (r#"{"name": "z", "datatype": "FP32", "shape": [1], "data": [1]}"#, "no input `z`"),
            (r#"{"name": "x", "datatype": "INT8", "shape": [1], "data": [200]}"#, "200 does not fit"),
            (r#"{"name": "x", "datatype": "INT8", "shape": [1], "data": [2]}"#, "is INT8 [1], expected FP32 [-1]"),
            (r#"{"name": "x", "datatype": "FP32", "shape": [2], "data": [1]}"#, "expected 8"),
            (r#"{"name": "x", "datatype": "F32", "shape": [2], "data": [1]}"#, "`datatype`"),
        ] {
            assert!(warm_up(input).unwrap_err().contains(part), "{input}: {:?}", warm_up(input));
        }
    }
}
