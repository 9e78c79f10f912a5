//! A cluster that stays up: `emberline dev`, and clients of its API.

use std::{fs, path::Path};

use emberline_proto::v1::{
    artifact_service_client::ArtifactServiceClient, cluster_service_client::ClusterServiceClient,
    model_service_client::ModelServiceClient, run_service_client::RunServiceClient,
};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use crate::{Output, Place, Running, seconds, wait_for};

/// A running `emberline dev`.
pub struct Dev {
    process: Running,
    /// `host:port`.
    pub address: String,
}

/// The address in a state directory's `cluster.json`, if that process serves.
#[must_use]
pub fn address_of(state: &Path, pid: Pid) -> Option<String> {
    let text = fs::read_to_string(state.join("cluster.json")).ok()?;
    let file: Value = serde_json::from_str(&text).ok()?;
    (file["pid"] == pid.as_raw_nonzero().get()).then(|| file["address"].as_str().unwrap().into())
}

impl Dev {
    /// Starts it on a free port and waits until it is ready.
    #[must_use]
    pub fn start(place: &Place) -> Self {
        Self::start_with(place, &[])
    }

    /// Like [`Dev::start`], with more arguments.
    #[must_use]
    pub fn start_with(place: &Place, more: &[&str]) -> Self {
        Self::start_in(place, more, &[])
    }

    /// Like [`Dev::start_with`], with more environment variables.
    #[must_use]
    pub fn start_in(place: &Place, more: &[&str], environment: &[(String, String)]) -> Self {
        let mut arguments = vec!["dev", "--listen", "127.0.0.1:0"];
        arguments.extend(more);
        let call = place.emberline(&arguments).envs(environment);
        let mut process = call.within(seconds(300)).start();
        let address = wait_for("the cluster is ready", seconds(30), || {
            assert!(!process.has_ended(), "{}", process.stderr());
            address_of(&place.state(), process.pid())
        });
        Self { process, address }
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Running {
        &self.process
    }

    /// Stops it as an operator would, and gives how it went.
    #[must_use]
    pub fn stop(self) -> Output {
        self.process.signal(Signal::TERM);
        self.process.finish()
    }

    /// Kills it as a power cut would.
    pub fn kill(self) {
        let _ = self.process.kill();
    }

    /// A connection.
    pub async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address))
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    /// Pipelines and runs.
    pub async fn runs(&self) -> RunServiceClient<Channel> {
        RunServiceClient::new(self.channel().await)
    }

    /// Artifacts.
    pub async fn artifacts(&self) -> ArtifactServiceClient<Channel> {
        ArtifactServiceClient::new(self.channel().await)
    }

    /// Models.
    pub async fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel().await)
    }

    /// The cluster itself.
    pub async fn cluster(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel().await)
    }
}
