//! The protocol over HTTP/1.1, with the binary tensor extension.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::response::Parts;
use http::{HeaderMap, Method};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio::net::TcpStream;

use super::request::Request;
use super::{Address, Answer, Failure, MAX_ANSWER_BYTES, ModelMetadata};
use crate::cli::summary::segment;
use crate::protocol::rest::Flat;
use crate::tensor::json::{Data, NotFinite};
use crate::tensor::{DataType, Shape, Tensor};

pub(in crate::cli) const HEADER_LENGTH: &str = "inference-header-content-length";

pub(in crate::cli) struct Rest {
    connection: SendRequest<Full<Bytes>>,
    address: Address,
    timeout: Option<Duration>,
}

impl Rest {
    pub(in crate::cli) async fn start(
        stream: TcpStream,
        address: Address,
        timeout: Option<Duration>,
    ) -> Result<Rest, Failure> {
        let (connection, running) = handshake(TokioIo::new(stream)).await.map_err(|error| address.broke(&error))?;
        // How it ends, the call that it breaks off tells.
        tokio::spawn(running);
        Ok(Rest { connection, address, timeout })
    }

    pub(in crate::cli) async fn model(&mut self, name: &str, version: &str) -> Result<ModelMetadata, Failure> {
        let (_, body) = self.call(Method::GET, &path(name, version), HeaderMap::new(), Bytes::new()).await?;
        serde_json::from_slice(&body).map_err(|error| self.address.unreadable(error))
    }

    pub(in crate::cli) async fn infer(
        &mut self,
        name: &str,
        version: &str,
        request: Request,
    ) -> Result<Answer, Failure> {
        let (head, body) = written(&request);
        let mut headers = HeaderMap::new();
        headers.insert(HEADER_LENGTH, head.into());
        headers.insert(CONTENT_TYPE, http::HeaderValue::from_static("application/octet-stream"));
        if let Some(timeout) = self.timeout {
            // Rounded up: 0 would be no limit.
            let millis = u64::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
            headers.insert("x-request-timeout", millis.into());
        }
        let path = format!("{}/infer", path(name, version));
        let (head, body) = self.call(Method::POST, &path, headers, body.into()).await?;
        let timing = header(&head.headers, "server-timing").map(String::from);
        read(header(&head.headers, HEADER_LENGTH), timing, body).map_err(|why| self.address.unreadable(why))
    }

    async fn call(
        &mut self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<(Parts, Bytes), Failure> {
        let request = http::Request::builder().method(method).uri(path).header(HOST, self.address.authority());
        let mut request = request.body(Full::new(body)).map_err(|error| Failure::Usage(error.into()))?;
        request.headers_mut().extend(headers);
        let broke = |error: hyper::Error| self.address.broke(&error);
        self.connection.ready().await.map_err(broke)?;
        let (head, body) = self.connection.send_request(request).await.map_err(broke)?.into_parts();
        let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await.map_err(|error| self.address.broke(&*error))?;
        let body = body.to_bytes();
        if head.status.is_success() { Ok((head, body)) } else { Err(self.refusal(&head, &body)) }
    }

    fn refusal(&self, head: &Parts, body: &[u8]) -> Failure {
        #[derive(Deserialize)]
        struct Body {
            error: String,
        }
        let message = match serde_json::from_slice::<Body>(body) {
            Ok(body) => body.error,
            Err(_) => String::from_utf8_lossy(body).trim().to_string(),
        };
        self.address.refused(&head.status.to_string(), &message, header(&head.headers, "x-prediction-id"))
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// A model's place below the server's root.
pub(in crate::cli) fn path(model: &str, version: &str) -> String {
    let model = segment(model);
    if version.is_empty() {
        format!("/v2/models/{model}")
    } else {
        format!("/v2/models/{model}/versions/{}", segment(version))
    }
}

/// The body with all data as JSON, and the same asked for of the answer.
pub(in crate::cli) fn written_as_json(request: &Request) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Serialize)]
    struct Written<'a> {
        #[serde(skip_serializing_if = "str::is_empty")]
        id: &'a str,
        #[serde(skip_serializing_if = "Map::is_empty")]
        parameters: &'a Map<String, Value>,
        inputs: Vec<WrittenInput<'a>>,
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        outputs: &'a [super::request::Output],
    }
    #[derive(Serialize)]
    struct WrittenInput<'a> {
        name: &'a str,
        datatype: &'static str,
        shape: &'a [usize],
        #[serde(skip_serializing_if = "Map::is_empty")]
        parameters: &'a Map<String, Value>,
        data: Flat<'a>,
    }
    let inputs = request.inputs.iter().map(|input| WrittenInput {
        name: &input.name,
        datatype: input.tensor.dtype().name(),
        shape: input.tensor.shape().dims(),
        parameters: &input.parameters,
        data: Flat(&input.tensor),
    });
    serde_json::to_vec(&Written {
        id: &request.id,
        parameters: &request.parameters,
        inputs: inputs.collect(),
        outputs: &request.outputs,
    })
}

