//! Messages of the protocol: decoded, and translated where something is to be made of them.

use emberline_common::{
    dora::DoraReport,
    run_view::RunSummary,
    serving::{ServingOffer, ServingPlan, ServingStatus},
    wire,
};
use emberline_proto::v1 as pb;
use prost::Message;

/// Decodes a message; what can be decoded can be written down and read again.
fn decoded<T: Message + Default>(data: &[u8]) -> Option<T> {
    let message = T::decode(data).ok()?;
    assert!(T::decode(message.encode_to_vec().as_slice()).is_ok());
    Some(message)
}

macro_rules! requests {
    ($($name:ident,)*) => {
        /// Every request of a client. The corpus knows them by their place: a new one comes last.
        const REQUESTS: &[(&str, fn(&[u8]))] = &[
            $((stringify!($name), |data| {
                let _ = decoded::<pb::$name>(data);
            }),)*
        ];
    };
}

requests! {
    AnnotateVersionRequest,
    ApproveDeploymentRequest,
    CancelRunRequest,
    CollectGarbageRequest,
    DeleteVersionRequest,
    DrainWorkerRequest,
    ExplainDeploymentRequest,
    GetArtifactRequest,
    GetClusterStatusRequest,
    GetDeploymentRequest,
    GetMetricsRequest,
    GetModelRequest,
    GetModelVersionRequest,
    GetRunRequest,
    ImportVersionRequest,
    ListDeploymentsRequest,
    ListEnvironmentsRequest,
    ListModelsRequest,
    ListRunsRequest,
    MarkDeploymentFailedRequest,
    PlanRunRequest,
    PutBlobRequest,
    ReadBlobRequest,
    RemoveAliasRequest,
    RetryRunRequest,
    RollBackRequest,
    SetAliasRequest,
    StreamLogsRequest,
    SubmitFeedbackRequest,
    SubmitRunRequest,
    TakeEventRequest,
    ValidatePipelineRequest,
    WatchDeploymentRequest,
    WatchRunRequest,
    CreateTokenRequest,
    ListTokensRequest,
    RevokeTokenRequest,
}

/// The first byte says which request the rest is; the last ones are parts of requests.
pub fn request(data: &[u8]) {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    let which = usize::from(*which);
    if let Some((_, decode)) = REQUESTS.get(which) {
        decode(data);
        return;
    }
    match 255 - which {
        0 => drop(decoded::<pb::Change>(data).map(wire::change)),
        1 => drop(decoded::<pb::ServingPlan>(data).map(ServingPlan::try_from)),
        2 => drop(decoded::<pb::ServingOffer>(data).map(ServingOffer::try_from)),
        3 => drop(decoded::<pb::ServingStatus>(data).map(ServingStatus::try_from)),
        4 => drop(decoded::<pb::RunSummary>(data).map(RunSummary::try_from)),
        5 => drop(decoded::<pb::DoraReport>(data).map(DoraReport::try_from)),
        _ => {}
    }
}

/// What a worker and a leader say to each other; the first byte says who speaks.
pub fn session(data: &[u8]) {
    let Some((who, data)) = data.split_first() else {
        return;
    };
    if who % 2 == 0 {
        if let Some(message) = decoded::<pb::WorkerMessage>(data) {
            let _ = emberline_coordinator::fuzzing::worker_message(message);
        }
    } else if let Some(message) = decoded::<pb::LeaderMessage>(data) {
        let _ = emberline_worker::fuzzing::leader_message(message);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A new call is fed, too.
    #[test]
    fn every_request_of_the_protocol_is_among_them() {
        let root = std::env::var("CARGO_MANIFEST_DIR").unwrap();
        let files = std::fs::read_dir(root + "/../../proto/emberline/v1").unwrap();
        let mut missing = Vec::new();
        for file in files.flatten() {
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            let names = text
                .lines()
                .filter_map(|line| line.strip_prefix("message "));
            let names = names.filter_map(|rest| rest.split(' ').next());
            for name in names.filter(|name| name.ends_with("Request")) {
                if !REQUESTS.iter().any(|(known, _)| *known == name) {
                    missing.push(name.to_owned());
                }
            }
        }
        assert_eq!(missing, Vec::<String>::new());
    }
}
