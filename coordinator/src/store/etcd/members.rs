//! The way to etcd's members: one connection each, one of them in use, and what is known of how
//! etcd is.
//!
//! A call goes to the member in use. When that does not answer, or says that it cannot, the next one
//! is asked, until the caller's patience ends. What kept etcd from serving is kept as [`Trouble`],
//! for people; the first success clears it.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use emberline_common::time::Timestamp;
use etcd_client::{Client, ConnectOptions, Error};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, timeout},
};
use tonic::Code;

use super::{Certificates, EtcdConfig, EtcdTls};
use crate::store::{StoreError, TroubleKind};

/// How long one member may take to answer, before the next one is asked.
const TRY_WITHIN: Duration = Duration::from_millis(1000);
const CONNECT_WITHIN: Duration = Duration::from_millis(500);
/// A connection over which nothing comes is asked, and given up when it stays silent.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(1));
const FIRST_BACKOFF: Duration = Duration::from_millis(5);
const MAX_BACKOFF: Duration = Duration::from_millis(250);
/// How often a refusal, which a person has to mend, is tried again.
const AFTER_REFUSAL: Duration = Duration::from_secs(1);

/// Why a call came to nothing.
#[derive(Debug)]
pub(super) enum CallError {
    /// The revision that was asked for is compacted.
    Compacted,
    /// etcd has no such lease.
    NoLease,
    /// etcd understood and refused; trying again changes nothing by itself.
    Refused(String),
    /// The patience ended.
    GaveUp(String),
}

impl CallError {
    pub(super) fn into_store(self, what: &'static str) -> StoreError {
        let text = match self {
            Self::Compacted => "etcd has compacted what was asked for".to_owned(),
            Self::NoLease => "etcd does not know the lease".to_owned(),
            Self::Refused(text) | Self::GaveUp(text) => text,
        };
        StoreError::failed(what, text)
    }
}

/// What keeps etcd from serving, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    kind: Kind,
    pub(super) since: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// No member can be reached.
    Unreachable { members: String, why: String },
    /// Members answer, but they have no leader.
    NoQuorum,
    /// The alarm NOSPACE: nothing can be written.
    NoSpace,
    /// Wrong user, missing permission, bad certificate.
    Refused(String),
}

impl Trouble {
    pub(super) const fn kind(&self) -> TroubleKind {
        match self.kind {
            Kind::Unreachable { .. } => TroubleKind::Unreachable,
            Kind::NoQuorum => TroubleKind::NoQuorum,
            Kind::NoSpace => TroubleKind::NoSpace,
            Kind::Refused(_) => TroubleKind::Refused,
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.since;
        match &self.kind {
            Kind::Unreachable { members, why } => write!(
                f,
                "read-only: no etcd member of {members} can be reached since {since} ({why})"
            ),
            Kind::NoQuorum => write!(f, "read-only: etcd has no quorum since {since}"),
            Kind::NoSpace => write!(
                f,
                "read-only: etcd is out of space since {since} (alarm NOSPACE): compact and defragment it, then disarm the alarm"
            ),
            Kind::Refused(why) => {
                write!(f, "read-only: etcd refuses since {since}: {why}")
            }
        }
    }
}

/// How long a caller goes on trying.
#[derive(Debug, Clone, Copy)]
pub(super) enum Patience {
    /// For ever: whoever calls is cancelled from outside.
    Endless,
    /// Until then.
    Until(Instant),
    /// Until then, but a refusal is told at once.
    Checking(Instant),
}

struct Member {
    url: String,
    client: ArcSwapOption<Connected>,
    /// Held by whoever connects.
    connecting: Mutex<()>,
}

/// A connection, and the certificates that it was made with.
struct Connected {
    client: Client,
    certificates: Option<Arc<Certificates>>,
}

/// All members.
pub(super) struct Members {
    members: Vec<Member>,
    options: ConnectOptions,
    tls: Option<EtcdTls>,
    current: AtomicUsize,
    trouble: watch::Sender<Option<Trouble>>,
}

/// What one failed try means.
enum Failure {
    Call(CallError),
    Trouble(Kind),
    /// Too many requests: nothing is wrong but the load.
    Busy,
}

impl Members {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() {
            return Err(StoreError::Config("name at least one etcd member".into()));
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_WITHIN)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some((user, password)) = &config.user {
            options = options
                .with_user(user, password)
                .with_auto_token_refresh(true);
        }
        let members = config
            .endpoints
            .iter()
            .map(|url| checked(url, config.tls.is_some()))
            .map(|url| {
                Ok(Member {
                    url: url?,
                    client: ArcSwapOption::empty(),
                    connecting: Mutex::new(()),
                })
            });
        Ok(Self {
            members: members.collect::<Result<_, StoreError>>()?,
            options,
            tls: config.tls.clone(),
            current: AtomicUsize::new(0),
            trouble: watch::Sender::new(None),
        })
    }

