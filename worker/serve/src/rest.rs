//! The REST side of the protocol: paths, bodies and status codes. It translates, and nothing else.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use emberline_common::grpc::NO_CALL;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::{Value, json};
use tonic::{Code, Status, body::Body};

use crate::{
    access,
    body::Metered,
    error::{InferError, RETRY_AFTER, cut},
    feedback::Truth,
    grpc::{classes_of, numbers_of, raw_of, shape_of},
    infer::{self, Answer},
    json::{
        AnswerBody, AnswerData, AnswerOutput, AnswerParameters, FeedbackBody, InferBody, InputBody,
        LabelValue, Parameters,
    },
    relay::{By, Label},
    schema::Output,
    server::Inner,
    tensor::{Contents, Tensor},
};

/// What this server calls itself.
pub(crate) const SERVER: &str = "emberline";
/// What models run on.
pub(crate) const PLATFORM: &str = "emberline_burn";
/// Where the JSON ends and the bytes begin.
const JSON_LENGTH: &str = "inference-header-content-length";
/// Bodies that are longer than this are read on a thread of their own.
const LONG_BODY: usize = 128 << 10;

fn page(status: StatusCode, value: &Value) -> Response<Body> {
    let mut page = Response::new(Body::new(value.to_string()));
    *page.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    page.headers_mut().insert(header::CONTENT_TYPE, kind);
    page
}

/// An answer that says no.
type Refusal = Box<Response<Body>>;

fn refusal(status: StatusCode, why: &str) -> Refusal {
    let mut page = page(status, &json!({ "error": why }));
    if matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        let after = HeaderValue::from(RETRY_AFTER.as_secs());
        page.headers_mut().insert(header::RETRY_AFTER, after);
    }
    Box::new(page)
}

impl From<InferError> for Refusal {
    fn from(error: InferError) -> Self {
        refusal(error.http(), &error.to_string())
    }
}

/// There is nothing at that path.
/// Who may not ask.
pub(crate) fn unauthenticated() -> Response<Body> {
    let mut answer = page(
        StatusCode::UNAUTHORIZED,
        &json!({ "error": access::NEEDED }),
    );
    let scheme = HeaderValue::from_static("Bearer");
    answer
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, scheme);
    answer
}

pub(crate) fn no_such_page(path: &str) -> Response<Body> {
    let why = format!("there is no page `{}`; models answer below /v2", cut(path));
    *refusal(StatusCode::NOT_FOUND, &why)
}

/// For what is sent to where calls of gRPC are answered, and is none.
pub(crate) fn no_call() -> Response<Body> {
    *refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, NO_CALL)
}

fn empty(yes: bool) -> Response<Body> {
    let mut page = Response::new(Body::empty());
    if !yes {
        *page.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    page
}

/// Whether the method is the one that belongs to the path; else the answer.
fn only(method: &Method, allowed: Method) -> Result<(), Refusal> {
    if *method == allowed || (*method == Method::HEAD && allowed == Method::GET) {
        return Ok(());
    }
    let mut page = refusal(
        StatusCode::METHOD_NOT_ALLOWED,
        &format!("use {allowed} here"),
    );
    let allow = match allowed {
        Method::GET => "GET, HEAD",
        _ => "POST",
    };
    page.headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(allow));
    Err(page)
}

/// Answers what is below `/v2`.
pub(crate) async fn answer(inner: &Arc<Inner>, request: Request<Metered>) -> Response<Body> {
    match try_answer(inner, request).await {
        Ok(page) => page,
        Err(refusal) => *refusal,
    }
}

