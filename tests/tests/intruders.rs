//! Whoever can connect, at his worst: frames that lie, streams without number, connections that say
//! nothing. He is refused, what he costs is bounded, and others are served meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use bytes::Bytes;
use emberline_tests::{Dev, Place, processes, seconds, wait_for};
use http::{HeaderMap, Request, Version};

/// Room that a flood may take, in bytes: far less than what is sent.
const ROOM: u64 = 150 << 20;

/// A cluster, how much memory it had, and a way to see that it serves.
struct Target {
    place: Place,
    dev: Dev,
    before: u64,
}

impl Target {
    fn start() -> Self {
        let place = Place::new();
        let dev = Dev::start(&place);
        let before = processes::peak_memory(dev.process().pid()).unwrap();
        Self { place, dev, before }
    }

    /// It serves others, and has not grown.
    #[track_caller]
    fn is_well(&self) {
        let cli = ["--server", &self.dev.address, "cluster", "status"];
        let call = self.place.emberline(&cli).within(seconds(20));
        call.run().expect_code(0);
        let now = processes::peak_memory(self.dev.process().pid()).unwrap();
        assert!(
            now < self.before + ROOM,
            "{} MiB from {}",
            now >> 20,
            self.before >> 20
        );
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.dev.address).unwrap();
        stream.set_read_timeout(Some(seconds(60))).unwrap();
        stream.set_write_timeout(Some(seconds(10))).unwrap();
        stream
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// The head of a call, as HPACK that refers to nothing.
fn head() -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/emberline.v1.ClusterService/GetClusterStatus"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        out.push(0);
        for text in [name, value] {
            out.push(u8::try_from(text.len()).unwrap());
            out.extend(text.as_bytes());
        }
    }
    out
}

/// A connection of HTTP/2 after its beginning.
fn http2(target: &Target) -> TcpStream {
    let mut stream = target.connect();
    stream.write_all(PREFACE).unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
    stream
}

/// Sends until the other side does not take it any more, or all is sent.
fn flood(stream: &mut TcpStream, frames: impl Iterator<Item = Vec<u8>>) {
    let mut chunk = Vec::new();
    for frame in frames {
        chunk.extend(frame);
        if chunk.len() > 1 << 16 {
            if stream.write_all(&chunk).is_err() {
                return;
            }
            chunk.clear();
        }
    }
    let _ = stream.write_all(&chunk);
}

/// Whether the other side says in so many words, or by closing, that it has had enough.
fn was_refused(mut stream: TcpStream, within: Duration) -> bool {
    let mut read = Vec::new();
    let deadline = Instant::now() + within;
    let mut piece = [0; 1 << 16];
    stream.set_read_timeout(Some(within)).unwrap();
    while Instant::now() < deadline {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(n) => read.extend(&piece[..n]),
        }
    }
    let closed = Instant::now() < deadline;
    let mut rest = read.as_slice();
    while let Some((head, after)) = rest.split_at_checked(9) {
        let length = usize::try_from(u32::from_be_bytes([0, head[0], head[1], head[2]])).unwrap();
        if head[3] == GOAWAY {
            return true;
        }
        rest = after.get(length..).unwrap_or_default();
    }
    closed
}

