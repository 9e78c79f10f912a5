//! One server for everything, with limits on whatever a peer could make large.

use std::{sync::Arc, time::Duration};

use emberline_common::tls::Tls;
use emberline_proto::v1::{
    artifact_service_server::ArtifactServiceServer, cluster_service_server::ClusterServiceServer,
    deployment_service_server::DeploymentServiceServer, dora_service_server::DoraServiceServer,
    model_service_server::ModelServiceServer, run_service_server::RunServiceServer,
    token_service_server::TokenServiceServer, worker_service_server::WorkerServiceServer,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::server::Server};

use super::{
    Context, artifacts::Artifacts, cluster::Cluster, connections, deployments::Deployments,
    dora::Dora, models::Models, role::Role, runs::Runs, tokens::Tokens, workers::Workers,
};
use crate::CoordinatorError;

/// The largest message taken from a peer.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// The largest header list taken from a peer.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Streams of one connection at once.
const MAX_STREAMS: u32 = 256;
/// Flow control windows: room for artifacts to flow, and no more than that in memory.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// A connection that says nothing is asked, and closed when it does not answer.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// How long open calls may go on after the stop.
const GRACE: Duration = Duration::from_millis(500);

/// The services of one term.
pub(crate) fn routes(context: &Arc<Context>) -> Routes {
    let shared = || Arc::clone(context);
    let mut routes = Routes::builder();
    routes
        .add_service(
            RunServiceServer::new(Runs(shared())).max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            WorkerServiceServer::new(Workers(shared()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            ModelServiceServer::new(Models(shared())).max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            ArtifactServiceServer::new(Artifacts(shared()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            ClusterServiceServer::new(Cluster(shared()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        );
    routes
        .add_service(
            DeploymentServiceServer::new(Deployments(shared()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            DoraServiceServer::new(Dora(shared())).max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(
            TokenServiceServer::new(Tokens(shared())).max_decoding_message_size(MAX_MESSAGE_BYTES),
        );
    routes.routes().prepare()
}

/// Serves until the coordinator stops.
pub(crate) async fn serve(
    role: Role,
    listener: TcpListener,
    tls: Option<Tls>,
    stop: CancellationToken,
) -> Result<(), CoordinatorError> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| CoordinatorError::Serve {
        source: Arc::from(e),
    };
    let close = CancellationToken::new();
    let hang_up = {
        let (stop, close) = (stop.clone(), close.clone());
        async move {
            stop.cancelled().await;
            tokio::time::sleep(GRACE).await;
            close.cancel();
            // The server ends now that its connections do.
            std::future::pending().await
        }
    };
    let stopped = {
        let role = role.clone();
        async move {
            stop.cancelled().await;
            role.stop().await;
        }
    };
    let server = Server::builder()
        // Prometheus asks for `/metrics` so.
        .accept_http1(true)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(64))
        .serve_with_incoming_shutdown(role, connections::accept(listener, tls, close), stopped);
    tokio::select! {
        ended = server => ended.map_err(|e| failed(e.into())),
        () = hang_up => Ok(()),
    }
}
