//! The JSON of an infer request, and with it the whole request body: names, shapes, parameters, and where each input's
//! elements are.
//!
//! One pass finds the fields and leaves each `data` as text; a second reads that text straight into a typed buffer once
//! shape and datatype are known, in whatever order the fields came. The JSON parser of the first is spared arrays of
//! numbers, which the second checks, too (`outline`). Bounded before anything is allocated for it: nesting, the number of
//! inputs, outputs, parameters and dimensions, and every tensor's bytes.

use serde::de::DeserializeSeed;

use super::binary::{self, Tail};
use super::envelope::{Body, Dims, Input, Object, OfBody, Output};
use super::outline::{LOOKED_THROUGH, Outline, holds};
use super::parameters::{self, OfOutput, OfRequest};
use super::{Config, data};
use crate::error::{Error, Quoted, Result, quoted};
use crate::protocol::common::{self, Strings, check_length};
use crate::request::{NamedTensor, Permit};
use crate::tensor::Shape;

/// An infer request's body.
#[derive(Debug)]
pub(super) struct Parsed {
    pub id: String,
    pub parameters: OfRequest,
    pub inputs: Vec<NamedTensor>,
    /// Empty for all outputs.
    pub outputs: Vec<Requested>,
}

#[derive(Debug, PartialEq)]
pub(super) struct Requested {
    pub name: String,
    pub how: OfOutput,
}

/// Reads the JSON part and the binary tensors after it. `model` is for messages.
pub(super) fn parse(model: &str, json: &[u8], tail: Tail, config: &Config, permit: &mut Permit) -> Result<Parsed> {
    let text = std::str::from_utf8(json)
        .map_err(|error| Error::invalid(format!("the request JSON is not UTF-8 at byte {}", error.valid_up_to())))?;
    check_depth(text, config.max_json_depth)?;
    let outline = Outline::of(text);
    // What is wrong with the JSON, and where, is told by the parser of all of it, before what is wrong with the request.
    let Some(body) = outline.as_ref().and_then(of_outline) else {
        return tensors(model, envelope(text)?, None, tail, config, permit);
    };
    tensors(model, body, outline.as_ref(), tail, config, permit).map_err(|error| envelope(text).err().unwrap_or(error))
}

fn envelope(text: &str) -> Result<Body<'_>> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let body = OfBody.deserialize(&mut deserializer).map_err(malformed)?;
    deserializer.end().map_err(malformed)?;
    Ok(body)
}

/// `None` where the parser has to see all of the text: nobody else would look at an array that is no input's.
fn of_outline<'a>(outline: &'a Outline<'_>) -> Option<Body<'a>> {
    let body = envelope(&outline.text).ok()?;
    let read = body.inputs.iter().filter_map(|Object(input)| outline.array(input.data?.get())).count();
    (read == outline.arrays()).then_some(body)
}

fn tensors(
    model: &str,
    body: Body,
    outline: Option<&Outline>,
    tail: Tail,
    config: &Config,
    permit: &mut Permit,
) -> Result<Parsed> {
    check_length("the request id", &body.id)?;
    let parameters = parameters::of_request(body.parameters)?;
    let mut inputs = Inputs { outline, tail, strings: Strings::default(), left: config.max_body_bytes, permit };
    let tensors = body.inputs.into_iter().map(|Object(input)| inputs.read(input)).collect::<Result<_>>()?;
    inputs.tail.finish(model)?;
    let outputs = body.outputs.into_iter().map(|Object(output)| read_output(output)).collect::<Result<_>>()?;
    Ok(Parsed { id: body.id.into_owned(), parameters, inputs: tensors, outputs })
}

/// One request's, as they are read.
struct Inputs<'a> {
    outline: Option<&'a Outline<'a>>,
    tail: Tail,
    strings: Strings,
    /// Bytes that tensors written as JSON may still take.
    left: usize,
    permit: &'a mut Permit,
}