#[test]
fn floods_of_small_frames_are_refused_or_cost_nothing() {
    const MANY: u32 = 100_000;
    let target = Target::start();
    // Streams that are opened and reset at once (CVE-2023-44487).
    let mut stream = http2(&target);
    let resets = (0..MANY).map(|n| {
        let id = 2 * n + 1;
        let mut both = frame(HEADERS, 4, id, &head());
        both.extend(frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        both
    });
    flood(&mut stream, resets);
    assert!(was_refused(stream, seconds(30)), "streams that are reset");
    target.is_well();
    // Headers that go on and on (RUSTSEC-2024-0332).
    let mut stream = http2(&target);
    let begun = frame(HEADERS, 0, 1, &head());
    let goes_on = (0..MANY).map(|n| {
        let mut header = vec![0, 6];
        header.extend(format!("x{n:05}").as_bytes());
        header.extend([1, b'x']);
        frame(CONTINUATION, 0, 1, &header)
    });
    flood(&mut stream, std::iter::once(begun).chain(goes_on));
    assert!(was_refused(stream, seconds(30)), "headers without an end");
    target.is_well();
    // What has to be answered, by somebody who does not read the answers; and much more than there
    // is room for.
    for (kind, payload) in [(PING, vec![0; 8]), (SETTINGS, vec![0, 3, 0, 0, 0, 1])] {
        let mut stream = http2(&target);
        let frames = (0..5 * MANY).map(|_| frame(kind, 0, 0, &payload));
        flood(&mut stream, frames);
        target.is_well();
    }
    // A frame that is longer than what was agreed on, and one of a length that is none.
    for length in [[0xff, 0xff, 0xff], [0, 0x40, 1]] {
        let mut stream = http2(&target);
        let mut frame = length.to_vec();
        frame.extend([0, 0, 0, 0, 0, 1]);
        stream.write_all(&frame).unwrap();
        assert!(was_refused(stream, seconds(30)), "{length:?}");
    }
    target.is_well();
}

#[test]
fn more_streams_than_are_allowed_are_refused_and_all_end_with_their_connection() {
    let target = Target::start();
    let mut streams: Vec<_> = (0..4).map(|_| http2(&target)).collect();
    for stream in &mut streams {
        // None of them is ever finished.
        flood(
            stream,
            (0..25_000).map(|n| frame(HEADERS, 4, 2 * n + 1, &head())),
        );
    }
    target.is_well();
    drop(streams);
    target.is_well();
}

#[test]
fn who_connects_and_says_nothing_or_only_half_is_not_kept() {
    let target = Target::start();
    let [metrics, models] = [(); 2].map(|()| format!("127.0.0.1:{}", processes::free_port()));
    let place = Place::new();
    let worker = [
        "worker",
        "--server",
        &target.dev.address,
        "--name",
        "w",
        "--metrics-listen",
        &metrics,
        "--serve",
        &models,
    ];
    let mut worker = place.emberline(&worker).within(seconds(200)).start();
    wait_for("a session", seconds(30), || {
        assert!(!worker.has_ended(), "{}", worker.stderr());
        worker.stdout().contains(" has a session ").then_some(())
    });
    let drips = "GET /metrics HTTP/1.1\r\nhost: x\r\nx-slow: ";
    // A whole request, and nothing after its answer.
    let whole = "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".as_bytes();
    let cases: [(&str, &str, &[u8]); 13] = [
        ("the coordinator", &target.dev.address, b""),
        ("the coordinator", &target.dev.address, &PREFACE[..10]),
        ("the coordinator", &target.dev.address, drips.as_bytes()),
        ("the coordinator", &target.dev.address, PREFACE),
        ("the metrics", &metrics, b""),
        ("the metrics", &metrics, drips.as_bytes()),
        ("the models", &models, b""),
        ("the models", &models, &PREFACE[..10]),
        ("the models", &models, drips.as_bytes()),
        ("the models", &models, PREFACE),
        ("the coordinator", &target.dev.address, whole),
        ("the metrics", &metrics, whole),
        ("the models", &models, whole),
    ];
    let waiting = cases.map(|(name, address, beginning)| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(beginning).unwrap();
        let what = format!("{name}, after {:?}", String::from_utf8_lossy(beginning));
        let goes_on = beginning == drips.as_bytes();
        std::thread::spawn(move || {
            stream
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let deadline = Instant::now() + seconds(60);
            let mut piece = [0; 4096];
            loop {
                assert!(Instant::now() < deadline, "{what}: it is still there");
                match stream.read(&mut piece) {
                    Ok(0) => return,
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                        // One byte now and then, for ever.
                        if goes_on && stream.write_all(b"x").is_err() {
                            return;
                        }
                    }
                    Err(_) => return,
                    Ok(_) => {}
                }
            }
        })
    });
    // One who asks and asks, and reads no answer.
    let deaf = [
        ("the coordinator", &target.dev.address),
        ("the models", &models),
    ];
    let deaf = deaf.map(|(name, address)| {
        let mut stream = TcpStream::connect(address).unwrap();
        let many = whole.repeat(1000);
        std::thread::spawn(move || {
            stream.set_write_timeout(Some(seconds(60))).unwrap();
            loop {
                match stream.write_all(&many) {
                    Ok(()) => {}
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                        panic!("{name}: who takes no answer is still there")
                    }
                    Err(_) => return,
                }
            }
        })
    });
    target.is_well();
    for waiting in waiting.into_iter().chain(deaf) {
        waiting.join().unwrap();
    }
    target.is_well();
}

