//! The way of one request, whichever protocol it came by: which version, checked, encoded, queued,
//! answered, counted.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use emberline_common::{serving::ServingLimits, trace::TraceContext};
use emberline_train::{matrix::Matrix, model::Predictions};
use tokio::sync::oneshot;

use crate::{
    columns::RawColumns,
    error::{InferError, cut},
    feedback::Given,
    pool::{Full, Job, NotComputed, Reply},
    routes::Route,
    schema::Output,
    server::Inner,
    tensor::Tensor,
    version::Version,
};

/// How long an answer is waited for where the caller does not say.
const LONGEST: Duration = Duration::from_secs(30);
/// Requests with more numbers are read on a thread of their own.
const MANY_NUMBERS: u64 = 32 << 10;
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
        let (inputs, most) = (request.inputs, limits.max_request_rows);
        let is_large = numbers_in(&inputs) > MANY_NUMBERS;
        let read = if is_large {
            let version = Arc::clone(version);
            let read = tokio::task::spawn_blocking(move || version.read(inputs, most));
            let broken = || InferError::Failed("reading the request panicked".to_owned());
            read.await.unwrap_or_else(|_| Err(broken()))
        } else {
            version.read(inputs, most)
        };
        let (columns, encoded) = read.map_err(unanswered(0))?;
        let rows = columns.rows;

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
            let copy = Copy {
                server: Arc::downgrade(self),
                route: Arc::clone(route),
                shadow: Arc::clone(shadow),
                answering: Arc::clone(version),
                columns: Arc::clone(&columns),
                id: Arc::clone(id),
            };
            if !is_large {
                copy.queue();
            } else if let Ok(turn) = Arc::clone(&self.copying).try_acquire_owned() {
                tokio::task::spawn_blocking(move || {
                    copy.queue();
                    drop(turn);
                });
            } else {
                shadow.counters.overloaded();
            }
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
}

/// A copy of a request for a shadow. Whatever comes of it is counted for the shadow alone.
struct Copy {
    server: Weak<Inner>,
    route: Arc<Route>,
    shadow: Arc<Version>,
    answering: Arc<Version>,
    columns: Arc<RawColumns>,
    id: Arc<str>,
}

impl Copy {
    /// Queues it, if there is room.
    fn queue(self) {
        // It may take other columns than the version that answers; it finds its own by their names.
        let named = self.answering.named(&self.columns);
        let Ok(encoded) = self.shadow.encode(&named) else {
            return self.shadow.counters.rejected();
        };
        let at = Instant::now();
        let shadow = Arc::clone(&self.shadow);
        let job = Job {
            rows: encoded,
            reply: Reply::Shadow(Box::new(move |outputs| self.computed(outputs, at))),
            deadline: Some(at + LONGEST),
            at,
        };
        if shadow.slot.push_low(job).is_err() {
            shadow.counters.overloaded();
        }
    }

    fn computed(self, outputs: Result<Matrix, NotComputed>, at: Instant) {
        let (of, rows) = (&self.shadow, self.columns.rows);
        let predictions = match outputs {
            // There was no time for it: that says nothing against it.
            Err(NotComputed::Expired) => return of.counters.overloaded(),
            Err(NotComputed::Failed(why)) => Err(InferError::Failed(why)),
            Ok(outputs) => of.predictions(&outputs),
        };
        match predictions {
            Ok(predictions) => {
                let predictions = Arc::new(predictions);
                let named = self.answering.named(&self.columns);
                let took = at.elapsed();
                of.counters.answered(took, &named, &predictions);
                of.took(took);
                let given = of.given(&predictions);
                self.route.answered.note_shadow(&self.id, rows, given);
            }
            Err(_) => {
                of.counters.failed(rows);
                if let Some(server) = self.server.upgrade() {
                    server.an_error_appeared();
                }
            }
        }
    }
}

/// Numbers, or other values, that a request says it has.
fn numbers_in(tensors: &[Tensor]) -> u64 {
    let of = |tensor: &Tensor| {
        let dims = tensor.shape.iter().map(|dim| dim.unsigned_abs());
        dims.fold(1, u64::saturating_mul)
    };
    tensors.iter().map(of).fold(0, u64::saturating_add)
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
