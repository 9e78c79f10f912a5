//! Whole clusters whose artifacts are in a bucket: an S3 server that is ill or gone for a while loses
//! nothing and restarts nothing; what is damaged there is named; what cannot be right is told at the
//! start, and by `doctor`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, time::Duration};

use emberline_proto::v1::{GetRunResponse, RunState};
use emberline_tests::{
    Etcd, HttpProxy, Output, Place, S3Server,
    client::state_of,
    cluster::{Builder, Cluster},
    http_proxy::{Fault, Rule},
    node::{Node, timed},
    outside,
    s3::SECRET_KEY,
    seconds, wait_for,
};
use serde_json::Value;

fn builder() -> Builder {
    Builder::new().coordinators(2).impatient()
}

fn ended(cluster: &Cluster, run: &str) -> GetRunResponse {
    wait_for("the run ends", seconds(60), || {
        let seen = cluster.run(run);
        matches!(
            state_of(&seen),
            RunState::Succeeded | RunState::Failed | RunState::Cancelled
        )
        .then_some(seen)
    })
}

#[test]
fn a_cluster_works_through_a_server_that_fails_now_and_then() {
    let server = S3Server::start();
    let proxy = HttpProxy::start(&server.address());
    let mut cluster = builder().on_s3(&server, proxy.address()).start();
    let slow_down = || Fault::s3_error(503, "SlowDown", "Please reduce your request rate.");
    proxy.add(Rule::new(slow_down()).times(10));
    proxy.add(Rule::new(Fault::Cut(10)).on("GET").times(5));
    proxy.add(Rule::new(Fault::LoseAnswer).on("PUT").after(5).times(10));
    proxy.add(Rule::new(Fault::CutRequest(10)).on("PUT").times(10));
    proxy.add(Rule::new(Fault::Delay(Duration::from_millis(200))).times(30));
    let pipeline = cluster.journal.chains(4, 3);
    let run = cluster.submit(&pipeline);
    assert_eq!(state_of(&ended(&cluster, &run)), RunState::Succeeded);
    cluster.check();
    let tasks = (0..4).flat_map(|c| (0..3).map(move |s| format!("c{c}-{s}")));
    for task in tasks {
        assert_eq!(cluster.history.attempts(&run, &task), 1, "{task}");
    }
    assert_eq!(server.uploads_left(), [""; 0]);
}

#[test]
fn a_server_that_is_gone_for_a_while_restarts_nothing() {
    let mut server = S3Server::start();
    let proxy = HttpProxy::start(&server.address());
    let mut cluster = builder().on_s3(&server, proxy.address()).start();
    let pipeline = cluster.journal.gated("shut", "");
    let run = cluster.submit(&pipeline);
    cluster.wait_for_begin(&run, "wait", 1);
    server.kill();
    // The task ends, and its output has nowhere to go.
    cluster.journal.open("shut");
    wait_for("the task has ended by itself", seconds(20), || {
        (cluster.journal.ended(&run, "wait") == 1).then_some(())
    });
    let _ = proxy.take_requests();
    let mut tries = 0;
    wait_for("many tries", seconds(60), || {
        tries += proxy.take_requests().len();
        (tries >= 20).then_some(())
    });
    let (seen, took) = timed(|| cluster.run(&run));
    assert_eq!(state_of(&seen), RunState::Running, "{seen:#?}");
    assert!(took < seconds(5), "{took:?}");
    server.restart();
    assert_eq!(state_of(&ended(&cluster, &run)), RunState::Succeeded);
    cluster.check();
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_damaged_input_is_named_and_never_used() {
    let server = S3Server::start();
    let mut cluster = builder().on_s3(&server, &server.address()).start();
    let wait = format!(
        "until [ -e {} ]; do sleep 0.02; done",
        cluster.journal.gate("shut").display()
    );
    // Made on one worker and used on the other, whose cache has never seen it.
    let text = format!(
        "pipeline: damaged\nstages:\n  make: {{ kind: exec, cache: false, outputs: {{ o: files }}, labels: {{ name: w0 }}, with: {{ command: [sh, -c, 'seq 100000 > $EMBERLINE_OUTPUT_O/x'] }} }}\n  wait: {{ kind: exec, cache: false, needs: [make], with: {{ command: [sh, -c, '{wait}'] }} }}\n  use: {{ kind: exec, cache: false, needs: [wait], inputs: {{ i: make.o }}, labels: {{ name: w1 }}, retries: {{ faults: 0 }}, with: {{ command: [sh, -c, 'echo used'] }} }}\n"
    );
    let run = cluster.submit(&text);
    let made = wait_for("it is made", seconds(20), || {
        let seen = cluster.run(&run);
        let make = seen.tasks.iter().find(|t| t.task == "make")?;
        Some(make.outputs.first()?.manifest.clone())
    });
    let above = cluster.artifacts();
    let files = outside::artifact(&above, &made);
    let digest = outside::sha256(&files[0].1);
    let object = outside::object(&above, &digest);
    let mut bytes = fs::read(&object).unwrap();
    bytes[1000] ^= 1;
    fs::write(&object, &bytes).unwrap();
    cluster.journal.open("shut");
    let seen = ended(&cluster, &run);
    assert_eq!(state_of(&seen), RunState::Failed, "{seen:#?}");
    let used = seen.tasks.iter().find(|t| t.task == "use").unwrap();
    let failure = used.failure.as_ref().unwrap();
    assert!(failure.message.contains("corrupted"), "{failure:?}");
    assert!(failure.message.contains(&digest), "{failure:?}");
    assert!(
        outside::log(&above, &run, "use", 1).is_none_or(|log| !log.lines.contains(&"used".into()))
    );
}

/// A coordinator that cannot work with this bucket, and must leave by itself.
fn coordinator(place: &Place, server: &S3Server, changed: &[(&str, &str)]) -> Output {
    let mut call = place
        .emberline(&[
            "coordinator",
            "--listen",
            "127.0.0.1:0",
            "--etcd",
            "http://127.0.0.1:1",
            "--artifacts",
            &server.url("objects"),
        ])
        .within(seconds(40));
    for (name, value) in server.environment() {
        call = call.env(&name, value);
    }
    for (name, value) in changed {
        call = call.env(name, value);
    }
    call.run()
}

#[test]
fn a_coordinator_refuses_a_bucket_that_it_cannot_use_in_one_line() {
    let server = S3Server::start();
    let proxy = HttpProxy::start(&server.address());
    proxy.add(Rule::new(Fault::s3_error(403, "AccessDenied", "Access Denied")).on("PUT"));
    let read_only = format!("http://{}", proxy.address());
    let https = format!("https://{}", server.address());
    for (name, value, told) in [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "AWS_SECRET_ACCESS_KEY"),
        (
            "AWS_ENDPOINT_URL",
            read_only.as_str(),
            "give them the right to read, write",
        ),
        ("AWS_ENDPOINT_URL", https.as_str(), "write `http://`"),
        (
            "AWS_ENDPOINT_URL",
            "127.0.0.1:9000",
            "`http://` or `https://`",
        ),
    ] {
        let output = coordinator(&Place::new(), &server, &[(name, value)]).expect_code(2);
        let errors: Vec<_> = output
            .stderr
            .lines()
            .filter(|l| l.starts_with("error: "))
            .collect();
        assert_eq!(errors.len(), 1, "{output}");
        assert!(errors[0].contains(told), "{output}");
        assert!(!output.stderr.contains(SECRET_KEY), "{output}");
    }
}

