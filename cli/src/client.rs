//! Finding a cluster: a named server, the embedded cluster of another process, or one of our own.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use emberline_proto::v1::{
    GetClusterStatusRequest, artifact_service_client::ArtifactServiceClient,
    cluster_service_client::ClusterServiceClient,
    deployment_service_client::DeploymentServiceClient, dora_service_client::DoraServiceClient,
    model_service_client::ModelServiceClient, run_service_client::RunServiceClient,
    token_service_client::TokenServiceClient,
};

use crate::{
    args::ClusterArguments,
    embedded::{ClusterFile, EmbeddedCluster, StartError},
    exit::Exit,
    leader_channel::LeaderChannel,
    security::Security,
};

/// How long a call goes on when nobody of a cluster leads.
const FAILOVER: Duration = Duration::from_secs(30);
/// How long another process may take from holding the state directory to serving.
const OTHER_STARTS_WITHIN: Duration = Duration::from_secs(10);

/// A connection to a cluster, and the cluster itself where it is ours.
pub struct Cluster {
    channel: LeaderChannel,
    embedded: Option<EmbeddedCluster>,
}

impl Cluster {
    /// Connects; starts an embedded cluster with that many workers where none is to be found.
    pub async fn connect(arguments: &ClusterArguments, workers: u32) -> anyhow::Result<Self> {
        if let Some(server) = &arguments.server {
            let security = arguments.security.read()?;
            let within = arguments.connect_timeout.map(|t| t.0);
            return Self::to_within(server, within, &security).await;
        }
        if let Some(channel) = other_process(arguments).await {
            return Ok(Self {
                channel,
                embedded: None,
            });
        }
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let events = arguments.events.config()?;
        let start = || EmbeddedCluster::start(arguments, events.clone(), listen, workers, None);
        match start().await {
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
                    match start().await {
                        Ok(cluster) => return Self::of(cluster).await,
                        Err(StartError::Held(_)) => {}
                        Err(StartError::Failed(e)) => return Err(e),
                    }
                }
                Err(Exit::cluster(why).into())
            }
        }
    }

    /// Connects to a cluster of other processes.
    pub async fn to(server: &str) -> anyhow::Result<Self> {
        Self::to_within(server, None, &Security::default()).await
    }

    /// Connects to a cluster of other processes; gives up, now and at every call, when nobody has
    /// led for that long.
    async fn to_within(
        server: &str,
        within: Option<Duration>,
        security: &Security,
    ) -> anyhow::Result<Self> {
        let channel = open(server, Patience::Failover(within), security).await?;
        Ok(Self {
            channel,
            embedded: None,
        })
    }

    /// Connects to a cluster of our own.
    pub async fn of(cluster: EmbeddedCluster) -> anyhow::Result<Self> {
        let address = cluster.address().to_string();
        let channel = open(&address, Patience::None, &Security::default()).await?;
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
    pub fn runs(&self) -> RunServiceClient<LeaderChannel> {
        RunServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Artifacts.
    pub fn artifacts(&self) -> ArtifactServiceClient<LeaderChannel> {
        ArtifactServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Models.
    pub fn models(&self) -> ModelServiceClient<LeaderChannel> {
        ModelServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Deployments and environments.
    pub fn deployments(&self) -> DeploymentServiceClient<LeaderChannel> {
        DeploymentServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// The metrics of delivery, and what feeds them.
    pub fn dora(&self) -> DoraServiceClient<LeaderChannel> {
        DoraServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Tokens.
    pub fn tokens(&self) -> TokenServiceClient<LeaderChannel> {
        TokenServiceClient::new(self.channel.clone())
    }

    /// The cluster itself.
    pub fn status(&self) -> ClusterServiceClient<LeaderChannel> {
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

async fn other_process(arguments: &ClusterArguments) -> Option<LeaderChannel> {
    let file = ClusterFile::read(&arguments.state_dir)?;
    let address = file.address.to_string();
    let security = Security::default();
    let channel = open(&address, Patience::None, &security).await.ok()?;
    // The file may be left over, and the port somebody else's.
    let mut client = ClusterServiceClient::new(channel.clone());
    let asked = client.get_cluster_status(GetClusterStatusRequest {});
    let answer = tokio::time::timeout(Duration::from_secs(2), asked).await;
    matches!(answer, Ok(Ok(_))).then_some(channel)
}

/// A channel to one of these addresses, separated by commas, that has answered.
async fn open(
    server: &str,
    patience: Patience,
    security: &Security,
) -> anyhow::Result<LeaderChannel> {
    let known = server.split(',').map(str::trim).filter(|s| !s.is_empty());
    let known: Vec<String> = known.map(str::to_owned).collect();
    let (first, then) = match patience {
        Patience::Failover(Some(within)) => (within, within),
        // A single address that does not answer at all is most likely wrong.
        Patience::Failover(None) if known.len() == 1 => (Duration::ZERO, FAILOVER),
        Patience::Failover(None) => (FAILOVER, FAILOVER),
        Patience::None => (Duration::ZERO, Duration::ZERO),
    };
    let channel = LeaderChannel::new(known, first, security).map_err(Exit::input)?;
    let reached = channel.reach().await;
    reached.map_err(|status| Exit::cluster(status.message()))?;
    Ok(channel.with_patience(then))
}

/// How long a call goes on when nobody leads.
enum Patience {
    /// As long as another coordinator may take over, or for so long.
    Failover(Option<Duration>),
    /// Not at all: there is no other.
    None,
}
