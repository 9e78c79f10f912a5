//! What clients do wrong: one precise error for each, which names the column, and a server that goes
//! on answering.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use bytes::Bytes;
use emberline_common::serving::ServingLimits;
use emberline_proto::inference::{
    InferTensorContents, ModelInferRequest, model_infer_request::InferInputTensor,
};
use emberline_worker::serving::Serving as _;
use serde_json::{Value as Json, json};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

async fn small() -> Served {
    let limits = ServingLimits {
        max_request_rows: 4,
        ..limits()
    };
    Served::impatient(limits).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_tensor_is_told_with_its_column_over_grpc() {
    let served = small().await;
    let mut client = served.grpc().await;
    type Change = fn(&mut ModelInferRequest);
    let cases: [(Change, &str, &str); 19] = [
        (
            |r| drop(r.inputs.remove(1)),
            "inputs.torque",
            "the column `torque` is missing",
        ),
        (
            |r| r.inputs.truncate(1),
            "inputs.torque",
            "the columns `torque`, `speed`, `old` are missing",
        ),
        (
            |r| r.inputs[1].name = "torqe".to_owned(),
            "inputs.torqe",
            "there is no column `torqe`; did you mean `torque`? among the inputs of this model",
        ),
        (
            |r| {
                let again = r.inputs[0].clone();
                r.inputs.push(again);
            },
            "inputs.kind",
            "the column `kind` is there twice",
        ),
        (
            |r| {
                r.inputs[1] = typed(
                    "torque",
                    "BYTES",
                    2,
                    InferTensorContents {
                        bytes_contents: vec![Bytes::from("1"); 2],
                        ..InferTensorContents::default()
                    },
                );
            },
            "inputs.torque",
            "the column `torque` is of type float, but comes as BYTES: send FP64, FP32 or an integer type",
        ),
        (
            |r| {
                r.inputs[2] = typed(
                    "speed",
                    "FP64",
                    2,
                    InferTensorContents {
                        fp64_contents: vec![1.0; 2],
                        ..InferTensorContents::default()
                    },
                );
            },
            "inputs.speed",
            "the column `speed` is of type integer, but comes as FP64: send INT64 or a smaller integer type",
        ),
        (
            |r| r.inputs[1].contents.as_mut().unwrap().fp64_contents[1] = f64::NAN,
            "inputs.torque",
            "the column `torque` has NaN in row 1 (counted from 0): a model takes finite numbers only",
        ),
        (
            |r| r.inputs[1].contents.as_mut().unwrap().fp64_contents[0] = f64::NEG_INFINITY,
            "inputs.torque",
            "the column `torque` has -inf in row 0",
        ),
        (
            |r| r.inputs[1].contents.as_mut().unwrap().fp64_contents[0] = 1e300,
            "inputs.torque",
            "`torque` is 1e300 in row 0 (counted from 0): too large to compute with",
        ),
        (
            |r| r.inputs[2].contents.as_mut().unwrap().int64_contents[1] = 5,
            "inputs.load",
            "the derived feature `load` (torque / (speed - 5)) is inf in row 1",
        ),
        (
            |r| r.inputs[0].contents.as_mut().unwrap().bytes_contents[1] = Bytes::from(vec![0xff]),
            "inputs.kind",
            "the column `kind` is no UTF-8 in row 1",
        ),
        (
            |r| r.inputs[1].shape = vec![2, 2],
            "inputs.torque",
            "the column `torque` has the shape [2, 2]: a column has the shape [rows] or [rows, 1]",
        ),
        (
            |r| r.inputs[0].shape = vec![-1],
            "inputs.kind",
            "the column `kind` has the shape [-1]",
        ),
        (
            |r| r.inputs[1].shape = vec![3],
            "inputs.torque",
            "the column `torque` has 3 rows, but `kind` has 2",
        ),
        (
            |r| r.inputs[0].shape = vec![i64::MAX],
            "inputs.kind",
            "a request has at most 4 here; send several",
        ),
        (
            |r| r.inputs[0].shape = vec![0],
            "inputs.kind",
            "the column `kind` has no rows",
        ),
        (
            |r| {
                r.inputs[0]
                    .contents
                    .as_mut()
                    .unwrap()
                    .bytes_contents
                    .truncate(1)
            },
            "inputs.kind",
            "the column `kind` has 1 values, but its shape [2] has room for 2",
        ),
        (
            |r| r.raw_input_contents = vec![Bytes::new()],
            "raw_input_contents",
            "there are 1 raw contents for 4 inputs: send one for each",
        ),
        (
            |r| r.id = "x".repeat(257),
            "id",
            "at most 256 bytes, no control characters",
        ),
    ];
    let count = cases.len() as u64;
    for (change, field, expected) in cases {
        let mut request = factory_request("", &[machine(10), machine(20)]);
        change(&mut request);
        let status = client.model_infer(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(expected), "{}", status.message());
        assert!(!status.message().contains('\n'));
        let details = tonic_types::StatusExt::get_details_bad_request(&status).unwrap();
        assert_eq!(
            details.field_violations[0].field,
            field,
            "{}",
            status.message()
        );
    }
    // An unknown category is no error: all of its numbers are 0, as in training.
    let mut unknown = factory_request("", &[machine(10)]);
    unknown.inputs[0].contents.as_mut().unwrap().bytes_contents = vec![Bytes::from("XXL")];
    client.model_infer(unknown).await.unwrap();
    let stats = served.version("factory", 1).unwrap().stats;
    // Not for the version: contents that do not come to it, and the id.
    assert_eq!(
        (stats.rejected, stats.errors, stats.requests),
        (count - 2, 0, 1)
    );

    // Many empty tensors, which are small on the wire only.
    let mut many = factory_request("", &[machine(10)]);
    many.inputs = vec![InferInputTensor::default(); 12_000];
    let status = client.model_infer(many).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status
            .message()
            .contains("has 12000 tensors and outputs, more than 10000"),
        "{status:?}"
    );

    // A message that is larger than anybody may send.
    let mut huge = factory_request("", &[machine(10)]);
    huge.inputs[0].contents.as_mut().unwrap().bytes_contents =
        vec![Bytes::from(vec![b'x'; 80_000])];
    let status = client.model_infer(huge).await.unwrap_err();
    assert!(status.message().contains("too large"), "{status:?}");
    client
        .model_infer(factory_request("", &[machine(1)]))
        .await
        .unwrap();
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_body_is_told_over_rest() {
    let served = small().await;
    let good = || factory_body("", &[machine(10)]);
    let set = |at: &str, value: Json| {
        let mut body = good();
        *body.pointer_mut(at).unwrap() = value;
        body.to_string()
    };
    let without = |at: usize, key: &str| {
        let mut body = good();
        body["inputs"][at].as_object_mut().unwrap().remove(key);
        body.to_string()
    };
    let deep = format!("{{\"inputs\": {}", "[".repeat(50_000));
    for (body, status, expected) in [
        (String::new(), 400, "the body is no request: EOF"),
        ("[1, 2".to_owned(), 400, "the body is no request"),
        ("{}".to_owned(), 400, "missing field `inputs`"),
        ("{\"inputs\": 3}".to_owned(), 400, "expected a sequence"),
        (deep, 400, "the body is no request"),
        (set("/inputs/1/data", json!([null])), 400, "has a null"),
        (
            set("/inputs/1/data", json!(["1.5"])),
            400,
            "the column `torque` has the datatype FP64, but texts in its `data`",
        ),
        (
            set("/inputs/2/data", json!([1.5])),
            400,
            "the column `speed` has the datatype INT64, but numbers that are no integers",
        ),
        (
            set("/inputs/3/data", json!([1])),
            400,
            "the column `old` has the datatype BOOL, but integers in its `data`",
        ),
        (
            set("/inputs/0/data", json!(["L", "M"])),
            400,
            "the column `kind` has 2 values, but its shape [1] has room for 1",
        ),
        (
            set("/inputs/1/datatype", json!("DOUBLE")),
            400,
            "the column `torque` has the datatype `DOUBLE`, which is none of",
        ),
        (
            set("/inputs/1/shape", json!([1.5])),
            400,
            "invalid type: floating point `1.5`",
        ),
        (
            set("/inputs/1/name", json!("speeed")),
            400,
            "there is no column `speeed`; did you mean `speed`?",
        ),
        (
            without(1, "data"),
            400,
            "the column `torque` has a name and a shape, but no values",
        ),
        (without(1, "shape"), 400, "missing field `shape`"),
        (
            {
                let mut b = good();
                b["outputs"] = json!([{"name": "clas"}]);
                b.to_string()
            },
            400,
            "there is no output `clas`; there are `probabilities`, `class`",
        ),
        (
            {
                let mut b = good();
                b["inputs"][1]["parameters"] = json!({"binary_data_size": 8});
                b.to_string()
            },
            400,
            "the column `torque` has `data` and `binary_data_size`: send one of them",
        ),
        (
            {
                let mut b = good();
                b["inputs"][1]["parameters"] = json!({"shared_memory_region": "x"});
                b.to_string()
            },
            501,
            "the input `torque` has the parameter `shared_memory_region`, which this server does not offer",
        ),
    ] {
        let answer = served
            .post_bytes("/v2/models/factory/infer", body.as_bytes(), "")
            .await;
        assert_eq!(answer.status, status, "{}", answer.error());
        assert!(answer.error().contains(expected), "{}", answer.error());
        assert!(!answer.error().contains('\n'));
    }
    let post = |body: &str, headers: &str| {
        let (body, headers) = (body.to_owned(), headers.to_owned());
        let served = &served;
        async move {
            served
                .post_bytes("/v2/models/factory/infer", body.as_bytes(), &headers)
                .await
        }
    };
    let answer = post("{}", "inference-header-content-length: 3\r\n").await;
    assert!(
        answer
            .error()
            .contains("no length within the body of 2 bytes"),
        "{}",
        answer.error()
    );
    let body = good().to_string();
    let headers = format!("inference-header-content-length: {}\r\n", body.len());
    let answer = post(&format!("{body}rest"), &headers).await;
    assert!(
        answer
            .error()
            .starts_with("4 bytes follow the JSON that belong to no input"),
        "{}",
        answer.error()
    );
    let answer = post(&body, "content-encoding: gzip\r\n").await;
    assert_eq!(answer.status, 415);
    let answer = served.get("/v2/models/factory/infer").await;
    assert_eq!(
        (answer.status, answer.headers["allow"].as_str()),
        (405, "POST")
    );
    for path in [
        "/",
        "/v2/models",
        "/v2/models/factory/versions",
        "/v2/models/factory/x/y",
        "/v3",
    ] {
        assert_eq!(served.get(path).await.status, 404, "{path}");
    }
    assert_eq!(post(&body, "").await.status, 200);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_senders_hold_up_nobody_but_themselves() {
    let served = small().await;
    let connect = || tokio::net::TcpStream::connect(served.address);
    // Nothing at all; half of HTTP/2's beginning; headers that never end.
    let mut silent = connect().await.unwrap();
    let mut half = connect().await.unwrap();
    half.write_all(b"PRI * HTTP/2").await.unwrap();
    let mut slow = connect().await.unwrap();
    slow.write_all(b"GET /v2 HTTP/1.1\r\nhost: x\r\nx-a: ")
        .await
        .unwrap();
    // A body that does not come.
    let mut waiting = connect().await.unwrap();
    waiting
        .write_all(
            b"POST /v2/models/factory/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        )
        .await
        .unwrap();
    // One that is too large is refused before it is sent, and one that hides its size when it is.
    let huge = "POST /v2/models/factory/infer HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 99999999999\r\n\r\n";
    let answer = served.http(huge.as_bytes()).await;
    assert_eq!(answer.status, 413);
    assert!(
        answer
            .error()
            .contains("a request has at most 65536 bytes here"),
        "{}",
        answer.error()
    );
    let mut chunked = b"POST /v2/models/factory/infer HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..10 {
        chunked.extend_from_slice(b"4000\r\n");
        chunked.extend(std::iter::repeat_n(b' ', 0x4000));
        chunked.extend_from_slice(b"\r\n");
    }
    assert_eq!(served.http(&chunked).await.status, 413);
    let many = format!(
        "GET /v2 HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n",
        "a".repeat(100_000)
    );
    assert_eq!(served.http(many.as_bytes()).await.status, 431);
    assert_eq!(
        served
            .http(b"\x16\x03\x01\x02\x00nonsense\r\n\r\n")
            .await
            .status,
        400
    );

    let mut answer = Vec::new();
    let read = waiting.read_to_end(&mut answer);
    let _ = tokio::time::timeout(WITHIN, read).await.unwrap();
    assert!(
        answer.starts_with(b"HTTP/1.1 408"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    for stream in [&mut silent, &mut half, &mut slow] {
        let ended = tokio::time::timeout(WITHIN, stream.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "a connection that says nothing stays open");
    }
    served
        .grpc()
        .await
        .model_infer(factory_request("", &[machine(1)]))
        .await
        .unwrap();
    let _still_silent = connect().await.unwrap();
    tokio::time::timeout(WITHIN, served.server.stop())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_connections_and_bytes_than_were_said_are_taken_at_once() {
    let served = Served::start_limited(|limits| {
        limits.max_connections = 2;
        limits.max_receiving_bytes = 40_000;
        limits.stop_within = Duration::from_millis(100);
    })
    .await;
    served.serve_factory(limits()).await;
    let body = vec![b' '; 50_000];
    let answer = served
        .post_bytes("/v2/models/factory/infer", &body, "")
        .await;
    assert_eq!(
        (answer.status, answer.headers["retry-after"].as_str()),
        (429, "1")
    );
    let mut large = factory_request("", &[machine(1)]);
    large.id = "x".repeat(50_000);
    let status = served.grpc().await.model_infer(large).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    // What was refused is counted no more.
    assert_eq!(
        served
            .post("/v2/models/factory/infer", &factory_body("", &[machine(1)]))
            .await
            .status,
        200
    );

    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = tokio::net::TcpStream::connect(served.address)
            .await
            .unwrap();
        stream
            .write_all(b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut first = [0; 8];
        stream.read_exact(&mut first).await.unwrap();
        held.push(stream);
    }
    let mut third = tokio::net::TcpStream::connect(served.address)
        .await
        .unwrap();
    third
        .write_all(b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(100), third.read(&mut [0; 8])).await;
    assert!(waits.is_err(), "a third connection was taken");
    drop(held.pop());
    let mut first = [0; 8];
    third.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1");
    served.server.stop().await;
}
