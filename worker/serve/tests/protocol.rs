//! The two protocols as their clients see them, against what the model itself says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bytes::Bytes;
use emberline_common::serving::{ServingLimits, Traffic, share_of};
use emberline_proto::inference::{
    InferParameter, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest,
    RepositoryIndexRequest, ServerLiveRequest, ServerMetadataRequest, ServerReadyRequest,
    infer_parameter::ParameterChoice, model_infer_request::InferRequestedOutputTensor,
};
use emberline_serve::ServeConfig;
use emberline_train::{Model, encode::Source};
use emberline_worker::serving::Serving as _;
use serde_json::json;
use support::*;
use tonic::Code;

/// What the model itself says of these machines.
fn said_by_the_model(files: &ModelFiles, machines: &[Machine]) -> Vec<f64> {
    struct Rows<'a>(&'a [Machine]);
    impl Source for Rows<'_> {
        fn rows(&self) -> usize {
            self.0.len()
        }
        fn numbers(
            &self,
            column: &str,
        ) -> Result<std::borrow::Cow<'_, [f64]>, emberline_train::TrainError> {
            let of = |m: &Machine| match column {
                "torque" => m.torque,
                "speed" => m.speed as f64,
                _ => f64::from(u8::from(m.old)),
            };
            Ok(self.0.iter().map(of).collect())
        }
        fn texts(&self, _: &str) -> Result<Vec<&str>, emberline_train::TrainError> {
            Ok(self.0.iter().map(|m| m.kind).collect())
        }
        fn bytes(&self, _: &str) -> Result<Vec<&[u8]>, emberline_train::TrainError> {
            Ok(Vec::new())
        }
    }
    let compute = emberline_train::backend::Compute::cpu();
    let model = Model::from_parts(&files.document, files.weights.clone(), &compute).unwrap();
    let encoded = model.encoder().encode(&Rows(machines)).unwrap();
    let outputs = model.forward(&encoded.matrix).unwrap();
    match model.label().predictions(&outputs) {
        emberline_train::model::Predictions::Probabilities { values, .. } => values,
        emberline_train::model::Predictions::Values(values) => values,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_answers_what_the_model_says() {
    let served = Served::factory().await;
    let mut client = served.grpc().await;
    let machines: Vec<Machine> = (7..12).map(machine).collect();
    let answer = client.model_infer(factory_request("r-1", &machines)).await;
    let answer = answer.unwrap().into_inner();
    assert_eq!(
        (answer.id.as_str(), answer.model_version.as_str()),
        ("r-1", "1")
    );
    let expected = said_by_the_model(&FACTORY, &machines);
    assert_eq!(probabilities(&answer), expected);
    assert_eq!(answer.outputs[0].shape, [5, 2]);
    assert_eq!(answer.outputs[1].name, "class");
    let classes = &answer.outputs[1].contents.as_ref().unwrap().bytes_contents;
    for (class, p) in classes.iter().zip(expected.chunks(2)) {
        assert_eq!(class, if p[1] > p[0] { "yes" } else { "no" });
    }

    // The same in raw contents, with smaller datatypes and `[rows, 1]`, is the same; and only the
    // output that was asked for comes.
    let mut raw = factory_request("", &machines);
    for input in &mut raw.inputs {
        input.contents = None;
        input.shape.push(1);
    }
    raw.inputs[2].datatype = "INT16".to_owned();
    raw.inputs[1].datatype = "FP64".to_owned();
    let each = |of: &dyn Fn(&Machine) -> Vec<u8>| -> Bytes {
        machines.iter().flat_map(of).collect::<Vec<u8>>().into()
    };
    raw.raw_input_contents = vec![
        each(&|m| [&1u32.to_le_bytes()[..], m.kind.as_bytes()].concat()),
        each(&|m| m.torque.to_le_bytes().to_vec()),
        each(&|m| (m.speed as i16).to_le_bytes().to_vec()),
        each(&|m| vec![u8::from(m.old)]),
    ];
    raw.outputs = vec![InferRequestedOutputTensor {
        name: "probabilities".to_owned(),
        ..InferRequestedOutputTensor::default()
    }];
    let answer = client.model_infer(raw).await.unwrap().into_inner();
    assert!(!answer.id.is_empty());
    assert_eq!(answer.outputs.len(), 1);
    assert!(answer.outputs[0].contents.is_none());
    let bytes: Vec<u8> = expected.iter().flat_map(|p| p.to_le_bytes()).collect();
    assert_eq!(answer.raw_output_contents, [Bytes::from(bytes)]);

    let stats = served.version("factory", 1).unwrap().stats;
    assert_eq!((stats.requests, stats.rows, stats.errors), (2, 10, 0));
    assert_eq!(stats.latency.total(), 2);
    assert_eq!(stats.predictions.iter().sum::<u64>(), 10);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rest_answers_the_same_as_grpc_in_json_and_in_bytes() {
    let served = Served::factory().await;
    let machines: Vec<Machine> = (20..23).map(machine).collect();
    let expected = said_by_the_model(&FACTORY, &machines);
    let answer = served
        .post("/v2/models/factory/infer", &factory_body("a", &machines))
        .await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "application/json");
    let body = answer.json();
    assert_eq!(
        (&body["id"], &body["model_version"]),
        (&json!("a"), &json!("1"))
    );
    assert_eq!(body["outputs"][0]["data"], json!(expected));
    assert_eq!(body["outputs"][0]["shape"], json!([3, 2]));

    let mut body = factory_body("", &machines);
    body["inputs"][1] = json!({
        "name": "torque", "datatype": "FP64", "shape": [3],
        "parameters": { "binary_data_size": 24 },
    });
    body["outputs"] = json!([
        { "name": "class" },
        { "name": "probabilities", "parameters": { "binary_data": true } },
    ]);
    let head = body.to_string();
    let mut whole = head.clone().into_bytes();
    whole.extend(machines.iter().flat_map(|m| m.torque.to_le_bytes()));
    let headers = format!("inference-header-content-length: {}\r\n", head.len());
    let path = "/v2/models/factory/versions/1/infer";
    let answer = served.post_bytes(path, &whole, &headers).await;
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );
    let length: usize = answer.headers["inference-header-content-length"]
        .parse()
        .unwrap();
    let head: serde_json::Value = serde_json::from_slice(&answer.body[..length]).unwrap();
    assert_eq!(head["outputs"][0]["name"], "class");
    assert_eq!(head["outputs"][1]["parameters"]["binary_data_size"], 48);
    let bytes: Vec<u8> = expected.iter().flat_map(|p| p.to_le_bytes()).collect();
    assert_eq!(answer.body[length..], bytes);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_served_is_told() {
    let served = Served::start().await;
    let mut client = served.grpc().await;
    let live = client.server_live(ServerLiveRequest {}).await.unwrap();
    assert!(live.into_inner().live);
    let ready = client.server_ready(ServerReadyRequest {}).await.unwrap();
    assert!(!ready.into_inner().ready, "before its first plan");
    assert_eq!(served.get("/v2/health/live").await.status, 200);
    assert_eq!(served.get("/v2/health/ready").await.status, 503);

    served.serve_factory(limits()).await;
    assert_eq!(served.get("/v2/health/ready").await.status, 200);
    let about = client
        .server_metadata(ServerMetadataRequest {})
        .await
        .unwrap();
    assert_eq!(about.into_inner().name, "emberline");
    let asked = ModelMetadataRequest {
        name: "factory".to_owned(),
        version: String::new(),
    };
    let about = client.model_metadata(asked).await.unwrap().into_inner();
    let inputs: Vec<_> = (about.inputs.iter())
        .map(|i| (i.name.as_str(), i.datatype.as_str(), i.shape.as_slice()))
        .collect();
    assert_eq!(
        inputs,
        [
            ("kind", "BYTES", &[-1][..]),
            ("torque", "FP64", &[-1]),
            ("speed", "INT64", &[-1]),
            ("old", "BOOL", &[-1]),
        ]
    );
    assert_eq!(about.outputs[0].shape, [-1, 2]);
    assert_eq!(
        (about.versions.as_slice(), about.platform.as_str()),
        (&["1".to_owned()][..], "emberline_burn_mlp")
    );
    let rest = served.get("/v2/models/factory").await.json();
    assert_eq!(
        rest["inputs"][2],
        json!({"name": "speed", "datatype": "INT64", "shape": [-1]})
    );
    assert_eq!(
        served
            .get("/v2/models/factory/versions/1/ready")
            .await
            .status,
        200
    );
    assert_eq!(
        served
            .get("/v2/models/factory/versions/2/ready")
            .await
            .status,
        404
    );
    assert_eq!(served.get("/v2").await.json()["name"], "emberline");

    let index = client
        .repository_index(RepositoryIndexRequest::default())
        .await
        .unwrap();
    let index = index.into_inner().models;
    assert_eq!(
        (index[0].name.as_str(), index[0].state.as_str()),
        ("factory", "READY")
    );

    // Drained, it says so, and goes on answering.
    served.server.drain();
    assert!(!served.server.status().ready);
    assert_eq!(served.get("/v2/health/ready").await.status, 503);
    client
        .model_infer(factory_request("", &[machine(1)]))
        .await
        .unwrap();
    served.server.stop().await;
    assert!(
        tokio::net::TcpStream::connect(served.address)
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_are_on_the_same_port() {
    let served = Served::start().await;
    let channel = served.channel().await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let asked = tonic_health::pb::HealthCheckRequest {
        service: "inference.GRPCInferenceService".to_owned(),
    };
    let status = health
        .check(asked.clone())
        .await
        .unwrap()
        .into_inner()
        .status;
    assert_eq!(status, 2, "not serving before there is a plan");
    served.serve_factory(limits()).await;
    let mut watched = health.watch(asked).await.unwrap().into_inner();
    while watched.message().await.unwrap().unwrap().status != 1 {}
    // A call that nobody answers.
    let unknown = served.post_bytes("/no.Such/Call", b"", "content-type: application/grpc\r\n");
    assert_eq!(unknown.await.headers["grpc-status"], "12");
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_models_and_versions_answer_side_by_side() {
    let served = Served::start().await;
    let place = &served.place;
    let (one, two) = (place.put(&FACTORY).await, place.put(&FACTORY_2).await);
    let triple = place.put(&TRIPLE).await;
    let pixels = place.put(&PIXELS).await;
    let factory = vec![
        support::served(1, one, Traffic::Live),
        support::served(2, two, Traffic::Canary { share: 2_000 }),
    ];
    served.apply(plan(
        1,
        vec![
            model("factory", factory),
            model("triple", vec![support::served(5, triple, Traffic::Live)]),
            model("pixels", vec![support::served(1, pixels, Traffic::Live)]),
        ],
    ));
    served.until_ready().await;
    let mut client = served.grpc().await;

    // The canary gets exactly the share of ids that it is to have.
    for n in 0..300 {
        let id = format!("r-{n}");
        let answer = client
            .model_infer(factory_request(&id, &[machine(n)]))
            .await;
        let expected = if share_of("factory", &id) < 2_000 {
            "2"
        } else {
            "1"
        };
        assert_eq!(answer.unwrap().into_inner().model_version, expected, "{id}");
    }
    let mut named = factory_request("r-0", &[machine(1)]);
    named.model_version = "2".to_owned();
    let answer = client.model_infer(named).await.unwrap().into_inner();
    assert_eq!(
        probabilities(&answer),
        said_by_the_model(&FACTORY_2, &[machine(1)])
    );

    let body = json!({ "inputs": [
        { "name": "x", "datatype": "FP32", "shape": [2, 1], "data": [[4.0], [9]] },
    ] });
    let answer = served.post("/v2/models/triple/infer", &body).await.json();
    assert_eq!(answer["outputs"][0]["name"], "value");
    let values: Vec<f64> = serde_json::from_value(answer["outputs"][0]["data"].clone()).unwrap();
    assert!(
        (values[0] - 12.0).abs() < 2.0 && (values[1] - 27.0).abs() < 2.0,
        "{values:?}"
    );

    // Images as pixel columns and as one tensor are the same.
    let image: Vec<i64> = (0..16).map(|p| 150 + p).collect();
    let columns = (0..16).map(
        |p| json!({"name": format!("p{p}"), "datatype": "INT64", "shape": [1], "data": [image[p]]}),
    );
    let body = json!({ "inputs": columns.collect::<Vec<_>>() });
    let by_columns = served.post("/v2/models/pixels/infer", &body).await.json();
    for shape in [json!([1, 1, 4, 4]), json!([1, 4, 4]), json!([1, 16])] {
        let body = json!({ "inputs": [
            { "name": "image", "datatype": "UINT8", "shape": shape, "data": image },
        ] });
        let as_one = served.post("/v2/models/pixels/infer", &body).await.json();
        assert_eq!(as_one["outputs"], by_columns["outputs"], "{shape}");
    }
    let body = json!({ "inputs": [
        { "name": "image", "datatype": "UINT8", "shape": [1, 15], "data": image },
    ] });
    let error = served.post("/v2/models/pixels/infer", &body).await;
    assert!(
        error.error().contains("[rows, 1, 4, 4] or [rows, 16]"),
        "{}",
        error.error()
    );
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_in_bytes_may_come_as_numbers() {
    let served = Served::start().await;
    let artifact = served.place.put(&COLOURED).await;
    let versions = vec![support::served(1, artifact, Traffic::Live)];
    served.apply(plan(1, vec![model("photos", versions)]));
    served.until_ready().await;
    // As it lies in the column: pixel after pixel, with the channels last.
    let bytes: Vec<u8> = (0..96).map(|n| (n * 5) as u8).collect();
    let infer = |input: serde_json::Value, raw: Vec<u8>| {
        let head = json!({ "inputs": [input] }).to_string();
        let headers = format!("inference-header-content-length: {}\r\n", head.len());
        let body = [head.into_bytes(), raw].concat();
        let served = &served;
        async move {
            served
                .post_bytes("/v2/models/photos/infer", &body, &headers)
                .await
        }
    };
    let one = |datatype: &str, shape: &[usize], size: usize| {
        json!({
            "name": "photo", "datatype": datatype, "shape": shape,
            "parameters": { "binary_data_size": size },
        })
    };
    let with_lengths: Vec<u8> = (bytes.chunks(48))
        .flat_map(|image| [&48u32.to_le_bytes()[..], image].concat())
        .collect();
    let expected = infer(one("BYTES", &[2], 104), with_lengths).await.json()["outputs"].clone();
    assert_eq!(expected[0]["shape"], json!([2, 2]));
    let flat = infer(one("UINT8", &[2, 48], 96), bytes.clone()).await;
    assert_eq!(flat.json()["outputs"], expected);
    // Channel after channel.
    let planes: Vec<u8> = (bytes.chunks(48))
        .flat_map(|image| (0..3).flat_map(move |c| image.iter().skip(c).step_by(3).copied()))
        .collect();
    let planes = infer(one("UINT8", &[2, 3, 4, 4], 96), planes).await;
    assert_eq!(planes.json()["outputs"], expected);
    let halves: Vec<u8> = (0..48).flat_map(|_| 0.5f32.to_le_bytes()).collect();
    let refused = infer(one("FP32", &[1, 48], 192), halves).await;
    assert!(
        refused
            .error()
            .contains("has 0.5 in row 0: this model takes pixels as integers from 0 to 255")
    );
    let short = [&3u32.to_le_bytes()[..], b"abc"].concat();
    let refused = infer(one("BYTES", &[1], 7), short).await;
    assert!(
        refused
            .error()
            .contains("the image in column `photo`, row 0, has 3 bytes, but 48 are expected"),
        "{}",
        refused.error()
    );
    let drift = served.version("photos", 1).unwrap().stats.input_drift;
    assert_eq!((drift[0].column.as_str(), drift[0].values), ("photo", 6));

    // A large request is read on another thread, and answered all the same.
    let rows = 1000;
    let many = infer(one("UINT8", &[rows, 48], rows * 48), vec![7; rows * 48])
        .await
        .json();
    assert_eq!(many["outputs"][0]["shape"], json!([rows, 2]));
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callers_deadline_and_an_overflow_are_answered_at_once_and_pass() {
    let served = Served::start().await;
    served
        .serve_factory(ServingLimits {
            max_queue: 8,
            max_batch: 1,
            max_request_rows: 64,
            ..limits()
        })
        .await;
    let machines: Vec<Machine> = (0..8).map(machine).collect();
    let client = served.grpc().await;
    let one = |n: usize| {
        let mut client = client.clone();
        let request = factory_request(&format!("r-{n}"), &machines);
        async move { client.model_infer(request).await }
    };
    let mut refused = 0;
    for round in 0..50 {
        let all = futures::future::join_all((0..128).map(|n| one(round * 128 + n))).await;
        for answer in all {
            match answer {
                Ok(_) => {}
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                    assert!(
                        status.message().contains("the model `factory` is busy"),
                        "{status:?}"
                    );
                    let retry = tonic_types::StatusExt::get_details_retry_info(&status);
                    assert!(retry.is_some());
                    refused += 1;
                }
            }
        }
        if refused > 0 {
            break;
        }
    }
    assert!(refused > 0, "the queue never overflowed");
    one(0).await.unwrap();
    let stats = served.version("factory", 1).unwrap().stats;
    assert_eq!((stats.overloaded, stats.errors), (refused, 0));

    let mut late = factory_request("", &machines);
    let micro = InferParameter {
        parameter_choice: Some(ParameterChoice::Int64Param(1)),
    };
    late.parameters.insert("timeout".to_owned(), micro);
    let status = client.clone().model_infer(late).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    // Nobody could have met that: it says nothing against the version.
    assert_eq!(served.version("factory", 1).unwrap().stats.errors, 0);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_models_and_versions_are_named() {
    let served = Served::factory().await;
    let mut client = served.grpc().await;
    let mut request = factory_request("", &[machine(1)]);
    request.model_name = "factori".to_owned();
    let status = client.model_infer(request.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(
        status.message(),
        "there is no model `factori` here; there are `factory`"
    );
    request.model_name = "factory".to_owned();
    request.model_version = "9".to_owned();
    let status = client.model_infer(request).await.unwrap_err();
    assert_eq!(
        status.message(),
        "the model `factory` has no version `9` here; there are `1`"
    );
    let rest = served
        .post("/v2/models/x/infer", &factory_body("", &[machine(1)]))
        .await;
    assert_eq!(
        (rest.status, rest.error().contains("no model `x`")),
        (404, true)
    );
    let ready = client
        .model_ready(ModelReadyRequest {
            name: "factory".to_owned(),
            version: "9".to_owned(),
        })
        .await;
    assert_eq!(ready.unwrap_err().code(), Code::NotFound);
    let empty = client
        .model_infer(ModelInferRequest::default())
        .await
        .unwrap_err();
    assert_eq!(empty.code(), Code::NotFound);
    served.server.stop().await;
}

#[tokio::test]
async fn an_address_that_is_taken_is_told() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    let config = ServeConfig {
        listen: listen.clone(),
        ..config("w1")
    };
    let error = emberline_serve::InferenceServer::start(config)
        .await
        .err()
        .unwrap();
    assert!(
        error
            .to_string()
            .starts_with(&format!("cannot serve models on `{listen}`: "))
    );
}
