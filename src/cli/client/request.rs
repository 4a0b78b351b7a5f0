//! What is sent: from a request file, read by the server's rules for JSON, or put together from inputs.

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::ModelMetadata;
use crate::error::visible;
use crate::tensor::json::{Data, NotFinite};
use crate::tensor::{DataType, Shape, Tensor};

#[derive(Clone, Debug, Default)]
pub(in crate::cli) struct Request {
    pub(in crate::cli) id: String,
    pub(in crate::cli) parameters: Map<String, Value>,
    pub(in crate::cli) inputs: Vec<Input>,
    /// Empty for all.
    pub(in crate::cli) outputs: Vec<Output>,
}

#[derive(Clone, Debug)]
pub(in crate::cli) struct Input {
    pub(in crate::cli) name: String,
    pub(in crate::cli) tensor: Tensor,
    pub(in crate::cli) parameters: Map<String, Value>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(in crate::cli) struct Output {
    pub(in crate::cli) name: String,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub(in crate::cli) parameters: Map<String, Value>,
}

#[derive(Deserialize)]
struct Written<'a> {
    #[serde(default)]
    id: String,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(borrow)]
    inputs: Vec<WrittenInput<'a>>,
    #[serde(default)]
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct WrittenInput<'a> {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(borrow)]
    data: &'a RawValue,
}

impl Request {
    /// An infer request of the protocol, all of it JSON.
    pub(in crate::cli) fn parse(text: &[u8]) -> Result<Request> {
        let written: Written = serde_json::from_slice(text).context("cannot be read")?;
        let inputs = written.inputs.into_iter().map(|input| {
            let tensor = tensor(&input).with_context(|| format!("input `{}`", visible(&input.name)))?;
            Ok(Input { name: input.name, tensor, parameters: input.parameters })
        });
        Ok(Request {
            id: written.id,
            parameters: written.parameters,
            inputs: inputs.collect::<Result<_>>()?,
            outputs: written.outputs,
        })
    }
}

fn tensor(input: &WrittenInput) -> Result<Tensor> {
    let Some(dtype) = DataType::parse(&input.datatype) else {
        let expected = DataType::ALL.map(DataType::name).join(", ");
        bail!("its datatype is `{}`, expected one of {expected}", visible(&input.datatype));
    };
    let shape = Shape::from_wire(&input.shape)?;
    Data::new(dtype, shape, input.data.get()).and_then(|data| data.read(NotFinite::Refused)).map_err(|e| anyhow!(e))
}

/// The outputs to ask for. Classes are asked of those that hold floats; all then have to be named.
pub(in crate::cli) fn outputs(names: &[String], classes: Option<u32>, model: &ModelMetadata) -> Vec<Output> {
    let all = || model.outputs.iter().map(|output| output.name.clone()).collect();
    let names: Vec<String> = if names.is_empty() && classes.is_some() { all() } else { names.to_vec() };
    let holds_floats = |name: &str| {
        let output = model.outputs.iter().find(|output| output.name == name);
        output.is_some_and(|output| matches!(&*output.datatype, "FP16" | "BF16" | "FP32" | "FP64"))
    };
    let output = |name: String| {
        let count = classes.filter(|_| holds_floats(&name));
        let parameters = count.map(|count| ("classification".to_string(), count.into())).into_iter().collect();
        Output { name, parameters }
    };
    names.into_iter().map(output).collect()
}

#[cfg(test)]
mod tests {
    use super::super::TensorMetadata;
    use super::*;

    #[test]
    fn a_request_file_keeps_all_that_it_says() {
        let request = Request::parse(
            br#"{"id":"7","parameters":{"timeout":5},"other":1,"outputs":[{"name":"y","parameters":{"a":true}}],
                "inputs":[{"name":"x","shape":[1,2],"datatype":"INT8","data":[[1,2]],"parameters":{"b":"c"}}]}"#,
        );
        let request = request.unwrap();
        assert_eq!((&*request.id, &request.parameters["timeout"]), ("7", &Value::from(5)));
        assert_eq!(request.inputs[0].tensor.to_vec::<i8>(), Some(vec![1, 2]));
        assert_eq!(
            (&request.inputs[0].parameters["b"], &request.outputs[0].parameters["a"]),
            (&"c".into(), &true.into())
        );
    }

    #[test]
    fn a_request_file_is_read_by_the_servers_rules() {
        let message = |input: &str| {
            let text = format!(r#"{{"inputs":[{{"name":"x",{input}}}]}}"#);
            format!("{:#}", Request::parse(text.as_bytes()).unwrap_err())
        };
        for (input, expected) in [
            (r#""shape":[1],"datatype":"fp32","data":[1]"#, "input `x`: its datatype is `fp32`, expected one of BOOL"),
            (r#""shape":[2],"datatype":"FP32","data":[1]"#, "input `x`: `data` does not have the shape [2]"),
            (r#""shape":[1],"datatype":"INT8","data":[1.5]"#, "input `x`: element 0 is a number with a fraction"),
            (r#""shape":[1],"datatype":"FP32","data":["NaN"]"#, "input `x`: element 0 is a string, expected FP32"),
            (r#""shape":[-1],"datatype":"FP32","data":[]"#, "input `x`: shape has dimension -1"),
            (r#""shape":[1],"datatype":"FP32""#, "cannot be read: missing field `data`"),
        ] {
            assert!(message(input).starts_with(expected), "{}", message(input));
        }
    }

    #[test]
    fn classes_are_asked_of_floats_only() {
        let output = |name: &str, datatype: &str| TensorMetadata {
            name: name.into(),
            datatype: datatype.into(),
            shape: vec![-1],
        };
        let model =
            ModelMetadata { outputs: vec![output("p", "FP32"), output("label", "INT64")], ..Default::default() };
        let of = |names: &[String], classes| -> Vec<(String, Option<u64>)> {
            let outputs = outputs(names, classes, &model).into_iter();
            outputs
                .map(|output| (output.name, output.parameters.get("classification").and_then(Value::as_u64)))
                .collect()
        };
        assert_eq!(of(&[], None), []);
        assert_eq!(of(&["p".into()], None), [("p".into(), None)]);
        assert_eq!(of(&[], Some(3)), [("p".into(), Some(3)), ("label".into(), None)]);
    }
}
