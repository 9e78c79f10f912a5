//! What is a call of gRPC, for servers that answer other requests as well.

use http::{Method, Request, Version, header};

/// The type of the content of a call.
const CONTENT: &str = "application/grpc";

/// What is said to whoever sends something else to where calls are answered.
pub const NO_CALL: &str =
    "calls here are of gRPC: POST over HTTP/2 with the content type application/grpc";

/// Whether a request is a call. A page in somebody's browser can send the bytes of one to his own
/// machine without asking first, but neither over HTTP/2 without TLS nor with this type of content.
#[must_use]
pub fn is_call<B>(request: &Request<B>) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let rest = kind.strip_prefix(CONTENT);
    request.version() == Version::HTTP_2
        && request.method() == Method::POST
        && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
}
