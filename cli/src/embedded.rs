//! The embedded cluster: a coordinator and workers in this process, talking real gRPC over loopback,
//! the state in one file, artifacts in a directory.
//!
//! One process at a time holds a state directory; `cluster.json` in it says which, so that another
//! process can be its client.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use emberline_common::{
    artifact::ArtifactStore,
    ids::{EnvironmentName, WorkerName},
    resources::Resources,
    tls::Dialer,
};
use emberline_coordinator::{
    Coordinator, CoordinatorConfig, Gate,
    engine::api::EngineConfig,
    events::EventsConfig,
    store::{StoreError, embedded::EmbeddedStore},
};
use emberline_serve::{InferenceServer, ServeConfig};
use emberline_worker::{RunningWorker, Worker, WorkerConfig, kinds::collect::Reach, stage::Stage};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use url::Url;

use crate::{args::ClusterArguments, exit::Exit, telemetry};

/// How long workers may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// How long running attempts may take to stop when the cluster does.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// What `cluster.json` says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClusterFile {
    /// The process.
    pub pid: u32,
    /// Where its coordinator serves.
    pub address: SocketAddr,
}

impl ClusterFile {
    fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("cluster.json")
    }

    /// The one in a state directory, if it is there and can be read.
    pub fn read(state_dir: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(Self::path(state_dir)).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn write(&self, state_dir: &Path) -> anyhow::Result<()> {
        let path = Self::path(state_dir);
        let partial = path.with_extension("json.partial");
        std::fs::write(&partial, serde_json::to_vec(self)?)
            .and_then(|()| std::fs::rename(&partial, &path))
            .with_context(|| format!("cannot write `{}`", path.display()))
    }
}

/// Why it did not start.
#[derive(Debug)]
pub enum StartError {
    /// Another process holds the state directory.
    Held(String),
    /// Anything else.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for StartError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Where the first worker serves models, and which.
#[derive(Debug, Clone)]
pub struct ServeModels {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The one environment.
    pub environment: EnvironmentName,
}

/// A coordinator and workers in this process.
pub struct EmbeddedCluster {
    coordinator: Coordinator,
    workers: Vec<RunningWorker>,
    models: Option<SocketAddr>,
    state_dir: PathBuf,
}

impl EmbeddedCluster {
    /// Starts it.
    ///
    /// # Errors
    /// [`StartError::Held`] if another process has the state directory.
    pub async fn start(
        arguments: &ClusterArguments,
        events: EventsConfig,
        listen: SocketAddr,
        workers: u32,
        serve: Option<ServeModels>,
    ) -> Result<Self, StartError> {
        let state_dir = &arguments.state_dir;
        emberline_worker::machine::private_dir(state_dir).with_context(|| {
            format!("cannot make the state directory `{}`", state_dir.display())
        })?;
        let state_dir = state_dir
            .canonicalize()
            .context("cannot resolve the state directory")?;
        let store = match EmbeddedStore::open(state_dir.join("state.redb")).await {
            Ok(store) => store,
            Err(e @ StoreError::Held { .. }) => return Err(StartError::Held(e.to_string())),
            Err(e) => return Err(e.into()),
        };
        let objects = Url::from_directory_path(state_dir.join("objects"))
            .map_err(|()| anyhow::anyhow!("`{}` is no absolute path", state_dir.display()))?;
        let artifacts = ArtifactStore::open(objects.as_str())?;
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot serve on {listen}"))?;
        let config = CoordinatorConfig {
            name: "embedded".to_owned(),
            store: Arc::new(store),
            artifacts: artifacts.clone(),
            // Workers die with this process: nobody is left who could claim an attempt.
            engine: EngineConfig {
                adoption_window: Duration::ZERO,
                ..EngineConfig::default()
            },
            heartbeat_interval: Duration::from_secs(1),
            advertise: None,
            telemetry: telemetry::get(),
            spans: telemetry::spans(),
            trace_url: telemetry::trace_url(),
            events,
            one_of_many: false,
            dialer: Dialer::default(),
            gate: Gate::default(),
        };
        let coordinator = Coordinator::start(config, listener).await?;
        coordinator.leads().await?;
        let address = coordinator.address();
        let mut cluster = Self {
            coordinator,
            workers: Vec::new(),
            models: None,
            state_dir,
        };
        // What serves on one's own machine is one's own.
        let reach = arguments
            .stages
            .reach(Reach::of_own_machine(), &cluster.state_dir)?;
        for number in 1..=workers {
            let config = cluster.worker_config(number, workers, address)?;
            let config = WorkerConfig {
                artifacts: Some(artifacts.clone()),
                cache_bytes: arguments.cache_size.0,
                secrets_dir: arguments.stages.secrets_dir.clone(),
                ..config
            };
            let name = config.name.clone();
            let mut worker = Worker::builder(config).stages(all_stages(reach.clone()));
            if let Some(serve) = serve.as_ref().filter(|_| number == 1) {
                let config = ServeConfig {
                    telemetry: telemetry::get(),
                    ..ServeConfig::new(&serve.listen.to_string(), serve.environment.clone(), name)
                };
                let server = InferenceServer::start(config).await?;
                cluster.models = Some(server.address());
                worker = worker.serving(Arc::new(server));
            }
            cluster.workers.push(worker.start().await?);
        }
        cluster.workers_ready().await?;
        ClusterFile {
            pid: std::process::id(),
            address,
        }
        .write(&cluster.state_dir)?;
        Ok(cluster)
    }