/// The body with binary data, and how many bytes of it are JSON.
pub(in crate::cli) fn written(request: &Request) -> (usize, Vec<u8>) {
    let with = |parameters: &Map<String, Value>, name: &str, value: Value| {
        let mut parameters = parameters.clone();
        parameters.insert(name.into(), value);
        parameters
    };
    let inputs: Vec<Value> = request
        .inputs
        .iter()
        .map(|input| {
            let tensor = &input.tensor;
            json!({
                "name": input.name,
                "datatype": tensor.dtype().name(),
                "shape": tensor.shape().dims(),
                "parameters": with(&input.parameters, "binary_data_size", tensor.data().len().into()),
            })
        })
        .collect();
    let mut head =
        json!({"inputs": inputs, "parameters": with(&request.parameters, "binary_data_output", true.into())});
    if !request.id.is_empty() {
        head["id"] = request.id.as_str().into();
    }
    if !request.outputs.is_empty() {
        let output = |output: &super::request::Output| json!({"name": output.name, "parameters": output.parameters});
        head["outputs"] = request.outputs.iter().map(output).collect();
    }
    let mut body = head.to_string().into_bytes();
    let length = body.len();
    for input in &request.inputs {
        body.extend_from_slice(input.tensor.data());
    }
    (length, body)
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(default)]
    id: String,
    model_name: String,
    #[serde(default)]
    model_version: String,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(borrow)]
    outputs: Vec<Output<'a>>,
}

#[derive(Deserialize)]
struct Output<'a> {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    #[serde(default)]
    parameters: Map<String, Value>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

/// An answer from its body, and the header that says how much of it is JSON.
pub(in crate::cli) fn read(length: Option<&str>, timing: Option<String>, body: Bytes) -> Result<Answer, String> {
    let length = match length {
        None => body.len(),
        Some(length) => length.parse().ok().filter(|length| *length <= body.len()).ok_or("its JSON is cut short")?,
    };
    let (head, mut tail) = (body.slice(..length), body.slice(length..));
    let head: Body = serde_json::from_slice(&head).map_err(|error| error.to_string())?;
    let mut outputs = Vec::with_capacity(head.outputs.len());
    for output in head.outputs {
        let tensor = tensor(&output, &mut tail).map_err(|why| format!("output `{}`: {why}", output.name))?;
        outputs.push((output.name, tensor));
    }
    Ok(Answer {
        id: head.id,
        model: head.model_name,
        version: head.model_version,
        parameters: head.parameters,
        outputs,
        timing,
    })
}

/// From the binary tail, or from JSON where the server, or the request, chose that.
fn tensor(output: &Output, tail: &mut Bytes) -> Result<Tensor, String> {
    let dtype = DataType::parse(&output.datatype).ok_or_else(|| format!("its datatype is {}", output.datatype))?;
    let shape = Shape::from_wire(&output.shape).map_err(|error| error.to_string())?;
    if let Some(size) = output.parameters.get("binary_data_size").and_then(Value::as_u64) {
        let size = usize::try_from(size).ok().filter(|size| *size <= tail.len()).ok_or("its data is cut short")?;
        return Tensor::new(dtype, shape, tail.split_to(size)).map_err(|error| error.to_string());
    }
    let text = output.data.ok_or("it has no data")?.get();
    Data::new(dtype, shape, text).and_then(|data| data.read(NotFinite::Named)).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_binary_and_as_json() {
        let json = r#"{"model_name":"m","outputs":[
            {"name":"a","datatype":"INT16","shape":[2],"parameters":{"binary_data_size":4}},
            {"name":"b","datatype":"FP32","shape":[1,2],"data":[1.5,2]}]}"#;
        let length = json.len().to_string();
        let answer = |tail: &[u8]| read(Some(&length), None, [json.as_bytes(), tail].concat().into());
        let answer_whole = answer(&[1, 0, 2, 0]).unwrap();
        assert_eq!(answer_whole.outputs[0].1.to_vec::<i16>(), Some(vec![1, 2]));
        assert_eq!(answer_whole.outputs[1].1.to_vec::<f32>(), Some(vec![1.5, 2.0]));
        assert_eq!(answer(&[1, 0, 2]).unwrap_err(), "output `a`: its data is cut short");
        assert!(read(Some(&(json.len() + 9).to_string()), None, json.as_bytes().into()).is_err());
    }
}
