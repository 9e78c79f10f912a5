//! Starting, draining and stopping a worker.

use std::{
    collections::BTreeMap,
    fs,
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use emberline_common::ids::StageKind;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    board::Board,
    cache::Cache,
    config::{WorkerConfig, WorkerError},
    kinds::exec::end_leftovers,
    machine::private_dir,
    pass::Pass,
    runner::Runner,
    scrape::{Page, Scrape},
    search::LeaderSeen,
    secrets::SecretSource,
    serving::{Served, Serving},
    session::{self, Session},
    stage::{Stage, StopReason},
    telemetry::Instruments,
};

/// How long stages may take to stop when the worker is shut down at once.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// Longer than anybody watches one wait.
const LONG: Duration = Duration::from_hours(1);

/// A worker; see [`Worker::builder`].
pub struct Worker;

impl Worker {
    /// A worker that knows no stage kind yet.
    #[must_use]
    pub fn builder(config: WorkerConfig) -> WorkerBuilder {
        WorkerBuilder {
            config,
            stages: Vec::new(),
            serving: None,
        }
    }
}

/// Puts a worker together.
pub struct WorkerBuilder {
    config: WorkerConfig,
    stages: Vec<Arc<dyn Stage>>,
    serving: Option<Arc<dyn Serving>>,
}

impl WorkerBuilder {
    /// Adds a stage kind.
    #[must_use]
    pub fn stage(mut self, stage: Arc<dyn Stage>) -> Self {
        self.stages.push(stage);
        self
    }

    /// Adds stage kinds.
    #[must_use]
    pub fn stages(mut self, stages: Vec<Arc<dyn Stage>>) -> Self {
        self.stages.extend(stages);
        self
    }

    /// Serves models with this server, which runs already. It is stopped with the worker.
    #[must_use]
    pub fn serving(mut self, server: Arc<dyn Serving>) -> Self {
        self.serving = Some(server);
        self
    }

    /// Starts it in the current tokio runtime. It looks for a leader from then on; see
    /// [`RunningWorker::leader`].
    ///
    /// # Errors
    /// [`WorkerError`] if the configuration or the state directory cannot be used.
    pub async fn start(self) -> Result<RunningWorker, WorkerError> {
        let Self {
            config,
            stages,
            serving,
        } = self;
        let wrong = |field, message: String| WorkerError::Config { field, message };
        if config.leaders.is_empty() {
            return Err(wrong(
                "leaders",
                "is empty: name at least one `host:port`".into(),
            ));
        }
        if config.slots == 0 {
            return Err(wrong("slots", "is 0: it could run nothing".into()));
        }
        for leader in &config.leaders {
            session::endpoint(&config.dialer, leader)
                .map_err(|message| wrong("leaders", message))?;
        }
        let mut kinds: BTreeMap<StageKind, Arc<dyn Stage>> = BTreeMap::new();
        for stage in stages {
            let kind = stage.kind();
            if kinds.insert(kind.clone(), stage).is_some() {
                return Err(wrong("stages", format!("has the kind `{kind}` twice")));
            }
        }
        let (state_dir, cache_bytes) = (config.state_dir.clone(), config.cache_bytes);
        let (token, name) = (config.token.clone(), config.name.clone());
        let opened = tokio::task::spawn_blocking(move || {
            // Absolute, since a command runs in a directory of its own.
            let made = private_dir(&state_dir).and_then(|()| state_dir.canonicalize());
            let state_dir = made.map_err(|source| WorkerError::StateDir {
                what: "make",
                path: state_dir,
                source,
            })?;
            let work_dir = state_dir.join("work");
            // What an earlier life did not come to end and to remove.
            end_leftovers(&work_dir);
            match fs::remove_dir_all(&work_dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(WorkerError::StateDir {
                        what: "clear",
                        path: work_dir,
                        source: e,
                    });
                }
                _ => {}
            }
            private_dir(&work_dir).map_err(|source| WorkerError::StateDir {
                what: "make",
                path: work_dir.clone(),
                source,
            })?;
            let cache_dir = state_dir.join("cache");
            let cache = Cache::open(&cache_dir, cache_bytes);
            let cache = cache.map_err(|source| WorkerError::StateDir {
                what: "open the cache in",
                path: cache_dir,
                source,
            })?;
            let pass = Pass::open(token, &state_dir, name);
            Ok((work_dir, cache, pass))
        });
        let (work_dir, cache, pass) = opened.await.unwrap_or_else(|e| {
            Err(WorkerError::StateDir {
                what: "open",
                path: config.state_dir.clone(),
                source: std::io::Error::other(e),
            })
        })?;