    fn worker_config(
        &self,
        number: u32,
        of: u32,
        address: SocketAddr,
    ) -> anyhow::Result<WorkerConfig> {
        Ok(WorkerConfig {
            name: WorkerName::new(format!("worker-{number}"))?,
            leaders: vec![address.to_string()],
            resources: share(emberline_worker::machine::resources(), number, of),
            labels: BTreeMap::new(),
            state_dir: self.state_dir.join("workers").join(number.to_string()),
            telemetry: telemetry::get(),
            ..WorkerConfig::default()
        })
    }

    async fn workers_ready(&self) -> anyhow::Result<()> {
        let ready = async {
            for worker in &self.workers {
                if worker.leader().wait_for(Option::is_some).await.is_err() {
                    anyhow::bail!("a worker stopped before it was ready");
                }
            }
            Ok(())
        };
        tokio::time::timeout(READY_WITHIN, ready)
            .await
            .with_context(|| format!("the workers are not ready after {READY_WITHIN:?}"))?
    }

    /// Where the coordinator serves.
    pub fn address(&self) -> SocketAddr {
        self.coordinator.address()
    }

    /// Where models are served, if anywhere.
    pub const fn models_address(&self) -> Option<SocketAddr> {
        self.models
    }

    /// Resolves when the coordinator has stopped by itself, with why.
    pub async fn stopped(&self) -> Exit {
        match self.coordinator.stopped().await {
            Ok(()) => Exit::cluster("the coordinator stopped"),
            Err(e) => Exit::cluster(format!("the coordinator stopped: {e}")),
        }
    }

    /// Stops everything in order: workers give back what they run, the coordinator resigns.
    pub async fn shutdown(self) -> anyhow::Result<()> {
        let path = ClusterFile::path(&self.state_dir);
        if ClusterFile::read(&self.state_dir).is_some_and(|f| f.pid == std::process::id()) {
            std::fs::remove_file(&path)
                .with_context(|| format!("cannot remove `{}`", path.display()))?;
        }
        futures::future::join_all(self.workers.into_iter().map(|w| w.drain(STOP_WITHIN))).await;
        self.coordinator.shutdown().await?;
        Ok(())
    }
}

/// Every stage kind that this binary has; `collect` within that reach.
pub fn all_stages(reach: Reach) -> Vec<Arc<dyn Stage>> {
    let mut stages = emberline_worker::builtin_stages(reach);
    stages.extend(emberline_data::stages());
    stages.extend(emberline_train::stages());
    stages.extend(emberline_report::stages());
    stages
}

/// The part of the machine that the worker with this number (from 1) of `of` has; never less than
/// one core. A GPU is one worker's.
fn share(total: Resources, number: u32, of: u32) -> Resources {
    let of = of.max(1);
    Resources {
        cpu_millis: (total.cpu_millis / of).max(1000),
        memory_bytes: total.memory_bytes / u64::from(of),
        gpus: total.gpus / of + u32::from(number <= total.gpus % of),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gpu_is_one_workers() {
        let total = |gpus| Resources {
            cpu_millis: 4000,
            memory_bytes: 1 << 30,
            gpus,
        };
        let shared = |gpus, of| -> Vec<u32> {
            let shares = (1..=of).map(|number| share(total(gpus), number, of).gpus);
            shares.collect()
        };
        assert_eq!(shared(0, 2), [0, 0]);
        assert_eq!(shared(1, 2), [1, 0]);
        assert_eq!(shared(8, 3), [3, 3, 2]);
    }
}
