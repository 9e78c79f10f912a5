//! How long an S3 server is waited for. A request that makes no progress is given up and tried
//! again, a server that asks for quiet gets it, and nothing waits for ever: object_store's own
//! time-outs are off, for they cut a long transfer that goes well.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpResponseBody, HttpService, ReqwestConnector,
    },
};
use tokio::{
    sync::watch,
    time::{Instant, Sleep, sleep, sleep_until},
};

use crate::telemetry::current;

/// The longest that a server's `Retry-After` is obeyed at once; it may say it again.
const LONGEST_QUIET: Duration = Duration::from_secs(15);
/// What is sent may take this much longer, for each MiB of it.
const FOR_EACH_MIB: Duration = Duration::from_secs(4);
/// How often trouble is logged while it lasts.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// The header of W3C Trace Context.
const TRACEPARENT: &str = "traceparent";
/// No difference between the clocks is known yet.
const UNKNOWN: i64 = i64::MIN;

/// How long, and how often, an S3 server is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For a connection to be made.
    pub connect: Duration,
    /// Without one byte of an answer, when something is read. The reading then goes on from there.
    pub silence: Duration,
    /// For the answer, when something is written; and 4 s more for each MiB of it.
    pub answer: Duration,
    /// The most retries of one request after a 500, 503 or 429 or a broken connection.
    pub retries: usize,
    /// After this time since the first try, no further one is made.
    pub budget: Duration,
    /// For one part of 8 MiB to be read, retries and all.
    pub part: Duration,
}

impl Default for Patience {
    /// For work: a server that restarts, or is overloaded for a minute, fails nothing.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            silence: Duration::from_secs(20),
            answer: Duration::from_secs(60),
            // The time is what counts: a refused connection is told in no time.
            retries: 1000,
            budget: Duration::from_secs(120),
            part: Duration::from_secs(300),
        }
    }
}

impl Patience {
    /// For a question whose answer somebody waits for.
    #[must_use]
    pub const fn short() -> Self {
        Self {
            connect: Duration::from_secs(3),
            silence: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            retries: 2,
            budget: Duration::from_secs(10),
            part: Duration::from_secs(30),
        }
    }
}

/// What all requests to one server share.
#[derive(Debug)]
pub(super) struct Traffic {
    /// Until when the server has asked for quiet.
    quiet: watch::Sender<Instant>,
    /// How many seconds the server's clock is ahead of this machine's.
    ahead: AtomicI64,
    /// When trouble was logged last.
    told: Mutex<Option<Instant>>,
}

impl Default for Traffic {
    fn default() -> Self {
        Self {
            quiet: watch::Sender::new(Instant::now()),
            ahead: AtomicI64::new(UNKNOWN),
            told: Mutex::new(None),
        }
    }
}

impl Traffic {
    /// How many seconds the server's clock is ahead of this machine's, by its last answer.
    pub(super) fn server_ahead_seconds(&self) -> Option<i64> {
        let ahead = self.ahead.load(Ordering::Relaxed);
        (ahead != UNKNOWN).then_some(ahead)
    }

    /// Logs what the next try may mend, now and then.
    fn tell(&self, at: &str, why: &dyn fmt::Display) {
        let now = Instant::now();
        // A point in time is whole after any panic.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| now - told >= TELL_EVERY) {
            *told = Some(now);
            tracing::warn!("the object store at {at} is not well: {why}");
        }
    }

    fn note(&self, response: &HttpResponse) {
        let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
        if let Some(date) = header("date")
            && let Ok(date) = jiff::fmt::rfc2822::parse(date)
        {
            let here = jiff::Timestamp::now().as_second();
            let ahead = date.timestamp().as_second() - here;
            self.ahead.store(ahead, Ordering::Relaxed);
        }
        let asks_for_quiet = matches!(response.status().as_u16(), 429 | 503);
        if asks_for_quiet && let Some(seconds) = header("retry-after").and_then(|v| v.parse().ok())
        {
            let until = Instant::now() + Duration::from_secs(seconds).min(LONGEST_QUIET);
            self.quiet.send_if_modified(|quiet| {
                let is_later = until > *quiet;
                *quiet = until.max(*quiet);
                is_later
            });
        }
    }
}

/// Makes clients that are [`Patient`].
#[derive(Debug)]
pub(super) struct PatientConnector {
    pub patience: Patience,
    pub traffic: Arc<Traffic>,
}

impl HttpConnector for PatientConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Patient {
            inner: ReqwestConnector::default().connect(options)?,
            patience: self.patience,
            traffic: Arc::clone(&self.traffic),
        }))
    }
}

#[derive(Debug)]
struct Patient {
    inner: HttpClient,
    patience: Patience,
    traffic: Arc<Traffic>,
}

impl Patient {
    async fn send(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        // It was signed without it, as it is allowed for what a proxy on the way might add.
        if let Some(context) = current()
            && let Ok(value) = context.to_string().parse()
        {
            request.headers_mut().insert(TRACEPARENT, value);
        }
        let quiet_until = *self.traffic.quiet.borrow();
        sleep_until(quiet_until).await;
        let within = if matches!(request.method().as_str(), "GET" | "HEAD") {
            self.patience.silence
        } else {
            let mib = u32::try_from(request.body().content_length() >> 20).unwrap_or(u32::MAX);
            self.patience.answer + FOR_EACH_MIB.saturating_mul(mib)
        };
        let at = request.uri().authority().map(ToString::to_string);
        let at = at.unwrap_or_default();
        let response = tokio::time::timeout(within, self.inner.execute(request)).await;
        let response = response
            .unwrap_or_else(|_| Err(Silence(within).into_error()))
            .inspect_err(|e| self.traffic.tell(&at, &root(e)))?;
        if response.status().is_server_error() || response.status().as_u16() == 429 {
            self.traffic
                .tell(&at, &format_args!("it answers {}", response.status()));
        }
        self.traffic.note(&response);
        let (parts, body) = response.into_parts();
        let body = HttpResponseBody::new(Watched {
            inner: body,
            within: self.patience.silence,
            timer: None,
        });
        Ok(HttpResponse::from_parts(parts, body))
    }
}

impl HttpService for Patient {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(self.send(request))
    }
}

/// The cause of all.
fn root(error: &HttpError) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Nothing came.
#[derive(Debug)]
struct Silence(Duration);

impl Silence {
    fn into_error(self) -> HttpError {
        HttpError::new(HttpErrorKind::Timeout, self)
    }
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing came for {:?}", self.0)
    }
}

impl std::error::Error for Silence {}

/// A body that fails when nothing of it comes for a while. Time in which nobody asks for it does not
/// count.
struct Watched {
    inner: HttpResponseBody,
    within: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Body for Watched {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) {
            self.timer = None;
            return Poll::Ready(frame);
        }
        let within = self.within;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(within)));
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => {
                self.timer = None;
                Poll::Ready(Some(Err(Silence(within).into_error())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
