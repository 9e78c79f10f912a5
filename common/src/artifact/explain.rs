//! What an object store's error means, and what to do about it, in one line.
//!
//! object_store gives the server's answer as text, XML and all, and the cause of a broken connection
//! some levels down. Both are read here, and nowhere else.

use std::{error::Error as _, fmt};

use object_store::client::{HttpError, HttpErrorKind};

/// Why an object store failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// The server does not accept who asks: key, secret or token.
    Credentials,
    /// Who asks may not do this.
    Permission,
    /// There is no such bucket.
    Bucket,
    /// The bucket is in another region.
    Region,
    /// The clocks of both sides differ too much.
    Clock,
    /// Nobody answers at the endpoint.
    Unreachable,
    /// `http` where `https` is spoken, or the other way round, or a certificate that is not trusted.
    Scheme,
    /// The server is overloaded or ill; it was tried again for as long as that made sense.
    Busy,
    /// Nothing came for too long, or the connection broke.
    Broken,
    /// Something else.
    Other,
}

impl StoreFault {
    /// Whether the same request may do better later, with nothing changed by anyone.
    #[must_use]
    pub const fn is_passing(self) -> bool {
        matches!(self, Self::Unreachable | Self::Busy | Self::Broken)
    }
}

/// What went wrong, for programs and for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// For programs.
    pub fault: StoreFault,
    /// For people: what was seen, in one line.
    pub cause: String,
    /// What to do about it, where that is known.
    pub advice: Option<String>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)?;
        match &self.advice {
            Some(advice) => write!(f, ": {advice}"),
            None => Ok(()),
        }
    }
}

/// Explains an error.
#[must_use]
pub fn explain(error: &object_store::Error) -> Explanation {
    let text = error.to_string();
    if text.contains("Error getting credentials") || text.contains("169.254.1") {
        return told(
            StoreFault::Credentials,
            "no credentials were found",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        );
    }
    if text.contains("redirect without LOCATION") || status(&text) == Some(301) {
        return told(
            StoreFault::Region,
            "the bucket is in another region",
            "set AWS_REGION to its own",
        );
    }
    if let Some(status) = status(&text) {
        return answered(status, &text);
    }
    if let Some(http) = http_error(error) {
        return broken(http, &text);
    }
    unknown(one_line(&text))
}

fn told(fault: StoreFault, cause: impl Into<String>, advice: impl Into<String>) -> Explanation {
    Explanation {
        fault,
        cause: cause.into(),
        advice: Some(advice.into()),
    }
}

const fn unknown(cause: String) -> Explanation {
    Explanation {
        fault: StoreFault::Other,
        cause,
        advice: None,
    }
}

/// The server has answered, with this status.
fn answered(status: u16, text: &str) -> Explanation {
    let code = element(text, "Code");
    let named = code.map_or_else(|| format!("HTTP {status}"), str::to_owned);
    let message = element(text, "Message").map(one_line).unwrap_or_default();
    let with_message = [named.as_str(), &message].join(" ").trim_end().to_owned();
    match (code.unwrap_or_default(), status) {
        ("InvalidAccessKeyId" | "NotSignedUp", _) => told(
            StoreFault::Credentials,
            format!("the server does not know the access key ({named})"),
            "check AWS_ACCESS_KEY_ID",
        ),
        ("SignatureDoesNotMatch", _) => told(
            StoreFault::Credentials,
            format!("the secret key does not fit the access key ({named})"),
            "check AWS_SECRET_ACCESS_KEY",
        ),
        ("ExpiredToken" | "InvalidToken" | "TokenRefreshRequired", _) => told(
            StoreFault::Credentials,
            format!("the session token has expired or is wrong ({named})"),
            "get a new one, and set AWS_SESSION_TOKEN",
        ),
        ("RequestTimeTooSkewed", _) => told(
            StoreFault::Clock,
            format!("the clock of this machine and that of the server differ too much ({named})"),
            "set the time on both, e.g. by NTP",
        ),
        ("NoSuchBucket", _) => told(
            StoreFault::Bucket,
            format!("the bucket does not exist ({named})"),
            "make it, or name another one",
        ),
        ("AuthorizationHeaderMalformed" | "IllegalLocationConstraintException", _) => told(
            StoreFault::Region,
            format!("the bucket is in another region ({with_message})"),
            "set AWS_REGION to its own",
        ),
        (_, 401 | 403) => told(
            StoreFault::Permission,
            format!("access is denied ({named})"),
            "check the credentials, and give them the right to read, write, list and delete in the bucket",
        ),
        ("SlowDown" | "ServiceUnavailable" | "InternalError", _) | (_, 429 | 500..=599) => told(
            StoreFault::Busy,
            format!("the server is overloaded or ill ({with_message}), also after several tries"),
            "try again later, or look at its log",
        ),
        (_, 400) if text.contains("HTTPS server") || text.contains("HTTPS port") => told(
            StoreFault::Scheme,
            "the server wants TLS",
            "write `https://` in AWS_ENDPOINT_URL",
        ),
        (_, 404) => unknown(format!("it is not there ({named})")),
        ("", _) => unknown(format!(
            "the server answered {named}: {}",
            one_line(body(text))
        )),
        _ => unknown(format!("the server answered {with_message}")),
    }
}

