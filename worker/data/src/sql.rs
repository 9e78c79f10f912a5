//! One `SELECT` over the inputs, in SQLite's dialect.
//!
//! The inputs are copied into a private database in the attempt's work directory. The statement may
//! read it and nothing else: an authorizer refuses every other action (`ATTACH`, `PRAGMA`, writing,
//! loading code), and functions whose results differ from call to call, since a stage with the same
//! inputs is to give the same output. It stops soon after the attempt is told to.

use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use emberline_common::spec::Ordered;
use emberline_worker::stage::{StageContext, StageError};
use rusqlite::{
    Connection,
    hooks::{AuthAction, AuthContext, Authorization},
    limits::Limit,
    types::{ToSqlOutput, ValueRef},
};

use crate::{
    read::{Emit, TableSource},
    scalar::push_cast,
    schema::{BatchBuilder, ColumnDef, ColumnType, MAX_COLUMNS, Schema, Value, quoted},
    table::value_at,
};

/// The longest text or blob that a query may make.
const MAX_VALUE_BYTES: i32 = 64 << 20;
/// Steps of SQLite's machine between two looks at whether it shall stop.
const STEPS_PER_CHECK: i32 = 10_000;

/// The result of a query: its columns, and its rows in a file.
pub struct QueryResult {
    schema: Schema,
    path: PathBuf,
}

impl QueryResult {
    /// Loads the inputs, each with its name, runs `sql`, and finds the types of the result.
    ///
    /// A column has the type that it was declared with if it is one of an input's and its values
    /// agree, else that of its values: integers and floats together are floats. `casts` names the
    /// columns that may mix other types, since they are cast anyway.
    pub fn run(
        sql: &str,
        inputs: &[(String, TableSource)],
        casts: &Ordered<String, ColumnType>,
        ctx: &StageContext,
    ) -> Result<Self, StageError> {
        let database = ctx.work_dir.join("sql.db");
        let mut connection =
            Connection::open(&database).map_err(|e| trouble("open the database", &e))?;
        connection
            .execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
            .map_err(|e| trouble("set up the database", &e))?;
        let mut nans = 0;
        for (name, source) in inputs {
            nans += load(&mut connection, name, source, ctx)?;
        }
        if nans > 0 {
            ctx.log(format!("{nans} NaN became null: SQLite has no NaN"));
        }
        lock_up(&mut connection, ctx).map_err(|e| trouble("set up the database", &e))?;
        let path = ctx.work_dir.join("sql-result.bin");
        let schema = query(&connection, sql, casts, &path, ctx)?;
        drop(connection);
        let _ = std::fs::remove_file(&database);
        Ok(Self { schema, path })
    }

    /// The columns.
    pub const fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Gives the rows in the query's order.
    pub fn read(&self, ctx: &StageContext, emit: &mut Emit<'_>) -> Result<(), StageError> {
        let file = File::open(&self.path).map_err(|e| StageError::io("open", &self.path, e))?;
        let mut spill = BufReader::with_capacity(1 << 18, file);
        let failed = |e| StageError::io("read", &self.path, e);
        let mut builder = BatchBuilder::new(&self.schema);
        let take = |builder: &mut BatchBuilder| {
            builder
                .take()
                .map_err(|e| StageError::system(format!("cannot build a batch: {e}")))
        };
        let mut row: u64 = 0;
        let mut buffer = Vec::new();
        let mut more = [0];
        while spill.read(&mut more).map_err(failed)? == 1 {
            for (column, def) in self.schema.columns.iter().enumerate() {
                let cell = read_cell(&mut spill, &mut buffer).map_err(failed)?;
                push_cast(&mut builder, column, def.column_type, cell).map_err(|e| {
                    StageError::data(format!("`sql`: row {row}, column `{}`: {e}", def.name))
                })?;
            }
            row += 1;
            if builder.end_row() {
                ctx.check_cancelled()?;
                emit(take(&mut builder)?)?;
            }
        }
        emit(take(&mut builder)?)
    }
}