async fn try_answer(
    inner: &Arc<Inner>,
    request: Request<Metered>,
) -> Result<Response<Body>, Refusal> {
    let arrived = Instant::now();
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let get = || only(request.method(), Method::GET);
    match parts.as_slice() {
        ["v2"] => {
            get()?;
            let about = json!({
                "name": SERVER,
                "version": env!("CARGO_PKG_VERSION"),
                "extensions": ["binary_tensor_data", "model_repository"],
            });
            Ok(page(StatusCode::OK, &about))
        }
        ["v2", "health", "live"] => get().map(|()| empty(true)),
        ["v2", "health", "ready"] => get().map(|()| empty(inner.is_ready())),
        ["v2", "repository", "index"] => {
            only(request.method(), Method::POST)?;
            let index = inner.index(false).into_iter().map(|(name, version, state, reason)| {
                json!({ "name": name, "version": version, "state": state, "reason": reason })
            });
            Ok(page(StatusCode::OK, &index.collect()))
        }
        ["v2", "models", model, rest @ ..] => {
            let (version, rest) = match rest {
                ["versions", version, rest @ ..] => (*version, rest),
                rest => ("", rest),
            };
            match rest {
                [] => {
                    get()?;
                    metadata(inner, model, version)
                }
                ["ready"] => {
                    get()?;
                    let routes = inner.routes.load();
                    routes.find(model)?.named(version)?;
                    Ok(empty(true))
                }
                ["infer"] => {
                    only(request.method(), Method::POST)?;
                    let (model, version) = ((*model).to_owned(), version.to_owned());
                    infer(inner, request, model, version, arrived).await
                }
                ["feedback"] if version.is_empty() => {
                    only(request.method(), Method::POST)?;
                    feedback(inner, request, model).await
                }
                _ => Err(Box::new(no_such_page(&path))),
            }
        }
        _ => Err(Box::new(no_such_page(&path))),
    }
}

fn metadata(inner: &Inner, model: &str, version: &str) -> Result<Response<Body>, Refusal> {
    let routes = inner.routes.load();
    let route = routes.find(model)?;
    let version = route.named(version)?;
    let schema = &version.schema;
    let inputs = schema
        .inputs
        .iter()
        .map(|input| json!({ "name": input.name, "datatype": input.datatype(), "shape": [-1] }));
    let outputs = schema.outputs().iter().map(|output| {
        json!({
            "name": output.name(),
            "datatype": output.datatype(),
            "shape": schema.shape_of(*output),
        })
    });
    let versions = route.ready.iter().map(|v| v.text.as_str());
    let about = json!({
        "name": model,
        "versions": versions.collect::<Vec<_>>(),
        "platform": format!("{PLATFORM}_{}", version.family),
        "inputs": inputs.collect::<Vec<_>>(),
        "outputs": outputs.collect::<Vec<_>>(),
    });
    Ok(page(StatusCode::OK, &about))
}

/// The whole body, if it is not too long and does not take too long.
async fn read(inner: &Inner, headers: &HeaderMap, body: Metered) -> Result<Bytes, Refusal> {
    let coding = headers.get(header::CONTENT_ENCODING);
    if coding.is_some_and(|coding| coding != "identity") {
        let why = "send the body as it is: no content encoding is taken";
        return Err(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
    }
    let limits = &inner.config.limits;
    let most = limits.max_request_bytes;
    let too_large = || {
        let why = format!("a request has at most {most} bytes here; send fewer rows at once");
        Refusal::from(InferError::TooLarge(why))
    };
    // Who says beforehand that it is too much need not send it.
    let said = headers.get(header::CONTENT_LENGTH);
    let said = said.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if said.is_some_and(|said| said > most) {
        return Err(too_large());
    }
    match Limited::new(body, most).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        // What the body itself says: too slow, or too much of all together.
        Err(error) => Err(match error.downcast::<Status>() {
            Ok(status) if status.code() == Code::DeadlineExceeded => {
                refusal(StatusCode::REQUEST_TIMEOUT, status.message())
            }
            Ok(status) => InferError::Overloaded(status.message().to_owned()).into(),
            Err(_) => refusal(StatusCode::BAD_REQUEST, "the body did not arrive whole"),
        }),
    }
}

/// Does work that takes longer the longer the body is, on a thread of its own where it is long.
async fn reading<T: Send + 'static>(
    length: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, InferError> {
    if length < LONG_BODY {
        return Ok(work());
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| InferError::Failed("reading the request panicked".to_owned()))
}

