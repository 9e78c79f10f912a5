//! One term of leadership: the state is loaded, the engine decides, the services answer; until
//! somebody else leads, or the coordinator stops.
//!
//! A coordinator may lead several terms in its life; nothing of one is kept for the next.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use emberline_common::{
    artifact::{ArtifactError, ArtifactStore},
    ids::{Digest, Epoch},
    spec::PipelineSpec,
    tls::Refusals,
};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    CoordinatorConfig, CoordinatorError,
    archive::{self, Archive},
    delivery_gauges::DeliveryGauges,
    engine::{Engine, api::Observe},
    events::Tellers,
    gc::Collector,
    high_water,
    holds::Holds,
    lookup::Lookup,
    metrics::Metrics,
    run_id::RunIds,
    runtime::{
        Runtime,
        clock::{Clock, SystemClock},
        counters::Counters,
        observer::Observers,
        pump::{Parts, Pump, PumpError},
        watchers::Watchers,
    },
    services::{Context, role::Answering, server},
    store::{Record, SCHEMA_KEY, check_schema},
    tasks::Tasks,
    tenure::{self, Tenure},
    traces::Tracer,
};

/// The largest spec of a pipeline, as JSON.
const MAX_SPEC_BYTES: u64 = 16 << 20;
/// Specs read at once when the state is loaded.
const SPECS_AT_ONCE: usize = 16;
/// How long others may take to take what happened last.
const TELL_WITHIN: Duration = Duration::from_secs(1);
/// How long open calls may take to end with the term.
const END_WITHIN: Duration = Duration::from_secs(5);

/// A term that this coordinator leads.
pub(crate) struct Term {
    epoch: Epoch,
    /// Until its end is noted.
    tenure: Option<Tenure>,
    runtime: Runtime,
    answering: Answering,
    tellers: Tellers,
    tasks: Tasks,
    /// Cancelled when nothing more is decided.
    decided: CancellationToken,
}