/// Copies an input into a table. Returns the number of NaN, which SQLite stores as null.
fn load(
    connection: &mut Connection,
    name: &str,
    source: &TableSource,
    ctx: &StageContext,
) -> Result<u64, StageError> {
    let refused = |e: rusqlite::Error| {
        StageError::data(format!("cannot load the input `{name}` for `sql`: {e}"))
    };
    let columns: Vec<String> = source
        .schema()
        .columns
        .iter()
        .map(|c| format!("{} {}", identifier(&c.name), declared(c.column_type)))
        .collect();
    let transaction = connection.transaction().map_err(refused)?;
    transaction
        .execute_batch(&format!(
            "CREATE TABLE {} ({})",
            identifier(name),
            columns.join(", ")
        ))
        .map_err(refused)?;
    let mut nans = 0;
    {
        let places = vec!["?"; columns.len()].join(", ");
        let mut insert = transaction
            .prepare(&format!(
                "INSERT INTO {} VALUES ({places})",
                identifier(name)
            ))
            .map_err(refused)?;
        source.read(ctx, &mut |batch| {
            for row in 0..batch.num_rows() {
                let values = batch.columns().iter().map(|array| {
                    let value = value_at(array.as_ref(), row);
                    nans += u64::from(matches!(value, Value::Float(v) if v.is_nan()));
                    Cell(value)
                });
                insert
                    .execute(rusqlite::params_from_iter(values))
                    .map_err(refused)?;
            }
            Ok(())
        })?;
    }
    transaction.commit().map_err(refused)?;
    Ok(nans)
}

struct Cell<'a>(Value<'a>);

impl rusqlite::ToSql for Cell<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self.0 {
            Value::Null => ValueRef::Null,
            Value::Integer(v) => ValueRef::Integer(v),
            Value::Float(v) => ValueRef::Real(v),
            Value::Boolean(v) => ValueRef::Integer(i64::from(v)),
            Value::Text(v) => ValueRef::Text(v.as_bytes()),
            Value::Bytes(v) => ValueRef::Blob(v),
        }))
    }
}

fn lock_up(connection: &mut Connection, ctx: &StageContext) -> rusqlite::Result<()> {
    connection.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
    connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)?;
    let stop = ctx.stop.clone();
    connection.progress_handler(STEPS_PER_CHECK, Some(move || stop.borrow().is_some()))?;
    connection.authorizer(Some(|context: AuthContext<'_>| match context.action {
        AuthAction::Select | AuthAction::Read { .. } | AuthAction::Recursive => {
            Authorization::Allow
        }
        AuthAction::Function { function_name } => {
            const REFUSED: [&str; 6] = [
                "random",
                "randomblob",
                "load_extension",
                "current_date",
                "current_time",
                "current_timestamp",
            ];
            if REFUSED
                .iter()
                .any(|f| f.eq_ignore_ascii_case(function_name))
            {
                Authorization::Deny
            } else {
                Authorization::Allow
            }
        }
        _ => Authorization::Deny,
    }))
}

/// Whether a query asks for the present time: by the literal `'now'`, or by a date function without
/// the argument that stands for a time. (The functions themselves are of use on columns.)
fn reads_the_clock(sql: &str) -> bool {
    let sql = sql.to_ascii_lowercase();
    if ["'now'", "\"now\""].iter().any(|now| sql.contains(now)) {
        return true;
    }
    // Each with the number of arguments below which the present time is meant.
    let functions = [
        ("date", 1),
        ("time", 1),
        ("datetime", 1),
        ("julianday", 1),
        ("unixepoch", 1),
        ("strftime", 2),
    ];
    functions.iter().any(|(name, enough)| {
        sql.match_indices(name).any(|(at, _)| {
            let in_name = |c: char| c.is_alphanumeric() || c == '_';
            let begins = !sql[..at].ends_with(in_name);
            let rest = sql[at + name.len()..].trim_start();
            begins
                && rest
                    .strip_prefix('(')
                    .is_some_and(|rest| arguments(rest) < *enough)
        })
    })
}

/// How many arguments stand before the closing parenthesis.
fn arguments(text: &str) -> usize {
    let (mut depth, mut quote, mut commas, mut empty) = (0_usize, None, 0, true);
    for c in text.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '(') => depth += 1,
            (None, ')') if depth == 0 => break,
            (None, ')') => depth -= 1,
            (None, ',') if depth == 0 => commas += 1,
            _ => {}
        }
        empty &= c.is_whitespace();
    }
    if empty { 0 } else { commas + 1 }
}

