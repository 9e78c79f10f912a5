//! The protocol's JSON: what a request and an answer look like in it.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeSeed, Error, IgnoredAny, SeqAccess, Visitor},
};

use crate::tensor::JsonData;

/// The body of an inference request.
#[derive(Debug, Deserialize)]
pub(crate) struct InferBody {
    #[serde(default)]
    pub id: String,
    #[serde(default)]
    pub parameters: Parameters,
    pub inputs: Vec<InputBody>,
    #[serde(default)]
    pub outputs: Vec<OutputBody>,
}

/// One input.
#[derive(Debug, Deserialize)]
pub(crate) struct InputBody {
    pub name: String,
    pub datatype: String,
    pub shape: Vec<i64>,
    #[serde(default)]
    pub parameters: Parameters,
    #[serde(default)]
    pub data: Option<JsonData>,
}

/// One output that is asked for.
#[derive(Debug, Deserialize)]
pub(crate) struct OutputBody {
    pub name: String,
    #[serde(default)]
    pub parameters: Parameters,
}

/// The parameters that mean something here; others are passed over.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Parameters {
    /// Bytes of this input after the JSON.
    pub binary_data_size: Option<usize>,
    /// Whether this output is to come after the JSON.
    pub binary_data: Option<bool>,
    /// Whether all outputs are to come after the JSON.
    pub binary_data_output: Option<bool>,
    /// How long the answer is waited for, in microseconds.
    pub timeout: Option<u64>,
    shared_memory_region: Option<IgnoredAny>,
    classification: Option<IgnoredAny>,
    sequence_id: Option<IgnoredAny>,
}

impl Parameters {
    /// One that asks for what is not offered.
    pub const fn unsupported(&self) -> Option<&'static str> {
        if self.shared_memory_region.is_some() {
            Some("shared_memory_region")
        } else if self.classification.is_some() {
            Some("classification")
        } else if self.sequence_id.is_some() {
            Some("sequence_id")
        } else {
            None
        }
    }
}

/// The body of feedback.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FeedbackBody {
    pub labels: Vec<LabelBody>,
}

/// One label.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LabelBody {
    pub id: String,
    #[serde(default)]
    pub row: u32,
    pub label: LabelValue,
}

/// A class as text, boolean or integer, or a number.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum LabelValue {
    Text(String),
    Flag(bool),
    Integer(i64),
    Number(f64),
}

/// The body of an answer.
#[derive(Debug, Serialize)]
pub(crate) struct AnswerBody<'a> {
    pub model_name: &'a str,
    pub model_version: &'a str,
    pub id: &'a str,
    pub outputs: Vec<AnswerOutput<'a>>,
}

/// One output.
#[derive(Debug, Serialize)]
pub(crate) struct AnswerOutput<'a> {
    pub name: &'a str,
    pub datatype: &'a str,
    pub shape: Vec<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<AnswerParameters>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<AnswerData<'a>>,
}

/// Where an output is.
#[derive(Debug, Serialize)]
pub(crate) struct AnswerParameters {
    pub binary_data_size: usize,
}

/// The values of an output.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum AnswerData<'a> {
    Numbers(&'a [f64]),
    Texts(Vec<&'a str>),
}

impl<'de> Deserialize<'de> for JsonData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut data = Self::Empty;
        Into(&mut data).deserialize(deserializer)?;
        Ok(data)
    }
}

/// Puts a value, or all that are in nested lists, behind the others.
struct Into<'a>(&'a mut JsonData);

impl Into<'_> {
    fn mixed<E: Error>(&self, with: &str) -> E {
        let what = match self.0 {
            JsonData::Integers(_) | JsonData::Floats(_) => "numbers",
            JsonData::Bools(_) => "booleans",
            JsonData::Texts(_) | JsonData::Empty => "texts",
        };
        E::custom(format_args!("`data` mixes {what} with {with}"))
    }

    fn float<E: Error>(self, value: f64) -> Result<(), E> {
        match self.0 {
            JsonData::Empty => *self.0 = JsonData::Floats(vec![value]),
            JsonData::Floats(values) => values.push(value),
            #[allow(clippy::cast_precision_loss, reason = "they are floats after all")]
            JsonData::Integers(values) => {
                let floats = values.iter().map(|v| *v as f64);
                *self.0 = JsonData::Floats(floats.chain([value]).collect());
            }
            _ => return Err(self.mixed("numbers")),
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Into<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Into<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("numbers, booleans, texts, or lists of them")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Into(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        match self.0 {
            JsonData::Empty => *self.0 = JsonData::Integers(vec![value]),
            JsonData::Integers(values) => values.push(value),
            #[allow(clippy::cast_precision_loss, reason = "they are floats after all")]
            JsonData::Floats(values) => values.push(value as f64),
            _ => return Err(self.mixed("numbers")),
        }
        Ok(())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        match i64::try_from(value) {
            Ok(value) => self.visit_i64(value),
            #[allow(clippy::cast_precision_loss, reason = "no integer of a column")]
            Err(_) => self.float(value as f64),
        }
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.float(value)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        match self.0 {
            JsonData::Empty => *self.0 = JsonData::Bools(vec![value]),
            JsonData::Bools(values) => values.push(value),
            _ => return Err(self.mixed("booleans")),
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        match self.0 {
            JsonData::Empty => *self.0 = JsonData::Texts(vec![value.to_owned()]),
            JsonData::Texts(values) => values.push(value.to_owned()),
            _ => return Err(self.mixed("texts")),
        }
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Err(E::custom(
            "`data` has a null: a model takes whole rows only",
        ))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn data(text: &str) -> Result<JsonData, String> {
        serde_json::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn data_is_flat_however_it_was_nested() {
        assert_eq!(
            data("[[1,2],[3,4]]"),
            Ok(JsonData::Integers(vec![1, 2, 3, 4]))
        );
        assert_eq!(data("[1,2.5]"), Ok(JsonData::Floats(vec![1.0, 2.5])));
        assert_eq!(
            data("[[true],[false]]"),
            Ok(JsonData::Bools(vec![true, false]))
        );
        assert_eq!(data("[]"), Ok(JsonData::Empty));
        assert_eq!(data("0.1"), Ok(JsonData::Floats(vec![0.1])));
        assert_eq!(
            data("[\"L\",\"\\u0048\"]"),
            Ok(JsonData::Texts(vec!["L".to_owned(), "H".to_owned()]))
        );
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        for (text, expected) in [
            ("[1,true]", "mixes numbers with booleans"),
            ("[\"a\",1]", "mixes texts with numbers"),
            ("[true,\"a\"]", "mixes booleans with texts"),
            ("[1,null]", "has a null"),
            ("[{}]", "expected numbers"),
            ("[NaN]", "expected value"),
            ("[1e999]", "number out of range"),
        ] {
            let error = data(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let deep = "[".repeat(100_000);
        assert!(data(&deep).unwrap_err().contains("recursion limit"));
    }
}
