//! The fields of an infer request's JSON, found but not yet understood: `data` and `parameters` stay text.
//!
//! Stricter than derived code: repeated fields are refused, lists are bounded while they are read, and an object is
//! never taken from an array of its values.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::protocol::common::{MAX_INPUTS, MAX_OUTPUTS, too_many};
use crate::tensor::MAX_RANK;

/// The request object with its fields found and `data` unread.
pub(super) struct Body<'a> {
    pub id: Cow<'a, str>,
    pub parameters: Option<&'a RawValue>,
    pub inputs: Vec<Object<Input<'a>>>,
    pub outputs: Vec<Object<Output<'a>>>,
}

#[derive(Deserialize)]
pub(super) struct Input<'a> {
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    #[serde(borrow)]
    pub datatype: Cow<'a, str>,
    pub shape: Dims,
    #[serde(borrow)]
    pub parameters: Option<&'a RawValue>,
    #[serde(borrow)]
    pub data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
pub(super) struct Output<'a> {
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    #[serde(borrow)]
    pub parameters: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum Field {
    Id,
    Parameters,
    Inputs,
    Outputs,
    #[serde(other)]
    Unknown,
}

/// Unknown fields are ignored, repeated ones refused: which of two would count is nobody's to guess.
pub(super) struct OfBody;

impl<'de> DeserializeSeed<'de> for OfBody {
    type Value = Body<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Body<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for OfBody {
    type Value = Body<'de>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an infer request object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body<'de>, A::Error> {
        let (mut id, mut parameters, mut inputs, mut outputs) = (None, None, None, None);
        while let Some(field) = map.next_key()? {
            match field {
                Field::Id => once(&mut id, "id", map.next_value::<Option<Text<'de>>>()?)?,
                Field::Parameters => once(&mut parameters, "parameters", map.next_value::<Option<&RawValue>>()?)?,
                Field::Inputs => {
                    let list = map.next_value_seed(List::new("inputs", MAX_INPUTS))?;
                    once(&mut inputs, "inputs", list)?;
                }
                Field::Outputs => {
                    let list = map.next_value_seed(List::new("outputs", MAX_OUTPUTS))?;
                    once(&mut outputs, "outputs", list)?;
                }
                Field::Unknown => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(Body {
            id: id.flatten().map(|Text(id)| id).unwrap_or_default(),
            parameters: parameters.flatten(),
            inputs: inputs.ok_or_else(|| A::Error::missing_field("inputs"))?,
            outputs: outputs.unwrap_or_default(),
        })
    }
}

fn once<T, E: serde::de::Error>(slot: &mut Option<T>, field: &'static str, value: T) -> Result<(), E> {
    if slot.replace(value).is_some() {
        return Err(E::duplicate_field(field));
    }
    Ok(())
}

/// A string, borrowed where it holds no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A shape as sent: whole numbers, no more of them than a tensor may have dimensions.
pub(super) struct Dims(pub Vec<i64>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Dims, D::Error> {
        deserializer.deserialize_seq(List::new("dimensions", MAX_RANK)).map(Dims)
    }
}

/// A struct read from an object only: one that derives `Deserialize` takes an array of its fields, too.
pub(super) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object<T>, D::Error> {
        struct OfObject<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for OfObject<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(OfObject(PhantomData))
    }
}

/// An array of at most `max` items; `null` stands for an empty one, as clients that fill every field send it.
struct List<T> {
    of: PhantomData<T>,
    what: &'static str,
    max: usize,
}

impl<T> List<T> {
    fn new(what: &'static str, max: usize) -> List<T> {
        List { of: PhantomData, what, max }
    }
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for List<T> {
    type Value = Vec<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<T>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "an array of {}", self.what)
    }

    fn visit_unit<E>(self) -> Result<Vec<T>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            if items.len() == self.max {
                return Err(A::Error::custom(too_many(self.max, self.what)));
            }
            items.push(item);
        }
        Ok(items)
    }
}
