//! A coordinator on a directory, clients, workers that do what a test tells them, and a store whose
//! commits a test can hold back or let fail.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use emberline_common::{artifact::ArtifactStore, ids::Epoch};
use emberline_coordinator::{
    Coordinator, CoordinatorConfig, CoordinatorError,
    engine::api::{EngineConfig, Write},
    store::{
        BatchLimits, Candidate, Leader, Record, StateStore, StoreError, embedded::EmbeddedStore,
    },
};
use emberline_proto::v1::{
    self, AttemptReport, AttemptReports, GetRunRequest, GrantCredits, LeaderMessage, Register,
    RunState, SubmitRunRequest, WorkerMessage, artifact_service_client::ArtifactServiceClient,
    cluster_service_client::ClusterServiceClient, leader_message::Message as FromLeader,
    model_service_client::ModelServiceClient, run_service_client::RunServiceClient,
    worker_message::Message as FromWorker, worker_service_client::WorkerServiceClient,
};
use futures::future::BoxFuture;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

/// Long enough for a loaded machine; a test that waits so long has failed.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Ends a test that hangs.
pub async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, wait)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come in time"))
}

/// A store whose commits stop at a gate.
pub struct Gated {
    inner: EmbeddedStore,
    open: watch::Sender<bool>,
    fail: AtomicBool,
    /// Commits that have come to the gate.
    arrived: watch::Sender<u64>,
}

impl Gated {
    pub fn close(&self) {
        self.open.send_replace(false);
    }
    pub fn open(&self) {
        self.open.send_replace(true);
    }
    /// From now on each commit that passes the gate fails, and writes nothing.
    pub fn fail(&self) {
        self.fail.store(true, Ordering::SeqCst);
    }
    pub fn arrived(&self) -> u64 {
        *self.arrived.borrow()
    }
    pub async fn arrives(&self, number: u64) {
        let mut arrived = self.arrived.subscribe();
        soon("the commit", arrived.wait_for(|n| *n >= number))
            .await
            .unwrap();
    }
}

impl StateStore for Gated {
    fn load(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<Record>, StoreError>> {
        self.inner.load(prefix)
    }
    fn commit(&self, epoch: Epoch, writes: Vec<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.arrived.send_modify(|n| *n += 1);
            let mut open = self.open.subscribe();
            open.wait_for(|open| *open).await.unwrap();
            if self.fail.load(Ordering::SeqCst) {
                return Err(StoreError::Deposed { epoch });
            }
            self.inner.commit(epoch, writes).await
        })
    }
    fn campaign(&self, candidate: Candidate) -> BoxFuture<'_, Result<Epoch, StoreError>> {
        self.inner.campaign(candidate)
    }
    fn resign(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.resign(epoch)
    }
    fn leader(&self) -> BoxFuture<'_, Result<Option<Leader>, StoreError>> {
        self.inner.leader()
    }
    fn watch_leader(&self) -> watch::Receiver<Option<Leader>> {
        self.inner.watch_leader()
    }
    fn batch_limits(&self) -> BatchLimits {
        self.inner.batch_limits()
    }
}

/// A coordinator and the directory that outlives it.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub store: Arc<Gated>,
    pub coordinator: Coordinator,
    pub artifacts: ArtifactStore,
}

fn engine_config() -> EngineConfig {
    EngineConfig {
        closed_grace: Duration::from_millis(300),
        // Longer than a loaded machine keeps a heartbeat back.
        worker_grace: Duration::from_millis(1000),
        adoption_window: Duration::from_millis(500),
        ..EngineConfig::default()
    }
}

impl Cluster {
    pub async fn start() -> Self {
        Self::on(tempfile::tempdir().unwrap(), engine_config()).await
    }

    pub async fn with(engine: EngineConfig) -> Self {
        Self::on(tempfile::tempdir().unwrap(), engine).await
    }

