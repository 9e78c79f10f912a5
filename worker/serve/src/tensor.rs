//! Tensors as they arrive, in any of the protocol's forms, and the plain values in them.
//!
//! Nothing here knows of models. A tensor's shape is checked before its contents are looked at, so
//! that nobody makes room for more than the model could take.

use bytes::Bytes;

use crate::error::{InferError, cut};

/// The protocol's datatypes, as far as a column can come in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataType {
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Fp16,
    Fp32,
    Fp64,
    Bytes,
}

impl DataType {
    const ALL: [(Self, &str); 13] = [
        (Self::Bool, "BOOL"),
        (Self::Int8, "INT8"),
        (Self::Int16, "INT16"),
        (Self::Int32, "INT32"),
        (Self::Int64, "INT64"),
        (Self::Uint8, "UINT8"),
        (Self::Uint16, "UINT16"),
        (Self::Uint32, "UINT32"),
        (Self::Uint64, "UINT64"),
        (Self::Fp16, "FP16"),
        (Self::Fp32, "FP32"),
        (Self::Fp64, "FP64"),
        (Self::Bytes, "BYTES"),
    ];

    pub fn parse(name: &str) -> Option<Self> {
        let found = Self::ALL.into_iter().find(|(_, other)| *other == name);
        found.map(|(datatype, _)| datatype)
    }

    pub fn as_str(self) -> &'static str {
        let found = Self::ALL
            .into_iter()
            .find(|(datatype, _)| *datatype == self);
        found.map_or("BYTES", |(_, name)| name)
    }

    /// Bytes of one value; none for BYTES.
    const fn size(self) -> Option<usize> {
        Some(match self {
            Self::Bool | Self::Int8 | Self::Uint8 => 1,
            Self::Int16 | Self::Uint16 | Self::Fp16 => 2,
            Self::Int32 | Self::Uint32 | Self::Fp32 => 4,
            Self::Int64 | Self::Uint64 | Self::Fp64 => 8,
            Self::Bytes => return None,
        })
    }

    /// The integers that it can hold, as far as a column can.
    const fn range(self) -> Option<(i64, i64)> {
        Some(match self {
            Self::Int8 => (i8::MIN as i64, i8::MAX as i64),
            Self::Int16 => (i16::MIN as i64, i16::MAX as i64),
            Self::Int32 => (i32::MIN as i64, i32::MAX as i64),
            Self::Int64 => (i64::MIN, i64::MAX),
            Self::Uint8 => (0, u8::MAX as i64),
            Self::Uint16 => (0, u16::MAX as i64),
            Self::Uint32 => (0, u32::MAX as i64),
            Self::Uint64 => (0, i64::MAX),
            Self::Bool | Self::Fp16 | Self::Fp32 | Self::Fp64 | Self::Bytes => return None,
        })
    }
}

/// One input as it was sent.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub name: String,
    pub datatype: String,
    pub shape: Vec<i64>,
    pub contents: Contents,
}

/// The values as they were sent.
#[derive(Debug)]
pub(crate) enum Contents {
    /// Little-endian bytes; BYTES each with its length before it.
    Raw(Bytes),
    Bools(Vec<bool>),
    Int32s(Vec<i32>),
    Int64s(Vec<i64>),
    Uint32s(Vec<u32>),
    Uint64s(Vec<u64>),
    Fp32s(Vec<f32>),
    Fp64s(Vec<f64>),
    Bytes(Vec<Bytes>),
    Json(JsonData),
    /// Nothing at all.
    Missing,
}

/// The `data` of a tensor in JSON, however deep it was nested: row after row.
#[derive(Debug, Default, PartialEq)]
pub(crate) enum JsonData {
    #[default]
    Empty,
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

/// Plain values.
#[derive(Debug, PartialEq)]
pub(crate) enum Plain {
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Bytes(Vec<Bytes>),
}

impl Plain {
    fn len(&self) -> usize {
        match self {
            Self::Integers(v) => v.len(),
            Self::Floats(v) => v.len(),
            Self::Bools(v) => v.len(),
            Self::Bytes(v) => v.len(),
        }
    }
}

impl Tensor {
    /// An error about it.
    pub fn error(&self, message: impl std::fmt::Display) -> InferError {
        InferError::column(&self.name, message)
    }

