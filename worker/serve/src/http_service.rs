//! What answers a request, by its path: the two gRPC services, health and reflection, REST, metrics.

use std::{convert::Infallible, sync::Arc};

use emberline_common::{
    grpc,
    telemetry::{METRICS_PATH, metrics_page},
    time::Timestamp,
};
use emberline_proto::{
    inference::grpc_inference_service_server::{self, GrpcInferenceServiceServer},
    v1::feedback_service_server::{self, FeedbackServiceServer},
};
use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use hyper::body::Incoming;
use tonic::{Status, body::Body, service::Routes};
use tonic_health::ServingStatus;
use tower_service::Service;

use crate::{
    access,
    body::Metered,
    codec,
    grpc::{Feedback, Inference},
    rest,
    server::Inner,
};

/// The services of this port.
const ANSWERED: [&str; 5] = [
    grpc_inference_service_server::SERVICE_NAME,
    feedback_service_server::SERVICE_NAME,
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// The largest message of labels, of which there are at most 1,000.
const MAX_FEEDBACK_BYTES: usize = 1 << 20;

/// Answers everything on the port. Cheap to clone.
#[derive(Clone)]
pub(crate) struct HttpService {
    inner: Arc<Inner>,
    inference: GrpcInferenceServiceServer<Inference>,
    feedback: FeedbackServiceServer<Feedback>,
    /// Health and reflection, and the answer to calls of what is not there.
    others: Routes,
}

impl HttpService {
    /// And what tells its health whenever that changes.
    pub fn new(inner: &Arc<Inner>) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let most = inner.config.limits.max_request_bytes;
        let inference = Inference(Arc::clone(inner));
        let feedback = Feedback(Arc::clone(inner));
        let (reporter, health) = tonic_health::server::health_reporter();
        let mut routes = Routes::builder();
        routes.add_service(health);
        let reflection = || {
            let builder = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(emberline_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
            // Of all services that are described, those that are answered here.
            ANSWERED
                .into_iter()
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
        let service = Self {
            inner: Arc::clone(inner),
            inference: GrpcInferenceServiceServer::new(inference).max_decoding_message_size(most),
            feedback: FeedbackServiceServer::new(feedback)
                .max_decoding_message_size(most.min(MAX_FEEDBACK_BYTES)),
            others: routes.routes().prepare(),
        };
        let mut ready = inner.watch_ready();
        let telling = async move {
            loop {
                let status = match *ready.borrow_and_update() {
                    true => ServingStatus::Serving,
                    false => ServingStatus::NotServing,
                };
                for name in ["", grpc_inference_service_server::SERVICE_NAME] {
                    reporter.set_service_status(name, status).await;
                }
                if ready.changed().await.is_err() {
                    return;
                }
            }
        };
        (service, telling)
    }
}

impl HttpService {
    /// The answer to what is no call, and to who may not ask.
    fn refused<B>(&self, service: Option<&str>, request: &Request<B>) -> Option<Response<Body>> {
        let is_rest = service == Some("v2");
        let is_call = matches!(
            service,
            Some(
                grpc_inference_service_server::SERVICE_NAME | feedback_service_server::SERVICE_NAME
            )
        );
        if is_call && !grpc::is_call(request) {
            return Some(rest::no_call());
        }
        let asks = is_rest || is_call;
        let admission = self.inner.admission.load();
        let is_free = !asks || access::is_public(request.uri().path());
        if is_free || admission.allows(request.headers(), Timestamp::now()) {
            return None;
        }
        Some(if is_rest {
            rest::unauthenticated()
        } else {
            Status::unauthenticated(access::NEEDED).into_http()
        })
    }
}

impl hyper::service::Service<Request<Incoming>> for HttpService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let within = self.inner.config.limits.body_within;
        let request = request.map(|body| Metered::new(body, &self.inner.budget, within));
        let path = request.uri().path();
        let service = path
            .strip_prefix('/')
            .and_then(|path| path.split('/').next());
        if let Some(refused) = self.refused(service, &request) {
            return std::future::ready(Ok(refused)).boxed();
        }
        match service {
            Some(_) if path == codec::MODEL_INFER => {
                let inner = Arc::clone(&self.inner);
                async move { Ok(codec::model_infer(&inner, request).await) }.boxed()
            }
            Some(grpc_inference_service_server::SERVICE_NAME) => {
                self.inference.clone().call(request)
            }
            Some(feedback_service_server::SERVICE_NAME) => self.feedback.clone().call(request),
            Some("v2") => {
                let inner = Arc::clone(&self.inner);
                async move { Ok(rest::answer(&inner, request).await) }.boxed()
            }
            _ if path == METRICS_PATH => {
                let page = metrics_page(&self.inner.config.telemetry, request.method());
                std::future::ready(Ok(page.map(Body::new))).boxed()
            }
            _ => {
                let kind = request.headers().get(http::header::CONTENT_TYPE);
                let is_grpc =
                    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
                if is_grpc {
                    self.others.clone().call(request.map(Body::new)).boxed()
                } else {
                    std::future::ready(Ok(rest::no_such_page(path))).boxed()
                }
            }
        }
    }
}
