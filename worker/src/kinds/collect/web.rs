//! Files of other machines: HTTP and S3.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use emberline_common::{
    artifact::{StoreFault, explain, open_s3},
    spec::kinds::collect::Source,
    time::Timestamp,
    tls,
};
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, path::Path};
use reqwest::{
    StatusCode,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{self, HeaderValue},
    redirect::Policy,
};
use tokio::sync::watch;
use url::Url;

use super::{Reach, Snapshot, matches, name_of, one_file_only, shown};
use crate::stage::{StageError, StopReason};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a server may send nothing.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;

/// Takes the one file that an `http:` or `https:` URL names.
pub(super) async fn http(
    snapshot: &mut Snapshot<'_>,
    source: &Source,
    url: Url,
) -> Result<(), StageError> {
    let named = shown(&source.url);
    let ip = match url.host() {
        Some(url::Host::Ipv4(ip)) => Some(IpAddr::from(ip)),
        Some(url::Host::Ipv6(ip)) => Some(IpAddr::from(ip)),
        _ => None,
    };
    if let Some(Err(why)) = ip.map(|ip| snapshot.reach.check(ip)) {
        return Err(StageError::user(format!("`{named}` {REFUSED} {why}")));
    }
    let bearer = bearer(snapshot, source, &url, ip)?;
    let last = url
        .path_segments()
        .and_then(Iterator::last)
        .unwrap_or_default();
    let last = percent_decoded(last);
    if source.name.is_none() && last.is_empty() {
        return Err(StageError::user(format!(
            "the URL `{named}` names no file: give it a name by `as`"
        )));
    }
    let client = client(&url, snapshot.reach)
        .map_err(|e| StageError::system(format!("cannot set up HTTP: {e}")))?;
    let mut stop = snapshot.ctx.stop.clone();
    let mut request = client.get(url);
    if let Some(bearer) = bearer {
        request = request.header(header::AUTHORIZATION, bearer);
    }
    let sent = request.send();
    let mut response = or_stop(snapshot, &mut stop, sent)
        .await?
        .map_err(|e| request_error(&named, &e))?;
    let status = response.status();
    if !status.is_success() {
        let message = format!("`{named}` answered {status}");
        return Err(match status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
                StageError::storage(message)
            }
            status if status.is_server_error() => StageError::storage(message),
            status if status.is_redirection() => StageError::user(format!(
                "{message}: it redirects to another host, which is not followed; name the \
                 final URL"
            )),
            _ => StageError::user(message),
        });
    }
    let modified = response.headers().get(header::LAST_MODIFIED);
    let modified = modified.and_then(|at| Timestamp::parse_http(at.to_str().ok()?));
    let mut incoming = snapshot.begin(name_of(source, &last))?;
    loop {
        let piece = or_stop(snapshot, &mut stop, response.chunk()).await?;
        match piece.map_err(|e| request_error(&named, &e))? {
            Some(piece) => snapshot.write(&mut incoming, &piece)?,
            None => return snapshot.end(incoming, source.sha256, modified),
        }
    }
}

