//! What a command prints: line by line into the log, within bounds, whatever bytes it is.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{
    secrets::{Redactor, SHOWN},
    stage::{AttemptSink, LogSource},
};

/// The longest line; a longer one is broken into several.
const LINE_BYTES: usize = 16 << 10;
/// Lines of standard error that an error message repeats.
const TAIL_LINES: usize = 5;
const TAIL_LINE_BYTES: usize = 300;

/// Where both streams of a command go.
pub(super) struct Capture {
    sink: Arc<dyn AttemptSink>,
    limit: u64,
    redactor: Redactor,
    kept: AtomicU64,
    dropped: AtomicU64,
    tail: Mutex<VecDeque<String>>,
}

impl Capture {
    pub fn new(sink: Arc<dyn AttemptSink>, limit: u64, redactor: Redactor) -> Arc<Self> {
        Arc::new(Self {
            sink,
            limit,
            redactor,
            kept: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            tail: Mutex::default(),
        })
    }

    /// Reads a stream to its end. It is read on after the limit, so that the command goes on.
    pub async fn read(self: Arc<Self>, source: LogSource, mut from: impl AsyncRead + Unpin) {
        let mut buffer = vec![0_u8; 64 << 10];
        let mut line = Vec::new();
        loop {
            let read = match from.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(read) => read,
            };
            if self.kept.load(Ordering::Relaxed) >= self.limit && line.is_empty() {
                self.dropped.fetch_add(read as u64, Ordering::Relaxed);
                continue;
            }
            // The sink may wait a moment when the store does not keep up.
            match tokio::runtime::Handle::current().runtime_flavor() {
                tokio::runtime::RuntimeFlavor::CurrentThread => {
                    self.lines(source, &mut line, &buffer[..read]);
                }
                _ => tokio::task::block_in_place(|| {
                    self.lines(source, &mut line, &buffer[..read]);
                }),
            }
        }
        if !line.is_empty() {
            self.whole(source, &mut line);
        }
    }

    fn lines(&self, source: LogSource, line: &mut Vec<u8>, mut bytes: &[u8]) {
        // A long line is broken where that parts no secret, which may be seen only later.
        let most = LINE_BYTES + self.redactor.longest();
        while !bytes.is_empty() {
            let room = (most - line.len()).min(bytes.len());
            let end = bytes[..room].iter().position(|b| *b == b'\n');
            let (part, rest) = bytes.split_at(end.unwrap_or(room));
            line.extend_from_slice(part);
            bytes = rest;
            if end.is_some() {
                bytes = &bytes[1..];
                self.whole(source, line);
            } else if line.len() >= most {
                self.piece(source, line);
            }
        }
    }

    /// Takes a line that has come to its end.
    fn whole(&self, source: LogSource, line: &mut Vec<u8>) {
        while line.len() > LINE_BYTES {
            self.piece(source, line);
        }
        self.line(source, line);
        line.clear();
    }

    /// Takes the beginning of a line that is too long.
    fn piece(&self, source: LogSource, line: &mut Vec<u8>) {
        // What is shown in the place of a secret has room, too.
        let room = if self.redactor.is_empty() {
            0
        } else {
            SHOWN.len()
        };
        let cut = self.redactor.cut(line, LINE_BYTES - room);
        self.line(source, &line[..cut]);
        line.drain(..cut);
    }

    fn line(&self, source: LogSource, line: &[u8]) {
        let bytes = line.len() as u64 + 1;
        if self.kept.fetch_add(bytes, Ordering::Relaxed) >= self.limit {
            self.dropped.fetch_add(bytes, Ordering::Relaxed);
            return;
        }
        let text = String::from_utf8_lossy(line);
        // Here already, for of its end an error message repeats no more than a part.
        let text = self.redactor.text(text.trim_end_matches('\r'));
        self.sink.log(source, &text);
        if source == LogSource::Stderr && !text.trim().is_empty() {
            let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(text.chars().take(TAIL_LINE_BYTES).collect());
        }
    }

    /// Says how much was not kept.
    pub fn finish(&self) {
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > 0 {
            let line = format!(
                "the command printed {dropped} more bytes than the {} of `max_log`; they were dropped",
                self.limit
            );
            self.sink.log(LogSource::Stage, &line);
        }
    }

    /// The last lines of standard error, for an error message.
    pub fn tail(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(" | ")
    }
}