impl Inputs<'_> {
    fn read(&mut self, input: Input) -> Result<NamedTensor> {
        let Input { name, datatype, shape: Dims(dims), parameters, data } = input;
        check_length("an input's name", &name)?;
        let shown = Quoted(&name);
        let dtype = common::datatype(shown, &datatype)?;
        let shape = Shape::from_wire(&dims).map_err(|error| Error::invalid(format!("input '{shown}': {error}")))?;
        self.strings.count(dtype, &shape)?;
        let size = parameters::of_input(parameters, &name)?;
        let tensor = match (data, size) {
            (Some(data), None) => {
                let data = data.get();
                let text = self.outline.and_then(|outline| outline.array(data)).unwrap_or(data);
                data::parse(shown, dtype, shape, text, &mut self.left, self.permit)?
            }
            (None, Some(size)) => binary::tensor(shown, dtype, shape, self.tail.take(shown, size)?)?,
            (found, _) => {
                let found = if found.is_some() { "both" } else { "neither" };
                return Err(Error::invalid(format!(
                    "input '{shown}' has {found} of `data` and the parameter `binary_data_size`, expected exactly one"
                )));
            }
        };
        Ok(NamedTensor { name: name.into(), tensor })
    }
}

fn read_output(output: Output) -> Result<Requested> {
    check_length("an output's name", &output.name)?;
    let how = parameters::of_output(output.parameters, &output.name)?;
    Ok(Requested { name: output.name.into_owned(), how })
}

/// Longest message of the JSON parser that is passed on whole: it may quote the client's own text.
const MAX_PARSER_MESSAGE: usize = 120;

/// The JSON parser's complaint, with its line and column, without a long stretch of the client's own bytes.
pub(super) fn malformed(error: serde_json::Error) -> Error {
    let message = error.to_string();
    if message.len() <= MAX_PARSER_MESSAGE {
        return Error::invalid(format!("failed to parse the request JSON: {message}"));
    }
    let (line, column) = (error.line(), error.column());
    let start = quoted(&message);
    Error::invalid(format!("failed to parse the request JSON: {start} at line {line} column {column}"))
}

/// Counted in bytes, which many at a time are added up.
fn brackets(text: &str) -> usize {
    let opens = |byte: u8| u8::from(matches!(byte, b'[' | b'{'));
    // Wraps nowhere in so few bytes, but a check would add them up one by one.
    let count = |part: &[u8]| usize::from(part.iter().fold(0u8, |sum, byte| sum.wrapping_add(opens(*byte))));
    text.as_bytes().chunks(usize::from(u8::MAX)).map(count).sum()
}