/// What to send as `Authorization`, if the source says so: never in the clear over a network.
fn bearer(
    snapshot: &Snapshot<'_>,
    source: &Source,
    url: &Url,
    ip: Option<IpAddr>,
) -> Result<Option<HeaderValue>, StageError> {
    let Some(name) = &source.bearer else {
        return Ok(None);
    };
    if url.scheme() != "https" && !ip.is_some_and(|ip| ip.is_loopback()) {
        return Err(StageError::user(format!(
            "`{}` would send the secret `{name}` for everybody to read: use `https:`",
            shown(&source.url)
        )));
    }
    let value = format!("Bearer {}", snapshot.ctx.secret(name)?.reveal());
    let mut value = HeaderValue::from_str(&value)
        .map_err(|_| StageError::user(format!("the secret `{name}` cannot be sent in a header")))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn client(url: &Url, reach: &Arc<Reach>) -> reqwest::Result<reqwest::Client> {
    tls::install_crypto_provider();
    let origin = url.clone();
    let same_host = Policy::custom(move |attempt| {
        let to = attempt.url();
        let same = to.host() == origin.host()
            && (to.scheme() == origin.scheme() || to.scheme() == "https")
            && (to.port() == origin.port());
        if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("too many redirects")
        } else if same {
            attempt.follow()
        } else {
            attempt.stop()
        }
    });
    reqwest::Client::builder()
        .user_agent(concat!("emberline/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(same_host)
        .referer(false)
        .dns_resolver(Arc::new(WithinReach(Arc::clone(reach))))
        .build()
}

/// Waits, but not once the attempt is to stop.
async fn or_stop<T>(
    snapshot: &Snapshot<'_>,
    stop: &mut watch::Receiver<Option<StopReason>>,
    work: impl Future<Output = T>,
) -> Result<T, StageError> {
    tokio::select! {
        done = work => Ok(done),
        _ = stop.wait_for(Option::is_some) => {
            snapshot.ctx.check_cancelled()?;
            Err(StageError::cancelled())
        }
    }
}

fn request_error(url: &str, error: &reqwest::Error) -> StageError {
    // The whole chain, for the innermost says why; but no URL of it, which may have a secret.
    let mut why = Vec::new();
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        why.push(error.to_string());
        next = error.source();
    }
    let what = if error.is_timeout() {
        "it did not answer in time"
    } else if error.is_connect() {
        "it cannot be reached"
    } else if error.is_redirect() {
        "it redirects too often"
    } else {
        "the transfer broke off"
    };
    let why = why.join(": ");
    if why.contains(REFUSED) {
        return StageError::user(format!("`{url}`: {why}"));
    }
    StageError::storage(format!("cannot fetch `{url}`: {what} ({why})"))
}

/// What is said of a place that may not be reached, before what it is.
const REFUSED: &str = "is refused: it is";

/// Resolves names, and leaves out the addresses that may not be reached: a name may point anywhere.
/// What is left is where the connection goes to; nobody resolves the name again.
struct WithinReach(Arc<Reach>);

impl WithinReach {
    fn of(&self, name: &str, found: impl Iterator<Item = SocketAddr>) -> Result<Addrs, String> {
        if self.0.knows(name) {
            return Ok(Box::new(found.collect::<Vec<_>>().into_iter()));
        }
        let mut refused = None;
        let mut allowed = Vec::new();
        for at in found {
            match self.0.check(at.ip()) {
                Ok(()) => allowed.push(at),
                Err(why) => refused = Some((at.ip(), why)),
            }
        }
        match refused {
            Some((ip, why)) if allowed.is_empty() => Err(format!("{name} {REFUSED} {ip}, {why}")),
            _ => Ok(Box::new(allowed.into_iter())),
        }
    }
}

impl Resolve for WithinReach {
    fn resolve(&self, name: Name) -> Resolving {
        let this = Self(Arc::clone(&self.0));
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            Ok(this.of(name.as_str(), found)?)
        })
    }
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = bytes.get(at + 1..at + 3).filter(|_| *byte == b'%');
        let hex = hex.filter(|hex| hex.iter().all(u8::is_ascii_hexdigit));
        let decoded = hex
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        out.push(decoded.unwrap_or(*byte));
        at += if decoded.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Takes what an `s3:` URL names: an object, everything below a prefix (`…/`), or a pattern.
