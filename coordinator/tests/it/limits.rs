//! What a peer may not do, and what any client can ask.

use emberline_proto::v1::{GetRunRequest, ListRunsRequest, SubmitRunRequest};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::harness::*;

#[tokio::test]
async fn an_oversize_message_is_refused_and_the_process_lives() {
    let cluster = Cluster::start().await;
    let huge = SubmitRunRequest {
        pipeline_yaml: "x".repeat(5 << 20),
        ..Default::default()
    };
    let refused = cluster.runs().await.submit_run(huge).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let listed = cluster
        .runs()
        .await
        .list_runs(ListRunsRequest::default())
        .await;
    assert!(listed.is_ok());
}

#[tokio::test]
async fn an_oversize_header_list_is_refused_and_the_process_lives() {
    let cluster = Cluster::start().await;
    let mut request = tonic::Request::new(GetRunRequest::default());
    let value = "x".repeat(64 << 10).parse().unwrap();
    request.metadata_mut().insert("x-large", value);
    assert!(cluster.runs().await.get_run(request).await.is_err());
    let listed = cluster
        .runs()
        .await
        .list_runs(ListRunsRequest::default())
        .await;
    assert!(listed.is_ok());
}

#[tokio::test]
async fn health_says_serving_while_it_leads() {
    let cluster = Cluster::start().await;
    let mut health = HealthClient::new(cluster.channel().await);
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let answer = health.check(request.clone()).await.unwrap().into_inner();
    assert_eq!(answer.status, 1);
    let mut states = health.watch(request).await.unwrap().into_inner();
    assert_eq!(
        soon("the state", states.message())
            .await
            .unwrap()
            .unwrap()
            .status,
        1
    );
    let (_dir, ended) = cluster.stop().await;
    ended.unwrap();
    // Either the farewell was heard, or the connection is gone.
    if let Ok(Some(state)) = soon("the farewell", states.message()).await {
        assert_eq!(state.status, 2);
    }
}

#[tokio::test]
async fn reflection_lists_every_service() {
    let cluster = Cluster::start().await;
    let mut client = ServerReflectionClient::new(cluster.channel().await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = client
        .server_reflection_info(tokio_stream::iter([request]))
        .await;
    let answer = answers
        .unwrap()
        .into_inner()
        .message()
        .await
        .unwrap()
        .unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
    for service in [
        "RunService",
        "WorkerService",
        "ModelService",
        "ArtifactService",
        "ClusterService",
    ] {
        assert!(
            names.contains(&format!("emberline.v1.{service}")),
            "{names:?}"
        );
    }
    assert!(
        names.contains(&"grpc.health.v1.Health".to_owned()),
        "{names:?}"
    );
}

#[tokio::test]
async fn a_full_queue_is_told_with_a_hint_when_to_try_again() {
    use tonic_types::StatusExt as _;
    let cluster = Cluster::with(emberline_coordinator::engine::api::EngineConfig {
        max_live_runs: 2,
        ..Default::default()
    })
    .await;
    cluster.submit(ONE).await;
    cluster.submit(ONE).await;
    let refused = cluster.runs().await.submit_run(submission(ONE)).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    let hint = refused.get_details_retry_info().unwrap().retry_delay;
    assert!(hint.is_some_and(|d| !d.is_zero()));
}
