//! The sessions with the workers: one stream each way, for as long as both live.
//!
//! Each session has a task that reads what the worker says, and a stream that the connection pulls
//! what we say from. Either end closes the other.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use emberline_common::{
    delivery::Deployment,
    ids::AttemptId,
    labels,
    run_view::RunView,
    serving::{ServingOffer, ServingStatus},
    telemetry::Telemetry,
    trace::RunTrace,
    wire,
};
use emberline_proto::{
    WORKER_PROTOCOL_VERSION,
    v1::{
        Assignments, Drain, Heartbeat, LeaderMessage, Register, Registered, ReportAck, ReportAcks,
        Stop, WorkerMessage, leader_message::Message as FromLeader,
        worker_message::Message as FromWorker, worker_service_server::WorkerService,
    },
};
use prost::Message as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Interval, MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, Context, status, translate};
use crate::{
    dora,
    engine::api::{Assignment, AttemptReport, Command, Disconnect, SessionId, WorkerHello},
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
        let (opened, opening) = oneshot::channel();
        let (errors, error) = mpsc::channel(1);
        let ended = CancellationToken::new();
        let reader = Reader {
            context: Arc::clone(&context),
            inbound: request.into_inner(),
            ended: ended.clone(),
        };
        context.tasks.spawn("session", async move {
            if let Err(status) = reader.run(opened, &errors).await {
                // The stream may have been closed from the other end.
                let _ = errors.try_send(status);
            }
            Ok(())
        });
        let speaker = Speaker {
            outgoing: Speaking::Opening(opening),
            error,
            waiting: VecDeque::new(),
            heartbeat: None,
            beats: 0,
            finished: false,
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
    /// Cancelled when the worker no longer listens.
    ended: CancellationToken,
}

/// A session that the runtime knows.
struct Opened {
    session: SessionId,
    outgoing: mpsc::Receiver<Outgoing>,
}

impl Reader {
    async fn run(
        mut self,
        opened: oneshot::Sender<Opened>,
        errors: &mpsc::Sender<Status>,
    ) -> Result<(), Status> {
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
        let how = match self.listen(session).await {
            Ok(how) => how,
            Err((status, how)) => {
                // Before the runtime hears of it and closes the session without a word.
                let _ = errors.try_send(status);
                how
            }
        };
        tracing::info!(%worker, session = session.0, ?how, "a worker's session ended");
        let gone = Command::WorkerDisconnected { session, how };
        runtime.tell(gone).await.map_err(status::from_runtime)
    }

    /// Until the session breaks.
    async fn listen(&mut self, session: SessionId) -> Result<Disconnect, (Status, Disconnect)> {
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
    error: mpsc::Receiver<Status>,
    waiting: VecDeque<LeaderMessage>,
    heartbeat: Option<Interval>,
    beats: u64,
    finished: bool,
    context: Arc<Context>,
    /// Tells the reader that nobody listens any more.
    _ended: DropGuard,
}

enum Speaking {
    Opening(oneshot::Receiver<Opened>),
    Open(mpsc::Receiver<Outgoing>),
    Closing(Status),
}

/// What comes next for a worker.
enum Next {
    Opened(Opened),
    Outgoing(Option<Outgoing>),
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
                    let mut heartbeat = interval_at(tokio::time::Instant::now() + every, every);
                    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    self.heartbeat = Some(heartbeat);
                    self.outgoing = Speaking::Open(opened.outgoing);
                    tracing::debug!(session = opened.session.0, "the session is open");
                }
                Next::Beat => {
                    self.beats += 1;
                    let sequence = self.beats;
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
                    let status = if let Ok(status) = self.error.try_recv() {
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
                Some(status) = self.error.recv() => Next::Error(status),
                opened = opening => match opened {
                    Ok(opened) => Next::Opened(opened),
                    // The reader has ended; if it said why, that is in the other queue.
                    Err(_) => Next::Error(self.error.recv().await.unwrap_or_else(status::stopping)),
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
                    error = self.error.recv() => Next::Error(error.unwrap_or_else(
                        || status::session_closed("the worker ended the session".to_owned()),
                    )),
                    () = beat => Next::Beat,
                }
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
            self.queue(FromLeader::Serving((&plan).into()));
        }
        if drain {
            self.queue(FromLeader::Drain(Drain {}));
        }
        match close {
            Some(why) => Err(status::session_closed(why)),
            None => Ok(()),
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
