#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
};

use emberline_common::failure::Reason;
use serde_json::json;

use super::*;
use crate::testing::TestContext;

/// Answers each request by its path, until the process ends.
fn serve(answer: fn(&str, SocketAddr) -> Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut first = String::new();
            reader.read_line(&mut first).unwrap();
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                line.clear();
            }
            let path = first.split(' ').nth(1).unwrap_or_default();
            // The client may have heard enough.
            let _ = stream.write_all(&answer(path, address));
        }
    });
    address
}

fn ok(body: &[u8]) -> Vec<u8> {
    let mut out = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    out.extend_from_slice(body);
    out
}

fn web(path: &str, at: SocketAddr) -> Vec<u8> {
    let redirect = |to: String| {
        format!(
            "HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        .into_bytes()
    };
    match path {
        "/d/x.csv" | "/d/a%20b.csv" | "/?q=1" => ok(b"a,b\n1,2\n"),
        "/dated" => {
            let dated = ok(b"a,b\n1,2\n");
            let head = b"HTTP/1.1 200 OK\r\nlast-modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n";
            [&head[..], &dated["HTTP/1.1 200 OK\r\n".len()..]].concat()
        }
        "/large" => ok(&vec![7; 3 << 20]),
        "/here" => redirect("/d/x.csv".into()),
        "/loop" => redirect("/loop".into()),
        "/away" => redirect(format!("http://localhost:{}/d/x.csv", at.port())),
        "/cut" => b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort".to_vec(),
        "/busy" => b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_vec(),
        _ => b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_vec(),
    }
}

fn collect(base: &std::path::Path, spec: Value) -> (TestContext, Result<StageOutput, StageError>) {
    let test = TestContext::builder().base_dir(base).spec(spec).build();
    let result = Collect::within(Reach::of_own_machine()).run(&test.ctx);
    (test, result)
}

fn collected(base: &std::path::Path, spec: Value) -> Vec<(String, Vec<u8>)> {
    let (test, result) = collect(base, spec);
    let output = result.unwrap();
    let dir = test.output(&output.artifacts, "data");
    let names = crate::outputs::list(dir, "data").unwrap();
    names
        .into_iter()
        .map(|name| (name.clone(), fs::read(dir.join(name)).unwrap()))
        .collect()
}

fn refused(base: &std::path::Path, spec: Value, reason: Reason, part: &str) {
    let (_test, result) = collect(base, spec.clone());
    let error = result.expect_err(&spec.to_string());
    assert_eq!(error.reason, reason, "{spec}: {error}");
    assert!(error.message.contains(part), "{spec}: {error}");
}

fn data() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("d/sub")).unwrap();
    for (name, text) in [
        ("d/a.csv", "1"),
        ("d/b.csv", "2"),
        ("d/c.txt", "3"),
        ("d/sub/e", "4"),
    ] {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn named(files: &[(&str, &str)]) -> Vec<(String, Vec<u8>)> {
    files
        .iter()
        .map(|(n, t)| ((*n).to_owned(), t.as_bytes().to_vec()))
        .collect()
}

#[test]
fn files_directories_and_patterns_are_taken_relative_to_the_pipeline() {
    let dir = data();
    let one = json!({"sources": [{"url": "file:d/a.csv"}]});
    assert_eq!(collected(dir.path(), one), named(&[("a.csv", "1")]));
    let renamed = json!({"sources": [{"url": "file:d/a.csv", "as": "x/y.csv"}]});
    assert_eq!(collected(dir.path(), renamed), named(&[("x/y.csv", "1")]));
    let all = json!({"sources": [{"url": "file:d/"}]});
    let expected = named(&[
        ("a.csv", "1"),
        ("b.csv", "2"),
        ("c.txt", "3"),
        ("sub/e", "4"),
    ]);
    assert_eq!(collected(dir.path(), all), expected);
    let pattern = json!({"sources": [{"url": "file:d/*.csv"}]});
    assert_eq!(
        collected(dir.path(), pattern),
        named(&[("a.csv", "1"), ("b.csv", "2")])
    );
    let absolute =
        json!({"sources": [{"url": format!("file://{}/d/c.txt", dir.path().display())}]});
    assert_eq!(collected("/".as_ref(), absolute), named(&[("c.txt", "3")]));
}

#[test]
fn what_is_missing_or_no_regular_file_is_told_by_name() {
    let dir = data();
    let base = dir.path();
    std::os::unix::fs::symlink("/etc/passwd", base.join("d/link")).unwrap();
    std::os::unix::fs::symlink("/etc", base.join("etc")).unwrap();
    let status = std::process::Command::new("mkfifo")
        .arg(base.join("pipe"))
        .status();
    assert!(status.unwrap().success());
    for (url, part) in [
        ("file:d/none.csv", "there is no file"),
        ("file:none/", "there is no directory"),
        ("file:none/*.csv", "there is no directory"),
        ("file:d/*.parquet", "no file matches"),
        ("file:d/a.csv/x", "there is no file"),
        ("file:d", "end it with `/`"),
        ("file:d/link", "symbolic link"),
        ("file:d/", "symbolic link"),
        ("file:d/l*", "symbolic link"),
        ("file:pipe", "not a regular file"),
        ("file:/dev/zero", "not a regular file"),
        ("file:", "names no file"),
        ("file://host/x", "another machine"),
        ("ftp://x/y", "not known"),
        ("http://user:secret@x/y", "password"),
        ("d/a.csv", "write `file:path`"),
    ] {
        refused(
            base,
            json!({"sources": [{"url": url}]}),
            Reason::UserError,
            part,
        );
    }
}

#[test]
fn a_name_that_climbs_out_or_stands_twice_is_refused() {
    let dir = data();
    let out = json!({"sources": [{"url": "file:d/a.csv", "as": "../x"}]});
    refused(dir.path(), out, Reason::UserError, "not relative and plain");
    let twice = json!({"sources": [{"url": "file:d/a.csv"}, {"url": "file:d/"}]});
    refused(
        dir.path(),
        twice,
        Reason::UserError,
        "two sources give a file `a.csv`",
    );
    let many = json!({"sources": [{"url": "file:d/", "as": "x"}]});
    refused(dir.path(), many, Reason::UserError, "`as` is for one file");
}

#[test]
fn names_that_climb_out_in_a_url_or_are_no_name_are_refused() {
    let at = serve(|_, _| ok(b"1"));
    let dir = data();
    for (path, part) in [
        ("/a/..%2f..%2fx", "not relative and plain"),
        ("/%2E%2E%2Fx", "not relative and plain"),
        ("/x%2f%2e%2e", "not relative and plain"),
        ("/%2fetc%2fpasswd", "not relative and plain"),
        ("/a%5cb", "backslash"),
        ("/..%5c..%5cx", "backslash"),
        ("/a%00b", "control character"),
        ("/a%0ab", "control character"),
        // These are a step up to everybody.
        ("/a/%2e%2e", "names no file"),
        ("/a/%2e%2e/", "names no file"),
        ("/a#x", "has a `#`"),
    ] {
        let spec = json!({"sources": [{"url": format!("http://{at}{path}")}]});
        refused(dir.path(), spec, Reason::UserError, part);
    }
    // Of a path nothing is decoded and nothing cut off.
    for url in ["file:d/%2e%2e/d/a.csv", "file:d/a.csv?x", "file:d/a.csv#x"] {
        let spec = json!({"sources": [{"url": url}]});
        refused(dir.path(), spec, Reason::UserError, "there is no file");
    }
    for (url, part) in [
        ("s3://b/k?versionId=1", "has a `?`"),
        ("s3://b/k#x", "has a `#`"),
        ("s3://u:p@b/k", "a user or a password"),
    ] {
        let spec = json!({"sources": [{"url": url}]});
        refused(dir.path(), spec, Reason::UserError, part);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only `d`");
}

#[test]
fn another_digest_or_too_many_bytes_are_bad_data() {
    let dir = data();
    let digest = Digest::of(b"1");
    let right = json!({"sources": [{"url": "file:d/a.csv", "sha256": digest}]});
    assert_eq!(collected(dir.path(), right).len(), 1);
    let wrong = json!({"sources": [{"url": "file:d/b.csv", "sha256": digest}]});
    refused(dir.path(), wrong, Reason::Data, "has the SHA-256");
    let large = json!({"sources": [{"url": "file:d/"}], "max_bytes": 3});
    refused(dir.path(), large, Reason::Data, "max_bytes");
}

#[test]
fn a_web_server_is_read_as_a_stream_and_its_answers_are_told_apart() {
    let at = serve(web);
    let base: &std::path::Path = "/".as_ref();
    let source = |path: &str| json!({"sources": [{"url": format!("http://{at}{path}")}]});
    let table = "a,b\n1,2\n";
    assert_eq!(
        collected(base, source("/d/x.csv")),
        named(&[("x.csv", table)])
    );
    assert_eq!(
        collected(base, source("/d/a%20b.csv")),
        named(&[("a b.csv", table)])
    );
    assert_eq!(collected(base, source("/large"))[0].1.len(), 3 << 20);
    assert_eq!(collected(base, source("/here")), named(&[("here", table)]));
    for (path, reason, part) in [
        ("/none", Reason::UserError, "404"),
        ("/busy", Reason::Storage, "503"),
        ("/cut", Reason::Storage, "broke off"),
        ("/away", Reason::UserError, "another host"),
        ("/loop", Reason::Storage, "redirects too often"),
        ("/?q=secret", Reason::UserError, "names no file"),
    ] {
        refused(base, source(path), reason, part);
    }
    let limited = json!({"sources": [{"url": format!("http://{at}/large")}], "max_bytes": "1MiB"});
    refused(base, limited, Reason::Data, "max_bytes");
}

#[test]
fn nobody_there_and_addresses_of_clouds_own_services_are_told_apart() {
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let base: &std::path::Path = "/".as_ref();
    let gone = json!({"sources": [{"url": format!("http://{closed}/x")}]});
    refused(base, gone, Reason::Storage, "cannot be reached");
    for url in [
        "http://169.254.169.254/latest",
        "http://[fe80::1]/x",
        "http://0.0.0.0/x",
    ] {
        refused(
            base,
            json!({"sources": [{"url": url}]}),
            Reason::UserError,
            "is refused",
        );
    }
}

#[test]
fn a_server_that_sends_nothing_does_not_keep_the_stage_from_stopping() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let spec = json!({"sources": [{"url": format!("http://{at}/x")}]});
    let test = TestContext::builder().spec(spec).build();
    let stop = test.stop_handle();
    let waiting = std::thread::spawn(move || {
        let _held = listener.accept().unwrap();
        stop(crate::stage::StopReason::Cancelled);
        std::thread::park_timeout(std::time::Duration::from_secs(1));
    });
    let error = Collect::within(Reach::of_own_machine())
        .run(&test.ctx)
        .unwrap_err();
    assert_eq!(error.reason, Reason::Cancelled);
    waiting.join().unwrap();
}

#[test]
fn patterns_match_as_in_a_shell() {
    for (pattern, name) in [
        ("*", "a"),
        ("*.csv", "a.csv"),
        ("a*b*c", "aXbYc"),
        ("a*", "a"),
        (".*", ".a"),
    ] {
        assert!(matches(pattern, name), "{pattern} {name}");
    }
    for (pattern, name) in [
        ("*", ".a"),
        ("*.csv", "a.txt"),
        ("a*b*c", "ac"),
        ("ab*ba", "aba"),
        ("a", "ab"),
    ] {
        assert!(!matches(pattern, name), "{pattern} {name}");
    }
}

#[test]
fn data_arrived_when_the_newest_source_was_modified_if_all_of_them_tell() {
    let dir = tempfile::tempdir().unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(86_400);
    for name in ["a.csv", "b.csv"] {
        let file = File::create(dir.path().join(name)).unwrap();
        file.set_modified(old).unwrap();
    }
    let web = serve(web);
    let arrived = |urls: &[String]| {
        let sources: Vec<_> = urls.iter().map(|url| json!({ "url": url })).collect();
        let output = collect(dir.path(), json!({ "sources": sources }))
            .1
            .unwrap();
        output.results.get("modified_at").cloned()
    };
    let files = ["file:a.csv", "file:b.csv"].map(str::to_owned);
    assert_eq!(arrived(&files), Some(json!("1970-01-02T00:00:00.000000Z")));
    let [a, b] = files;
    let dated = format!("http://{web}/dated");
    let newest = arrived(&[a.clone(), dated]);
    assert_eq!(newest, Some(json!("1994-11-06T08:49:37.000000Z")));
    assert_eq!(arrived(&[a, b, format!("http://{web}/large")]), None);
}

#[test]
fn a_worker_of_a_cluster_does_not_reach_itself_however_that_is_written() {
    let web = serve(web);
    let port = web.port();
    let run = |reach: &Reach, url: &str| {
        let spec = json!({"sources": [{"url": url, "as": "x"}]});
        let test = TestContext::builder().spec(spec).build();
        Collect::within(reach.clone()).run(&test.ctx)
    };
    let hosts = [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "017700000001",
        "0177.0.0.1",
        "127.0.0.1.",
        "%31%32%37.0.0.1",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "localhost",
        "LOCALHOST",
        "0.0.0.0",
        "0",
        "169.254.169.254",
        "2852039166",
        "[fd00:ec2::254]",
    ];
    for host in hosts {
        let url = format!("http://{host}:{port}/d/x.csv");
        let error = run(&Reach::default(), &url).expect_err(&url);
        assert_eq!(error.reason, Reason::UserError, "{url}: {error}");
        assert!(
            error.message.contains("is refused: it is"),
            "{url}: {error}"
        );
    }
    for (allowed, host) in [
        ("127.0.0.0/8", "2130706433"),
        ("127.0.0.1", "localhost"),
        ("localhost", "localhost"),
    ] {
        let reach = Reach::default().allow([allowed.parse().unwrap()]);
        let url = format!("http://{host}:{port}/d/x.csv");
        assert!(run(&reach, &url).is_ok(), "{url} with {allowed}");
    }
    // Allowed is what was asked for, and not where it sends one to.
    let reach = Reach::default().allow(["127.0.0.1".parse().unwrap()]);
    let away = run(&reach, &format!("http://127.0.0.1:{port}/away")).unwrap_err();
    assert!(away.message.contains("another host"), "{away}");
}

#[test]
fn what_looks_like_a_file_but_is_the_systems_or_the_workers_is_refused() {
    let dir = data();
    for path in [
        "/proc/self/environ",
        "/proc/self/maps",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ] {
        if std::path::Path::new(path).exists() {
            let spec = json!({"sources": [{"url": format!("file:{path}")}]});
            refused(dir.path(), spec, Reason::UserError, "the system's own");
        }
    }
    let run = |reach: Reach, url: &str| {
        let spec = json!({"sources": [{"url": url}]});
        let test = TestContext::builder()
            .base_dir(dir.path())
            .spec(spec)
            .build();
        Collect::within(reach).run(&test.ctx)
    };
    for url in [
        "file:d/a.csv",
        "file:d/",
        "file:d/*.csv",
        "file:./x/../d/a.csv",
    ] {
        fs::create_dir_all(dir.path().join("x")).unwrap();
        let own = Reach::default().keep_out_of([dir.path().join("d")]);
        let error = run(own, url).expect_err(url);
        assert!(error.message.contains("is the worker's own"), "{error}");
        let rooted = Reach::default().below([dir.path().join("d/sub")]);
        assert!(run(rooted, url).is_err(), "{url}");
        let rooted = Reach::default().below([dir.path().join("d")]);
        assert!(run(rooted, url).is_ok(), "{url}");
    }
}

#[test]
fn a_bearer_is_sent_where_it_is_meant_for_and_nowhere_in_the_clear() {
    fn asks(listener: TcpListener) -> String {
        let (mut stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut head, mut line) = (String::new(), String::new());
        while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
            head.push_str(&line);
            line.clear();
        }
        stream.write_all(&ok(b"x")).unwrap();
        head
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x", listener.local_addr().unwrap());
    let head = std::thread::spawn(|| asks(listener));
    let run = |url: &str| {
        let spec = json!({"sources": [{"url": url, "bearer": "hub"}]});
        let collect = Collect::within(Reach::of_own_machine());
        assert_eq!(collect.secrets(&spec).unwrap(), ["hub".parse().unwrap()]);
        let test = TestContext::builder()
            .spec(spec)
            .secret("hub", "planted-canary");
        collect.run(&test.build().ctx)
    };
    run(&url).unwrap();
    let head = head.join().unwrap();
    assert!(
        head.contains("authorization: Bearer planted-canary\r\n"),
        "{head}"
    );
    for (url, part) in [
        (
            "http://data.example/x",
            "for everybody to read: use `https:`",
        ),
        ("file:x", "takes no `bearer`"),
        ("s3://bucket/x", "takes no `bearer`"),
    ] {
        let error = run(url).unwrap_err();
        assert!(error.message.contains(part), "{error}");
        assert!(!error.message.contains("canary"), "{error}");
    }
}
