//! What it costs to be watched: 10,000 tasks that do nothing, on a cluster that exports nothing, on
//! one whose collector takes everything, and on one whose collector takes connections and never
//! answers. All three stand side by side and take turns, so that their ratios are of one machine in
//! one minute.
//!
//! The collector runs here and shares the machine's cores with the cluster, which a real one would
//! not: so it keeps what it gets and looks into it only afterwards. Its share of the network's work,
//! caches and memory is still measured, to our disadvantage.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    task::{Context as Poller, Poll},
};

use anyhow::Context as _;
use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use opentelemetry_proto::tonic::collector::{
    logs::v1::{
        ExportLogsServiceRequest, ExportLogsServiceResponse,
        logs_service_server::{LogsService, LogsServiceServer},
    },
    metrics::v1::{
        ExportMetricsServiceRequest, ExportMetricsServiceResponse,
        metrics_service_server::{MetricsService, MetricsServiceServer},
    },
    trace::v1::{ExportTraceServiceRequest, trace_service_server::SERVICE_NAME},
};
use prost::Message as _;
use tokio::{net::TcpListener, process::Child};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, body::Body, server::NamedService, transport::Server};
use tower_service::Service;

use super::{
    Figure,
    cluster::{start, stop},
    dispatch::{TASKS, run, throughput_of},
};
use crate::{args::ClusterArguments, client::Cluster, commands::quantile};

/// What stands before a message: whether it is compressed, and its length.
const FRAME_HEAD: usize = 5;
/// Turns; the first ones are not measured, of the others the median is.
const TURNS: usize = 13;
const NOT_MEASURED: usize = 3;

/// Tasks in a second in the three cases, and the ratios to that without telemetry.
pub(super) async fn telemetry(directory: &Path, workers: u32) -> anyhow::Result<Vec<Figure>> {
    let traces = Traces::default();
    let (up, collector) = collector(traces.clone()).await?;
    let (hung, hole) = black_hole().await?;
    let mut all = Vec::new();
    for (name, endpoint) in [("off", None), ("up", Some(&up)), ("hung", Some(&hung))] {
        all.push(Watched::start(&directory.join(name), workers, endpoint).await?);
    }
    for _ in 0..TURNS {
        for watched in &mut all {
            watched.run().await?;
        }
    }
    let mut rates = Vec::new();
    for watched in all {
        rates.push(watched.end().await?);
    }
    drop((collector, hole));
    #[allow(clippy::cast_precision_loss, reason = "some 10,000 spans")]
    let spans = traces.spans()? as f64 / (f64::from(TASKS) * TURNS as f64);
    let [off, up, hung] = rates[..] else {
        anyhow::bail!("a cluster is missing: please report this");
    };
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

/// A cluster of its own.
struct Watched {
    directory: PathBuf,
    child: Child,
    cluster: Cluster,
    seconds: Vec<f64>,
}

impl Watched {
    /// Starts one that exports to this endpoint.
    async fn start(
        directory: &Path,
        workers: u32,
        endpoint: Option<&String>,
    ) -> anyhow::Result<Self> {
        let mut environment = vec![("OTEL_TRACES_SAMPLER", "always_on")];
        environment.extend(endpoint.map(|to| ("OTEL_EXPORTER_OTLP_ENDPOINT", to.as_str())));
        std::fs::create_dir_all(directory)?;
        let child = start(directory, workers, &environment).await?;
        let cache_size = emberline_common::spec::ByteSize(1 << 30);
        let there = ClusterArguments::embedded(directory.join("state"), cache_size);
        Ok(Self {
            directory: directory.to_owned(),
            child,
            cluster: Cluster::connect(&there, 0).await?,
            seconds: Vec::new(),
        })
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        let (_, seconds) = run(&self.cluster, &self.directory, &throughput_of()).await?;
        self.seconds.push(seconds);
        Ok(())
    }

    /// Ends it, and gives how many tasks it did in a second.
    async fn end(mut self) -> anyhow::Result<f64> {
        self.cluster.close().await?;
        stop(self.child).await?;
        let measured = &mut self.seconds[NOT_MEASURED..];
        measured.sort_by(f64::total_cmp);
        Ok(f64::from(TASKS) / quantile(measured, 0.5))
    }
}

/// A collector that takes everything; where it is, and itself until dropped.
async fn collector(traces: Traces) -> anyhow::Result<(String, AbortOnDropHandle<()>)> {
    let (endpoint, listener) = listen().await?;
    let server = Server::builder()
        .add_service(traces)
        .add_service(MetricsServiceServer::new(Rest))
        .add_service(LogsServiceServer::new(Rest))
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

/// Takes traces as they come off the wire.
#[derive(Clone, Default)]
struct Traces(Arc<Mutex<Vec<Bytes>>>);

impl Traces {
    /// How many spans came.
    fn spans(&self) -> anyhow::Result<usize> {
        let frames = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut spans = 0;
        for frame in frames.iter() {
            let message = frame.get(FRAME_HEAD..).context("half a frame came")?;
            let request = ExportTraceServiceRequest::decode(message)?;
            let scopes = request.resource_spans.iter().flat_map(|r| &r.scope_spans);
            spans += scopes.map(|scope| scope.spans.len()).sum::<usize>();
        }
        Ok(spans)
    }
}

impl NamedService for Traces {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<Request<Body>> for Traces {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Poller<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let kept = Arc::clone(&self.0);
        async move {
            if let Ok(body) = request.into_body().collect().await {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.push(body.to_bytes());
            }
            // An empty message, and that all is well.
            let mut end = HeaderMap::new();
            let status = HeaderName::from_static("grpc-status");
            end.insert(status, HeaderValue::from_static("0"));
            let body = Full::new(Bytes::from_static(&[0; FRAME_HEAD]));
            let mut answer = Response::new(Body::new(body.with_trailers(async { Some(Ok(end)) })));
            let kind = HeaderValue::from_static("application/grpc");
            answer.headers_mut().insert(header::CONTENT_TYPE, kind);
            Ok(answer)
        }
        .boxed()
    }
}

/// Takes metrics and logs, of which there are few.
struct Rest;

#[tonic::async_trait]
impl MetricsService for Rest {
    async fn export(
        &self,
        _request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, Status> {
        Ok(tonic::Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Rest {
    async fn export(
        &self,
        _request: tonic::Request<ExportLogsServiceRequest>,
    ) -> Result<tonic::Response<ExportLogsServiceResponse>, Status> {
        Ok(tonic::Response::new(ExportLogsServiceResponse::default()))
    }
}