        let (connected, leader) = watch::channel(None);
        let scrape = match &config.metrics_listen {
            None => None,
            Some(listen) => {
                let page = Page {
                    telemetry: config.telemetry.clone(),
                    leader: leader.clone(),
                };
                let tls = config.dialer.tls().cloned();
                let started = Scrape::start(listen, page, tls).await;
                Some(started.map_err(|source| WorkerError::Metrics {
                    listen: listen.clone(),
                    source,
                })?)
            }
        };
        let runner = Arc::new(Runner {
            stages: kinds,
            cache,
            board: Arc::new(Board::default()),
            work_dir,
            stop_grace: config.stop_grace,
            runtime: tokio::runtime::Handle::current(),
            tasks: TaskTracker::new(),
            instruments: Instruments::new(config.telemetry.clone()),
            secrets: Arc::new(SecretSource::new(
                config.name.clone(),
                config.secrets_dir.clone(),
            )),
        });
        let served = serving.map(|server| {
            let kept = runner.work_dir.with_file_name("serving.plan");
            Arc::new(Served::new(server, kept))
        });
        if let Some(served) = served.clone() {
            let cache = Arc::clone(&runner.cache);
            let restored = tokio::task::spawn_blocking(move || served.restore(&cache));
            if let Err(error) = restored.await {
                tracing::error!(%error, "restoring what was served has failed");
            }
        }
        runner.instruments.tell_connected(leader.clone());
        let cancel = CancellationToken::new();
        let drained = CancellationToken::new();
        let session = Session {
            incarnation: format!("i{:016x}", RandomState::new().hash_one(std::process::id())),
            leaders: config.leaders.clone(),
            pass,
            config,
            runner: runner.clone(),
            served: served.clone(),
            connected,
            cancel: cancel.clone(),
            drained: drained.clone(),
        };
        Ok(RunningWorker {
            drained,
            runner,
            served,
            leader,
            cancel,
            session: tokio::spawn(session.run()),
            scrape,
        })
    }
}

/// A worker at work. Dropped without [`drain`](Self::drain) or [`shutdown`](Self::shutdown), its
/// session ends and its stages are asked to stop, but nobody waits for them.
pub struct RunningWorker {
    drained: CancellationToken,
    runner: Arc<Runner>,
    served: Option<Arc<Served>>,
    leader: watch::Receiver<Option<LeaderSeen>>,
    cancel: CancellationToken,
    session: JoinHandle<()>,
    scrape: Option<Scrape>,
}

impl RunningWorker {
    /// The leader that there is a session with.
    #[must_use]
    pub fn leader(&self) -> watch::Receiver<Option<LeaderSeen>> {
        self.leader.clone()
    }

    /// Where Prometheus may take the metrics, if anywhere.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.scrape.as_ref().map(Scrape::address)
    }

    /// Resolves when a leader has told it to drain: it takes no more work already, and whoever owns it
    /// should [`drain`](Self::drain) it, with as much time as its attempts need.
    pub async fn told_to_drain(&self) {
        self.drained.cancelled().await;
    }

    /// Takes no more work and lets what runs finish; what has not after `within` is asked to save a
    /// checkpoint and is given back. Ends when the leader knows of everything, or some seconds after
    /// `within`: the time that a stage has to stop, and a moment to tell.
    pub async fn drain(mut self, within: Duration) {
        let board = self.runner.board.clone();
        board.drain();
        if let Some(served) = &self.served {
            served.drain();
        }
        let deadline = Instant::now() + within;
        if !self.wait(deadline, Board::is_idle).await {
            board.stop_all(StopReason::Preempted);
            // Not less than what a stage has, or its checkpoint and its report would be lost.
            let grace = self.runner.stop_grace + Duration::from_secs(1);
            self.wait(Instant::now() + grace, Board::is_empty).await;
            self.wait(Instant::now() + SHUTDOWN, Board::is_idle).await;
        }
        if let Some(served) = &self.served {
            served.handed_over().await;
        }
        self.stop().await;
    }

    /// Stops at once: stages are asked to stop and given a few seconds. What has not been reported
    /// by then, the leader will find lost and run again.
    pub async fn shutdown(mut self) {
        let board = self.runner.board.clone();
        board.drain();
        board.stop_all(StopReason::Preempted);
        self.wait(Instant::now() + SHUTDOWN, Board::is_empty).await;
        self.stop().await;
    }

    /// Resolves when nothing runs and the leader knows of everything that ran.
    pub async fn idle(&self) {
        while !self.wait(Instant::now() + LONG, Board::is_idle).await {}
    }

    async fn wait(&self, deadline: Instant, ready: fn(&Board) -> bool) -> bool {
        let board = &self.runner.board;
        loop {
            // Told before it looks, so that no change falls in between.
            let mut changed = std::pin::pin!(board.changed.notified());
            changed.as_mut().enable();
            if ready(board) {
                return true;
            }
            if timeout_at(deadline, changed).await.is_err() {
                return ready(board);
            }
        }
    }

    async fn stop(&mut self) {
        if let Some(served) = &self.served {
            served.server.stop().await;
        }
        self.cancel.cancel();
        if let Err(error) = (&mut self.session).await
            && error.is_panic()
        {
            tracing::error!(%error, "the session had panicked");
        }
        self.runner.tasks.close();
        if tokio::time::timeout(SHUTDOWN, self.runner.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("a stage did not stop and is left behind");
        }
        if let Some(scrape) = self.scrape.take() {
            scrape.stop().await;
        }
    }
}

impl Drop for RunningWorker {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.runner.board.stop_all(StopReason::Preempted);
    }
}
