//! What an attempt tells those who watch: the spans below its own, and figures.
//!
//! The attempt's own span is the coordinator's, which makes it from its record; here is made only
//! what the record does not know. Nothing waits for it, and nothing fails by it. Start with
//! [`AttemptTelemetry`]; a stage comes to it by [`StageContext::span`](crate::stage::StageContext::span).

use std::{fmt, sync::Arc, time::Instant};

use emberline_common::{
    artifact::ArtifactStore,
    ids::{ArtifactName, AttemptId, Digest, PipelineName},
    telemetry::{Span, SpanEvent, SpanKind, Telemetry, cache_hits, within},
    time::Timestamp,
    trace::{RunTrace, TraceContext, fresh_span},
};
use opentelemetry::{
    Key, KeyValue, Value,
    metrics::{Counter, Gauge},
};
use tokio::sync::watch;

use crate::{
    search::LeaderSeen,
    secrets::Redactor,
    stage::{StageError, StopReason},
};

/// What failed in a way that has no name of its own (OpenTelemetry's semantic conventions).
const OTHER: &str = "_OTHER";

/// The instruments of a worker.
#[derive(Debug)]
pub(crate) struct Instruments {
    telemetry: Telemetry,
    bytes: Counter<u64>,
    hits: Counter<u64>,
    rate: Gauge<f64>,
    sessions: Counter<u64>,
}

impl Instruments {
    pub fn new(telemetry: Telemetry) -> Arc<Self> {
        let meter = telemetry.meter();
        Arc::new(Self {
            bytes: meter
                .u64_counter("emberline.artifact.io")
                .with_unit("By")
                .with_description("Bytes of the artifacts that attempts got and put")
                .build(),
            hits: cache_hits(&meter),
            rate: meter
                .f64_gauge("emberline.training.throughput")
                .with_unit("{sample}/s")
                .with_description("Samples learned from per second, in the last epoch")
                .build(),
            sessions: meter
                .u64_counter("emberline.worker.sessions")
                .with_unit("{session}")
                .with_description("Sessions with a leader that this worker has begun")
                .build(),
            telemetry,
        })
    }

    /// A session with a leader has begun.
    pub fn session_begun(&self) {
        self.sessions.add(1, &[]);
    }

    /// Tells whether there is a session with a leader, for as long as the process lives.
    pub fn tell_connected(&self, leader: watch::Receiver<Option<LeaderSeen>>) {
        // Whoever looks at increases must have seen a zero before the first one.
        self.sessions.add(0, &[]);
        // The meter keeps the callback.
        let _ = (self.telemetry.meter())
            .u64_observable_gauge("emberline.worker.connected")
            .with_unit("{worker}")
            .with_description("1 while this worker has a session with a leader, else 0")
            .with_callback(move |observer| {
                observer.observe(leader.borrow().is_some().into(), &[]);
            })
            .build();
    }
}

/// Which way an artifact goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Get,
    Put,
}

impl Direction {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
        }
    }
}

/// An artifact that is where it was to go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moved {
    /// Its manifest.
    pub digest: Digest,
    /// Of its files.
    pub bytes: u64,
    /// Whether no file had to be sent, for all were there.
    pub hit: bool,
}

/// What one attempt tells. Cheap to clone.
#[derive(Clone)]
pub struct AttemptTelemetry {
    instruments: Arc<Instruments>,
    /// The attempt's own span, if the leader has named one.
    context: Option<TraceContext>,
    /// Whether spans are made.
    traced: bool,
    pipeline: PipelineName,
    stop: watch::Receiver<Option<StopReason>>,
    redactor: Redactor,
}

impl fmt::Debug for AttemptTelemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AttemptTelemetry")
            .field(&self.context)
            .finish()
    }
}

