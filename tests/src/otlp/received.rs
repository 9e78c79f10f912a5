//! What a receiver of OTLP has got, in a form that is easy to look at.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
        trace::v1::ExportTraceServiceRequest,
    },
    common::v1::{AnyValue, KeyValue, any_value},
    logs::v1::LogRecord as SentRecord,
    metrics::v1::{
        AggregationTemporality, Metric as SentMetric, NumberDataPoint, metric, number_data_point,
    },
    resource::v1::Resource,
    trace::v1::{Span as SentSpan, span, status::StatusCode},
};
use prost::Message;
use serde_json::{Value, json};

use super::Trace;

/// Attributes by name. The type of a value is that of the JSON: a whole number is an integer, one
/// with a point a double.
pub type Attributes = BTreeMap<String, Value>;

/// Everything that was received, in order.
#[derive(Debug, Default, Clone)]
pub struct Received {
    /// Spans.
    pub spans: Vec<Span>,
    /// Metrics, one for each time that they were exported.
    pub metrics: Vec<Metric>,
    /// Log records.
    pub logs: Vec<LogRecord>,
    /// Every request as it came, for those who look for what must not be in it.
    raw: Vec<Vec<u8>>,
}

/// A span.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// The attributes of who sent it.
    pub resource: Attributes,
    /// The trace, 32 hex digits.
    pub trace: String,
    /// Itself, 16 hex digits.
    pub id: String,
    /// The span that it is part of; empty for none.
    pub parent: String,
    /// Its name.
    pub name: String,
    /// `INTERNAL`, `SERVER`, `CLIENT`, `PRODUCER`, `CONSUMER`.
    pub kind: &'static str,
    /// From, in nanoseconds since 1970.
    pub start: u64,
    /// Until.
    pub end: u64,
    /// Its attributes.
    pub attributes: Attributes,
    /// What happened within it.
    pub events: Vec<SpanEvent>,
    /// Traces and spans that it is linked to.
    pub links: Vec<(String, String)>,
    /// What its status says of an error, if it is one.
    pub error: Option<String>,
    /// Its flags (W3C).
    pub flags: u32,
}

/// What happened within a span.
#[derive(Debug, Clone, PartialEq)]
pub struct SpanEvent {
    /// Its name.
    pub name: String,
    /// When, in nanoseconds since 1970.
    pub at: u64,
    /// Its attributes.
    pub attributes: Attributes,
}

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// A value that is read.
    Gauge,
    /// A sum that only grows.
    Counter,
    /// A sum that goes up and down.
    UpDownCounter,
    /// A distribution.
    Histogram,
}

/// One export of one metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Metric {
    /// The attributes of who sent it.
    pub resource: Attributes,
    /// Its name.
    pub name: String,
    /// Its unit.
    pub unit: String,
    /// What it is about.
    pub description: String,
    /// What it is.
    pub kind: MetricKind,
    /// Whether its points count from the start of the process on.
    pub is_cumulative: bool,
    /// Its points.
    pub points: Vec<Point>,
}

/// One point of a metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Its attributes.
    pub attributes: Attributes,
    /// The value; of a histogram the sum.
    pub value: f64,
    /// How many values a histogram has seen.
    pub count: u64,
    /// Since when it counts, in nanoseconds since 1970.
    pub start: u64,
}

/// One log record.
#[derive(Debug, Clone, PartialEq)]
pub struct LogRecord {
    /// The attributes of who sent it.
    pub resource: Attributes,
    /// `ERROR`, `WARN`, `INFO` and so on.
    pub severity: String,
    /// The text.
    pub body: Value,
    /// Its attributes.
    pub attributes: Attributes,
    /// The trace that it belongs to; empty for none.
    pub trace: String,
    /// The span that it belongs to; empty for none.
    pub span: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn value(value: Option<AnyValue>) -> Value {
    use any_value::Value as Sent;
    match value.and_then(|v| v.value) {
        None => Value::Null,
        Some(Sent::StringValue(text)) => json!(text),
        Some(Sent::BoolValue(flag)) => json!(flag),
        Some(Sent::IntValue(number)) => json!(number),
        Some(Sent::DoubleValue(number)) => json!(number),
        Some(Sent::BytesValue(bytes)) => json!({ "bytes": hex(&bytes) }),
        Some(Sent::ArrayValue(array)) => array
            .values
            .into_iter()
            .map(|v| self::value(Some(v)))
            .collect(),
        Some(Sent::KvlistValue(list)) => {
            let pairs = list.values.into_iter();
            Value::Object(pairs.map(|kv| (kv.key, self::value(kv.value))).collect())
        }
        Some(other) => panic!("a value of a kind that nobody sends: {other:?}"),
    }
}

/// # Panics
/// If a name is there twice: OTLP forbids that.
fn attributes(sent: Vec<KeyValue>) -> Attributes {
    let mut out = Attributes::new();
    for kv in sent {
        let before = out.insert(kv.key.clone(), value(kv.value));
        assert!(
            before.is_none(),
            "the attribute `{}` is there twice",
            kv.key
        );
    }
    out
}

fn resource(sent: Option<Resource>) -> Attributes {
    attributes(sent.unwrap_or_default().attributes)
}

impl Received {
    pub(super) fn add_traces(&mut self, request: ExportTraceServiceRequest) {
        self.raw.push(request.encode_to_vec());
        for of_resource in request.resource_spans {
            let resource = resource(of_resource.resource);
            let spans = of_resource.scope_spans.into_iter().flat_map(|s| s.spans);
            self.spans.extend(spans.map(|s| Span::read(s, &resource)));
        }
    }