/// There was no answer, or not the whole of it.
fn broken(http: &HttpError, text: &str) -> Explanation {
    let mut cause: &(dyn std::error::Error + 'static) = http;
    let mut all = String::new();
    while let Some(next) = cause.source() {
        cause = next;
        all.push_str(&cause.to_string());
    }
    let cause = one_line(&cause.to_string());
    let at = endpoint(text).unwrap_or_else(|| "the server".to_owned());
    if all.contains("InvalidContentType") {
        return told(
            StoreFault::Scheme,
            format!("{at} does not speak TLS"),
            "write `http://` in AWS_ENDPOINT_URL",
        );
    }
    if all.contains("certificate") {
        return told(
            StoreFault::Scheme,
            format!("the certificate of {at} is not trusted ({cause})"),
            "set AWS_CA_BUNDLE to the file of its authority",
        );
    }
    if at.starts_with("http:") && all.contains("invalid HTTP version") {
        return told(
            StoreFault::Scheme,
            format!("{at} does not speak plain HTTP"),
            "write `https://` in AWS_ENDPOINT_URL",
        );
    }
    let look = "look at its log and at the network";
    match http.kind() {
        HttpErrorKind::Connect => told(
            StoreFault::Unreachable,
            format!("cannot connect to {at} ({cause})"),
            "check AWS_ENDPOINT_URL, and that it runs",
        ),
        HttpErrorKind::Timeout => told(
            StoreFault::Broken,
            format!("{at} is silent ({cause}), also after several tries"),
            look,
        ),
        _ => told(
            StoreFault::Broken,
            format!("the connection to {at} broke ({cause}), also after several tries"),
            look,
        ),
    }
}

fn http_error(error: &object_store::Error) -> Option<&HttpError> {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(http) = error.downcast_ref::<HttpError>() {
            return Some(http);
        }
        next = error.source();
    }
    None
}

/// The status of the answer that the text tells.
fn status(text: &str) -> Option<u16> {
    let (_, after) = text.split_once("status code: ")?;
    after.get(..3)?.parse().ok()
}

/// What the server said beside the status.
fn body(text: &str) -> &str {
    let after = text.split_once("status code: ").map_or(text, |(_, a)| a);
    after.split_once(": ").map_or(after, |(_, b)| b)
}

/// The content of the first XML element of that name.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, after) = text.split_once(&format!("<{name}>"))?;
    let (content, _) = after.split_once(&format!("</{name}>"))?;
    Some(content.trim()).filter(|c| !c.is_empty())
}

/// Scheme and host of the first URL in the text.
fn endpoint(text: &str) -> Option<String> {
    let mut words = text.split_whitespace();
    let url = words.find(|w| w.starts_with("http://") || w.starts_with("https://"))?;
    let url = url::Url::parse(url).ok()?;
    let port = url.port().map(|p| format!(":{p}")).unwrap_or_default();
    Some(format!("{}://{}{port}", url.scheme(), url.host_str()?))
}

/// Without line breaks, control characters and markup, and not endless.
fn one_line(text: &str) -> String {
    let plain = text.replace(['<', '>'], " ");
    let mut out = String::new();
    for word in plain.split(|c: char| c.is_whitespace() || c.is_control()) {
        if !word.is_empty() {
            if !out.is_empty() {
                out.push(' ');
            }
            out.push_str(word);
        }
    }
    if let Some((at, _)) = out.char_indices().nth(300) {
        out.truncate(at);
        out.push('…');
    }
    out
}
