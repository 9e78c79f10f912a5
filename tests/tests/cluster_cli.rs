//! The commands against a cluster of several coordinators: any address is enough, a failover is not
//! noticed but by the clock, and nothing is told twice.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use emberline_tests::{
    Output, Place,
    cluster::{Builder, Cluster},
    pipelines::LINES,
    processes, seconds, wait_for,
};

/// What a command may take when nothing is in its way. The machine may be busy.
const PROMPT: Duration = Duration::from_millis(2500);

/// A new leader, after the one that leads now was killed.
fn kill_the_leader(cluster: &mut Cluster) {
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader.index].kill();
    cluster.wait_for_leader_after(leader.epoch);
}

/// The only mistake that a command tells.
#[track_caller]
fn one_error(output: &Output) -> String {
    let errors: Vec<_> = (output.stderr.lines())
        .filter_map(|l| l.strip_prefix("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{output}");
    assert!(!output.stderr.contains("panicked"), "{output}");
    errors[0].to_owned()
}

#[test]
fn any_coordinators_address_is_enough() {
    let cluster = Builder::new().workers(1).start();
    let leader = cluster.wait_for_leader();
    let place = Place::new();
    for server in cluster.servers() {
        let status = place.json(&["--server", server, "cluster", "status"]);
        assert_eq!(status["leader"], leader.address, "by {server}");
        assert_eq!(status["epoch"], leader.epoch);
        let coordinators = status["coordinators"].as_array().unwrap();
        assert_eq!(coordinators.len(), 3, "{status:#}");
        let leads = coordinators.iter().filter(|c| c["leads"] == true);
        assert_eq!(leads.count(), 1, "{status:#}");
        assert_eq!(status["workers"][0]["worker"], "w0");
    }
}

#[test]
fn coordinators_that_say_nothing_keep_no_command_waiting() {
    let cluster = Builder::new().workers(0).start();
    let place = Place::new();
    // The leader has begun to answer: nobody is waited for then.
    let all = cluster.servers().join(",");
    place.json(&["--server", &all, "cluster", "status"]);
    let follower = cluster.a_follower();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = processes::free_port();
    cluster.coordinators[follower].pause();
    let mut servers = vec![
        cluster.servers()[follower].clone(),
        silent.local_addr().unwrap().to_string(),
        format!("127.0.0.1:{refused}"),
    ];
    servers.extend(cluster.servers().iter().cloned());
    let begun = Instant::now();
    place.json(&["--server", &servers.join(","), "cluster", "status"]);
    let took = begun.elapsed();
    cluster.coordinators[follower].go_on();
    assert!(took < PROMPT, "{took:?}");
}

#[test]
fn a_run_is_followed_through_failovers_and_told_once() {
    let mut cluster = Builder::new().start();
    let place = Place::new();
    place.write("p.yaml", cluster.journal.gated("g", ""));
    let servers = cluster.servers().join(",");
    let arguments = ["--server", &servers, "run", "p.yaml"];
    let following = place.emberline(&arguments).start();
    let run = wait_for("the run begins", seconds(20), || {
        let stderr = following.stderr();
        let line = stderr.lines().find(|l| l.starts_with("run "))?.to_owned();
        line.split_whitespace().nth(1).map(str::to_owned)
    });
    cluster.acknowledged(&run);
    cluster.wait_for_begin(&run, "wait", 1);
    kill_the_leader(&mut cluster);
    cluster.journal.open("g");
    let output = following.finish().expect_code(0);
    for (beginning, times) in [
        (format!("run {run} "), 1),
        ("  + first ".to_owned(), 1),
        ("  + wait ".to_owned(), 1),
        ("  + last ".to_owned(), 1),
        ("  > ".to_owned(), 0),
    ] {
        let lines = output.stderr.lines();
        let told = lines.filter(|l| l.starts_with(&beginning)).count();
        assert_eq!(told, times, "`{beginning}` in {output}");
    }
    cluster.succeeds(&run);
    cluster.check();
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_log_is_followed_through_a_failover_and_each_line_printed_once() {
    let mut cluster = Builder::new().start();
    let pipeline = cluster.journal.gated("g", "");
    let run = cluster.submit(&pipeline);
    let place = Place::new();
    let servers = cluster.servers().join(",");
    let arguments = [
        "--server", &servers, "runs", "logs", &run, "-f", "--task", "wait",
    ];
    cluster.wait_for_begin(&run, "wait", 1);
    let following = place.emberline(&arguments).start();
    let half = format!("line {} of {LINES}", LINES / 2);
    wait_for("half of the log", seconds(20), || {
        following.stdout().contains(&half).then_some(())
    });
    kill_the_leader(&mut cluster);
    cluster.journal.open("g");
    let output = following.finish().expect_code(0);
    let lines = output.stdout.lines();
    let printed: Vec<&str> = lines.filter_map(|l| Some(l.split_once(' ')?.1)).collect();
    let whole: Vec<String> = (1..=LINES)
        .map(|n| format!("line {n} of {LINES}"))
        .collect();
    assert_eq!(printed, whole, "{output}");
    cluster.succeeds(&run);
    cluster.check();
}

#[test]
fn a_file_larger_than_what_is_kept_travels_with_a_submission() {
    let mut cluster = Builder::new().workers(1).start();
    let place = Place::new();
    let size = 20 << 20;
    let content: Vec<u8> = (0..size).map(|n: u32| (n >> 8) as u8).collect();
    place.write("large", &content);
    let sum = emberline_tests::outside::sha256(&content);
    let command = format!("echo '{sum}  large' | sha256sum -c");
    let with = serde_json::json!({"command": ["sh", "-c", command], "files": ["large"]});
    place.write(
        "p.yaml",
        format!("pipeline: large\nstages:\n  a: {{ kind: exec, with: {with} }}\n"),
    );
    let follower = cluster.a_follower();
    let server = cluster.servers()[follower].clone();
    let run = place.json(&["--server", &server, "run", "p.yaml"]);
    assert_eq!(run["state"], "succeeded", "{run:#}");
    cluster.acknowledged(run["run"].as_str().unwrap());
    cluster.check();
}

#[test]
fn that_nobody_is_there_is_told_in_one_line_and_in_time() {
    let place = Place::new();
    let ports: Vec<String> = (0..2)
        .map(|_| format!("127.0.0.1:{}", processes::free_port()))
        .collect();
    let several = ports.join(",");
    for (arguments, least, most) in [
        (vec!["--server", &ports[0]], Duration::ZERO, PROMPT),
        (
            vec!["--server", &several, "--connect-timeout", "1s"],
            Duration::from_millis(300),
            seconds(1) + PROMPT,
        ),
    ] {
        let mut all = arguments.clone();
        all.extend(["runs", "list"]);
        let begun = Instant::now();
        let output = place.emberline(&all).run().expect_code(3);
        let took = begun.elapsed();
        assert!(took >= least && took < most, "{took:?}: {output}");
        let line = one_error(&output);
        assert!(
            ports.iter().any(|port| line.contains(port.as_str())),
            "{line}"
        );
    }
    let wrong = place
        .emberline(&["--server", "https://x:1", "runs", "list"])
        .run();
    assert!(one_error(&wrong.expect_code(2)).contains("asks for TLS"));
}
