//! The five metrics. [`measure`] says which deployment counts for what.
//!
//! A deployment belongs to the window in which it became live or was given up; what came of it later
//! (its failure, its recovery) belongs to it, whenever it happened. A change belongs to the deployment
//! of its pipeline and environment that was live with it first, in the order of time, and among all
//! that are remembered: one that the window leaves out takes its changes with it.

use std::{sync::Arc, time::Duration};

use emberline_common::{
    delivery::{
        ChangeKind, Deployment, DeploymentKind, DeploymentOutcome, FailureCause, MAX_COMMITS,
    },
    dora::{
        CarriedChange, Counts, DoraQuery, DoraReport, Frequency, Level, PlaceMetrics, Rate, Times,
    },
    ids::{DeploymentId, Digest, EnvironmentName, ModelName, PipelineName},
    time::Timestamp,
};
use foldhash::{HashMap, HashMapExt as _, HashSet, fast::RandomState};

use super::quick_check;

/// Computes the metrics for each pipeline and environment that the query fits.
///
/// The deployments may come in any order. Nothing that is later than `now` is looked for: a window
/// that ends later ends now.
#[must_use]
pub fn measure<'a>(
    deployments: impl IntoIterator<Item = &'a Arc<Deployment>>,
    query: &DoraQuery,
    now: Timestamp,
) -> DoraReport {
    let window = Window {
        since: query.since,
        until: query.until.min(now),
    };
    let mut all = Sorted::of(deployments.into_iter().map(Arc::as_ref), query);
    let good = GoodVersions::of(&all);
    for item in &all.items {
        if let Some((_, place)) = item.place.and_then(|place| all.places.get_mut(place)) {
            place.count(item, query, window, &good, now);
        }
    }
    all.places.sort_unstable_by_key(|(name, _)| *name);
    let forgotten = (all.oldest).filter(|d| d.id > DeploymentId(1) && d.accepted_at > window.since);
    DoraReport {
        since: window.since,
        until: window.until,
        include_rollbacks: query.include_rollbacks,
        failure_window_micros: micros(query.failure_window),
        forgotten_before: forgotten.map(|d| d.accepted_at),
        places: (all.places.into_iter())
            .map(|((pipeline, environment), place)| {
                place.metrics(pipeline.clone(), environment.clone(), window)
            })
            .collect(),
    }
}

/// The changes that this deployment is the first to carry in its environment, newest first.
#[must_use]
pub fn first_carried<'a>(
    deployments: impl IntoIterator<Item = &'a Arc<Deployment>>,
    of: &Deployment,
) -> Vec<CarriedChange> {
    let same = deployments.into_iter().map(Arc::as_ref).filter(|d| {
        d.pipeline == of.pipeline && d.environment == of.environment && became_live(d).is_some()
    });
    let same: Vec<&Deployment> = same.collect();
    let mut seen = HashSet::default();
    for deployment in in_order(&same) {
        let Some(live) = became_live(deployment) else {
            continue;
        };
        let new = changes(deployment).filter(|change| seen.insert((change.kind, change.revision)));
        if deployment.id != of.id {
            new.for_each(drop);
            continue;
        }
        let carried = new.take(MAX_COMMITS).map(|change| CarriedChange {
            revision: change.revision.to_owned(),
            committed_at: change.committed_at,
            lead_micros: micros(live.since(change.committed_at)),
        });
        return carried.collect();
    }
    Vec::new()
}

/// A half-open span of time.
#[derive(Clone, Copy)]
struct Window {
    since: Timestamp,
    until: Timestamp,
}

impl Window {
    fn holds(self, at: Timestamp) -> bool {
        self.since <= at && at < self.until
    }

    const fn micros(self) -> u64 {
        self.until.0.saturating_sub(self.since.0)
    }
}

fn micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}

/// In the order in which they were live or given up; what is under way comes last.
fn in_order<'a>(deployments: &[&'a Deployment]) -> Vec<&'a Deployment> {
    let mut sorted = deployments.to_vec();
    // Records are nearly in this order: a sort that finds runs has little to do.
    sorted.sort_by_key(|d| (d.finished_at.is_none(), d.finished_at, d.id));
    sorted
}

fn became_live(deployment: &Deployment) -> Option<Timestamp> {
    deployment
        .finished_at
        .filter(|_| deployment.outcome == DeploymentOutcome::Live)
}