/// Refuses nesting deeper than `max` before any parser works, or keeps books, on it.
pub(super) fn check_depth(text: &str, max: usize) -> Result<()> {
    // So few brackets cannot nest deeper, and counting them is many times faster than following them.
    if brackets(text) <= max {
        return Ok(());
    }
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for part in text.as_bytes().chunks(LOOKED_THROUGH) {
        if !escaped && !holds(part, |byte| matches!(byte, b'"' | b'\\' | b'[' | b']' | b'{' | b'}')) {
            continue;
        }
        for byte in part {
            match (byte, in_string) {
                _ if escaped => escaped = false,
                (b'"', _) => in_string = !in_string,
                (b'\\', true) => escaped = true,
                (b'[' | b'{', false) => depth += 1,
                (b']' | b'}', false) => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > max {
                return Err(Error::invalid(format!("the request JSON is nested deeper than {max} levels")));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;
    use crate::protocol::common::{MAX_INPUTS, MAX_OUTPUTS, MAX_STRING_ELEMENTS};
    use crate::request::{Budget, BudgetConfig};

    fn permit() -> Permit {
        Budget::new(BudgetConfig::default()).admit(0, Instant::now()).unwrap()
    }

    fn read(text: impl AsRef<[u8]>) -> Result<Parsed> {
        parse("m", text.as_ref(), Tail::empty(), &Config::default(), &mut permit())
    }

    fn read_split(json: &str, tail: &[u8]) -> Result<Parsed> {
        let body = Bytes::from([json.as_bytes(), tail].concat());
        let (json, tail) = binary::split(body, json.len(), &Config::default()).unwrap();
        parse("m", &json, tail, &Config::default(), &mut permit())
    }

    fn input(fields: &str) -> String {
        format!(r#"{{"inputs":[{{"name":"x",{fields}}}]}}"#)
    }

    fn refused(text: impl AsRef<[u8]>) -> String {
        let error = read(text.as_ref()).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput, "{}", error.message());
        error.message().to_string()
    }

    const FULL: &str = r#"{"id":"a\u0001é","model_name":"other","parameters":{"timeout":5,"binary_data_output":true},
        "inputs":[{"data":[[1,2],[3,4]],"datatype":"INT32","shape":[2,2],"name":"x","other":{"a":[1]}}],
        "outputs":[{"name":"y","parameters":{"binary_data":false}},{"name":"z"}]}"#;

    #[test]
    fn a_full_request_is_read_in_any_order() {
        let parsed = read(FULL).unwrap();
        assert_eq!(parsed.id, "a\u{1}é");
        assert_eq!(parsed.parameters.timeout, Some(Duration::from_micros(5)));
        assert!(parsed.parameters.binary_data_output);
        assert_eq!(parsed.inputs[0].tensor.as_slice::<i32>(), Some(&[1, 2, 3, 4][..]));
        let requested =
            |(name, binary): (&str, _)| Requested { name: name.into(), how: OfOutput { binary, classes: 0 } };
        let outputs = [("y", Some(false)), ("z", None)].map(requested);
        assert_eq!(parsed.outputs, outputs);
        let nulls = read(r#"{"id":null,"parameters":null,"outputs":null,"inputs":[]}"#).unwrap();
        assert_eq!((nulls.id.as_str(), nulls.inputs.len(), nulls.outputs.len()), ("", 0, 0));
    }

    #[test]
    fn bodies_that_are_no_request_are_refused() {
        for text in [
            "",
            "{}",
            "[]",
            "null",
            "\"\"",
            "{",
            "1",
            "{\"inputs\":{}}",
            "{\"inputs\":[]} x",
            "{\"inputs\":[]}{}",
            "{\"inputs\":[1]}",
            "{\"inputs\":[[]]}",
            "{\"inputs\":[[\"x\",\"INT8\",[1],null,[1]]]}",
            "\u{feff}{\"inputs\":[]}",
            "{\"id\":1,\"inputs\":[]}",
            "{\"inputs\":[],\"inputs\":[]}",
            "{\"id\":\"\",\"inputs\":[],\"id\":\"\"}",
            "{\"inputs\":[],}",
            "{\"outputs\":[{}],\"inputs\":[]}",
            "{\"id\":\"\\ud800\",\"inputs\":[]}",
        ] {
            refused(text);
        }
        refused(b"\xff\xfe{}");
        refused(b"{\"inputs\":[],\"ignored\":\"\xff\"}");
        refused(format!(r#"{{"id":"{}","inputs":[]}}"#, "i".repeat(257)));
        refused(format!(r#"{{"inputs":[{{"name":"{}","shape":[1],"datatype":"INT8","data":[1]}}]}}"#, "n".repeat(257)));
    }

    #[test]
    fn inputs_must_be_whole_and_unambiguous() {
        for fields in [
            r#""shape":"[1]","datatype":"INT8","data":[1]"#,
            r#""shape":[1.0],"datatype":"INT8","data":[1]"#,
            r#""shape":[-1],"datatype":"INT8","data":[1]"#,
            r#""shape":null,"datatype":"INT8","data":[1]"#,
            r#""shape":[null],"datatype":"INT8","data":[1]"#,
            r#""shape":{},"datatype":"INT8","data":[1]"#,
            r#""shape":[4611686018427387904,4611686018427387904],"datatype":"INT8","data":[1]"#,
            r#""shape":[18446744073709551616],"datatype":"INT8","data":[1]"#,
            r#""shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"datatype":"INT8","data":[1]"#,
            r#""shape":[1],"shape":[1],"datatype":"INT8","data":[1]"#,
            r#""shape":[1],"datatype":"int8","data":[1]"#,
            r#""shape":[1],"datatype":"INT8""#,
            r#""shape":[1],"datatype":"INT8","data":null"#,
            r#""shape":[1],"data":[1]"#,
            r#""datatype":"INT8","data":[1]"#,
            r#""shape":[1],"datatype":"INT8","data":[1],"parameters":{"binary_data_size":1}"#,
            r#""shape":[1],"datatype":"INT8","parameters":{"binary_data_size":1}"#,
            r#""shape":[1],"datatype":"INT8","data":[NaN]"#,
            r#""shape":[1],"datatype":"FP32","data":[-Infinity]"#,
            r#""shape":[1],"datatype":"FP32","data":[01]"#,
            r#""shape":[1],"datatype":"FP32","data":[.5]"#,
            r#""shape":[1],"datatype":"FP32","data":[1.]"#,
            r#""shape":[1],"datatype":"FP32","data":[+1]"#,
            r#""shape":[1],"datatype":"FP32","data":[0x1]"#,
            r#""shape":[1],"datatype":"FP32","data":[1,]"#,
        ] {
            refused(input(fields));
        }
        assert!(refused(input(r#""shape":[1],"datatype":"FP33","data":[1]"#)).contains("expected one of BOOL, UINT8"));
        let shared = r#""shape":[1],"datatype":"INT8","parameters":{"shared_memory_region":"r"}"#;
        assert_eq!(read(input(shared)).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn counts_are_bounded() {
        let inputs = |n: usize| {
            let one = r#"{"name":"x","shape":[1],"datatype":"INT8","data":[1]}"#;
            format!(r#"{{"inputs":[{}]}}"#, vec![one; n].join(","))
        };
        assert_eq!(read(inputs(MAX_INPUTS)).unwrap().inputs.len(), MAX_INPUTS);
        assert!(refused(inputs(MAX_INPUTS + 1)).contains("more than 64 inputs"));
        let outputs = |n: usize| format!(r#"{{"inputs":[],"outputs":[{}]}}"#, vec![r#"{"name":"y"}"#; n].join(","));
        assert_eq!(read(outputs(MAX_OUTPUTS)).unwrap().outputs.len(), MAX_OUTPUTS);
        assert!(refused(outputs(MAX_OUTPUTS + 1)).contains("more than 256 outputs"));
        let strings = format!(r#""shape":[{}],"datatype":"BYTES","data":[]"#, MAX_STRING_ELEMENTS + 1);
        assert_eq!(read(input(&strings)).unwrap_err().kind(), Kind::TooLarge);
        // Of all inputs together.
        let half = MAX_STRING_ELEMENTS / 2 + 1;
        let one = |name| {
            let size = half * 4;
            let parameters = format!(r#"{{"binary_data_size":{size}}}"#);
            format!(r#"{{"name":"{name}","shape":[{half}],"datatype":"BYTES","parameters":{parameters}}}"#)
        };
        let read = |inputs: String| read_split(&format!(r#"{{"inputs":[{inputs}]}}"#), &vec![0; 2 * half * 4]);
        assert_eq!(read(format!("{},{}", one("a"), one("b"))).unwrap_err().kind(), Kind::TooLarge);
    }

    #[test]
    fn nesting_is_bounded_wherever_it_is() {
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        let unknown = |levels: usize| format!(r#"{{"inputs":[],"other":{}}}"#, nested(levels - 1));
        read(unknown(64)).unwrap();
        for levels in [65, 100, 128, 250_000] {
            assert!(refused(unknown(levels)).contains("deeper than 64"));
            refused(format!(r#"{{"inputs":[],"parameters":{{"a":{}}}}}"#, nested(levels)));
            refused(input(&format!(r#""shape":[1],"datatype":"INT8","data":{}"#, nested(levels))));
        }
        refused("[".repeat(1 << 20));
        refused("{\"a\":".repeat(1 << 18));
        refused("\"".repeat(1 << 20));
        check_depth(&format!("[\"{}\\\"{}\"]", "[".repeat(100), "{".repeat(100)), 64).unwrap();
        check_depth(&"[]".repeat(1000), 64).unwrap();
        // An escape at the end of what is looked through at once, and nothing but text behind it.
        for before in 0..2 * LOOKED_THROUGH {
            let text = format!("[\"{}\\\"{}\"]", "a".repeat(before), "[".repeat(100));
            check_depth(&text, 64).unwrap();
            assert!(check_depth(&text.replace('\\', ""), 64).is_err());
        }
    }

    /// Of arrays that the JSON parser of the whole text never sees, and of others.
    #[test]
    fn numbers_are_read_where_they_are_an_inputs_and_json() {
        const ELEMENTS: usize = 4000;
        let zeros = format!("{}0", "0,".repeat(ELEMENTS - 1));
        let inputs = |data: &str, more: &str| {
            let one = |name: &str, data: &str| {
                format!(r#"{{"name":"{name}","shape":[{ELEMENTS}],"datatype":"FP32", "data" : {data}}}"#)
            };
            format!(r#"{{"inputs":[{},{}]{more}}}"#, one("x", &format!("[{zeros}]")), one("y", data))
        };
        let good = |data: &str, more: &str| read(inputs(data, more)).unwrap().inputs[1].tensor.to_vec::<f32>().unwrap();
        let ones = format!("{}1", "1,".repeat(ELEMENTS - 1));
        for more in [
            "",
            &format!(r#","other":{{"data":[{zeros}]}}"#),
            &format!(r#","other":[{{"data":[{zeros}]}},{{"data":[{zeros}]}}]"#),
            &format!(r#","other":"\"data\":[{zeros}]""#),
            &format!(r#","other":",\"data\":[{zeros}""#),
        ] {
            assert_eq!(good(&format!("[{ones}]"), more), [1.0; ELEMENTS], "{more}");
            assert_eq!(good(&format!("[\n{}\t]", ones.replace(',', " ,\r")), more), [1.0; ELEMENTS], "{more}");
        }
        for wrong in
            ["01", "1.", ".1", "-", "--1", "+1", "1e", "1e+", "1.e1", "0x1", "1 1", "1,", ",1", "NaN", "1]", "[1"]
        {
            let data = format!("[{}{wrong}]", "1,".repeat(ELEMENTS - 1));
            let expected = envelope(&inputs(&data, "")).err().unwrap();
            assert_eq!(refused(inputs(&data, "")), expected.message(), "{wrong}");
            let elsewhere = inputs(&format!("[{ones}]"), &format!(r#","other":{{"data":{data}}}"#));
            assert!(refused(elsewhere).starts_with("failed to parse the request JSON: "), "{wrong}");
        }
        // Of two mistakes the one in the JSON, wherever it is.
        assert!(refused(inputs("[1]", ",")).starts_with("failed to parse the request JSON: "));
        assert!(refused(inputs("[1]", "")).starts_with("Shape does not match"));
        let repeated = refused(inputs(&format!("[{ones}],\"data\":[{ones}]"), ""));
        assert!(repeated.contains("duplicate field `data`"), "{repeated}");
    }

    #[test]
    fn binary_tensors_follow_in_order() {
        let json = r#"{"inputs":[
            {"name":"a","shape":[2],"datatype":"UINT8","parameters":{"binary_data_size":2}},
            {"name":"b","shape":[1],"datatype":"INT16","data":[7]},
            {"name":"c","shape":[1],"datatype":"INT16","parameters":{"binary_data_size":2}}]}"#;
        let parsed = read_split(json, &[1, 2, 0x34, 0x12]).unwrap();
        assert_eq!(parsed.inputs[0].tensor.to_vec::<u8>(), Some(vec![1, 2]));
        assert_eq!(parsed.inputs[1].tensor.to_vec::<i16>(), Some(vec![7]));
        assert_eq!(parsed.inputs[2].tensor.to_vec::<i16>(), Some(vec![0x1234]));
        let error = read_split(json, &[1, 2, 3, 4, 5]).unwrap_err();
        assert_eq!(error.message(), "unexpected additional input data for model 'm'");
        let short = read_split(json, &[1, 2, 3]).unwrap_err();
        assert!(short.message().contains("input 'c'"), "{}", short.message());
    }

    #[test]
    fn binary_sizes_must_fit_shape_and_body() {
        let one = |dtype: &str, size: &str| {
            input(&format!(r#""shape":[2],"datatype":"{dtype}","parameters":{{"binary_data_size":{size}}}"#))
        };
        read_split(&one("FP32", "8"), &[0; 8]).unwrap();
        for (size, tail) in [("7", 7), ("9", 9), ("16", 16), ("0", 0), ("8", 7), ("8", 9), ("9223372036854775808", 8)] {
            assert_eq!(
                read_split(&one("FP32", size), &vec![0; tail]).unwrap_err().kind(),
                Kind::InvalidInput,
                "{size}"
            );
        }
        assert!(read_split(&one("BOOL", "2"), &[1, 2]).is_err());
        for tail in [&[1, 0, 0][..], &[0xff; 8], &[0; 4], &[0; 12], &[1, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(read_split(&one("BYTES", &tail.len().to_string()), tail).is_err(), "{tail:?}");
        }
        read_split(&one("BYTES", "8"), &[0; 8]).unwrap();
    }

    #[test]
    fn a_request_cut_anywhere_is_the_clients_fault() {
        for end in 0..FULL.len() {
            refused(&FULL.as_bytes()[..end]);
        }
        let json = input(r#""shape":[2],"datatype":"UINT8","parameters":{"binary_data_size":2}"#);
        let whole = [json.as_bytes(), &[1, 2]].concat();
        for end in 0..whole.len() {
            let cut = Bytes::copy_from_slice(&whole[..end]);
            let parsed = binary::split(cut, json.len(), &Config::default())
                .and_then(|(json, tail)| parse("m", &json, tail, &Config::default(), &mut permit()));
            assert_eq!(parsed.unwrap_err().kind(), Kind::InvalidInput, "cut at {end}");
        }
    }

    #[test]
    fn messages_repeat_little_of_the_client() {
        let long = "s".repeat(10_000);
        for text in [
            format!(r#"{{"inputs":"{long}"}}"#),
            input(&format!(r#""shape":"{long}","datatype":"INT8","data":[1]"#)),
            input(&format!(r#""shape":[1],"datatype":"{long}","data":[1]"#)),
            input(&format!(r#""shape":[1],"datatype":"INT8","data":[1],"parameters":"{long}""#)),
            input(&format!(r#""shape":[1],"datatype":"INT8","data":["{long}"]"#)),
        ] {
            let message = refused(text);
            assert!(message.len() < 300 && !message.contains(&long[..crate::error::QUOTE_LIMIT + 1]), "{message}");
        }
        assert!(!refused("{\"inputs\":\"\u{1b}[31m\\n\"}").contains(['\n', '\u{1b}']));
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Err(error) = read(&body) {
                prop_assert!(matches!(error.kind(), Kind::InvalidInput | Kind::TooLarge | Kind::Unsupported));
            }
        }

        #[test]
        fn changed_bytes_never_panic(at in 0..FULL.len(), byte in any::<u8>()) {
            let mut body = FULL.as_bytes().to_vec();
            body[at] = byte;
            if let Err(error) = read(&body) {
                prop_assert!(matches!(error.kind(), Kind::InvalidInput | Kind::TooLarge | Kind::Unsupported));
            }
        }
    }
}
