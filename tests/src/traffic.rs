//! Clients of served models: a stream of requests from threads of their own, and what became of each.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use emberline_proto::inference::{
    InferTensorContents, ModelInferRequest, ModelInferResponse,
    grpc_inference_service_client::GrpcInferenceServiceClient,
    model_infer_request::InferInputTensor,
};
use tonic::transport::Channel;

/// Pumps of so many different pressures are asked for, one after the other.
pub const PRESSURES: u64 = 64;

/// A request about one pump.
#[must_use]
pub fn request(model: &str, id: &str, pressure: u64) -> ModelInferRequest {
    ModelInferRequest {
        model_name: model.to_owned(),
        id: id.to_owned(),
        inputs: vec![InferInputTensor {
            name: "pressure".to_owned(),
            datatype: "INT64".to_owned(),
            shape: vec![1],
            contents: Some(InferTensorContents {
                int64_contents: vec![i64::try_from(pressure).unwrap()],
                ..InferTensorContents::default()
            }),
            ..InferInputTensor::default()
        }],
        ..ModelInferRequest::default()
    }
}

/// A connection to whoever serves at `host:port`.
pub async fn connect(address: &str) -> GrpcInferenceServiceClient<Channel> {
    let url = format!("http://{address}");
    let endpoint = Channel::from_shared(url).unwrap();
    GrpcInferenceServiceClient::new(endpoint.connect().await.unwrap())
}

/// What became of the requests.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// How many each version has answered.
    pub by_version: BTreeMap<String, u64>,
    /// What went wrong: some of it.
    pub failures: Vec<String>,
    /// The version that answered each request.
    pub ids: BTreeMap<String, String>,
}

/// Requests without an end, until it is stopped or dropped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    next: Arc<AtomicU64>,
    answers: Arc<Mutex<Answers>>,
    threads: Vec<JoinHandle<()>>,
}

fn note(
    answers: &mut Answers,
    id: &str,
    answer: Result<tonic::Response<ModelInferResponse>, tonic::Status>,
) {
    match answer {
        Ok(answer) => {
            let answer = answer.into_inner();
            assert_eq!(answer.id, id);
            let version = answer.model_version;
            *answers.by_version.entry(version.clone()).or_default() += 1;
            answers.ids.insert(id.to_owned(), version);
        }
        Err(status) if answers.failures.len() < 20 => {
            answers.failures.push(format!("{id}: {status}"));
        }
        Err(_) => {}
    }
}

impl Traffic {
    /// So many clients of the server at this address, each with one request after the other. Requests have
    /// the ids `r-0`, `r-1` and so on; that of `r-n` is about the pressure `n` modulo [`PRESSURES`].
    #[must_use]
    pub fn start(address: &str, model: &str, clients: usize) -> Self {
        let mut traffic = Self {
            stop: Arc::default(),
            next: Arc::default(),
            answers: Arc::default(),
            threads: Vec::new(),
        };
        let threads = (0..clients).map(|_| {
            let (stop, next) = (Arc::clone(&traffic.stop), Arc::clone(&traffic.next));
            let answers = Arc::clone(&traffic.answers);
            let (address, model) = (address.to_owned(), model.to_owned());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build();
                runtime.unwrap().block_on(async {
                    let mut client = connect(&address).await;
                    while !stop.load(Relaxed) {
                        let n = next.fetch_add(1, Relaxed);
                        let id = format!("r-{n}");
                        let answer = client
                            .model_infer(request(&model, &id, n % PRESSURES))
                            .await;
                        note(&mut answers.lock().unwrap(), &id, answer);
                        // Some hundred a second: the machine is for those who answer.
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                });
            })
        });
        let threads: Vec<_> = threads.collect();
        traffic.threads = threads;
        traffic
    }

    /// What has become of the requests so far.
    #[must_use]
    pub fn so_far(&self) -> Answers {
        self.answers.lock().unwrap().clone()
    }

    /// How many a version has answered so far.
    #[must_use]
    pub fn answered_by(&self, version: u32) -> u64 {
        let answers = self.answers.lock().unwrap();
        let count = answers.by_version.get(&version.to_string());
        count.copied().unwrap_or(0)
    }

    /// Stops, and gives what became of all requests.
    #[must_use]
    pub fn stop(mut self) -> Answers {
        self.end();
        self.so_far()
    }

    fn end(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join()
                && !std::thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end();
    }
}
