//! Workers that a person asks to leave.

use super::*;
use crate::engine::api::{Disconnect, Refusal};

impl Cluster {
    /// Asks a worker to leave: what it still runs, and which sessions are told.
    fn ask(&mut self, worker: u64) -> (Result<usize, Refusal>, Vec<SessionId>) {
        let worker = WorkerName::new(format!("w{worker}")).unwrap();
        let command = Command::DrainWorker { worker };
        let decision = self.engine.handle(self.now, command);
        let running = decision.outcome.map(|outcome| match outcome {
            crate::engine::api::Outcome::Draining { running } => running,
            other => panic!("{other:?}"),
        });
        (running, told(&decision.effects))
    }

    /// Opens a session of worker 1, in this life of it; which sessions are told to leave.
    fn comes_back(&mut self, session: u64, incarnation: &str) -> Vec<SessionId> {
        let hello = WorkerHello {
            session: SessionId(session),
            worker: WorkerName::new("w1").unwrap(),
            incarnation: Incarnation::new(incarnation).unwrap(),
            version: String::new(),
            resources: Resources {
                cpu_millis: 8000,
                ..Resources::default()
            },
            labels: BTreeMap::new(),
            kinds: BTreeMap::from([(StageKind::new("convert").unwrap(), 1)]),
            cached: Vec::new(),
            running: Vec::new(),
            credits: 8,
            serving: None,
        };
        let command = Command::WorkerRegistered(Box::new(hello));
        told(&self.engine.handle(self.now, command).effects)
    }

    fn disconnect(&mut self, session: u64) {
        self.handle(Command::WorkerDisconnected {
            session: SessionId(session),
            how: Disconnect::Closed,
        });
    }
}

fn told(effects: &[Effect]) -> Vec<SessionId> {
    let drains = effects.iter().filter_map(|effect| match effect {
        Effect::Drain { session } => Some(*session),
        _ => None,
    });
    drains.collect()
}

#[test]
fn a_worker_that_is_asked_to_leave_ends_what_it_runs_and_gets_no_more() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    let run = cluster.submit(single("first", convert(1)));
    let attempt = cluster.took().remove(0);
    assert_eq!(cluster.ask(1), (Ok(1), vec![SessionId(1)]));
    cluster.submit(single("second", convert(2)));
    cluster.succeed(&attempt, "a");
    assert_eq!(cluster.task(&run, "work"), TaskState::Succeeded);
    assert!(cluster.took().is_empty(), "it has room, but leaves");
    let other = cluster.worker(2, 8, 8);
    assert_eq!(cluster.took().remove(0).0, other);
}

#[test]
fn a_worker_that_is_not_there_is_not_asked() {
    let mut cluster = Cluster::new();
    let (refused, told) = cluster.ask(1);
    assert!(matches!(refused, Err(Refusal::NoSuchWorker(_))));
    assert!(told.is_empty());
}

#[test]
fn a_worker_that_is_away_when_it_is_asked_is_told_when_it_is_back() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    cluster.disconnect(1);
    assert_eq!(cluster.ask(1), (Ok(0), vec![]), "nobody listens");
    assert_eq!(cluster.comes_back(2, "i1"), [SessionId(2)]);
    cluster.submit(single("p", convert(1)));
    assert!(cluster.took().is_empty());
}

#[test]
fn a_worker_that_was_started_anew_stays() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    cluster.ask(1).0.unwrap();
    cluster.disconnect(1);
    assert!(cluster.comes_back(2, "another").is_empty());
    cluster.submit(single("p", convert(1)));
    assert_eq!(cluster.took().len(), 1);
}

#[test]
fn a_worker_that_leaves_by_itself_still_leaves_when_its_connection_broke() {
    let mut cluster = Cluster::new();
    let session = cluster.worker(1, 8, 8);
    cluster.handle(Command::WorkerDraining { session });
    cluster.disconnect(1);
    cluster.comes_back(2, "i1");
    cluster.submit(single("p", convert(1)));
    assert!(cluster.took().is_empty());
}
