//! The engine's rules, each by name: a small fleet and a clock in hand, and what is decided. Faults in
//! every order are the simulator's part.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod caching;
mod deployments;
mod draining;
mod registry;
mod retries;
mod rollouts;
mod scheduling;
mod serving;
mod tokens;
mod workers;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use emberline_common::{
    delivery::Change,
    failure::{Failure, Reason},
    ids::{ArtifactName, Digest, Epoch, Incarnation, RunId, StageKind, WorkerName},
    resources::Resources,
    run_view::{ArtifactRef, AttemptTiming, RunState, RunView, TaskState},
    serving::{ServingOffer, ServingPlan, ServingStatus},
    spec::{PipelineSpec, kinds::BuiltinKind},
    time::Timestamp,
};
use serde_json::{Map, Value, json};

use super::{
    Engine,
    api::{
        Assignment, AttemptFailure, AttemptReport, AttemptSuccess, Command, Effect, EngineConfig,
        Outcome as Answer, Refusal, SessionId, Submission, WorkerHello, Write,
    },
    spec_blob,
};

/// An engine, the time, and what it has assigned and archived.
struct Cluster {
    engine: Engine,
    now: Timestamp,
    assigned: Vec<(SessionId, Assignment)>,
    closed: Vec<SessionId>,
    /// What observers were told of attempts.
    failed: Vec<Reason>,
    ended: BTreeMap<RunId, RunView>,
    runs: u64,
    /// What is committed.
    state: BTreeMap<String, Vec<u8>>,
    /// The pipelines of all runs.
    specs: BTreeMap<Digest, Arc<PipelineSpec>>,
    /// What the next runs are submitted for.
    change: Option<Change>,
    /// What each session was told to serve last.
    plans: BTreeMap<SessionId, ServingPlan>,
}

impl Cluster {
    fn new() -> Self {
        Self {
            engine: Engine::new(EngineConfig::default(), Epoch(1), 1),
            now: Timestamp(1_000_000),
            assigned: Vec::new(),
            closed: Vec::new(),
            failed: Vec::new(),
            ended: BTreeMap::new(),
            runs: 0,
            state: BTreeMap::new(),
            specs: BTreeMap::new(),
            change: None,
            plans: BTreeMap::new(),
        }
    }

    fn apply(&mut self, writes: Vec<Write>) {
        for write in writes {
            match write {
                Write::Put { key, value } => {
                    self.state.insert(key, value);
                }
                Write::Delete { key } => {
                    self.state.remove(&key);
                }
                Write::DeletePrefix { prefix } => {
                    self.state.retain(|key, _| !key.starts_with(&prefix));
                }
            }
        }
    }

    /// A leader that has loaded what is committed.
    fn next_leader(&self) -> Engine {
        let records = self.state.clone().into_iter().collect();
        let specs = |_: &RunId, digest: &Digest| self.specs.get(digest).cloned();
        let config = EngineConfig::default();
        let loaded = Engine::load(config, Epoch(2), 2, self.now, records, &specs);
        loaded.expect("the state can be loaded").0
    }

    /// Another leader takes over; workers have to come again.
    fn fail_over(&mut self) {
        self.engine = self.next_leader();
        self.plans.clear();
    }

    fn handle(&mut self, command: Command) {
        self.try_handle(command).expect("the command is taken");
    }

    fn try_handle(&mut self, command: Command) -> Result<Answer, Refusal> {
        let decision = self.engine.handle(self.now, command);
        self.apply(decision.writes);
        self.let_out(decision.effects);
        decision.outcome
    }

