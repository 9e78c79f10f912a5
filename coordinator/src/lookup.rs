//! Finds runs: live ones in the engine, ended ones in the archive; by id or by its beginning.

use std::sync::Arc;

use emberline_common::{
    delivery::Deployment,
    ids::{Digest, InvalidId, RunId},
    run_view::{RunSummary, RunView},
};
use thiserror::Error;

use crate::{
    archive::{Archive, ArchiveError},
    engine::{Engine, api::ArchivedRun},
    runtime::{Runtime, RuntimeError},
};

/// Why a run was not found.
#[derive(Debug, Error)]
pub enum LookupError {
    /// No run's id begins so.
    #[error("there is no run `{0}`")]
    NoSuchRun(String),
    /// Several do.
    #[error("`{text}` is the beginning of {number} runs' ids, e.g. {first} and {second}")]
    Ambiguous {
        /// What was asked for.
        text: String,
        /// How many.
        number: usize,
        /// One of them.
        first: RunId,
        /// Another.
        second: RunId,
    },
    /// It can be no run's id.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// The runtime's answer.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The run's record cannot be read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// Where a run is.
#[derive(Debug, Clone)]
pub enum Place {
    /// In the state; it may have ended without being archived yet.
    Live(RunId),
    /// In the archive.
    Ended(RunId, Digest),
}

/// Finds runs. Cheap to clone.
#[derive(Clone)]
pub struct Lookup {
    runtime: Runtime,
    archive: Archive,
}

impl Lookup {
    /// Over these.
    #[must_use]
    pub fn new(runtime: Runtime, archive: Archive) -> Self {
        Self { runtime, archive }
    }

    /// Where the run is whose id this is, or whose id alone begins so.
    ///
    /// # Errors
    /// [`LookupError`].
    pub async fn place(&self, text: &str) -> Result<Place, LookupError> {
        // An id's beginning follows the same rule as an id.
        let wanted = RunId::new(text)?;
        let found = self
            .runtime
            .read(move |engine| find(engine, &wanted))
            .await?;
        match found.as_slice() {
            [] => Err(LookupError::NoSuchRun(text.to_owned())),
            [place] => Ok(place.clone()),
            [first, second, ..] => Err(LookupError::Ambiguous {
                text: text.to_owned(),
                number: found.len(),
                first: first.run().clone(),
                second: second.run().clone(),
            }),
        }
    }

    /// The run as it is now, or as it ended.
    ///
    /// # Errors
    /// [`LookupError`].
    pub async fn view(&self, text: &str) -> Result<RunView, LookupError> {
        loop {
            match self.place(text).await? {
                Place::Live(run) => {
                    let view = self
                        .runtime
                        .read(move |engine| engine.run_view(&run))
                        .await?;
                    // It may have moved into the archive in between.
                    if let Some(view) = view {
                        return Ok(view);
                    }
                }
                Place::Ended(_, digest) => {
                    return Ok(self.archive.load(digest).await?.view.clone());
                }
            }
        }
    }

    /// The record of an ended run; `None` while the run is live.
    ///
    /// # Errors
    /// [`LookupError`].
    pub async fn archived(&self, text: &str) -> Result<Option<Arc<ArchivedRun>>, LookupError> {
        match self.place(text).await? {
            Place::Live(_) => Ok(None),
            Place::Ended(_, digest) => Ok(Some(self.archive.load(digest).await?)),
        }
    }

    /// All deployments that are remembered, in the order of their ids.
    ///
    /// # Errors
    /// [`RuntimeError::Busy`], [`RuntimeError::Stopped`].
    pub async fn deployments(&self) -> Result<Vec<Arc<Deployment>>, RuntimeError> {
        let all = |engine: &Engine| engine.deployments().cloned().collect();
        self.runtime.read(all).await
    }

    /// One page of runs, newest first: those behind `after` that `keep` accepts. Says whether there
    /// are more.
    ///
    /// # Errors
    /// [`LookupError::Runtime`].
    pub async fn page(
        &self,
        after: Option<RunId>,
        size: usize,
        keep: impl Fn(&RunSummary) -> bool + Send + 'static,
    ) -> Result<(Vec<RunSummary>, bool), LookupError> {
        let page = self.runtime.read(move |engine| {
            let wanted =
                |run: &RunSummary| after.as_ref().is_none_or(|a| run.run < *a) && keep(run);
            // Ids sort by time. Only what is on the page is copied: the engine waits meanwhile.
            let mut live: Vec<RunSummary> = engine.live_runs().filter(|r| wanted(r)).collect();
            live.sort_by(|a, b| b.run.cmp(&a.run));
            live.truncate(size + 1);
            let ended = engine.ended_runs().map(|e| &e.summary);
            let mut ended: Vec<&RunSummary> = ended.filter(|r| wanted(r)).collect();
            ended.sort_by(|a, b| b.run.cmp(&a.run));
            let mut runs = live;
            runs.extend(ended.into_iter().take(size + 1).cloned());
            runs.sort_by(|a, b| b.run.cmp(&a.run));
            runs.dedup_by(|a, b| a.run == b.run);
            let more = runs.len() > size;
            runs.truncate(size);
            (runs, more)
        });
        Ok(page.await?)
    }
}

impl Place {
    /// The run's id.
    #[must_use]
    pub fn run(&self) -> &RunId {
        match self {
            Self::Live(run) | Self::Ended(run, _) => run,
        }
    }
}

fn find(engine: &Engine, wanted: &RunId) -> Vec<Place> {
    if engine.run_summary(wanted).is_some() {
        return vec![Place::Live(wanted.clone())];
    }
    let mut places: Vec<Place> = Vec::new();
    if let Some(ended) = engine.ended_run(wanted) {
        return vec![Place::Ended(wanted.clone(), ended.archive)];
    }
    for ended in engine.ended_runs() {
        if ended.summary.run.as_str().starts_with(wanted.as_str()) {
            places.push(Place::Ended(ended.summary.run.clone(), ended.archive));
        }
    }
    for run in engine.live_runs() {
        if run.run.as_str().starts_with(wanted.as_str()) {
            places.retain(|p| *p.run() != run.run);
            places.push(Place::Live(run.run));
        }
    }
    places
}
