//! JSON lines: one object a line. A key that is missing is null; nested values are refused unless
//! their column is given the type text, which keeps them as JSON.

use std::{
    collections::HashSet,
    fmt,
    io::{BufRead, BufReader, Read},
};

use arrow_array::RecordBatch;
use emberline_common::spec::{Ordered, kinds::convert::ReadSpec};
use emberline_worker::stage::{StageContext, StageError};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value as Json;

use super::{Emit, MAX_RECORD_BYTES, SourceFile, bytes, check_types, too_many_columns};
use crate::{
    scalar::push_cast,
    schema::{
        BatchBuilder, ColumnDef, ColumnType, MAX_COLUMNS, Schema, Value, cut, quoted, type_name,
    },
};

/// JSON lines files; their columns are those of all lines, in the order in which they first appear.
pub struct JsonLinesSource {
    files: Vec<SourceFile>,
    schema: Schema,
}

/// What a column has held so far, with the place of the first value.
struct Seen {
    column_type: Option<(ColumnType, String)>,
}

impl JsonLinesSource {
    pub(super) fn open(
        files: Vec<SourceFile>,
        spec: &ReadSpec,
        ctx: &StageContext,
    ) -> Result<Self, StageError> {
        let mut columns: Ordered<String, Seen> = Ordered::new();
        let mut rows: u64 = 0;
        for file in &files {
            let mut lines = Lines::open(file)?;
            while let Some(object) = lines.next()? {
                if rows.is_multiple_of(4096) {
                    ctx.check_cancelled()?;
                }
                rows += 1;
                for (name, value) in object.0 {
                    if !columns.contains_key(&name) && columns.len() == MAX_COLUMNS {
                        return Err(too_many_columns(&file.label, MAX_COLUMNS + 1));
                    }
                    if name.len() > 1024 {
                        return Err(lines.error("a key is longer than 1,024 bytes"));
                    }
                    let given = spec.types.get(&name).copied();
                    let seen = columns
                        .entry(name.clone())
                        .or_insert(Seen { column_type: None });
                    if given.is_none() {
                        seen.look_at(&name, &value, &lines)?;
                    }
                }
            }
        }
        let names: Vec<String> = columns.keys().cloned().collect();
        if rows == 0 {
            return Err(StageError::data(format!("`{}` is empty", files[0].label)));
        }
        if names.is_empty() {
            return Err(StageError::data(format!(
                "`{}`: no object has any key",
                files[0].label
            )));
        }
        check_types(spec, &names, &files[0].label)?;
        let columns = columns
            .into_iter()
            .map(|(name, seen)| ColumnDef {
                column_type: spec.types.get(&name).copied().unwrap_or_else(|| {
                    seen.column_type
                        .map_or(ColumnType::Text, |(found, _)| found)
                }),
                name,
            })
            .collect();
        Ok(Self {
            files,
            schema: Schema { columns },
        })
    }

    pub(super) const fn schema(&self) -> &Schema {
        &self.schema
    }

    pub(super) fn read(&self, ctx: &StageContext, emit: &mut Emit<'_>) -> Result<(), StageError> {
        let mut builder = BatchBuilder::new(&self.schema);
        for file in &self.files {
            let mut lines = Lines::open(file)?;
            while let Some(object) = lines.next()? {
                let mut object: std::collections::HashMap<String, Json> =
                    object.0.into_iter().collect();
                for (column, def) in self.schema.columns.iter().enumerate() {
                    let value = object.remove(&def.name).unwrap_or(Json::Null);
                    push(&mut builder, column, def.column_type, &value)
                        .map_err(|e| lines.error(&format!("key {}: {e}", quoted(&def.name))))?;
                }
                if builder.end_row() {
                    ctx.check_cancelled()?;
                    emit(take(&mut builder)?)?;
                }
            }
        }
        emit(take(&mut builder)?)
    }
}

fn take(builder: &mut BatchBuilder) -> Result<RecordBatch, StageError> {
    builder
        .take()
        .map_err(|e| StageError::system(format!("cannot build a batch: {e}")))
}

fn push(
    builder: &mut BatchBuilder,
    column: usize,
    column_type: ColumnType,
    value: &Json,
) -> Result<(), String> {
    let text;
    let value = match value {
        Json::Null => Value::Null,
        Json::Bool(v) => Value::Boolean(*v),
        Json::String(v) => Value::Text(v),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            _ if column_type == ColumnType::Text => {
                text = number.to_string();
                Value::Text(&text)
            }
            (Some(v), _) => Value::Integer(v),
            (None, Some(v)) => Value::Float(v),
            (None, None) => return Err(format!("the number {number} is too large")),
        },
        Json::Array(_) | Json::Object(_) if column_type == ColumnType::Text => {
            text = value.to_string();
            Value::Text(&text)
        }
        Json::Array(_) | Json::Object(_) => {
            return Err(format!(
                "a nested value is not of type {}",
                type_name(column_type)
            ));
        }
    };
    push_cast(builder, column, column_type, value)
}