    /// What keeps etcd from serving now.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.trouble.borrow().clone()
    }

    /// Calls, until it is answered or the patience ends.
    pub(super) async fn call<T, F>(
        &self,
        patience: Patience,
        mut call: impl FnMut(Client) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut backoff = FIRST_BACKOFF;
        let mut tries = 0;
        loop {
            tries += 1;
            let at = self.current.load(Ordering::Relaxed);
            let tried = timeout(TRY_WITHIN, async {
                let client = self.client(at).await?;
                call(client).await
            });
            let failure = match tried.await {
                Ok(Ok(value)) => {
                    self.served();
                    return Ok(value);
                }
                Ok(Err(e)) => self.classify(&e),
                Err(_) => Failure::Trouble(Kind::NoQuorum),
            };
            let why = match failure {
                Failure::Call(e) => {
                    self.served();
                    return Err(e);
                }
                Failure::Trouble(Kind::Refused(why)) => {
                    self.note(Kind::Refused(why.clone()));
                    if matches!(patience, Patience::Checking(_)) {
                        return Err(CallError::Refused(why));
                    }
                    backoff = AFTER_REFUSAL;
                    why
                }
                // One member that is down is no trouble: that is what the others are for.
                Failure::Trouble(kind) if tries < self.members.len() => {
                    let why = format!("etcd's member {} does not serve: {kind:?}", self.url(at));
                    tracing::debug!("{why}");
                    self.leave(at);
                    continue;
                }
                Failure::Trouble(kind) => self.note(kind),
                Failure::Busy => "etcd has too many requests".to_owned(),
            };
            self.leave(at);
            let wait = jittered(backoff);
            if let Patience::Until(end) | Patience::Checking(end) = patience
                && Instant::now() + wait >= end
            {
                return Err(CallError::GaveUp(why));
            }
            sleep(wait).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// The member in use, for a stream that lives longer than a call.
    pub(super) async fn streaming(&self) -> Result<(usize, Client), Error> {
        let at = self.current.load(Ordering::Relaxed);
        Ok((at, self.client(at).await?))
    }

    /// No longer uses this member, if it is the one in use.
    pub(super) fn leave(&self, at: usize) {
        let next = (at + 1) % self.members.len();
        let _ = self
            .current
            .compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Something was written: there is room.
    pub(super) fn wrote(&self) {
        if self.trouble.borrow().is_some() {
            self.clear(|_| true);
        }
    }

    /// Something was answered. That does not say that there is room.
    fn served(&self) {
        if self.trouble.borrow().is_some() {
            self.clear(|kind| *kind != Kind::NoSpace);
        }
    }

    fn clear(&self, which: impl Fn(&Kind) -> bool) {
        self.trouble.send_if_modified(|trouble| {
            let over = trouble.as_ref().is_some_and(|t| which(&t.kind));
            if over {
                tracing::info!("etcd serves again");
                *trouble = None;
            }
            over
        });
    }

    /// Keeps what is wrong; the first time counts as its beginning. Gives back the text of it.
    fn note(&self, kind: Kind) -> String {
        self.trouble.send_if_modified(|trouble| {
            let since = match trouble.as_ref() {
                // A member that answers says more than one that does not.
                Some(t) if matches!(kind, Kind::Unreachable { .. }) && t.kind == Kind::NoQuorum => {
                    return false;
                }
                Some(t) if same(&t.kind, &kind) => return false,
                Some(t) if t.kind != Kind::NoSpace => t.since,
                _ => Timestamp::now(),
            };
            let now = Trouble { kind, since };
            tracing::warn!("{now}");
            *trouble = Some(now);
            true
        });
        let now = self.trouble.borrow();
        now.as_ref().map(ToString::to_string).unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn url(&self, at: usize) -> &str {
        &self.members[at % self.members.len()].url
    }

    pub(super) async fn client(&self, at: usize) -> Result<Client, Error> {
        let member = &self.members[at % self.members.len()];
        let certificates = match &self.tls {
            Some(tls) => Some(tls.files.current().await),
            None => None,
        };
        let known = || {
            let connected = member.client.load();
            let fits = |c: &Arc<Connected>| match (&c.certificates, &certificates) {
                (Some(used), Some(now)) => Arc::ptr_eq(used, now),
                (None, None) => true,
                _ => false,
            };
            let fitting = connected.as_ref().filter(|connected| fits(connected));
            fitting.map(|connected| connected.client.clone())
        };
        if let Some(client) = known() {
            return Ok(client);
        }
        let _one_at_a_time = member.connecting.lock().await;
        if let Some(client) = known() {
            return Ok(client);
        }
        let mut options = self.options.clone();
        if let Some(certificates) = &certificates {
            options = options.with_tls(certificates.options());
        }
        let client = Client::connect([member.url.as_str()], Some(options)).await?;
        // What goes on over the one before, goes on.
        member.client.store(Some(Arc::new(Connected {
            client: client.clone(),
            certificates,
        })));
        Ok(client)
    }

    fn classify(&self, e: &Error) -> Failure {
        let unreachable = |why: String| {
            let urls: Vec<&str> = self.members.iter().map(|m| m.url.as_str()).collect();
            Failure::Trouble(Kind::Unreachable {
                members: urls.join(", "),
                why,
            })
        };
        let status = match e {
            Error::GRpcStatus(status) => status,
            Error::LeaseKeepAliveError(text) if text.contains("not found") => {
                return Failure::Call(CallError::NoLease);
            }
            e => return unreachable(causes(e)),
        };
        let text = status.message();
        match status.code() {
            Code::OutOfRange if text.contains("compacted") => Failure::Call(CallError::Compacted),
            Code::NotFound if text.contains("lease not found") => Failure::Call(CallError::NoLease),
            Code::ResourceExhausted if text.contains("space exceeded") => {
                Failure::Trouble(Kind::NoSpace)
            }
            Code::ResourceExhausted => Failure::Busy,
            Code::Unauthenticated
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::Unimplemented => Failure::Trouble(Kind::Refused(text.to_owned())),
            _ if text.starts_with("etcdserver") => Failure::Trouble(Kind::NoQuorum),
            _ => unreachable(causes(status)),
        }
    }
}

fn same(a: &Kind, b: &Kind) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}

/// The innermost cause: what an operating system or a TLS library says.
pub(super) fn causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(inner) = next {
        text = inner.to_string();
        next = inner.source();
    }
    text
}

/// Between half of it and all of it, so that coordinators do not all try at once.
fn jittered(backoff: Duration) -> Duration {
    let mut byte = [0_u8];
    // Without randomness they do.
    let _ = getrandom::fill(&mut byte);
    backoff.mul_f64(0.5 + f64::from(byte[0]) / 512.0)
}

/// The URL of a member, or what is wrong with it.
fn checked(url: &str, tls: bool) -> Result<String, StoreError> {
    let url = url.trim();
    let wrong = |why: &str| {
        StoreError::Config(format!(
            "the etcd member `{}` {why}; write e.g. `http://127.0.0.1:2379`",
            url.escape_debug()
        ))
    };
    let (scheme, rest) = url
        .split_once("://")
        .ok_or_else(|| wrong("has no scheme"))?;
    match scheme {
        "https" => {}
        "http" if tls => {
            return Err(wrong(
                "is `http:` although certificates are given: use `https:`",
            ));
        }
        "http" => {}
        _ => return Err(wrong("is neither `http:` nor `https:`")),
    }
    let host = rest.trim_end_matches('/');
    match host.parse::<http::uri::Authority>() {
        Ok(authority) if !host.contains('@') && authority.port_u16().is_some() => {
            Ok(format!("{scheme}://{host}"))
        }
        Ok(_) if host.contains('@') => Err(wrong("has a user in it: use `--etcd-user`")),
        Ok(_) => Err(wrong("has no port")),
        Err(_) => Err(wrong("has no host and port")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_member_has_a_scheme_a_host_and_a_port() {
        assert_eq!(
            checked("http://a:2379/", false).unwrap(),
            "http://a:2379".to_owned()
        );
        for (url, tls, what) in [
            ("a:2379", false, "no scheme"),
            ("ftp://a:2379", false, "neither"),
            ("http://a", false, "no port"),
            ("http://a:2379", true, "https"),
            ("http://", false, "no host"),
            ("http://u:p@a:2379", false, "--etcd-user"),
        ] {
            let text = checked(url, tls).unwrap_err().to_string();
            assert!(text.contains(what), "{url}: {text}");
        }
    }
}
