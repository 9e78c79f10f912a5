//! The load: clients that submit runs, wait for their end, and note what they were told.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use emberline_proto::v1::{
    GetRunRequest, RunState, SubmitRunRequest, run_service_client::RunServiceClient,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Random;
use crate::{exit::Exit, leader_channel::LeaderChannel, security::Security};

/// How long one call goes on while nobody leads.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a client was told of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// That it was accepted.
    Accepted,
    /// That it succeeded.
    Succeeded,
    /// That it failed or was cancelled, which no run of the load does by itself.
    Failed,
}

/// See the module.
pub(super) struct Load {
    channel: LeaderChannel,
    /// Where commands write that they have begun, a file for each attempt.
    journal: PathBuf,
    seed: u64,
    submitted: AtomicU64,
    told: Mutex<BTreeMap<String, Told>>,
}

impl Load {
    pub(super) fn new(server: &str, seed: u64, journal: PathBuf) -> anyhow::Result<Self> {
        let known = server.split(',').map(str::to_owned).collect();
        let channel =
            LeaderChannel::new(known, PATIENCE, &Security::default()).map_err(Exit::input)?;
        Ok(Self {
            channel,
            journal,
            seed,
            submitted: AtomicU64::new(0),
            told: Mutex::default(),
        })
    }

    /// Every run that was accepted.
    pub(super) fn told(&self) -> BTreeMap<String, Told> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.clone()
    }

    /// That many clients submit until `stop`, and then wait for the ends of their runs.
    pub(super) async fn run(self: Arc<Self>, clients: usize, stop: CancellationToken) {
        let all = (0..clients).map(|number| self.client(number, &stop));
        futures::future::join_all(all).await;
    }

    async fn client(&self, number: usize, stop: &CancellationToken) {
        let mut random = Random::new(self.seed ^ (number as u64 + 1).wrapping_mul(0x51_7c_c1_b7));
        while !stop.is_cancelled() {
            let count = self.submitted.fetch_add(1, Ordering::Relaxed);
            let request = SubmitRunRequest {
                pipeline_yaml: pipeline(&mut random, &self.journal),
                file_name: "chaos.yaml".to_owned(),
                base_dir: "/".to_owned(),
                request_id: format!("chaos-{:x}-{count}", self.seed),
                trigger: "manual".to_owned(),
                ..Default::default()
            };
            let Some(run) = self.submit(request).await else {
                return;
            };
            self.note(&run, Told::Accepted);
            let end = self.end(&run).await;
            self.note(&run, end);
        }
    }

    fn note(&self, run: &str, told: Told) {
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(run.to_owned(), told);
    }

    /// Until it is accepted: the request id makes it one run, however often it is sent.
    async fn submit(&self, request: SubmitRunRequest) -> Option<String> {
        loop {
            let mut client = RunServiceClient::new(self.channel.clone());
            match client.submit_run(request.clone()).await {
                Ok(answer) => return Some(answer.into_inner().run),
                Err(e) if e.code() == tonic::Code::InvalidArgument => {
                    tracing::error!(error = %e, "the load's own pipeline is refused");
                    return None;
                }
                Err(e) => {
                    tracing::debug!(error = %e, "not accepted");
                    sleep(LOOK_AGAIN).await;
                }
            }
        }
    }

    async fn end(&self, run: &str) -> Told {
        loop {
            let request = GetRunRequest {
                run: run.to_owned(),
            };
            let mut client = RunServiceClient::new(self.channel.clone());
            match client.get_run(request).await {
                Ok(answer) => match answer.into_inner().summary.unwrap_or_default().state() {
                    RunState::Succeeded => return Told::Succeeded,
                    RunState::Failed | RunState::Cancelled => return Told::Failed,
                    _ => {}
                },
                Err(e) => tracing::debug!(error = %e, "not known"),
            }
            sleep(LOOK_AGAIN).await;
        }
    }
}

/// One of three shapes: a chain, a fan, commands that take a while. Lost workers may hit one task often.
fn pipeline(random: &mut Random, journal: &Path) -> String {
    let retries = "retries: { lost_workers: 100, faults: 100 }";
    match random.below(3) {
        0 => {
            let stages = (0..5).map(|n| match n {
                0 => format!("  t0: {{ kind: noop, {retries} }}\n"),
                n => format!("  t{n}: {{ kind: noop, needs: [t{}], {retries} }}\n", n - 1),
            });
            format!("pipeline: chain\nstages:\n{}", stages.collect::<String>())
        }
        1 => format!(
            "pipeline: fan\nstages:\n  many: {{ kind: noop, {retries}, matrix: {{ n: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] }} }}\n  last: {{ kind: noop, needs: [many], {retries} }}\n"
        ),
        _ => {
            let tenths = 5 + random.below(30);
            let begun = journal.join("$EMBERLINE_RUN.$EMBERLINE_TASK.$EMBERLINE_ATTEMPT");
            let script = format!(
                "echo begun >> \"{}\"; exec sleep {}.{}",
                begun.display(),
                tenths / 10,
                tenths % 10
            );
            let script = serde_json::Value::from(script);
            format!(
                "pipeline: commands\nstages:\n  long: {{ kind: exec, with: {{ command: [sh, -c, {script}] }}, {retries} }}\n  after: {{ kind: noop, needs: [long], {retries} }}\n"
            )
        }
    }
}
