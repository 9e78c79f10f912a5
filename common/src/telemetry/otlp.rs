//! From our spans and log records to OTLP's, by the exporters of OpenTelemetry.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::{
    InstrumentationScope, SpanId, TraceFlags, TraceId,
    trace::{Event, Link, SpanContext, SpanKind as OtelKind, Status, TraceState},
};
use opentelemetry_otlp::{LogExporter, SpanExporter, WithTonicConfig};
use opentelemetry_sdk::{
    logs::{LogBatch, LogExporter as _, SdkLogRecord},
    trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks},
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::{Span, SpanKind, outlet::Export, settings::Tls};
use crate::time::Timestamp;

/// The scope under which everything of ours is exported.
pub(super) fn scope() -> InstrumentationScope {
    InstrumentationScope::builder("emberline")
        .with_version(env!("CARGO_PKG_VERSION"))
        .build()
}

/// Says how an exporter speaks to an `https` address. Where there is none nothing is looked for: a
/// machine may trust nobody.
pub(super) fn secured<B: WithTonicConfig>(builder: B, tls: Option<&Tls>) -> B {
    let Some(tls) = tls else {
        return builder;
    };
    crate::tls::install_crypto_provider();
    let config = match &tls.ca {
        Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    builder.with_tls_config(match &tls.identity {
        Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
        None => config,
    })
}

/// Spans over OTLP.
pub(super) struct Spans {
    pub exporter: SpanExporter,
    pub scope: InstrumentationScope,
}

impl Export<Span> for Spans {
    async fn export(&self, batch: &[Span]) -> Result<(), String> {
        let data = batch
            .iter()
            .map(|span| span_data(span, &self.scope))
            .collect();
        self.exporter.export(data).await.map_err(|e| e.to_string())
    }
}

/// Log records over OTLP.
pub(super) struct Logs {
    pub exporter: LogExporter,
    pub scope: InstrumentationScope,
}

impl Export<SdkLogRecord> for Logs {
    async fn export(&self, batch: &[SdkLogRecord]) -> Result<(), String> {
        let records: Vec<_> = batch.iter().map(|record| (record, &self.scope)).collect();
        let sent = self.exporter.export(LogBatch::new(&records)).await;
        sent.map_err(|e| e.to_string())
    }
}

pub(super) fn system_time(at: Timestamp) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(at.0)
}

fn context(trace: crate::trace::TraceId, span: crate::trace::SpanId) -> SpanContext {
    SpanContext::new(
        TraceId::from_bytes(trace.to_bytes()),
        SpanId::from_bytes(span.to_bytes()),
        TraceFlags::SAMPLED,
        false,
        TraceState::default(),
    )
}

fn span_data(span: &Span, scope: &InstrumentationScope) -> SpanData {
    let mut events = SpanEvents::default();
    events.events = (span.events.iter())
        .map(|event| {
            let at = system_time(event.at);
            Event::new(event.name, at, event.attributes.clone(), 0)
        })
        .collect();
    let mut links = SpanLinks::default();
    links.links = (span.links.iter())
        .map(|(trace, id)| Link::new(context(*trace, *id), Vec::new(), 0))
        .collect();
    let parent = span
        .parent
        .map_or(SpanId::INVALID, |id| SpanId::from_bytes(id.to_bytes()));
    SpanData {
        span_context: context(span.trace, span.id),
        parent_span_id: parent,
        parent_span_is_remote: span.parent_is_remote,
        span_kind: match span.kind {
            SpanKind::Internal => OtelKind::Internal,
            SpanKind::Server => OtelKind::Server,
            SpanKind::Client => OtelKind::Client,
        },
        name: span.name.clone().into(),
        start_time: system_time(span.start),
        end_time: system_time(span.end),
        attributes: span.attributes.clone(),
        dropped_attributes_count: 0,
        events,
        links,
        status: match &span.error {
            None => Status::Unset,
            Some(why) => Status::error(why.clone()),
        },
        instrumentation_scope: scope.clone(),
    }
}
