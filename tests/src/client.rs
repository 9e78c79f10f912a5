//! A plain gRPC client of a cluster of coordinators, as anybody could write one from the `.proto`
//! files: it asks one after the other, and follows what a follower says about the leader.

use std::{
    fs,
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use emberline_proto::v1::{
    CancelRunRequest, GetRunRequest, GetRunResponse, RunState, SubmitRunRequest,
    run_service_client::RunServiceClient,
};
use tokio::runtime::Runtime;
use tonic::{
    Code, Request, Status,
    metadata::AsciiMetadataValue,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};
use tonic_types::StatusExt as _;

/// How long one call may take before the next coordinator is asked.
const ONE_CALL: Duration = Duration::from_secs(2);
/// Between two rounds over all coordinators.
const PAUSE: Duration = Duration::from_millis(20);

/// The client.
pub struct Client {
    servers: Vec<String>,
    /// Who was the leader the last time, and a connection.
    leader: Mutex<Option<(String, Channel)>>,
    tls: Option<ClientTlsConfig>,
    token: Option<AsciiMetadataValue>,
    runtime: Runtime,
}

/// Where the leader is, from the error of a follower. `None` if the error is another one.
#[must_use]
pub fn leader_hint(status: &Status) -> Option<(String, String)> {
    let info = status.get_details_error_info()?;
    let is_hint = info.reason == "NOT_LEADER" && info.domain == "emberline";
    let field = |name: &str| info.metadata.get(name).cloned().unwrap_or_default();
    is_hint.then(|| (field("leader"), field("epoch")))
}

impl Client {
    /// Of the coordinators at these `host:port`s.
    #[must_use]
    pub fn new(servers: Vec<String>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        Self {
            servers,
            leader: Mutex::new(None),
            tls: None,
            token: None,
            runtime,
        }
    }

    /// It shows the certificate in this directory, and the token.
    ///
    /// # Panics
    /// If a file is not there.
    pub fn be(&mut self, dir: &Path) {
        self.be_without_token(dir);
        let token = fs::read_to_string(dir.join("token")).unwrap();
        let token = format!("Bearer {}", token.trim());
        self.token = Some(token.parse().unwrap());
    }

    /// It shows the certificate in this directory.
    ///
    /// # Panics
    /// If a file is not there.
    pub fn be_without_token(&mut self, dir: &Path) {
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read("ca.pem")))
            .identity(tonic::transport::Identity::from_pem(
                read("cert.pem"),
                read("key.pem"),
            ));
        self.tls = Some(tls);
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            let metadata = request.metadata_mut();
            metadata.insert("authorization", token.clone());
        }
        request
    }

    /// As [`Self::connect`], as whom we are.
    async fn reach(&self, server: &str) -> Result<Channel, Status> {
        let Some(tls) = &self.tls else {
            return Self::connect(server).await;
        };
        Endpoint::from_shared(format!("https://{server}"))
            .unwrap()
            .connect_timeout(Duration::from_secs(1))
            .timeout(ONE_CALL)
            .tls_config(tls.clone())
            .unwrap()
            .connect()
            .await
            .map_err(|e| Status::unavailable(format!("{server}: {e:?}")))
    }

    /// Runs something to its end.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// A connection to one coordinator, and to no other.
    ///
    /// # Errors
    /// `UNAVAILABLE` if there is none.
    pub async fn connect(server: &str) -> Result<Channel, Status> {
        Endpoint::from_shared(format!("http://{server}"))
            .unwrap()
            .connect_timeout(Duration::from_secs(1))
            .timeout(ONE_CALL)
            .connect()
            .await
            .map_err(|e| Status::unavailable(format!("{server}: {e:?}")))
    }

    /// One call to one coordinator, wherever it leads or not.
    ///
    /// # Errors
    /// What it answers.
    pub fn ask<T>(
        &self,
        server: &str,
        call: impl AsyncFnOnce(RunServiceClient<Channel>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        self.block_on(async {
            let answer = async { call(RunServiceClient::new(Self::connect(server).await?)).await };
            tokio::time::timeout(ONE_CALL, answer)
                .await
                .unwrap_or_else(|_| Err(Status::deadline_exceeded(server)))
        })
    }

    /// One call to whoever leads, tried again until it is answered.
    ///
    /// # Errors
    /// The leader's answer if it refuses, or the last error at the deadline.
    pub fn call<T>(
        &self,
        within: Duration,
        call: impl AsyncFn(RunServiceClient<Channel>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let deadline = Instant::now() + within;
        let mut hint: Option<String> = None;
        let mut next = 0;
        self.block_on(async {
            loop {
                let known = self.leader.lock().unwrap().clone();
                let server = match (hint.take(), &known) {
                    (Some(hint), _) => hint,
                    (None, Some((server, _))) => server.clone(),
                    (None, None) => {
                        next += 1;
                        self.servers[next % self.servers.len()].clone()
                    }
                };
                let channel = match known {
                    Some((at, channel)) if at == server => Ok(channel),
                    _ => self.reach(&server).await,
                };
                let error = match channel {
                    Err(e) => e,
                    Ok(channel) => {
                        let asked = call(RunServiceClient::new(channel.clone()));
                        match tokio::time::timeout(ONE_CALL, asked).await {
                            Ok(Ok(answer)) => {
                                *self.leader.lock().unwrap() = Some((server, channel));
                                return Ok(answer);
                            }
                            Ok(Err(e)) => e,
                            Err(_) => Status::deadline_exceeded(server),
                        }
                    }
                };
                *self.leader.lock().unwrap() = None;
                let again = [
                    Code::Unavailable,
                    Code::DeadlineExceeded,
                    Code::Cancelled,
                    Code::Unknown,
                ];
                // A connection that ends in the middle of a call; what a coordinator says has details.
                let broke =
                    error.code() == Code::Internal && error.get_details_error_info().is_none();
                let again = broke || again.contains(&error.code());
                if !again || Instant::now() > deadline {
                    return Err(error);
                }
                hint = leader_hint(&error)
                    .map(|(leader, _)| leader)
                    .filter(|leader| !leader.is_empty());
                tokio::time::sleep(PAUSE).await;
            }
        })
    }

    /// Submits, again and again with the same request id until somebody accepts it, and gives the
    /// run's id.
    ///
    /// # Errors
    /// See [`Self::call`].
    pub fn submit(&self, request: &SubmitRunRequest, within: Duration) -> Result<String, Status> {
        let answer = self.call(within, async |mut client| {
            client.submit_run(self.request(request.clone())).await
        });
        Ok(answer?.into_inner().run)
    }

    /// What can be seen of a run.
    ///
    /// # Errors
    /// See [`Self::call`].
    pub fn run(&self, run: &str, within: Duration) -> Result<GetRunResponse, Status> {
        let request = GetRunRequest {
            run: run.to_owned(),
        };
        let answer = self.call(within, async |mut client| {
            client.get_run(self.request(request.clone())).await
        });
        Ok(answer?.into_inner())
    }

    /// Cancels a run.
    ///
    /// # Errors
    /// See [`Self::call`].
    pub fn cancel(&self, run: &str, within: Duration) -> Result<(), Status> {
        let request = CancelRunRequest {
            run: run.to_owned(),
            why: "a test".to_owned(),
        };
        let answer = self.call(within, async |mut client| {
            client.cancel_run(self.request(request.clone())).await
        });
        answer.map(drop)
    }
}

/// The state of a run that was read.
#[must_use]
pub fn state_of(run: &GetRunResponse) -> RunState {
    run.summary.as_ref().unwrap().state()
}
