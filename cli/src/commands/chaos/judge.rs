//! The judgement: from the history of the state, what clients were told, what was done to whom, and
//! what commands wrote when they began.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use emberline_common::run_view::RunState;
use emberline_common::{ids::Epoch, time::Timestamp};
use emberline_coordinator::{
    engine::{
        api::EndedRun,
        records::{TaskRecord, Written},
    },
    store::etcd::Change,
};

use super::{
    faults::{Fault, Kind},
    load::Told,
};

/// An attempt that was lost this long after its worker's fault was lost by it: what a paused worker
/// takes until it is found lost, and some time for a busy machine.
const BLAME: Duration = Duration::from_secs(15);

/// What came of it. The lists say what broke a promise; they should be empty.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) faults: usize,
    pub(super) runs: usize,
    pub(super) tasks: usize,
    pub(super) attempts: usize,
    pub(super) recoveries: Vec<Recovery>,
    pub(super) lost_runs: Vec<String>,
    pub(super) double_commits: Vec<String>,
    pub(super) needless: Vec<String>,
    pub(super) stale: Vec<String>,
}

/// How soon work was assigned again, in milliseconds.
#[derive(Debug)]
pub(super) struct Recovery {
    pub(super) fault: &'static str,
    pub(super) count: usize,
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) max: f64,
}

impl Report {
    pub(super) fn is_clean(&self) -> bool {
        let broken = [
            &self.lost_runs,
            &self.double_commits,
            &self.needless,
            &self.stale,
        ];
        broken.iter().all(|list| list.is_empty())
    }
}

/// Judges.
pub(super) fn judge(
    history: &[Change],
    told: &BTreeMap<String, Told>,
    faults: &[Fault],
    begun: &HashMap<String, usize>,
) -> Report {
    let mut report = Report {
        faults: faults.len(),
        runs: told.len(),
        ..Report::default()
    };
    let mut tasks: HashMap<&str, TaskRecord> = HashMap::new();
    let mut ended: HashMap<&str, RunState> = HashMap::new();
    let mut assigned: Vec<(Timestamp, Epoch)> = Vec::new();
    let mut highest = Epoch(0);
    for change in history {
        if let Some(run) = change.key.strip_prefix("ended/") {
            let end = change
                .value
                .as_deref()
                .map(serde_json::from_slice::<EndedRun>);
            if let Some(Ok(end)) = end {
                ended.insert(run, end.summary.state);
            }
            continue;
        }
        let (Some(task), Some(value)) = (change.key.strip_prefix("tasks/"), &change.value) else {
            continue;
        };
        let Ok(record) = serde_json::from_slice::<TaskRecord>(value) else {
            report.stale.push(format!("{} cannot be read", change.key));
            continue;
        };
        if record.epoch < highest {
            report.stale.push(format!(
                "{task} was written in term {} after term {highest}",
                record.epoch
            ));
        }
        highest = highest.max(record.epoch);
        let before = tasks.get(task);
        if let Some(before) = before
            && done(before)
            && *before != record
        {
            report.double_commits.push(format!(
                "{task}: attempt {} was committed, then attempt {}",
                before.attempt, record.attempt
            ));
        }
        let last = before.map_or(0, |before| before.attempt);
        if record.attempt > last && record.written == Written::Running {
            report.attempts += 1;
            if let Some(at) = record.started_at {
                assigned.push((at, record.epoch));
            }
        }
        // What never came to its worker, since the leader died between commit and word, has lost no
        // work; so only what is known to have begun counts.
        if let Some(before) = before.filter(|b| b.written == Written::Running)
            && !done(&record)
            && begun.contains_key(&format!("{}.{}", task.replace('/', "."), before.attempt))
            && !explained(before, &record, faults)
        {
            report.needless.push(format!(
                "{task}: attempt {} on {} was given up in term {} (begun in term {})",
                before.attempt,
                before.worker.as_ref().map_or("nobody", |w| w.as_str()),
                record.epoch,
                before.epoch
            ));
        }
        tasks.insert(task, record);
    }
    for (attempt, times) in begun {
        if *times > 1 {
            let what = format!("{attempt} has begun {times} times");
            report.double_commits.push(what);
        }
    }
    report.tasks = tasks.len();
    for (run, told) in told {
        let state = ended.get(run.as_str()).copied();
        if state != Some(RunState::Succeeded) {
            let state = state.map_or("never ended".to_owned(), |s| format!("ended {s:?}"));
            report.lost_runs.push(format!("{run}: accepted, {state}"));
        } else if *told == Told::Failed {
            report
                .lost_runs
                .push(format!("{run}: a client was told that it failed"));
        }
    }
    assigned.sort_unstable();
    report.recoveries = recoveries(&assigned, faults);
    report
}

fn done(record: &TaskRecord) -> bool {
    matches!(record.written, Written::Succeeded | Written::Cached)
}

/// Whether the worker of an attempt that was given up had a fault while it ran.
fn explained(before: &TaskRecord, after: &TaskRecord, faults: &[Fault]) -> bool {
    let Some(worker) = &before.worker else {
        return false;
    };
    let begun = before.started_at.unwrap_or_default();
    let given_up = after
        .started_at
        .filter(|_| after.attempt > before.attempt)
        .unwrap_or(Timestamp(u64::MAX));
    faults.iter().any(|fault| {
        let over = fault.over.unwrap_or(Timestamp(u64::MAX));
        fault.whom == worker.as_str() && fault.at <= given_up && over.after(BLAME) >= begun
    })
}

/// By kind of fault: how long until something was assigned; by a later term, where the term has ended.
fn recoveries(assigned: &[(Timestamp, Epoch)], faults: &[Fault]) -> Vec<Recovery> {
    let mut by_kind: BTreeMap<Kind, Vec<f64>> = BTreeMap::new();
    for fault in faults {
        let next = assigned
            .iter()
            .find(|(at, term)| *at >= fault.at && (!fault.kind.ends_term() || *term > fault.term));
        if let Some((at, _)) = next {
            let took = at.since(fault.at).as_secs_f64() * 1e3;
            by_kind.entry(fault.kind).or_default().push(took);
        }
    }
    let rows = by_kind.into_iter().map(|(kind, mut took)| {
        took.sort_by(f64::total_cmp);
        Recovery {
            fault: kind.name(),
            count: took.len(),
            p50: crate::commands::quantile(&took, 0.5),
            p95: crate::commands::quantile(&took, 0.95),
            max: took.last().copied().unwrap_or(f64::NAN),
        }
    });
    rows.collect()
}
