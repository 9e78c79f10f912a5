//! One coordinator from its start to its end: it serves, follows, leads when it can, and stops.
//!
//! It serves for as long as it lives. While another one leads, every call is answered with where the
//! leader is; while it leads itself, its [term](crate::term) answers.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use emberline_common::{
    artifact::{ArtifactError, ArtifactStore},
    ids::Epoch,
    telemetry::Telemetry,
    tls::Dialer,
};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    access::Gate,
    attend,
    delivery_gauges::DeliveryGauges,
    engine::api::EngineConfig,
    events::EventsConfig,
    runtime::{Runtime, counters::Counts},
    services::{role::Role, server},
    standing,
    store::{Candidate, StateStore, StoreError, check_schema},
    tasks::Tasks,
    term::Term,
    traces::Spans,
};

/// How long open calls may take to end at shutdown.
const END_WITHIN: Duration = Duration::from_secs(5);
/// How long to wait before leading is tried again after it failed for a cause that may pass.
const TRY_AGAIN: Duration = Duration::from_secs(1);
/// How long a coordinator that did not lead may take to make sure of that when it stops.
const FAREWELL_WITHIN: Duration = Duration::from_millis(500);
/// How long the first look at the state may take before it is left for later.
const LOOK_WITHIN: Duration = Duration::from_secs(2);

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
    /// Workers send a heartbeat at least this often.
    pub heartbeat_interval: Duration,
    /// Where others reach it, `host:port`; by default where it listens.
    pub advertise: Option<String>,
    /// Whether others may lead in its place: then what keeps it from leading now is tried again.
    pub one_of_many: bool,
    /// Where spans, metrics and logs go.
    pub telemetry: Telemetry,
    /// What its spans are made with.
    pub spans: Spans,
    /// Where a trace can be looked at, with `{trace_id}`; for the page about a run.
    pub trace_url: Option<String>,
    /// Where it tells what happens.
    pub events: EventsConfig,
    /// Its certificates: with them its port speaks TLS, and so do the others.
    pub dialer: Dialer,
    /// Who may call it.
    pub gate: Gate,
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
    /// The state is older than the artifacts.
    #[error(
        "this would be term {epoch}, but term {highest} has led this cluster: its etcd was restored from an old copy, or made anew. Runs that were accepted since then would be lost; if that is meant, remove the object {object} and start again"
    )]
    OldState {
        /// The term that would begin.
        epoch: Epoch,
        /// The highest term that has led.
        highest: Epoch,
        /// The object that says so.
        object: String,
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

impl CoordinatorError {
    /// Whether it may pass by itself, or at another coordinator.
    const fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Spec { .. }
                | Self::Stuck(_)
                | Self::Store(StoreError::Deposed { .. } | StoreError::Failed { .. })
        )
    }
}

/// A coordinator that serves.
pub struct Coordinator {
    address: SocketAddr,
    tasks: Tasks,
    /// The way to the engine, while it leads.
    leading: watch::Receiver<Option<Runtime>>,
}

impl Coordinator {
    /// Serves on the listener, and leads as soon as it can; see [`Self::leads`].
    ///
    /// # Errors
    /// [`CoordinatorError::Serve`]; [`CoordinatorError::Store`] if the state is not one that this
    /// coordinator could ever lead with.
    pub async fn start(
        config: CoordinatorConfig,
        listener: TcpListener,
    ) -> Result<Self, CoordinatorError> {
        let address = listener.local_addr().map_err(|e| CoordinatorError::Serve {
            source: Arc::new(e),
        })?;
        let advertise = config
            .advertise
            .clone()
            .unwrap_or_else(|| address.to_string());
        let candidate = Candidate {
            name: config.name.clone(),
            address: advertise,
        };
        let tasks = Tasks::new();
        let store = Arc::clone(&config.store);
        if config.one_of_many && store.trouble().is_none() {
            // Told before anything is served. If the store does not answer now, it is told later.
            if let Ok(fits) = timeout(LOOK_WITHIN, fits(&config)).await {
                fits?;
            }
        }
        let role = Role::new(
            Arc::clone(&store),
            &candidate.address,
            config.telemetry.clone(),
            config.dialer.scheme(),
        )
        .await;
        let tls = config.dialer.tls().cloned();
        let serving = server::serve(role.clone(), listener, tls, tasks.stopping().clone());
        tasks.spawn("server", serving);
        if config.one_of_many {
            let stop = tasks.stopping().clone();
            let dialer = config.dialer.clone();
            let watching = attend::attend(Arc::clone(&store), candidate.address.clone(), dialer);
            let there = store.announce(candidate.clone());
            tasks.spawn("attendance", async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = watching => {}
                    () = there => {}
                }
                Ok(())
            });
        }
        let (told, leading) = watch::channel(None);
        standing::observe(&config.telemetry, &leading, &store);
        let terms = Terms {
            delivery: DeliveryGauges::new(&config.telemetry),
            config,
            candidate,
            role,
            told,
            stop: tasks.clone(),
        };
        tasks.spawn("leadership", terms.run());
        Ok(Self {
            address,
            tasks,
            leading,
        })
    }

    /// Resolves when it leads.
    ///
    /// # Errors
    /// Why it stopped before it did.
    pub async fn leads(&self) -> Result<(), CoordinatorError> {
        let mut leading = self.leading.clone();
        tokio::select! {
            led = leading.wait_for(Option::is_some) => match led {
                Ok(_) => Ok(()),
                Err(_) => self.tasks.stopped().await,
            },
            stopped = self.tasks.stopped() => stopped,
        }
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has counted in this term: commits, records, commands. Nothing while it does not lead.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let leading = self.leading.borrow();
        leading.as_ref().map(Runtime::counts).unwrap_or_default()
    }

    /// Resolves when it has stopped serving.
    ///
    /// # Errors
    /// Why it failed, if it did.
    pub async fn stopped(&self) -> Result<(), CoordinatorError> {
        self.tasks.stopped().await
    }

    /// Stops orderly: what was decided is committed, the leadership is given up, open streams are
    /// told, every task has ended.
    ///
    /// # Errors
    /// Why it had failed before, or what failed now.
    pub async fn shutdown(self) -> Result<(), CoordinatorError> {
        self.tasks.stopping().cancel();
        let ended = self.tasks.join(END_WITHIN * 2).await;
        match self.tasks.failure() {
            Some(e) => Err(e),
            None if ended => Ok(()),
            None => Err(CoordinatorError::Stuck(END_WITHIN)),
        }
    }
}

