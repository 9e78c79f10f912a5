//! A span for each request, joined to its caller's, where somebody looks at them. Where no collector
//! is configured this costs a look at one flag.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use emberline_common::{
    telemetry::{Span, SpanKind, Telemetry},
    time::Timestamp,
    trace::{SpanId, TraceContext, TraceId, fresh_span, fresh_trace},
};
use opentelemetry::KeyValue;

use crate::{config::ServeConfig, error::InferError, infer::Answer};

/// Makes spans of requests.
#[derive(Debug)]
pub(crate) struct Traces {
    telemetry: Telemetry,
    roots_per_second: u64,
    /// The second, and the root spans that began in it: 32 bits each.
    roots: AtomicU64,
    began: Instant,
}

/// A span that has begun.
#[derive(Debug)]
pub(crate) struct Traced {
    trace: TraceId,
    span: SpanId,
    parent: Option<SpanId>,
    model: String,
}

impl Traces {
    pub fn new(config: &ServeConfig) -> Self {
        Self {
            telemetry: config.telemetry.clone(),
            roots_per_second: u64::from(config.limits.root_spans_per_second),
            roots: AtomicU64::new(0),
            began: Instant::now(),
        }
    }

    /// Begins a span, if this request is to have one.
    pub fn begin(&self, caller: Option<TraceContext>, model: &str) -> Option<Traced> {
        if !self.telemetry.traces() || self.telemetry.is_stuck() {
            return None;
        }
        let (trace, parent) = match caller {
            Some(caller) => {
                let taken = self.telemetry.takes(caller.trace, Some(caller.sampled));
                (taken && caller.sampled).then_some((caller.trace, Some(caller.span)))?
            }
            None => {
                let trace = self.may_begin().then(fresh_trace)?;
                let taken = self.telemetry.takes(trace, None);
                taken.then_some((trace, None))?
            }
        };
        Some(Traced {
            trace,
            span: fresh_span(),
            parent,
            model: model.to_owned(),
        })
    }

    /// Whether one more trace may begin in this second.
    fn may_begin(&self) -> bool {
        let second = (self.began.elapsed().as_secs() + 1) << 32;
        let next = |before: u64| {
            if before & !0xffff_ffff != second {
                return (self.roots_per_second > 0).then_some(second | 1);
            }
            (before & 0xffff_ffff < self.roots_per_second).then_some(before + 1)
        };
        self.roots.fetch_update(Relaxed, Relaxed, next).is_ok()
    }

    /// It ends now.
    pub fn end(
        &self,
        traced: Traced,
        arrived: Instant,
        id: &Arc<str>,
        result: &Result<Answer, InferError>,
    ) {
        let end = Timestamp::now();
        let start = end.before(arrived.elapsed());
        let name = format!(
            "infer {}",
            traced.model.chars().take(100).collect::<String>()
        );
        let mut span = Span::new(traced.trace, traced.span, traced.parent, name, start, end);
        span.kind = SpanKind::Server;
        span.parent_is_remote = traced.parent.is_some();
        span.attributes = vec![KeyValue::new("emberline.request.id", id.to_string())];
        match result {
            Ok(answer) => {
                let rows = i64::try_from(answer.rows).unwrap_or(i64::MAX);
                span.attributes
                    .extend(answer.version.attributes.iter().cloned());
                span.attributes
                    .push(KeyValue::new("emberline.request.rows", rows));
            }
            Err(error) => {
                let kind = KeyValue::new("error.type", error.outcome());
                span.attributes.push(kind);
                span.error = Some(error.to_string());
            }
        }
        self.telemetry.span(span);
    }
}
