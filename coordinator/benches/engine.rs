//! How fast the engine decides, and how that changes with what lies in its queue.
//!
//! `cargo bench -p emberline-coordinator -- [--json] [--tasks N] [--rounds N]`
//!
//! *Decisions*: a fleet that is busy all the time reports one attempt's end after the other; each
//! decision commits the report and assigns the next task, while so many tasks wait in the queue.
//! *Load*: what a new leader needs to take over the same state, from its records to its first
//! decision. Every figure is the median of several rounds. Nothing is written to a disk or sent:
//! this is the engine alone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_precision_loss,
    reason = "a bench stops at what it did not expect"
)]

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use emberline_common::{
    ids::{ArtifactName, AttemptId, Digest, Epoch, Incarnation, RunId, WorkerName},
    resources::Resources,
    run_view::{ArtifactRef, AttemptTiming},
    spec::{PipelineSpec, kinds::BuiltinKind},
    time::Timestamp,
};
use emberline_coordinator::engine::{
    Engine,
    api::{
        AttemptReport, AttemptSuccess, Command, Decision, Effect, EngineConfig, Outcome, Refusal,
        SessionId, Submission, WorkerHello, Write,
    },
    spec_blob,
};
use serde_json::{Map, Value, json};

/// Tasks of one run: one stage with a matrix.
const TASKS_PER_RUN: usize = 1000;
const WORKERS: usize = 50;
const SLOTS: u32 = 8;
const FEW: usize = 1000;
const NOON: Timestamp = Timestamp(1_700_000_000_000_000);

fn main() {
    let asked = Asked::read();
    let mut rows: Vec<Row> = Vec::new();
    for _ in 0..asked.rounds {
        let few = Bench::new(FEW).decisions_per_s();
        let mut bench = Bench::new(asked.tasks);
        let many = bench.decisions_per_s();
        let load = bench.load_s();
        for (name, tasks, unit, value) in [
            ("decisions", FEW, "1/s", few),
            ("decisions", asked.tasks, "1/s", many),
            ("decision, many to few queued", asked.tasks, "x", few / many),
            ("load", asked.tasks, "ms", load * 1e3),
        ] {
            let of = |row: &&mut Row| row.name == name && row.tasks == tasks && row.unit == unit;
            match rows.iter_mut().find(of) {
                Some(row) => row.values.push(value),
                None => rows.push(Row {
                    name,
                    tasks,
                    unit,
                    values: vec![value],
                }),
            }
        }
    }
    for row in &mut rows {
        row.values.sort_by(f64::total_cmp);
    }
    print(&rows, asked.json);
}

/// What the command line asks for.
struct Asked {
    json: bool,
    tasks: usize,
    rounds: usize,
}

impl Asked {
    fn read() -> Self {
        let mut asked = Self {
            json: false,
            tasks: 100_000,
            rounds: 5,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut number = || {
                let number = words.next().and_then(|text| text.parse().ok());
                number.unwrap_or_else(|| panic!("`{word}` needs a number"))
            };
            match word.as_str() {
                "--json" => asked.json = true,
                "--tasks" => asked.tasks = number(),
                "--rounds" => asked.rounds = number(),
                // What cargo itself adds.
                "--bench" => {}
                _ => panic!("`{word}` is none of --json, --tasks N, --rounds N"),
            }
        }
        assert!(asked.rounds > 0, "`--rounds` is 0: at least one is needed");
        asked
    }
}

/// One figure over all rounds.
struct Row {
    name: &'static str,
    /// Tasks that wait in the queue.
    tasks: usize,
    unit: &'static str,
    values: Vec<f64>,
}

impl Row {
    fn median(&self) -> f64 {
        self.values[self.values.len() / 2]
    }

    fn bounds(&self) -> (f64, f64) {
        (self.values[0], self.values[self.values.len() - 1])
    }
}

fn print(rows: &[Row], as_json: bool) {
    if as_json {
        let figures = rows.iter().map(|row| {
            json!({
                "bench": "engine",
                "figure": row.name,
                "queued": row.tasks,
                "unit": row.unit,
                "median": row.median(),
                "min": row.bounds().0,
                "max": row.bounds().1,
                "rounds": row.values,
            })
        });
        let figures: Vec<_> = figures.collect();
        let all = json!({"version": env!("CARGO_PKG_VERSION"), "figures": figures});
        println!("{all:#}");
        return;
    }
    let line = |cells: [&str; 6]| {
        let [name, tasks, median, min, max, unit] = cells;
        println!("{name:<30} {tasks:>8} {median:>12} {min:>12} {max:>12} {unit}");
    };
    line(["FIGURE", "QUEUED", "MEDIAN", "MIN", "MAX", "UNIT"]);
    for row in rows {
        let (min, max) = row.bounds();
        let number = |value: f64| match value {
            v if v >= 1000.0 => format!("{v:.0}"),
            v => format!("{v:.3}"),
        };
        line([
            row.name,
            &row.tasks.to_string(),
            &number(row.median()),
            &number(min),
            &number(max),
            row.unit,
        ]);
    }
}

/// An engine with a busy fleet and a queue behind it, and a store of what it writes.
struct Bench {
    engine: Engine,
    now: Timestamp,
    tasks: usize,
    records: BTreeMap<String, Vec<u8>>,
    specs: BTreeMap<Digest, Arc<PipelineSpec>>,
    /// Attempts under way, the oldest first.
    running: VecDeque<(SessionId, AttemptId)>,
}