/// What a column of the result has held.
#[derive(Default, Clone)]
struct Seen {
    integers: bool,
    floats: bool,
    texts: bool,
    blobs: bool,
    beyond_boolean: bool,
}

fn query(
    connection: &Connection,
    sql: &str,
    casts: &Ordered<String, ColumnType>,
    path: &Path,
    ctx: &StageContext,
) -> Result<Schema, StageError> {
    if reads_the_clock(sql) {
        return Err(StageError::user(
            "`sql` asks what time it is now: the same inputs are to give the same rows, so take the \
             time from a column or a parameter",
        ));
    }
    let mut statement = connection.prepare(sql).map_err(|e| match e {
        rusqlite::Error::MultipleStatement => {
            StageError::user("`sql` is to be one SELECT, but there is more behind the first `;`")
        }
        e => wrong(&e),
    })?;
    if !statement.readonly() || statement.is_explain() != 0 || statement.column_count() == 0 {
        return Err(StageError::user("`sql` is to be one SELECT"));
    }
    if statement.parameter_count() > 0 {
        return Err(StageError::user(
            "`sql` has a parameter (`?`, `:name`): write the value itself, e.g. with `${params.name}`",
        ));
    }
    let columns: Vec<(String, Option<ColumnType>)> = statement
        .columns()
        .map(|c| (c.name().to_owned(), c.decl_type().and_then(type_declared)))
        .collect();
    if columns.len() > MAX_COLUMNS {
        return Err(StageError::data(format!(
            "`sql` gives {} columns, more than {MAX_COLUMNS}",
            columns.len()
        )));
    }
    for (number, (name, _)) in columns.iter().enumerate() {
        if columns[..number].iter().any(|(other, _)| other == name) {
            return Err(StageError::user(format!(
                "`sql` gives two columns {}: name them apart with AS",
                quoted(name)
            )));
        }
    }
    let file = File::create(path).map_err(|e| StageError::io("create", path, e))?;
    let mut spill = BufWriter::with_capacity(1 << 18, file);
    let failed = |e| StageError::io("write", path, e);
    let mut seen = vec![Seen::default(); columns.len()];
    let mut rows = statement.query([]).map_err(|e| wrong(&e))?;
    loop {
        let row = match rows.next() {
            Ok(Some(row)) => row,
            Ok(None) => break,
            Err(e) => {
                ctx.check_cancelled()?;
                return Err(wrong(&e));
            }
        };
        spill.write_all(&[1]).map_err(failed)?;
        for (column, seen) in seen.iter_mut().enumerate() {
            let value = row.get_ref(column).map_err(|e| wrong(&e))?;
            match value {
                ValueRef::Null => {}
                ValueRef::Integer(v) => {
                    seen.integers = true;
                    seen.beyond_boolean |= !(0..=1).contains(&v);
                }
                ValueRef::Real(_) => seen.floats = true,
                ValueRef::Text(v) => {
                    seen.texts = true;
                    if std::str::from_utf8(v).is_err() {
                        return Err(StageError::data(format!(
                            "`sql`: the column {} has a text that is not UTF-8",
                            quoted(&columns[column].0)
                        )));
                    }
                }
                ValueRef::Blob(_) => seen.blobs = true,
            }
            write_cell(&mut spill, value).map_err(failed)?;
        }
    }
    spill.flush().map_err(failed)?;
    let columns = columns
        .into_iter()
        .zip(&seen)
        .map(|((name, declared), seen)| {
            let column_type = seen.column_type(declared).or_else(|what| {
                casts.get(&name).copied().ok_or_else(|| {
                    StageError::data(format!(
                        "`sql`: the column {} mixes {what}: name its type under `cast`, or use CAST in the query",
                        quoted(&name)
                    ))
                })
            })?;
            Ok(ColumnDef { name, column_type })
        })
        .collect::<Result<Vec<_>, StageError>>()?;
    Ok(Schema { columns })
}