/// When the failure began, if it counts as failed: it was aborted after it had answered for someone;
/// or it was rolled back within its failure window; or it failed within it in another way.
fn failure_of(deployment: &Deployment, window: Duration) -> Option<Timestamp> {
    let finished = deployment.finished_at?;
    let failure = deployment.failure.as_ref();
    match deployment.outcome {
        DeploymentOutcome::Aborted => Some(failure.map_or(deployment.started_at, |f| f.began_at)),
        DeploymentOutcome::Live => failure
            .filter(|f| {
                // Since when a rollback was needed nobody says; when it was done is known.
                let happened = match f.cause {
                    FailureCause::Rollback => f.noted_at,
                    _ => f.began_at,
                };
                happened.since(finished) <= window
            })
            .map(|f| f.began_at),
        DeploymentOutcome::InProgress
        | DeploymentOutcome::CaughtBeforeExposure
        | DeploymentOutcome::Superseded => None,
    }
}

/// A change that a deployment brings.
#[derive(Clone, Copy)]
struct Brought<'a> {
    kind: ChangeKind,
    revision: &'a str,
    committed_at: Timestamp,
}

/// What a deployment brings: the revision that its run was started for, and the commits before it.
fn changes(deployment: &Deployment) -> impl Iterator<Item = Brought<'_>> {
    deployment.change.iter().flat_map(|change| {
        let brought = |revision, committed_at| Brought {
            kind: change.kind,
            revision,
            committed_at,
        };
        // Mostly the newest commit is the revision itself.
        let first = change.commits.first();
        let is_there = first.is_some_and(|commit| commit.revision == change.revision);
        let head = brought(change.revision.as_str(), change.committed_at);
        let commits = change.commits.iter();
        let commits = commits.map(move |c| brought(c.revision.as_str(), c.committed_at));
        (!is_there).then_some(head).into_iter().chain(commits)
    })
}

/// A deployment, with what is asked of it again and again: side by side in memory, since there may be
/// very many.
struct Item<'a> {
    deployment: &'a Deployment,
    id: DeploymentId,
    finished: Option<Timestamp>,
    /// When its failure began, if it counts as failed.
    failed: Option<Timestamp>,
    /// Which pipeline and environment it belongs to, if these were asked for.
    place: Option<usize>,
    /// Which environment and model.
    target: usize,
}

/// All deployments, in the order in which they were live or given up; what is under way comes last.
struct Sorted<'a> {
    items: Vec<Item<'a>>,
    places: Vec<((&'a PipelineName, &'a EnvironmentName), Place<'a>)>,
    targets: usize,
    oldest: Option<&'a Deployment>,
}

impl<'a> Sorted<'a> {
    fn of(deployments: impl Iterator<Item = &'a Deployment>, query: &DoraQuery) -> Self {
        let mut places: HashMap<(&PipelineName, &EnvironmentName), usize> = HashMap::new();
        let mut targets: HashMap<(&EnvironmentName, &ModelName), usize> = HashMap::new();
        let mut sizes: Vec<(usize, usize)> = Vec::new();
        let mut oldest: Option<&Deployment> = None;
        let mut items = Vec::with_capacity(deployments.size_hint().0);
        for deployment in deployments {
            if oldest.is_none_or(|oldest| deployment.id < oldest.id) {
                oldest = Some(deployment);
            }
            let (pipeline, environment) = (&deployment.pipeline, &deployment.environment);
            let fits = query.pipeline.as_ref().is_none_or(|p| pipeline == p)
                && query.environment.as_ref().is_none_or(|e| environment == e);
            let place = fits.then(|| {
                let next = places.len();
                let place = *places.entry((pipeline, environment)).or_insert(next);
                if place == sizes.len() {
                    sizes.push((0, 0));
                }
                sizes[place].0 += deployment
                    .change
                    .as_ref()
                    .map_or(0, |c| c.commits.len() + 1);
                sizes[place].1 += deployment.data.len();
                place
            });
            let next = targets.len();
            let target = *targets
                .entry((environment, &deployment.model))
                .or_insert(next);
            items.push(Item {
                deployment,
                id: deployment.id,
                finished: deployment.finished_at,
                failed: failure_of(deployment, query.failure_window),
                place,
                target,
            });
        }
        // Records are nearly in this order: a sort that finds runs has little to do.
        items.sort_by_key(|item| (item.finished.is_none(), item.finished, item.id));
        let mut places: Vec<_> = places.into_iter().collect();
        places.sort_unstable_by_key(|(_, number)| *number);
        Self {
            items,
            places: (places.into_iter())
                .map(|(name, number)| (name, Place::with_room(sizes[number])))
                .collect(),
            targets: targets.len(),
            oldest,
        }
    }
}

