//! How the cluster is.

use std::sync::Arc;

use emberline_common::wire;
use emberline_proto::v1::{
    CoordinatorView, DrainWorkerRequest, DrainWorkerResponse, GetClusterStatusRequest,
    GetClusterStatusResponse, WorkerState, WorkerView, cluster_service_server::ClusterService,
};
use tonic::{Request, Response, Status};

use super::{Context, access::Subject, in_time, status};
use crate::engine::api::{Command, Outcome, WorkerStatus};

pub(crate) struct Cluster(pub(crate) Arc<Context>);

fn worker(worker: WorkerStatus) -> WorkerView {
    let state = if worker.suspect_since.is_some() {
        WorkerState::Suspect
    } else if worker.draining {
        WorkerState::Draining
    } else {
        WorkerState::Connected
    };
    WorkerView {
        worker: worker.worker.to_string(),
        state: state.into(),
        total: Some(worker.total.into()),
        free: Some(worker.free.into()),
        labels: worker.labels.into_iter().collect(),
        kinds: worker.kinds.iter().map(ToString::to_string).collect(),
        running: u32::try_from(worker.running).unwrap_or(u32::MAX),
        version: worker.version,
    }
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    async fn drain_worker(
        &self,
        request: Request<DrainWorkerRequest>,
    ) -> Result<Response<DrainWorkerResponse>, Status> {
        Subject::of(&request).is(request.get_ref().worker.as_str());
        let worker = wire::id("worker", &request.into_inner().worker);
        let worker = worker.map_err(|e| status::bad_wire(&e))?;
        in_time("the answer", async {
            let told = self.0.runtime.command(Command::DrainWorker { worker });
            let running = match told.await.map_err(status::from_runtime)? {
                Outcome::Draining { running } => running,
                _ => 0,
            };
            Ok(DrainWorkerResponse {
                running: u32::try_from(running).unwrap_or(u32::MAX),
            })
        })
        .await
    }

    async fn get_cluster_status(
        &self,
        _request: Request<GetClusterStatusRequest>,
    ) -> Result<Response<GetClusterStatusResponse>, Status> {
        in_time("the answer", async {
            let runtime = &self.0.runtime;
            let seen = runtime.read(|engine| (engine.workers(), engine.queue_stats()));
            let (workers, queue) = seen.await.map_err(status::from_runtime)?;
            let counts = runtime.counts();
            let there = self.0.store.coordinators().await;
            let there = there.unwrap_or_else(|error| {
                tracing::debug!(%error, "the other coordinators are not known");
                Vec::new()
            });
            let coordinators = there.into_iter().map(|there| CoordinatorView {
                leads: there.address == self.0.address,
                name: there.name,
                address: there.address,
            });
            Ok(GetClusterStatusResponse {
                leader: self.0.address.clone(),
                epoch: runtime.epoch().0,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                leader_since: Some(self.0.leader_since.into()),
                workers: workers.into_iter().map(worker).collect(),
                live_runs: u32::try_from(queue.live_runs).unwrap_or(u32::MAX),
                queued_tasks: queue.queued_tasks as u64,
                running_attempts: queue.running_attempts as u64,
                commits: counts.commits,
                records: counts.records,
                coordinators: coordinators.collect(),
            })
        })
        .await
    }
}
