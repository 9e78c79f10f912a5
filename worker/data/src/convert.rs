//! The stage kind `convert`: files and tables in, tables out.
//!
//! read → `sql` → `cast` → `drop` and `rename` → one table, or parts. Rows stream through; a split
//! keeps two small numbers for each row and passes over the table twice.

use std::{path::Path, sync::Arc};

use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch};
use arrow_select::filter::filter_record_batch;
use emberline_common::{
    ids::{ArtifactName, StageKind},
    spec::{
        ArtifactType,
        kinds::{BuiltinKind, ConvertSpec, convert::SplitSpec},
    },
};
use emberline_worker::{
    documents::TableSummary,
    stage::{Produced, ProducedContent, Stage, StageContext, StageError, StageOutput},
};
use serde_json::{Map, Value as Json};

use crate::{
    read::{Emit, TableSource},
    scalar::push_cast,
    schema::{BatchBuilder, ColumnDef, ColumnType, Schema},
    split::{Part, Splitter},
    sql::QueryResult,
    table::{TableReader, missing_column, value_at},
    write::TableWriter,
};

/// `convert`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Convert;

impl Stage for Convert {
    fn kind(&self) -> StageKind {
        BuiltinKind::Convert.into()
    }

    fn version(&self) -> u32 {
        BuiltinKind::Convert.version()
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: ConvertSpec = ctx.spec()?;
        let rows = Rows::open(&spec, ctx)?;
        let transform = Transform::new(rows.schema(), &spec)?;
        let outputs = match &spec.split {
            None => {
                let name = artifact_name("data")?;
                let dir = ctx.output_dir(&name)?;
                let summary = write_whole(&rows, transform, &dir, ctx, &mut |_| {})?;
                vec![(name, dir, summary)]
            }
            Some(split) => write_parts(&rows, transform, split, ctx)?,
        };
        finish(outputs, ctx)
    }
}

/// The rows before `cast`.
enum Rows {
    Source(TableSource),
    Query(QueryResult),
}

impl Rows {
    fn open(spec: &ConvertSpec, ctx: &StageContext) -> Result<Self, StageError> {
        for name in spec.read.keys() {
            if !ctx.inputs.iter().any(|input| input.name == *name) {
                let there = ctx.inputs.iter().map(|input| input.name.as_str());
                return Err(StageError::user(format!(
                    "`read`: {}",
                    missing_column(name.as_str(), there).replace("column", "input")
                )));
            }
        }
        let mut sources = Vec::new();
        for input in &ctx.inputs {
            ctx.input(input.name.as_str())?;
            let source = TableSource::open(input, spec.read.get(&input.name), ctx)?;
            let columns = source.schema().columns.len();
            ctx.log(format!("input `{}`: {columns} columns", input.name));
            sources.push((input.name.as_str().replace('-', "_"), source));
        }
        for (number, (name, _)) in sources.iter().enumerate() {
            if sources[..number].iter().any(|(other, _)| other == name) {
                return Err(StageError::user(format!(
                    "two inputs are both the table `{name}` in `sql`: rename one"
                )));
            }
        }
        if let Some(sql) = &spec.sql {
            if sources.is_empty() {
                return Err(StageError::user(
                    "the stage has no input: add one under `inputs`",
                ));
            }
            let result = QueryResult::run(sql, &sources, &spec.cast, ctx)?;
            return Ok(Self::Query(result));
        }
        let mut sources = sources.into_iter();
        match (sources.next(), sources.next()) {
            (Some((_, only)), None) => Ok(Self::Source(only)),
            (None, _) => Err(StageError::user(
                "the stage has no input: add one under `inputs`",
            )),
            (Some(_), Some(_)) => Err(StageError::user(
                "the stage has several inputs: say with `sql` how they become one table",
            )),
        }
    }

    const fn schema(&self) -> &Schema {
        match self {
            Self::Source(source) => source.schema(),
            Self::Query(result) => result.schema(),
        }
    }

    fn read(&self, ctx: &StageContext, emit: &mut Emit<'_>) -> Result<(), StageError> {
        match self {
            Self::Source(source) => source.read(ctx, emit),
            Self::Query(result) => result.read(ctx, emit),
        }
    }
}

/// `cast`, `drop` and `rename`, batch by batch.
struct Transform {
    /// For each column of the result: where it comes from, and its new type if it has one.
    columns: Vec<(usize, Option<ColumnType>)>,
    schema: Schema,
    rows: u64,
}

impl Transform {
    fn new(from: &Schema, spec: &ConvertSpec) -> Result<Self, StageError> {
        let named = spec
            .cast
            .keys()
            .map(|name| ("cast", name))
            .chain(spec.drop.iter().map(|name| ("drop", name)))
            .chain(spec.rename.keys().map(|name| ("rename", name)));
        for (field, name) in named {
            if from.index_of(name).is_none() {
                return Err(StageError::data(format!(
                    "`{field}`: {}",
                    missing_column(name, from.names())
                )));
            }
        }
        let mut columns = Vec::new();
        let mut schema = Schema::default();
        for (number, column) in from.columns.iter().enumerate() {
            if spec.drop.contains(&column.name) {
                continue;
            }
            let cast = spec
                .cast
                .get(&column.name)
                .copied()
                .filter(|to| *to != column.column_type);
            let name = spec
                .rename
                .get(&column.name)
                .unwrap_or(&column.name)
                .clone();
            if name.trim().is_empty() {
                return Err(StageError::user(format!(
                    "`rename`: the new name of `{}` is empty",
                    column.name
                )));
            }
            if schema.index_of(&name).is_some() {
                return Err(StageError::user(format!(
                    "`rename`: two columns would be called `{name}`"
                )));
            }
            columns.push((number, cast));
            schema.columns.push(ColumnDef {
                name,
                column_type: cast.unwrap_or(column.column_type),
            });
        }
        if columns.is_empty() {
            return Err(StageError::user("`drop` leaves no column"));
        }
        Ok(Self {
            columns,
            schema,
            rows: 0,
        })
    }