impl AttemptTelemetry {
    /// Of an attempt that was assigned with this `traceparent`.
    pub(crate) fn new(
        instruments: Arc<Instruments>,
        id: &AttemptId,
        pipeline: PipelineName,
        traceparent: &str,
        stop: watch::Receiver<Option<StopReason>>,
    ) -> Self {
        let context: Option<TraceContext> = traceparent.parse().ok();
        // Who assigned it has decided; this process's own sampler may leave out more.
        let sampled = context.is_some_and(|context| context.sampled);
        let run = RunTrace::of(&id.run, traceparent);
        let traced = sampled && instruments.telemetry.samples(&run);
        Self {
            instruments,
            context,
            traced,
            pipeline,
            stop,
            redactor: Redactor::default(),
        }
    }

    /// Tells nothing that this takes out.
    pub(crate) fn redacting(self, redactor: Redactor) -> Self {
        Self { redactor, ..self }
    }

    /// The attempt's own span, if it is part of a trace.
    pub(crate) const fn context(&self) -> Option<TraceContext> {
        self.context
    }

    /// Begins a span below the attempt's.
    pub(crate) fn span(&self, name: impl Into<String>) -> StageSpan {
        let Some(context) = self.context.filter(|_| self.traced) else {
            return StageSpan(None);
        };
        let start = Timestamp::now();
        let id = fresh_span();
        let span = Span::new(context.trace, id, Some(context.span), name, start, start);
        StageSpan(Some(Box::new(Open {
            telemetry: self.instruments.telemetry.clone(),
            span,
            began: Instant::now(),
            stop: self.stop.clone(),
            redactor: self.redactor.clone(),
        })))
    }

    /// Moves an artifact: with a span, which the calls to the store are part of, and counted. Its
    /// digest and its size are told as soon as they are `known`.
    pub(crate) async fn transfer<T>(
        &self,
        direction: Direction,
        artifact: &ArtifactName,
        store: &ArtifactStore,
        known: Option<(Digest, u64)>,
        work: impl Future<Output = Result<(T, Moved), StageError>>,
    ) -> Result<T, StageError> {
        let mut span = self.span(format!("{} {artifact}", direction.as_str()));
        span.kind(SpanKind::Client);
        span.set("server.address", store.address().to_owned());
        let tell = |span: &mut StageSpan, digest: Digest, bytes: u64| {
            span.set("emberline.artifact.digest", digest.to_string());
            span.set("emberline.artifact.bytes", signed(bytes));
        };
        if let Some((digest, bytes)) = known {
            tell(&mut span, digest, bytes);
        }
        match within(span.context(), work).await {
            Ok((done, moved)) => {
                if known.is_none() {
                    tell(&mut span, moved.digest, moved.bytes);
                }
                span.set("emberline.cache.hit", moved.hit);
                span.end();
                self.count(direction, moved);
                Ok(done)
            }
            Err(error) => {
                span.fail(&error);
                Err(error)
            }
        }
    }

    fn count(&self, direction: Direction, moved: Moved) {
        let attributes = [
            KeyValue::new("emberline.direction", direction.as_str()),
            KeyValue::new("emberline.cache.hit", moved.hit),
        ];
        self.instruments.bytes.add(moved.bytes, &attributes);
        if direction == Direction::Get && moved.hit {
            let cache = KeyValue::new("emberline.cache", "artifact");
            self.instruments.hits.add(1, &[cache]);
        }
    }

    /// How fast a training is.
    pub(crate) fn samples_per_second(&self, rate: f64) {
        if rate.is_finite() {
            let pipeline = KeyValue::new("cicd.pipeline.name", self.pipeline.to_string());
            self.instruments.rate.record(rate, &[pipeline]);
        }
    }
}

/// OpenTelemetry's whole numbers have a sign.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A part of an attempt, from when it was begun until it [ends](Self::end) or [fails](Self::fail).
/// Dropped before, it has failed: by what the attempt was asked to stop for, if it was.
///
/// Where nothing is traced it does nothing.
#[derive(Debug)]
#[must_use = "it ends as failed when it is dropped"]
pub struct StageSpan(Option<Box<Open>>);

