//! What leaves the process for those who watch it: spans, metrics and logs over OTLP.
//!
//! It must never be in the way: whoever hands something over does not wait, what there is no room
//! for is dropped and counted, and a collector that is down is tried again by a task of its own.
//! Start with [`Telemetry`]; what the environment may say is in `settings`.

mod background;
mod current;
mod logs;
mod otlp;
mod outlet;
mod page;
mod process;
mod settings;
mod span;

pub use current::{current, within};
pub use logs::{LogLayer, attempt_span};
pub use page::{METRICS_PATH, metrics_page, text_page};
pub use settings::{Sampling, WrongVariable};
pub use span::{Span, SpanEvent, SpanKind};

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use opentelemetry::{
    KeyValue,
    logs::LoggerProvider as _,
    metrics::{Counter, Meter, MeterProvider as _},
};
use opentelemetry_sdk::{
    Resource,
    logs::{SdkLogRecord, SdkLogger, SdkLoggerProvider},
    metrics::{PeriodicReader, SdkMeterProvider},
};
use prometheus::{Encoder as _, TextEncoder};
use thiserror::Error;
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::trace::{RunTrace, TraceId};
use background::Background;
use outlet::{Inlet, export_all, inlet};
use settings::Settings;

/// Who exports.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What kind of process it is, e.g. `emberline-coordinator`; `OTEL_SERVICE_NAME` overrides it.
    pub service: &'static str,
    /// Which one of them.
    pub instance: String,
}

/// Why there is no telemetry.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// The environment says something that cannot be meant.
    #[error(transparent)]
    Variable(#[from] WrongVariable),
    /// An exporter could not be made.
    #[error("cannot export {signal}: {why}; look at the OTEL_EXPORTER_OTLP_… variables")]
    Exporter {
        /// Of what.
        signal: &'static str,
        /// Why.
        why: String,
    },
}

/// The way out for spans, metrics and logs; cheap to clone. By default nothing is exported.
#[derive(Debug, Clone, Default)]
pub struct Telemetry(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    spans: Option<Inlet<Span>>,
    sampling: Sampling,
    records: Option<(Inlet<SdkLogRecord>, SdkLogger)>,
    meters: Option<SdkMeterProvider>,
    registry: prometheus::Registry,
    stop: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    background: Mutex<Option<Background>>,
}

