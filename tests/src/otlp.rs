//! A receiver of OTLP over gRPC: traces, metrics and logs on one loopback port. It keeps what it
//! gets, and can be stopped, be there again on the same port, refuse, and hang.
//!
//! What was received is read by code of its own into [`Span`], [`Metric`] and [`LogRecord`], with
//! ids as hex and attributes as JSON, whose types are told apart. Start with
//! [`OtlpReceiver::start`], then [`OtlpReceiver::wait_for`].

mod received;
mod trace;

pub use received::{Attributes, LogRecord, Metric, MetricKind, Point, Received, Span, SpanEvent};
pub use trace::Trace;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

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
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig},
};

use crate::processes;

/// The largest message that is taken.
const MAX_MESSAGE: usize = 64 << 20;

/// What it does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Answer {
    /// It keeps what comes, and says so.
    #[default]
    Keeps,
    /// It keeps nothing, and says that it may not be asked.
    Refuses,
    /// It keeps nothing, and never answers.
    Hangs,
}

#[derive(Default)]
struct State {
    answer: Answer,
    /// Calls that have come, whatever became of them.
    calls: usize,
    received: Received,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let out = change(&mut state);
        self.changed.notify_all();
        out
    }

    async fn take(&self, keep: impl FnOnce(&mut Received)) -> Result<(), Status> {
        let answer = self.change(|state| {
            state.calls += 1;
            if state.answer == Answer::Keeps {
                keep(&mut state.received);
            }
            state.answer
        });
        match answer {
            Answer::Keeps => Ok(()),
            Answer::Refuses => Err(Status::permission_denied("this collector takes nothing")),
            Answer::Hangs => std::future::pending().await,
        }
    }
}

struct Service(Arc<Shared>);

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let keep = |received: &mut Received| received.add_traces(request.into_inner());
        self.0.take(keep).await?;
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Service {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let keep = |received: &mut Received| received.add_metrics(request.into_inner());
        self.0.take(keep).await?;
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Service {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let keep = |received: &mut Received| received.add_logs(request.into_inner());
        self.0.take(keep).await?;
        Ok(Response::new(Default::default()))
    }
}

