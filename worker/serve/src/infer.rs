//! The way of one request, whichever protocol it came by: which version, checked, encoded, queued,
//! answered, counted.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use emberline_common::{serving::ServingLimits, trace::TraceContext};
use emberline_train::model::Predictions;
use tokio::sync::oneshot;

use crate::{
    error::{InferError, cut},
    feedback::Given,
    pool::{Full, Job, NotComputed, Reply},
    routes::Route,
    schema::{Output, RawColumns},
    server::Inner,
    tensor::Tensor,
    version::Version,
};

/// How long an answer is waited for where the caller does not say.
const LONGEST: Duration = Duration::from_secs(30);
/// The longest id of a request, in bytes.
const MAX_ID_BYTES: usize = 256;

/// A request in no protocol's form.
pub(crate) struct Request {
    pub model: String,
    /// Empty: whoever it falls to.
    pub version: String,
    /// Empty: the server makes one.
    pub id: String,
    pub inputs: Vec<Tensor>,
    /// Empty: all of them.
    pub outputs: Vec<String>,
    /// How long the caller waits, from when it arrived.
    pub within: Option<Duration>,
    pub arrived: Instant,
    pub caller: Option<TraceContext>,
}

/// An answer in no protocol's form.
pub(crate) struct Answer {
    pub version: Arc<Version>,
    pub id: Arc<str>,
    pub rows: usize,
    pub outputs: Vec<Output>,
    pub predictions: Arc<Predictions>,
}

/// A request that was refused or failed, with its id if it had come that far.
struct Unanswered<'a> {
    error: InferError,
    version: Option<&'a Arc<Version>>,
    rows: usize,
}

impl Inner {
    /// Answers a request.
    pub async fn infer(self: &Arc<Self>, request: Request) -> Result<Answer, InferError> {
        let (arrived, caller) = (request.arrived, request.caller);
        let traced = self.traces.begin(caller, &request.model);
        let routes = self.routes.load_full();
        let id = self.id_of(&request.id)?;
        let route = routes.find(&request.model)?;
        let result = self.answer(route, request, &id).await;
        let result = result.map_err(|unanswered| {
            let Unanswered {
                error,
                version,
                rows,
            } = unanswered;
            if let Some(version) = version {
                match error.outcome() {
                    "error" => {
                        version.counters.failed(rows);
                        self.an_error_appeared();
                    }
                    "overloaded" => version.counters.overloaded(),
                    _ => version.counters.rejected(),
                }
            }
            error
        });
        if let Some(traced) = traced {
            self.traces.end(traced, arrived, &id, &result);
        }
        result
    }

    /// The request's id, or a new one.
    fn id_of(&self, given: &str) -> Result<Arc<str>, InferError> {
        if given.is_empty() {
            return Ok(self.fresh_id());
        }
        if given.len() > MAX_ID_BYTES || given.chars().any(char::is_control) {
            return Err(InferError::bad(
                "id",
                format!(
                    "the request's id `{}` is none: at most {MAX_ID_BYTES} bytes, no control characters",
                    cut(given)
                ),
            ));
        }
        Ok(given.into())
    }