    pub async fn on(dir: tempfile::TempDir, engine: EngineConfig) -> Self {
        let inner = EmbeddedStore::open(dir.path().join("state.redb"))
            .await
            .unwrap();
        let store = Arc::new(Gated {
            inner,
            open: watch::Sender::new(true),
            fail: AtomicBool::new(false),
            arrived: watch::Sender::new(0),
        });
        let objects = dir.path().join("objects");
        let artifacts = ArtifactStore::open(&format!("file://{}", objects.display())).unwrap();
        let config = CoordinatorConfig {
            name: "test".to_owned(),
            store: Arc::clone(&store) as Arc<dyn StateStore>,
            artifacts: artifacts.clone(),
            engine,
            heartbeat_interval: Duration::from_millis(250),
            advertise: None,
            telemetry: Default::default(),
            spans: Default::default(),
            trace_url: None,
            events: Default::default(),
            one_of_many: false,
            dialer: Default::default(),
            gate: Default::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let coordinator = soon("the start", Coordinator::start(config, listener))
            .await
            .unwrap();
        soon("the leadership", coordinator.leads()).await.unwrap();
        Self {
            dir,
            store,
            coordinator,
            artifacts,
        }
    }

    /// Stops it orderly and starts another on the same directory.
    pub async fn restart(self) -> Self {
        let (dir, ended) = self.stop().await;
        ended.unwrap();
        Self::on(dir, engine_config()).await
    }

    pub async fn stop(self) -> (tempfile::TempDir, Result<(), CoordinatorError>) {
        let ended = soon("the end", self.coordinator.shutdown()).await;
        // The file is free once nobody has the store any more.
        let store = self.store;
        assert_eq!(Arc::strong_count(&store), 1, "every task has ended");
        drop(store);
        (self.dir, ended)
    }

    pub async fn channel(&self) -> Channel {
        let address = format!("http://{}", self.coordinator.address());
        let endpoint = Channel::from_shared(address).unwrap().tcp_nodelay(true);
        endpoint.connect().await.unwrap()
    }

    pub async fn runs(&self) -> RunServiceClient<Channel> {
        RunServiceClient::new(self.channel().await)
    }

    pub async fn blobs(&self) -> ArtifactServiceClient<Channel> {
        ArtifactServiceClient::new(self.channel().await)
    }

    pub async fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel().await)
    }

    pub async fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel().await)
    }

    pub async fn submit(&self, yaml: &str) -> String {
        let submitted = self.runs().await.submit_run(submission(yaml)).await;
        submitted.unwrap().into_inner().run
    }

    pub async fn get(&self, run: &str) -> v1::GetRunResponse {
        let request = GetRunRequest {
            run: run.to_owned(),
        };
        let found = self.runs().await.get_run(request).await;
        found.unwrap().into_inner()
    }

    pub async fn ends(&self, run: &str) -> RunState {
        soon("the end of the run", async {
            loop {
                let state = self.get(run).await.summary.unwrap().state();
                if matches!(
                    state,
                    RunState::Succeeded | RunState::Failed | RunState::Cancelled
                ) {
                    return state;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }

    pub fn object(&self, key: &str) -> PathBuf {
        self.dir.path().join("objects").join(key)
    }
}

pub fn submission(yaml: &str) -> SubmitRunRequest {
    SubmitRunRequest {
        pipeline_yaml: yaml.to_owned(),
        file_name: "pipeline.yaml".to_owned(),
        base_dir: "/".to_owned(),
        ..Default::default()
    }
}

/// One stage that does nothing.
pub const ONE: &str = "pipeline: one\nstages:\n  a:\n    kind: noop\n";
/// Two stages, one after the other.
pub const TWO: &str =
    "pipeline: two\nstages:\n  a:\n    kind: noop\n  b:\n    kind: noop\n    needs: [a]\n";

/// Many stages that do nothing and wait for nothing.
pub fn many(number: usize) -> String {
    let numbers: Vec<String> = (0..number).map(|n| n.to_string()).collect();
    format!(
        "pipeline: many\nstages:\n  a:\n    kind: noop\n    matrix:\n      n: [{}]\n    resources: {{ cpu: 0.001 }}\n",
        numbers.join(", ")
    )
}

static INCARNATION: AtomicU64 = AtomicU64::new(1);

/// A worker that speaks the protocol and does what the test says.
pub struct FakeWorker {
    pub say: mpsc::Sender<WorkerMessage>,
    pub hear: Streaming<LeaderMessage>,
    beat: tokio::task::JoinHandle<()>,
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        self.beat.abort();
    }
}

pub fn register(name: &str, credits: u32) -> Register {
    Register {
        worker: name.to_owned(),
        incarnation: format!("i{}", INCARNATION.fetch_add(1, Ordering::Relaxed)),
        protocol_version: emberline_proto::WORKER_PROTOCOL_VERSION,
        version: "test".to_owned(),
        resources: Some(v1::Resources {
            cpu_millis: 64_000,
            memory_bytes: 1 << 34,
            gpus: 0,
        }),
        kinds: [("noop".to_owned(), 1)].into(),
        credits,
        ..Default::default()
    }
}

pub fn message(what: FromWorker) -> WorkerMessage {
    WorkerMessage {
        message: Some(what),
    }
}

pub fn success(id: v1::AttemptId) -> AttemptReport {
    AttemptReport {
        id: Some(id),
        ..Default::default()
    }
}

impl FakeWorker {
    pub async fn connect(cluster: &Cluster, register: Register) -> Self {
        let (say, said) = mpsc::channel(1024);
        say.send(message(FromWorker::Register(register)))
            .await
            .unwrap();
        let mut client = WorkerServiceClient::new(cluster.channel().await);
        let hear = client.session(ReceiverStream::new(said)).await;
        let hear = hear.unwrap().into_inner();
        let beat = tokio::spawn({
            let say = say.clone();
            async move {
                let mut sequence = 0;
                loop {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    sequence += 1;
                    let beat = v1::Heartbeat { sequence };
                    if say
                        .send(message(FromWorker::Heartbeat(beat)))
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
            }
        });
        Self { say, hear, beat }
    }

    /// Registered, with room for that many attempts.
    pub async fn ready(cluster: &Cluster, name: &str, credits: u32) -> Self {
        let mut worker = Self::connect(cluster, register(name, credits)).await;
        let first = worker.next().await.unwrap();
        assert!(matches!(first, FromLeader::Registered(_)), "{first:?}");
        worker
    }

    /// Stops sending heartbeats.
    pub fn fall_silent(&self) {
        self.beat.abort();
    }

    /// What the leader says next, but for heartbeats.
    pub async fn next(&mut self) -> Result<FromLeader, Status> {
        soon("the leader's word", async {
            loop {
                match self.hear.message().await? {
                    Some(LeaderMessage {
                        message: Some(FromLeader::Heartbeat(_)) | None,
                    }) => {}
                    Some(LeaderMessage {
                        message: Some(message),
                    }) => return Ok(message),
                    None => return Err(Status::ok("the end")),
                }
            }
        })
        .await
    }

    pub async fn assignments(&mut self) -> Vec<v1::Assignment> {
        loop {
            match self.next().await.unwrap() {
                FromLeader::Assignments(assignments) => return assignments.assignments,
                FromLeader::Acks(_) | FromLeader::Stop(_) => {}
                other => panic!("an assignment was expected, not {other:?}"),
            }
        }
    }

    pub async fn report(&self, reports: Vec<AttemptReport>) {
        let reports = AttemptReports { reports };
        self.say
            .send(message(FromWorker::Reports(reports)))
            .await
            .unwrap();
    }

    pub async fn grant(&self, credits: u32) {
        let grant = GrantCredits { credits };
        self.say
            .send(message(FromWorker::GrantCredits(grant)))
            .await
            .unwrap();
    }

    /// Does all that is asked, at once, until the session ends.
    pub fn work(mut self) -> tokio::task::JoinHandle<u64> {
        tokio::spawn(async move {
            let mut done = 0;
            while let Ok(Some(heard)) = self.hear.message().await {
                if let Some(FromLeader::Assignments(assignments)) = heard.message {
                    let number = assignments.assignments.len();
                    let reports = assignments
                        .assignments
                        .into_iter()
                        .map(|a| success(a.id.unwrap()));
                    let reports = AttemptReports {
                        reports: reports.collect(),
                    };
                    let _ = self.say.send(message(FromWorker::Reports(reports))).await;
                    let credits = u32::try_from(number).unwrap();
                    let grant = GrantCredits { credits };
                    let _ = self
                        .say
                        .send(message(FromWorker::GrantCredits(grant)))
                        .await;
                    done += number as u64;
                }
            }
            done
        })
    }
}