/// Whether this coordinator could lead at all: the state belongs to its cluster, and its build knows
/// the schema. A follower that could not would be found out only when it is needed. Nothing is
/// written: what is not there yet is left to the first leader.
async fn fits(config: &CoordinatorConfig) -> Result<(), CoordinatorError> {
    // Nobody leads in that term, so it can't write.
    let nobody = Epoch(0);
    let store = &config.store;
    for checked in [
        check_schema(store.as_ref(), nobody).await,
        store.claim(nobody, config.artifacts.url()).await,
    ] {
        match checked.map_err(CoordinatorError::from) {
            Err(e) if !e.may_pass() => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Leads one term after the other.
struct Terms {
    config: CoordinatorConfig,
    candidate: Candidate,
    role: Role,
    told: watch::Sender<Option<Runtime>>,
    delivery: DeliveryGauges,
    stop: Tasks,
}

/// Why a term ended.
enum End {
    /// The coordinator stops.
    Stop,
    /// Somebody else leads, or may.
    Over,
    /// A part of it failed.
    Failed(CoordinatorError),
}

impl Terms {
    async fn run(self) -> Result<(), CoordinatorError> {
        let stopping = self.stop.stopping().clone();
        if self.config.one_of_many {
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                fits = fits(&self.config) => fits?,
            }
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                () = self.bury_predecessor() => {}
            }
        }
        loop {
            let campaign = self.config.store.campaign(self.candidate.clone());
            let epoch = tokio::select! {
                () = stopping.cancelled() => {
                    // It may have been won just now; then nobody should wait for the lease.
                    let _ = timeout(FAREWELL_WITHIN, self.bury_predecessor()).await;
                    return Ok(());
                }
                epoch = campaign => epoch,
            };
            let failed = match epoch {
                Ok(epoch) => match self.one(epoch).await {
                    End::Stop => return Ok(()),
                    End::Over => continue,
                    End::Failed(e) => e,
                },
                Err(e) => e.into(),
            };
            if !(self.config.one_of_many && failed.may_pass()) {
                return Err(failed);
            }
            tracing::warn!(error = %failed, "leading failed and is tried again");
            tokio::select! {
                () = stopping.cancelled() => return Ok(()),
                () = sleep(TRY_AGAIN) => {}
            }
        }
    }

    async fn one(&self, epoch: Epoch) -> End {
        let store = &self.config.store;
        let over = store.term_ended(epoch);
        tokio::pin!(over);
        let stopping = self.stop.stopping();
        let begun = tokio::select! {
            begun = Term::begin(&self.config, epoch, &self.candidate.address, &self.delivery) => begun,
            () = stopping.cancelled() => {
                // The lease ends by itself if this fails.
                let _ = store.resign(epoch).await;
                return End::Stop;
            }
            () = &mut over => return End::Over,
        };
        let mut term = match begun {
            Ok(term) => term,
            Err(e) => {
                // The reason at hand says more than a failed farewell would.
                let _ = store.resign(epoch).await;
                return match e {
                    CoordinatorError::Store(StoreError::Deposed { .. })
                        if self.config.one_of_many =>
                    {
                        End::Over
                    }
                    e => End::Failed(e),
                };
            }
        };
        self.role.lead(term.answering()).await;
        self.told.send_replace(Some(term.runtime().clone()));
        let end = tokio::select! {
            () = stopping.cancelled() => End::Stop,
            () = &mut over => End::Over,
            stopped = term.stopped() => match stopped {
                Ok(()) => End::Stop,
                Err(CoordinatorError::Store(StoreError::Deposed { .. }))
                    if self.config.one_of_many => End::Over,
                Err(e) => End::Failed(e),
            },
        };
        self.role.follow().await;
        self.told.send_replace(None);
        // Of many, the next one tells the rest.
        if matches!(end, End::Stop) && !self.config.one_of_many {
            term.settle().await;
        }
        term.stop_deciding().await;
        let resigned = store.resign(epoch).await;
        let ended = term.end().await;
        match (end, ended, resigned) {
            (End::Stop, Err(e), _) => End::Failed(e),
            (End::Stop, Ok(()), Err(e)) => End::Failed(e.into()),
            (end, ..) => end,
        }
    }

    /// Whoever leads at our own address does not: we listen there, and have not begun or are done.
    async fn bury_predecessor(&self) {
        let store = &self.config.store;
        if let Ok(Some(leader)) = store.leader().await
            && leader.address == self.candidate.address
        {
            tracing::info!(term = %leader.epoch, "ending a term at this address that nobody leads");
            if let Err(e) = store.depose(leader.epoch).await {
                tracing::warn!(error = %e, "its lease has to run out");
            }
        }
    }
}
