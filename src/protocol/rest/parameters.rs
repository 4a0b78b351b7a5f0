//! The `parameters` objects of a request, its inputs and its requested outputs.
//!
//! Unknown parameters are ignored, `triton_*` ones among them, so that no caller can forge what a server adds. Those
//! that would change what a request means and are not offered are refused where they are switched on.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::json::malformed;
use crate::error::{Error, Quoted, Result, quoted};
use crate::protocol::common::{MAX_PARAMETERS, check_parameter, load_config, too_many};
use crate::request::Priority;

/// All parameters of a request, an input or an output, as JSON text.
const MAX_TEXT_BYTES: usize = 256 << 10;

#[derive(Debug, Default, PartialEq)]
pub(super) struct OfRequest {
    /// `timeout` in microseconds; 0 is none.
    pub timeout: Option<Duration>,
    pub priority: Priority,
    /// Whether outputs that don't say otherwise are returned as binary.
    pub binary_data_output: bool,
}

pub(super) fn of_request(raw: Option<&RawValue>) -> Result<OfRequest> {
    let mut found = OfRequest::default();
    each(raw, Owner::Request, |key, value| {
        match key {
            "timeout" => {
                let micros = value.uint().ok_or_else(|| expected(key, Owner::Request, "microseconds, 0 or more"))?;
                found.timeout = (micros > 0).then(|| Duration::from_micros(micros));
            }
            "priority" => {
                let priority =
                    value.uint().ok_or_else(|| expected(key, Owner::Request, "a number from 0 to 2^64-1"))?;
                found.priority = Priority::from_wire(priority);
            }
            "binary_data_output" => {
                found.binary_data_output =
                    value.flag().ok_or_else(|| expected(key, Owner::Request, "true or false"))?;
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(found)
}

/// The input's `binary_data_size`.
pub(super) fn of_input(raw: Option<&RawValue>, input: &str) -> Result<Option<u64>> {
    let mut size = None;
    let owner = Owner::Input(Quoted(input));
    each(raw, owner, |key, value| {
        if key == "binary_data_size" {
            size = Some(value.uint().ok_or_else(|| expected(key, owner, "a number of bytes"))?);
        }
        Ok(())
    })?;
    Ok(size)
}

/// How one output is wanted.
#[derive(Debug, Default, PartialEq)]
pub(super) struct OfOutput {
    /// `binary_data`; `None` for the request's default.
    pub binary: Option<bool>,
    /// `classification`: by so many of its best classes; 0 as it is.
    pub classes: u64,
}

pub(super) fn of_output(raw: Option<&RawValue>, output: &str) -> Result<OfOutput> {
    let mut found = OfOutput::default();
    let owner = Owner::Output(Quoted(output));
    each(raw, owner, |key, value| {
        match key {
            "binary_data" => {
                found.binary = Some(value.flag().ok_or_else(|| expected(key, owner, "true or false"))?);
            }
            "classification" => {
                found.classes = value.uint().ok_or_else(|| expected(key, owner, "a number of classes, 0 or more"))?;
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(found)
}

/// The settings in a request to load a model.
pub(super) fn of_load(raw: Option<&RawValue>) -> Result<Option<String>> {
    let mut config = None;
    each(raw, Owner::Request, |key, value| {
        config = Some(load_config(key, if let Value::Text(text) = value { Some(text) } else { None })?);
        Ok(())
    })?;
    Ok(config)
}

/// Whose parameters they are, for messages.
#[derive(Clone, Copy)]
enum Owner<'a> {
    Request,
    Input(Quoted<'a>),
    Output(Quoted<'a>),
}

impl fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Request => f.write_str("the request"),
            Owner::Input(name) => write!(f, "input '{name}'"),
            Owner::Output(name) => write!(f, "output '{name}'"),
        }
    }
}

fn expected(key: &str, owner: Owner<'_>, expected: &str) -> Error {
    Error::invalid(format!("parameter `{key}` of {owner} is not as expected: {expected}"))
}

fn each(raw: Option<&RawValue>, owner: Owner<'_>, mut visit: impl FnMut(&str, &Value) -> Result<()>) -> Result<()> {
    let Some(raw) = raw else { return Ok(()) };
    if raw.get().len() > MAX_TEXT_BYTES {
        return Err(Error::invalid(format!("the parameters of {owner} are longer than {MAX_TEXT_BYTES} bytes")));
    }
    let Entries(entries) = serde_json::from_str(raw.get()).map_err(malformed)?;
    if entries.len() > MAX_PARAMETERS {
        return Err(Error::invalid(too_many(MAX_PARAMETERS, &format!("parameters of {owner}"))));
    }
    let mut seen: Vec<&str> = Vec::with_capacity(entries.len());
    for (key, value) in &entries {
        if seen.contains(&&**key) {
            return Err(Error::invalid(format!("parameter `{}` of {owner} is given more than once", quoted(key))));
        }
        seen.push(key);
        check_parameter(key, value.is_off(), owner)?;
        visit(key, value)?;
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
enum Value {
    Bool(bool),
    Uint(u64),
    /// Negative, fractional or beyond 64 bits: nothing that a parameter here wants.
    Number,
    Text(String),
}

impl Value {
    fn uint(&self) -> Option<u64> {
        if let Value::Uint(value) = self { Some(*value) } else { None }
    }

    fn flag(&self) -> Option<bool> {
        if let Value::Bool(value) = self { Some(*value) } else { None }
    }

    /// Says the same as being absent.
    fn is_off(&self) -> bool {
        match self {
            Value::Bool(on) => !on,
            Value::Uint(number) => *number == 0,
            Value::Number => false,
            Value::Text(text) => text.is_empty(),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        struct OfValue;
        impl Visitor<'_> for OfValue {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a number or a boolean")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Uint(value))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
                Ok(Value::Number)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
                Ok(Value::Number)
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_string()))
            }
        }
        deserializer.deserialize_any(OfValue)
    }
}

/// In the order sent, repeated keys included; one more than there may be, at most.
struct Entries<'a>(Vec<(Cow<'a, str>, Value)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfEntries;
        impl<'de> Visitor<'de> for OfEntries {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of parameters")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    if entries.len() > MAX_PARAMETERS {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let value =
                        map.next_value().map_err(|error| A::Error::custom(format_args!("parameter: {error}")))?;
                    entries.push((key, value));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(OfEntries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_string()).unwrap()
    }

    fn request(text: &str) -> Result<OfRequest> {
        of_request(Some(&raw(text)))
    }

    #[test]
    fn known_parameters_are_read() {
        let found = request(r#"{"timeout":1500,"priority":1,"binary_data_output":true,"triton_x":"y","other":1.5}"#);
        let expected = OfRequest {
            timeout: Some(Duration::from_micros(1500)),
            priority: Priority::from_wire(1),
            binary_data_output: true,
        };
        assert_eq!(found.unwrap(), expected);
        assert_eq!(request(r#"{"timeout":0,"priority":0}"#).unwrap(), OfRequest::default());
        assert_eq!(of_request(None).unwrap(), OfRequest::default());
        let size = of_input(Some(&raw(r#"{"binary_data_size":18446744073709551615}"#)), "x");
        assert_eq!(size.unwrap(), Some(u64::MAX));
        let output = of_output(Some(&raw(r#"{"binary_data":false,"classification":3}"#)), "y");
        assert_eq!(output.unwrap(), OfOutput { binary: Some(false), classes: 3 });
        assert_eq!(of_output(Some(&raw(r#"{"classification":0}"#)), "y").unwrap(), OfOutput::default());
    }

    #[test]
    fn bad_values_are_refused() {
        for text in [
            r#"{"timeout":-1}"#,
            r#"{"timeout":1.5}"#,
            r#"{"timeout":"1"}"#,
            r#"{"timeout":18446744073709551616}"#,
            r#"{"priority":true}"#,
            r#"{"binary_data_output":1}"#,
            r#"{"timeout":1,"timeout":2}"#,
            r#"{"other":null}"#,
            r#"{"other":[1]}"#,
            r#"{"other":{"a":1}}"#,
            r#"[]"#,
            r#""x""#,
        ] {
            assert_eq!(request(text).unwrap_err().kind(), Kind::InvalidInput, "{text}");
        }
        for text in ["-1", "1.0", "\"1\"", "true", "18446744073709551616"] {
            assert!(of_output(Some(&raw(&format!(r#"{{"classification":{text}}}"#))), "y").is_err(), "{text}");
            let parameters = raw(&format!(r#"{{"binary_data_size":{text}}}"#));
            assert!(of_input(Some(&parameters), "x").is_err(), "{text}");
        }
    }

    #[test]
    fn extensions_not_offered_are_named_where_switched_on() {
        for (on, name) in [
            (r#"{"sequence_id":42}"#, "sequence_id"),
            (r#"{"sequence_id":"a"}"#, "sequence_id"),
            (r#"{"sequence_start":true}"#, "sequence_start"),
            (r#"{"shared_memory_region":"r"}"#, "shared_memory_region"),
        ] {
            let error = request(on).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.message().contains(name), "{}", error.message());
        }
        request(r#"{"sequence_id":0,"sequence_start":false,"shared_memory_region":""}"#).unwrap();
    }

    #[test]
    fn counts_and_lengths_are_bounded() {
        let many = |n: usize| {
            let entries: Vec<String> = (0..n).map(|i| format!("\"p{i}\":0")).collect();
            format!("{{{}}}", entries.join(","))
        };

        request(&many(MAX_PARAMETERS)).unwrap();
        assert!(request(&many(MAX_PARAMETERS + 1)).is_err());
        assert!(request(&format!(r#"{{"{}":0}}"#, "k".repeat(257))).is_err());
        assert!(request(&format!(r#"{{"k":"{}"}}"#, "v".repeat(MAX_TEXT_BYTES))).is_err());
    }
}
