//! The protocol over gRPC: the generated client on a plain HTTP/2 connection.

use std::collections::HashMap;
use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use serde_json::{Map, Value};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tower::Service;

use super::request::Request;
use super::{Address, Answer, Failure, MAX_ANSWER_BYTES, ModelMetadata, TensorMetadata};
use crate::error::visible;
use crate::protocol::grpc::proto;
use crate::tensor::{DataType, Shape, Tensor};
use proto::grpc_inference_service_client::GrpcInferenceServiceClient;
use proto::infer_parameter::ParameterChoice;
use proto::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use proto::model_infer_response::InferOutputTensor;
use proto::{InferParameter, ModelInferRequest, ModelInferResponse, ModelMetadataRequest};

/// Bytes in front of a message: whether it is compressed, and its length.
const MESSAGE_HEAD: usize = 5;

pub(in crate::cli) struct Grpc {
    client: GrpcInferenceServiceClient<Http2>,
    address: Address,
    timeout: Option<Duration>,
}

/// One connection for one call after the other: all that tonic needs of a transport.
struct Http2(SendRequest<Body>);

type AnyError = Box<dyn Error + Send + Sync>;

impl Service<http::Request<Body>> for Http2 {
    type Response = http::Response<Incoming>;
    type Error = AnyError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let answer = self.0.send_request(request);
        Box::pin(async { grpc_only(answer.await?) })
    }
}

/// Refuses what another kind of server says over HTTP/2, of which tonic would make a status of this one.
fn grpc_only(answer: http::Response<Incoming>) -> Result<http::Response<Incoming>, AnyError> {
    let media = answer.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if media.starts_with("application/grpc") {
        return Ok(answer);
    }
    Err(format!("HTTP status {} and the content type `{}`, expected gRPC", answer.status(), visible(media)).into())
}

impl Grpc {
    pub(in crate::cli) async fn start(
        stream: TcpStream,
        address: Address,
        timeout: Option<Duration>,
    ) -> Result<Grpc, Failure> {
        let started = handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (connection, running) = started.map_err(|error| address.broke(&error))?;
        // How it ends, the call that it breaks off tells.
        tokio::spawn(running);
        let client = GrpcInferenceServiceClient::with_origin(Http2(connection), address.origin()?)
            .max_decoding_message_size(MAX_ANSWER_BYTES);
        Ok(Grpc { client, address, timeout })
    }

    pub(in crate::cli) async fn model(&mut self, name: &str, version: &str) -> Result<ModelMetadata, Failure> {
        let query = ModelMetadataRequest { name: name.into(), version: version.into() };
        let reply = self.client.model_metadata(query).await.map_err(|status| self.failed(&status))?.into_inner();
        let tensor = |tensor: proto::model_metadata_response::TensorMetadata| TensorMetadata {
            name: tensor.name,
            datatype: tensor.datatype,
            shape: tensor.shape,
        };
        Ok(ModelMetadata {
            name: reply.name,
            versions: reply.versions,
            platform: reply.platform,
            inputs: reply.inputs.into_iter().map(tensor).collect(),
            outputs: reply.outputs.into_iter().map(tensor).collect(),
            properties: reply.properties.into_iter().collect(),
        })
    }

    pub(in crate::cli) async fn infer(
        &mut self,
        name: &str,
        version: &str,
        request: Request,
    ) -> Result<Answer, Failure> {
        let mut request = tonic::Request::new(message(name, version, request)?);
        if let Some(timeout) = self.timeout {
            request.set_timeout(timeout);
        }
        let reply = self.client.model_infer(request).await.map_err(|status| self.failed(&status))?;
        let timing = text(reply.metadata(), "server-timing").map(String::from);
        answer(reply.into_inner(), timing).map_err(|why| self.address.unreadable(why))
    }

    /// A status that has a cause was made here, of a connection that broke.
    fn failed(&self, status: &Status) -> Failure {
        match status.source() {
            Some(cause) => self.address.broke(cause),
            None => {
                let prediction = text(status.metadata(), "x-prediction-id");
                self.address.refused(&code_name(status.code()), status.message(), prediction)
            }
        }
    }
}

fn text<'a>(metadata: &'a MetadataMap, name: &str) -> Option<&'a str> {
    metadata.get(name).and_then(|value| value.to_str().ok())
}

