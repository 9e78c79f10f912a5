//! A server on loopback with models that were really trained, and clients of both protocols.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "each test file uses some of it"
)]

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use emberline_common::{
    artifact::{ArtifactStore, Manifest, ManifestFile},
    ids::{DeploymentId, Digest, EnvironmentName, ModelName, WorkerName},
    serving::{
        ServedModel, ServedVersion, ServingLimits, ServingPlan, Traffic, VersionState,
        VersionStatus,
    },
    spec::{ArtifactType, kinds::convert::ColumnType},
};
use emberline_data::{
    schema::{BatchBuilder, ColumnDef, Schema, Value},
    write::TableWriter,
};
use emberline_proto::inference::{
    InferTensorContents, ModelInferRequest, ModelInferResponse,
    grpc_inference_service_client::GrpcInferenceServiceClient,
    model_infer_request::InferInputTensor,
};
use emberline_serve::{InferenceServer, ServeConfig, ServerLimits};
use emberline_train::train::Train;
use emberline_worker::{
    documents::{MODEL_FILE, WEIGHTS_FILE},
    serving::{Serving, ServingArtifacts},
    stage::Stage as _,
    testing::TestContext,
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::transport::Channel;

/// How long anything may take.
pub const WITHIN: Duration = Duration::from_secs(30);

/// The two files of a model.
#[derive(Clone)]
pub struct ModelFiles {
    pub document: Vec<u8>,
    pub weights: Vec<u8>,
}

fn column(name: &str, column_type: ColumnType) -> ColumnDef {
    ColumnDef {
        name: name.to_owned(),
        column_type,
    }
}

fn table(columns: Vec<ColumnDef>, rows: &[Vec<Value<'_>>]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let schema = Schema { columns };
    let mut builder = BatchBuilder::new(&schema);
    let mut writer = TableWriter::create(dir.path(), &schema).unwrap();
    for row in rows {
        for (at, value) in row.iter().enumerate() {
            builder.push(at, *value);
        }
        builder.end_row();
    }
    writer.push(&builder.take().unwrap()).unwrap();
    writer.finish().unwrap();
    dir
}

fn trained(spec: Json, train: &Path) -> ModelFiles {
    let test = TestContext::builder()
        .spec(spec)
        .input("train", ArtifactType::Table, train)
        .build();
    let output = Train.run(&test.ctx).unwrap();
    let dir = test.output(&output.artifacts, "model");
    ModelFiles {
        document: std::fs::read(dir.join(MODEL_FILE)).unwrap(),
        weights: std::fs::read(dir.join(WEIGHTS_FILE)).unwrap(),
    }
}

/// A row of the factory: what it is, and whether it fails.
pub struct Machine {
    pub kind: &'static str,
    pub torque: f64,
    pub speed: i64,
    pub old: bool,
}

pub fn machine(n: usize) -> Machine {
    Machine {
        kind: ["L", "M", "H"][n % 3],
        torque: ((n * 37) % 101) as f64 / 10.0,
        speed: ((n * 53) % 97) as i64 * 10,
        old: n.is_multiple_of(7),
    }
}

/// A classifier of two classes over columns of four types.
pub fn factory_model(seed: u64) -> ModelFiles {
    let machines: Vec<Machine> = (0..300).map(machine).collect();
    let rows: Vec<Vec<Value<'_>>> = (machines.iter())
        .map(|m| {
            let fails = m.torque * m.speed as f64 > 3000.0;
            vec![
                Value::Text(m.kind),
                Value::Float(m.torque),
                Value::Integer(m.speed),
                Value::Boolean(m.old),
                Value::Text(if fails { "yes" } else { "no" }),
            ]
        })
        .collect();
    let columns = vec![
        column("kind", ColumnType::Text),
        column("torque", ColumnType::Float),
        column("speed", ColumnType::Integer),
        column("old", ColumnType::Boolean),
        column("failed", ColumnType::Text),
    ];
    let spec = json!({
        "task": "classification",
        "label": "failed",
        "derived": { "load": "torque / (speed - 5)" },
        "model": { "family": "mlp", "hidden": [16] },
        "optimizer": { "learning_rate": 0.05 },
        "epochs": 8,
        "batch_size": 32,
        "seed": seed,
    });
    trained(spec, table(columns, &rows).path())
}

/// The same one for all tests of a file.
pub static FACTORY: LazyLock<ModelFiles> = LazyLock::new(|| factory_model(1));
pub static FACTORY_2: LazyLock<ModelFiles> = LazyLock::new(|| factory_model(2));

/// A model of a value: three times `x`.
pub static TRIPLE: LazyLock<ModelFiles> = LazyLock::new(|| {
    let xs: Vec<f64> = (0..200).map(|n| f64::from(n) / 10.0).collect();
    let rows = xs
        .iter()
        .map(|x| vec![Value::Float(*x), Value::Float(3.0 * x)]);
    let rows: Vec<_> = rows.collect();
    let columns = vec![
        column("x", ColumnType::Float),
        column("y", ColumnType::Float),
    ];
    let spec = json!({
        "task": "regression",
        "label": "y",
        "model": { "family": "mlp", "hidden": [8] },
        "optimizer": { "learning_rate": 0.05 },
        "epochs": 40,
        "batch_size": 32,
        "seed": 3,
    });
    trained(spec, table(columns, &rows).path())
});

/// Images of 4×4 pixels in a column each: light ones and dark ones.
pub static PIXELS: LazyLock<ModelFiles> = LazyLock::new(|| {
    let pixel = |n: i64, p: i64| (n % 2) * 150 + (n * 7 + p * 13) % 100;
    let rows = (0..120).map(|n| {
        let pixels = (0..16).map(|p| Value::Integer(pixel(n, p)));
        let label = Value::Integer(n % 2);
        pixels.chain([label]).collect::<Vec<_>>()
    });
    let rows: Vec<_> = rows.collect();
    let mut columns: Vec<_> = (0..16)
        .map(|p| column(&format!("p{p}"), ColumnType::Integer))
        .collect();
    columns.push(column("light", ColumnType::Integer));
    let spec = json!({
        "task": "classification",
        "label": "light",
        "model": {
            "family": "cnn",
            "image": { "channels": 1, "height": 4, "width": 4 },
            "channels": [4],
            "hidden": 8,
        },
        "optimizer": { "learning_rate": 0.01 },
        "epochs": 4,
        "batch_size": 16,
        "seed": 3,
    });
    trained(spec, table(columns, &rows).path())
});

/// The same images, of three channels, in a column of bytes.
pub static COLOURED: LazyLock<ModelFiles> = LazyLock::new(|| {
    let image = |n: u8| -> Vec<u8> {
        let byte = |p: u8| (n % 2) * 150 + n.wrapping_mul(7).wrapping_add(p.wrapping_mul(13)) % 100;
        (0..48).map(byte).collect()
    };
    let images: Vec<Vec<u8>> = (0..120).map(image).collect();
    let rows = images.iter().zip(0..);
    let rows = rows.map(|(image, n)| vec![Value::Bytes(image), Value::Integer(n % 2)]);
    let rows: Vec<_> = rows.collect();
    let columns = vec![
        column("photo", ColumnType::Bytes),
        column("light", ColumnType::Integer),
    ];
    let spec = json!({
        "task": "classification",
        "label": "light",
        "model": {
            "family": "cnn",
            "image": { "channels": 3, "height": 4, "width": 4, "column": "photo" },
            "channels": [4],
            "hidden": 8,
        },
        "epochs": 2,
        "batch_size": 16,
        "seed": 3,
    });
    trained(spec, table(columns, &rows).path())
});

/// A store with models in it, and a cache.
pub struct Place {
    dir: TempDir,
    pub store: ArtifactStore,
    pub artifacts: ServingArtifacts,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}", dir.path().join("store").display());
        let store = ArtifactStore::open(&url).unwrap();
        let cache = dir.path().join("cache");
        let artifacts = ServingArtifacts::open(&cache, 1 << 30, store.clone()).unwrap();
        Self {
            dir,
            store,
            artifacts,
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub async fn put(&self, model: &ModelFiles) -> Digest {
        let files = [
            (MODEL_FILE, model.document.clone()),
            (WEIGHTS_FILE, model.weights.clone()),
        ];
        let mut listed = Vec::new();
        for (path, bytes) in files {
            let length = bytes.len() as u64;
            let sha256 = self.store.put_bytes(Bytes::from(bytes)).await.unwrap();
            listed.push(ManifestFile {
                path: path.to_owned(),
                sha256,
                bytes: length,
            });
        }
        let manifest = Manifest::new(ArtifactType::Model, listed, serde_json::Map::new());
        self.store.put_manifest(&manifest).await.unwrap()
    }
}

pub fn limits() -> ServingLimits {
    ServingLimits {
        log_per_million: 0,
        ..ServingLimits::default()
    }
}

pub fn served(version: u32, artifact: Digest, traffic: Traffic) -> ServedVersion {
    ServedVersion {
        version,
        deployment: DeploymentId(u64::from(version)),
        artifact,
        traffic,
    }
}

pub fn model(name: &str, versions: Vec<ServedVersion>) -> ServedModel {
    ServedModel {
        model: ModelName::new(name).unwrap(),
        limits: limits(),
        peers: Vec::new(),
        versions,
    }
}

pub fn plan(revision: u64, models: Vec<ServedModel>) -> ServingPlan {
    ServingPlan {
        revision,
        models,
        report_every: Duration::from_secs(1),
        access: None,
    }
}

pub fn config(name: &str) -> ServeConfig {
    ServeConfig::new(
        "127.0.0.1:0",
        EnvironmentName::production(),
        WorkerName::new(name).unwrap(),
    )
}

/// A server with its store.
pub struct Served {
    pub place: Place,
    pub server: Arc<InferenceServer>,
    pub address: SocketAddr,
}

impl Served {
    pub async fn start() -> Self {
        Self::start_with(config("w1")).await
    }

    pub async fn start_limited(change: impl FnOnce(&mut ServerLimits)) -> Self {
        let mut config = config("w1");
        change(&mut config.limits);
        Self::start_with(config).await
    }

    /// A server that waits for nobody for long and takes no large requests, with the factory's model.
    pub async fn impatient(limits: ServingLimits) -> Self {
        let served = Self::start_limited(|limits| {
            limits.max_request_bytes = 64 << 10;
            limits.head_within = Duration::from_millis(300);
            limits.body_within = Duration::from_millis(300);
            limits.stop_within = Duration::from_secs(2);
        })
        .await;
        served.serve_factory(limits).await;
        served
    }

    pub async fn start_with(config: ServeConfig) -> Self {
        let server = InferenceServer::start(config).await.unwrap();
        Self {
            place: Place::new(),
            address: server.address(),
            server: Arc::new(server),
        }
    }

    /// With the factory's model, live.
    pub async fn factory() -> Self {
        let served_by = Self::start().await;
        served_by.serve_factory(limits()).await;
        served_by
    }

    pub async fn serve_factory(&self, limits: ServingLimits) {
        let artifact = self.place.put(&FACTORY).await;
        let mut factory = model("factory", vec![served(1, artifact, Traffic::Live)]);
        factory.limits = limits;
        self.apply(plan(1, vec![factory]));
        self.until_ready().await;
    }

    pub fn apply(&self, plan: ServingPlan) {
        self.server.apply(plan, self.place.artifacts.clone());
    }

    pub fn version(&self, model: &str, version: u32) -> Option<VersionStatus> {
        let status = self.server.status();
        let mut versions = status.versions.into_iter();
        versions.find(|v| v.model.as_str() == model && v.version == version)
    }

    /// Waits until something holds, looking again whenever the server says that something changed.
    pub async fn until<T>(&self, what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + WITHIN;
        loop {
            let changed = self.server.changed().notified();
            if let Some(seen) = seen() {
                return seen;
            }
            assert!(
                Instant::now() < deadline,
                "{what} did not happen: {:?}",
                self.server.status()
            );
            // Counts change without a word.
            let _ = tokio::time::timeout(Duration::from_millis(5), changed).await;
        }
    }

    pub async fn until_ready(&self) {
        self.until("all is ready", || {
            let status = self.server.status();
            let mut versions = status.versions.iter();
            (status.plan > 0 && versions.all(|v| v.state == VersionState::Ready)).then_some(())
        })
        .await;
    }

    pub async fn grpc(&self) -> GrpcInferenceServiceClient<Channel> {
        GrpcInferenceServiceClient::new(self.channel().await)
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        endpoint.connect().await.unwrap()
    }

    pub async fn http(&self, request: &[u8]) -> HttpAnswer {
        http(self.address, request).await
    }

    pub async fn get(&self, path: &str) -> HttpAnswer {
        self.http(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
            .await
    }

    pub async fn post(&self, path: &str, body: &Json) -> HttpAnswer {
        self.post_bytes(path, body.to_string().as_bytes(), "").await
    }

    pub async fn post_bytes(&self, path: &str, body: &[u8], headers: &str) -> HttpAnswer {
        let mut request = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.http(&request).await
    }
}

/// An answer over HTTP/1.1.
#[derive(Debug)]
pub struct HttpAnswer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl HttpAnswer {
    pub fn json(&self) -> Json {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn error(&self) -> String {
        self.json()["error"].as_str().unwrap().to_owned()
    }
}

pub async fn http(address: SocketAddr, request: &[u8]) -> HttpAnswer {
    let talk = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Who is refused early closes before all was sent.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    let answer = tokio::time::timeout(WITHIN, talk).await.unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no answer: {}", String::from_utf8_lossy(&answer)));
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse();
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(": ").unwrap();
        (name.to_ascii_lowercase(), value.to_owned())
    });
    HttpAnswer {
        status: status.unwrap(),
        headers: headers.collect(),
        body: answer[end + 4..].to_vec(),
    }
}

pub fn typed(
    name: &str,
    datatype: &str,
    rows: usize,
    contents: InferTensorContents,
) -> InferInputTensor {
    InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape: vec![rows as i64],
        parameters: HashMap::new(),
        contents: Some(contents),
    }
}

/// A request for these machines, typed.
pub fn factory_request(id: &str, machines: &[Machine]) -> ModelInferRequest {
    let rows = machines.len();
    let all = || machines.iter();
    ModelInferRequest {
        model_name: "factory".to_owned(),
        id: id.to_owned(),
        inputs: vec![
            typed(
                "kind",
                "BYTES",
                rows,
                InferTensorContents {
                    bytes_contents: all().map(|m| Bytes::from(m.kind)).collect(),
                    ..InferTensorContents::default()
                },
            ),
            typed(
                "torque",
                "FP64",
                rows,
                InferTensorContents {
                    fp64_contents: all().map(|m| m.torque).collect(),
                    ..InferTensorContents::default()
                },
            ),
            typed(
                "speed",
                "INT64",
                rows,
                InferTensorContents {
                    int64_contents: all().map(|m| m.speed).collect(),
                    ..InferTensorContents::default()
                },
            ),
            typed(
                "old",
                "BOOL",
                rows,
                InferTensorContents {
                    bool_contents: all().map(|m| m.old).collect(),
                    ..InferTensorContents::default()
                },
            ),
        ],
        ..ModelInferRequest::default()
    }
}

/// The same over REST.
pub fn factory_body(id: &str, machines: &[Machine]) -> Json {
    let rows = machines.len();
    let all = || machines.iter();
    json!({
        "id": id,
        "inputs": [
            { "name": "kind", "datatype": "BYTES", "shape": [rows],
              "data": all().map(|m| m.kind).collect::<Vec<_>>() },
            { "name": "torque", "datatype": "FP64", "shape": [rows],
              "data": all().map(|m| m.torque).collect::<Vec<_>>() },
            { "name": "speed", "datatype": "INT64", "shape": [rows],
              "data": all().map(|m| m.speed).collect::<Vec<_>>() },
            { "name": "old", "datatype": "BOOL", "shape": [rows],
              "data": all().map(|m| m.old).collect::<Vec<_>>() },
        ],
    })
}

pub fn probabilities(response: &ModelInferResponse) -> Vec<f64> {
    let at = response
        .outputs
        .iter()
        .position(|o| o.name == "probabilities");
    let output = &response.outputs[at.unwrap()];
    output.contents.as_ref().unwrap().fp64_contents.clone()
}
