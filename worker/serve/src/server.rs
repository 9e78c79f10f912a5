//! The server as a whole: what its parts share, how it starts, and how it stops.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use emberline_common::serving::{ServingOffer, ServingPlan, ServingStatus, VersionState};
use emberline_worker::serving::{Serving, ServingArtifacts};
use futures::{FutureExt as _, future::BoxFuture};
use tokio::{
    net::TcpListener,
    sync::{Notify, Semaphore, watch},
    task::JoinHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::Admission,
    body::Budget,
    config::ServeConfig,
    connections,
    http_service::HttpService,
    log::Log,
    metrics::{self, Instruments},
    plan::Planned,
    pool::Pool,
    relay::Relay,
    routes::Routes,
    traces::Traces,
    version::Version,
};

/// Versions that are loaded at once.
const LOADING: usize = 2;
/// Errors are told at once, but not more often than this.
const ERRORS_TOLD_EVERY: Duration = Duration::from_millis(250);
/// Threads that compute, where it was not said.
const MOST_THREADS: usize = 8;

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("cannot serve models on `{listen}`: {source}")]
    Listen {
        /// As it was given.
        listen: String,
        /// Why not.
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start the threads that compute: {0}")]
    Threads(io::Error),
}

/// What all parts of the server share.
pub(crate) struct Inner {
    pub config: ServeConfig,
    pub address: String,
    pub instruments: Arc<Instruments>,
    pub pool: Pool,
    pub routes: ArcSwap<Routes>,
    pub admission: ArcSwap<Admission>,
    pub loading: Semaphore,
    /// Large copies for shadows that are made at once.
    pub copying: Arc<Semaphore>,
    pub budget: Arc<Budget>,
    pub log: Log,
    pub relay: Relay,
    pub traces: Traces,
    planned: Mutex<Planned>,
    changed: Notify,
    draining: AtomicBool,
    /// Whether it says that it is ready.
    ready: watch::Sender<bool>,
    tasks: TaskTracker,
    serving: Mutex<Option<JoinHandle<()>>>,
    /// No more connections.
    stop: CancellationToken,
    /// No connections any more.
    close: CancellationToken,
    ids: (u64, AtomicU64),
    began: Instant,
    error_told: AtomicU64,
}

impl Inner {
    fn with_plan<T>(&self, work: impl FnOnce(&mut Planned) -> T) -> T {
        work(&mut self.planned.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes what is served, if there is something to change, and says so.
    pub fn settled(&self, change: impl FnOnce(&mut Planned) -> Option<Routes>) {
        let changed = self.with_plan(|planned| {
            // Under the lock, so that pictures come in the order of what they show.
            let routes = change(planned)?;
            self.routes.store(Arc::new(routes));
            Some(planned.is_complete())
        });
        if let Some(complete) = changed {
            self.say_ready(complete);
            self.changed.notify_one();
        }
    }

    fn say_ready(&self, complete: bool) {
        let ready = complete && !self.draining.load(Relaxed);
        self.ready
            .send_if_modified(|before| std::mem::replace(before, ready) != ready);
    }

    /// Whether it takes requests for all that it is to serve.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Whenever that changes.
    pub fn watch_ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// All versions that are loaded.
    pub fn loaded(&self) -> Vec<Arc<Version>> {
        self.with_plan(|planned| planned.ready())
    }

    /// How far it is.
    pub fn status(&self) -> ServingStatus {
        let ready = !self.draining.load(Relaxed);
        self.with_plan(|planned| planned.status(ready))
    }

    /// Name, version, state and reason of all that it has or is about to have, as the protocol lists
    /// them.
    pub fn index(&self, only_ready: bool) -> Vec<(String, String, &'static str, String)> {
        let versions = self.status().versions.into_iter();
        let all = versions.map(|version| {
            let (state, reason) = match version.state {
                VersionState::Ready => ("READY", String::new()),
                VersionState::Loading => ("LOADING", String::new()),
                VersionState::Failed(why) => ("UNAVAILABLE", why),
            };
            let (model, number) = (version.model.to_string(), version.version.to_string());
            (model, number, state, reason)
        });
        all.filter(|(_, _, state, _)| !only_ready || *state == "READY")
            .collect()
    }

    /// An id for a request that has none: unlike all others of all servers.
    pub fn fresh_id(&self) -> Arc<str> {
        let n = self.ids.1.fetch_add(1, Relaxed);
        format!("{:016x}-{n:x}", self.ids.0).into()
    }

    /// A version failed to answer: the leader is to hear of it soon, but not of each.
    pub fn an_error_appeared(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let told = self.error_told.load(Relaxed);
        let every = u64::try_from(ERRORS_TOLD_EVERY.as_millis()).unwrap_or(u64::MAX);
        let due = told == 0 || now.saturating_sub(told) >= every;
        if due
            && (self
                .error_told
                .compare_exchange(told, now.max(1), Relaxed, Relaxed))
            .is_ok()
        {
            self.changed.notify_one();
        }
    }
}

/// The server. It ends when it is [stopped](Serving::stop) or dropped.
pub struct InferenceServer {
    inner: Arc<Inner>,
    address: SocketAddr,
}

impl InferenceServer {
    /// Listens and answers; it is not ready before it has a plan and its models. To be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: ServeConfig) -> Result<Self, StartError> {
        let failed = |source: io::Error| StartError::Listen {
            listen: config.listen.clone(),
            source,
        };
        let listener = TcpListener::bind(&config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let threads = match config.limits.compute_threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS)),
            threads => threads,
        };
        let pool = Pool::start(threads).map_err(StartError::Threads)?;
        let tasks = TaskTracker::new();
        let advertised = config
            .advertise
            .clone()
            .unwrap_or_else(|| address.to_string());
        let (log, logging) = Log::new(&config);
        tasks.spawn(logging);
        let inner = Arc::new(Inner {
            address: advertised,
            instruments: Arc::new(Instruments::new(&config.telemetry)),
            pool,
            routes: ArcSwap::default(),
            admission: ArcSwap::from_pointee(if config.asks_for_tokens {
                Admission::Unknown
            } else {
                Admission::Open
            }),
            loading: Semaphore::new(LOADING),
            copying: Arc::new(Semaphore::new(1)),
            budget: Budget::new(config.limits.max_receiving_bytes),
            log,
            relay: Relay::new(config.dialer.clone()),
            traces: Traces::new(&config),
            planned: Mutex::default(),
            changed: Notify::new(),
            draining: AtomicBool::new(false),
            ready: watch::Sender::new(false),
            tasks,
            serving: Mutex::default(),
            stop: CancellationToken::new(),
            close: CancellationToken::new(),
            ids: (random(), AtomicU64::new(0)),
            began: Instant::now(),
            error_told: AtomicU64::new(0),
            config,
        });
        metrics::observe(&inner.config.telemetry.meter(), &Arc::downgrade(&inner));
        let (service, telling) = HttpService::new(&inner);
        let stop = inner.stop.clone();
        inner.tasks.spawn(async move {
            tokio::select! {
                () = telling => {}
                () = stop.cancelled() => {}
            }
        });
        let serving = connections::serve(
            listener,
            inner.config.dialer.tls().cloned(),
            service,
            inner.config.limits.clone(),
            inner.stop.clone(),
            inner.close.clone(),
        );
        let serving = tokio::spawn(serving);
        *inner.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(serving);
        Ok(Self { inner, address })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

/// A number that no other server has.
fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::time::SystemTime::now())
}

