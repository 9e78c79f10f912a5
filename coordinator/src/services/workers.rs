//! The sessions with the workers: one stream each way, for as long as both live.
//!
//! Each session has a task that reads what the worker says, and a stream that the connection pulls
//! what we say from. Either end closes the other.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use emberline_common::{
    access::{Role, StaticToken, Token, TokenKind},
    delivery::Deployment,
    ids::{AttemptId, TokenName, WorkerName},
    labels,
    run_view::RunView,
    serving::{AllowedToken, ServingOffer, ServingPlan, ServingStatus},
    telemetry::Telemetry,
    tls::Peer,
    trace::RunTrace,
    wire,
};
use emberline_proto::{
    WORKER_PROTOCOL_VERSION,
    v1::{
        Assignments, Credential, Drain, Heartbeat, LeaderMessage, Register, Registered, ReportAck,
        ReportAcks, Stop, WorkerMessage, leader_message::Message as FromLeader,
        worker_message::Message as FromWorker, worker_service_server::WorkerService,
    },
};
use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, Interval, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, Context, access, status, translate};
use crate::{
    access::{Caller, Denied, Known},
    dora,
    engine::api::{
        AccessTable, Assignment, AttemptReport, Command, Disconnect, SessionId, TokenCommand,
        WorkerHello,
    },
    runtime::{sessions::Outgoing, watchers::Progress},
};

/// How long a worker may take to say who it is.
const REGISTER_WITHIN: Duration = Duration::from_secs(10);
/// A session may be silent for this many heartbeats at least, however short the grace.
const SILENT_HEARTBEATS: u32 = 2;
/// How long it may take until a stream whose other half has ended says why.
const WHY_WITHIN: Duration = Duration::from_millis(50);
/// Reports that are decided on together: so many, with what they lead to, fit into one commit of any
/// store.
const REPORTS_AT_ONCE: usize = 32;
/// How long a worker's credential is valid. It is renewed four times as often while the worker is
/// there: so long it may be away.
const CREDENTIAL_TTL: Duration = Duration::from_hours(7 * 24);
/// When that is tried again that did not succeed.
const RENEW_AGAIN: Duration = Duration::from_secs(60);
/// The largest message of assignments, but for one that is larger alone.
const ASSIGNMENTS_BYTES: usize = 1 << 20;

pub(crate) struct Workers(pub(crate) Arc<Context>);

#[tonic::async_trait]
impl WorkerService for Workers {
    type SessionStream = Answers<LeaderMessage>;