impl Bench {
    /// So many tasks wait, and every worker is full.
    fn new(tasks: usize) -> Self {
        let mut bench = Self {
            engine: Engine::new(EngineConfig::default(), Epoch(1), 1),
            now: NOON,
            tasks,
            records: BTreeMap::new(),
            specs: BTreeMap::new(),
            running: VecDeque::new(),
        };
        for number in 0..WORKERS {
            let hello = Command::WorkerRegistered(Box::new(worker(number)));
            bench.handle(hello).expect("it is taken");
        }
        let slots = WORKERS * SLOTS as usize;
        let mut left = tasks + slots;
        for run in 0.. {
            let count = left.min(TASKS_PER_RUN);
            bench.submit(run, count);
            left -= count;
            if left == 0 {
                break;
            }
        }
        assert_eq!(bench.running.len(), slots, "the fleet is busy");
        assert_eq!(bench.engine.queue_stats().queued_tasks, tasks);
        bench
    }

    /// A run with so many tasks, of one of ten pipelines.
    fn submit(&mut self, run: usize, tasks: usize) {
        let matrix: Vec<usize> = (0..tasks).collect();
        let spec = json!({
            "pipeline": format!("p{}", run % 10),
            "stages": {"work": {
                "kind": "convert",
                "with": {"run": run, "x": "${matrix.x}"},
                "matrix": {"x": matrix},
                "resources": {"cpu": 1},
            }},
        });
        let spec: Arc<PipelineSpec> = Arc::new(serde_json::from_value(spec).unwrap());
        let revision = Digest::of(&spec_blob(&spec));
        self.specs.insert(revision, spec.clone());
        let decision = self.handle(Command::Submit(Box::new(Submission {
            run: RunId::new(format!("r{run}")).unwrap(),
            request_id: Some(format!("q{run}")),
            spec,
            revision,
            params: Map::new(),
            base_dir: "/".to_owned(),
            priority: None,
            no_cache: false,
            files: Vec::new(),
            trigger: "bench".to_owned(),
            traceparent: String::new(),
            change: None,
            repairs: None,
        })));
        assert!(matches!(decision, Ok(Outcome::Submitted { .. })));
    }

    /// Decides, "commits", and notes what was assigned.
    fn handle(&mut self, command: Command) -> Result<Outcome, Refusal> {
        self.now = Timestamp(self.now.0 + 10);
        let decision = self.engine.handle(self.now, command);
        self.keep(decision)
    }

    fn keep(&mut self, decision: Decision) -> Result<Outcome, Refusal> {
        for write in decision.writes {
            match write {
                Write::Put { key, value } => {
                    self.records.insert(key, value);
                }
                Write::Delete { key } => {
                    self.records.remove(&key);
                }
                Write::DeletePrefix { prefix } => {
                    self.records.retain(|key, _| !key.starts_with(&prefix));
                }
            }
        }
        for effect in decision.effects {
            if let Effect::Assign {
                session,
                assignment,
            } = effect
            {
                self.running.push_back((session, assignment.id));
            }
        }
        decision.outcome
    }

    /// Reports the end of one attempt after the other, and asks for another task each time.
    fn decisions_per_s(&mut self) -> f64 {
        // The same number whatever waits, and few enough that no round changes the queue much.
        let reports = FEW / 2;
        let mut spent = Duration::ZERO;
        let mut decided = 0_u32;
        for _ in 0..reports {
            let (session, id) = self.running.pop_front().expect("the fleet is busy");
            let report = report(id);
            let reports = Command::Reports {
                session,
                reports: vec![report],
            };
            for command in [
                reports,
                Command::Credits {
                    session,
                    credits: 1,
                },
            ] {
                self.now = Timestamp(self.now.0 + 10);
                let begun = Instant::now();
                let decision = self.engine.handle(self.now, command);
                spent += begun.elapsed();
                decided += 1;
                self.keep(decision).expect("it is taken");
            }
        }
        let queued = self.engine.queue_stats().queued_tasks;
        assert_eq!(
            queued + reports,
            self.tasks,
            "each report made room for one"
        );
        f64::from(decided) / spent.as_secs_f64()
    }

    /// How long a new leader takes to know what this one knows.
    fn load_s(&self) -> f64 {
        let records: Vec<_> = self.records.clone().into_iter().collect();
        let specs = |_: &RunId, revision: &Digest| self.specs.get(revision).cloned();
        let begun = Instant::now();
        let config = EngineConfig::default();
        let loaded = Engine::load(config, Epoch(2), 2, self.now, records, &specs);
        let spent = begun.elapsed();
        let (engine, _) = loaded.expect("it can be read");
        let (new, old) = (engine.queue_stats(), self.engine.queue_stats());
        assert_eq!(
            (new.live_tasks, new.queued_tasks),
            (old.live_tasks, old.queued_tasks),
            "the new leader knows as much"
        );
        spent.as_secs_f64()
    }
}

fn worker(number: usize) -> WorkerHello {
    WorkerHello {
        session: SessionId(number as u64),
        worker: WorkerName::new(format!("w{number}")).unwrap(),
        incarnation: Incarnation::new("i1").unwrap(),
        version: String::new(),
        resources: Resources {
            cpu_millis: 1000 * SLOTS,
            ..Resources::default()
        },
        labels: BTreeMap::new(),
        kinds: [("convert".parse().unwrap(), BuiltinKind::Convert.version())].into(),
        cached: Vec::new(),
        running: Vec::new(),
        credits: SLOTS,
        serving: None,
    }
}

fn report(id: AttemptId) -> AttemptReport {
    let results: Map<String, Value> = Map::from_iter([("rows".to_owned(), json!(1000))]);
    let output = ArtifactRef {
        name: ArtifactName::new("out").unwrap(),
        manifest: Digest::of(id.to_string().as_bytes()),
        bytes: 10,
    };
    AttemptReport {
        id,
        outcome: Ok(AttemptSuccess {
            outputs: vec![output],
            results,
            registration: None,
        }),
        timing: AttemptTiming::default(),
    }
}
