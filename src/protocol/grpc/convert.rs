//! Messages to requests and answers to messages. Pure; answers share their tensors' memory.

use std::collections::HashMap;
use std::fmt::Display;
use std::time::Duration;

use bytes::Bytes;

use super::inputs;
use super::proto::infer_parameter::ParameterChoice;
use super::proto::model_infer_request::InferRequestedOutputTensor;
use super::proto::model_infer_response::InferOutputTensor;
use super::proto::{InferParameter, ModelInferRequest, ModelInferResponse};
use crate::engine::Trace;
use crate::error::{Error, Quoted, Result, quoted};
use crate::protocol::classification::Classes;
use crate::protocol::common::{check_length, check_parameter};
use crate::request::{InferRequest, InferResponse, ModelRef, NamedTensor, Permit, Priority, VersionId};

pub(super) type Parameters = HashMap<String, InferParameter>;

/// The request as sent. Its counts were checked before it was decoded.
pub(super) fn request(message: ModelInferRequest) -> Result<InferRequest> {
    let ModelInferRequest { model_name, model_version, id, parameters, inputs, outputs, raw_input_contents } = message;
    let model = model(model_name, &model_version)?;
    check_length("the request id", &id)?;
    check_parameters(&parameters, "the request")?;
    Ok(InferRequest {
        inputs: inputs::tensors(inputs, raw_input_contents, &model.name)?,
        outputs: outputs.into_iter().map(requested).collect::<Result<_>>()?,
        timeout: whole(&parameters, "timeout")?.filter(|micros| *micros > 0).map(Duration::from_micros),
        priority: Priority::from_wire(whole(&parameters, "priority")?.unwrap_or(0)),
        id,
        model,
        route_key: None,
    })
}

/// A model by name and version; the versions "" and "-1" leave the choice to the server.
pub(super) fn model(name: String, version: &str) -> Result<ModelRef> {
    check_length("the model's name", &name)?;
    let version = match version {
        "" | "-1" => None,
        text => Some(VersionId::parse(text).ok_or_else(|| {
            let (text, name) = (quoted(text), quoted(&name));
            Error::invalid(format!("model version is '{text}' for model '{name}', expected a whole number from 1 up"))
        })?),
    };
    Ok(ModelRef { name, version })
}

/// The answer as a message, outputs always raw, and the place that the request held.
pub(super) fn response(response: InferResponse) -> (ModelInferResponse, Permit) {
    let InferResponse { id, prediction, model, version, digest, outputs, permit, .. } = response;
    let parameters = [("prediction_id", prediction.to_string()), ("model_digest", String::from(&*digest))];
    let (outputs, raw_output_contents) = outputs.into_iter().map(output).unzip();
    let message = ModelInferResponse {
        model_name: String::from(&*model),
        model_version: version.to_string(),
        id,
        parameters: parameters.map(|(name, value)| (name.to_string(), string_parameter(value))).into(),
        outputs,
        raw_output_contents,
    };
    (message, permit)
}

fn output(NamedTensor { name, tensor }: NamedTensor) -> (InferOutputTensor, Bytes) {
    let description = InferOutputTensor {
        name: String::from(&*name),
        datatype: tensor.dtype().name().to_string(),
        shape: tensor.shape().to_wire(),
        ..InferOutputTensor::default()
    };
    (description, tensor.data().clone())
}

/// What is said of a request that is refused on a stream, beside the error: whose it is, and who would have answered.
pub(super) fn refused(id: String, trace: &Trace) -> ModelInferResponse {
    let mut parameters = vec![("prediction_id", trace.prediction().to_string())];
    let mut response = ModelInferResponse { id, ..ModelInferResponse::default() };
    if let Some((version, digest)) = trace.chosen() {
        response.model_version = version.to_string();
        parameters.push(("model_digest", digest.to_string()));
    }
    let parameters = parameters.into_iter().map(|(name, value)| (name.to_string(), string_parameter(value)));
    response.parameters = parameters.collect();
    response
}

/// Whether a request on a stream wants to be told which answer is its last.
pub(super) fn wants_final_mark(parameters: &Parameters) -> Result<bool> {
    const NAME: &str = "triton_enable_empty_final_response";
    match parameters.get(NAME).and_then(|parameter| parameter.parameter_choice.as_ref()) {
        None => Ok(false),
        Some(ParameterChoice::BoolParam(wanted)) => Ok(*wanted),
        Some(_) => Err(Error::invalid(format!("parameter `{NAME}` is no bool, expected one"))),
    }
}

/// Every request has one answer, so that none is followed by an empty last one.
pub(super) fn mark_final(response: &mut ModelInferResponse) {
    let mark = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
    response.parameters.insert("triton_final_response".to_string(), mark);
}

fn string_parameter(value: String) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::StringParam(value)) }
}