/// What came of a call: the status of HTTP, and of gRPC if it told one.
#[derive(Debug, PartialEq)]
struct Answered {
    http: u16,
    grpc: Option<u16>,
}

/// A call with this head and this body, by the library of HTTP/2 itself.
async fn call(
    target: &Target,
    path: &str,
    content_type: &str,
    more: HeaderMap,
    body: &[u8],
) -> Answered {
    let stream = tokio::net::TcpStream::connect(&target.dev.address)
        .await
        .unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    let driving = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let mut request = Request::post(format!("http://{}{path}", target.dev.address))
        .version(Version::HTTP_2)
        .header("content-type", content_type)
        .header("te", "trailers")
        .body(())
        .unwrap();
    request.headers_mut().extend(more);
    let (answer, mut sending) = client.send_request(request, body.is_empty()).unwrap();
    if !body.is_empty() {
        // Where the head alone is refused, the stream may be closed already: the answer says why.
        let _ = sending.send_data(Bytes::copy_from_slice(body), true);
    }
    let answer = tokio::time::timeout(seconds(20), answer)
        .await
        .unwrap()
        .unwrap();
    let http = answer.status().as_u16();
    let told = |headers: &HeaderMap| headers.get("grpc-status")?.to_str().ok()?.parse().ok();
    let mut grpc = told(answer.headers());
    let mut body = answer.into_body();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
    }
    if grpc.is_none() {
        grpc = body.trailers().await.unwrap().as_ref().and_then(told);
    }
    driving.abort();
    Answered { http, grpc }
}

