//! One coordinator from its start to its end: campaign, load, serve; stop, resign.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use emberline_common::{
    artifact::{ArtifactError, ArtifactStore},
    ids::{Digest, Epoch},
    spec::PipelineSpec,
};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use thiserror::Error;
use tokio::{net::TcpListener, sync::mpsc};

use crate::{
    archive::{self, Archive},
    engine::{Engine, api::EngineConfig},
    gc::Collector,
    holds::Holds,
    lookup::Lookup,
    run_id::RunIds,
    runtime::{
        Runtime,
        clock::{Clock, SystemClock},
        counters::Counters,
        pump::{Parts, Pump, PumpError},
        watchers::Watchers,
    },
    services::{Context, server},
    store::{Candidate, Record, SCHEMA_KEY, StateStore, StoreError, check_schema},
    tasks::Tasks,
};

/// The largest spec of a pipeline, as JSON.
const MAX_SPEC_BYTES: u64 = 16 << 20;
/// Specs read at once when the state is loaded.
const SPECS_AT_ONCE: usize = 16;
/// How long open calls may take to end at shutdown.
const END_WITHIN: Duration = Duration::from_secs(5);

/// What a coordinator is made of.
pub struct CoordinatorConfig {
    /// Its name, for people.
    pub name: String,
    /// Where the state is.
    pub store: Arc<dyn StateStore>,
    /// Where artifacts, logs and archives are.
    pub artifacts: ArtifactStore,
    /// The engine's limits and times.
    pub engine: EngineConfig,
    /// Workers send a heartbeat at least this often; after four without one their session ends.
    pub heartbeat_interval: Duration,
}

/// Why a coordinator did not start, or has stopped.
#[derive(Debug, Clone, Error)]
pub enum CoordinatorError {
    /// The state store. After a failed commit the coordinator does not lead any more.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The state cannot be read by this build.
    #[error("the state cannot be loaded: {0}")]
    Load(String),
    /// A live run's pipeline cannot be read.
    #[error("the pipeline of a live run cannot be read: {source}")]
    Spec {
        /// Why.
        source: Arc<ArtifactError>,
    },
    /// The server.
    #[error("cannot serve: {source}")]
    Serve {
        /// Why.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A part of it panicked: a defect.
    #[error("the coordinator's part `{task}` panicked: please report this")]
    Panicked {
        /// Which part.
        task: &'static str,
    },
    /// Some call did not end in time.
    #[error("open calls did not end within {0:?}")]
    Stuck(Duration),
}

/// A coordinator that leads and serves.
pub struct Coordinator {
    address: SocketAddr,
    store: Arc<dyn StateStore>,
    epoch: Epoch,
    runtime: Runtime,
    tasks: Tasks,
}

impl Coordinator {
    /// Becomes the leader, loads the state, and serves on the listener.
    ///
    /// # Errors
    /// [`CoordinatorError`].
    pub async fn start(
        config: CoordinatorConfig,
        listener: TcpListener,
    ) -> Result<Self, CoordinatorError> {
        let serve_failed = |e: std::io::Error| CoordinatorError::Serve {
            source: Arc::new(e),
        };
        let address = listener.local_addr().map_err(serve_failed)?;
        let candidate = Candidate {
            name: config.name.clone(),
            address: address.to_string(),
        };
        let epoch = config.store.campaign(candidate).await?;
        match Self::lead(&config, epoch, address, listener).await {
            Ok(coordinator) => Ok(coordinator),
            Err(e) => {
                // The reason at hand says more than a failed farewell would.
                let _ = config.store.resign(epoch).await;
                Err(e)
            }
        }
    }

