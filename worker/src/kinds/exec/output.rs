//! What a command prints: line by line into the log, within bounds, whatever bytes it is.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::stage::{AttemptSink, LogSource};

/// The longest line; a longer one is broken into several.
const LINE_BYTES: usize = 16 << 10;
/// Lines of standard error that an error message repeats.
const TAIL_LINES: usize = 5;
const TAIL_LINE_BYTES: usize = 300;

/// Where both streams of a command go.
pub(super) struct Capture {
    sink: Arc<dyn AttemptSink>,
    limit: u64,
    kept: AtomicU64,
    dropped: AtomicU64,
    tail: Mutex<VecDeque<String>>,
}

impl Capture {
    pub fn new(sink: Arc<dyn AttemptSink>, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            sink,
            limit,
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
            self.line(source, &line);
        }
    }

    fn lines(&self, source: LogSource, line: &mut Vec<u8>, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = (LINE_BYTES - line.len()).min(bytes.len());
            let end = bytes[..room].iter().position(|b| *b == b'\n');
            let (part, rest) = bytes.split_at(end.unwrap_or(room));
            line.extend_from_slice(part);
            bytes = rest;
            if end.is_some() {
                bytes = &bytes[1..];
            }
            if end.is_some() || line.len() >= LINE_BYTES {
                self.line(source, line);
                line.clear();
            }
        }
    }

    fn line(&self, source: LogSource, line: &[u8]) {
        let bytes = line.len() as u64 + 1;
        if self.kept.fetch_add(bytes, Ordering::Relaxed) >= self.limit {
            self.dropped.fetch_add(bytes, Ordering::Relaxed);
            return;
        }
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end_matches('\r');
        self.sink.log(source, text);
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
