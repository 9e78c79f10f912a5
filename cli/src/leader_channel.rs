//! A channel to whichever coordinator leads.
//!
//! It knows some coordinators' addresses, and learns others from what followers say. Each call goes to
//! the one that led last; when that one leads no more, or cannot be reached, all of them are asked at
//! the same time who leads (one that is paused or cut off must not keep us from the others), and the
//! call is sent again, until the patience ends. So a call may be carried out twice, the first time with
//! its answer lost: all calls of the API allow that (a submission carries a request id).
//!
//! What is not mended here: a request too large to be kept in memory is sent once, and a stream that
//! breaks in the middle has to be opened again by whoever reads it (see [`is_broken`]).

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use emberline_common::{
    access::Token,
    redirect::{DOMAIN, redirect},
    tls::Dialer,
};
use emberline_proto::v1::{
    GetClusterStatusRequest, cluster_service_client::ClusterServiceClient,
    run_service_server::SERVICE_NAME,
};
use futures::stream::{FuturesUnordered, StreamExt as _};
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, BodyStream, Full, StreamBody};
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Code, Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt as _;
use tower_service::Service;

use crate::security::Security;

/// The largest request that is kept in memory to be sent again.
const KEPT_BYTES: usize = 8 << 20;
/// How long one address may take to be connected to.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// How long a coordinator may take to say whether it leads.
const ASK_WITHIN: Duration = Duration::from_secs(3);
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// The longest hint of a server on when to come back that is followed to the letter.
const MAX_HINT: Duration = Duration::from_secs(2);
/// Addresses that are remembered beside those that were given.
const LEARNED: usize = 16;
/// Whoever watches is told what is waited for after this long.
const SAY_AFTER: Duration = Duration::from_secs(2);

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct LeaderChannel {
    shared: Arc<Shared>,
    /// How long a call goes on when nobody leads.
    patience: Duration,
}

struct Shared {
    ways: Ways,
    /// How many of the known addresses were given.
    given: usize,
    state: Mutex<State>,
}

/// How coordinators are called.
#[derive(Clone)]
struct Ways {
    dialer: Dialer,
    /// The token, as it is shown.
    authorization: Option<HeaderValue>,
}

struct State {
    known: Vec<String>,
    leader: Option<Leader>,
}

/// Who led last.
#[derive(Clone)]
struct Leader {
    address: String,
    channel: Channel,
}

/// What a coordinator says when it is asked who leads.
enum Said {
    /// It does.
    Leads(Leader),
    /// Another one, there; or nobody, and why.
    Elsewhere(Option<String>, Status),
    /// Nothing.
    Silent(Status),
}

/// A request, as often as it may be sent.
enum Kept {
    Whole(Bytes),
    /// Too large to be kept: once.
    Once(Option<Body>),
}

impl LeaderChannel {
    /// To one of these addresses (`host:port` or a URL of one), none of which is reached yet.
    ///
    /// # Errors
    /// The address that is none, with why.
    pub fn new(
        known: Vec<String>,
        patience: Duration,
        security: &Security,
    ) -> Result<Self, String> {
        let ways = Ways::new(security);
        for address in &known {
            ways.endpoint(address)?;
        }
        if known.is_empty() {
            return Err("no address is given".to_owned());
        }
        let shared = Shared {
            ways,
            given: known.len(),
            state: Mutex::new(State {
                known,
                leader: None,
            }),
        };
        Ok(Self {
            shared: Arc::new(shared),
            patience,
        })
    }

