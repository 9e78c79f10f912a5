//! Connections at their worst: nobody is kept who gives nothing or takes nothing, floods of frames are
//! refused, and calls that are none are answered as such. Others are served meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bytes::Bytes;
use emberline_worker::serving::Serving as _;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use support::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::body::Body;
use tower_service::Service as _;

/// It still answers.
async fn is_well(served: &Served) {
    let request = factory_request("", &[machine(1)]);
    served.grpc().await.model_infer(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_nothing_more_or_takes_no_answer_is_not_kept() {
    let served = Served::impatient(limits()).await;
    // One good request, and then nothing.
    let mut idle = TcpStream::connect(served.address).await.unwrap();
    let ask = b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n";
    idle.write_all(ask).await.unwrap();
    let mut answers = Vec::new();
    let ended = tokio::time::timeout(WITHIN, idle.read_to_end(&mut answers)).await;
    assert!(ended.is_ok(), "an idle connection stays open");
    assert!(answers.starts_with(b"HTTP/1.1 200"));
    // Many requests, whose answers nobody reads.
    let mut deaf = TcpStream::connect(served.address).await.unwrap();
    let many = ask.repeat(1000);
    let refused = async { while deaf.write_all(&many).await.is_ok() {} };
    let ended = tokio::time::timeout(WITHIN, refused).await;
    assert!(ended.is_ok(), "who takes no answers is kept");
    is_well(&served).await;
    served.server.stop().await;
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// Fields as HPACK that refers to nothing.
fn fields<'a>(all: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in all {
        out.push(0);
        for text in [name, value] {
            out.push(u8::try_from(text.len()).unwrap());
            out.extend(text.as_bytes());
        }
    }
    out
}

/// Sends these frames after the beginning of HTTP/2, and waits until the other side has had enough.
async fn flood(served: &Served, frames: impl Iterator<Item = Vec<u8>>) {
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let begin = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
    ];
    stream.write_all(&begin.concat()).await.unwrap();
    let (mut read, mut write) = stream.split();
    let sending = async {
        for frame in frames {
            if write.write_all(&frame).await.is_err() {
                return;
            }
        }
    };
    let reading = async {
        let mut piece = vec![0; 1 << 16];
        while read.read(&mut piece).await.is_ok_and(|n| n > 0) {}
    };
    // It says so and closes, however much is still to come.
    let ended = tokio::time::timeout(WITHIN, async { tokio::join!(sending, reading) }).await;
    assert!(ended.is_ok(), "the flood is taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames_are_refused() {
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const CONTINUATION: u8 = 9;
    let served = Served::impatient(limits()).await;
    let head = fields([
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/inference.GRPCInferenceService/ServerLive"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]);
    // Streams that are opened and reset at once (CVE-2023-44487).
    let resets = (0..100_000).map(|n| {
        let id = 2 * n + 1;
        let mut both = frame(HEADERS, 4, id, &head);
        both.extend(frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        both
    });
    flood(&served, resets).await;
    is_well(&served).await;
    // Headers that go on and on (RUSTSEC-2024-0332).
    let more = fields([("x-more", "x"); 20]);
    let begun = frame(HEADERS, 0, 1, &head);
    let goes_on = (0..100_000).map(|_| frame(CONTINUATION, 0, 1, &more));
    flood(&served, std::iter::once(begun).chain(goes_on)).await;
    is_well(&served).await;
    served.server.stop().await;
}

/// What came of a call: the status of HTTP, and of gRPC if it told one.
async fn call(
    served: &Served,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> (u16, Option<u16>) {
    let mut channel = served.channel().await;
    let mut request = Request::post(path).header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = Body::new(Full::new(Bytes::copy_from_slice(body)));
    futures::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .unwrap();
    let answer = channel.call(request.body(body).unwrap());
    let answer = tokio::time::timeout(WITHIN, answer).await.unwrap().unwrap();
    let http = answer.status().as_u16();
    let told = |headers: &HeaderMap| headers.get("grpc-status")?.to_str().ok()?.parse().ok();
    let grpc = told(answer.headers());
    let rest = answer.into_body().collect().await.unwrap();
    (http, grpc.or_else(|| rest.trailers().and_then(told)))
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_lie_or_are_none_are_refused_each_with_its_status() {
    let served = Served::impatient(limits()).await;
    let infer = "/inference.GRPCInferenceService/ModelInfer";
    let ready = "/inference.GRPCInferenceService/ModelReady";
    let grpc = [("content-type", "application/grpc")];
    let gzip = [grpc[0], ("grpc-encoding", "gzip")];
    let message =
        |flag: u8, length: u32, bytes: &[u8]| [&[flag][..], &length.to_be_bytes(), bytes].concat();
    let whole = |bytes: &[u8]| message(0, u32::try_from(bytes.len()).unwrap(), bytes);
    // Groups within groups, as unknown fields go on being skipped.
    let deep = [vec![11 << 3 | 3; 2000], vec![11 << 3 | 4; 2000]].concat();
    // OUT_OF_RANGE 11, UNIMPLEMENTED 12, INTERNAL 13; INVALID_ARGUMENT 3 where it is read here.
    for (what, headers, body, expected) in [
        (
            "4 GiB are announced",
            &grpc[..],
            message(0, u32::MAX, b"x"),
            [11, 11],
        ),
        (
            "less comes than was announced",
            &grpc,
            message(0, 100, b"x"),
            [13, 13],
        ),
        ("it is compressed", &grpc, message(1, 1, b"x"), [13, 13]),
        (
            "it is compressed, and says so",
            &gzip,
            message(1, 1, b"x"),
            [12, 12],
        ),
        ("no flag", &grpc, message(7, 1, b"x"), [13, 13]),
        ("no message", &grpc, Vec::new(), [13, 13]),
        ("half a length", &grpc, vec![0, 0], [13, 13]),
        ("no protobuf", &grpc, whole(&[0xff; 64]), [3, 13]),
        ("deep", &grpc, whole(&deep), [3, 13]),
        ("no text", &grpc, whole(&[0x0a, 2, 0xff, 0xfe]), [3, 13]),
    ] {
        for (path, expected) in [infer, ready].into_iter().zip(expected) {
            let answered = call(&served, path, headers, &body).await;
            assert_eq!(answered, (200, Some(expected)), "{what}: {path}");
        }
    }
    for path in [
        "/inference.GRPCInferenceService/Steal",
        "/inference.Nobody/ModelInfer",
        "/inference.GRPCInferenceService/%2e%2e/ModelInfer",
        "/inference.GRPCInferenceService/../../etc/passwd",
    ] {
        assert_eq!(
            call(&served, path, &grpc, &whole(b"")).await,
            (200, Some(12)),
            "{path}"
        );
    }
    // Of another kind, it is no call of gRPC at all.
    for kind in ["application/json", "text/plain", ""] {
        let (http, grpc) = call(&served, infer, &[("content-type", kind)], &whole(b"")).await;
        assert_eq!((http, grpc), (415, None), "{kind}");
    }
    is_well(&served).await;
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_climb_or_are_half_a_text_are_those_of_nothing() {
    let served = Served::impatient(limits()).await;
    for path in [
        "/v2/models/../../etc/passwd",
        "/v2/models/%2e%2e/%2e%2e/etc/passwd",
        "/v2/models/..%2f..%2fetc%2fpasswd",
        "/v2/models/..%5c..%5cpasswd/ready",
        "/v2/models/factory%00/ready",
        "/v2/models/factory%0d%0ax:%20y",
        "/v2/models/%ff%fe",
        "/v2/models/factory/versions/-1",
        "/v2/models/factory/versions/99999999999999999999",
        "/%2e%2e/metrics",
        "//metrics",
    ] {
        let answer = served.get(path).await;
        assert_eq!(answer.status, 404, "{path}");
        assert!(!answer.headers.contains_key("x"), "{path}");
        let told = answer.error();
        assert!(!told.contains(char::is_control), "{path}: {told:?}");
    }
    // Half a character, as JSON can write it.
    for half in [r"\ud800", r"\udc00\ud800", r"\ud800x"] {
        let body = factory_body("", &[machine(1)]).to_string();
        let kind = body.replacen(r#"data":["M"]"#, &format!(r#"data":["{half}"]"#), 1);
        let id = body.replacen(r#""id":"""#, &format!(r#""id":"{half}""#), 1);
        for half in [kind, id] {
            assert_ne!(half, body);
            let path = "/v2/models/factory/infer";
            let answer = served.post_bytes(path, half.as_bytes(), "").await;
            assert_eq!(answer.status, 400, "{half}");
            assert!(
                answer.error().contains("the body is no request"),
                "{}",
                answer.error()
            );
        }
    }
    is_well(&served).await;
    served.server.stop().await;
}
