//! Files read into tables, one module for each format. Each looks at its files once to find the
//! columns and their types, and a second time to give the rows, so that no file is held in memory.
//!
//! Every error names the file, the line or row, and the column. Start with [`TableSource::open`].

mod bytes;
mod csv;
mod idx;
mod json_lines;
mod parquet;

use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use emberline_common::spec::{
    ArtifactType,
    kinds::convert::{FileFormat, ReadSpec},
};
use emberline_worker::stage::{Input, StageContext, StageError};

use crate::{schema::Schema, table::TableReader};

/// The longest CSV record or JSON line, in bytes.
pub const MAX_RECORD_BYTES: u64 = 16 << 20;
/// The longest field of a CSV record, in bytes.
pub const MAX_FIELD_BYTES: usize = 4 << 20;

/// Takes the batches of a table as they are read.
pub type Emit<'a> = dyn FnMut(RecordBatch) -> Result<(), StageError> + 'a;

/// One file to read.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// How it is called in messages: the input and the path in it.
    pub label: String,
}

/// An input as a table: its columns are known, its rows can be read.
pub enum TableSource {
    /// A table of an earlier stage.
    Table(Input, Schema),
    /// CSV files.
    Csv(csv::CsvSource),
    /// JSON lines.
    JsonLines(json_lines::JsonLinesSource),
    /// Parquet files.
    Parquet(parquet::ParquetSource),
    /// IDX images.
    Idx(idx::IdxSource),
}

impl TableSource {
    /// Finds the columns of an input.
    ///
    /// # Errors
    /// Reason `user_error` for settings that do not fit, `data` for files that are not what they are
    /// said to be, `storage` if they cannot be read.
    pub fn open(
        input: &Input,
        spec: Option<&ReadSpec>,
        ctx: &StageContext,
    ) -> Result<Self, StageError> {
        if input.artifact_type == ArtifactType::Table {
            if spec.is_some() {
                return Err(StageError::user(format!(
                    "the input `{0}` is a table already: remove it from `read` (use `cast` for other types)",
                    input.name
                )));
            }
            let schema = TableReader::open(input)?.schema().clone();
            return Ok(Self::Table(input.clone(), schema));
        }
        let default = ReadSpec::default();
        let spec = spec.unwrap_or(&default);
        let files: Vec<SourceFile> = input
            .files
            .iter()
            .map(|file| SourceFile {
                path: input.dir.join(file),
                label: format!("{}/{}", input.name, file.display()),
            })
            .collect();
        let format = format_of(input, spec, &files)?;
        match format {
            FileFormat::Csv => csv::CsvSource::open(files, spec, ctx).map(Self::Csv),
            FileFormat::JsonLines => {
                json_lines::JsonLinesSource::open(files, spec, ctx).map(Self::JsonLines)
            }
            FileFormat::Parquet => {
                parquet::ParquetSource::open(files, spec, ctx).map(Self::Parquet)
            }
            FileFormat::Idx => idx::IdxSource::open(files, spec, ctx).map(Self::Idx),
        }
    }

    /// The columns.
    #[must_use]
    pub const fn schema(&self) -> &Schema {
        match self {
            Self::Table(_, schema) => schema,
            Self::Csv(source) => source.schema(),
            Self::JsonLines(source) => source.schema(),
            Self::Parquet(source) => source.schema(),
            Self::Idx(source) => source.schema(),
        }
    }

    /// Reads all rows in order.
    ///
    /// # Errors
    /// As [`Self::open`], and those of `emit`; the reason for which the attempt shall stop.
    pub fn read(&self, ctx: &StageContext, emit: &mut Emit<'_>) -> Result<(), StageError> {
        match self {
            Self::Table(input, _) => {
                for batch in TableReader::open(input)? {
                    ctx.check_cancelled()?;
                    emit(batch?)?;
                }
                Ok(())
            }
            Self::Csv(source) => source.read(ctx, emit),
            Self::JsonLines(source) => source.read(ctx, emit),
            Self::Parquet(source) => source.read(ctx, emit),
            Self::Idx(source) => source.read(ctx, emit),
        }
    }
}

fn format_of(
    input: &Input,
    spec: &ReadSpec,
    files: &[SourceFile],
) -> Result<FileFormat, StageError> {
    if files.is_empty() {
        return Err(StageError::data(format!(
            "the input `{}` has no files",
            input.name
        )));
    }
    if let Some(format) = spec.format {
        return Ok(format);
    }
    let mut found: Option<(FileFormat, &str)> = None;
    for file in files {
        let format = format_by_name(&file.path).ok_or_else(|| {
            StageError::user(format!(
                "cannot tell the format of `{}` by its name: write `read: {{ {}: {{ format: csv }} }}` (or json_lines, parquet, idx)",
                file.label, input.name
            ))
        })?;
        match found {
            Some((first, label)) if first != format => {
                return Err(StageError::user(format!(
                    "`{label}` and `{}` are of different formats: make them two inputs",
                    file.label
                )));
            }
            _ => found = Some((format, &file.label)),
        }
    }
    found
        .map(|(format, _)| format)
        .ok_or_else(|| StageError::data(format!("the input `{}` has no files", input.name)))
}

fn format_by_name(path: &Path) -> Option<FileFormat> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let is_idx = [
        "-idx1-ubyte",
        "-idx3-ubyte",
        "-idx4-ubyte",
        ".idx1-ubyte",
        ".idx3-ubyte",
        ".idx",
    ];
    if name.ends_with(".csv") {
        Some(FileFormat::Csv)
    } else if name.ends_with(".jsonl") || name.ends_with(".ndjson") {
        Some(FileFormat::JsonLines)
    } else if name.ends_with(".parquet") {
        Some(FileFormat::Parquet)
    } else if is_idx.iter().any(|end| name.ends_with(end)) {
        Some(FileFormat::Idx)
    } else {
        None
    }
}

/// Checks that the columns that `types` names are there.
fn check_types(spec: &ReadSpec, schema: &[String], label: &str) -> Result<(), StageError> {
    for name in spec.types.keys() {
        if !schema.contains(name) {
            return Err(StageError::data(format!(
                "`{label}`: `types`: {}",
                crate::table::missing_column(name, schema.iter().map(String::as_str))
            )));
        }
    }
    Ok(())
}

fn too_many_columns(label: &str, columns: usize) -> StageError {
    StageError::data(format!(
        "`{label}` has {columns} columns, more than {}: put wide data into rows, or images into IDX files",
        crate::schema::MAX_COLUMNS
    ))
}
