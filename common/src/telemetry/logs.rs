//! The process's own log, over OTLP: each event of `tracing` with its fields, its severity, and the
//! trace and span that it belongs to.
//!
//! A `tracing` span that has the fields `trace_id` and `span_id` ([`attempt_span`]) gives them to
//! everything that is logged within it.

use std::fmt::{self, Write as _};

use opentelemetry::logs::{AnyValue, LogRecord as _, Logger as _, Severity};
use opentelemetry_sdk::logs::SdkLogger;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use super::{Telemetry, otlp::system_time};
use crate::{
    ids::AttemptId,
    time::Timestamp,
    trace::{SpanId, TraceContext, TraceId},
};

/// What makes the exports themselves: what they log must not be exported again.
const OWN: [&str; 7] = [
    "opentelemetry",
    "tonic",
    "h2",
    "hyper",
    "tower",
    "reqwest",
    "rustls",
];

/// The span of `tracing` in which all is logged that is done for an attempt. No level that lets
/// anything be logged leaves it out, for then a warning would not say what it belongs to.
#[must_use]
pub fn attempt_span(context: Option<&TraceContext>, id: &AttemptId) -> tracing::Span {
    match context {
        Some(context) => tracing::error_span!(
            "attempt",
            %id,
            trace_id = %context.trace,
            span_id = %context.span,
        ),
        None => tracing::error_span!("attempt", %id),
    }
}

/// The trace and the span that are in a span's fields.
#[derive(Debug, Default, Clone, Copy)]
struct Belongs {
    trace: Option<TraceId>,
    span: Option<SpanId>,
}

impl Visit for Belongs {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "trace_id" => self.trace = format!("{value:?}").parse().ok(),
            "span_id" => self.span = format!("{value:?}").parse().ok(),
            _ => {}
        }
    }
}

/// Turns an event's fields into the body and the attributes of a record.
struct Fields<'a, R> {
    record: &'a mut R,
}

impl<R: opentelemetry::logs::LogRecord> Fields<'_, R> {
    fn add(&mut self, field: &Field, value: impl Into<AnyValue>) {
        if field.name() == "message" {
            self.record.set_body(value.into());
        } else {
            self.record.add_attribute(field.name(), value);
        }
    }
}

impl<R: opentelemetry::logs::LogRecord> Visit for Fields<'_, R> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        // Writing into a text does not fail.
        let _ = write!(text, "{value:?}");
        self.add(field, text);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, i64::try_from(value).unwrap_or(i64::MAX));
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value);
    }
}

/// The layer that exports what is logged. It is there before the exporter is, and does nothing
/// until [`Telemetry::start`] has given it one.
#[derive(Debug, Clone, Default)]
pub struct LogLayer {
    telemetry: std::sync::Arc<std::sync::OnceLock<Telemetry>>,
}

impl LogLayer {
    /// From now on it exports by this.
    pub fn connect(&self, telemetry: &Telemetry) {
        // The first one stays.
        let _ = self.telemetry.set(telemetry.clone());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLayer {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let mut belongs = Belongs::default();
        attributes.record(&mut belongs);
        if let Some(span) = ctx.span(id).filter(|_| belongs.trace.is_some()) {
            span.extensions_mut().insert(belongs);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let Some(telemetry) = self.telemetry.get() else {
            return;
        };
        let target = event.metadata().target();
        let origin = target.split("::").next().unwrap_or(target);
        if OWN.into_iter().any(|name| origin.starts_with(name)) {
            return;
        }
        telemetry.log_record(|logger: &SdkLogger| {
            let mut record = logger.create_log_record();
            let (severity, text) = match *event.metadata().level() {
                Level::ERROR => (Severity::Error, "ERROR"),
                Level::WARN => (Severity::Warn, "WARN"),
                Level::INFO => (Severity::Info, "INFO"),
                Level::DEBUG => (Severity::Debug, "DEBUG"),
                Level::TRACE => (Severity::Trace, "TRACE"),
            };
            let now = system_time(Timestamp::now());
            record.set_timestamp(now);
            record.set_observed_timestamp(now);
            record.set_severity_number(severity);
            record.set_severity_text(text);
            record.set_target(target.to_owned());
            event.record(&mut Fields {
                record: &mut record,
            });
            let mut scope = ctx.event_scope(event).into_iter().flatten();
            let belongs = scope.find_map(|span| span.extensions().get::<Belongs>().copied());
            if let Some(Belongs {
                trace: Some(trace),
                span,
            }) = belongs
            {
                record.set_trace_context(
                    opentelemetry::TraceId::from_bytes(trace.to_bytes()),
                    opentelemetry::SpanId::from_bytes(span.unwrap_or_default().to_bytes()),
                    Some(opentelemetry::TraceFlags::SAMPLED),
                );
            }
            record
        });
    }
}
