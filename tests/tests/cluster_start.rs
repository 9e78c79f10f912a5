//! What cannot be right is told in one line, and the process leaves; what may come right is told,
//! waited for, and tried again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use emberline_tests::{
    Etcd, Output, Place, TcpProxy, cluster::Builder, cluster::PREFIX, node::Node, processes,
    seconds, wait_for,
};

/// A coordinator with these arguments, which must leave by itself.
fn coordinator(place: &Place, arguments: &[&str]) -> Output {
    let mut all = vec!["coordinator", "--listen", "127.0.0.1:0"];
    all.extend(arguments);
    place.emberline(&all).within(seconds(20)).run()
}

fn artifacts(place: &Place) -> String {
    std::fs::create_dir_all(place.path("objects")).unwrap();
    format!("file://{}", place.path("objects").display())
}

/// The only line that it says.
#[track_caller]
fn one_line(output: &Output) -> String {
    let errors: Vec<_> = (output.stderr.lines())
        .filter_map(|l| l.strip_prefix("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{output}");
    assert!(!output.stderr.contains("panicked"), "{output}");
    assert!(output.stdout.is_empty(), "{output}");
    errors[0].to_owned()
}

#[test]
fn what_cannot_be_right_is_told_in_one_line() {
    let place = Place::new();
    let artifacts = artifacts(&place);
    let artifacts = artifacts.as_str();
    let etcd = "http://127.0.0.1:1";
    let cases: &[(&[&str], &str)] = &[
        (&["--artifacts", artifacts], "--etcd"),
        (&["--etcd", etcd], "--artifacts"),
        (
            &["--etcd", "ftp://127.0.0.1:1", "--artifacts", artifacts],
            "ftp",
        ),
        (&["--etcd", "", "--artifacts", artifacts], "etcd"),
        (&["--etcd", etcd, "--artifacts", "gopher://x"], "gopher"),
        (
            &[
                "--etcd",
                etcd,
                "--artifacts",
                artifacts,
                "--lease-ttl",
                "1ms",
            ],
            "lease",
        ),
        (
            &[
                "--etcd",
                etcd,
                "--artifacts",
                artifacts,
                "--etcd-prefix",
                "a b",
            ],
            "prefix",
        ),
        (
            &[
                "--etcd",
                etcd,
                "--artifacts",
                artifacts,
                "--heartbeat-interval",
                "1h",
            ],
            "heartbeat",
        ),
        (
            &[
                "--etcd",
                etcd,
                "--artifacts",
                artifacts,
                "--etcd-ca",
                "/nowhere.pem",
            ],
            "/nowhere.pem",
        ),
        (
            &[
                "--etcd",
                etcd,
                "--artifacts",
                artifacts,
                "--etcd-user",
                "me",
            ],
            "password",
        ),
    ];
    for (arguments, part) in cases {
        let output = coordinator(&place, arguments);
        assert_eq!(output.code, Some(2), "{arguments:?}: {output}");
        assert!(output.stderr.contains(part), "{arguments:?}: {output}");
        assert!(!output.stderr.contains("panicked"), "{output}");
    }
    let open = place
        .emberline(&[
            "coordinator",
            "--listen",
            "0.0.0.0:0",
            "--etcd",
            etcd,
            "--artifacts",
            artifacts,
        ])
        .run()
        .expect_code(2);
    assert!(one_line(&open).contains("--insecure"), "{open}");
}

#[test]
fn a_prefix_belongs_to_one_cluster() {
    let cluster = Builder::new().coordinators(1).workers(0).start();
    let place = Place::new();
    let other = artifacts(&place);
    let url = cluster.etcd.url(0);
    let output = coordinator(
        &place,
        &[
            "--etcd",
            &url,
            "--etcd-prefix",
            PREFIX,
            "--artifacts",
            &other,
        ],
    );
    assert!(output.code.is_some_and(|c| c != 0), "{output}");
    let line = one_line(&output);
    assert!(
        line.contains("belongs to a cluster that keeps its artifacts in"),
        "{line}"
    );
    assert!(line.contains("choose another prefix"), "{line}");
    // With a prefix of its own it is another cluster.
    let arguments = [
        "coordinator",
        "--listen",
        "127.0.0.1:0",
        "--etcd",
        &url,
        "--etcd-prefix",
        "other",
        "--artifacts",
        &other,
    ];
    let mut node = Node::new(&place.dir(), "other", arguments.map(str::to_owned).to_vec());
    node.start();
    node.wait_for_line(" serves on ");
}

#[test]
fn a_newer_schema_is_refused() {
    let etcd = Etcd::start(1);
    etcd.put(&format!("{PREFIX}/state/schema"), "999").unwrap();
    let place = Place::new();
    let (url, artifacts) = (etcd.url(0), artifacts(&place));
    let output = coordinator(
        &place,
        &[
            "--etcd",
            &url,
            "--etcd-prefix",
            PREFIX,
            "--artifacts",
            &artifacts,
        ],
    );
    assert!(output.code.is_some_and(|c| c != 0), "{output}");
    let line = one_line(&output);
    assert!(line.contains("schema version 999"), "{line}");
    assert!(line.contains("use a newer emberline"), "{line}");
    assert_eq!(
        etcd.get(&format!("{PREFIX}/state/schema")).unwrap().value(),
        b"999"
    );
    assert!(
        etcd.get(&format!("{PREFIX}/leader")).is_none(),
        "it still leads"
    );
}

#[test]
fn an_etcd_that_is_not_there_yet_is_waited_for() {
    let etcd = Etcd::start(1);
    let way = TcpProxy::start(&etcd.address(0));
    way.refuse();
    let place = Place::new();
    let (url, artifacts) = (format!("http://{}", way.address()), artifacts(&place));
    let arguments = [
        "coordinator",
        "--listen",
        "127.0.0.1:0",
        "--etcd",
        &url,
        "--artifacts",
        &artifacts,
    ];
    let mut node = Node::new(&place.dir(), "early", arguments.map(str::to_owned).to_vec());
    node.start();
    wait_for("it says what it waits for", seconds(15), || {
        assert!(node.ended().is_none(), "{}", node.stderr());
        node.stderr().contains("etcd").then_some(())
    });
    assert!(etcd.get(&format!("{PREFIX}/leader")).is_none());
    way.heal();
    wait_for("it leads", seconds(15), || {
        etcd.get(&format!("{PREFIX}/leader"))
    });
    node.terminate();
    assert_eq!(node.wait(seconds(10)), 0);
    assert!(
        etcd.get(&format!("{PREFIX}/leader")).is_none(),
        "it has resigned"
    );
}

#[test]
fn a_worker_waits_for_a_coordinator_and_says_so() {
    let mut cluster = Builder::new().workers(1).prepare();
    cluster.workers[0].start();
    let servers = cluster.servers().to_vec();
    wait_for("it says whom it tries to reach", seconds(15), || {
        let ended = cluster.workers[0].ended();
        let stderr = cluster.workers[0].stderr();
        assert!(ended.is_none(), "{stderr}");
        servers.iter().any(|s| stderr.contains(s)).then_some(())
    });
    for coordinator in &mut cluster.coordinators {
        coordinator.start();
    }
    cluster.wait_until_it_serves();
    let pipeline = cluster.journal.chains(1, 2);
    let run = cluster.submit(&pipeline);
    cluster.succeeds(&run);
    cluster.check();
    cluster.workers[0].terminate();
    assert_eq!(cluster.workers[0].wait(seconds(10)), 0);
}

#[test]
fn a_port_that_is_taken_is_told() {
    let etcd = Etcd::start(1);
    let place = Place::new();
    let (url, artifacts) = (etcd.url(0), artifacts(&place));
    let taken = std::net::TcpListener::bind(("127.0.0.1", processes::free_port())).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = place
        .emberline(&[
            "coordinator",
            "--listen",
            &address,
            "--etcd",
            &url,
            "--artifacts",
            &artifacts,
        ])
        .run();
    assert!(output.code.is_some_and(|c| c != 0), "{output}");
    assert!(one_line(&output).contains(&address), "{output}");
}
