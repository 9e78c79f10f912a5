//! The object store on a real S3 server, with faults on the way: nothing that was acknowledged is
//! lost, nothing wrong is ever read, every wait ends, and every error is one line that says what to
//! do. What was stored is checked on the server's disk, not through the client under test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    path::PathBuf,
    time::{Duration, Instant},
};

use bytes::Bytes;
use emberline_common::{
    artifact::{ArtifactError, ArtifactStore, Environment, Patience, StoreFault},
    ids::Digest,
};
use emberline_tests::{
    HttpProxy, S3Server,
    http_proxy::{Fault, Rule},
    outside,
    s3::{ACCESS_KEY, BUCKET, SECRET_KEY, files_below},
};
use futures::TryStreamExt as _;
use tempfile::TempDir;

/// A prefix that every test uses.
const PREFIX: &str = "a/b";

/// A server, a proxy before it, and a store that goes by way of the proxy.
struct World {
    server: S3Server,
    proxy: HttpProxy,
    store: ArtifactStore,
    dir: TempDir,
}

/// Enough for a loaded machine, and short where a test waits for it to run out.
fn quick() -> Patience {
    Patience {
        silence: Duration::from_secs(1),
        answer: Duration::from_secs(2),
        retries: 4,
        budget: Duration::from_secs(20),
        part: Duration::from_secs(30),
        ..Patience::default()
    }
}

impl World {
    fn new() -> Self {
        Self::with(S3Server::start(), quick())
    }