/// When good versions became live, for each environment and model in which one has failed.
struct GoodVersions(Vec<Option<Vec<(Timestamp, DeploymentId)>>>);

impl GoodVersions {
    /// Of all pipelines: whoever brings a good version repairs.
    fn of(all: &Sorted<'_>) -> Self {
        let mut good: Vec<Option<Vec<_>>> = vec![None; all.targets];
        for item in all.items.iter().filter(|item| item.failed.is_some()) {
            if item.deployment.outcome == DeploymentOutcome::Live {
                good[item.target].get_or_insert_default();
            }
        }
        for item in all.items.iter().filter(|item| item.failed.is_none()) {
            if let Some(good) = &mut good[item.target]
                && let Some(live) = became_live(item.deployment)
            {
                // They come in this order.
                good.push((live, item.id));
            }
        }
        Self(good)
    }

    /// When the failure of this deployment was over, if it is.
    fn recovered(&self, failed: &Item<'_>) -> Option<Timestamp> {
        let finished = failed.finished?;
        let deployment = failed.deployment;
        let resolved = deployment.failure.as_ref().and_then(|f| f.resolved_at);
        let next = if deployment.outcome == DeploymentOutcome::Aborted {
            // What was live before answers for all again.
            Some(finished)
        } else {
            let good = self.0[failed.target].as_ref()?;
            let next = good.partition_point(|good| *good <= (finished, failed.id));
            good.get(next).map(|(live, _)| *live)
        };
        match (next, resolved) {
            (Some(next), Some(resolved)) => Some(next.min(resolved)),
            (next, resolved) => next.or(resolved),
        }
    }
}

/// Spans of time, and from how many deployments they are.
#[derive(Default)]
struct Spans {
    micros: Vec<u64>,
    deployments: u64,
}

impl Spans {
    /// One from `from` to `to`; zero if clocks differ. Whether they do.
    fn add(&mut self, from: Timestamp, to: Timestamp) -> bool {
        self.micros.push(to.0.saturating_sub(from.0));
        to < from
    }

    /// `None` if there are none.
    fn times(mut self, level: fn(u64) -> Option<Level>) -> Option<Times> {
        let median_micros = median(&mut self.micros)?;
        let sorted = &self.micros;
        // The nearest rank: the smallest whole number that is not below 95 % of them.
        let rank = (sorted.len() * 95).div_ceil(100);
        Some(Times {
            count: sorted.len() as u64,
            deployments: self.deployments,
            median_micros,
            p95_micros: *sorted.get(rank.saturating_sub(1))?,
            bucket: quick_check::duration(median_micros),
            level: level(median_micros),
        })
    }
}

/// Sorts, and takes what is in the middle; of an even number the mean of two, rounded down.
fn median(spans: &mut [u64]) -> Option<u64> {
    spans.sort_unstable();
    let upper = *spans.get(spans.len() / 2)?;
    if spans.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = spans[spans.len() / 2 - 1];
    Some(lower + (upper - lower) / 2)
}

/// What is known of one pipeline in one environment.
#[derive(Default)]
struct Place<'a> {
    /// Changes and data that were live before.
    carried: HashSet<(ChangeKind, &'a str)>,
    arrived: HashSet<Digest>,
    counts: Counts,
    releases: u64,
    /// When something became live, in order.
    live: Vec<Timestamp>,
    leads: Spans,
    data_leads: Spans,
    recoveries: Spans,
}

impl<'a> Place<'a> {
    /// With room for so many changes and versions of data.
    fn with_room((changes, data): (usize, usize)) -> Self {
        Self {
            carried: HashSet::with_capacity_and_hasher(changes, RandomState::default()),
            arrived: HashSet::with_capacity_and_hasher(data, RandomState::default()),
            ..Self::default()
        }
    }

