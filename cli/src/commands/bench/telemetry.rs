//! What it costs to be watched: 10,000 tasks that do nothing, on a cluster that exports nothing, on
//! one whose collector takes everything, and on one whose collector takes connections and never
//! answers. The three take turns within one round, so that their ratios are of one machine.
//!
//! The collector runs here and shares the machine's cores with the cluster, which a real one would
//! not: the ratio errs to our disadvantage.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use anyhow::Context as _;
use opentelemetry_proto::tonic::collector::{
    logs::v1::{
        ExportLogsServiceRequest, ExportLogsServiceResponse,
        logs_service_server::{LogsService, LogsServiceServer},
    },
    metrics::v1::{
        ExportMetricsServiceRequest, ExportMetricsServiceResponse,
        metrics_service_server::{MetricsService, MetricsServiceServer},
    },
    trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, transport::Server};

use super::{
    Figure,
    cluster::{start, stop},
    dispatch::{TASKS, run, throughput_of},
};
use crate::{args::ClusterArguments, client::Cluster};

/// The largest message that the collector takes.
const MAX_MESSAGE: usize = 64 << 20;
/// Runs of one cluster; the first is not measured.
const RUNS: usize = 2;

/// Tasks in a second in the three cases, and the ratios to that without telemetry.
pub(super) async fn telemetry(directory: &Path, workers: u32) -> anyhow::Result<Vec<Figure>> {
    let off = tasks_per_second(&directory.join("off"), workers, None).await?;
    let spans = Arc::<AtomicU64>::default();
    let (endpoint, collector) = collector(Arc::clone(&spans)).await?;
    let up = tasks_per_second(&directory.join("up"), workers, Some(&endpoint)).await?;
    drop(collector);
    let (endpoint, hole) = black_hole().await?;
    let hung = tasks_per_second(&directory.join("hung"), workers, Some(&endpoint)).await?;
    drop(hole);
    #[allow(clippy::cast_precision_loss, reason = "some 10,000 spans")]
    let spans = spans.load(Relaxed) as f64 / (f64::from(TASKS) * RUNS as f64);
    Ok(vec![
        Figure::new("nothing exported", "tasks/s", off),
        Figure::new("collector takes all", "tasks/s", up),
        Figure::new(
            "collector takes all, to nothing exported",
            "ratio",
            up / off,
        ),
        Figure::new("spans received for a task", "spans", spans),
        Figure::new("collector hangs", "tasks/s", hung),
        Figure::new("collector hangs, to nothing exported", "ratio", hung / off),
    ])
}

/// Of a cluster of its own, which exports to this endpoint.
async fn tasks_per_second(
    directory: &Path,
    workers: u32,
    endpoint: Option<&str>,
) -> anyhow::Result<f64> {
    let mut environment = vec![("OTEL_TRACES_SAMPLER", "always_on")];
    environment.extend(endpoint.map(|endpoint| ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)));
    std::fs::create_dir_all(directory)?;
    let child = start(directory, workers, &environment).await?;
    let cache_size = emberline_common::spec::ByteSize(1 << 30);
    let there = ClusterArguments::embedded(directory.join("state"), cache_size);
    let cluster = Cluster::connect(&there, 0).await?;
    let mut seconds = f64::NAN;
    for _ in 0..RUNS {
        (_, seconds) = run(&cluster, directory, &throughput_of()).await?;
    }
    cluster.close().await?;
    stop(child).await?;
    Ok(f64::from(TASKS) / seconds)
}

/// A collector that takes everything and counts spans; where it is, and itself until dropped.
async fn collector(spans: Arc<AtomicU64>) -> anyhow::Result<(String, AbortOnDropHandle<()>)> {
    let (endpoint, listener) = listen().await?;
    let sink = Sink(spans);
    let server = Server::builder()
        .add_service(TraceServiceServer::new(sink.clone()).max_decoding_message_size(MAX_MESSAGE))
        .add_service(MetricsServiceServer::new(sink.clone()))
        .add_service(LogsServiceServer::new(sink))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let serving = tokio::spawn(async move {
        if let Err(e) = server.await {
            tracing::warn!("the collector of the benchmark has ended: {e}");
        }
    });
    Ok((endpoint, AbortOnDropHandle::new(serving)))
}

/// Something that takes connections and never says a word.
async fn black_hole() -> anyhow::Result<(String, AbortOnDropHandle<()>)> {
    let (endpoint, listener) = listen().await?;
    let swallowing = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            held.push(connection);
        }
    });
    Ok((endpoint, AbortOnDropHandle::new(swallowing)))
}

async fn listen() -> anyhow::Result<(String, TcpListener)> {
    let listener = TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.context("cannot listen for the collector")?;
    Ok((format!("http://{}", listener.local_addr()?), listener))
}

#[derive(Clone)]
struct Sink(Arc<AtomicU64>);

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.get_ref().resource_spans.iter();
        let scopes = resources.flat_map(|resource| &resource.scope_spans);
        let spans: usize = scopes.map(|scope| scope.spans.len()).sum();
        self.0
            .fetch_add(u64::try_from(spans).unwrap_or(u64::MAX), Relaxed);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Sink {
    async fn export(
        &self,
        _request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Sink {
    async fn export(
        &self,
        _request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}
