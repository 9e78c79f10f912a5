//! How many single-row requests a second the server answers, and how soon: the model of
//! `examples/predictive-maintenance`, served by this process, asked by a second one over gRPC.
//!
//! `cargo run --release -p emberline-serve --example load [clients] [seconds] [grpc|raw]`

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a measurement: what goes wrong ends it"
)]

use std::{
    collections::HashMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use bytes::Bytes;
use emberline_common::{
    artifact::{ArtifactStore, Manifest, ManifestFile},
    ids::{DeploymentId, EnvironmentName, ModelName, WorkerName},
    serving::{ServedModel, ServedVersion, ServingLimits, ServingPlan, Traffic, VersionState},
    spec::ArtifactType,
};
use emberline_data::Convert;
use emberline_proto::inference::{
    InferTensorContents, ModelInferRequest,
    grpc_inference_service_client::GrpcInferenceServiceClient,
    model_infer_request::InferInputTensor,
};
use emberline_serve::{InferenceServer, ServeConfig};
use emberline_train::train::Train;
use emberline_worker::{
    documents::{MODEL_FILE, WEIGHTS_FILE},
    serving::{Serving as _, ServingArtifacts},
    stage::Stage as _,
    testing::TestContext,
};
use serde_json::json;
use tonic::transport::Channel;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match arguments.as_slice() {
        [load, address, clients, seconds, kind] if load == "ask" => {
            runtime.block_on(ask(address, clients, seconds, kind == "raw"));
        }
        rest => {
            let at =
                |n: usize, other: &str| rest.get(n).cloned().unwrap_or_else(|| other.to_owned());
            let (clients, seconds, kind) = (at(0, "64"), at(1, "5"), at(2, "grpc"));
            runtime.block_on(serve(&[&clients, &seconds, &kind]));
        }
    }
}

/// Trains the example's model, in less than a second.
fn trained(dir: &Path) -> (Vec<u8>, Vec<u8>) {
    let data =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/predictive-maintenance/data");
    std::fs::copy(data.join("ai4i2020.csv"), dir.join("ai4i2020.csv")).unwrap();
    let convert = TestContext::builder()
        .spec(json!({
            "rename": {
                "Type": "type",
                "Air temperature [K]": "air_temperature",
                "Process temperature [K]": "process_temperature",
                "Rotational speed [rpm]": "rotational_speed",
                "Torque [Nm]": "torque",
                "Tool wear [min]": "tool_wear",
                "Machine failure": "failure",
            },
            "drop": ["UDI", "Product ID", "TWF", "HDF", "PWF", "OSF", "RNF"],
        }))
        .input("raw", ArtifactType::Files, dir)
        .build();
    let parts = Convert.run(&convert.ctx).unwrap();
    let table = convert.output(&parts.artifacts, "data");
    let train = TestContext::builder()
        .spec(json!({
            "task": "classification",
            "label": "failure",
            "derived": {
                "power": "torque * rotational_speed",
                "strain": "torque * tool_wear",
                "warming": "process_temperature - air_temperature",
            },
            "model": { "family": "mlp", "hidden": [64, 64] },
            "epochs": 3,
            "batch_size": 256,
        }))
        .input("train", ArtifactType::Table, table)
        .build();
    let output = Train.run(&train.ctx).unwrap();
    let model = train.output(&output.artifacts, "model");
    let read = |name: &str| std::fs::read(model.join(name)).unwrap();
    (read(MODEL_FILE), read(WEIGHTS_FILE))
}

async fn serve(load: &[&String]) {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    std::fs::create_dir(&raw).unwrap();
    let (document, weights) = trained(&raw);
    let store = ArtifactStore::open("memory:").unwrap();
    let mut files = Vec::new();
    for (path, content) in [(MODEL_FILE, document), (WEIGHTS_FILE, weights)] {
        let bytes = content.len() as u64;
        let sha256 = store.put_bytes(content.into()).await.unwrap();
        files.push(ManifestFile {
            path: path.to_owned(),
            sha256,
            bytes,
        });
    }
    let manifest = Manifest::new(ArtifactType::Model, files, serde_json::Map::new());
    let artifact = store.put_manifest(&manifest).await.unwrap();
    let artifacts = ServingArtifacts::open(&dir.path().join("cache"), 1 << 30, store).unwrap();
    let config = ServeConfig::new(
        "127.0.0.1:0",
        EnvironmentName::production(),
        WorkerName::new("load").unwrap(),
    );
    let server = InferenceServer::start(config).await.unwrap();
    let limits = ServingLimits::default();
    let version = ServedVersion {
        version: 1,
        deployment: DeploymentId(1),
        artifact,
        traffic: Traffic::Live,
    };
    let model = ServedModel {
        model: ModelName::new("ai4i").unwrap(),
        limits,
        peers: Vec::new(),
        versions: vec![version],
    };
    let plan = ServingPlan {
        revision: 1,
        models: vec![model],
        report_every: Duration::from_secs(1),
    };
    server.apply(plan, artifacts);
    while server.status().versions[0].state != VersionState::Ready {
        server.changed().notified().await;
    }
    let address = server.address().to_string();
    let mut asking = Command::new(std::env::current_exe().unwrap());
    asking.arg("ask").arg(address).args(load);
    let asked = tokio::task::spawn_blocking(move || asking.status().unwrap()).await;
    assert!(asked.unwrap().success());
    let stats = &server.status().versions[0].stats;
    println!(
        "the server itself: {} answered, {} errors, {} refused, p50 {:?} µs, p99 {:?} µs",
        stats.requests,
        stats.errors,
        stats.overloaded,
        stats.latency.quantile_micros(0.5).unwrap(),
        stats.latency.quantile_micros(0.99).unwrap()
    );
    server.stop().await;
}

