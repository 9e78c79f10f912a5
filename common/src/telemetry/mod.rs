//! What leaves the process for those who watch it: spans, metrics and logs over OTLP.
//!
//! It must never be in the way: whoever hands something over does not wait, what there is no room
//! for is dropped and counted, and a collector that is down is tried again by a task of its own.
//! Start with [`Telemetry`].

mod span;

pub use span::{Span, SpanEvent, SpanKind};

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::trace::RunTrace;

/// The way out for spans, metrics and logs; cheap to clone. By default nothing is exported.
#[derive(Debug, Clone, Default)]
pub struct Telemetry(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    spans: mpsc::Sender<Span>,
}

impl Telemetry {
    /// Hands its spans to the receiver; for tests.
    #[must_use]
    pub fn collecting(capacity: usize) -> (Self, mpsc::Receiver<Span>) {
        let (spans, received) = mpsc::channel(capacity);
        (Self(Some(Arc::new(Inner { spans }))), received)
    }

    /// Whether spans are exported at all: if not, they need not be made.
    #[must_use]
    pub fn traces(&self) -> bool {
        self.0.is_some()
    }

    /// Whether the spans of this run are exported. The answer is the same in every process that
    /// is set up in the same way.
    #[must_use]
    pub fn samples(&self, run: &RunTrace) -> bool {
        self.traces() && run.sampled.unwrap_or(true)
    }

    /// Hands over a span that has ended. Never waits.
    pub fn span(&self, span: Span) {
        if let Some(inner) = &self.0 {
            let _ = inner.spans.try_send(span);
        }
    }

    /// What instruments of metrics are made of, under the scope `emberline`. Without an exporter its
    /// instruments do nothing.
    #[must_use]
    pub fn meter(&self) -> opentelemetry::metrics::Meter {
        use opentelemetry::metrics::MeterProvider as _;
        opentelemetry::metrics::noop::NoopMeterProvider::new().meter("emberline")
    }
}