    /// The same connection, with another patience.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Finds the leader, if that was not done before.
    ///
    /// # Errors
    /// Nobody was found to lead until the patience ended.
    pub async fn reach(&self) -> Result<(), Status> {
        self.leader(Instant::now() + self.patience)
            .await
            .map(|_| ())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Another call may have found a newer one in the meantime: that one stays.
    fn forget(&self, leader: &Leader) {
        let mut state = self.state();
        if state
            .leader
            .as_ref()
            .is_some_and(|l| l.address == leader.address)
        {
            state.leader = None;
        }
    }

    /// Remembers an address; says whether it is new.
    fn learn(&self, address: &str) -> bool {
        let mut state = self.state();
        let is_new = !state.known.iter().any(|known| bare(known) == bare(address));
        if is_new && state.known.len() < self.shared.given + LEARNED {
            state.known.push(address.to_owned());
        }
        is_new
    }

    /// The one that led last, or the one that is found to lead now.
    async fn leader(&self, deadline: Instant) -> Result<Leader, Status> {
        let known = self.state().leader.clone();
        if let Some(leader) = known {
            return Ok(leader);
        }
        let begun = Instant::now();
        let mut backoff = FIRST_BACKOFF;
        let mut said = false;
        loop {
            let why = match self.ask_all().await {
                Ok(leader) => {
                    self.state().leader = Some(leader.clone());
                    return Ok(leader);
                }
                Err(why) => why,
            };
            let wait = backoff.max(hint(&why));
            if Instant::now() + wait >= deadline {
                return Err(why);
            }
            if !said && begun.elapsed() >= SAY_AFTER {
                said = true;
                tracing::warn!(why = %why.message(), "no coordinator leads; still trying");
            }
            sleep(wait).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// Asks every coordinator that is known, and those that are named, whether it leads.
    async fn ask_all(&self) -> Result<Leader, Status> {
        let known = self.state().known.clone();
        let ask = |address| ask(&self.shared.ways, address);
        let mut asked: FuturesUnordered<_> = known.into_iter().map(ask).collect();
        let (mut silent, mut elsewhere) = (Vec::new(), None);
        while let Some((address, said)) = asked.next().await {
            match said {
                Said::Leads(leader) => return Ok(leader),
                Said::Elsewhere(named, status) => {
                    if let Some(named) = &named
                        && self.learn(named)
                    {
                        asked.push(ask(named.clone()));
                    }
                    elsewhere = Some((named, status));
                }
                Said::Silent(status) => silent.push((address, status)),
            }
        }
        Err(in_the_way(silent, elsewhere))
    }

    async fn send(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let deadline = Instant::now() + self.patience;
        let (parts, body) = request.into_parts();
        let mut body = keep(body).await?;
        let mut backoff = Duration::ZERO;
        loop {
            let leader = self.leader(deadline).await?;
            let (next, last) = match &mut body {
                Kept::Whole(bytes) => (Body::new(Full::new(bytes.clone())), false),
                Kept::Once(body) => (body.take().unwrap_or_default(), true),
            };
            let mut request = Request::new(next);
            *request.method_mut() = parts.method.clone();
            *request.uri_mut() = parts.uri.clone();
            *request.version_mut() = parts.version;
            *request.headers_mut() = parts.headers.clone();
            *request.extensions_mut() = parts.extensions.clone();
            if let Some(token) = &self.shared.ways.authorization {
                let headers = request.headers_mut();
                headers.insert(header::AUTHORIZATION, token.clone());
            }
            let status = match try_one(leader.clone(), request).await {
                Ok(response) => return Ok(response),
                Err(status) => status,
            };
            self.forget(&leader);
            if let Some(named) = redirect(&status).and_then(|said| said.leader) {
                self.learn(&named);
            }
            // The first time at once: the next leader may be there already.
            if last || Instant::now() + backoff >= deadline {
                return Err(status);
            }
            sleep(backoff).await;
            backoff = (backoff * 2).clamp(FIRST_BACKOFF, MAX_BACKOFF);
        }
    }
}

/// Reads a request to its end, unless it is too large to be kept.
async fn keep(mut body: Body) -> Result<Kept, Status> {
    let (mut frames, mut bytes) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame?;
        bytes += frame.data_ref().map_or(0, Bytes::len);
        frames.push(Ok(frame));
        if bytes > KEPT_BYTES {
            let begin = futures::stream::iter(frames);
            let whole = StreamBody::new(begin.chain(BodyStream::new(body)));
            return Ok(Kept::Once(Some(Body::new(whole))));
        }
    }
    let mut whole = Vec::with_capacity(bytes);
    for frame in frames.iter().flatten() {
        whole.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
    }
    Ok(Kept::Whole(whole.into()))
}

/// Why nobody was found to lead, in one line: what a coordinator says tells more than that another
/// one says nothing, unless that one is said to lead.
fn in_the_way(
    silent: Vec<(String, Status)>,
    elsewhere: Option<(Option<String>, Status)>,
) -> Status {
    let Some((named, status)) = elsewhere else {
        let first = silent.into_iter().next().map(|(_, status)| status);
        return first.unwrap_or_else(|| Status::unavailable("no coordinator is known"));
    };
    let is_named = |address: &str| named.as_deref().is_some_and(|n| bare(n) == bare(address));
    match silent.iter().find(|(address, _)| is_named(address)) {
        Some((_, why)) => Status::unavailable(format!("{}; it is said to lead", why.message())),
        None => status,
    }
}

/// Asks one coordinator whether it leads.
async fn ask(ways: &Ways, address: String) -> (String, Said) {
    let said = ask_it(ways, &address).await;
    (address, said)
}

async fn ask_it(ways: &Ways, address: &str) -> Said {
    let asked = async {
        let endpoint = ways.endpoint(address).map_err(Status::unavailable)?;
        let connected = ways.dialer.connect(&endpoint).await;
        let channel = connected.map_err(|e| {
            let why = innermost(&e);
            Status::unavailable(format!("cannot reach the coordinator at {address}: {why}"))
        })?;
        let request = HealthCheckRequest {
            service: SERVICE_NAME.to_owned(),
        };
        let health = HealthClient::new(channel.clone()).check(request).await;
        let health = health.map_err(|status| {
            let why = ways.explain(&status);
            Status::unavailable(format!("no coordinator answers at {address}: {why}"))
        })?;
        if health.into_inner().status() == ServingStatus::Serving {
            let address = address.to_owned();
            return Ok(Said::Leads(Leader { address, channel }));
        }
        // It knows who does, or why nobody does.
        let mut client = ClusterServiceClient::new(channel.clone());
        let mut request = tonic::Request::new(GetClusterStatusRequest {});
        if let Some(token) = &ways.authorization {
            let headers = request.metadata_mut().as_mut();
            headers.insert(header::AUTHORIZATION, token.clone());
        }
        let answer = client.get_cluster_status(request).await;
        Ok::<_, Status>(match answer {
            Err(status) => match redirect(&status) {
                Some(said) => Said::Elsewhere(said.leader, status),
                None => Said::Silent(status),
            },
            Ok(_) => Said::Leads(Leader {
                address: address.to_owned(),
                channel,
            }),
        })
    };
    match timeout(ASK_WITHIN, asked).await {
        Ok(Ok(said)) => said,
        Ok(Err(status)) => Said::Silent(status),
        Err(_) => Said::Silent(Status::unavailable(format!(
            "the coordinator at {address} does not answer"
        ))),
    }
}

/// Sends a call. An error is one after which it may be sent again, elsewhere or later.
async fn try_one(mut leader: Leader, request: Request<Body>) -> Result<Response<Body>, Status> {
    let ready = std::future::poll_fn(|cx| leader.channel.poll_ready(cx)).await;
    let sent = match ready {
        Ok(()) => leader.channel.call(request).await,
        Err(e) => Err(e),
    };
    let response = sent.map_err(|e| {
        Status::unavailable(format!(
            "the connection to the coordinator at {} broke: {}",
            leader.address,
            innermost(&e)
        ))
    })?;
    match Status::from_header_map(response.headers()) {
        Some(status) if redirect(&status).is_some() || leaves(&status) => Err(status),
        _ => Ok(response),
    }
}

/// How long a server asks to be left alone.
fn hint(status: &Status) -> Duration {
    let retry = status.get_details_retry_info();
    let delay = retry.and_then(|retry| retry.retry_delay);
    delay.unwrap_or_default().min(MAX_HINT)
}

/// Whether a coordinator says that it is about to lead no more.
pub fn leaves(status: &Status) -> bool {
    let reason = status.get_details_error_info();
    status.code() == Code::Unavailable
        && reason.is_some_and(|info| {
            info.domain == DOMAIN && ["NOT_LEADING", "STOPPING"].contains(&info.reason.as_str())
        })
}

/// Whether a stream that ended so can be opened again at the next leader.
pub fn is_broken(status: &Status) -> bool {
    // A connection that closes in the middle of a stream shows as one of these, without details.
    leaves(status)
        || redirect(status).is_some()
        || (matches!(
            status.code(),
            Code::Unknown | Code::Unavailable | Code::Internal | Code::Cancelled
        ) && status.get_details_error_info().is_none())
}

/// The cause of all the others: it says most.
pub fn innermost(e: &dyn std::error::Error) -> String {
    let mut why = e.to_string();
    let mut cause = e.source();
    while let Some(inner) = cause {
        why = inner.to_string();
        cause = inner.source();
    }
    why
}

/// An address as a hint says it.
fn bare(address: &str) -> &str {
    let address = address.split_once("://").map_or(address, |(_, bare)| bare);
    address.trim_end_matches('/')
}

impl Ways {
    fn new(security: &Security) -> Self {
        Self {
            dialer: security.dialer.clone(),
            authorization: security.token.as_ref().and_then(Token::header),
        }
    }

    /// Why a connection came to nothing. A port that speaks TLS says so in its first bytes, which
    /// are no HTTP; and one that misses our certificate does when the first call is under way.
    fn explain(&self, status: &Status) -> String {
        let why = innermost(status);
        let is_plain = self.dialer.tls().is_none();
        if is_plain && (why.contains("http2 error") || why.contains("frame with invalid size")) {
            return format!(
                "{why}; it may speak TLS: give `--tls-ca`, `--tls-cert` and `--tls-key`"
            );
        }
        why
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, String> {
        Ok(self
            .dialer
            .endpoint(address)?
            .connect_timeout(CONNECT_WITHIN)
            .tcp_nodelay(true)
            .http2_adaptive_window(true)
            // A leader whose machine has vanished is noticed.
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3)))
    }
}

impl Service<Request<Body>> for LeaderChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::net::TcpListener;