    pub(super) fn add_metrics(&mut self, request: ExportMetricsServiceRequest) {
        self.raw.push(request.encode_to_vec());
        for of_resource in request.resource_metrics {
            let resource = resource(of_resource.resource);
            let metrics = of_resource
                .scope_metrics
                .into_iter()
                .flat_map(|s| s.metrics);
            self.metrics
                .extend(metrics.map(|m| Metric::read(m, &resource)));
        }
    }

    pub(super) fn add_logs(&mut self, request: ExportLogsServiceRequest) {
        self.raw.push(request.encode_to_vec());
        for of_resource in request.resource_logs {
            let resource = resource(of_resource.resource);
            let records = of_resource
                .scope_logs
                .into_iter()
                .flat_map(|s| s.log_records);
            self.logs
                .extend(records.map(|r| LogRecord::read(r, &resource)));
        }
    }

    /// Whether this text was sent anywhere, in whatever field.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        let text = text.as_bytes();
        let in_one = |raw: &Vec<u8>| raw.windows(text.len()).any(|part| part == text);
        self.raw.iter().any(in_one)
    }

    /// The trace of that id, each span once.
    ///
    /// # Errors
    /// If two spans of one id are not the same.
    pub fn trace(&self, id: &str) -> Result<Trace, String> {
        Trace::of(self.spans.iter().filter(|span| span.trace == id))
    }

    /// The ids of all traces, in the order in which they were first heard of.
    #[must_use]
    pub fn trace_ids(&self) -> Vec<&str> {
        let mut out: Vec<&str> = Vec::new();
        for span in &self.spans {
            if !out.contains(&span.trace.as_str()) {
                out.push(&span.trace);
            }
        }
        out
    }

    /// The last export of a metric by each sender.
    ///
    /// # Errors
    /// If nobody has sent it.
    pub fn metric(&self, name: &str) -> Result<Vec<&Metric>, String> {
        let mut last: Vec<&Metric> = Vec::new();
        for metric in self.metrics.iter().filter(|m| m.name == name) {
            match last.iter_mut().find(|m| m.resource == metric.resource) {
                Some(before) => *before = metric,
                None => last.push(metric),
            }
        }
        if last.is_empty() {
            let mut names: Vec<_> = self.metrics.iter().map(|m| &m.name).collect();
            names.sort();
            names.dedup();
            return Err(format!("no metric `{name}`, but {names:?}"));
        }
        Ok(last)
    }

    /// The points of the last export by each sender that have these attributes and perhaps others.
    ///
    /// # Errors
    /// If nobody has sent the metric.
    pub fn points(&self, name: &str, with: &[(&str, &str)]) -> Result<Vec<&Point>, String> {
        let metrics = self.metric(name)?;
        let points = metrics.into_iter().flat_map(|m| &m.points);
        let has = |point: &&Point| {
            with.iter()
                .all(|(name, value)| point.attributes.get(*name).is_some_and(|v| v == value))
        };
        Ok(points.filter(has).collect())
    }

    /// The sum of the values of [`Self::points`].
    ///
    /// # Errors
    /// If nobody has sent the metric.
    pub fn total(&self, name: &str, with: &[(&str, &str)]) -> Result<f64, String> {
        Ok(self.points(name, with)?.iter().map(|p| p.value).sum())
    }

    /// How many values the histograms of [`Self::points`] have seen.
    ///
    /// # Errors
    /// If nobody has sent the metric.
    pub fn count(&self, name: &str, with: &[(&str, &str)]) -> Result<u64, String> {
        Ok(self.points(name, with)?.iter().map(|p| p.count).sum())
    }

