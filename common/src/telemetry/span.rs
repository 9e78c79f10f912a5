//! A span as we make it: with ids of our own, known before it begins.

use opentelemetry::KeyValue;

use crate::{
    time::Timestamp,
    trace::{SpanId, TraceId},
};

/// How a span stands to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SpanKind {
    /// A part of one process's work.
    #[default]
    Internal,
    /// The answer to a call.
    Server,
    /// A call to something else.
    Client,
}

/// One thing that happened within a span.
#[derive(Debug, Clone, PartialEq)]
pub struct SpanEvent {
    /// Its name.
    pub name: &'static str,
    /// When.
    pub at: Timestamp,
    /// What is known of it.
    pub attributes: Vec<KeyValue>,
}

/// A span that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Its trace.
    pub trace: TraceId,
    /// Itself.
    pub id: SpanId,
    /// The span that it is part of.
    pub parent: Option<SpanId>,
    /// Whether that one is another system's.
    pub parent_is_remote: bool,
    /// Its name.
    pub name: String,
    /// How it stands to others.
    pub kind: SpanKind,
    /// From.
    pub start: Timestamp,
    /// Until; never before `start`.
    pub end: Timestamp,
    /// What is known of it.
    pub attributes: Vec<KeyValue>,
    /// What happened within it.
    pub events: Vec<SpanEvent>,
    /// Spans that it follows without being part of them.
    pub links: Vec<(TraceId, SpanId)>,
    /// Why it did not succeed.
    pub error: Option<String>,
}

impl Span {
    /// A span without attributes. An `end` before the `start` is moved there: clocks differ.
    #[must_use]
    pub fn new(
        trace: TraceId,
        id: SpanId,
        parent: Option<SpanId>,
        name: impl Into<String>,
        start: Timestamp,
        end: Timestamp,
    ) -> Self {
        Self {
            trace,
            id,
            parent,
            parent_is_remote: false,
            name: name.into(),
            kind: SpanKind::default(),
            start,
            end: end.max(start),
            attributes: Vec::new(),
            events: Vec::new(),
            links: Vec::new(),
            error: None,
        }
    }
}