impl Serving for InferenceServer {
    fn offer(&self) -> ServingOffer {
        ServingOffer {
            address: self.inner.address.clone(),
            environment: self.inner.config.environment.clone(),
        }
    }

    fn apply(&self, mut plan: ServingPlan, artifacts: ServingArtifacts) {
        let inner = &self.inner;
        let admission = Admission::of(plan.access.take());
        inner.admission.store(Arc::new(admission));
        inner.log.keep_in(artifacts.clone());
        let mut loads = Vec::new();
        inner.settled(|planned| {
            let (routes, wanted) = planned.apply(plan);
            inner.relay.keep_only(&routes);
            loads = wanted;
            Some(routes)
        });
        for load in loads {
            inner
                .tasks
                .spawn(Arc::clone(inner).load(load, artifacts.clone()));
        }
    }

    fn status(&self) -> ServingStatus {
        self.inner.status()
    }

    fn changed(&self) -> &Notify {
        &self.inner.changed
    }

    fn drain(&self) {
        self.inner.draining.store(true, Relaxed);
        self.inner.say_ready(false);
        self.inner.changed.notify_one();
    }

    fn stop(&self) -> BoxFuture<'_, ()> {
        let inner = &self.inner;
        async move {
            self.drain();
            inner.stop.cancel();
            inner.with_plan(|planned| planned.cancel());
            inner.loading.close();
            let limit = inner.config.limits.stop_within;
            let serving = inner.serving.lock();
            let serving = serving.unwrap_or_else(PoisonError::into_inner).take();
            if let Some(mut serving) = serving
                && tokio::time::timeout(limit, &mut serving).await.is_err()
            {
                inner.close.cancel();
                // Whatever is left of them ends at its next step.
                let _ = tokio::time::timeout(limit, serving).await;
            }
            inner.close.cancel();
            let pool = Arc::clone(inner);
            let joined = tokio::task::spawn_blocking(move || pool.pool.stop());
            if joined.await.is_err() {
                tracing::error!("ending the threads that compute panicked");
            }
            // Now that nothing is answered any more.
            inner.log.stop();
            inner.tasks.close();
            if tokio::time::timeout(limit, inner.tasks.wait())
                .await
                .is_err()
            {
                tracing::warn!("the inference server did not end all that it had begun");
            }
        }
        .boxed()
    }
}

impl Drop for InferenceServer {
    fn drop(&mut self) {
        self.inner.stop.cancel();
        self.inner.close.cancel();
        self.inner.with_plan(|planned| planned.cancel());
        self.inner.log.stop();
    }
}
