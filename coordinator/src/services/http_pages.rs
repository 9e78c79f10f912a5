//! What is answered over plain HTTP: metrics whoever leads, and events of others by the leader.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use emberline_common::{
    grpc,
    telemetry::{Telemetry, metrics_page},
};
use emberline_proto::v1::TakeEventResponse;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::{Value, json};
use tonic::{Code, Status, body::Body};

use super::{ANSWER_WITHIN, Context, dora::Dora};
use crate::{events::MAX_EVENT_BYTES, runtime::RETRY_HINT, store::Leader};

/// Where Prometheus finds the metrics of this process.
pub(super) use emberline_common::telemetry::METRICS_PATH as METRICS;

/// Where outside systems post CDEvents to.
pub(super) const EVENTS: &str = "/events";

/// How long an event may take to arrive.
const ARRIVES_WITHIN: Duration = Duration::from_secs(10);

/// The metrics of this process, in Prometheus' text format.
pub(super) fn metrics(telemetry: &Telemetry, method: &Method) -> Response<Body> {
    metrics_page(telemetry, method).map(Body::new)
}

fn answer(status: StatusCode, value: &Value) -> Response<Body> {
    let mut answer = Response::new(Body::new(format!("{value}\n")));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

fn refused(status: StatusCode, why: &str) -> Response<Body> {
    answer(status, &json!({ "error": why }))
}

fn try_again(mut answer: Response<Body>) -> Response<Body> {
    let seconds = HeaderValue::from(RETRY_HINT.as_secs().max(1));
    answer.headers_mut().insert(header::RETRY_AFTER, seconds);
    answer
}

/// The answer to what is no call of gRPC; none to one that is.
pub(super) fn no_call(request: &Request<Body>) -> Option<Response<Body>> {
    (!grpc::is_call(request)).then(|| refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, grpc::NO_CALL))
}

/// Another coordinator leads, or none does: the same request is to go there, or to come again.
pub(super) fn elsewhere(scheme: &str, leader: Option<&Leader>, why: &Status) -> Response<Body> {
    let location = leader.map(|leader| format!("{scheme}://{}{EVENTS}", leader.address));
    match location.and_then(|location| HeaderValue::try_from(location).ok()) {
        Some(location) => {
            let mut answer = refused(StatusCode::TEMPORARY_REDIRECT, why.message());
            answer.headers_mut().insert(header::LOCATION, location);
            answer
        }
        None => try_again(refused(StatusCode::SERVICE_UNAVAILABLE, why.message())),
    }
}

/// A caller that is turned away.
pub(super) fn denied(why: &Status) -> Response<Body> {
    let mut answer = refused(http_status(why.code()), why.message());
    if why.code() == Code::Unauthenticated {
        let scheme = HeaderValue::from_static("Bearer");
        answer
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, scheme);
    }
    answer
}

/// Reads an event that an outside system posts. Whoever is slow about it holds up nothing but his own
/// connection.
///
/// # Errors
/// The answer, if it is none.
pub(super) async fn read_event(request: Request<Body>) -> Result<Bytes, Response<Body>> {
    if request.method() != Method::POST {
        let mut answer = refused(StatusCode::METHOD_NOT_ALLOWED, "use POST");
        let allowed = HeaderValue::from_static("POST");
        answer.headers_mut().insert(header::ALLOW, allowed);
        return Err(answer);
    }
    // No page in somebody's browser can send these without asking first; and it is told no.
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()?.split(';').next());
    if !matches!(
        kind.map(str::trim),
        Some("application/json" | "application/cloudevents+json")
    ) {
        let why = "send one event as application/json or application/cloudevents+json";
        return Err(refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
    }
    let body = Limited::new(request.into_body(), MAX_EVENT_BYTES).collect();
    match tokio::time::timeout(ARRIVES_WITHIN, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => {
            let why = format!("an event has at most {MAX_EVENT_BYTES} bytes");
            Err(refused(StatusCode::PAYLOAD_TOO_LARGE, &why))
        }
        Ok(Err(_)) => {
            let why = "the event did not arrive whole";
            Err(refused(StatusCode::BAD_REQUEST, why))
        }
        Err(_) => {
            let why = "the event did not arrive in time";
            Err(refused(StatusCode::REQUEST_TIMEOUT, why))
        }
    }
}

/// Takes an event: a CDEvent, or a CloudEvent with one in it.
pub(super) async fn take_event(context: Arc<Context>, event: &[u8]) -> Response<Body> {
    let dora = Dora(context);
    match tokio::time::timeout(ANSWER_WITHIN, dora.take(event)).await {
        Ok(Ok(TakeEventResponse { noted: true, .. })) => {
            answer(StatusCode::OK, &json!({ "noted": true }))
        }
        Ok(Ok(TakeEventResponse { why, .. })) => {
            answer(StatusCode::OK, &json!({ "noted": false, "why": why }))
        }
        Ok(Err(status)) => {
            let refused = refused(http_status(status.code()), status.message());
            match status.code() {
                Code::Unavailable | Code::ResourceExhausted => try_again(refused),
                _ => refused,
            }
        }
        Err(_) => try_again(refused(
            StatusCode::GATEWAY_TIMEOUT,
            "the answer took too long",
        )),
    }
}

/// As the comments in `google/rpc/code.proto` pair them.
const fn http_status(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument | Code::FailedPrecondition => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