/// One machine, another one for each `n`.
fn request(n: u64, raw: bool) -> ModelInferRequest {
    let spread = |by: u64, from: f64, width: f64| from + (n * by % 1000) as f64 / 1000.0 * width;
    let numbers = [
        ("air_temperature", spread(7, 296.0, 8.0)),
        ("process_temperature", spread(11, 306.0, 8.0)),
        ("torque", spread(13, 20.0, 40.0)),
    ];
    let integers = [
        ("rotational_speed", spread(17, 1200.0, 800.0) as i64),
        ("tool_wear", spread(19, 0.0, 250.0) as i64),
    ];
    let kind = ["L", "M", "H"][(n % 3) as usize];
    let mut inputs = Vec::new();
    let mut contents = Vec::new();
    let mut add = |name: &str, datatype: &str, typed: InferTensorContents, bytes: Vec<u8>| {
        inputs.push(InferInputTensor {
            name: name.to_owned(),
            datatype: datatype.to_owned(),
            shape: vec![1],
            parameters: HashMap::new(),
            contents: (!raw).then_some(typed),
        });
        if raw {
            contents.push(bytes.into());
        }
    };
    let typed = InferTensorContents {
        bytes_contents: vec![Bytes::from_static(kind.as_bytes())],
        ..InferTensorContents::default()
    };
    add(
        "type",
        "BYTES",
        typed,
        [&1u32.to_le_bytes()[..], kind.as_bytes()].concat(),
    );
    for (name, value) in numbers {
        let typed = InferTensorContents {
            fp64_contents: vec![value],
            ..InferTensorContents::default()
        };
        add(name, "FP64", typed, value.to_le_bytes().to_vec());
    }
    for (name, value) in integers {
        let typed = InferTensorContents {
            int64_contents: vec![value],
            ..InferTensorContents::default()
        };
        add(name, "INT64", typed, value.to_le_bytes().to_vec());
    }
    ModelInferRequest {
        model_name: "ai4i".to_owned(),
        inputs,
        raw_input_contents: contents,
        ..ModelInferRequest::default()
    }
}

async fn ask(address: &str, clients: &str, seconds: &str, raw: bool) {
    let clients: u64 = clients.parse().unwrap();
    let lasts = Duration::from_secs(seconds.parse().unwrap());
    let mut connected = Vec::new();
    for _ in 0..clients {
        let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
        connected.push(GrpcInferenceServiceClient::new(
            endpoint.connect().await.unwrap(),
        ));
    }
    let warm = Instant::now() + Duration::from_secs(1);
    let end = warm + lasts;
    let mut asking = Vec::new();
    for (client, mut channel) in (0..).zip(connected) {
        asking.push(tokio::spawn(async move {
            let mut took = Vec::with_capacity(10_000);
            let mut n: u64 = client * 1_000_003;
            loop {
                n += 1;
                let began = Instant::now();
                if began >= end {
                    return took;
                }
                channel.model_infer(request(n, raw)).await.unwrap();
                if began >= warm {
                    took.push(began.elapsed());
                }
            }
        }));
    }
    let mut all = Vec::new();
    for client in asking {
        all.extend(client.await.unwrap());
    }
    all.sort_unstable();
    let at = |q: f64| all[((all.len() - 1) as f64 * q) as usize];
    println!(
        "{clients} clients, a connection each: {:.0} requests/s, p50 {:?}, p95 {:?}, p99 {:?}, longest {:?}",
        all.len() as f64 / lasts.as_secs_f64(),
        at(0.5),
        at(0.95),
        at(0.99),
        all[all.len() - 1]
    );
}
