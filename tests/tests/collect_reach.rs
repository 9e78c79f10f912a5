//! What `collect` may reach from a worker of a cluster, and from one's own machine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    thread,
};

use emberline_tests::{Dev, Place, place::task, seconds, wait_for};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Answers everything with the same few bytes, until the process ends.
fn serve() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\na,b\n";
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    address
}

/// A pipeline that collects each of these on its own.
fn pipeline(urls: &[(&str, String)]) -> String {
    let stage =
        |url: &String| json!({"kind": "collect", "with": {"sources": [{"url": url, "as": "x"}]}});
    let stages = urls
        .iter()
        .map(|(name, url)| ((*name).to_owned(), stage(url)));
    let stages: serde_json::Map<String, Value> = stages.collect();
    json!({"pipeline": "p", "fail_fast": false, "stages": stages}).to_string()
}

fn why<'a>(run: &'a Value, name: &str) -> &'a str {
    task(run, name)["failure"]["message"].as_str().unwrap_or("")
}

/// Runs it on a cluster whose one worker has these arguments.
fn on_a_cluster(place: &Place, urls: &[(&str, String)], more: &[&str]) -> Value {
    place.write("p.yaml", pipeline(urls));
    let dev = Dev::start_with(place, &["--workers", "0"]);
    let state = place.path("worker").display().to_string();
    let arguments = [
        "worker",
        "--server",
        &dev.address,
        "--name",
        "w",
        "--state-dir",
        &state,
    ];
    let arguments = [&arguments, more].concat();
    let call = place.emberline(&arguments).env("CANARY", "planted-canary");
    let mut worker = call.within(seconds(120)).start();
    wait_for("a session", seconds(30), || {
        assert!(!worker.has_ended(), "{}", worker.stderr());
        worker.stdout().contains(" has a session ").then_some(())
    });
    let cli = [
        "--server",
        &dev.address,
        "run",
        "p.yaml",
        "-o",
        "json",
        "-q",
    ];
    let run = place.emberline(&cli).run().json();
    worker.signal(Signal::TERM);
    let _ = worker.finish().expect_code(0);
    dev.stop().expect_code(0);
    run
}

#[test]
fn a_worker_of_a_cluster_gives_away_neither_its_machine_nor_itself() {
    let place = Place::new();
    let web = serve();
    place.write("secrets/key", "planted-canary");
    place.write("data.csv", "a,b\n");
    std::os::unix::fs::symlink(place.path("secrets"), place.path("link")).unwrap();
    let file = |path: &str| format!("file:{}", place.path(path).display());
    let urls = [
        ("loopback", format!("http://{web}/x")),
        ("named", format!("http://localhost:{}/x", web.port())),
        (
            "metadata",
            "http://169.254.169.254/latest/meta-data/".to_owned(),
        ),
        ("environ", "file:/proc/self/environ".to_owned()),
        ("parent", "file:/proc/1/environ".to_owned()),
        ("secret", file("secrets/key")),
        ("by-a-link", file("link/key")),
        ("state", file("worker/worker.lock")),
        ("data", file("data.csv")),
    ];
    let secrets = place.path("secrets").display().to_string();
    let run = on_a_cluster(&place, &urls, &["--secrets-dir", &secrets]);
    for (name, part) in [
        ("loopback", "is refused: it is the worker's own machine"),
        ("named", "the worker's own machine"),
        (
            "metadata",
            "is refused: it is an address of the worker's own link",
        ),
        ("environ", "it is no file but the system's own"),
        ("secret", "is the worker's own"),
        ("by-a-link", "is the worker's own"),
        ("state", "is the worker's own"),
    ] {
        assert!(why(&run, name).contains(part), "{name}: {run:#}");
        assert_eq!(task(&run, name)["failure"]["reason"], "user_error");
    }
    assert_eq!(task(&run, "parent")["state"], "failed");
    assert_eq!(task(&run, "data")["state"], "succeeded");
    let objects = emberline_tests::outside::objects(&place.state());
    for object in objects {
        let bytes = std::fs::read(&object).unwrap();
        let leaked = String::from_utf8_lossy(&bytes).contains("planted-canary");
        assert!(!leaked, "{}", object.display());
    }
}

#[test]
fn what_its_operator_allows_a_worker_reaches_and_no_more() {
    let place = Place::new();
    let web = serve();
    place.write("data/a.csv", "a,b\n");
    place.write("other/a.csv", "a,b\n");
    let file = |path: &str| format!("file:{}", place.path(path).display());
    let urls = [
        ("loopback", format!("http://{web}/x")),
        ("decimal", format!("http://2130706433:{}/x", web.port())),
        ("named", format!("http://localhost:{}/x", web.port())),
        ("metadata", "http://169.254.169.254/x".to_owned()),
        ("data", file("data/a.csv")),
        ("out", file("data/../other/a.csv")),
    ];
    let root = place.path("data").display().to_string();
    let more = ["--collect-allow", "127.0.0.1", "--collect-root", &root];
    let run = on_a_cluster(&place, &urls, &more);
    for name in ["loopback", "decimal", "named", "data"] {
        assert_eq!(task(&run, name)["state"], "succeeded", "{name}: {run:#}");
    }
    assert!(why(&run, "metadata").contains("is refused"), "{run:#}");
    let part = format!("takes files from below `{root}` only");
    assert!(why(&run, "out").contains(&part), "{run:#}");
}

#[test]
fn on_ones_own_machine_loopback_is_reached_and_metadata_is_not() {
    let place = Place::new();
    let web = serve();
    let urls = [
        ("loopback", format!("http://{web}/x")),
        ("metadata", "http://169.254.169.254/x".to_owned()),
        ("environ", "file:/proc/self/environ".to_owned()),
    ];
    place.write("p.yaml", pipeline(&urls));
    let run = place.run("p.yaml");
    assert_eq!(task(&run, "loopback")["state"], "succeeded", "{run:#}");
    assert!(why(&run, "metadata").contains("is refused"), "{run:#}");
    assert!(why(&run, "environ").contains("the system's own"), "{run:#}");
}

#[test]
fn what_cannot_be_allowed_is_told_in_one_line() {
    let place = Place::new();
    for (arguments, part) in [
        (["--collect-allow", "10.0.0.1/8"], "write `10.0.0.0/8`"),
        (
            ["--collect-allow", "http://x/"],
            "neither a host, an address nor a network",
        ),
        (
            ["--collect-root", "no-such-directory"],
            "--collect-root no-such-directory",
        ),
    ] {
        let all = [&["worker", "--server", "127.0.0.1:1"][..], &arguments].concat();
        let output = place.emberline(&all).run().expect_code(2);
        assert!(output.stderr.contains(part), "{output}");
    }
}