#[test]
fn a_worker_that_cannot_use_the_bucket_says_so_and_takes_no_work() {
    let server = S3Server::start();
    let mut cluster = builder()
        .workers(1)
        .on_s3(&server, &server.address())
        .start();
    let arguments = cluster.worker_arguments("stranger", "stranger");
    let mut environment = server.environment();
    for (name, value) in &mut environment {
        if name == "AWS_SECRET_ACCESS_KEY" {
            "wrong".clone_into(value);
        }
    }
    let mut stranger =
        Node::new(cluster.root(), "stranger", arguments).with_environment(&environment);
    stranger.start();
    wait_for("it says why it cannot work", seconds(20), || {
        let told = stranger.stderr();
        let why = told.contains("the object store cannot be used from here");
        (why && told.contains("AWS_SECRET_ACCESS_KEY")).then_some(())
    });
    // All of it is done by the other worker, none of it had to be tried twice.
    let pipeline = cluster.journal.chains(4, 2);
    let run = cluster.submit(&pipeline);
    let ended = cluster.succeeds(&run);
    assert!(
        ended
            .tasks
            .iter()
            .all(|t| t.attempt == 1 && t.worker != "stranger")
    );
    stranger.terminate();
    assert_eq!(stranger.wait(seconds(20)), 0);
    cluster.check();
}

fn doctor(server: &S3Server, address: &str, more: &[&str]) -> Output {
    let url = server.url("objects");
    let mut arguments = vec!["doctor", "--artifacts", &url];
    arguments.extend(more);
    let place = Place::new();
    let mut call = place.emberline(&arguments);
    for (name, value) in server.environment_by(address) {
        call = call.env(&name, value);
    }
    call.run()
}

/// What was found about this, as pairs of state and detail.
fn found<'a>(told: &'a Value, what: &str) -> Vec<(&'a str, &'a str)> {
    let findings = told["findings"].as_array().unwrap();
    let about = findings
        .iter()
        .filter(|f| f["what"].as_str().unwrap().starts_with(what));
    about
        .map(|f| (f["health"].as_str().unwrap(), f["detail"].as_str().unwrap()))
        .collect()
}