    fn let_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Assign {
                    session,
                    assignment,
                } => self.assigned.push((session, *assignment)),
                Effect::CloseSession { session, .. } => self.closed.push(session),
                Effect::AttemptFailed(reason) => self.failed.push(reason),
                Effect::Serve { session, plan } => {
                    self.plans.insert(session, *plan);
                }
                Effect::Archive(run) => {
                    let view = run.view.clone();
                    self.ended.insert(view.summary.run.clone(), view);
                }
                _ => {}
            }
        }
    }

    /// A worker that runs everything, with so many cores and credits.
    fn worker(&mut self, number: u64, cores: u32, credits: u32) -> SessionId {
        let name = format!("w{number}");
        self.register(number, &name, &format!("i{number}"), cores, credits)
    }

    /// A session of a worker, by name and incarnation.
    fn register(
        &mut self,
        number: u64,
        name: &str,
        incarnation: &str,
        cores: u32,
        credits: u32,
    ) -> SessionId {
        self.register_serving(number, name, incarnation, (cores, credits), None)
    }

    fn register_serving(
        &mut self,
        number: u64,
        name: &str,
        incarnation: &str,
        (cores, credits): (u32, u32),
        serving: Option<(ServingOffer, ServingStatus)>,
    ) -> SessionId {
        let kinds = ["convert", "train", "noop", "deploy"];
        let version = |kind| BuiltinKind::from_name(kind).unwrap().version();
        let kinds = kinds.map(|kind| (StageKind::new(kind).unwrap(), version(kind)));
        self.handle(Command::WorkerRegistered(Box::new(WorkerHello {
            session: SessionId(number),
            worker: WorkerName::new(name).unwrap(),
            incarnation: Incarnation::new(incarnation).unwrap(),
            version: String::new(),
            resources: Resources {
                cpu_millis: cores * 1000,
                ..Resources::default()
            },
            labels: BTreeMap::new(),
            kinds: kinds.into_iter().collect(),
            cached: Vec::new(),
            running: Vec::new(),
            credits,
            serving,
        })));
        SessionId(number)
    }

    fn credits(&mut self, session: SessionId, credits: u32) {
        self.handle(Command::Credits { session, credits });
    }

    fn submit(&mut self, pipeline: Value) -> RunId {
        self.runs += 1;
        let run = RunId::new(format!("r{}", self.runs)).unwrap();
        self.now = self.now.after(Duration::from_millis(1));
        let spec: Arc<PipelineSpec> = Arc::new(serde_json::from_value(pipeline).unwrap());
        self.specs
            .insert(Digest::of(&spec_blob(&spec)), spec.clone());
        self.handle(Command::Submit(Box::new(Submission {
            run: run.clone(),
            request_id: None,
            spec,
            revision: Digest::of(b"revision"),
            params: Map::new(),
            base_dir: String::new(),
            priority: None,
            no_cache: false,
            files: Vec::new(),
            trigger: "manual".to_owned(),
            traceparent: String::new(),
            change: self.change.clone(),
            repairs: None,
        })));
        run
    }

    /// What was assigned since the last call, as `run/task`.
    fn took(&mut self) -> Vec<(SessionId, Assignment)> {
        std::mem::take(&mut self.assigned)
    }

    fn names(&mut self) -> Vec<String> {
        let took = self.took();
        let names = took
            .iter()
            .map(|(_, a)| format!("{}/{}", a.id.run, a.id.task));
        names.collect()
    }

    fn report(&mut self, (session, assignment): &(SessionId, Assignment), outcome: Outcome) {
        self.handle(Command::Reports {
            session: *session,
            reports: vec![AttemptReport {
                id: assignment.id.clone(),
                outcome,
                timing: AttemptTiming::default(),
            }],
        });
    }

    /// Ends an attempt well, with an output `data` of that content, and gives its credit back.
    fn succeed(&mut self, attempt: &(SessionId, Assignment), content: &str) {
        let outcome = Ok(AttemptSuccess {
            outputs: vec![ArtifactRef {
                name: ArtifactName::new("data").unwrap(),
                manifest: Digest::of(content.as_bytes()),
                bytes: 10,
            }],
            ..AttemptSuccess::default()
        });
        self.report(attempt, outcome);
        self.credits(attempt.0, 1);
    }

    fn fail(&mut self, attempt: &(SessionId, Assignment), reason: Reason) {
        let outcome = Err(AttemptFailure {
            failure: Failure::new(reason, "it failed"),
            bad_manifest: None,
            outputs: Vec::new(),
            results: Map::new(),
        });
        self.report(attempt, outcome);
        self.credits(attempt.0, 1);
    }

    /// Moves the clock to the next deadline.
    fn next_deadline(&mut self) -> Duration {
        let until = self.engine.next_deadline().expect("something is due");
        let waited = until.since(self.now);
        self.now = self.now.max(until);
        self.handle(Command::Tick);
        waited
    }

    fn view(&self, run: &RunId) -> RunView {
        let ended = self.ended.get(run).cloned();
        ended
            .or_else(|| self.engine.run_view(run))
            .expect("the run is known")
    }

    fn task(&self, run: &RunId, task: &str) -> TaskState {
        let view = self.view(run);
        let found = view.tasks.iter().find(|t| t.task.as_str() == task);
        found.expect("the task is there").state
    }
}

type Outcome = Result<AttemptSuccess, AttemptFailure>;

/// A pipeline of one stage.
fn single(name: &str, stage: Value) -> Value {
    json!({"pipeline": name, "stages": {"work": stage}})
}

fn convert(x: u64) -> Value {
    json!({"kind": "convert", "with": {"x": x}})
}

#[test]
fn a_run_ends_when_its_last_task_has() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 1, 1);
    let run = cluster.submit(json!({"pipeline": "p", "stages": {
        "first": convert(1),
        "second": {"kind": "convert", "inputs": {"in": "first.data"}},
    }}));
    let first = cluster.took().remove(0);
    assert_eq!(cluster.task(&run, "second"), TaskState::Waiting);
    cluster.succeed(&first, "a");
    let second = cluster.took().remove(0);
    assert_eq!(second.1.inputs[0].artifact.manifest, Digest::of(b"a"));
    cluster.succeed(&second, "b");
    assert_eq!(cluster.view(&run).summary.state, RunState::Succeeded);
}