pub(super) async fn s3(
    snapshot: &mut Snapshot<'_>,
    source: &Source,
    url: &Url,
) -> Result<(), StageError> {
    let named = shown(&source.url);
    let failed = |e: object_store::Error| match e {
        object_store::Error::NotFound { .. } if explain(&e).fault != StoreFault::Bucket => {
            StageError::user(format!("there is no object `{named}`"))
        }
        e if matches!(
            explain(&e).fault,
            StoreFault::Permission | StoreFault::Credentials
        ) =>
        {
            StageError::user(format!(
                "`{named}` may not be read with the credentials of this worker"
            ))
        }
        e if explain(&e).fault.is_passing() => {
            StageError::storage(format!("cannot read `{named}`: {}", explain(&e)))
        }
        e => StageError::user(format!("cannot read `{named}`: {}", explain(&e))),
    };
    let store = open_s3(&source.url).map_err(failed)?;
    let key = percent_decoded(url.path().trim_start_matches('/'));
    let (dir, last) = key.rsplit_once('/').unwrap_or(("", &key));
    let wrong =
        |e: object_store::path::Error| StageError::user(format!("`{named}` names no object: {e}"));
    let mut stop = snapshot.ctx.stop.clone();
    let mut found: Vec<(Path, String)> = Vec::new();
    if last.is_empty() || last.contains('*') {
        one_file_only(source)?;
        let prefix = Path::parse(dir).map_err(wrong)?;
        let mut objects = store.list(Some(&prefix));
        while let Some(object) = or_stop(snapshot, &mut stop, objects.try_next())
            .await?
            .map_err(failed)?
        {
            let Some(name) = object.location.prefix_match(&prefix).map(|parts| {
                parts
                    .map(|part| part.as_ref().to_owned())
                    .collect::<Vec<_>>()
                    .join("/")
            }) else {
                continue;
            };
            if last.is_empty() || (!name.contains('/') && matches(last, &name)) {
                found.push((object.location, name));
            }
        }
        if found.is_empty() {
            return Err(StageError::user(format!("no object matches `{named}`")));
        }
        found.sort_unstable();
    } else {
        let name = name_of(source, last).to_owned();
        found.push((Path::parse(&key).map_err(wrong)?, name));
    }
    for (key, name) in found {
        let object = or_stop(snapshot, &mut stop, store.get(&key))
            .await?
            .map_err(failed)?;
        let modified = u64::try_from(object.meta.last_modified.timestamp_micros());
        let modified = modified.ok().map(Timestamp);
        let mut pieces = object.into_stream();
        let mut incoming = snapshot.begin(&name)?;
        while let Some(piece) = or_stop(snapshot, &mut stop, pieces.next()).await? {
            snapshot.write(&mut incoming, &piece.map_err(failed)?)?;
        }
        snapshot.end(incoming, source.sha256, modified)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    #[test]
    fn of_a_name_only_the_addresses_within_reach_are_left() {
        let found = |addresses: &[&str]| {
            let all = addresses
                .iter()
                .map(|a| SocketAddr::new(a.parse().unwrap(), 0));
            all.collect::<Vec<_>>().into_iter()
        };
        let resolver = WithinReach(Arc::default());
        let mixed = [
            "127.0.0.1",
            "93.184.216.34",
            "::ffff:169.254.169.254",
            "10.0.0.1",
        ];
        let left: Vec<_> = resolver.of("x.example", found(&mixed)).unwrap().collect();
        assert_eq!(
            left,
            found(&["93.184.216.34", "10.0.0.1"]).collect::<Vec<_>>()
        );
        let Err(why) = resolver.of("x.example", found(&["::1", "127.0.0.1"])) else {
            panic!("nothing of it may be reached");
        };
        assert_eq!(
            why,
            "x.example is refused: it is 127.0.0.1, the worker's own machine"
        );
        let reach = Reach::default().allow(["x.example".parse().unwrap()]);
        let resolver = WithinReach(Arc::new(reach));
        assert_eq!(resolver.of("X.example", found(&mixed)).unwrap().count(), 4);
        assert!(resolver.of("y.example", found(&["::1"])).is_err());
    }

    #[test]
    fn names_are_decoded() {
        assert_eq!(percent_decoded("a%20b%2Fc%zz%"), "a b/c%zz%");
    }
}