#[derive(Debug)]
struct Open {
    telemetry: Telemetry,
    span: Span,
    began: Instant,
    stop: watch::Receiver<Option<StopReason>>,
    redactor: Redactor,
}

impl Open {
    /// By the clock that only goes forward, so that no part of it ends before it began.
    fn now(&self) -> Timestamp {
        self.span.start.after(self.began.elapsed())
    }
}

impl StageSpan {
    /// Says something of it. Names of your own begin with a name of yours, as `emberline.` does.
    pub fn set(&mut self, name: impl Into<Key>, value: impl Into<Value>) {
        if let Some(open) = &mut self.0 {
            let attribute = KeyValue::new(name, value);
            open.span.attributes.push(attribute);
        }
    }

    /// Something happens within it now.
    pub fn event<N: Into<Key>, V: Into<Value>>(
        &mut self,
        name: &'static str,
        attributes: impl IntoIterator<Item = (N, V)>,
    ) {
        if let Some(open) = &mut self.0 {
            let attributes = attributes.into_iter().map(|(n, v)| KeyValue::new(n, v));
            let event = SpanEvent {
                name,
                at: open.now(),
                attributes: attributes.collect(),
            };
            open.span.events.push(event);
        }
    }

    /// It has succeeded.
    pub fn end(mut self) {
        self.close(None);
    }

    /// It has failed.
    pub fn fail(mut self, error: &StageError) {
        self.close(Some((error.reason.as_str(), &error.message)));
    }

    /// How it stands to others; a part of the attempt's own work unless said.
    pub(crate) fn kind(&mut self, kind: SpanKind) {
        if let Some(open) = &mut self.0 {
            open.span.kind = kind;
        }
    }

    /// What is part of it goes on from here.
    pub(crate) fn context(&self) -> Option<TraceContext> {
        self.0.as_ref().map(|open| TraceContext {
            trace: open.span.trace,
            span: open.span.id,
            sampled: true,
        })
    }