    async fn session(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let context = Arc::clone(&self.0);
        let caller = access::caller(&request)?;
        let peer = request.extensions().get().cloned();
        let (opened, opening) = oneshot::channel();
        let (words, word) = mpsc::channel(2);
        let ended = CancellationToken::new();
        let reader = Reader {
            context: Arc::clone(&context),
            inbound: request.into_inner(),
            access: context.access.clone(),
            by: caller.by.clone(),
            caller,
            peer,
            renew_at: None,
            words,
            ended: ended.clone(),
        };
        context.tasks.spawn("session", async move {
            reader.run(opened).await;
            Ok(())
        });
        let speaker = Speaker {
            outgoing: Speaking::Opening(opening),
            word,
            waiting: VecDeque::new(),
            heartbeat: None,
            beats: 0,
            finished: false,
            plan: None,
            access: context.access.clone(),
            in_file: context.gate.in_file().await,
            context,
            _ended: ended.drop_guard(),
        };
        let stream = futures::stream::unfold(speaker, |mut speaker| async move {
            let item = speaker.next().await?;
            Some((item, speaker))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// Reads what one worker says.
struct Reader {
    context: Arc<Context>,
    inbound: Streaming<WorkerMessage>,
    access: watch::Receiver<Arc<AccessTable>>,
    caller: Caller,
    peer: Option<Peer>,
    /// What the session rests on: what it was opened by, or the credential that was given since.
    by: Known,
    /// When the next credential is due.
    renew_at: Option<Instant>,
    /// What the other half is to say.
    words: mpsc::Sender<Word>,
    /// Cancelled when the worker no longer listens.
    ended: CancellationToken,
}

/// What the reader wants said.
enum Word {
    /// The worker's next credential.
    Credential(Token),
    /// Why the session ends.
    Error(Status),
}

/// A session that the runtime knows.
struct Opened {
    session: SessionId,
    outgoing: mpsc::Receiver<Outgoing>,
}

impl Reader {
    async fn run(mut self, opened: oneshot::Sender<Opened>) {
        if let Err(status) = self.follow(opened).await {
            // The stream may have been closed from the other end.
            let _ = self.words.try_send(Word::Error(status));
        }
    }

    async fn follow(&mut self, opened: oneshot::Sender<Opened>) -> Result<(), Status> {
        let first = timeout(REGISTER_WITHIN, self.inbound.message());
        let first = tokio::select! {
            () = self.ended.cancelled() => return Ok(()),
            () = self.context.tasks.stopping().cancelled() => return Err(status::stopping()),
            first = first => first.map_err(|_| status::timed_out("the registration"))??,
        };
        let Some(FromWorker::Register(register)) = first.and_then(|m| m.message) else {
            return Err(status::bad_field(
                "message",
                "the first message of a session must be `register`",
            ));
        };
        let runtime = self.context.runtime.clone();
        let session = runtime.new_session();
        let (hello, unacknowledged) = hello(session, register)?;
        let worker = hello.worker.clone();
        if let Err(denied) = self.caller.may_be(&worker) {
            tracing::warn!(%worker, why = denied.text(), "a worker was refused");
            let (peer, now) = (self.peer.as_ref(), self.context.clock.now());
            let mut entry = access::entry(&self.caller, peer, "WorkerService/Session", now);
            entry.on = Some(worker.to_string());
            return Err(access::refuse(&self.context, entry, &denied).await);
        }
        let outgoing = runtime
            .open_session(hello)
            .await
            .map_err(status::from_runtime)?;
        // If nobody listens any more, `ended` is cancelled.
        let _ = opened.send(Opened { session, outgoing });
        tracing::info!(%worker, session = session.0, "a worker registered");
        for command in reports(session, unacknowledged) {
            let _ = runtime.tell(command).await;
        }
        self.renew_at = self.first_renewal();
        let how = match self.listen(session, &worker).await {
            Ok(how) => how,
            Err((status, how)) => {
                // Before the runtime hears of it and closes the session without a word.
                let _ = self.words.try_send(Word::Error(status));
                how
            }
        };
        tracing::info!(%worker, session = session.0, ?how, "a worker's session ended");
        let gone = Command::WorkerDisconnected { session, how };
        runtime.tell(gone).await.map_err(status::from_runtime)
    }

    /// Until the session breaks.
    async fn listen(
        &mut self,
        session: SessionId,
        worker: &WorkerName,
    ) -> Result<Disconnect, (Status, Disconnect)> {
        use Disconnect::{Closed, Silent};
        // At least two words are missed.
        let silence = self
            .context
            .worker_grace
            .max(self.context.heartbeat_interval * SILENT_HEARTBEATS);
        loop {
            let message = timeout(silence, self.inbound.message());
            let message = tokio::select! {
                biased;
                message = message => match message {
                    Err(_) => return Err((status::timed_out("the worker's next heartbeat"), Silent)),
                    Ok(Err(e)) => {
                        let how = how(&e);
                        return Err((e, how));
                    }
                    Ok(Ok(None)) => return Ok(Closed),
                    Ok(Ok(Some(message))) => message,
                },
                () = self.context.tasks.stopping().cancelled() => {
                    return Err((status::stopping(), Closed));
                }
                // It ends with the term, as this does.
                Ok(()) = self.access.changed() => {
                    self.check().await.map_err(|status| (status, Closed))?;
                    continue;
                }
                () = due(self.renew_at) => {
                    self.renew(worker).await.map_err(|status| (status, Closed))?;
                    continue;
                }
                // The other half of the stream has ended; this half says in a moment why.
                () = self.ended.cancelled() => {
                    return match timeout(WHY_WITHIN, self.inbound.message()).await {
                        Ok(Err(e)) => Ok(how(&e)),
                        Ok(Ok(None)) => Ok(Closed),
                        Ok(Ok(Some(_))) | Err(_) => Ok(Silent),
                    };
                }
            };
            for command in self.take(session, message).map_err(|e| (e, Closed))? {
                let told = self.context.runtime.tell(command).await;
                told.map_err(|e| (status::from_runtime(e), Closed))?;
            }
        }
    }

    /// The session goes on only while what it rests on has not been revoked.
    async fn check(&mut self) -> Result<(), Status> {
        let table = self.access.borrow_and_update().clone();
        if self.context.gate.still_knows(&table, &self.by).await {
            return Ok(());
        }
        Err(status::denied(&Denied::Unauthenticated))
    }

    /// The token by which the worker joined, where one is asked for.
    fn joins_by(&self) -> Option<(TokenName, bool)> {
        match &self.caller.by {
            Known::Anyone => None,
            Known::Token { name, by_file, .. } => Some((name.clone(), *by_file)),
            Known::Worker {
                joined_by, by_file, ..
            } => Some((joined_by.clone(), *by_file)),
        }
    }

    /// At once for a worker that joins; else when a quarter of its credential's time is over.
    fn first_renewal(&self) -> Option<Instant> {
        match &self.caller.by {
            Known::Anyone => None,
            Known::Token { .. } => Some(Instant::now()),
            Known::Worker { worker, .. } => {
                let table = self.access.borrow();
                let record = table.credentials.get(worker)?;
                let age = self.context.clock.now().since(record.issued_at);
                Some(Instant::now() + (CREDENTIAL_TTL / 4).saturating_sub(age))
            }
        }
    }

    /// Gives the worker a credential of its own, instead of the one that it has. If that fails, it
    /// has what it came with, and it is tried again.
    ///
    /// # Errors
    /// The worker does not take it: then the session is over.
    async fn renew(&mut self, worker: &WorkerName) -> Result<(), Status> {
        let Some((joined_by, by_file)) = self.joins_by() else {
            self.renew_at = None;
            return Ok(());
        };
        self.renew_at = Some(Instant::now() + RENEW_AGAIN);
        let credential = match Token::generate(TokenKind::Worker(worker.clone())) {
            Ok(credential) => credential,
            Err(error) => {
                tracing::error!(%worker, %error, "a worker gets no credential");
                return Ok(());
            }
        };
        let previous = match &self.by {
            Known::Worker { hash, .. } => Some(*hash),
            Known::Anyone | Known::Token { .. } => None,
        };
        let issue = TokenCommand::Issue {
            worker: worker.clone(),
            hash: credential.hash(),
            previous,
            joined_by: joined_by.clone(),
            by_file,
            ttl: CREDENTIAL_TTL,
        };
        let issued = self.context.runtime.own_command(Command::Tokens(issue));
        match issued.await {
            Ok(_) => {
                self.by = Known::Worker {
                    worker: worker.clone(),
                    hash: credential.hash(),
                    joined_by,
                    by_file,
                };
                self.renew_at = Some(Instant::now() + CREDENTIAL_TTL / 4);
                let told = self.words.try_send(Word::Credential(credential));
                told.map_err(|_| status::session_closed("the worker did not keep up".to_owned()))
            }
            Err(error) => {
                tracing::warn!(%worker, %error, "a worker gets no credential");
                Ok(())
            }
        }
    }

    /// Turns a message into commands; some are nothing that the engine need know.
    fn take(&self, session: SessionId, message: WorkerMessage) -> Result<Vec<Command>, Status> {
        let commands = match message.message {
            // A newer worker may say what we do not know.
            None | Some(FromWorker::Heartbeat(_)) => Vec::new(),
            Some(FromWorker::Register(_)) => {
                return Err(status::bad_field(
                    "register",
                    "a session begins with it, and has no second one",
                ));
            }
            Some(FromWorker::GrantCredits(grant)) => vec![Command::Credits {
                session,
                credits: grant.credits,
            }],
            Some(FromWorker::Reports(told)) => reports(session, translate::reports(told.reports)?),
            Some(FromWorker::Updates(updates)) => {
                for update in updates.updates {
                    let id = update.id.ok_or_else(|| missing("updates.id"))?;
                    let progress = Progress {
                        id: AttemptId::try_from(id).map_err(|e| status::bad_wire(&e))?,
                        fraction: update.fraction,
                        message: translate::cut(update.message, 256),
                    };
                    // Whoever follows a log wakes by it too, and looks for new chunks.
                    self.context.runtime.watchers().progress(progress);
                }
                Vec::new()
            }
            Some(FromWorker::Drain(_)) => vec![Command::WorkerDraining { session }],
            Some(FromWorker::Serving(status)) => {
                let status = status.try_into().map_err(translate::bad)?;
                let status = Box::new(status);
                vec![Command::Serving { session, status }]
            }
        };
        Ok(commands)
    }
}

/// The tokens that may ask what is served: those that may look at things.
fn allowed(in_file: &[StaticToken], table: &AccessTable) -> Vec<AllowedToken> {
    let of_file = in_file
        .iter()
        .map(|token| (token.role, token.name.clone(), token.hash, None));
    let made = table.tokens.iter();
    let made =
        made.map(|(name, record)| (record.role, name.clone(), record.hash, record.expires_at));
    // One of the file goes before one of its name.
    let hidden = |name: &TokenName| in_file.iter().any(|token| token.name == *name);
    of_file
        .chain(made.filter(|(_, name, ..)| !hidden(name)))
        .filter(|(role, ..)| role.allows(Role::Viewer))
        .map(|(_, name, hash, expires_at)| AllowedToken {
            name,
            hash,
            expires_at,
        })
        .collect()
}

/// Resolves at that time; never, if there is none.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// How a connection broke: one that did not answer a keep-alive was silent, any other was closed.
fn how(e: &Status) -> Disconnect {
    let mut next: Option<&dyn std::error::Error> = std::error::Error::source(e);
    while let Some(e) = next {
        if e.to_string().contains("keep-alive timed out") {
            return Disconnect::Silent;
        }
        next = e.source();
    }
    Disconnect::Closed
}

/// Reports as commands of a bounded size.
fn reports(session: SessionId, mut rest: Vec<AttemptReport>) -> Vec<Command> {
    let mut commands = Vec::new();
    while !rest.is_empty() {
        let later = rest.split_off(rest.len().min(REPORTS_AT_ONCE));
        let reports = std::mem::replace(&mut rest, later);
        commands.push(Command::Reports { session, reports });
    }
    commands
}

/// Translates a message without a session, for [`crate::fuzzing`].
pub(crate) fn translated(message: WorkerMessage) -> Result<(), Status> {
    let session = SessionId(0);
    match message.message {
        Some(FromWorker::Register(register)) => hello(session, register).map(drop),
        Some(FromWorker::Reports(told)) => translate::reports(told.reports).map(drop),
        Some(FromWorker::Serving(status)) => {
            let status: Result<ServingStatus, _> = status.try_into();
            status.map(drop).map_err(translate::bad)
        }
        _ => Ok(()),
    }
}

fn missing(field: &str) -> Status {
    status::bad_field(field, "it is missing")
}

/// A registration, and the reports that no leader has acknowledged.
fn hello(
    session: SessionId,
    register: Register,
) -> Result<(WorkerHello, Vec<AttemptReport>), Status> {
    if register.protocol_version != WORKER_PROTOCOL_VERSION {
        return Err(status::failed_precondition(
            "PROTOCOL_VERSION",
            format!(
                "the worker speaks version {} of the protocol, this leader speaks {WORKER_PROTOCOL_VERSION}: use the same release of both",
                register.protocol_version
            ),
        ));
    }
    let unacknowledged = translate::reports(register.unacknowledged)?;
    let mut running = translate::attempts(register.running)?;
    // Finished but unheard of: they are still the worker's, until their report has been decided on.
    for report in &unacknowledged {
        if !running.contains(&report.id) {
            running.push(report.id.clone());
        }
    }
    let labels = register.labels.into_iter().collect();
    labels::check(&labels).map_err(|why| status::bad_field("labels", why))?;
    let status = register.serving_status.unwrap_or_default();
    let serving = match register.serving {
        None => None,
        Some(offer) => {
            let offer = ServingOffer::try_from(offer);
            let offer = offer.map_err(|e| translate::bad(e.within("serving")))?;
            let status = ServingStatus::try_from(status);
            let status = status.map_err(|e| translate::bad(e.within("serving_status")))?;
            Some((offer, status))
        }
    };
    let hello = WorkerHello {
        session,
        worker: wire::id("worker", &register.worker).map_err(translate::bad)?,
        incarnation: wire::id("incarnation", &register.incarnation).map_err(translate::bad)?,
        version: translate::cut(register.version, 64),
        resources: register.resources.unwrap_or_default().into(),
        labels,
        kinds: translate::kinds(register.kinds)?,
        cached: translate::digests("cached_manifests", &register.cached_manifests)?,
        running,
        credits: register.credits,
        serving,
    };
    Ok((hello, unacknowledged))
}

/// Makes what we say to one worker.
struct Speaker {
    outgoing: Speaking,
    word: mpsc::Receiver<Word>,
    waiting: VecDeque<LeaderMessage>,
    heartbeat: Option<Interval>,
    beats: u64,
    finished: bool,
    /// What the worker is to serve.
    plan: Option<ServingPlan>,
    access: watch::Receiver<Arc<AccessTable>>,
    in_file: Arc<Vec<StaticToken>>,
    context: Arc<Context>,
    /// Tells the reader that nobody listens any more.
    _ended: DropGuard,
}

enum Speaking {
    Opening(oneshot::Receiver<Opened>),
    Open(mpsc::Receiver<Outgoing>),
    Closing(Status),
}

impl From<Word> for Next {
    fn from(word: Word) -> Self {
        match word {
            Word::Credential(token) => Self::Credential(token),
            Word::Error(status) => Self::Error(status),
        }
    }
}

/// What comes next for a worker.
enum Next {
    Opened(Opened),
    Outgoing(Option<Outgoing>),
    Credential(Token),
    Error(Status),
    Beat,
}

impl Speaker {
    async fn next(&mut self) -> Option<Result<LeaderMessage, Status>> {
        loop {
            if self.finished {
                return None;
            }
            if let Some(message) = self.waiting.pop_front() {
                return Some(Ok(message));
            }
            match self.wait().await {
                Next::Error(status) => {
                    self.finished = true;
                    return Some(Err(status));
                }
                Next::Opened(opened) => {
                    let every = self.context.heartbeat_interval;
                    let mut heartbeat = interval_at(Instant::now() + every, every);
                    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    self.heartbeat = Some(heartbeat);
                    self.outgoing = Speaking::Open(opened.outgoing);
                    tracing::debug!(session = opened.session.0, "the session is open");
                }
                Next::Credential(token) => {
                    let token = token.reveal().to_owned();
                    return Some(Ok(message(FromLeader::Credential(Credential { token }))));
                }
                Next::Beat => {
                    self.beats += 1;
                    let sequence = self.beats;
                    self.look_at_tokens().await;
                    return Some(Ok(message(FromLeader::Heartbeat(Heartbeat { sequence }))));
                }
                Next::Outgoing(Some(outgoing)) => {
                    if let Err(status) = self.say(outgoing) {
                        self.outgoing = Speaking::Closing(status);
                    }
                }
                // The runtime has closed it without a word: the reader has ended and said why, the
                // coordinator stops, or the worker was too slow.
                Next::Outgoing(None) => {
                    let status = if let Some(status) = self.last_word() {
                        status
                    } else if self.context.tasks.stopping().is_cancelled() {
                        status::stopping()
                    } else {
                        status::session_closed("the worker did not keep up".to_owned())
                    };
                    self.outgoing = Speaking::Closing(status);
                }
            }
        }
    }

    async fn wait(&mut self) -> Next {
        match &mut self.outgoing {
            Speaking::Closing(status) => Next::Error(status.clone()),
            Speaking::Opening(opening) => tokio::select! {
                Some(word) = self.word.recv() => word.into(),
                opened = opening => match opened {
                    Ok(opened) => Next::Opened(opened),
                    // The reader has ended; if it said why, that is in the other queue.
                    Err(_) => match self.word.recv().await {
                        Some(word) => word.into(),
                        None => Next::Error(status::stopping()),
                    },
                },
            },
            Speaking::Open(outgoing) => {
                let beat = async {
                    match &mut self.heartbeat {
                        Some(heartbeat) => {
                            heartbeat.tick().await;
                        }
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    outgoing = outgoing.recv() => Next::Outgoing(outgoing),
                    word = self.word.recv() => match word {
                        Some(word) => word.into(),
                        None => Next::Error(status::session_closed(
                            "the worker ended the session".to_owned(),
                        )),
                    },
                    () = beat => Next::Beat,
                }
            }
        }
    }

    /// Why the reader has ended, if it said so.
    fn last_word(&mut self) -> Option<Status> {
        loop {
            match self.word.try_recv().ok()? {
                Word::Error(status) => return Some(status),
                Word::Credential(_) => {}
            }
        }
    }

    /// Queues the messages for what one commit had for this worker.
    fn say(&mut self, outgoing: Outgoing) -> Result<(), Status> {
        let Outgoing {
            registered,
            acks,
            assignments,
            stop,
            serving,
            drain,
            close,
        } = outgoing;
        if let Some(abandon) = registered {
            let interval = self.context.heartbeat_interval.as_millis();
            self.queue(FromLeader::Registered(Registered {
                epoch: self.context.runtime.epoch().0,
                protocol_version: WORKER_PROTOCOL_VERSION,
                heartbeat_interval_ms: u32::try_from(interval).unwrap_or(u32::MAX),
                abandon: abandon.iter().map(Into::into).collect(),
                object_store_url: self.context.artifacts.url().to_owned(),
            }));
        }
        if !acks.is_empty() {
            let acks = acks.iter().map(|(id, committed)| ReportAck {
                id: Some(id.into()),
                committed: *committed,
            });
            self.queue(FromLeader::Acks(ReportAcks {
                acks: acks.collect(),
            }));
        }
        let mut part = Vec::new();
        let mut bytes = 0;
        for mut assignment in assignments {
            hand_on_trace(&self.context.telemetry, &mut assignment);
            let context = &self.context;
            let tell = |run: &RunView, deployments: &[Arc<Deployment>]| {
                dora::delivery(
                    run,
                    deployments,
                    context.trace_url.as_deref(),
                    context.clock.now(),
                )
            };
            let assignment = translate::assignment(assignment, tell)?;
            let size = assignment.encoded_len();
            if bytes + size > ASSIGNMENTS_BYTES && !part.is_empty() {
                let assignments = std::mem::take(&mut part);
                self.queue(FromLeader::Assignments(Assignments { assignments }));
                bytes = 0;
            }
            bytes += size;
            part.push(assignment);
        }
        if !part.is_empty() {
            self.queue(FromLeader::Assignments(Assignments { assignments: part }));
        }
        if !stop.is_empty() {
            let attempts = stop.iter().map(Into::into).collect();
            self.queue(FromLeader::Stop(Stop { attempts }));
        }
        if let Some(plan) = serving {
            self.plan = Some(plan);
            self.tell_plan();
        }
        if drain {
            self.queue(FromLeader::Drain(Drain {}));
        }
        match close {
            Some(why) => Err(status::session_closed(why)),
            None => Ok(()),
        }
    }

    /// What is to be served, and who may ask.
    fn tell_plan(&mut self) {
        let Some(mut plan) = self.plan.clone() else {
            return;
        };
        if self.context.gate.is_closed() {
            plan.access = Some(allowed(&self.in_file, &self.access.borrow_and_update()));
        }
        self.queue(FromLeader::Serving((&plan).into()));
    }

    /// Tokens have changed: those of the state, or those of the file.
    async fn look_at_tokens(&mut self) {
        if self.plan.is_none() || !self.context.gate.is_closed() {
            return;
        }
        let in_file = self.context.gate.in_file().await;
        let is_new = !Arc::ptr_eq(&in_file, &self.in_file);
        self.in_file = in_file;
        if is_new || self.access.has_changed().unwrap_or(false) {
            self.tell_plan();
        }
    }

    fn queue(&mut self, what: FromLeader) {
        self.waiting.push_back(message(what));
    }
}

/// What the worker does is part of the attempt's span. If nothing is traced here, it goes on in the
/// trace that the run was given, if any.
fn hand_on_trace(telemetry: &Telemetry, assignment: &mut Assignment) {
    if telemetry.traces() {
        let trace = RunTrace::of(&assignment.id.run, &assignment.traceparent);
        let sampled = telemetry.samples(&trace);
        let context = trace.attempt_context(&assignment.id, sampled);
        assignment.traceparent = context.to_string();
    }
}

fn message(what: FromLeader) -> LeaderMessage {
    LeaderMessage {
        message: Some(what),
    }
}