impl Seen {
    fn look_at(&mut self, name: &str, value: &Json, lines: &Lines<'_>) -> Result<(), StageError> {
        let found = match value {
            Json::Null => return Ok(()),
            Json::Bool(_) => ColumnType::Boolean,
            Json::String(_) => ColumnType::Text,
            Json::Number(n) if n.is_i64() => ColumnType::Integer,
            Json::Number(n) if n.is_u64() => {
                return Err(lines.error(&format!(
                    "key {}: the integer {n} does not fit into 64 bits with a sign: give the column the type text or float under `types`",
                    quoted(name)
                )));
            }
            Json::Number(_) => ColumnType::Float,
            Json::Array(_) | Json::Object(_) => {
                return Err(lines.error(&format!(
                    "key {}: a nested value; give the column the type text under `types` to keep it as JSON",
                    quoted(name)
                )));
            }
        };
        match &mut self.column_type {
            None => self.column_type = Some((found, lines.place())),
            Some((first, _)) if *first == found => {}
            Some((first @ ColumnType::Integer, _)) if found == ColumnType::Float => *first = found,
            Some((ColumnType::Float, _)) if found == ColumnType::Integer => {}
            Some((first, place)) => {
                return Err(lines.error(&format!(
                    "key {}: a value of type {}, but {place} has one of type {}: give the column the type text under `types` to keep both",
                    quoted(name),
                    type_name(found),
                    type_name(*first)
                )));
            }
        }
        Ok(())
    }
}

/// An object whose keys are kept in order and are all different.
struct Object(Vec<(String, Json)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor;
        impl<'de> Visitor<'de> for ObjectVisitor {
            type Value = Object;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut entries = Vec::new();
                let mut names = HashSet::new();
                while let Some((name, value)) = map.next_entry::<String, Json>()? {
                    if !names.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!(
                            "the key {} stands twice",
                            quoted(&name)
                        )));
                    }
                    entries.push((name, value));
                }
                Ok(Object(entries))
            }
        }
        deserializer.deserialize_map(ObjectVisitor)
    }
}

struct Lines<'a> {
    file: &'a SourceFile,
    reader: BufReader<Box<dyn Read>>,
    buffer: Vec<u8>,
    line: u64,
    offset: u64,
}

impl<'a> Lines<'a> {
    fn open(file: &'a SourceFile) -> Result<Self, StageError> {
        Ok(Self {
            file,
            reader: BufReader::with_capacity(64 << 10, bytes::open(file)?.0),
            buffer: Vec::new(),
            line: 0,
            offset: 0,
        })
    }

    /// The next object; blank lines are passed over, though not without an end.
    fn next(&mut self) -> Result<Option<Object>, StageError> {
        let start = self.offset + self.buffer.len() as u64;
        loop {
            self.offset += self.buffer.len() as u64;
            self.buffer.clear();
            if self.offset - start > MAX_RECORD_BYTES {
                return Err(self.error(&format!(
                    "more than {MAX_RECORD_BYTES} bytes of blank lines"
                )));
            }
            self.line += 1;
            let read = (&mut self.reader)
                .take(MAX_RECORD_BYTES + 1)
                .read_until(b'\n', &mut self.buffer)
                .map_err(|e| bytes::failed(self.file, e))?;
            if read == 0 {
                return Ok(None);
            }
            if read as u64 > MAX_RECORD_BYTES {
                return Err(self.error(&format!("a line of more than {MAX_RECORD_BYTES} bytes")));
            }
            let line = std::str::from_utf8(&self.buffer).map_err(|e| {
                let offset = self.offset + e.valid_up_to() as u64;
                self.error(&format!("not UTF-8 at byte {offset} of the file"))
            })?;
            let line = if self.line == 1 {
                line.trim_start_matches('\u{feff}')
            } else {
                line
            };
            if line.trim().is_empty() {
                continue;
            }
            return serde_json::from_str(line).map(Some).map_err(|e| {
                let text = e.to_string();
                // It may repeat what stands there, however long that is.
                let what = cut(text.split(" at line ").next().unwrap_or_default(), 200);
                self.error(&format!("column {}: {what}", e.column()))
            });
        }
    }

    fn place(&self) -> String {
        format!("`{}` line {}", self.file.label, self.line)
    }

    fn error(&self, what: &str) -> StageError {
        StageError::data(format!("{}: {what}", self.place()))
    }
}
