//! A channel to whichever coordinator leads.
//!
//! It knows some coordinators' addresses. Each call goes to the one that led last; when that one says
//! that it does not lead, or cannot be reached, the call is sent again to the one that it names, or to
//! the next that is known, until the patience ends. So a call may be carried out twice, the first time
//! with its answer lost: all calls of the API allow that (a submission carries a request id). Streams
//! that break in the middle are not mended here: whoever reads them opens them again.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use emberline_common::redirect::{DOMAIN, redirect};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use tokio::time::{Instant, sleep};
use tonic::{
    Code, Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;
use tower_service::Service;

/// What a request may hold, all of it: it is kept in memory to be sent again.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// How long one address may take to be connected to.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
const FIRST_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// Hints that are followed in a row without a pause.
const HOPS: u32 = 3;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct LeaderChannel {
    shared: Arc<Shared>,
    /// How long a call goes on when nobody leads.
    patience: Duration,
}

struct Shared {
    known: Vec<String>,
    current: Mutex<Option<(String, Channel)>>,
}

/// What became of one try.
enum Tried {
    Answered(Response<Body>),
    /// Somebody else leads, there.
    Elsewhere(String, Status),
    /// To be tried again, elsewhere or later.
    Failed(Status),
}

impl LeaderChannel {
    /// To one of these addresses (`host:port` or `http://host:port`), none of which is reached yet.
    ///
    /// # Errors
    /// The address that is none, with why.
    pub fn new(known: Vec<String>, patience: Duration) -> Result<Self, String> {
        for address in &known {
            endpoint(address)?;
        }
        if known.is_empty() {
            return Err("no address is given".to_owned());
        }
        Ok(Self {
            shared: Arc::new(Shared {
                known,
                current: Mutex::new(None),
            }),
            patience,
        })
    }

    /// The same connection, with another patience.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    fn current(&self) -> Option<(String, Channel)> {
        let current = self.shared.current.lock();
        current.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_current(&self, current: Option<(String, Channel)>) {
        let mut slot = self.shared.current.lock();
        **slot.as_mut().unwrap_or_else(|poisoned| poisoned.get_mut()) = current;
    }

    async fn send(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, MAX_REQUEST_BYTES).collect().await;
        let body = body.map_err(|e| match e.downcast_ref::<LengthLimitError>() {
            Some(_) => Status::resource_exhausted(format!(
                "the request is larger than {} MiB",
                MAX_REQUEST_BYTES >> 20
            )),
            None => Status::internal(format!("the request cannot be made: {e}")),
        })?;
        let body = body.to_bytes();
        let deadline = Instant::now() + self.patience;
        let mut backoff = FIRST_BACKOFF;
        let mut next = 0;
        let mut hops = 0;
        let mut hint = None;
        loop {
            let (address, channel) = match (hint.take(), self.current()) {
                (Some(hint), _) => (hint, None),
                (None, Some((address, channel))) => (address, Some(channel)),
                (None, None) => {
                    let address = self.shared.known[next % self.shared.known.len()].clone();
                    next += 1;
                    (address, None)
                }
            };
            let mut request = Request::new(Body::new(Full::new(body.clone())));
            *request.method_mut() = parts.method.clone();
            *request.uri_mut() = parts.uri.clone();
            *request.version_mut() = parts.version;
            *request.headers_mut() = parts.headers.clone();
            *request.extensions_mut() = parts.extensions.clone();
            let status = match self.try_one(&address, channel, request).await {
                Tried::Answered(response) => return Ok(response),
                Tried::Elsewhere(leader, status) => {
                    self.set_current(None);
                    if leader != address && hops < HOPS {
                        hops += 1;
                        hint = Some(leader);
                        continue;
                    }
                    status
                }
                Tried::Failed(status) => {
                    self.set_current(None);
                    status
                }
            };
            hops = 0;
            // Every address is asked before the first pause.
            if next % self.shared.known.len() != 0 {
                continue;
            }
            if Instant::now() + backoff >= deadline {
                return Err(status);
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    async fn try_one(
        &self,
        address: &str,
        channel: Option<Channel>,
        request: Request<Body>,
    ) -> Tried {
        let mut channel = match channel {
            Some(channel) => channel,
            None => {
                let endpoint = match endpoint(address) {
                    Ok(endpoint) => endpoint,
                    Err(why) => return Tried::Failed(Status::unavailable(why)),
                };
                match endpoint.connect().await {
                    Ok(channel) => channel,
                    Err(e) => {
                        let why = innermost(&e);
                        let line = format!("cannot reach the coordinator at {address}: {why}");
                        return Tried::Failed(Status::unavailable(line));
                    }
                }
            }
        };
        let ready = std::future::poll_fn(|cx| channel.poll_ready(cx)).await;
        let sent = match ready {
            Ok(()) => channel.call(request).await,
            Err(e) => Err(e),
        };
        let response = match sent {
            Ok(response) => response,
            Err(e) => {
                let why = innermost(&e);
                let line = format!("the connection to the coordinator at {address} broke: {why}");
                return Tried::Failed(Status::unavailable(line));
            }
        };
        if let Some(status) = Status::from_header_map(response.headers()) {
            if let Some(said) = redirect(&status) {
                return match said.leader {
                    Some(leader) => Tried::Elsewhere(leader, status),
                    None => Tried::Failed(status),
                };
            }
            if leaves(&status) {
                return Tried::Failed(status);
            }
        }
        self.set_current(Some((address.to_owned(), channel)));
        Tried::Answered(response)
    }
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

fn innermost(e: &dyn std::error::Error) -> String {
    let mut why = e.to_string();
    let mut cause = e.source();
    while let Some(inner) = cause {
        why = inner.to_string();
        cause = inner.source();
    }
    why
}

fn endpoint(address: &str) -> Result<Endpoint, String> {
    let url = if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    };
    let wrong = |why: String| {
        format!("`{address}` is no address: {why}; write e.g. `http://127.0.0.1:7420`")
    };
    if !url.starts_with("http://") {
        return Err(wrong("only `http:` is known".to_owned()));
    }
    let endpoint = Endpoint::from_shared(url).map_err(|e| wrong(e.to_string()))?;
    Ok(endpoint
        .connect_timeout(CONNECT_WITHIN)
        .tcp_nodelay(true)
        .http2_adaptive_window(true)
        // A leader whose machine has vanished is noticed.
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3)))
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
