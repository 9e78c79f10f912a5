//! Labels that come back: held against what was answered here, and, where it was not here, asked of
//! the model's other replicas once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use emberline_common::tls::Dialer;
use emberline_proto::v1::{
    FeedbackLabel, FeedbackOutcome, FeedbackResult, SubmitFeedbackRequest, feedback_label,
    feedback_service_client::FeedbackServiceClient,
};
use futures::future::join_all;
use http::{HeaderValue, header};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tonic::{Request, transport::Channel};

use crate::{
    error::InferError,
    feedback::{Labelled, REMEMBERED, Truth},
    routes::Routes,
    server::Inner,
};

/// Labels of one call.
const MAX_LABELS: usize = 1000;
/// Calls of other replicas that are waited for at once.
const MAX_RELAYING: usize = 16;
/// How long another replica may take.
const RELAY_WITHIN: Duration = Duration::from_secs(2);

/// One label.
#[derive(Debug, Clone)]
pub(crate) struct Label {
    pub request_id: String,
    pub row: u32,
    pub truth: Truth,
}

/// Who tells labels.
#[derive(Debug, Clone)]
pub(crate) enum By {
    /// A client, which has shown this.
    Client(Option<HeaderValue>),
    /// Another replica, on behalf of one.
    Replica,
}

/// What became of one label.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub request_id: String,
    pub row: u32,
    pub result: FeedbackResult,
    pub why: String,
    pub version: u32,
}

impl Outcome {
    pub fn to_json(&self) -> Value {
        let result = match self.result {
            FeedbackResult::Counted => "counted",
            FeedbackResult::Repeated => "repeated",
            FeedbackResult::Refused => "refused",
            FeedbackResult::Unknown | FeedbackResult::Unspecified => "unknown",
        };
        let mut value = json!({ "id": self.request_id, "row": self.row, "result": result });
        if self.version > 0 {
            value["model_version"] = json!(self.version.to_string());
        }
        if !self.why.is_empty() {
            value["why"] = json!(self.why);
        }
        value
    }
}

impl From<Outcome> for FeedbackOutcome {
    fn from(outcome: Outcome) -> Self {
        Self {
            request_id: outcome.request_id,
            row: outcome.row,
            result: outcome.result.into(),
            why: outcome.why,
            version: outcome.version,
        }
    }
}

/// The ways to other replicas.
#[derive(Debug)]
pub(crate) struct Relay {
    dialer: Dialer,
    channels: Mutex<HashMap<String, Channel>>,
    room: Semaphore,
}

impl Relay {
    /// With these certificates.
    pub fn new(dialer: Dialer) -> Self {
        Self {
            dialer,
            channels: Mutex::default(),
            room: Semaphore::new(MAX_RELAYING),
        }
    }