/// Which outputs are to be answered by their best classes.
pub(super) fn classes(outputs: &[InferRequestedOutputTensor]) -> Result<Classes> {
    let mut classes = Classes::default();
    for output in outputs {
        if let Some(count) = whole(&output.parameters, "classification")? {
            classes.ask(&output.name, count)?;
        }
    }
    Ok(classes)
}

fn requested(output: InferRequestedOutputTensor) -> Result<String> {
    check_length("an output's name", &output.name)?;
    check_parameters(&output.parameters, format_args!("output '{}'", Quoted(&output.name)))?;
    Ok(output.name)
}

pub(super) fn check_parameters(parameters: &Parameters, owner: impl Display) -> Result<()> {
    parameters.iter().try_for_each(|(key, parameter)| check_parameter(key, !is_set(parameter), &owner))
}

fn is_set(parameter: &InferParameter) -> bool {
    match &parameter.parameter_choice {
        None => false,
        Some(ParameterChoice::BoolParam(value)) => *value,
        Some(ParameterChoice::Int64Param(value)) => *value != 0,
        Some(ParameterChoice::Uint64Param(value)) => *value != 0,
        Some(ParameterChoice::DoubleParam(value)) => *value != 0.0,
        Some(ParameterChoice::StringParam(value)) => !value.is_empty(),
    }
}

