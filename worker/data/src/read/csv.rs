//! CSV (RFC 4180): quotes, LF or CRLF, with or without BOM and header. A formula stays text.
//!
//! Parsing is the `csv` crate's; what it is lenient about is checked here: the number of fields,
//! unclosed quotes, UTF-8, and bounds on records, fields and columns.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    io::{self, Read},
    rc::Rc,
};

use csv::ByteRecord;
use emberline_common::spec::kinds::convert::ReadSpec;
use emberline_worker::stage::{StageContext, StageError};

use super::{
    Emit, MAX_FIELD_BYTES, MAX_RECORD_BYTES, SourceFile, bytes, check_types, too_many_columns,
};
use crate::{
    scalar::{Guess, push_cast},
    schema::{BatchBuilder, ColumnDef, MAX_COLUMNS, Schema, Value, quoted},
};

/// CSV files with the same columns.
pub struct CsvSource {
    files: Vec<SourceFile>,
    spec: ReadSpec,
    schema: Schema,
}

impl CsvSource {
    pub(super) fn open(
        files: Vec<SourceFile>,
        spec: &ReadSpec,
        ctx: &StageContext,
    ) -> Result<Self, StageError> {
        delimiter(spec)?;
        let mut names: Option<Vec<String>> = None;
        let mut guesses: Vec<Guess> = Vec::new();
        let mut rows: u64 = 0;
        for file in &files {
            let mut records = Records::open(file, spec)?;
            let own = records.names()?;
            match &names {
                None => {
                    guesses = vec![Guess::default(); own.len()];
                    names = Some(own);
                }
                Some(first) if *first == own => {}
                Some(_) => {
                    return Err(StageError::data(format!(
                        "`{}` has other columns than `{}`",
                        file.label, files[0].label
                    )));
                }
            }
            let names = names.as_deref().unwrap_or_default();
            let guessed: Vec<bool> = names
                .iter()
                .map(|name| !spec.types.contains_key(name))
                .collect();
            while records.next(names)? {
                if rows.is_multiple_of(4096) {
                    ctx.check_cancelled()?;
                }
                rows += 1;
                for (column, guess) in guesses.iter_mut().enumerate() {
                    let field = records.field(column, names)?;
                    if guessed[column] && !is_null(spec, field) {
                        guess.look_at(field);
                    }
                }
            }
        }
        let names = names.unwrap_or_default();
        check_types(spec, &names, &files[0].label)?;
        if rows == 0 {
            return Err(StageError::data(format!(
                "`{}` has a header, but no rows",
                files[0].label
            )));
        }
        let columns = names
            .into_iter()
            .zip(&guesses)
            .map(|(name, guess)| ColumnDef {
                column_type: spec
                    .types
                    .get(&name)
                    .copied()
                    .unwrap_or_else(|| guess.column_type()),
                name,
            })
            .collect();
        Ok(Self {
            files,
            spec: spec.clone(),
            schema: Schema { columns },
        })
    }

    pub(super) const fn schema(&self) -> &Schema {
        &self.schema
    }

