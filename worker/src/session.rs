//! The session with the leader: one bidirectional stream, opened again whenever it breaks.
//!
//! The session carries, it does not decide: what runs and what is to be told stands on the
//! [`Board`](crate::board::Board), which outlives every session. Attempts go on while there is
//! none, and are offered to the next leader for adoption.

use std::{
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use emberline_common::{
    artifact::ArtifactStore,
    ids::{AttemptId, Epoch},
    redirect::{Redirect, redirect},
    serving::ServingPlan,
    tls::Dialer,
};
use emberline_proto::{
    WORKER_PROTOCOL_VERSION,
    v1::{self as pb, leader_message, worker_message, worker_service_client::WorkerServiceClient},
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::{
    config::WorkerConfig,
    pass::Pass,
    runner::Runner,
    search::{LeaderSeen, Search},
    serving::{Served, ServingArtifacts},
    stage::StopReason,
};

/// Messages on their way to the leader at a time.
const OUTGOING: usize = 64;
/// The largest message either way.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a leader may take to answer a registration: its adoption window lies in between.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long one message may wait for the leader to take it.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How often updates are told.
const UPDATE_INTERVAL: Duration = Duration::from_millis(100);

/// Keeps a session open until it is cancelled.
pub(crate) struct Session {
    pub config: WorkerConfig,
    pub incarnation: String,
    /// Where leaders may be.
    pub leaders: Vec<String>,
    /// What is shown to them.
    pub pass: Pass,
    pub runner: Arc<Runner>,
    /// What it serves models with, if it does.
    pub served: Option<Arc<Served>>,
    pub connected: watch::Sender<Option<LeaderSeen>>,
    pub cancel: CancellationToken,
    /// Cancelled when a leader has told this worker to drain.
    pub drained: CancellationToken,
}

impl Session {
    pub async fn run(self) {
        let mut artifacts = self.config.artifacts.clone();
        let mut search = Search::new(self.leaders.clone(), self.config.dialer.clone());
        let mut alone_since = Instant::now();
        loop {
            let next = tokio::select! {
                next = search.next() => next,
                () = self.cancel.cancelled() => return,
            };
            let redirect = match next {
                Ok(address) => {
                    let ended = tokio::select! {
                        ended = self.one(&address, &mut search, &mut artifacts) => ended,
                        () = self.cancel.cancelled() => return,
                    };
                    // Whoever waits for the connection need not watch the stream to see that it broke.
                    if self.connected.send_replace(None).is_some() {
                        alone_since = Instant::now();
                        search.had_one();
                        tracing::warn!(leader = %address, why = %ended.why, "the session broke");
                    } else if ended.redirect.as_ref().is_none_or(|r| r.leader.is_none()) {
                        search.say(&address, &ended.why);
                    }
                    ended.redirect
                }
                Err(why) => {
                    search.say("any", &why);
                    None
                }
            };
            if alone_since.elapsed() > self.config.orphan_grace && !self.runner.board.is_idle() {
                tracing::warn!("no leader for too long: attempts are stopped and discarded");
                self.runner.board.stop_all(StopReason::Cancelled);
                self.runner.board.discard();
            }
            let wait = search.failed(redirect);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.cancel.cancelled() => return,
            }
        }
    }

    /// One session, from connecting to its end; says why it ended.
    async fn one(
        &self,
        address: &str,
        search: &mut Search,
        artifacts: &mut Option<ArtifactStore>,
    ) -> Ended {
        match self.talk(address, search, artifacts).await {
            Ok(()) => "the leader ended it".to_owned().into(),
            Err(ended) => ended,
        }
    }

    async fn talk(
        &self,
        address: &str,
        search: &mut Search,
        artifacts: &mut Option<ArtifactStore>,
    ) -> Result<(), Ended> {
        let dialer = &self.config.dialer;
        let connected = dialer.connect(&endpoint(dialer, address)?).await;
        let channel = connected.map_err(|e| chain(&e))?;
        let mut client = client(channel);
        let (send, receive) = mpsc::channel(OUTGOING);
        let mut opening = self.runner.board.open(self.config.slots);
        let draining = opening.draining;
        // Where artifacts are, the leader says; work is taken only when they can be reached.
        let tried = artifacts.is_some();
        let credits = opening.credits;
        if !tried {
            opening.credits = 0;
        }
        let register = self.register(opening);
        self.send(&send, worker_message::Message::Register(register))
            .await?;
        if draining {
            self.send(&send, worker_message::Message::Drain(pb::Drain {}))
                .await?;
        }
        let shown = self.pass.show();
        let mut request = tonic::Request::new(ReceiverStream::new(receive));
        if let Some(header) = shown.header.clone() {
            let headers = request.metadata_mut().as_mut();
            headers.insert(http::header::AUTHORIZATION, header);
        }
        let answer = async {
            let response = client.session(request).await.map_err(|status| {
                if status.code() == tonic::Code::Unauthenticated {
                    self.pass.refused(&shown);
                }
                Ended::from(status)
            })?;
            let mut incoming = response.into_inner();
            let first = incoming.message().await.map_err(Ended::from)?;
            Ok::<_, Ended>((incoming, first))
        };
        let (mut incoming, first) = tokio::time::timeout(REGISTER_TIMEOUT, answer)
            .await
            .map_err(|_| "the leader did not answer the registration".to_owned())??;
        let Some(leader_message::Message::Registered(registered)) =
            first.and_then(|first| first.message)
        else {
            return Err("the leader did not begin with `registered`"
                .to_owned()
                .into());
        };
        if registered.protocol_version != WORKER_PROTOCOL_VERSION {
            return Err(format!(
                "the leader speaks version {} of the protocol, this worker {WORKER_PROTOCOL_VERSION}",
                registered.protocol_version
            )
            .into());
        }
        search.found(address, Epoch(registered.epoch))?;
        let store = self.artifacts(artifacts, &registered.object_store_url)?;
        for id in ids(registered.abandon) {
            self.runner.board.stop(&id, StopReason::Cancelled);
        }
        let interval = Duration::from_millis(u64::from(registered.heartbeat_interval_ms.max(50)));
        let _heart = Heart::start(send.clone(), interval);
        if !tried {
            if let Err(why) = store.probe_write().await {
                *artifacts = None;
                return Err(format!("the object store cannot be used from here: {why}").into());
            }
            let grant = pb::GrantCredits { credits };
            self.send(&send, worker_message::Message::GrantCredits(grant))
                .await?;
        }
        self.connected.send_replace(Some(LeaderSeen {
            address: address.to_owned(),
            epoch: Epoch(registered.epoch),
        }));
        self.runner.instruments.session_begun();
        tracing::info!(leader = %address, epoch = registered.epoch, "session open");

        let mut updates = tokio::time::interval(UPDATE_INTERVAL);
        updates.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told_drain = draining;
        let mut next_report = Instant::now();
        loop {
            tokio::select! {
                () = reports(self.served.as_deref(), next_report) => {
                    if let Some(served) = &self.served {
                        next_report = Instant::now() + served.report_every();
                        let status = (&served.server.status()).into();
                        self.send(&send, worker_message::Message::Serving(status)).await?;
                    }
                }
                message = incoming.message() => match message {
                    Ok(Some(message)) => self.handle(&store, message),
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(status.into()),
                },
                () = self.runner.board.wake.notified() => {
                    self.flush(&send).await?;
                    if self.runner.board.is_draining() && !told_drain {
                        told_drain = true;
                        self.send(&send, worker_message::Message::Drain(pb::Drain {})).await?;
                    }
                }
                _ = updates.tick() => {
                    let updates = self.runner.board.take_updates();
                    if !updates.is_empty() {
                        let message = worker_message::Message::Updates(pb::AttemptUpdates { updates });
                        // A leader that does not keep up misses some; the next ones say more.
                        let _ = send.try_send(pb::WorkerMessage { message: Some(message) });
                    }
                }
            }
        }
    }

    fn register(&self, opening: crate::board::Opening) -> pb::Register {
        let kinds = self.runner.stages.iter();
        pb::Register {
            worker: self.config.name.to_string(),
            incarnation: self.incarnation.clone(),
            protocol_version: WORKER_PROTOCOL_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            resources: Some(self.config.resources.into()),
            labels: self.config.labels.clone().into_iter().collect(),
            kinds: kinds
                .map(|(kind, stage)| (kind.to_string(), stage.version()))
                .collect(),
            cached_manifests: self
                .runner
                .cache
                .manifests()
                .iter()
                .map(ToString::to_string)
                .collect(),
            running: opening.running.iter().map(Into::into).collect(),
            unacknowledged: opening.unacknowledged,
            credits: opening.credits,
            serving: (self.served.as_ref()).map(|served| (&served.server.offer()).into()),
            serving_status: (self.served.as_ref()).map(|served| (&served.server.status()).into()),
        }
    }

    /// The store that the leader names, kept while it stays the same one.
    fn artifacts(
        &self,
        open: &mut Option<ArtifactStore>,
        url: &str,
    ) -> Result<ArtifactStore, String> {
        if let Some(store) = open
            && (self.config.artifacts.is_some() || store.url() == url)
        {
            return Ok(store.clone());
        }
        let store = ArtifactStore::open(url).map_err(|e| e.to_string())?;
        *open = Some(store.clone());
        Ok(store)
    }

    async fn flush(&self, send: &mpsc::Sender<pb::WorkerMessage>) -> Result<(), String> {
        loop {
            let batch = self.runner.board.take();
            if !batch.reports.is_empty() {
                let reports = pb::AttemptReports {
                    reports: batch.reports,
                };
                self.send(send, worker_message::Message::Reports(reports))
                    .await?;
            }
            if batch.credits > 0 {
                let grant = pb::GrantCredits {
                    credits: batch.credits,
                };
                self.send(send, worker_message::Message::GrantCredits(grant))
                    .await?;
            }
            if !batch.more {
                return Ok(());
            }
        }
    }

    async fn send(
        &self,
        send: &mpsc::Sender<pb::WorkerMessage>,
        message: worker_message::Message,
    ) -> Result<(), String> {
        let message = pb::WorkerMessage {
            message: Some(message),
        };
        match send.send_timeout(message, SEND_TIMEOUT).await {
            Ok(()) => Ok(()),
            Err(_) => Err("the leader takes no more messages".to_owned()),
        }
    }

    fn handle(&self, store: &ArtifactStore, message: pb::LeaderMessage) {
        match message.message {
            Some(leader_message::Message::Assignments(work)) => {
                for assignment in work.assignments {
                    self.runner.assign(store, assignment);
                }
            }
            Some(leader_message::Message::Stop(stop)) => {
                for id in ids(stop.attempts) {
                    self.runner.board.stop(&id, StopReason::Cancelled);
                }
            }
            Some(leader_message::Message::Acks(acks)) => {
                for ack in acks.acks {
                    for id in ids(ack.id) {
                        if !ack.committed {
                            tracing::info!(attempt = %id, "a report was refused: no longer current");
                        }
                        self.runner.board.acknowledge(&id);
                    }
                }
            }
            Some(leader_message::Message::Heartbeat(_)) => {}
            Some(leader_message::Message::Credential(credential)) => {
                self.pass.take(&credential.token);
            }
            Some(leader_message::Message::Serving(plan)) => {
                let plan = ServingPlan::try_from(plan);
                match (&self.served, plan) {
                    (Some(served), Ok(plan)) => {
                        let cache = Arc::clone(&self.runner.cache);
                        served.apply(plan, ServingArtifacts::new(cache, store.clone()));
                    }
                    (None, _) => {
                        tracing::warn!("the leader wants models served, which is not done here")
                    }
                    (_, Err(error)) => tracing::warn!(%error, "a plan that is none was dropped"),
                }
            }
            Some(leader_message::Message::Drain(_)) => {
                tracing::info!("the leader wants this worker to take no more work, and to end");
                self.runner.board.drain();
                self.drained.cancel();
            }
            Some(leader_message::Message::Registered(_)) | None => {
                tracing::warn!("the leader sent a message that this worker does not know");
            }
        }
    }
}

/// Resolves when what is served is to be told of; never, if nothing is.
async fn reports(served: Option<&Served>, next: Instant) {
    match served {
        Some(served) => {
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = served.server.changed().notified() => {}
            }
        }
        None => std::future::pending().await,
    }
}