/// A parameter that is a whole number from 0 up, in either integer kind.
fn whole(parameters: &Parameters, name: &str) -> Result<Option<u64>> {
    let expected =
        |found: &str| Error::invalid(format!("parameter `{name}` is {found}, expected a whole number from 0 up"));
    match parameters.get(name).and_then(|parameter| parameter.parameter_choice.as_ref()) {
        None => Ok(None),
        Some(ParameterChoice::Uint64Param(value)) => Ok(Some(*value)),
        Some(ParameterChoice::Int64Param(value)) => {
            u64::try_from(*value).map(Some).map_err(|_| expected(&value.to_string()))
        }
        Some(ParameterChoice::BoolParam(_)) => Err(expected("a bool")),
        Some(ParameterChoice::DoubleParam(_)) => Err(expected("a double")),
        Some(ParameterChoice::StringParam(_)) => Err(expected("a string")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::proto::model_infer_request::InferInputTensor;
    use super::*;
    use crate::error::Kind;
    use crate::protocol::common::MAX_STRING_ELEMENTS;
    use crate::request::{Budget, BudgetConfig, MAX_NAME_BYTES, PredictionId, Timings};
    use crate::tensor::{Shape, Tensor, strings};

    fn input(datatype: &str, shape: &[i64]) -> InferInputTensor {
        let (name, datatype) = ("x".into(), datatype.into());
        InferInputTensor { name, datatype, shape: shape.to_vec(), ..Default::default() }
    }

    fn infer(inputs: Vec<InferInputTensor>, raw: Vec<Bytes>) -> ModelInferRequest {
        ModelInferRequest { model_name: "m".into(), inputs, raw_input_contents: raw, ..Default::default() }
    }

    fn reason(message: ModelInferRequest) -> String {
        request(message).unwrap_err().message().to_string()
    }

    #[test]
    fn names_and_strings_are_bounded() {
        let long = |n| "n".repeat(n);
        let named = |name: String| infer(vec![InferInputTensor { name, ..input("FP32", &[0]) }], vec![Bytes::new()]);
        let with_id = |id| ModelInferRequest { id, ..infer(vec![], vec![]) };
        let with_model = |model_name| ModelInferRequest { model_name, ..infer(vec![], vec![]) };
        let with_output = |name| {
            let outputs = vec![InferRequestedOutputTensor { name, ..Default::default() }];
            ModelInferRequest { outputs, ..infer(vec![], vec![]) }
        };
        for make in [&named as &dyn Fn(String) -> ModelInferRequest, &with_id, &with_model, &with_output] {
            assert!(request(make(long(MAX_NAME_BYTES))).is_ok());
            assert_eq!(request(make(long(MAX_NAME_BYTES + 1))).unwrap_err().kind(), Kind::InvalidInput);
        }
        let strings = |n: usize| {
            let shape = i64::try_from(n).unwrap();
            request(infer(vec![input("BYTES", &[shape])], vec![vec![0; n * strings::PREFIX].into()])).map(|_| ())
        };
        let parameter = |name: String| with_parameter(&name, ParameterChoice::Int64Param(1));
        assert!(request(parameter(long(MAX_NAME_BYTES))).is_ok());
        assert_eq!(request(parameter(long(MAX_NAME_BYTES + 1))).unwrap_err().kind(), Kind::InvalidInput);
        assert!(strings(MAX_STRING_ELEMENTS).is_ok());
        assert_eq!(strings(MAX_STRING_ELEMENTS + 1).unwrap_err().kind(), Kind::TooLarge);
    }

    fn with_parameter(name: &str, choice: ParameterChoice) -> ModelInferRequest {
        let parameter = InferParameter { parameter_choice: Some(choice) };
        ModelInferRequest { parameters: Parameters::from([(name.into(), parameter)]), ..infer(vec![], vec![]) }
    }

    #[test]
    fn priority_and_timeout_come_as_either_integer() {
        for choice in [ParameterChoice::Int64Param(3), ParameterChoice::Uint64Param(3)] {
            let request = |name| request(with_parameter(name, choice.clone())).unwrap();
            assert_eq!(request("priority").priority, Priority::from_wire(3));
            assert_eq!(request("timeout").timeout, Some(Duration::from_micros(3)));
        }
        assert_eq!(request(with_parameter("timeout", ParameterChoice::Int64Param(0))).unwrap().timeout, None);
        for choice in [
            ParameterChoice::Int64Param(-1),
            ParameterChoice::StringParam("3".into()),
            ParameterChoice::DoubleParam(3.0),
            ParameterChoice::BoolParam(true),
        ] {
            assert_eq!(request(with_parameter("timeout", choice)).unwrap_err().kind(), Kind::InvalidInput);
        }
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name_and_the_rest_ignored() {
        let kind = |name, choice| request(with_parameter(name, choice)).map(|_| ()).map_err(|error| error.kind());
        let unsupported = Err(Kind::Unsupported);
        assert_eq!(kind("sequence_id", ParameterChoice::Int64Param(7)), unsupported);
        assert_eq!(kind("sequence_id", ParameterChoice::StringParam("s".into())), unsupported);
        assert_eq!(kind("sequence_start", ParameterChoice::BoolParam(true)), unsupported);
        assert_eq!(kind("sequence_id", ParameterChoice::Int64Param(0)), Ok(()));
        assert_eq!(kind("sequence_end", ParameterChoice::BoolParam(false)), Ok(()));
        assert_eq!(kind("binary_data_output", ParameterChoice::BoolParam(true)), Ok(()));
        assert_eq!(kind("anything", ParameterChoice::DoubleParam(f64::NAN)), Ok(()));

        let three = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(3)) };
        let region = InferParameter { parameter_choice: Some(ParameterChoice::StringParam("r".into())) };
        let output = |name: &str, parameter: &InferParameter| {
            let parameters = Parameters::from([(name.to_string(), parameter.clone())]);
            let outputs = vec![InferRequestedOutputTensor { name: "y".into(), parameters }];
            ModelInferRequest { outputs, ..infer(vec![], vec![]) }
        };
        let classified = |parameter| classes(&output("classification", parameter).outputs).map(|_| ());
        assert_eq!(classified(&three), Ok(()));
        assert_eq!(classified(&region).unwrap_err().kind(), Kind::InvalidInput);
        assert!(reason(output("shared_memory_region", &region)).contains("`shared_memory_region`"));
        assert!(request(output("binary_data", &three)).is_ok());
        let mut shared = input("FP32", &[1]);
        shared.parameters = Parameters::from([("shared_memory_region".into(), region)]);
        assert_eq!(request(infer(vec![shared], vec![])).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn versions() {
        let version = |text| model("m".into(), text).map(|model| model.version).map_err(|error| error.kind());
        assert_eq!((version(""), version("-1")), (Ok(None), Ok(None)));
        assert_eq!(version("2"), Ok(VersionId::new(2)));
        for bad in ["0", "01", "v1", "-2", "99999999999999999999"] {
            assert_eq!(version(bad), Err(Kind::InvalidInput), "{bad}");
        }
    }

    #[test]
    fn answers_share_their_tensors_memory() {
        let tensor = Tensor::from_vec(Shape::new([1, 2]).unwrap(), vec![1f32, 2.0]).unwrap();
        let budget = Budget::new(BudgetConfig::default());
        let (message, permit) = response(InferResponse {
            id: "7".into(),
            prediction: PredictionId(1),
            model: "m".into(),
            version: VersionId::new(3).unwrap(),
            digest: "sha256:ab".into(),
            outputs: vec![NamedTensor { name: "y".into(), tensor: tensor.clone() }],
            labels: vec![None],
            batched: true,
            timings: Timings::default(),
            permit: budget.admit(0, Instant::now()).unwrap(),
        });
        assert_eq!(message.raw_output_contents[0].as_ptr(), tensor.data().as_ptr());
        assert_eq!((&*message.id, &*message.model_name, &*message.model_version), ("7", "m", "3"));
        assert_eq!((&*message.outputs[0].datatype, &message.outputs[0].shape[..]), ("FP32", &[1, 2][..]));
        assert_eq!(message.parameters["model_digest"], string_parameter("sha256:ab".into()));
        assert_eq!(message.parameters["prediction_id"], string_parameter(PredictionId(1).to_string()));
        drop(permit);
        assert_eq!(budget.requests(), 0);
    }
}