fn message(flag: u8, length: u32, bytes: &[u8]) -> Vec<u8> {
    [&[flag][..], &length.to_be_bytes(), bytes].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_lie_or_are_none_are_refused_each_with_its_status() {
    let target = Target::start();
    let status = "/emberline.v1.ClusterService/GetClusterStatus";
    let submit = "/emberline.v1.RunService/SubmitRun";
    let grpc = "application/grpc";
    let none = HeaderMap::new;
    let is = |http, grpc| Answered { http, grpc };
    let zipped = {
        // A gibibyte of nothing, in a mebibyte.
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for _ in 0..256 {
            encoder.write_all(&vec![0; 1 << 20]).unwrap();
        }
        encoder.finish().unwrap()
    };
    let gzip: HeaderMap = [("grpc-encoding".parse().unwrap(), "gzip".parse().unwrap())]
        .into_iter()
        .collect();
    let deep = (0..2_000_u32).fold(Vec::new(), |inner: Vec<u8>, _| {
        // Field 11 (the change) within itself, as an unknown field goes on being skipped.
        let mut out = vec![11 << 3 | 3];
        out.extend(inner);
        out.push(11 << 3 | 4);
        out
    });
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
    let whole = |bytes: &[u8]| message(0, length(bytes), bytes);
    // OUT_OF_RANGE 11, UNIMPLEMENTED 12, INTERNAL 13, INVALID_ARGUMENT 3.
    for (what, path, content_type, more, body, expected) in [
        (
            "4 GiB are announced",
            status,
            grpc,
            none(),
            message(0, u32::MAX, b"x"),
            is(200, Some(11)),
        ),
        (
            "5 MiB are announced",
            status,
            grpc,
            none(),
            message(0, 5 << 20, b"x"),
            is(200, Some(11)),
        ),
        (
            "less comes than was announced",
            status,
            grpc,
            none(),
            message(0, 100, b"x"),
            is(200, Some(13)),
        ),
        (
            "it is compressed",
            status,
            grpc,
            none(),
            message(1, 1, b"x"),
            is(200, Some(13)),
        ),
        (
            "a bomb",
            status,
            grpc,
            gzip,
            message(1, length(&zipped), &zipped),
            is(200, Some(12)),
        ),
        ("nothing", status, grpc, none(), vec![], is(200, Some(13))),
        (
            "half a length",
            status,
            grpc,
            none(),
            vec![0, 0],
            is(200, Some(13)),
        ),
        (
            "no flag",
            status,
            grpc,
            none(),
            message(7, 1, b"x"),
            is(200, Some(13)),
        ),
        (
            "no protobuf",
            submit,
            grpc,
            none(),
            whole(&[0xff; 64]),
            is(200, Some(13)),
        ),
        (
            "deep",
            submit,
            grpc,
            none(),
            whole(&deep),
            is(200, Some(13)),
        ),
        (
            "no text",
            submit,
            grpc,
            none(),
            whole(&[0x0a, 2, 0xff, 0xfe]),
            is(200, Some(13)),
        ),
        (
            "no such method",
            "/emberline.v1.RunService/Steal",
            grpc,
            none(),
            whole(b""),
            is(200, Some(12)),
        ),
        (
            "no such service",
            "/emberline.v1.Nobody/Run",
            grpc,
            none(),
            whole(b""),
            is(200, Some(12)),
        ),
        (
            "a path that climbs",
            "/emberline.v1.RunService/../../etc/passwd",
            grpc,
            none(),
            whole(b""),
            is(200, Some(12)),
        ),
    ] {
        let answered = call(&target, path, content_type, more, &body).await;
        assert_eq!(answered, expected, "{what}");
    }
    // Of another kind, it is no call of gRPC at all.
    for content_type in ["application/json", "text/plain", "application/grpc-web", ""] {
        let answered = call(&target, status, content_type, none(), &whole(b"")).await;
        assert_eq!(answered, is(415, None), "{content_type}");
    }
    assert_eq!(
        call(&target, status, grpc, none(), &whole(b"")).await,
        is(200, Some(0))
    );
    tokio::task::block_in_place(|| target.is_well());
}

#[test]
fn a_page_in_a_browser_starts_nothing_on_its_visitors_machine() {
    let target = Target::start();
    let pipeline =
        b"pipeline: p\nstages: { a: { kind: exec, with: { command: [touch, stolen] } } }\n";
    let mut body = vec![0x0a, u8::try_from(pipeline.len()).unwrap()];
    body.extend(pipeline);
    let body = message(0, u32::try_from(body.len()).unwrap(), &body);
    // What a form or a script may send anywhere without being asked, and what a page could send whose
    // name leads to this machine all of a sudden.
    for content_type in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/grpc",
    ] {
        let mut stream = target.connect();
        let head = format!(
            "POST /emberline.v1.RunService/SubmitRun HTTP/1.1\r\nhost: x\r\norigin: http://evil.example\r\n\
             te: trailers\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 415"),
            "{content_type}: {answer}"
        );
    }
    let runs = [
        "--server",
        &target.dev.address,
        "runs",
        "list",
        "-o",
        "json",
    ];
    let runs = target.place.emberline(&runs).run().expect_code(0).json();
    assert_eq!(runs.as_array().map(Vec::len), Some(0), "{runs}");
}