/// The receiver. It ends, with all its connections, when it is dropped.
pub struct OtlpReceiver {
    port: u16,
    /// The certificate and its key, in PEM, where it speaks TLS.
    identity: Option<(Vec<u8>, Vec<u8>)>,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl OtlpReceiver {
    /// Starts one on a port of its own.
    #[must_use]
    pub fn start() -> Self {
        let port = processes::free_port();
        Self::start_at(port).expect("nobody listens there")
    }

    /// Starts one on this port, if nobody listens there.
    #[must_use]
    pub fn start_at(port: u16) -> Option<Self> {
        std::net::TcpListener::bind(("127.0.0.1", port)).ok()?;
        let mut receiver = Self {
            port,
            identity: None,
            shared: Arc::default(),
            runtime: None,
        };
        receiver.start_again();
        Some(receiver)
    }

    /// Starts one that speaks TLS, with a certificate for 127.0.0.1 of an authority that nobody trusts
    /// yet. The authority's own certificate is written to `dir`, and its path is given.
    ///
    /// # Panics
    /// If `openssl` does not make them.
    #[must_use]
    pub fn start_with_tls(dir: &Path) -> (Self, PathBuf) {
        let openssl = |arguments: &str| {
            let mut command = Command::new("openssl");
            let made = command.args(arguments.split(' ')).current_dir(dir).output();
            let made = made.expect("`openssl` is installed: see deploy/prerequisites.sh");
            let told = String::from_utf8_lossy(&made.stderr);
            assert!(made.status.success(), "openssl {arguments}: {told}");
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        openssl(&format!(
            "req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=ca"
        ));
        openssl(&format!(
            "req {key} -keyout own.key -out own.csr -subj /CN=collector"
        ));
        fs::write(dir.join("ext"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        openssl(
            "x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out own.pem -days 2 -extfile ext",
        );
        let read = |name: &str| fs::read(dir.join(name)).unwrap();
        let mut receiver = Self {
            port: processes::free_port(),
            identity: Some((read("own.pem"), read("own.key"))),
            shared: Arc::default(),
            runtime: None,
        };
        receiver.start_again();
        (receiver, dir.join("ca.pem"))
    }

    /// Listens again, on the same port, after [`Self::stop`].
    ///
    /// # Panics
    /// If it listens already, or somebody else has taken the port.
    pub fn start_again(&mut self) {
        assert!(self.runtime.is_none(), "it listens");
        // Threads of its own, so that a test that blocks does not stop it.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listen = TcpListener::bind(("127.0.0.1", self.port));
        let incoming = TcpListenerStream::new(runtime.block_on(listen).unwrap());
        let service = || Service(Arc::clone(&self.shared));
        let traces = TraceServiceServer::new(service()).max_decoding_message_size(MAX_MESSAGE);
        let metrics = MetricsServiceServer::new(service()).max_decoding_message_size(MAX_MESSAGE);
        let logs = LogsServiceServer::new(service()).max_decoding_message_size(MAX_MESSAGE);
        let mut server = Server::builder();
        if let Some((certificate, key)) = &self.identity {
            let identity = Identity::from_pem(certificate, key);
            let tls = ServerTlsConfig::new().identity(identity);
            server = server.tls_config(tls).unwrap();
        }
        let server = server
            .add_service(traces)
            .add_service(metrics)
            .add_service(logs)
            .serve_with_incoming(incoming);
        drop(runtime.spawn(server));
        self.runtime = Some(runtime);
    }

    /// Is gone as after a kill: nobody listens, every connection is closed, what was not answered
    /// never is. What was received is kept.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    /// What it does with calls from now on.
    pub fn answer(&self, answer: Answer) {
        self.shared.change(|state| state.answer = answer);
    }

    /// Where it is, as `OTEL_EXPORTER_OTLP_ENDPOINT` wants it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = match self.identity {
            Some(_) => "https",
            None => "http",
        };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// The environment of a process that exports to it, soon after there is something.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", self.endpoint().as_str()),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
            ("OTEL_BLRP_SCHEDULE_DELAY", "50"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "200"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// How many calls have come so far, also those that were refused or never answered.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.shared.change(|state| state.calls)
    }

    /// Looks at what was received.
    pub fn read<T>(&self, look: impl FnOnce(&Received) -> T) -> T {
        self.shared.change(|state| look(&state.received))
    }

    /// Forgets what was received.
    pub fn forget(&self) {
        self.shared
            .change(|state| state.received = Received::default());
    }

    /// Looks at what was received, again whenever something comes, until it is as it should be.
    ///
    /// # Panics
    /// If it is not so by then: with what was waited for, and what is still wrong.
    #[track_caller]
    pub fn wait_for<T>(
        &self,
        what: &str,
        within: Duration,
        mut look: impl FnMut(&Received) -> Result<T, String>,
    ) -> T {
        self.wait_until(what, within, |state| look(&state.received))
    }

    /// Waits until so many calls have come, whatever it did with them.
    ///
    /// # Panics
    /// If they do not.
    #[track_caller]
    pub fn wait_for_calls(&self, calls: usize, within: Duration) {
        self.wait_until(&format!("{calls} calls"), within, |state| {
            let come = state.calls;
            (come >= calls).then_some(()).ok_or(format!("{come} came"))
        });
    }

    #[track_caller]
    fn wait_until<T>(
        &self,
        what: &str,
        within: Duration,
        mut look: impl FnMut(&State) -> Result<T, String>,
    ) -> T {
        let deadline = Instant::now() + within;
        let mut state = (self.shared.state.lock()).unwrap_or_else(PoisonError::into_inner);
        loop {
            let wrong = match look(&state) {
                Ok(found) => return found,
                Err(wrong) => wrong,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                panic!("not within {within:?}: {what}: {wrong}");
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for OtlpReceiver {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::{
        collector::trace::v1::trace_service_client::TraceServiceClient,
        trace::v1::{ResourceSpans, ScopeSpans, Span as SentSpan},
    };
    use tonic::Code;

    use super::*;
    use crate::seconds;

    fn call(runtime: &Runtime, receiver: &OtlpReceiver, name: &str) -> Result<(), Code> {
        let span = SentSpan {
            trace_id: vec![1; 16],
            span_id: vec![2; 8],
            name: name.to_owned(),
            ..SentSpan::default()
        };
        let scope_spans = vec![ScopeSpans {
            spans: vec![span],
            ..ScopeSpans::default()
        }];
        let resource_spans = vec![ResourceSpans {
            scope_spans,
            ..ResourceSpans::default()
        }];
        let endpoint = receiver.endpoint();
        let call = async {
            let mut client =
                (TraceServiceClient::connect(endpoint).await).map_err(|_| Code::Unavailable)?;
            let sent = client.export(ExportTraceServiceRequest { resource_spans });
            match tokio::time::timeout(Duration::from_millis(300), sent).await {
                Ok(answer) => answer.map(drop).map_err(|e| e.code()),
                Err(_) => Err(Code::DeadlineExceeded),
            }
        };
        runtime.block_on(call)
    }

    #[test]
    fn it_keeps_refuses_hangs_is_gone_and_is_there_again() {
        let runtime = Runtime::new().unwrap();
        let mut receiver = OtlpReceiver::start();
        assert_eq!(call(&runtime, &receiver, "a"), Ok(()));
        receiver.answer(Answer::Refuses);
        let refused = call(&runtime, &receiver, "b");
        assert_eq!(refused, Err(Code::PermissionDenied));
        receiver.answer(Answer::Hangs);
        let late = call(&runtime, &receiver, "c");
        assert_eq!(late, Err(Code::DeadlineExceeded));
        receiver.stop();
        let gone = call(&runtime, &receiver, "d");
        assert_eq!(gone, Err(Code::Unavailable));
        receiver.start_again();
        receiver.answer(Answer::Keeps);
        assert_eq!(call(&runtime, &receiver, "e"), Ok(()));
        let names = receiver.wait_for("both", seconds(5), |received| {
            let names: Vec<_> = received.spans.iter().map(|s| s.name.clone()).collect();
            (names.len() == 2).then_some(names).ok_or_else(String::new)
        });
        assert_eq!(names, ["a", "e"]);
        assert_eq!(receiver.calls(), 4);
        receiver.wait_for_calls(4, seconds(1));
    }
}
