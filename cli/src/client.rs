//! Finding a cluster: a named server, the embedded cluster of another process, or one of our own.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use emberline_proto::v1::{
    GetClusterStatusRequest, artifact_service_client::ArtifactServiceClient,
    cluster_service_client::ClusterServiceClient, model_service_client::ModelServiceClient,
    run_service_client::RunServiceClient,
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    args::ClusterArguments,
    embedded::{ClusterFile, EmbeddedCluster, StartError},
    exit::Exit,
};

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long another process may take from holding the state directory to serving.
const OTHER_STARTS_WITHIN: Duration = Duration::from_secs(10);

/// A connection to a cluster, and the cluster itself where it is ours.
pub struct Cluster {
    channel: Channel,
    embedded: Option<EmbeddedCluster>,
}

impl Cluster {
    /// Connects; starts an embedded cluster with that many workers where none is to be found.
    pub async fn connect(arguments: &ClusterArguments, workers: u32) -> anyhow::Result<Self> {
        if let Some(server) = &arguments.server {
            let channel = open(server).await?;
            return Ok(Self {
                channel,
                embedded: None,
            });
        }
        if let Some(channel) = other_process(arguments).await {
            return Ok(Self {
                channel,
                embedded: None,
            });
        }
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        match EmbeddedCluster::start(&arguments.state_dir, arguments.cache_size, listen, workers)
            .await
        {
            Ok(cluster) => Self::of(cluster).await,
            Err(StartError::Failed(e)) => {
                Err(Exit::cluster(format!("cannot start the embedded cluster: {e:#}")).into())
            }
            Err(StartError::Held(why)) => {
                // Somebody is just starting, or just leaving.
                let deadline = Instant::now() + OTHER_STARTS_WITHIN;
                while Instant::now() < deadline {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    if let Some(channel) = other_process(arguments).await {
                        return Ok(Self {
                            channel,
                            embedded: None,
                        });
                    }
                    match EmbeddedCluster::start(
                        &arguments.state_dir,
                        arguments.cache_size,
                        listen,
                        workers,
                    )
                    .await
                    {
                        Ok(cluster) => return Self::of(cluster).await,
                        Err(StartError::Held(_)) => {}
                        Err(StartError::Failed(e)) => return Err(e),
                    }
                }
                Err(Exit::cluster(why).into())
            }
        }
    }

    /// Connects to a cluster of our own.
    pub async fn of(cluster: EmbeddedCluster) -> anyhow::Result<Self> {
        let channel = open(&cluster.address().to_string()).await?;
        Ok(Self {
            channel,
            embedded: Some(cluster),
        })
    }

    /// Whether the cluster lives in this process.
    pub const fn is_ours(&self) -> bool {
        self.embedded.is_some()
    }

    /// Pipelines and runs.
    pub fn runs(&self) -> RunServiceClient<Channel> {
        RunServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Artifacts.
    pub fn artifacts(&self) -> ArtifactServiceClient<Channel> {
        ArtifactServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Models.
    pub fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone())
    }

    /// The cluster itself.
    pub fn status(&self) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel.clone())
    }

    /// Resolves when our own coordinator has stopped by itself; never for somebody else's.
    pub async fn stopped(&self) -> Exit {
        match &self.embedded {
            Some(cluster) => cluster.stopped().await,
            None => std::future::pending().await,
        }
    }

    /// Leaves; stops the cluster where it is ours.
    pub async fn close(self) -> anyhow::Result<()> {
        match self.embedded {
            Some(cluster) => cluster.shutdown().await,
            None => Ok(()),
        }
    }
}

async fn other_process(arguments: &ClusterArguments) -> Option<Channel> {
    let file = ClusterFile::read(&arguments.state_dir)?;
    let channel = open(&file.address.to_string()).await.ok()?;
    // The file may be left over, and the port somebody else's.
    let mut client = ClusterServiceClient::new(channel.clone());
    let asked = client.get_cluster_status(GetClusterStatusRequest {});
    let answer = tokio::time::timeout(Duration::from_secs(2), asked).await;
    matches!(answer, Ok(Ok(_))).then_some(channel)
}

async fn open(server: &str) -> anyhow::Result<Channel> {
    let url = if server.contains("://") {
        server.to_owned()
    } else {
        format!("http://{server}")
    };
    let endpoint = Endpoint::from_shared(url)
        .map_err(|e| {
            Exit::input(format!(
                "`{server}` is no address: {e}; write e.g. `http://127.0.0.1:7420`"
            ))
        })?
        .connect_timeout(CONNECT_WITHIN)
        .tcp_nodelay(true)
        .http2_adaptive_window(true);
    let connected = endpoint.connect().await;
    connected.map_err(|e| {
        let mut why = e.to_string();
        let mut cause = std::error::Error::source(&e);
        while let Some(inner) = cause {
            why = inner.to_string();
            cause = inner.source();
        }
        Exit::cluster(format!("cannot reach the coordinator at {server}: {why}")).into()
    })
}