/// A request, and which outputs are to come as bytes.
pub(crate) struct Asked {
    pub request: infer::Request,
    all_binary: bool,
    binary: Vec<String>,
}

async fn infer(
    inner: &Arc<Inner>,
    request: Request<Metered>,
    model: String,
    version: String,
    arrived: Instant,
) -> Result<Response<Body>, Refusal> {
    let (head, body) = request.into_parts();
    let body = read(inner, &head.headers, body).await?;
    let json_length = match head.headers.get(JSON_LENGTH) {
        None => body.len(),
        Some(length) => {
            let length = length.to_str().ok().and_then(|text| text.parse().ok());
            length.filter(|length| *length <= body.len()).ok_or_else(|| {
                let why = format!(
                    "the header `Inference-Header-Content-Length` is no length within the body of {} bytes",
                    body.len()
                );
                refusal(StatusCode::BAD_REQUEST, &why)
            })?
        }
    };
    let caller = head.headers.get("traceparent");
    let caller = caller.and_then(|text| text.to_str().ok()?.parse().ok());
    let asked = reading(body.len(), move || {
        let mut asked = asked(&body, json_length)?;
        asked.request.model = model;
        asked.request.version = version;
        asked.request.arrived = arrived;
        asked.request.caller = caller;
        Ok::<_, InferError>(asked)
    });
    let asked = asked.await??;
    let answer = inner.infer(asked.request).await?;
    let is_binary =
        |output: &Output| asked.all_binary || asked.binary.iter().any(|name| name == output.name());
    Ok(answered(&answer, is_binary))
}

fn checked(of: &str, parameters: &Parameters) -> Result<(), InferError> {
    match parameters.unsupported() {
        None => Ok(()),
        Some(name) => Err(InferError::Unsupported(format!(
            "{of} has the parameter `{name}`, which this server does not offer"
        ))),
    }
}

/// What the body asks for.
pub(crate) fn asked(body: &Bytes, json_length: usize) -> Result<Asked, InferError> {
    let parsed: InferBody = serde_json::from_slice(&body[..json_length])
        .map_err(|e| InferError::bad("body", format!("the body is no request: {e}")))?;
    checked("the request", &parsed.parameters)?;
    let mut at = json_length;
    let mut inputs = Vec::with_capacity(parsed.inputs.len());
    for input in parsed.inputs {
        let InputBody {
            name,
            datatype,
            shape,
            parameters,
            data,
        } = input;
        checked(&format!("the input `{}`", cut(&name)), &parameters)?;
        let contents = match (parameters.binary_data_size, data) {
            (Some(_), Some(_)) => {
                let why = "has `data` and `binary_data_size`: send one of them";
                return Err(InferError::column(&name, why));
            }
            (Some(size), None) => {
                let end = at.checked_add(size).filter(|end| *end <= body.len());
                let end = end.ok_or_else(|| {
                    let left = body.len() - at;
                    let why = format!("has {size} bytes after the JSON, of which {left} came");
                    InferError::column(&name, why)
                })?;
                let raw = body.slice(at..end);
                at = end;
                Contents::Raw(raw)
            }
            (None, Some(data)) => Contents::Json(data),
            (None, None) => Contents::Missing,
        };
        inputs.push(Tensor {
            name,
            datatype,
            shape,
            contents,
        });
    }
    if at < body.len() {
        let why = format!(
            "{} bytes follow the JSON that belong to no input: set `binary_data_size` and the header `Inference-Header-Content-Length`",
            body.len() - at
        );
        return Err(InferError::bad("body", why));
    }
    let mut outputs = Vec::with_capacity(parsed.outputs.len());
    let mut binary = Vec::new();
    for output in parsed.outputs {
        checked(
            &format!("the output `{}`", cut(&output.name)),
            &output.parameters,
        )?;
        let all = parsed.parameters.binary_data_output.unwrap_or(false);
        if output.parameters.binary_data.unwrap_or(all) {
            binary.push(output.name.clone());
        }
        outputs.push(output.name);
    }
    Ok(Asked {
        all_binary: outputs.is_empty() && parsed.parameters.binary_data_output.unwrap_or(false),
        binary,
        request: infer::Request {
            model: String::new(),
            version: String::new(),
            id: parsed.id,
            inputs,
            outputs,
            within: (parsed.parameters.timeout)
                .map(Duration::from_micros)
                .filter(|timeout| !timeout.is_zero()),
            arrived: Instant::now(),
            caller: None,
        },
    })
}