    /// Its datatype.
    pub fn datatype(&self) -> Result<DataType, InferError> {
        DataType::parse(&self.datatype).ok_or_else(|| {
            self.error(format!(
                "has the datatype `{}`, which is none of BOOL, INT8 to INT64, UINT8 to UINT64, FP16, FP32, FP64, BYTES",
                cut(&self.datatype)
            ))
        })
    }

    /// Its values, of which there are to be so many.
    pub fn plain(&mut self, datatype: DataType, count: usize) -> Result<Plain, InferError> {
        let contents = std::mem::replace(&mut self.contents, Contents::Missing);
        let wrong_field = |field: &str| {
            self.error(format!(
                "has the datatype {} and its values in `{field}`: they do not belong together",
                datatype.as_str()
            ))
        };
        let plain = match contents {
            Contents::Missing => {
                return Err(self.error("has a name and a shape, but no values"));
            }
            Contents::Raw(raw) => self.raw(datatype, &raw, count)?,
            Contents::Bools(values) if datatype == DataType::Bool => Plain::Bools(values),
            Contents::Bools(_) => return Err(wrong_field("bool_contents")),
            Contents::Int32s(values) => match datatype {
                DataType::Int8 | DataType::Int16 | DataType::Int32 => {
                    self.integers(datatype, values.into_iter().map(i64::from).collect())?
                }
                _ => return Err(wrong_field("int_contents")),
            },
            Contents::Int64s(values) if datatype == DataType::Int64 => Plain::Integers(values),
            Contents::Int64s(_) => return Err(wrong_field("int64_contents")),
            Contents::Uint32s(values) => match datatype {
                DataType::Uint8 | DataType::Uint16 | DataType::Uint32 => {
                    self.integers(datatype, values.into_iter().map(i64::from).collect())?
                }
                _ => return Err(wrong_field("uint_contents")),
            },
            Contents::Uint64s(values) if datatype == DataType::Uint64 => {
                Plain::Integers(self.signed(values.into_iter())?)
            }
            Contents::Uint64s(_) => return Err(wrong_field("uint64_contents")),
            Contents::Fp32s(values) if datatype == DataType::Fp32 => {
                Plain::Floats(values.into_iter().map(f64::from).collect())
            }
            Contents::Fp32s(_) => return Err(wrong_field("fp32_contents")),
            Contents::Fp64s(values) if datatype == DataType::Fp64 => Plain::Floats(values),
            Contents::Fp64s(_) => return Err(wrong_field("fp64_contents")),
            Contents::Bytes(values) if datatype == DataType::Bytes => Plain::Bytes(values),
            Contents::Bytes(_) => return Err(wrong_field("bytes_contents")),
            Contents::Json(data) => self.json(datatype, data)?,
        };
        if plain.len() == count {
            Ok(plain)
        } else {
            Err(self.error(format!(
                "has {} values, but its shape {:?} has room for {count}",
                plain.len(),
                self.shape
            )))
        }
    }

    /// Integers that are what their datatype says.
    fn integers(&self, datatype: DataType, values: Vec<i64>) -> Result<Plain, InferError> {
        let (low, high) = datatype.range().unwrap_or((i64::MIN, i64::MAX));
        match values.iter().position(|v| !(low..=high).contains(v)) {
            None => Ok(Plain::Integers(values)),
            Some(at) => Err(self.error(format!(
                "has {} at place {at}, which is no {}",
                values[at],
                datatype.as_str()
            ))),
        }
    }

    /// Unsigned integers, which a column of integers can hold up to 2⁶³ − 1.
    fn signed(&self, values: impl Iterator<Item = u64>) -> Result<Vec<i64>, InferError> {
        let one = |(at, value): (usize, u64)| {
            i64::try_from(value).map_err(|_| {
                self.error(format!(
                    "has {value} at place {at}, more than {}, the largest integer of a column",
                    i64::MAX
                ))
            })
        };
        values.enumerate().map(one).collect()
    }