/// As gRPC's documents write it: `INVALID_ARGUMENT`.
pub(in crate::cli) fn code_name(code: Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

/// A call's whole body: the message behind its length.
pub(in crate::cli) fn written(name: &str, version: &str, request: Request) -> Result<Bytes> {
    let message = message(name, version, request)?;
    let mut body = BytesMut::with_capacity(MESSAGE_HEAD + message.encoded_len());
    body.put_u8(0);
    body.put_u32(u32::try_from(message.encoded_len()).context("the request is over 4 GiB")?);
    message.encode(&mut body)?;
    Ok(body.freeze())
}

/// The same of an answer. One that is compressed is refused: nobody asked for that.
pub(in crate::cli) fn read(mut body: Bytes) -> Result<Answer, String> {
    if body.len() < MESSAGE_HEAD || body.get_u8() != 0 || body.get_u32() as usize != body.len() {
        return Err("it is not one whole message".into());
    }
    answer(ModelInferResponse::decode(body).map_err(|error| error.to_string())?, None)
}

fn message(name: &str, version: &str, request: Request) -> Result<ModelInferRequest> {
    let (mut inputs, mut raw) = (Vec::new(), Vec::new());
    for input in request.inputs {
        inputs.push(InferInputTensor {
            name: input.name,
            datatype: input.tensor.dtype().name().into(),
            shape: input.tensor.shape().to_wire(),
            parameters: parameters(input.parameters)?,
            contents: None,
        });
        raw.push(input.tensor.data().clone());
    }
    let mut outputs = Vec::new();
    for output in request.outputs {
        outputs.push(InferRequestedOutputTensor { name: output.name, parameters: parameters(output.parameters)? });
    }
    Ok(ModelInferRequest {
        model_name: name.into(),
        model_version: version.into(),
        id: request.id,
        parameters: parameters(request.parameters)?,
        inputs,
        outputs,
        raw_input_contents: raw,
    })
}

fn parameters(given: Map<String, Value>) -> Result<HashMap<String, InferParameter>> {
    given.into_iter().map(|(name, value)| Ok((name.clone(), parameter(&name, value)?))).collect()
}

fn parameter(name: &str, value: Value) -> Result<InferParameter> {
    let choice = match value {
        Value::Bool(value) => ParameterChoice::BoolParam(value),
        Value::String(value) => ParameterChoice::StringParam(value),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), ..) => ParameterChoice::Int64Param(value),
            (_, Some(value), _) => ParameterChoice::Uint64Param(value),
            (.., value) => ParameterChoice::DoubleParam(value.unwrap_or(f64::NAN)),
        },
        Value::Null | Value::Array(_) | Value::Object(_) => {
            bail!("parameter `{name}` cannot be sent over gRPC, expected a boolean, a number or a string")
        }
    };
    Ok(InferParameter { parameter_choice: Some(choice) })
}

fn answer(reply: ModelInferResponse, timing: Option<String>) -> Result<Answer, String> {
    let ModelInferResponse { model_name, model_version, id, parameters, outputs, raw_output_contents } = reply;
    if raw_output_contents.len() != outputs.len() {
        let found = raw_output_contents.len();
        return Err(format!("it has {found} entries in raw_output_contents for {} outputs", outputs.len()));
    }
    let value = |parameter: InferParameter| match parameter.parameter_choice {
        None => Value::Null,
        Some(ParameterChoice::BoolParam(value)) => value.into(),
        Some(ParameterChoice::Int64Param(value)) => value.into(),
        Some(ParameterChoice::Uint64Param(value)) => value.into(),
        Some(ParameterChoice::DoubleParam(value)) => value.into(),
        Some(ParameterChoice::StringParam(value)) => value.into(),
    };
    let outputs = outputs.into_iter().zip(raw_output_contents).map(|(output, data)| {
        let tensor = tensor(&output, data).map_err(|why| format!("output `{}`: {why}", output.name))?;
        Ok((output.name, tensor))
    });
    Ok(Answer {
        id,
        model: model_name,
        version: model_version,
        parameters: parameters.into_iter().map(|(name, parameter)| (name, value(parameter))).collect(),
        outputs: outputs.collect::<Result<_, String>>()?,
        timing,
    })
}

fn tensor(output: &InferOutputTensor, data: Bytes) -> Result<Tensor, String> {
    let dtype = DataType::parse(&output.datatype).ok_or_else(|| format!("its datatype is {}", output.datatype))?;
    let shape = Shape::from_wire(&output.shape).map_err(|error| error.to_string())?;
    Tensor::new(dtype, shape, data).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_named_as_in_the_documents() {
        assert_eq!(code_name(Code::InvalidArgument), "INVALID_ARGUMENT");
        assert_eq!(code_name(Code::Unavailable), "UNAVAILABLE");
    }

    #[test]
    fn parameters_keep_their_kind() {
        let of = |value: Value| parameter("p", value).ok().and_then(|parameter| parameter.parameter_choice);
        assert_eq!(of(true.into()), Some(ParameterChoice::BoolParam(true)));
        assert_eq!(of((-1).into()), Some(ParameterChoice::Int64Param(-1)));
        assert_eq!(of(u64::MAX.into()), Some(ParameterChoice::Uint64Param(u64::MAX)));
        assert_eq!(of(0.5.into()), Some(ParameterChoice::DoubleParam(0.5)));
        assert_eq!(of("a".into()), Some(ParameterChoice::StringParam("a".into())));
        assert_eq!(of(Value::Null), None);
    }
}