    pub(super) fn read(&self, ctx: &StageContext, emit: &mut Emit<'_>) -> Result<(), StageError> {
        let names: Vec<String> = self.schema.names().map(str::to_owned).collect();
        let mut builder = BatchBuilder::new(&self.schema);
        for file in &self.files {
            let mut records = Records::open(file, &self.spec)?;
            records.names()?;
            while records.next(&names)? {
                for (column, def) in self.schema.columns.iter().enumerate() {
                    let field = records.field(column, &names)?;
                    if is_null(&self.spec, field) {
                        builder.push(column, Value::Null);
                    } else {
                        push_cast(&mut builder, column, def.column_type, Value::Text(field))
                            .map_err(|e| {
                                records.error(&format!("column {}: {e}", quoted(&def.name)))
                            })?;
                    }
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

fn take(builder: &mut BatchBuilder) -> Result<arrow_array::RecordBatch, StageError> {
    builder
        .take()
        .map_err(|e| StageError::system(format!("cannot build a batch: {e}")))
}

fn is_null(spec: &ReadSpec, field: &str) -> bool {
    spec.null_values.iter().any(|null| null == field)
}

fn delimiter(spec: &ReadSpec) -> Result<u8, StageError> {
    match spec.delimiter.as_bytes() {
        [b] if b.is_ascii_punctuation() && *b != b'"' => Ok(*b),
        [b @ (b'\t' | b' ')] => Ok(*b),
        _ => Err(StageError::user(format!(
            "`delimiter` is {}: it is to be one character such as `,`, `;`, `|` or a tab, not a letter, digit or quote",
            quoted(&spec.delimiter)
        ))),
    }
}

/// What is put behind the last byte. A file that ends inside of a quoted field swallows it; one that
/// is complete gives it back as a record of its own.
const END: &[u8] = b"\n\0emberlineEnd\0";

/// The records of one file, checked.
struct Records<'a> {
    file: &'a SourceFile,
    header: bool,
    reader: csv::Reader<Guard>,
    state: Rc<RefCell<GuardState>>,
    record: ByteRecord,
    line: u64,
    lines: u64,
    /// The first record, when it is not a header.
    pending: bool,
}

impl<'a> Records<'a> {
    fn open(file: &'a SourceFile, spec: &ReadSpec) -> Result<Self, StageError> {
        let state = Rc::new(RefCell::new(GuardState::default()));
        let guard = Guard {
            inner: bytes::open(file)?.0,
            state: state.clone(),
            utf8: Utf8Check::default(),
            end: 0,
        };
        let reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(delimiter(spec)?)
            .buffer_capacity(BUFFER_BYTES)
            .from_reader(guard);
        Ok(Self {
            file,
            header: spec.header,
            reader,
            state,
            record: ByteRecord::new(),
            line: 0,
            lines: 0,
            pending: false,
        })
    }

    /// The columns' names: from the header, or counted off the first record.
    fn names(&mut self) -> Result<Vec<String>, StageError> {
        if !self.read()? {
            return Err(StageError::data(format!("`{}` is empty", self.file.label)));
        }
        if self.record.len() > MAX_COLUMNS {
            return Err(too_many_columns(&self.file.label, self.record.len()));
        }
        if !self.header {
            self.pending = true;
            return Ok((0..self.record.len())
                .map(|i| format!("column_{i}"))
                .collect());
        }
        let mut names: Vec<String> = Vec::with_capacity(self.record.len());
        let mut places: HashMap<String, usize> = HashMap::new();
        for column in 0..self.record.len() {
            let name = self.text(column, &format!("column {}", column + 1))?;
            if name.trim().is_empty() {
                return Err(self.error(&format!(
                    "column {} has no name in the header: give it one, or set `header: false` if this line is data",
                    column + 1
                )));
            }
            if name.len() > 1024 {
                return Err(self.error(&format!(
                    "the name of column {} is longer than 1,024 bytes",
                    column + 1
                )));
            }
            if let Some(first) = places.insert(name.to_owned(), column) {
                return Err(self.error(&format!(
                    "the column name {} stands twice in the header, as columns {} and {}",
                    quoted(name),
                    first + 1,
                    column + 1
                )));
            }
            names.push(name.to_owned());
        }
        Ok(names)
    }

    /// Goes to the next record; false at the end.
    fn next(&mut self, names: &[String]) -> Result<bool, StageError> {
        if self.pending {
            self.pending = false;
        } else if !self.read()? {
            return Ok(false);
        }
        if self.record.len() != names.len() {
            let what = if self.header { "header" } else { "first line" };
            return Err(self.error(&format!(
                "{} fields, but the {what} has {}",
                self.record.len(),
                names.len()
            )));
        }
        Ok(true)
    }

    fn field(&self, column: usize, names: &[String]) -> Result<&str, StageError> {
        self.text(column, &names[column])
    }

    fn text(&self, column: usize, name: &str) -> Result<&str, StageError> {
        let field = self.record.get(column).unwrap_or_default();
        if field.len() > MAX_FIELD_BYTES {
            return Err(self.error(&format!(
                "column {}: the field has {} bytes, more than {MAX_FIELD_BYTES}",
                quoted(name),
                field.len()
            )));
        }
        std::str::from_utf8(field).map_err(|_| {
            let offset = self.state.borrow().bad_utf8.unwrap_or_default();
            self.error(&format!(
                "column {}: not UTF-8 at byte {offset} of the file: save it as UTF-8",
                quoted(name)
            ))
        })
    }

    fn error(&self, what: &str) -> StageError {
        StageError::data(format!("`{}` line {}: {what}", self.file.label, self.line))
    }

    /// Reads a record; false at the end.
    fn read(&mut self) -> Result<bool, StageError> {
        let start = self.reader.position().byte();
        self.state.borrow_mut().limit = start + MAX_RECORD_BYTES + BUFFER_BYTES as u64;
        let read = self.reader.read_byte_record(&mut self.record);
        let end = self.reader.position().byte();
        if self.state.borrow().too_long {
            self.line = self.line_after(start);
            return Err(self.too_long());
        }
        self.count_lines(end);
        match read {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(e) => {
                return Err(match e.into_kind() {
                    csv::ErrorKind::Io(e) => bytes::failed(self.file, e),
                    other => self.error(&format!("cannot be read: {other:?}")),
                });
            }
        }
        if end.saturating_sub(start) > MAX_RECORD_BYTES {
            return Err(self.too_long());
        }
        let ended = self.state.borrow().ended;
        let last = self.record.iter().next_back().unwrap_or_default();
        if let Some(length) = ended.filter(|length| end >= length + END.len() as u64) {
            if self.record.len() == 1 && last == &END[1..] {
                return Ok(false);
            }
            if last.ends_with(END) {
                // The line feed of the end mark is not the file's.
                self.line += 1;
                return Err(self.error(&format!(
                    "a quote is opened and never closed (the file ends after {length} bytes)"
                )));
            }
        }
        Ok(true)
    }

    fn too_long(&self) -> StageError {
        self.error(&format!(
            "a record of more than {MAX_RECORD_BYTES} bytes: is a quote not closed?"
        ))
    }

    /// The line of the record that begins behind byte `start`, where the last one ended: the line
    /// feed of its CRLF and empty lines may come first.
    fn line_after(&self, start: u64) -> u64 {
        let state = self.state.borrow();
        let empty = (start..)
            .zip(&state.newlines)
            .take_while(|(at, newline)| at == *newline);
        self.lines + empty.count() as u64 + 1
    }

    /// Sets `line` to where the record begins that ends before byte `end`, counted from 1.
    fn count_lines(&mut self, end: u64) {
        let mut state = self.state.borrow_mut();
        let (before, mut last) = (self.lines, None);
        while let Some(newline) = state.newlines.front().copied().filter(|n| *n < end) {
            state.newlines.pop_front();
            self.lines += 1;
            last = Some(newline);
        }
        let own = u64::from(last.is_some_and(|n| n + 1 == end));
        // Line feeds that stand in fields are among them, if there are more than its own.
        let inside: usize = if self.lines == before + own {
            0
        } else {
            let fields = self.record.iter();
            fields
                .map(|field| memchr::memchr_iter(b'\n', field).count())
                .sum()
        };
        self.line = (1 + self.lines).saturating_sub(inside as u64 + own).max(1);
    }
}

const BUFFER_BYTES: usize = 64 << 10;

/// What is known of the raw bytes that the parser has been given.
#[derive(Default)]
struct GuardState {
    /// Bytes that it may have had.
    limit: u64,
    /// Bytes that it has had.
    total: u64,
    too_long: bool,
    /// The file's length, once it has ended.
    ended: Option<u64>,
    /// Where the line feeds are that are not counted yet.
    newlines: VecDeque<u64>,
    /// Where the first byte is that is not UTF-8.
    bad_utf8: Option<u64>,
}

/// Stands between file and parser: bounds a record, remembers lines and the first bad byte, and puts
/// [`END`] behind the last one.
struct Guard {
    inner: Box<dyn Read>,
    state: Rc<RefCell<GuardState>>,
    utf8: Utf8Check,
    end: usize,
}

impl Read for Guard {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        if state.ended.is_none() {
            let room = state.limit.saturating_sub(state.total);
            if room == 0 {
                state.too_long = true;
                return Err(io::Error::other("the record is too long"));
            }
            let wanted = buffer
                .len()
                .min(usize::try_from(room).unwrap_or(usize::MAX));
            let read = self.inner.read(&mut buffer[..wanted])?;
            if read > 0 {
                let start = state.total;
                state.total += read as u64;
                let newlines = memchr::memchr_iter(b'\n', &buffer[..read]);
                state.newlines.extend(newlines.map(|i| start + i as u64));
                if state.bad_utf8.is_none() {
                    state.bad_utf8 = self.utf8.check(start, &buffer[..read]);
                }
                return Ok(read);
            }
            state.ended = Some(state.total);
            if state.bad_utf8.is_none() {
                state.bad_utf8 = self.utf8.finish(state.total);
            }
        }
        let rest = &END[self.end..];
        let read = rest.len().min(buffer.len());
        buffer[..read].copy_from_slice(&rest[..read]);
        self.end += read;
        Ok(read)
    }
}

/// Finds the first byte that is not UTF-8 in bytes that come in pieces.
#[derive(Default)]
struct Utf8Check {
    /// The begin of a character that the last piece cut off.
    carry: Vec<u8>,
}

impl Utf8Check {
    fn check(&mut self, start: u64, piece: &[u8]) -> Option<u64> {
        let mut piece = piece;
        let mut start = start;
        while !self.carry.is_empty() {
            let (first, rest) = piece.split_first()?;
            let begin = start - self.carry.len() as u64;
            self.carry.push(*first);
            (piece, start) = (rest, start + 1);
            match std::str::from_utf8(&self.carry) {
                Ok(_) => self.carry.clear(),
                Err(e) if e.error_len().is_some() => return Some(begin),
                Err(_) => {}
            }
        }
        match std::str::from_utf8(piece) {
            Ok(_) => None,
            Err(e) if e.error_len().is_some() => Some(start + e.valid_up_to() as u64),
            Err(e) => {
                self.carry = piece[e.valid_up_to()..].to_vec();
                None
            }
        }
    }

    fn finish(&self, total: u64) -> Option<u64> {
        (!self.carry.is_empty()).then(|| total - self.carry.len() as u64)
    }
}