    async fn answer<'a>(
        self: &Arc<Self>,
        route: &'a Arc<Route>,
        request: Request,
        id: &Arc<str>,
    ) -> Result<Answer, Unanswered<'a>> {
        let version = route
            .pick(&request.version, id)
            .map_err(|error| Unanswered {
                error,
                version: None,
                rows: 0,
            })?;
        let unanswered = |rows: usize| {
            move |error: InferError| Unanswered {
                error,
                version: Some(version),
                rows,
            }
        };
        let limits: &ServingLimits = &route.limits;
        let outputs = version.schema.requested(&request.outputs);
        let outputs = outputs.map_err(unanswered(0))?;
        let columns = version
            .schema
            .columns(request.inputs, limits.max_request_rows);
        let columns = columns.map_err(unanswered(0))?;
        let rows = columns.rows;
        let encoded = version.encode(&version.named(&columns));
        let encoded = encoded.map_err(unanswered(rows))?;

        let within = request.within.unwrap_or(LONGEST).min(LONGEST);
        let deadline = request.arrived + within;
        let (reply, outcome) = oneshot::channel();
        let job = Job {
            rows: encoded,
            reply: Reply::Caller(reply),
            deadline: Some(deadline),
            at: request.arrived,
        };
        version.slot.push(job).map_err(|Full(waiting)| {
            unanswered(rows)(InferError::Overloaded(format!(
                "the model `{}` is busy: {waiting} rows wait, of at most {}; try again later",
                route.model, limits.max_queue
            )))
        })?;
        let columns = Arc::new(columns);
        if let Some(shadow) = route.shadow_of(id, version) {
            self.copy_to(route, shadow, version, &columns, id);
        }

        let too_late = || unanswered(rows)(InferError::Deadline(within));
        let outcome = tokio::time::timeout_at(deadline.into(), outcome).await;
        let outputs_of = match outcome {
            Ok(Ok(Ok(outputs))) => outputs,
            Ok(Ok(Err(NotComputed::Expired))) | Err(_) => return Err(too_late()),
            Ok(Ok(Err(NotComputed::Failed(why)))) => {
                return Err(unanswered(rows)(InferError::Failed(format!(
                    "version {} of the model `{}` cannot compute: {why}",
                    version.number, version.model
                ))));
            }
            Ok(Err(_)) => {
                let stopping = "this server is stopping; ask another one".to_owned();
                return Err(unanswered(rows)(InferError::NotReady(stopping)));
            }
        };
        let predictions = version.predictions(&outputs_of).map_err(unanswered(rows))?;
        let predictions = Arc::new(predictions);
        let now = Instant::now();
        let took = now.duration_since(request.arrived);
        let named = version.named(&columns);
        version.counters.answered(took, &named, &predictions);
        version.took(took);
        route
            .answered
            .note(id, rows, version.given(&predictions), now);
        self.log
            .answered(route, version, &columns, &predictions, id);
        Ok(Answer {
            version: Arc::clone(version),
            id: Arc::clone(id),
            rows,
            outputs,
            predictions,
        })
    }

    /// Hands a copy of a request to a shadow, if there is room for it. Whatever comes of it is counted
    /// for the shadow alone.
    fn copy_to(
        self: &Arc<Self>,
        route: &Arc<Route>,
        shadow: &Arc<Version>,
        answering: &Arc<Version>,
        columns: &Arc<RawColumns>,
        id: &Arc<str>,
    ) {
        // It may take other columns than the version that answers; it finds its own by their names.
        let named = answering.named(columns);
        let encoded = match shadow.encode(&named) {
            Ok(encoded) => encoded,
            Err(_) => return shadow.counters.rejected(),
        };
        let at = Instant::now();
        let rows = columns.rows;
        let (route, answering) = (Arc::clone(route), Arc::clone(answering));
        let (of, columns, id) = (Arc::clone(shadow), Arc::clone(columns), Arc::clone(id));
        let server = Arc::downgrade(self);
        let reply = Reply::Shadow(Box::new(move |outputs| {
            let predictions = outputs
                .map_err(|why| InferError::Failed(format!("{why:?}")))
                .and_then(|outputs| of.predictions(&outputs));
            match predictions {
                Ok(predictions) => {
                    let predictions = Arc::new(predictions);
                    let named = answering.named(&columns);
                    let took = at.elapsed();
                    of.counters.answered(took, &named, &predictions);
                    of.took(took);
                    route
                        .answered
                        .note_shadow(&id, rows, of.given(&predictions));
                }
                Err(_) => {
                    of.counters.failed(rows);
                    if let Some(server) = server.upgrade() {
                        server.an_error_appeared();
                    }
                }
            }
        }));
        let job = Job {
            rows: encoded,
            reply,
            deadline: Some(at + LONGEST),
            at,
        };
        if shadow.slot.push_low(job).is_err() {
            shadow.counters.overloaded();
        }
    }
}

impl Version {
    /// What it said, for when a label comes back.
    pub fn given(&self, predictions: &Arc<Predictions>) -> Given {
        Given {
            version: self.number,
            counters: Arc::clone(&self.counters),
            predictions: Arc::clone(predictions),
            classes: Arc::clone(&self.schema.classes),
        }
    }
}