#[test]
fn doctor_tries_every_operation_of_the_object_store() {
    let server = S3Server::start();
    let well = doctor(&server, &server.address(), &["-o", "json"])
        .expect_code(0)
        .json();
    assert_eq!(well["ok"], true);
    assert_eq!(found(&well, "artifacts: ").len(), 10, "{well:#}");
    assert_eq!(found(&well, "clock: object store")[0].0, "ok");
    assert_eq!(found(&well, "disk: ").len(), 2);

    let proxy = HttpProxy::start(&server.address());
    proxy.add(Rule::new(Fault::s3_error(501, "NotImplemented", "Not here.")).to("?uploads"));
    let ill = doctor(&server, proxy.address(), &["-o", "json"])
        .expect_code(1)
        .json();
    assert_eq!(ill["ok"], false);
    let parts = found(&ill, "artifacts: write in parts");
    assert_eq!(parts[0].0, "fail", "{ill:#}");
    assert!(parts[0].1.contains("NotImplemented"), "{ill:#}");
    assert_eq!(found(&ill, "artifacts: delete")[0].0, "ok", "{ill:#}");

    proxy.clear();
    proxy.add(Rule::new(Fault::s3_error(
        403,
        "RequestTimeTooSkewed",
        "Too far.",
    )));
    let ill = doctor(&server, proxy.address(), &[]).expect_code(1);
    assert!(ill.stdout.contains("FAIL"), "{ill}");
    assert!(ill.stdout.contains("set the time on both"), "{ill}");
    assert!(!ill.stdout.contains('<'), "{ill}");
}

#[test]
fn doctor_says_who_leads_and_who_is_gone() {
    let server = S3Server::start();
    let mut cluster = builder().on_s3(&server, &server.address()).start();
    let servers = cluster.servers().join(",");
    let all = ["--server", &servers, "-o", "json"];
    let well = doctor(&server, &server.address(), &all)
        .expect_code(0)
        .json();
    let leader = cluster.wait_for_leader();
    let about = |told: &Value, index: usize| {
        let (health, detail) = found(told, &format!("coordinator {}", cluster.servers()[index]))[0];
        (health.to_owned(), detail.to_owned())
    };
    let leads = about(&well, leader.index);
    assert_eq!(leads.0, "ok");
    assert!(
        leads.1.contains(&format!("leads term {}", leader.epoch)),
        "{leads:?}"
    );
    let follows = about(&well, 1 - leader.index);
    assert_eq!(follows.0, "ok");
    assert!(follows.1.contains(&leader.address), "{follows:?}");

    let gone = 1 - leader.index;
    cluster.coordinators[gone].kill();
    let ill = doctor(&server, &server.address(), &all)
        .expect_code(1)
        .json();
    let (health, detail) = found(&ill, &format!("coordinator {}", cluster.servers()[gone]))[0];
    assert_eq!(health, "fail");
    assert!(detail.contains("cannot be reached"), "{detail}");
    assert_eq!(found(&ill, "leadership")[0].0, "ok");
}

#[test]
fn doctor_says_what_is_wrong_with_etcd() {
    let mut etcd = Etcd::start(3);
    let examine = |etcd: &Etcd, code: i32| {
        let urls = etcd.urls().join(",");
        let place = Place::new();
        let call = place.emberline(&["doctor", "--etcd", &urls, "-o", "json"]);
        call.within(seconds(40)).run().expect_code(code).json()
    };
    let well = examine(&etcd, 0);
    assert_eq!(found(&well, "etcd http").len(), 3, "{well:#}");
    for (health, detail) in found(&well, "etcd http") {
        assert_ne!(health, "fail", "{well:#}");
        assert!(detail.contains("version 3."), "{well:#}");
    }
    let roles = found(&well, "etcd http")
        .into_iter()
        .map(|(_, detail)| detail);
    assert_eq!(roles.filter(|detail| detail.contains("leads")).count(), 1);
    assert_eq!(found(&well, "etcd: alarms"), [("ok", "none")]);
    assert_ne!(found(&well, "etcd: write")[0].0, "fail", "{well:#}");
    assert!(etcd.get("emberline/doctor").is_none(), "its key is left");

    // Two of three go on.
    etcd.kill(0);
    etcd.wait_until_it_answers();
    let ill = examine(&etcd, 1);
    let gone = found(&ill, &format!("etcd {}", etcd.url(0)))[0];
    assert_eq!(gone.0, "fail", "{ill:#}");
    assert!(gone.1.contains("refused"), "{ill:#}");
    assert_ne!(found(&ill, "etcd: write")[0].0, "fail", "{ill:#}");

    // One of three does not.
    etcd.kill(1);
    let ill = examine(&etcd, 1);
    for what in ["etcd: read", "etcd: write"] {
        assert_eq!(found(&ill, what)[0].0, "fail", "{ill:#}");
    }
}

#[test]
fn doctor_says_that_etcd_is_full() {
    let etcd = Etcd::with_quota(1, 4 << 20);
    etcd.fill();
    let place = Place::new();
    let told = place
        .emberline(&["doctor", "--etcd", &etcd.url(0)])
        .within(seconds(40))
        .run()
        .expect_code(1);
    assert!(told.stdout.contains("NOSPACE"), "{told}");
    assert!(told.stdout.contains("alarm disarm"), "{told}");
}