impl Seen {
    /// The one type of the values, or what they mix.
    fn column_type(&self, declared: Option<ColumnType>) -> Result<ColumnType, String> {
        let numbers = self.integers || self.floats;
        match (numbers, self.texts, self.blobs) {
            (false, false, false) => Ok(declared.unwrap_or(ColumnType::Text)),
            (true, false, false) if self.floats => Ok(ColumnType::Float),
            (true, false, false)
                if declared == Some(ColumnType::Boolean) && !self.beyond_boolean =>
            {
                Ok(ColumnType::Boolean)
            }
            (true, false, false) => Ok(ColumnType::Integer),
            (false, true, false) => Ok(ColumnType::Text),
            (false, false, true) => Ok(ColumnType::Bytes),
            (numbers, texts, blobs) => {
                let kinds = [(numbers, "numbers"), (texts, "texts"), (blobs, "bytes")];
                let kinds: Vec<&str> = kinds.iter().filter(|k| k.0).map(|k| k.1).collect();
                Err(kinds.join(" and "))
            }
        }
    }
}

fn write_cell(to: &mut impl Write, value: ValueRef<'_>) -> std::io::Result<()> {
    match value {
        ValueRef::Null => to.write_all(&[0]),
        ValueRef::Integer(v) => {
            to.write_all(&[1])?;
            to.write_all(&v.to_le_bytes())
        }
        ValueRef::Real(v) => {
            to.write_all(&[2])?;
            to.write_all(&v.to_le_bytes())
        }
        ValueRef::Text(v) | ValueRef::Blob(v) => {
            to.write_all(&[if matches!(value, ValueRef::Text(_)) {
                3
            } else {
                4
            }])?;
            to.write_all(&(v.len() as u64).to_le_bytes())?;
            to.write_all(v)
        }
    }
}

fn read_cell<'a>(from: &mut impl Read, buffer: &'a mut Vec<u8>) -> std::io::Result<Value<'a>> {
    let mut tag = [0];
    from.read_exact(&mut tag)?;
    if tag[0] == 0 {
        return Ok(Value::Null);
    }
    let mut word = [0; 8];
    from.read_exact(&mut word)?;
    match tag[0] {
        1 => Ok(Value::Integer(i64::from_le_bytes(word))),
        2 => Ok(Value::Float(f64::from_le_bytes(word))),
        kind => {
            buffer.clear();
            let length = u64::from_le_bytes(word);
            if from.by_ref().take(length).read_to_end(buffer)? as u64 != length {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if kind == 3 {
                let text = std::str::from_utf8(buffer)
                    .map_err(|_| std::io::Error::from(std::io::ErrorKind::InvalidData))?;
                Ok(Value::Text(text))
            } else {
                Ok(Value::Bytes(buffer))
            }
        }
    }
}

const fn declared(column_type: ColumnType) -> &'static str {
    match column_type {
        ColumnType::Integer => "INTEGER",
        ColumnType::Float => "REAL",
        ColumnType::Boolean => "BOOLEAN",
        ColumnType::Text => "TEXT",
        ColumnType::Bytes => "BLOB",
    }
}

fn type_declared(name: &str) -> Option<ColumnType> {
    match name {
        "INTEGER" => Some(ColumnType::Integer),
        "REAL" => Some(ColumnType::Float),
        "BOOLEAN" => Some(ColumnType::Boolean),
        "TEXT" => Some(ColumnType::Text),
        "BLOB" => Some(ColumnType::Bytes),
        _ => None,
    }
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// An error of the query itself.
fn wrong(error: &rusqlite::Error) -> StageError {
    let text = match error {
        rusqlite::Error::SqlInputError { msg, offset, .. } if *offset >= 0 => {
            format!("{msg} (at character {offset})")
        }
        other => other.to_string(),
    };
    let disk_full = error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull);
    if disk_full {
        return StageError::storage(format!("`sql` cannot run: {text}"));
    }
    let hint = if text.contains("not authorized") {
        ": `sql` may only read its inputs, and with functions that give the same result each time"
    } else {
        ""
    };
    StageError::user(format!("`sql` is wrong: {}{hint}", text.replace('\n', " ")))
}

fn trouble(doing: &str, error: &rusqlite::Error) -> StageError {
    StageError::storage(format!("cannot {doing} for `sql`: {error}"))
}