/// Those that name an attempt.
fn ids(messages: impl IntoIterator<Item = pb::AttemptId>) -> impl Iterator<Item = AttemptId> {
    messages.into_iter().filter_map(|message| {
        AttemptId::try_from(message)
            .inspect_err(|error| tracing::warn!(%error, "an attempt that is none was dropped"))
            .ok()
    })
}

fn client(channel: Channel) -> WorkerServiceClient<Channel> {
    WorkerServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// Where a leader is, with what it takes to see soon that it no longer is.
pub(crate) fn endpoint(dialer: &Dialer, leader: &str) -> Result<Endpoint, String> {
    Ok(dialer
        .endpoint(leader)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(1))
        .keep_alive_timeout(Duration::from_secs(2))
        .keep_alive_while_idle(true))
}

/// How a session ended, or why there was none.
pub(crate) struct Ended {
    why: String,
    /// What a follower said.
    redirect: Option<Redirect>,
}

impl From<String> for Ended {
    fn from(why: String) -> Self {
        Self {
            why,
            redirect: None,
        }
    }
}

impl From<tonic::Status> for Ended {
    fn from(status: tonic::Status) -> Self {
        Self {
            why: format!("{:?}: {}", status.code(), status.message()),
            redirect: redirect(&status),
        }
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut last = out.clone();
    let mut next = error.source();
    while let Some(error) = next {
        // Some say what their cause says.
        let text = error.to_string();
        if text != last {
            out += &format!(": {text}");
            last = text;
        }
        next = error.source();
    }
    out
}

/// The heartbeat: a thread of the system's own, so that no stage and no busy runtime can keep it
/// from being sent. Ends when it is dropped.
struct Heart {
    stop: Option<SyncSender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Heart {
    fn start(send: mpsc::Sender<pb::WorkerMessage>, interval: Duration) -> Self {
        let (stop, stopped) = sync_channel::<()>(0);
        let thread = std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(move || {
                let mut sequence = 0;
                while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    sequence += 1;
                    let beat = worker_message::Message::Heartbeat(pb::Heartbeat { sequence });
                    let message = pb::WorkerMessage {
                        message: Some(beat),
                    };
                    match send.try_send(message) {
                        // A full queue says as much as a heartbeat does.
                        Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => {}
                        Err(mpsc::error::TrySendError::Closed(_)) => return,
                    }
                }
            });
        if let Err(error) = &thread {
            tracing::error!(%error, "the heartbeat's thread cannot be started");
        }
        Self {
            stop: Some(stop),
            thread: thread.ok(),
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It wakes at once and does nothing that waits.
            let _ = thread.join();
        }
    }
}
