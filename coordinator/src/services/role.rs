//! What a call is answered by: the services of the term that is led here, or a word on who leads.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context as Poller, Poll},
};

use emberline_common::{access::Role as AccessRole, telemetry::Telemetry};
use emberline_proto::v1::{
    artifact_service_server, cluster_service_server, deployment_service_server,
    dora_service_server, model_service_server, run_service_server, token_service_server,
    worker_service_server,
};
use futures::FutureExt as _;
use http::{Request, Response};
use tokio::sync::watch;
use tonic::{body::Body, service::Routes};
use tonic_health::{ServingStatus, pb::health_server::HealthServer, server::HealthReporter};
use tower_service::Service;

use super::{Context, access, http_pages, status, while_known::while_known};
use crate::store::{Leader, StateStore};

/// The services that only a leader answers.
pub(super) const LED: [&str; 8] = [
    run_service_server::SERVICE_NAME,
    worker_service_server::SERVICE_NAME,
    model_service_server::SERVICE_NAME,
    artifact_service_server::SERVICE_NAME,
    cluster_service_server::SERVICE_NAME,
    deployment_service_server::SERVICE_NAME,
    dora_service_server::SERVICE_NAME,
    token_service_server::SERVICE_NAME,
];

/// The services that are answered whoever leads.
const ALWAYS: [&str; 3] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// What answers while this coordinator leads.
#[derive(Clone)]
pub(crate) struct Answering {
    pub(crate) routes: Routes,
    pub(crate) context: Arc<Context>,
}

impl Answering {
    /// Answers a call that may be made.
    async fn answer(mut self, request: Request<Body>) -> Result<Response<Body>, Infallible> {
        let (mut head, body) = request.into_parts();
        let needed = access::needed(head.uri.path());
        let mut admitted = match access::admit(&self.context, &mut head, needed).await {
            Ok(admitted) => admitted,
            Err(why) => return Ok(why.into_http()),
        };
        // Routes are always ready.
        let response = self.routes.call(Request::from_parts(head, body)).await?;
        let response = match admitted.watched.take() {
            None => response,
            Some(by) => response.map(|answer| {
                let gate = self.context.gate.clone();
                while_known(answer, gate, self.context.access.clone(), by)
            }),
        };
        if let Some(entry) = admitted.done(&response) {
            access::note(&self.context, &entry).await;
        }
        Ok(response)
    }
}

/// The role of this coordinator, as its server sees it. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Role {
    term: Arc<watch::Sender<Option<Answering>>>,
    store: Arc<dyn StateStore>,
    /// Where others reach this coordinator.
    address: Arc<str>,
    health: HealthReporter,
    /// Answered whoever leads.
    always: Routes,
    telemetry: Telemetry,
    /// How our own URLs begin.
    scheme: &'static str,
}

impl Role {
    /// A follower.
    pub(crate) async fn new(
        store: Arc<dyn StateStore>,
        address: &str,
        telemetry: Telemetry,
        scheme: &'static str,
    ) -> Self {
        let (health, service) = tonic_health::server::health_reporter();
        health.set_service_status("", ServingStatus::Serving).await;
        let role = Self {
            term: Arc::new(watch::Sender::new(None)),
            store,
            address: address.into(),
            health,
            always: always(service),
            telemetry,
            scheme,
        };
        role.say(ServingStatus::NotServing).await;
        role
    }

    /// From now on these services answer.
    pub(crate) async fn lead(&self, term: Answering) {
        self.term.send_replace(Some(term));
        self.say(ServingStatus::Serving).await;
    }

    /// From now on calls are sent to the leader.
    pub(crate) async fn follow(&self) {
        self.term.send_replace(None);
        self.say(ServingStatus::NotServing).await;
    }

    /// Nothing is served any more.
    pub(crate) async fn stop(&self) {
        self.health
            .set_service_status("", ServingStatus::NotServing)
            .await;
        self.say(ServingStatus::NotServing).await;
    }

    async fn say(&self, status: ServingStatus) {
        for service in LED {
            self.health.set_service_status(service, status).await;
        }
    }

    async fn event(self, request: Request<Body>) -> Response<Body> {
        let (mut head, body) = request.into_parts();
        let led = self.term.borrow().clone();
        let admitted = match &led {
            Some(term) => {
                let needed = Some(AccessRole::Operator);
                match access::admit(&term.context, &mut head, needed).await {
                    Ok(admitted) => Some(admitted),
                    Err(why) => return http_pages::denied(&why),
                }
            }
            None => None,
        };
        // Nothing of a term may be held while a stranger sends.
        drop(led);
        let event = match http_pages::read_event(Request::from_parts(head, body)).await {
            Ok(event) => event,
            Err(answer) => return answer,
        };
        let term = self.term.borrow().clone();
        match (term, admitted) {
            (Some(term), Some(admitted)) => {
                let answer = http_pages::take_event(Arc::clone(&term.context), &event).await;
                if let Some(entry) = admitted.done(&answer) {
                    access::note(&term.context, &entry).await;
                }
                answer
            }
            // A term that has begun meanwhile has asked nobody yet.
            _ => {
                let (leader, status) = self.elsewhere();
                http_pages::elsewhere(self.scheme, leader.as_ref(), &status)
            }
        }
    }

    /// Where the leader is, and what to say of it, or why there is none.
    fn elsewhere(&self) -> (Option<Leader>, tonic::Status) {
        let leader = self.store.watch_leader().borrow().clone();
        // What was seen last may be a term of our own that is over, or has not quite begun.
        let leader = leader.filter(|leader| leader.address != *self.address);
        let trouble = self.store.trouble();
        let status = status::not_leader(
            leader.as_ref(),
            trouble.as_ref().map(|trouble| trouble.text.as_str()),
        );
        (leader.filter(|_| trouble.is_none()), status)
    }
}

fn always(health: HealthServer<impl tonic_health::pb::health_server::Health>) -> Routes {
    let mut routes = Routes::builder();
    routes.add_service(health);
    // The descriptors are made by our own build: they cannot be malformed.
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(emberline_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        // The descriptors also have the services that serving workers answer.
        LED.into_iter()
            .chain(ALWAYS)
            .fold(builder, |builder, name| builder.with_service_name(name))
    };
    match (reflection().build_v1(), reflection().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => {
            routes.add_service(v1);
            routes.add_service(v1alpha);
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "reflection is not served");
        }
    }
    routes.routes().prepare()
}

impl Service<Request<Body>> for Role {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Poller<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        if path == http_pages::METRICS {
            let answer = http_pages::metrics(&self.telemetry, request.method());
            return Box::pin(std::future::ready(Ok(answer)));
        }
        if path == http_pages::EVENTS {
            return self.clone().event(request).map(Ok).boxed();
        }
        if let Some(refusal) = http_pages::no_call(&request) {
            return Box::pin(std::future::ready(Ok(refusal)));
        }
        let service = path.trim_start_matches('/').split('/').next();
        if service.is_some_and(|service| LED.contains(&service)) {
            let term = self.term.borrow().clone();
            return match term {
                Some(term) => term.answer(request).boxed(),
                None => {
                    let answer = self.elsewhere().1.into_http();
                    Box::pin(std::future::ready(Ok(answer)))
                }
            };
        }
        // Routes are always ready.
        self.always.clone().call(request).boxed()
    }
}