    /// Deployments have to come in the order of time.
    fn count(
        &mut self,
        item: &Item<'a>,
        query: &DoraQuery,
        window: Window,
        good: &GoodVersions,
        now: Timestamp,
    ) {
        let deployment = item.deployment;
        let Some(finished) = item.finished else {
            self.counts.in_progress += u64::from(window.holds(deployment.started_at));
            return;
        };
        let counted = window.holds(finished);
        if let Some(live) = became_live(deployment) {
            self.carry(deployment, live, counted);
        }
        if !counted {
            return;
        }
        match deployment.outcome {
            DeploymentOutcome::CaughtBeforeExposure => {
                self.counts.caught_before_exposure += 1;
                return;
            }
            // The newer one counts.
            DeploymentOutcome::Superseded => return,
            _ => {}
        }
        match deployment.kind {
            DeploymentKind::Rollback => self.counts.rollbacks += 1,
            DeploymentKind::Release => {
                self.releases += 1;
                self.counts.repairs += u64::from(deployment.repairs.is_some());
            }
        }
        if deployment.kind == DeploymentKind::Rollback && !query.include_rollbacks {
            return;
        }
        self.counts.deployments += 1;
        if deployment.outcome == DeploymentOutcome::Live {
            self.counts.successful += 1;
            self.live.push(finished);
        }
        match item.failed {
            Some(began) => self.fail(item, began, good),
            None if now < finished.after(query.failure_window) => self.counts.unsettled += 1,
            None => {}
        }
    }

    /// Notes what it is the first to carry, even if only others are `counted`.
    fn carry(&mut self, deployment: &'a Deployment, live: Timestamp, counted: bool) {
        let mut first = false;
        for change in changes(deployment) {
            if self.carried.insert((change.kind, change.revision)) && counted {
                first = true;
                self.counts.skewed += u64::from(self.leads.add(change.committed_at, live));
            }
        }
        self.leads.deployments += u64::from(first);
        if counted && let Some(change) = &deployment.change {
            self.counts.changes_left_out += u64::from(change.left_out);
        }
        let mut first = false;
        for data in &deployment.data {
            if self.arrived.insert(data.revision) && counted {
                first = true;
                self.counts.skewed += u64::from(self.data_leads.add(data.arrived_at, live));
            }
        }
        self.data_leads.deployments += u64::from(first);
    }

    fn fail(&mut self, item: &Item<'_>, began: Timestamp, good: &GoodVersions) {
        self.counts.failed += 1;
        let cause = item
            .deployment
            .failure
            .as_ref()
            .map(|failure| failure.cause);
        self.counts.found_by_time += u64::from(cause == Some(FailureCause::Incident));
        match good.recovered(item) {
            Some(recovered) => {
                self.counts.skewed += u64::from(self.recoveries.add(began, recovered));
                self.recoveries.deployments += 1;
            }
            None => self.counts.not_recovered += 1,
        }
    }

    fn metrics(
        self,
        pipeline: PipelineName,
        environment: EnvironmentName,
        window: Window,
    ) -> PlaceMetrics {
        let counts = self.counts;
        let reworked = counts.repairs + counts.rollbacks;
        let fail_rate = rate(counts.failed, counts.deployments);
        PlaceMetrics {
            pipeline,
            environment,
            counts,
            deployment_frequency: (counts.deployments > 0).then(|| frequency(&self.live, window)),
            change_lead_time: self.leads.times(quick_check::lead_time_level),
            // The published levels are of changes to code.
            data_lead_time: self.data_leads.times(|_| None),
            change_fail_rate: fail_rate.map(|rate| Rate {
                level: quick_check::fail_rate_level(rate.part, rate.whole),
                ..rate
            }),
            recovery_time: self.recoveries.times(quick_check::recovery_level),
            rework_rate: rate(reworked, self.releases + counts.rollbacks),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "far fewer than 2^53")]
fn rate(part: u64, whole: u64) -> Option<Rate> {
    (whole > 0).then(|| Rate {
        part,
        whole,
        ratio: part as f64 / whole as f64,
        level: None,
    })
}

#[allow(clippy::cast_precision_loss, reason = "far fewer than 2^53")]
fn frequency(live: &[Timestamp], window: Window) -> Frequency {
    let mut between: Vec<u64> = live.windows(2).map(|two| two[1].0 - two[0].0).collect();
    let successful = live.len() as u64;
    let bucket = quick_check::frequency(successful, window.micros());
    Frequency {
        successful,
        window_micros: window.micros(),
        per_day: successful as f64 * quick_check::DAY as f64 / window.micros() as f64,
        median_between_micros: median(&mut between),
        bucket,
        level: bucket.and_then(quick_check::frequency_level),
    }
}