    fn raw(&self, datatype: DataType, raw: &Bytes, count: usize) -> Result<Plain, InferError> {
        let Some(size) = datatype.size() else {
            return self.raw_bytes(raw, count).map(Plain::Bytes);
        };
        if count.checked_mul(size) != Some(raw.len()) {
            return Err(self.error(format!(
                "has {} bytes of raw contents, but {} values of {} need {}",
                raw.len(),
                count,
                datatype.as_str(),
                count.saturating_mul(size)
            )));
        }
        macro_rules! read {
            ($type:ty, $n:literal) => {
                raw.chunks_exact($n).map(|chunk| {
                    let mut bytes = [0; $n];
                    bytes.copy_from_slice(chunk);
                    <$type>::from_le_bytes(bytes)
                })
            };
        }
        Ok(match datatype {
            DataType::Bool => match raw.iter().position(|byte| *byte > 1) {
                None => Plain::Bools(raw.iter().map(|byte| *byte == 1).collect()),
                Some(at) => {
                    let why = format!("has the byte {} at place {at}, which is no BOOL", raw[at]);
                    return Err(self.error(why));
                }
            },
            DataType::Int8 => Plain::Integers(read!(i8, 1).map(i64::from).collect()),
            DataType::Int16 => Plain::Integers(read!(i16, 2).map(i64::from).collect()),
            DataType::Int32 => Plain::Integers(read!(i32, 4).map(i64::from).collect()),
            DataType::Int64 => Plain::Integers(read!(i64, 8).collect()),
            DataType::Uint8 => Plain::Integers(raw.iter().map(|v| i64::from(*v)).collect()),
            DataType::Uint16 => Plain::Integers(read!(u16, 2).map(i64::from).collect()),
            DataType::Uint32 => Plain::Integers(read!(u32, 4).map(i64::from).collect()),
            DataType::Uint64 => Plain::Integers(self.signed(read!(u64, 8))?),
            DataType::Fp16 => Plain::Floats(read!(u16, 2).map(half).collect()),
            DataType::Fp32 => Plain::Floats(read!(f32, 4).map(f64::from).collect()),
            DataType::Fp64 | DataType::Bytes => Plain::Floats(read!(f64, 8).collect()),
        })
    }

    /// Values each with its length before it, in four bytes.
    fn raw_bytes(&self, raw: &Bytes, count: usize) -> Result<Vec<Bytes>, InferError> {
        let mut values = Vec::with_capacity(count.min(raw.len() / 4));
        let mut at = 0;
        while at < raw.len() {
            let value = (raw.get(at..at + 4)).and_then(|length| {
                let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
                let end = (at + 4).checked_add(length)?;
                (end <= raw.len()).then(|| (raw.slice(at + 4..end), end))
            });
            let Some((value, end)) = value else {
                return Err(self.error(format!(
                    "has raw contents that end within the value at place {}",
                    values.len()
                )));
            };
            if values.len() == count {
                return Err(self.error(format!(
                    "has more than the {count} values that its shape {:?} has room for",
                    self.shape
                )));
            }
            values.push(value);
            at = end;
        }
        Ok(values)
    }

    fn json(&self, datatype: DataType, data: JsonData) -> Result<Plain, InferError> {
        let wrong = |what: &str| {
            self.error(format!(
                "has the datatype {}, but {what} in its `data`",
                datatype.as_str()
            ))
        };
        Ok(match (datatype, data) {
            (DataType::Bool, JsonData::Empty) => Plain::Bools(Vec::new()),
            (DataType::Bytes, JsonData::Empty) => Plain::Bytes(Vec::new()),
            (_, JsonData::Empty) => Plain::Floats(Vec::new()),
            (DataType::Bool, JsonData::Bools(values)) => Plain::Bools(values),
            (DataType::Bytes, JsonData::Texts(values)) => {
                Plain::Bytes(values.into_iter().map(Bytes::from).collect())
            }
            (DataType::Fp16 | DataType::Fp32 | DataType::Fp64, JsonData::Floats(values)) => {
                Plain::Floats(values)
            }
            #[allow(clippy::cast_precision_loss, reason = "said to be a float")]
            (DataType::Fp16 | DataType::Fp32 | DataType::Fp64, JsonData::Integers(values)) => {
                Plain::Floats(values.into_iter().map(|v| v as f64).collect())
            }
            (datatype, JsonData::Integers(values)) if datatype.range().is_some() => {
                self.integers(datatype, values)?
            }
            (_, JsonData::Integers(_)) => return Err(wrong("integers")),
            (_, JsonData::Floats(_)) => return Err(wrong("numbers that are no integers")),
            (_, JsonData::Bools(_)) => return Err(wrong("booleans")),
            (_, JsonData::Texts(_)) => return Err(wrong("texts")),
        })
    }
}

/// A number of half precision (IEEE 754 binary16).
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let exponent = i32::from((bits >> 10) & 0x1f);
    let fraction = f64::from(bits & 0x3ff);
    sign * match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
    }
}