fn answered(answer: &Answer, is_binary: impl Fn(&Output) -> bool) -> Response<Body> {
    let mut bytes = Vec::new();
    let outputs = answer.outputs.iter().map(|output| {
        let raw = is_binary(output).then(|| raw_of(answer, *output));
        let size = raw.as_ref().map(Vec::len);
        bytes.extend(raw.into_iter().flatten());
        AnswerOutput {
            name: output.name(),
            datatype: output.datatype(),
            shape: shape_of(answer, *output),
            parameters: size.map(|size| AnswerParameters {
                binary_data_size: size,
            }),
            data: size.is_none().then(|| match output {
                Output::Probabilities | Output::Value => AnswerData::Numbers(numbers_of(answer)),
                Output::Class => AnswerData::Texts(classes_of(answer)),
            }),
        }
    });
    let outputs: Vec<_> = outputs.collect();
    let any_binary = outputs.iter().any(|output| output.parameters.is_some());
    let body = AnswerBody {
        model_name: answer.version.model.as_str(),
        model_version: &answer.version.text,
        id: &answer.id,
        outputs,
    };
    let mut whole = match serde_json::to_vec(&body) {
        Ok(json) => json,
        Err(e) => {
            let failed = InferError::Failed(format!("the answer cannot be written: {e}"));
            return *Refusal::from(failed);
        }
    };
    let length = whole.len();
    whole.extend(bytes);
    let mut page = Response::new(Body::new(http_body_util::Full::new(Bytes::from(whole))));
    let headers = page.headers_mut();
    let kind = match any_binary {
        true => "application/octet-stream",
        false => "application/json",
    };
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if any_binary {
        headers.insert(JSON_LENGTH, HeaderValue::from(length));
    }
    page
}

async fn feedback(
    inner: &Arc<Inner>,
    request: Request<Metered>,
    model: &str,
) -> Result<Response<Body>, Refusal> {
    let (head, body) = request.into_parts();
    let body = read(inner, &head.headers, body).await?;
    let parsed = reading(body.len(), move || {
        serde_json::from_slice::<FeedbackBody>(&body).map_err(|e| {
            let why = format!(
                "the body is no feedback: {e}; send {{\"labels\": [{{\"id\": …, \"row\": 0, \"label\": …}}]}}"
            );
            InferError::bad("body", why)
        })
    });
    let parsed = parsed.await??;
    let is_classifier = {
        let routes = inner.routes.load();
        let route = routes.find(model)?;
        let live = route.live.as_ref().or_else(|| route.ready.first());
        live.is_none_or(|version| !version.schema.classes.is_empty())
    };
    let labels = parsed.labels.into_iter().map(|label| Label {
        request_id: label.id,
        row: label.row,
        truth: match label.label {
            LabelValue::Text(text) => Truth::Class(text),
            LabelValue::Flag(flag) => Truth::Class(flag.to_string()),
            LabelValue::Integer(number) if is_classifier => Truth::Class(number.to_string()),
            #[allow(clippy::cast_precision_loss, reason = "a label is a float")]
            LabelValue::Integer(number) => Truth::Value(number as f64),
            LabelValue::Number(number) => Truth::Value(number),
        },
    });
    let told = By::Client(access::shown(&head.headers).cloned());
    let outcomes = inner.take_labels(model, labels.collect(), told).await?;
    let results = outcomes.into_iter().map(|outcome| outcome.to_json());
    Ok(page(
        StatusCode::OK,
        &json!({ "results": results.collect::<Vec<_>>() }),
    ))
}