    /// Lets go of the ways to those that are in no plan any more.
    pub fn keep_only(&self, routes: &Routes) {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|peer, _| routes.models.values().any(|r| r.peers.contains(peer)));
    }

    /// The way to a replica; it is connected when it is used.
    fn channel(&self, peer: &str) -> Option<Channel> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(peer) {
            return Some(channel.clone());
        }
        let endpoint = self.dialer.endpoint(peer).ok()?;
        let endpoint = endpoint.connect_timeout(RELAY_WITHIN);
        let channel = self.dialer.connect_lazy(&endpoint);
        channels.insert(peer.to_owned(), channel.clone());
        Some(channel)
    }

    /// What a replica says of these labels; nothing if it does not answer in time.
    /// It shows what the client has shown.
    async fn ask(
        &self,
        peer: &str,
        request: SubmitFeedbackRequest,
        shown: Option<HeaderValue>,
    ) -> Vec<FeedbackOutcome> {
        let Some(channel) = self.channel(peer) else {
            return Vec::new();
        };
        let mut client = FeedbackServiceClient::new(channel);
        let mut request = Request::new(request);
        if let Some(shown) = shown {
            let headers = request.metadata_mut().as_mut();
            headers.insert(header::AUTHORIZATION, shown);
        }
        let asked = tokio::time::timeout(RELAY_WITHIN, client.submit_feedback(request));
        match asked.await {
            Ok(Ok(answer)) => answer.into_inner().outcomes,
            Ok(Err(error)) => {
                tracing::debug!(peer, %error, "another replica did not take feedback");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }
}

impl Inner {
    /// Takes labels of a model; each has its own outcome.
    pub async fn take_labels(
        self: &Arc<Self>,
        model: &str,
        labels: Vec<Label>,
        by: By,
    ) -> Result<Vec<Outcome>, InferError> {
        if labels.len() > MAX_LABELS {
            let why = format!(
                "there are {} labels: send at most {MAX_LABELS} at once",
                labels.len()
            );
            return Err(InferError::bad("labels", why));
        }
        let routes = self.routes.load_full();
        let route = routes.find(model)?;
        let now = Instant::now();
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(labels.len());
        for label in &labels {
            let labelled = (route.answered).label(&label.request_id, label.row, &label.truth, now);
            if let Labelled::Counted {
                version, predicted, ..
            } = &labelled
            {
                self.log.labelled(route, *version, label, predicted);
            }
            outcomes.push(Outcome::of(label, labelled));
        }
        let is_unknown = |outcome: &Outcome| outcome.result == FeedbackResult::Unknown;
        let unknown: Vec<usize> = (outcomes.iter().enumerate())
            .filter(|(_, outcome)| is_unknown(outcome))
            .map(|(at, _)| at)
            .collect();
        let shown = match by {
            By::Client(shown) if !unknown.is_empty() && !route.peers.is_empty() => shown,
            _ => return Ok(outcomes),
        };
        // Where all replicas are busy with asking each other, one more call would not help.
        let Ok(_asking) = self.relay.room.try_acquire() else {
            return Ok(outcomes);
        };
        let request = SubmitFeedbackRequest {
            model: model.to_owned(),
            labels: unknown.iter().map(|at| labels[*at].to_wire()).collect(),
            relayed: true,
        };
        let asked = route
            .peers
            .iter()
            .map(|peer| self.relay.ask(peer, request.clone(), shown.clone()));
        for answer in join_all(asked).await {
            for (at, theirs) in unknown.iter().zip(answer) {
                let known = theirs.result() != FeedbackResult::Unknown
                    && theirs.result() != FeedbackResult::Unspecified;
                if known && is_unknown(&outcomes[*at]) {
                    outcomes[*at].result = theirs.result();
                    outcomes[*at].why = theirs.why;
                    outcomes[*at].version = theirs.version;
                }
            }
        }
        Ok(outcomes)
    }
}

impl Label {
    fn to_wire(&self) -> FeedbackLabel {
        FeedbackLabel {
            request_id: self.request_id.clone(),
            row: self.row,
            truth: Some(match &self.truth {
                Truth::Class(class) => feedback_label::Truth::Class(class.clone()),
                Truth::Value(value) => feedback_label::Truth::Value(*value),
            }),
        }
    }
}

impl Outcome {
    fn of(label: &Label, labelled: Labelled) -> Self {
        let (result, why, version) = match labelled {
            Labelled::Counted { version, note, .. } => {
                (FeedbackResult::Counted, note.unwrap_or_default(), version)
            }
            Labelled::Repeated(version) => {
                let why = "this row had a label already: the first one stays".to_owned();
                (FeedbackResult::Repeated, why, version)
            }
            Labelled::Unknown => {
                let why = format!(
                    "no request with this id was answered within the last {} minutes",
                    REMEMBERED.as_secs() / 60
                );
                (FeedbackResult::Unknown, why, 0)
            }
            Labelled::Refused(why) => (FeedbackResult::Refused, why, 0),
        };
        Self {
            request_id: label.request_id.clone(),
            row: label.row,
            result,
            why,
            version,
        }
    }
}