    async fn lead(
        config: &CoordinatorConfig,
        epoch: Epoch,
        address: SocketAddr,
        listener: TcpListener,
    ) -> Result<Self, CoordinatorError> {
        let store = Arc::clone(&config.store);
        check_schema(store.as_ref(), epoch).await?;
        let mut records = store.load("").await?;
        records.retain(|(key, _)| key != SCHEMA_KEY);
        let specs = load_specs(&config.artifacts, &records).await?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let number = records.len();
        let (engine, first) = Engine::load(
            config.engine.clone(),
            epoch,
            seed(),
            clock.now(),
            records,
            &|_, digest| specs.get(digest).cloned(),
        )
        .map_err(|e| CoordinatorError::Load(e.to_string()))?;
        tracing::info!(%epoch, records = number, %address, "leading");

        let tasks = Tasks::new();
        let watchers = Watchers::default();
        let counters = Arc::new(Counters::default());
        let (runtime, requests) = Runtime::new(epoch, watchers.clone(), Arc::clone(&counters));
        // Every live run is archived at most once, so the queue never fills.
        let (archive_queue, ended) = mpsc::channel(config.engine.max_live_runs + 1);
        let parts = Parts {
            engine,
            store: Arc::clone(&store),
            epoch,
            clock: Arc::clone(&clock),
            requests,
            watchers,
            counters,
            archive: archive_queue,
        };
        let pump = Pump::new(parts, Some(first));
        let stop = tasks.stopping().clone();
        tasks.spawn("engine", async move {
            pump.run(stop).await.map_err(|e| match e {
                PumpError::Store(e) => CoordinatorError::Store(e),
                PumpError::Panicked => CoordinatorError::Panicked { task: "engine" },
            })
        });

        let archive = Archive::new(config.artifacts.clone());
        let holds = Holds::default();
        let archiving = archive::archive_runs(
            archive.clone(),
            holds.clone(),
            runtime.clone(),
            ended,
            tasks.stopping().clone(),
        );
        tasks.spawn("archive", async move {
            archiving.await;
            Ok(())
        });
        let context = Context {
            lookup: Lookup::new(runtime.clone(), archive.clone()),
            collector: Collector::new(
                runtime.clone(),
                config.artifacts.clone(),
                archive,
                holds.clone(),
            ),
            runtime: runtime.clone(),
            artifacts: config.artifacts.clone(),
            holds,
            tasks: tasks.clone(),
            leader_since: clock.now(),
            clock,
            run_ids: RunIds::default(),
            address: address.to_string(),
            heartbeat_interval: config.heartbeat_interval,
        };
        tasks.spawn("server", server::serve(Arc::new(context), listener));
        Ok(Self {
            address,
            store,
            epoch,
            runtime,
            tasks,
        })
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has counted: commits, records, commands.
    #[must_use]
    pub fn counts(&self) -> crate::runtime::counters::Counts {
        self.runtime.counts()
    }

    /// Resolves when it has stopped serving.
    ///
    /// # Errors
    /// Why it failed, if it did.
    pub async fn stopped(&self) -> Result<(), CoordinatorError> {
        self.tasks.stopped().await
    }

    /// Stops orderly: what was decided is committed, open streams are told, the leadership is given
    /// up, every task has ended.
    ///
    /// # Errors
    /// Why it had failed before, or what failed now.
    pub async fn shutdown(self) -> Result<(), CoordinatorError> {
        self.tasks.stopping().cancel();
        let ended = self.tasks.join(END_WITHIN).await;
        self.store.resign(self.epoch).await?;
        match self.tasks.failure() {
            Some(e) => Err(e),
            None if ended => Ok(()),
            None => Err(CoordinatorError::Stuck(END_WITHIN)),
        }
    }
}

/// Reads the pipelines of all live runs. What is not there is left out: the engine says of which run.
async fn load_specs(
    artifacts: &ArtifactStore,
    records: &[Record],
) -> Result<HashMap<Digest, Arc<PipelineSpec>>, CoordinatorError> {
    let wanted =
        Engine::spec_revisions(records).map_err(|e| CoordinatorError::Load(e.to_string()))?;
    let digests: HashSet<Digest> = wanted.into_iter().map(|(_, digest)| digest).collect();
    stream::iter(digests)
        .map(|digest| async move {
            let bytes = match artifacts.get_bytes(&digest, MAX_SPEC_BYTES).await {
                Ok(bytes) => bytes,
                Err(ArtifactError::NotFound { .. }) => return Ok(None),
                Err(source) => {
                    let source = Arc::new(source);
                    return Err(CoordinatorError::Spec { source });
                }
            };
            let spec: PipelineSpec = serde_json::from_slice(&bytes)
                .map_err(|e| CoordinatorError::Load(format!("the pipeline {digest}: {e}")))?;
            Ok(Some((digest, Arc::new(spec))))
        })
        .buffer_unordered(SPECS_AT_ONCE)
        .try_filter_map(|found| async move { Ok(found) })
        .try_collect()
        .await
}

/// A seed for jitter: it only has to differ from other leaders'.
fn seed() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => emberline_common::time::Timestamp::now().0,
    }
}