    fn apply(&mut self, batch: &RecordBatch) -> Result<RecordBatch, StageError> {
        let broken = |e| StageError::system(format!("cannot build a batch: {e}"));
        let mut arrays: Vec<ArrayRef> = Vec::with_capacity(self.columns.len());
        for ((from, cast), def) in self.columns.iter().zip(&self.schema.columns) {
            let array = batch.column(*from);
            if cast.is_none() {
                arrays.push(array.clone());
                continue;
            }
            let mut builder = BatchBuilder::new(&Schema {
                columns: vec![def.clone()],
            });
            for row in 0..array.len() {
                push_cast(
                    &mut builder,
                    0,
                    def.column_type,
                    value_at(array.as_ref(), row),
                )
                .map_err(|e| {
                    StageError::data(format!(
                        "`cast`: row {}, column `{}`: {e}",
                        self.rows + row as u64,
                        batch.schema_ref().field(*from).name()
                    ))
                })?;
                builder.end_row();
            }
            arrays.push(Arc::clone(builder.take().map_err(broken)?.column(0)));
        }
        self.rows += batch.num_rows() as u64;
        RecordBatch::try_new(self.schema.to_arrow(), arrays).map_err(broken)
    }
}

fn write_whole(
    rows: &Rows,
    mut transform: Transform,
    dir: &Path,
    ctx: &StageContext,
    look: &mut dyn FnMut(&RecordBatch),
) -> Result<TableSummary, StageError> {
    let mut writer = TableWriter::create(dir, &transform.schema)?;
    rows.read(ctx, &mut |batch| {
        let batch = transform.apply(&batch)?;
        look(&batch);
        writer.push(&batch)?;
        ctx.progress(-1.0, &format!("{} rows", writer.rows()));
        Ok(())
    })?;
    if writer.rows() == 0 {
        return Err(StageError::data("the result has no rows"));
    }
    writer.finish()
}

type Written = Vec<(ArtifactName, std::path::PathBuf, TableSummary)>;

fn write_parts(
    rows: &Rows,
    transform: Transform,
    split: &SplitSpec,
    ctx: &StageContext,
) -> Result<Written, StageError> {
    let mut splitter = Splitter::new(split)?;
    let schema = transform.schema.clone();
    let place = |field: &str, column: &Option<String>| {
        let Some(column) = column else {
            return Ok(None);
        };
        schema.index_of(column).map(Some).ok_or_else(|| {
            StageError::data(format!(
                "`split.{field}`: {}",
                missing_column(column, schema.names())
            ))
        })
    };
    let stratify = place("stratify", &split.stratify)?;
    let group = place("group", &split.group)?;
    let whole = ctx.work_dir.join("whole");
    std::fs::create_dir_all(&whole).map_err(|e| StageError::io("make the directory", &whole, e))?;
    write_whole(rows, transform, &whole, ctx, &mut |batch| {
        for row in 0..batch.num_rows() {
            let at = |column: Option<usize>| {
                column.map(|column| value_at(batch.column(column).as_ref(), row))
            };
            splitter.push(at(stratify), at(group));
        }
    })?;
    let part_of = splitter.finish()?;
    let mut outputs = Vec::new();
    for part in Part::of(split) {
        let name = artifact_name(part.name())?;
        let dir = ctx.output_dir(&name)?;
        let writer = TableWriter::create(&dir, &schema)?;
        outputs.push((part, name, dir, writer));
    }
    let mut first = 0;
    for batch in TableReader::open_dir(&whole)? {
        ctx.check_cancelled()?;
        let batch = batch?;
        let parts = &part_of[first..first + batch.num_rows()];
        first += batch.num_rows();
        for (part, _, _, writer) in &mut outputs {
            let mask: BooleanArray = parts.iter().map(|p| Some(p == part)).collect();
            let chosen = filter_record_batch(&batch, &mask)
                .map_err(|e| StageError::system(format!("cannot filter a batch: {e}")))?;
            writer.push(&chosen)?;
        }
    }
    outputs
        .into_iter()
        .map(|(_, name, dir, writer)| Ok((name, dir, writer.finish()?)))
        .collect()
}

fn finish(outputs: Written, ctx: &StageContext) -> Result<StageOutput, StageError> {
    let mut out = StageOutput::default();
    let mut rows = 0;
    for (name, dir, summary) in outputs {
        rows += summary.rows;
        out.results
            .insert("columns".to_owned(), summary.columns.len().into());
        if name.as_str() != "data" {
            out.results
                .insert(format!("{name}_rows"), summary.rows.into());
        }
        ctx.log(format!(
            "output `{name}`: {} rows, {} columns",
            summary.rows,
            summary.columns.len()
        ));
        out.artifacts.push(Produced {
            name,
            content: ProducedContent::Directory {
                dir,
                artifact_type: ArtifactType::Table,
                metadata: metadata(&summary)?,
            },
        });
    }
    out.results.insert("rows".to_owned(), rows.into());
    Ok(out)
}

fn metadata(summary: &TableSummary) -> Result<Map<String, Json>, StageError> {
    match serde_json::to_value(summary) {
        Ok(Json::Object(map)) => Ok(map),
        Ok(_) => Err(StageError::system("a table's summary is not an object")),
        Err(e) => Err(StageError::system(format!(
            "cannot write a table's summary: {e}"
        ))),
    }
}

fn artifact_name(name: &str) -> Result<ArtifactName, StageError> {
    ArtifactName::new(name).map_err(|e| StageError::system(format!("`{name}`: {e}")))
}
