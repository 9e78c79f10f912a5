//! The gRPC services. Handlers translate and delegate: the engine decides, the runtime orders.
//!
//! Wire types are turned into domain types here, and never go further in. Each service has a file;
//! [`status`] makes every error, [`serve`](server) sets the limits of a connection.

pub(crate) mod access;
pub(crate) mod artifacts;
pub(crate) mod cluster;
mod connections;
pub(crate) mod deployments;
pub(crate) mod dora;
mod http_pages;
mod imports;
mod logs;
pub(crate) mod models;
mod prompt;
pub(crate) mod role;
pub(crate) mod runs;
pub(crate) mod server;
pub mod status;
mod submit;
mod tokens;
mod translate;
mod while_known;
pub(crate) mod workers;

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use emberline_common::{
    artifact::ArtifactStore, telemetry::Telemetry, time::Timestamp, tls::Refusals,
};
use futures::Stream;
use tokio::sync::watch;
use tonic::Status;

use crate::{
    access::Gate,
    engine::api::AccessTable,
    gc::Collector,
    holds::Holds,
    lookup::Lookup,
    run_id::RunIds,
    runtime::{Runtime, clock::Clock},
    store::StateStore,
    tasks::Tasks,
};

/// How long an answer may take that is not a stream.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// A stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

/// What the services work with.
pub(crate) struct Context {
    pub(crate) runtime: Runtime,
    pub(crate) store: Arc<dyn StateStore>,
    pub(crate) lookup: Lookup,
    pub(crate) artifacts: ArtifactStore,
    pub(crate) holds: Holds,
    pub(crate) collector: Collector,
    pub(crate) tasks: Tasks,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) run_ids: RunIds,
    pub(crate) telemetry: Telemetry,
    /// What calls are checked by.
    pub(crate) access: watch::Receiver<Arc<AccessTable>>,
    pub(crate) gate: Gate,
    pub(crate) refusals: Refusals,
    /// The `source` of our own events.
    pub(crate) events_source: String,
    /// Where this leader serves.
    pub(crate) address: String,
    /// Where a trace can be looked at, with `{trace_id}`.
    pub(crate) trace_url: Option<String>,
    pub(crate) leader_since: Timestamp,
    pub(crate) heartbeat_interval: Duration,
    /// How long a session may be silent.
    pub(crate) worker_grace: Duration,
}

/// Ends a call that takes too long.
async fn in_time<T>(
    what: &str,
    call: impl Future<Output = Result<T, Status>> + Send,
) -> Result<tonic::Response<T>, Status> {
    tokio::time::timeout(ANSWER_WITHIN, call)
        .await
        .map_err(|_| status::timed_out(what))?
        .map(tonic::Response::new)
}