impl Term {
    /// Loads the state and begins to decide.
    ///
    /// # Errors
    /// [`CoordinatorError`]. Nothing is left running.
    pub(crate) async fn begin(
        config: &CoordinatorConfig,
        epoch: Epoch,
        address: &str,
        delivery: &DeliveryGauges,
    ) -> Result<Self, CoordinatorError> {
        let store = Arc::clone(&config.store);
        check_schema(store.as_ref(), epoch).await?;
        store.claim(epoch, config.artifacts.url()).await?;
        let (loaded, old) = tokio::join!(store.load(""), async {
            if config.one_of_many {
                high_water::check(&config.artifacts, epoch).await?;
            }
            Ok::<_, CoordinatorError>(())
        });
        old?;
        let mut records = loaded?;
        let before = records.iter().find(|(key, _)| key == tenure::KEY);
        let before = before.map(|(_, value)| value.clone());
        records.retain(|(key, _)| key != SCHEMA_KEY && key != tenure::KEY);
        let specs = load_specs(&config.artifacts, &records).await?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let telemetry = &config.telemetry;
        let tenure = Tenure::begin(config, epoch, before, clock.now()).await?;
        let mut observers = Observers::default();
        let mut limits = config.engine.clone();
        let traced = telemetry.traces().then(|| observers.add());
        let measured = telemetry.measures().then(|| observers.add());
        let told: Vec<_> = (config.events.outlets.iter())
            .map(|_| observers.add())
            .collect();
        if traced.is_some() {
            limits.observe = limits.observe.max(Observe::Ends);
        } else if measured.is_some() {
            limits.observe = limits.observe.max(Observe::Exceptions);
        }
        if !told.is_empty() {
            limits.observe = Observe::Starts;
            limits.keep_untold = true;
        }
        let number = records.len();
        let (engine, first) =
            Engine::load(limits, epoch, seed(), clock.now(), records, &|_, digest| {
                specs.get(digest).cloned()
            })
            .map_err(|e| CoordinatorError::Load(e.to_string()))?;
        tracing::info!(%epoch, records = number, %address, "leading");

        let tasks = Tasks::new();
        let watchers = Watchers::default();
        let counters = Arc::new(Counters::default());
        let (runtime, requests) = Runtime::new(
            epoch,
            Arc::clone(&store),
            watchers.clone(),
            Arc::clone(&counters),
        );
        // Every live run is archived at most once, so the queue never fills.
        let (archive_queue, ended) = mpsc::channel(config.engine.max_live_runs + 1);
        let (access, checked) = watch::channel(Arc::clone(engine.access()));
        let parts = Parts {
            access,
            engine,
            store: Arc::clone(&store),
            epoch,
            clock: Arc::clone(&clock),
            requests,
            watchers,
            counters,
            archive: archive_queue,
            observers,
        };
        let pump = Pump::new(parts, Some(first));
        let stop = tasks.stopping().clone();
        let decided = CancellationToken::new();
        let over = decided.clone().drop_guard();
        tasks.spawn("engine", async move {
            let _over = over;
            pump.run(stop).await.map_err(|e| match e {
                PumpError::Store(e) => CoordinatorError::Store(e),
                PumpError::Panicked => CoordinatorError::Panicked { task: "engine" },
            })
        });
        let archive = Archive::new(config.artifacts.clone());
        let lookup = Lookup::new(runtime.clone(), archive.clone());
        if let Some(traced) = traced {
            let spans = config.spans.clone();
            let since = clock.now();
            let tracer = Tracer::new(telemetry.clone(), spans, runtime.clone(), since);
            let telling = async move {
                tracer.run(traced).await;
                Ok(())
            };
            match telemetry.background() {
                Some(background) => tasks.spawn_on(&background, "traces", telling),
                None => tasks.spawn("traces", telling),
            }
        }
        if let Some(measured) = measured {
            let (delivery, runtime, lookup) = (delivery.clone(), runtime.clone(), lookup.clone());
            let metrics = Metrics::new(&telemetry.meter(), delivery, runtime, lookup);
            tasks.spawn("metrics", async move {
                metrics.run(measured).await;
                Ok(())
            });
        }
        if config.one_of_many {
            let noting =
                high_water::note(config.artifacts.clone(), epoch, tasks.stopping().clone());
            tasks.spawn("highest term", async move {
                noting.await;
                Ok(())
            });
        }
        let tellers = Tellers::start(
            &config.events,
            config.spans.clone(),
            &runtime,
            &archive,
            told,
            &tasks,
        );
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
            lookup,
            collector: Collector::new(
                runtime.clone(),
                config.artifacts.clone(),
                archive,
                holds.clone(),
            ),
            runtime: runtime.clone(),
            store,
            artifacts: config.artifacts.clone(),
            holds,
            tasks: tasks.clone(),
            leader_since: clock.now(),
            clock,
            run_ids: RunIds::default(),
            address: address.to_owned(),
            telemetry: telemetry.clone(),
            events_source: config.events.source.clone(),
            access: checked,
            gate: config.gate.clone(),
            refusals: Refusals::default(),
            trace_url: config.trace_url.clone(),
            heartbeat_interval: config.heartbeat_interval,
            worker_grace: config.engine.worker_grace,
        };
        let context = Arc::new(context);
        Ok(Self {
            epoch,
            tenure: Some(tenure),
            runtime,
            answering: Answering {
                routes: server::routes(&context),
                context,
            },
            tellers,
            tasks,
            decided,
        })
    }

    /// What answers calls in this term.
    pub(crate) fn answering(&self) -> Answering {
        self.answering.clone()
    }

    /// The way to its engine.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Resolves when a part of it has failed, with why.
    ///
    /// # Errors
    /// Why.
    pub(crate) async fn stopped(&self) -> Result<(), CoordinatorError> {
        self.tasks.stopped().await
    }

    /// Lets others be told of what has happened, if they listen.
    pub(crate) async fn settle(&self) {
        self.tellers.settled(TELL_WITHIN).await;
    }

    /// Commits what was decided and lets nothing more be decided. Open streams are told.
    pub(crate) async fn stop_deciding(&mut self) {
        self.tasks.stopping().cancel();
        // It ends with its last commit, which ends with the term at the latest.
        self.decided.cancelled().await;
        // As long as the store takes what this leader writes.
        if let Some(tenure) = self.tenure.take() {
            tenure.end().await;
        }
    }

    /// Waits until all of it has ended.
    ///
    /// # Errors
    /// Why it had failed before, or that something does not end.
    pub(crate) async fn end(mut self) -> Result<(), CoordinatorError> {
        self.stop_deciding().await;
        let Self {
            tasks,
            answering,
            runtime,
            tellers,
            epoch,
            ..
        } = self;
        // They hold what the last tasks wait for.
        drop((answering, runtime, tellers));
        let ended = tasks.join(END_WITHIN).await;
        tracing::info!(%epoch, "the term has ended");
        match tasks.failure() {
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