    /// The log records of a trace.
    pub fn logs_of<'a>(&'a self, trace: &'a str) -> impl Iterator<Item = &'a LogRecord> {
        self.logs.iter().filter(move |record| record.trace == trace)
    }
}

impl Span {
    fn read(sent: SentSpan, resource: &Attributes) -> Self {
        let status = sent.status.unwrap_or_default();
        let is_error = status.code == StatusCode::Error as i32;
        Self {
            resource: resource.clone(),
            trace: hex(&sent.trace_id),
            id: hex(&sent.span_id),
            parent: hex(&sent.parent_span_id),
            name: sent.name,
            kind: match span::SpanKind::try_from(sent.kind) {
                Ok(span::SpanKind::Internal) => "INTERNAL",
                Ok(span::SpanKind::Server) => "SERVER",
                Ok(span::SpanKind::Client) => "CLIENT",
                Ok(span::SpanKind::Producer) => "PRODUCER",
                Ok(span::SpanKind::Consumer) => "CONSUMER",
                Ok(span::SpanKind::Unspecified) | Err(_) => "UNSPECIFIED",
            },
            start: sent.start_time_unix_nano,
            end: sent.end_time_unix_nano,
            attributes: attributes(sent.attributes),
            events: (sent.events.into_iter())
                .map(|event| SpanEvent {
                    name: event.name,
                    at: event.time_unix_nano,
                    attributes: attributes(event.attributes),
                })
                .collect(),
            links: (sent.links.into_iter())
                .map(|link| (hex(&link.trace_id), hex(&link.span_id)))
                .collect(),
            error: is_error.then_some(status.message),
            flags: sent.flags,
        }
    }

    /// An attribute.
    ///
    /// # Panics
    /// If it has none of that name.
    #[must_use]
    #[track_caller]
    pub fn attribute(&self, name: &str) -> &Value {
        let found = self.attributes.get(name);
        found.unwrap_or_else(|| panic!("no `{name}` in {self:#?}"))
    }

    /// From when to when, in milliseconds since 1970.
    #[must_use]
    pub const fn millis(&self) -> (u64, u64) {
        (self.start / 1_000_000, self.end / 1_000_000)
    }

    /// Whether it has this attribute with this text.
    #[must_use]
    pub fn is(&self, name: &str, text: &str) -> bool {
        self.attributes.get(name).is_some_and(|value| value == text)
    }
}

impl Metric {
    fn read(sent: SentMetric, resource: &Attributes) -> Self {
        let cumulative = AggregationTemporality::Cumulative as i32;
        let number = |point: NumberDataPoint| Point {
            attributes: attributes(point.attributes),
            value: match point.value {
                Some(number_data_point::Value::AsDouble(value)) => value,
                #[allow(clippy::cast_precision_loss, reason = "no test counts that far")]
                Some(number_data_point::Value::AsInt(value)) => value as f64,
                None => f64::NAN,
            },
            count: 1,
            start: point.start_time_unix_nano,
        };
        let (kind, is_cumulative, points) = match sent.data {
            Some(metric::Data::Gauge(gauge)) => {
                let points = gauge.data_points.into_iter().map(number).collect();
                (MetricKind::Gauge, true, points)
            }
            Some(metric::Data::Sum(sum)) => {
                let kind = match sum.is_monotonic {
                    true => MetricKind::Counter,
                    false => MetricKind::UpDownCounter,
                };
                let points = sum.data_points.into_iter().map(number).collect();
                (kind, sum.aggregation_temporality == cumulative, points)
            }
            Some(metric::Data::Histogram(histogram)) => {
                let points = histogram.data_points.into_iter().map(|point| {
                    let in_buckets: u64 = point.bucket_counts.iter().sum();
                    assert_eq!(in_buckets, point.count, "{} counts badly", sent.name);
                    Point {
                        attributes: attributes(point.attributes),
                        value: point.sum.unwrap_or_default(),
                        count: point.count,
                        start: point.start_time_unix_nano,
                    }
                });
                let is_cumulative = histogram.aggregation_temporality == cumulative;
                (MetricKind::Histogram, is_cumulative, points.collect())
            }
            other => panic!(
                "`{}` is a metric of a kind that nobody sends: {other:?}",
                sent.name
            ),
        };
        Self {
            resource: resource.clone(),
            name: sent.name,
            unit: sent.unit,
            description: sent.description,
            kind,
            is_cumulative,
            points,
        }
    }
}

impl LogRecord {
    fn read(sent: SentRecord, resource: &Attributes) -> Self {
        Self {
            resource: resource.clone(),
            severity: sent.severity_text,
            body: value(sent.body),
            attributes: attributes(sent.attributes),
            trace: hex(&sent.trace_id),
            span: hex(&sent.span_id),
        }
    }
}