/// Values as the protocol has them in bytes: each with its length before it.
pub(crate) fn write_bytes<'a>(values: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for value in values {
        let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&value[..length as usize]);
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn tensor(datatype: &str, contents: Contents) -> Tensor {
        Tensor {
            name: "x".to_owned(),
            datatype: datatype.to_owned(),
            shape: vec![2],
            contents,
        }
    }

    fn plain(datatype: &str, contents: Contents) -> Result<Plain, String> {
        let mut tensor = tensor(datatype, contents);
        let datatype = tensor.datatype().map_err(|e| e.to_string())?;
        tensor.plain(datatype, 2).map_err(|e| e.to_string())
    }

    #[test]
    fn raw_contents_are_little_endian() {
        let raw = |bytes: &[u8]| Contents::Raw(Bytes::copy_from_slice(bytes));
        assert_eq!(
            plain("INT16", raw(&[1, 0, 255, 255])),
            Ok(Plain::Integers(vec![1, -1]))
        );
        assert_eq!(
            plain("FP16", raw(&[0x00, 0x3c, 0x00, 0xc2])),
            Ok(Plain::Floats(vec![1.0, -3.0]))
        );
        let bytes = write_bytes([b"a".as_slice(), b""].into_iter());
        assert_eq!(
            plain("BYTES", raw(&bytes)),
            Ok(Plain::Bytes(vec![
                Bytes::from_static(b"a"),
                Bytes::from_static(b"")
            ]))
        );
    }

    #[test]
    fn contents_that_do_not_fit_are_told_with_the_column() {
        let raw = |bytes: &[u8]| Contents::Raw(Bytes::copy_from_slice(bytes));
        for (datatype, contents, expected) in [
            ("INT17", raw(&[]), "has the datatype `INT17`"),
            (
                "INT32",
                raw(&[0; 7]),
                "has 7 bytes of raw contents, but 2 values of INT32 need 8",
            ),
            (
                "BOOL",
                raw(&[0, 2]),
                "has the byte 2 at place 1, which is no BOOL",
            ),
            (
                "BYTES",
                raw(&[9, 0, 0, 0, 1]),
                "end within the value at place 0",
            ),
            ("BYTES", raw(&[0; 12]), "has more than the 2 values"),
            (
                "UINT64",
                Contents::Uint64s(vec![1, u64::MAX]),
                "at place 1, more than",
            ),
            (
                "INT8",
                Contents::Int32s(vec![1, 300]),
                "has 300 at place 1, which is no INT8",
            ),
            (
                "INT64",
                Contents::Fp32s(vec![1.0]),
                "do not belong together",
            ),
            (
                "FP64",
                Contents::Fp64s(vec![1.0]),
                "has 1 values, but its shape [2] has room for 2",
            ),
            ("FP64", Contents::Missing, "no values"),
            (
                "INT64",
                Contents::Json(JsonData::Floats(vec![1.5, 2.0])),
                "no integers",
            ),
        ] {
            let error = plain(datatype, contents).unwrap_err();
            assert!(error.starts_with("the column `x` "), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn half_precision_is_read_as_it_is() {
        for (bits, expected) in [
            (0x3555, 0.333_251_953_125),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_477_539_063e-8),
            (0xfc00, f64::NEG_INFINITY),
        ] {
            assert_eq!(half(bits), expected);
        }
        assert!(half(0x7e00).is_nan());
    }
}