impl Telemetry {
    /// Begins to export as the environment says. To be called within a tokio runtime. Metrics are
    /// always gathered: [`Self::prometheus`] shows them.
    ///
    /// # Errors
    /// [`TelemetryError`].
    pub fn start(setup: &Setup) -> Result<Self, TelemetryError> {
        let get = |name: &str| std::env::var(name).ok();
        let settings = Settings::of(&get)?;
        let resource = Resource::builder()
            .with_attributes([
                KeyValue::new("service.instance.id", setup.instance.clone()),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            ])
            .with_service_name(
                (get("OTEL_SERVICE_NAME").filter(|name| !name.is_empty()))
                    .unwrap_or_else(|| setup.service.to_owned()),
            )
            .build();
        let failed = |signal: &'static str| {
            move |e: opentelemetry_otlp::ExporterBuildError| TelemetryError::Exporter {
                signal,
                why: e.to_string(),
            }
        };
        let stop = CancellationToken::new();
        let mut tasks = Vec::new();
        let background = (settings.traces || settings.logs).then(Background::start);
        let background = background
            .transpose()
            .map_err(|e| TelemetryError::Exporter {
                signal: "anything",
                why: format!("no thread can be started: {e}"),
            })?;
        let handle = background
            .as_ref()
            .map(|background| background.handle().clone());
        // What exporters start, they start there.
        let entered = handle.as_ref().map(Handle::enter);
        let mut spans = None;
        if settings.traces {
            use opentelemetry_sdk::trace::SpanExporter as _;
            let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic();
            let exporter = otlp::secured(exporter, settings.tls.as_ref());
            let mut exporter = exporter.build().map_err(failed("traces"))?;
            exporter.set_resource(&resource);
            let scope = otlp::scope();
            let exporter = otlp::Spans { exporter, scope };
            let (put, queue) = inlet(settings.spans.queue);
            let (signs, stop) = (put.signs(), stop.clone());
            let exporting = export_all("spans", queue, exporter, settings.spans, signs, stop);
            tasks.push(tokio::spawn(exporting));
            spans = Some(put);
        }
        let mut records = None;
        if settings.logs {
            use opentelemetry_sdk::logs::LogExporter as _;
            let exporter = opentelemetry_otlp::LogExporter::builder().with_tonic();
            let exporter = otlp::secured(exporter, settings.tls.as_ref());
            let mut exporter = exporter.build().map_err(failed("logs"))?;
            exporter.set_resource(&resource);
            let scope = otlp::scope();
            let exporter = otlp::Logs { exporter, scope };
            let (put, queue) = inlet(settings.records.queue);
            let (signs, stop) = (put.signs(), stop.clone());
            let exporting = export_all(
                "log records",
                queue,
                exporter,
                settings.records,
                signs,
                stop,
            );
            tasks.push(tokio::spawn(exporting));
            // It only makes records; they leave by our own queue.
            let logger = SdkLoggerProvider::builder().build().logger("emberline");
            records = Some((put, logger));
        }
        drop(entered);
        let registry = prometheus::Registry::new();
        let scraped = opentelemetry_prometheus::exporter().with_registry(registry.clone());
        let scraped = scraped.build().map_err(|e| TelemetryError::Exporter {
            signal: "metrics",
            why: e.to_string(),
        })?;
        let mut meters = SdkMeterProvider::builder()
            .with_resource(resource)
            .with_reader(scraped);
        if settings.metrics {
            let exporter = opentelemetry_otlp::MetricExporter::builder().with_tonic();
            let exporter = otlp::secured(exporter, settings.tls.as_ref());
            let exporter = exporter.build().map_err(failed("metrics"))?;
            meters = meters.with_reader(PeriodicReader::builder(exporter).build());
        }
        let telemetry = Self(Some(Arc::new(Inner {
            spans,
            sampling: settings.sampling,
            records,
            meters: Some(meters.build()),
            registry,
            stop,
            tasks: Mutex::new(tasks),
            background: Mutex::new(background),
        })));
        telemetry.count_drops();
        process::observe(&telemetry.meter());
        Ok(telemetry)
    }

    /// Hands its spans to the receiver; for tests.
    #[must_use]
    pub fn collecting(capacity: usize) -> (Self, mpsc::Receiver<Span>) {
        let (put, received) = inlet(capacity);
        let inner = Inner {
            spans: Some(put),
            sampling: Sampling::default(),
            records: None,
            meters: None,
            registry: prometheus::Registry::new(),
            stop: CancellationToken::new(),
            tasks: Mutex::default(),
            background: Mutex::default(),
        };
        (Self(Some(Arc::new(inner))), received)
    }

    /// Whether spans are exported at all: if not, they need not be made.
    #[must_use]
    pub fn traces(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.spans.is_some())
    }

    /// The thread of lower priority on which spans are to be made; none if none are exported.
    #[must_use]
    pub fn background(&self) -> Option<Handle> {
        let inner = self.0.as_ref()?;
        let background = inner.background.lock();
        let background = background.unwrap_or_else(PoisonError::into_inner);
        background
            .as_ref()
            .map(|background| background.handle().clone())
    }

    /// Whether the spans of this run are exported. The answer is the same in every process that
    /// is set up in the same way.
    #[must_use]
    pub fn samples(&self, run: &RunTrace) -> bool {
        self.takes(run.trace, run.sampled)
    }

    /// Whether the spans of this trace are exported, given whether whoever began it records it, if
    /// that was said.
    #[must_use]
    pub fn takes(&self, trace: TraceId, recorded: Option<bool>) -> bool {
        let sampling = self.0.as_ref().filter(|inner| inner.spans.is_some());
        sampling.is_some_and(|inner| inner.sampling.takes(trace, recorded))
    }

    /// Hands over a span that has ended. Never waits.
    pub fn span(&self, span: Span) {
        if let Some(spans) = self.0.as_ref().and_then(|inner| inner.spans.as_ref()) {
            spans.put(span);
        }
    }

    /// Waits until there is room for so many spans: for who makes them in the background and has the
    /// time. While the collector takes nothing, nobody waits.
    pub async fn room(&self, spans: usize) {
        if let Some(inlet) = self.0.as_ref().and_then(|inner| inner.spans.as_ref()) {
            inlet.room(spans).await;
        }
    }

    /// Whether spans would be dropped now, since the collector takes nothing: then they need not be
    /// made.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        let spans = self.0.as_ref().and_then(|inner| inner.spans.as_ref());
        spans.is_some_and(Inlet::is_stuck)
    }

    /// So many spans, or more, were not even made.
    pub fn lost(&self, spans: usize) {
        if let Some(inlet) = self.0.as_ref().and_then(|inner| inner.spans.as_ref()) {
            inlet.dropped.fetch_add(spans as u64, Relaxed);
        }
    }

    /// Hands over a log record, made only if there is somewhere to send it. Never waits.
    fn log_record(&self, make: impl FnOnce(&SdkLogger) -> SdkLogRecord) {
        let Some((records, logger)) = self.0.as_ref().and_then(|inner| inner.records.as_ref())
        else {
            return;
        };
        if records.is_full() {
            records.dropped.fetch_add(1, Relaxed);
        } else {
            records.put(make(logger));
        }
    }

    /// Whether metrics are gathered at all.
    #[must_use]
    pub fn measures(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.meters.is_some())
    }

    /// What instruments of metrics are made of, under the scope `emberline`. Without telemetry its
    /// instruments do nothing.
    #[must_use]
    pub fn meter(&self) -> Meter {
        match self.0.as_ref().and_then(|inner| inner.meters.as_ref()) {
            Some(meters) => meters.meter("emberline"),
            None => opentelemetry::metrics::noop::NoopMeterProvider::new().meter("emberline"),
        }
    }

    /// The metrics of the process as Prometheus reads them (text format 0.0.4).
    ///
    /// # Errors
    /// If they cannot be written, which is a defect.
    pub fn prometheus(&self) -> Result<String, TelemetryError> {
        let failed = |e: &dyn std::fmt::Display| TelemetryError::Exporter {
            signal: "metrics",
            why: e.to_string(),
        };
        let Some(inner) = &self.0 else {
            return Ok(String::new());
        };
        let mut text = Vec::new();
        let encoded = TextEncoder::new().encode(&inner.registry.gather(), &mut text);
        encoded.map_err(|e| failed(&e))?;
        String::from_utf8(text).map_err(|e| failed(&e))
    }

    /// Exports what is left, for no longer than this. From then on nothing is exported.
    pub async fn shutdown(&self, within: Duration) {
        let Some(inner) = &self.0 else { return };
        let background = inner.background.lock();
        let background = background.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(background) = &background {
            background.hurry();
        }
        inner.stop.cancel();
        let tasks =
            std::mem::take(&mut *inner.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let meters = inner.meters.clone();
        // It blocks.
        let metrics = tokio::task::spawn_blocking(move || {
            if let Some(meters) = meters {
                // What cannot be sent is lost with the process.
                let _ = meters.shutdown_with_timeout(within);
            }
        });
        let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        let all = async {
            for task in tasks {
                let _ = task.await;
            }
            let _ = metrics.await;
        };
        if tokio::time::timeout(within, all).await.is_err() {
            for task in aborts {
                task.abort();
            }
        }
        if let Some(mut background) = background {
            // Nothing on it blocks.
            let _ = tokio::task::spawn_blocking(move || background.stop()).await;
        }
    }

    fn count_drops(&self) {
        let Some(inner) = &self.0 else { return };
        let traces = inner.spans.as_ref().map(|spans| Arc::clone(&spans.dropped));
        let logs = inner
            .records
            .as_ref()
            .map(|(put, _)| Arc::clone(&put.dropped));
        let counts = [("traces", traces), ("logs", logs)];
        // The meter keeps the callback.
        let _ = self
            .meter()
            .u64_observable_counter("emberline.telemetry.dropped")
            .with_unit("{item}")
            .with_description("Spans and log records that there was no room for, or that the collector did not take")
            .with_callback(move |observer| {
                for (signal, dropped) in &counts {
                    if let Some(dropped) = dropped {
                        let signal = KeyValue::new("emberline.signal", *signal);
                        observer.observe(dropped.load(Relaxed), &[signal]);
                    }
                }
            })
            .build();
    }
}

/// The counter of what was reused instead of made or fetched. Coordinator and worker feed it, each by
/// its own value of `emberline.cache`, and in one process it is one.
#[must_use]
pub fn cache_hits(meter: &Meter) -> Counter<u64> {
    meter
        .u64_counter("emberline.cache.hits")
        .with_unit("{hit}")
        .with_description("What was reused instead of made or fetched")
        .build()
}