    fn with(server: S3Server, patience: Patience) -> Self {
        let proxy = HttpProxy::start(&server.address());
        let environment = Environment::new(server.environment_by(proxy.address()));
        let store = ArtifactStore::open_with(&server.url(PREFIX), environment, patience).unwrap();
        Self {
            server,
            proxy,
            store,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// A store of the same bucket with other variables, straight to the server unless they say else.
    fn other(&self, changed: &[(&str, &str)]) -> ArtifactStore {
        let mut variables = self.server.environment();
        for (name, value) in changed {
            variables.retain(|(n, _)| n != name);
            variables.push(((*name).to_owned(), (*value).to_owned()));
        }
        let environment = Environment::new(variables);
        ArtifactStore::open_with(&self.server.url(PREFIX), environment, Patience::short()).unwrap()
    }

    fn file(&self, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join("source");
        fs::write(&path, bytes).unwrap();
        path
    }

    /// What the server has on its disk under a digest.
    #[track_caller]
    fn on_disk(&self, digest: &Digest) -> Vec<u8> {
        fs::read(self.server.object(PREFIX, &digest.to_string())).unwrap()
    }

    fn is_on_disk(&self, digest: &Digest) -> bool {
        self.server.object(PREFIX, &digest.to_string()).exists()
    }
}

/// Bytes that differ everywhere: 20 MiB and a bit are three parts.
fn large() -> Vec<u8> {
    (0..20_000_003_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// An error for people: one line, no markup, no secret.
#[track_caller]
fn line(error: &ArtifactError) -> String {
    let text = error.to_string();
    assert!(!text.contains(['\n', '<', '>']), "{text}");
    assert!(!text.contains(SECRET_KEY), "{text}");
    assert!(text.len() < 400, "{text}");
    text
}

#[track_caller]
fn assert_fault(error: &ArtifactError, fault: StoreFault, advice: &str) {
    let text = line(error);
    assert_eq!(error.store_fault(), Some(fault), "{text}");
    assert!(text.contains(advice), "{text}");
}

// ---- What is written, and how ----

#[tokio::test]
async fn a_large_object_goes_in_parts_and_comes_in_parallel_ranges() {
    let world = World::new();
    let bytes = large();
    let (digest, size) = world.store.put_file(&world.file(&bytes)).await.unwrap();
    assert_eq!(outside::sha256(&world.on_disk(&digest)), digest.to_string());
    let sent = world.proxy.take_requests();
    let parts = sent.iter().filter(|r| r.target.contains("partNumber="));
    assert_eq!(parts.count(), 3);

    // So that the ranges overlap for sure.
    world
        .proxy
        .add(Rule::new(Fault::Delay(Duration::from_millis(200))).on("GET"));
    let dest = world.dir.path().join("dest");
    world.store.get_file(&digest, size, &dest).await.unwrap();
    assert_eq!(fs::read(&dest).unwrap(), bytes);
    let read = world.proxy.take_requests();
    let ranges: Vec<_> = read.iter().filter_map(|r| r.header("range")).collect();
    assert_eq!(ranges.len(), 3, "{ranges:?}");
    assert!(
        world.proxy.most_at_once() >= 3,
        "{}",
        world.proxy.most_at_once()
    );
    assert_eq!(world.server.uploads_left(), [""; 0]);

    // No correctness rests on conditions: none is ever sent.
    for request in sent.iter().chain(&read) {
        assert_eq!(request.header("if-none-match"), None);
        assert_eq!(request.header("if-match"), None);
    }
}

#[tokio::test]
async fn a_stream_of_unknown_digest_ends_under_its_digest_and_leaves_nothing_in_staging() {
    let world = World::new();
    for bytes in [Vec::new(), b"small".to_vec(), large()] {
        let mut writer = world.store.writer();
        for piece in bytes.chunks(1 << 20) {
            writer.write(Bytes::copy_from_slice(piece)).await.unwrap();
        }
        let (digest, size) = writer.finish(None).await.unwrap();
        assert_eq!(world.on_disk(&digest), bytes);
        let read: Vec<Bytes> = world.store.read(&digest).try_collect().await.unwrap();
        assert_eq!(read.concat(), bytes);
        assert_eq!(size, bytes.len() as u64);
    }
    let staging = world.server.bucket().join(PREFIX).join("staging");
    assert_eq!(files_below(&staging), Vec::<PathBuf>::new());
    assert_eq!(world.server.every_object_hashes_to_its_name(PREFIX), 3);
}

#[tokio::test]
async fn a_second_put_of_a_large_object_is_one_look_and_no_reading() {
    let world = World::new();
    let source = world.file(&large());
    world.store.put_file(&source).await.unwrap();
    let _ = world.proxy.take_requests();
    world.store.put_file(&source).await.unwrap();
    let requests = world.proxy.take_requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!(requests[0].method, "HEAD");
}

#[tokio::test]
async fn two_writers_of_the_same_bytes_agree_on_a_server_that_ignores_conditions() {
    let world = World::with(S3Server::start_without_signatures(), quick());
    world.proxy.add(Rule::new(Fault::IgnoreConditions));
    let bytes = Bytes::from(large());
    let puts = (0..4).map(|_| {
        let (store, bytes) = (world.store.clone(), bytes.clone());
        async move { store.put_bytes(bytes).await.unwrap() }
    });
    let digests = futures::future::join_all(puts).await;
    assert_eq!(
        outside::sha256(&world.on_disk(&digests[0])),
        digests[0].to_string()
    );

    let probe = world.store.probe().await.unwrap();
    let told = &probe.steps.last().unwrap().outcome;
    assert!(told.as_ref().unwrap().contains("ignored"), "{told:?}");
}

#[tokio::test]
async fn a_probe_tries_every_operation_and_leaves_nothing() {
    let world = World::new();
    let probe = world.store.probe().await.unwrap();
    for step in &probe.steps {
        assert!(step.outcome.is_ok(), "{step:?}");
    }
    let names: Vec<_> = probe.steps.iter().map(|s| s.what).collect();
    assert_eq!(
        names,
        [
            "list",
            "write",
            "look up",
            "read",
            "read a range",
            "copy",
            "write in parts",
            "give an upload up",
            "delete",
            "conditional write"
        ]
    );
    let conditional = probe.steps.last().unwrap().outcome.clone().unwrap();
    assert!(conditional.contains("heeded"), "{conditional}");
    assert_eq!(files_below(&world.server.bucket()), Vec::<PathBuf>::new());
    assert_eq!(world.server.uploads_left(), [""; 0]);
    world.store.probe_write().await.unwrap();
    assert_eq!(files_below(&world.server.bucket()), Vec::<PathBuf>::new());
}

// ---- A server that is overloaded, slow, or gone for a while ----

#[tokio::test]
async fn a_burst_of_slow_down_is_waited_out_as_long_as_the_server_asks() {
    let world = World::new();
    let Fault::Answer(status, mut headers, body) =
        Fault::s3_error(503, "SlowDown", "Please reduce your request rate.")
    else {
        unreachable!()
    };
    headers.push(("Retry-After", "2".to_owned()));
    world
        .proxy
        .add(Rule::new(Fault::Answer(status, headers, body)).times(1));
    world.proxy.add(
        Rule::new(Fault::s3_error(
            500,
            "InternalError",
            "We encountered an internal error.",
        ))
        .times(2),
    );
    let start = Instant::now();
    let digest = world
        .store
        .put_bytes(Bytes::from_static(b"patience"))
        .await
        .unwrap();
    assert!(
        start.elapsed() >= Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(world.on_disk(&digest), b"patience");
}

#[tokio::test]
async fn an_overload_that_does_not_end_is_told_within_the_budget() {
    let world = World::new();
    world.proxy.add(Rule::new(Fault::s3_error(
        503,
        "SlowDown",
        "Please reduce your request rate.",
    )));
    let start = Instant::now();
    let error = world
        .store
        .put_bytes(Bytes::from_static(b"x"))
        .await
        .unwrap_err();
    assert_fault(&error, StoreFault::Busy, "overloaded");
    assert!(start.elapsed() < Duration::from_secs(40));
}

#[tokio::test]
async fn a_read_that_stalls_goes_on_where_it_stopped() {
    let world = World::new();
    let bytes = large();
    let (digest, size) = world.store.put_file(&world.file(&bytes)).await.unwrap();
    let _ = world.proxy.take_requests();
    world
        .proxy
        .add(Rule::new(Fault::Stall(1_000_000)).on("GET").times(2));
    let dest = world.dir.path().join("dest");
    world.store.get_file(&digest, size, &dest).await.unwrap();
    assert_eq!(fs::read(&dest).unwrap(), bytes);
    let requests = world.proxy.take_requests();
    let begun_again = requests
        .iter()
        .filter_map(|r| r.header("range"))
        .filter(|range| {
            // Not at the edge of a part.
            let start = range
                .trim_start_matches("bytes=")
                .split('-')
                .next()
                .unwrap();
            start.parse::<u64>().unwrap() % (8 << 20) != 0
        });
    assert_eq!(begun_again.count(), 2, "{requests:#?}");
}

#[tokio::test]
async fn a_stream_that_is_cut_again_and_again_is_read_to_its_end() {
    let world = World::new();
    let bytes = large();
    let (digest, _) = world.store.put_file(&world.file(&bytes)).await.unwrap();
    // More often than one request is ever tried again.
    world
        .proxy
        .add(Rule::new(Fault::Cut(2_000_000)).on("GET").times(9));
    let read: Vec<Bytes> = world.store.read(&digest).try_collect().await.unwrap();
    assert_eq!(read.concat(), bytes);
}

#[tokio::test]
async fn a_read_that_never_moves_ends_with_an_error() {
    let world = World::new();
    let digest = world
        .store
        .put_bytes(Bytes::from_static(b"never read"))
        .await
        .unwrap();
    world.proxy.add(Rule::new(Fault::Stall(0)).on("GET"));
    let start = Instant::now();
    let error = world.store.get_bytes(&digest, 100).await.unwrap_err();
    assert_fault(&error, StoreFault::Broken, "silent");
    assert!(start.elapsed() < Duration::from_secs(40));
}

#[tokio::test]
async fn a_part_that_drips_in_is_given_up_at_its_deadline() {
    let mut patience = quick();
    patience.part = Duration::from_secs(3);
    let world = World::with(S3Server::start(), patience);
    let (digest, size) = world.store.put_file(&world.file(&large())).await.unwrap();
    world.proxy.add(Rule::new(Fault::Drip(1000)).on("GET"));
    let dest = world.dir.path().join("dest");
    let error = world
        .store
        .get_file(&digest, size, &dest)
        .await
        .unwrap_err();
    assert!(matches!(error, ArtifactError::Slow { .. }), "{error}");
    assert_fault(&error, StoreFault::Broken, "too slow");
    assert!(!dest.exists());
}

#[tokio::test]
async fn a_server_that_is_killed_and_comes_back_fails_no_upload() {
    let mut world = World::new();
    let bytes = large();
    let mut writer = world.store.writer();
    let mut pieces = bytes.chunks(1 << 20);
    for piece in pieces.by_ref().take(12) {
        writer.write(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    world.server.restart();
    for piece in pieces {
        writer.write(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    let (digest, _) = writer.finish(None).await.unwrap();
    assert_eq!(world.on_disk(&digest), bytes);
    assert_eq!(world.server.uploads_left(), [""; 0]);
}

#[tokio::test]
async fn a_paused_server_is_waited_for() {
    let world = World::new();
    world.server.pause();
    let put = tokio::spawn({
        let store = world.store.clone();
        async move {
            store
                .put_bytes(Bytes::from_static(b"after the pause"))
                .await
        }
    });
    // One try has run out, and another has begun.
    let mut tries = 0;
    let deadline = Instant::now() + Duration::from_secs(20);
    while tries < 2 {
        assert!(Instant::now() < deadline, "{tries} tries");
        tokio::time::sleep(Duration::from_millis(20)).await;
        tries += world.proxy.take_requests().len();
    }
    assert!(!put.is_finished());
    world.server.go_on();
    let digest = put.await.unwrap().unwrap();
    assert_eq!(world.on_disk(&digest), b"after the pause");
}

// ---- Writes that break ----

#[tokio::test]
async fn a_part_whose_connection_is_reset_is_sent_again() {
    let world = World::new();
    let bytes = large();
    world.proxy.add(
        Rule::new(Fault::CutRequest(500_000))
            .to("partNumber=2")
            .times(2),
    );
    let (digest, _) = world.store.put_file(&world.file(&bytes)).await.unwrap();
    assert_eq!(world.on_disk(&digest), bytes);
    assert_eq!(world.server.uploads_left(), [""; 0]);
}

#[tokio::test]
async fn an_upload_that_fails_is_taken_back_and_nothing_of_it_is_visible() {
    let world = World::new();
    let bytes = large();
    world
        .proxy
        .add(Rule::new(Fault::CutRequest(500_000)).to("partNumber=2"));
    let error = world.store.put_file(&world.file(&bytes)).await.unwrap_err();
    assert_fault(&error, StoreFault::Broken, "broke");
    assert!(!world.is_on_disk(&Digest::of(&bytes)));
    assert_eq!(world.server.uploads_left(), [""; 0]);
}

#[tokio::test]
async fn a_writer_that_is_dropped_takes_its_parts_back() {
    let world = World::new();
    let mut writer = world.store.writer();
    for piece in large().chunks(1 << 20) {
        writer.write(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    drop(writer);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !world.server.uploads_left().is_empty() {
        assert!(
            Instant::now() < deadline,
            "{:?}",
            world.server.uploads_left()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_put_whose_answers_are_lost_is_decided_by_what_is_stored() {
    for fault in [Fault::LoseAnswer, Fault::Silence] {
        let world = World::new();
        world.proxy.add(Rule::new(fault).on("PUT"));
        let digest = world
            .store
            .put_bytes(Bytes::from_static(b"done, and not told"))
            .await
            .unwrap();
        assert_eq!(world.on_disk(&digest), b"done, and not told");
    }
}

#[tokio::test]
async fn a_completed_upload_whose_answer_is_lost_is_decided_by_what_is_stored() {
    let world = World::new();
    let bytes = large();
    world.proxy.add(
        Rule::new(Fault::LoseAnswer)
            .on("POST")
            .to("uploadId=")
            .times(1),
    );
    let (digest, _) = world.store.put_file(&world.file(&bytes)).await.unwrap();
    assert_eq!(world.on_disk(&digest), bytes);
}

#[tokio::test]
async fn a_completion_that_is_answered_with_an_error_in_a_200_is_tried_again() {
    let world = World::new();
    let bytes = large();
    let fault = Fault::s3_error(200, "InternalError", "We encountered an internal error.");
    world
        .proxy
        .add(Rule::new(fault).on("POST").to("uploadId=").times(1));
    let (digest, _) = world.store.put_file(&world.file(&bytes)).await.unwrap();
    assert_eq!(world.on_disk(&digest), bytes);
}

// ---- Objects that are wrong or gone ----

#[tokio::test]
async fn bytes_that_are_damaged_on_their_way_are_read_again() {
    let world = World::new();
    let bytes = large();
    let (digest, size) = world.store.put_file(&world.file(&bytes)).await.unwrap();
    let small = world
        .store
        .put_bytes(Bytes::from_static(b"small"))
        .await
        .unwrap();

    world
        .proxy
        .add(Rule::new(Fault::Corrupt(3)).on("GET").times(1));
    assert_eq!(world.store.get_bytes(&small, 5).await.unwrap(), "small");
    world
        .proxy
        .add(Rule::new(Fault::Corrupt(3)).on("GET").times(1));
    let dest = world.dir.path().join("dest");
    world.store.get_file(&digest, size, &dest).await.unwrap();
    assert_eq!(fs::read(&dest).unwrap(), bytes);
}

#[tokio::test]
async fn a_damaged_object_is_named_and_healed_by_the_next_put_of_the_same_bytes() {
    let world = World::new();
    let bytes = large();
    let source = world.file(&bytes);
    let (digest, size) = world.store.put_file(&source).await.unwrap();
    let object = world.server.object(PREFIX, &digest.to_string());
    let mut damaged = bytes.clone();
    damaged[12_345_678] ^= 1;
    fs::write(&object, &damaged).unwrap();

    let dest = world.dir.path().join("dest");
    let error = world
        .store
        .get_file(&digest, size, &dest)
        .await
        .unwrap_err();
    assert!(matches!(error, ArtifactError::Corrupted { .. }), "{error}");
    assert_eq!(error.bad_digest(), Some(digest));
    assert!(line(&error).contains(&digest.to_string()));
    assert!(!dest.exists());
    let streamed = world.store.read(&digest).try_collect::<Vec<_>>().await;
    assert!(matches!(streamed, Err(ArtifactError::Corrupted { .. })));

    world.store.put_file(&source).await.unwrap();
    world.store.get_file(&digest, size, &dest).await.unwrap();
    assert_eq!(fs::read(&dest).unwrap(), bytes);
}

#[tokio::test]
async fn an_object_that_somebody_cut_or_deleted_is_named() {
    let world = World::new();
    let digest = world
        .store
        .put_bytes(Bytes::from_static(b"whole"))
        .await
        .unwrap();
    let object = world.server.object(PREFIX, &digest.to_string());
    fs::write(&object, b"wh").unwrap();
    let dest = world.dir.path().join("dest");
    let error = world.store.get_file(&digest, 5, &dest).await.unwrap_err();
    assert!(matches!(error, ArtifactError::Corrupted { .. }), "{error}");

    fs::remove_file(&object).unwrap();
    for error in [
        world.store.get_bytes(&digest, 5).await.unwrap_err(),
        world.store.get_file(&digest, 5, &dest).await.unwrap_err(),
    ] {
        assert!(matches!(error, ArtifactError::NotFound { .. }), "{error}");
        assert!(line(&error).contains(&digest.to_string()));
    }
    assert!(!world.store.has(&digest, 5).await.unwrap());
}

// ---- What somebody must put right ----

#[tokio::test]
async fn a_wrong_key_or_secret_is_told_in_one_line() {
    let world = World::new();
    for (name, value) in [
        ("AWS_SECRET_ACCESS_KEY", "wrong"),
        ("AWS_ACCESS_KEY_ID", "nobody"),
    ] {
        let store = world.other(&[(name, value)]);
        let error = store.probe_write().await.unwrap_err();
        assert_fault(&error, StoreFault::Credentials, name);
        let error = store.put_bytes(Bytes::from_static(b"x")).await.unwrap_err();
        assert_fault(&error, StoreFault::Credentials, name);
    }
    let error = world
        .other(&[("AWS_SECRET_ACCESS_KEY", "x")])
        .probe()
        .await
        .unwrap();
    assert_eq!(error.steps.len(), 1, "the rest is not tried");
}

#[tokio::test]
async fn a_missing_bucket_is_told_as_such_and_not_as_lost_objects() {
    let world = World::new();
    let digest = world
        .store
        .put_bytes(Bytes::from_static(b"x"))
        .await
        .unwrap();
    // As AWS and the others answer; the server of the tests names the key instead.
    let fault = Fault::s3_error(404, "NoSuchBucket", "The specified bucket does not exist");
    world.proxy.add(Rule::new(fault));
    for error in [
        world
            .store
            .put_bytes(Bytes::from_static(b"y"))
            .await
            .unwrap_err(),
        world.store.get_bytes(&digest, 5).await.unwrap_err(),
    ] {
        assert_fault(&error, StoreFault::Bucket, "the bucket does not exist");
        assert_eq!(error.bad_digest(), None);
    }
}

#[tokio::test]
async fn what_a_server_refuses_is_told_with_what_to_do() {
    let world = World::new();
    for (status, code, message, fault, advice) in [
        (
            403,
            "AccessDenied",
            "Access Denied",
            StoreFault::Permission,
            "give them the right",
        ),
        (
            403,
            "RequestTimeTooSkewed",
            "The difference between the request time and the current time is too large.",
            StoreFault::Clock,
            "clock",
        ),
        (
            400,
            "ExpiredToken",
            "The provided token has expired.",
            StoreFault::Credentials,
            "AWS_SESSION_TOKEN",
        ),
        (
            400,
            "AuthorizationHeaderMalformed",
            "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-central-1'",
            StoreFault::Region,
            "eu-central-1",
        ),
        (
            301,
            "PermanentRedirect",
            "",
            StoreFault::Region,
            "AWS_REGION",
        ),
        (
            507,
            "XMinioStorageFull",
            "Storage backend has reached its minimum free drive threshold.",
            StoreFault::Busy,
            "XMinioStorageFull",
        ),
    ] {
        world.proxy.clear();
        world
            .proxy
            .add(Rule::new(Fault::s3_error(status, code, message)));
        let error = world
            .store
            .put_bytes(Bytes::from_static(b"x"))
            .await
            .unwrap_err();
        assert_fault(&error, fault, advice);
    }
}

#[tokio::test]
async fn an_endpoint_where_nobody_answers_or_that_speaks_otherwise_is_told() {
    let world = World::new();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let error = world
        .other(&[("AWS_ENDPOINT_URL", &nobody)])
        .probe_write()
        .await
        .unwrap_err();
    assert_fault(&error, StoreFault::Unreachable, &nobody);

    let https = format!("https://{}", world.server.address());
    let error = world
        .other(&[("AWS_ENDPOINT_URL", &https)])
        .probe_write()
        .await
        .unwrap_err();
    assert_fault(&error, StoreFault::Scheme, "write `http://`");

    // What servers that want TLS say to plain HTTP: some in plain HTTP, others in TLS.
    let told = "Client sent an HTTP request to an HTTPS server.\n".to_owned();
    world
        .proxy
        .add(Rule::new(Fault::Answer(400, Vec::new(), told)));
    let error = world.store.probe_write().await.unwrap_err();
    assert_fault(&error, StoreFault::Scheme, "write `https://`");
    let alert = TcpListener::bind("127.0.0.1:0").unwrap();
    let http = format!("http://{}", alert.local_addr().unwrap());
    std::thread::spawn(move || {
        for client in alert.incoming() {
            let mut client = client.unwrap();
            let _ = client.read(&mut [0; 4096]);
            let _ = client.write_all(&[0x15, 3, 1, 0, 2, 2, 70]);
        }
    });
    let error = world
        .other(&[("AWS_ENDPOINT_URL", &http)])
        .probe_write()
        .await
        .unwrap_err();
    assert_fault(&error, StoreFault::Scheme, "write `https://`");
}

#[tokio::test]
async fn a_missing_bucket_fails_the_probe() {
    let world = World::new();
    let environment = Environment::new(world.server.environment());
    let store = ArtifactStore::open_with("s3://nowhere/x", environment, Patience::short()).unwrap();
    let error = store.probe_write().await.unwrap_err();
    assert_fault(&error, StoreFault::Bucket, "the bucket does not exist");
}

#[test]
fn an_environment_that_cannot_be_meant_is_refused_before_anything_is_sent() {
    let open = |variables: &[(&str, &str)]| {
        let owned = variables
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let url = format!("s3://{BUCKET}/x");
        ArtifactStore::open_with(&url, Environment::new(owned), Patience::short())
    };
    for (variables, told) in [
        (
            &[("AWS_ENDPOINT_URL", "localhost:9000")][..],
            "`http://` or `https://`",
        ),
        (
            &[("AWS_ENDPOINT_URL", "http://localhost:9000")],
            "no credentials are",
        ),
        (
            &[("AWS_ACCESS_KEY_ID", ACCESS_KEY)],
            "AWS_SECRET_ACCESS_KEY is not",
        ),
        (
            &[("AWS_SECRET_ACCESS_KEY", SECRET_KEY)],
            "AWS_ACCESS_KEY_ID is not",
        ),
    ] {
        let error = open(variables).unwrap_err();
        assert!(line(&error).contains(told), "{error}");
    }
    open(&[("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")]).unwrap();
}