    fn close(&mut self, failed: Option<(&'static str, &str)>) {
        let Some(mut open) = self.0.take() else {
            return;
        };
        open.span.end = open.now();
        if let Some((error, why)) = failed {
            open.span
                .attributes
                .push(KeyValue::new("error.type", error));
            open.span.error = Some(why.to_owned());
        }
        open.redactor.span(&mut open.span);
        open.telemetry.span(open.span);
    }
}

impl Drop for StageSpan {
    fn drop(&mut self) {
        let Some(open) = &self.0 else { return };
        let stopped = *open.stop.borrow();
        let error = stopped.map_or(OTHER, |why| why.reason().as_str());
        self.close(Some((error, "it was not brought to its end")));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use tokio::sync::mpsc::Receiver;

    use super::*;

    const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    struct Watched {
        attempt: AttemptTelemetry,
        spans: Receiver<Span>,
        stop: watch::Sender<Option<StopReason>>,
    }

    fn watched(traceparent: &str) -> Watched {
        let (telemetry, spans) = Telemetry::collecting(100);
        let (stop, stopped) = watch::channel(None);
        let id = AttemptId {
            run: "r".parse().unwrap(),
            task: "t".parse().unwrap(),
            attempt: 1,
        };
        let attempt = AttemptTelemetry::new(
            Instruments::new(telemetry),
            &id,
            "p".parse().unwrap(),
            traceparent,
            stopped,
        );
        Watched {
            attempt,
            spans,
            stop,
        }
    }

    fn attribute(span: &Span, name: &str) -> String {
        let found = span.attributes.iter().find(|a| a.key.as_str() == name);
        found.map(|a| a.value.to_string()).unwrap_or_default()
    }

    async fn moves(
        watched: &Watched,
        known: Option<(Digest, u64)>,
        result: Result<Moved, StageError>,
    ) -> Option<StageError> {
        let store = ArtifactStore::open("memory:").unwrap();
        let work = async { result.map(|moved| ((), moved)) };
        let name = "data".parse().unwrap();
        let moving = watched
            .attempt
            .transfer(Direction::Get, &name, &store, known, work);
        moving.await.err()
    }

    #[test]
    fn a_part_of_an_attempt_is_below_the_attempts_own_span() {
        let mut watched = watched(TRACEPARENT);
        let mut span = watched.attempt.span("fold");
        span.set("acme.fold", 3);
        span.event("scores", [("acme.loss", 0.5)]);
        let before = Timestamp::now();
        while Timestamp::now().since(before) < Duration::from_millis(2) {}
        span.end();
        let span = watched.spans.try_recv().unwrap();
        assert_eq!(
            (span.name.as_str(), span.kind),
            ("fold", SpanKind::Internal)
        );
        let parent = TraceContext {
            trace: span.trace,
            span: span.parent.unwrap(),
            sampled: true,
        };
        assert_eq!(parent.to_string(), TRACEPARENT);
        assert_eq!(
            (attribute(&span, "acme.fold").as_str(), span.error),
            ("3", None)
        );
        assert!(span.end.since(span.start) >= Duration::from_millis(2));
        let event = &span.events[0];
        assert!(event.name == "scores" && event.at >= span.start && event.at <= span.end);
    }

    #[test]
    fn what_was_not_sampled_or_not_traced_makes_no_span() {
        for traceparent in ["", "nonsense", &TRACEPARENT.replace("-01", "-00")] {
            let mut watched = watched(traceparent);
            let mut span = watched.attempt.span("fold");
            span.set("acme.fold", 3);
            assert_eq!(span.context(), None);
            span.end();
            assert!(watched.spans.try_recv().is_err(), "{traceparent}");
        }
    }

    #[test]
    fn what_is_left_open_has_failed_by_what_the_attempt_was_stopped_for() {
        let mut watched = watched(TRACEPARENT);
        drop(watched.attempt.span("left"));
        let span = watched.spans.try_recv().unwrap();
        assert_eq!(attribute(&span, "error.type"), "_OTHER");
        assert!(span.error.is_some());
        let open = watched.attempt.span("cut");
        watched.stop.send_replace(Some(StopReason::Timeout));
        drop(open);
        let span = watched.spans.try_recv().unwrap();
        assert_eq!(attribute(&span, "error.type"), "timeout");
    }

    #[tokio::test]
    async fn a_transfer_tells_what_went_where() {
        let mut watched = watched(TRACEPARENT);
        let (digest, bytes) = (Digest::of(b"manifest"), 7);
        let moved = Moved {
            digest,
            bytes,
            hit: true,
        };
        assert!(moves(&watched, None, Ok(moved)).await.is_none());
        let span = watched.spans.try_recv().unwrap();
        assert_eq!(
            (span.name.as_str(), span.kind),
            ("get data", SpanKind::Client)
        );
        for (name, value) in [
            ("emberline.artifact.digest", digest.to_string().as_str()),
            ("emberline.artifact.bytes", "7"),
            ("emberline.cache.hit", "true"),
            ("server.address", "localhost"),
        ] {
            assert_eq!(attribute(&span, name), value, "{name}");
        }
        assert_eq!((span.attributes.len(), span.error), (4, None));
    }

    #[tokio::test]
    async fn a_transfer_that_failed_tells_why() {
        let mut watched = watched(TRACEPARENT);
        let known = Some((Digest::of(b"manifest"), 7));
        let failed = moves(&watched, known, Err(StageError::storage("it is gone"))).await;
        assert_eq!(failed.unwrap().message, "it is gone");
        let span = watched.spans.try_recv().unwrap();
        assert_eq!(attribute(&span, "error.type"), "storage");
        assert_eq!(attribute(&span, "emberline.artifact.bytes"), "7");
        assert_eq!(span.error.as_deref(), Some("it is gone"));
    }
}