    use super::*;

    /// A request of so many bytes, in pieces.
    fn body(bytes: usize) -> Body {
        const PIECE: usize = 1 << 20;
        let sizes = (0..bytes)
            .step_by(PIECE)
            .map(move |at| PIECE.min(bytes - at));
        let pieces = sizes.map(|size| Ok::<_, Status>(Bytes::from(vec![7; size])));
        let frames = futures::stream::iter(pieces).map(|piece| piece.map(http_body::Frame::data));
        Body::new(StreamBody::new(frames))
    }

    #[tokio::test]
    async fn a_small_request_can_be_sent_again() {
        let Kept::Whole(kept) = keep(body(KEPT_BYTES)).await.unwrap() else {
            panic!("it is kept");
        };
        assert_eq!(kept.len(), KEPT_BYTES);
    }

    #[tokio::test]
    async fn a_large_request_is_passed_on_whole() {
        let Kept::Once(Some(passed)) = keep(body(KEPT_BYTES * 3 + 5)).await.unwrap() else {
            panic!("it is not kept");
        };
        let passed = passed.collect().await.unwrap().to_bytes();
        assert_eq!(passed.len(), KEPT_BYTES * 3 + 5);
        assert!(passed.iter().all(|byte| *byte == 7));
    }

    #[tokio::test]
    async fn nobody_is_waited_for_without_patience() {
        // Its system takes connections, but nobody speaks: so is a process that is paused.
        let paused = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = TcpListener::bind("127.0.0.1:0").unwrap();
        let known = [&paused, &refused].map(|l| l.local_addr().unwrap().to_string());
        drop(refused);
        let channel =
            LeaderChannel::new(known.to_vec(), Duration::ZERO, &Security::default()).unwrap();
        let begun = Instant::now();
        let why = channel.reach().await.unwrap_err();
        assert_eq!(why.code(), Code::Unavailable);
        assert!(why.message().contains(&known[1]), "{}", why.message());
        assert!(begun.elapsed() < ASK_WITHIN + CONNECT_WITHIN);
    }

    #[test]
    fn what_is_in_the_way_is_told_by_who_knows_most() {
        let silent = || vec![("http://a:1".to_owned(), Status::unavailable("no a"))];
        let nobody = (None, Status::unavailable("etcd has no quorum"));
        let a = (Some("a:1".to_owned()), Status::unavailable("a:1 leads"));
        assert_eq!(in_the_way(silent(), None).message(), "no a");
        let told = in_the_way(silent(), Some(nobody));
        assert_eq!(told.message(), "etcd has no quorum");
        let told = in_the_way(silent(), Some(a));
        assert_eq!(told.message(), "no a; it is said to lead");
    }

    #[test]
    fn an_address_is_learnt_once_and_not_without_end() {
        let given = vec!["http://a:1/".to_owned()];
        let channel = LeaderChannel::new(given, Duration::ZERO, &Security::default()).unwrap();
        assert!(!channel.learn("a:1"), "it was given");
        for port in 1..100 {
            assert!(channel.learn(&format!("b:{port}")));
        }
        assert_eq!(channel.state().known.len(), 1 + LEARNED);
        assert!(!channel.learn("b:1"));
    }

    #[test]
    fn what_is_no_address_is_told() {
        for wrong in ["", "https://a:1", "a b", "127.0.0.1", "a:99999"] {
            let made =
                LeaderChannel::new(vec![wrong.to_owned()], Duration::ZERO, &Security::default());
            assert!(made.is_err_and(|why| why.contains("is no address") || why.contains("TLS")));
        }
    }
}
