//! The images and the cluster of `deploy/`, on a real Docker Engine: brought up as the guide says, then its
//! containers are killed, paused, cut off, stopped, scaled and taken down, and nothing that was acknowledged is lost.
//!
//! To bring a cluster up costs more than any one check, so one cluster is used for all of them, in order. Each
//! says its name before it begins.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    process::{Command, Output},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use emberline_tests::{
    client::Client,
    containers::{Engine, Project},
    http,
    place::repository,
    seconds, wait_for,
};
use serde_json::{Value, json};
use tonic::Code;

const COORDINATORS: [&str; 3] = ["coordinator-1", "coordinator-2", "coordinator-3"];
const MEMBERS: [&str; 3] = ["etcd-1", "etcd-2", "etcd-3"];

fn text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// A container that is removed at the end.
struct Container<'a>(&'a Engine, String);

impl<'a> Container<'a> {
    fn start(engine: &'a Engine, arguments: &[&str]) -> Self {
        let id = engine.run(&[&["run", "--detach"], arguments].concat());
        Self(engine, id.trim().to_owned())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.0.attempt(&["rm", "--force", "--volumes", &self.1]);
    }
}

/// What a container is given that may do nothing but its work.
const HARDENED: [&str; 6] = [
    "--read-only",
    "--cap-drop",
    "ALL",
    "--security-opt",
    "no-new-privileges",
    "--network=none",
];

#[test]
fn images_are_small_hardened_and_the_same_from_the_same_inputs() {
    let engine = Engine::start();
    let said = [
        ("VERSION", "1.2.3"),
        ("REVISION", "0123abc"),
        ("CREATED", "2026-11-26T00:00:00Z"),
        ("BUILD_OPTIONS", "--no-cache"),
    ];
    let layers = |engine: &Engine| engine.inspect("emberline:local")["RootFS"]["Layers"].clone();
    let first = layers(&engine);
    engine.make_images(&said);
    assert_eq!(layers(&engine), first, "built anew from the same inputs");
    for image in ["emberline:local", "emberline-worker:local"] {
        let config = &engine.inspect(image)["Config"];
        assert_eq!(config["User"], "65532:65532", "{image}");
        assert!(config["Volumes"]["/var/lib/emberline"].is_object());
        let labels = &config["Labels"];
        for (label, value) in [
            ("version", "1.2.3"),
            ("revision", "0123abc"),
            ("created", "2026-11-26T00:00:00Z"),
            ("licenses", "Apache-2.0"),
            ("source", "https://github.com/emberline/emberline"),
        ] {
            let label = format!("org.opencontainers.image.{label}");
            assert_eq!(labels[&label], value, "{image}: {label}");
        }
        let version = [&["run", "--rm"], &HARDENED[..], &[image, "--version"]].concat();
        assert!(engine.run(&version).starts_with("emberline "), "{image}");
    }
    // There is nothing else in it to be called.
    for program in ["sh", "/bin/sh", "python3"] {
        let call = ["run", "--rm", "--entrypoint", program, "emberline:local"];
        let output = engine.attempt(&call);
        assert_eq!(
            output.status.code(),
            Some(127),
            "{program}: {}",
            text(&output)
        );
    }
    let python = [
        "run",
        "--rm",
        "--entrypoint",
        "python3",
        "emberline-worker:local",
        "-c",
    ];
    let sum = engine.run(&[&python[..], &["print(6 * 7)"]].concat());
    assert_eq!(sum, "42\n");
}

#[test]
fn a_container_ends_in_order_and_leaves_no_zombies() {
    let engine = Engine::start();
    let dir = tempfile::tempdir().unwrap();
    // Commands that outlive whoever started them, and then end: somebody has to take note of it.
    let pipeline = "pipeline: orphans\nstages:\n  a:\n    kind: exec\n    with: { command: [sh, -c, '(setsid sleep 0.1 &) ; (setsid sleep 0.2 &) ; sleep 0.3'] }\n";
    fs::write(dir.path().join("p.yaml"), pipeline).unwrap();
    let mount = format!("{}:/pipelines:ro", dir.path().display());
    let mut arguments = HARDENED.to_vec();
    arguments.extend(["--volume", &mount, "emberline-worker:local", "dev"]);
    let container = Container::start(&engine, &arguments);
    let id = container.1.as_str();
    wait_for("it serves", seconds(60), || {
        let told = text(&engine.attempt(&["logs", id]));
        told.contains(" serves on ").then_some(())
    });
    engine.run(&["exec", id, "emberline", "run", "/pipelines/p.yaml"]);
    // By the kernel itself: the engine does not list who is dead.
    let cat = "cat /proc/[0-9]*/stat 2>/dev/null; true";
    let processes = || engine.run(&["exec", id, "sh", "-c", cat]);
    wait_for("what the stage left has ended", seconds(30), || {
        let alive = |line: &str| line.contains("(sleep)") && !line.contains(") Z ");
        (!processes().lines().any(alive)).then_some(())
    });
    let left = processes();
    let zombie = left.lines().find(|line| line.contains(") Z "));
    assert_eq!(zombie, None, "{left}");

    engine.run(&["stop", "--time", "30", id]);
    let state = &engine.inspect(id)["State"];
    assert_eq!(
        state["ExitCode"],
        0,
        "{}",
        text(&engine.attempt(&["logs", id]))
    );
}

#[test]
fn a_cluster_of_containers_keeps_what_it_acknowledged() {
    let engine = Engine::start();
    let mut project = Project::new(&engine);
    let begun = Instant::now();
    let step = |name: &str| println!("== {:3} s: {name}", begun.elapsed().as_secs());

    // With every profile, also what cannot be started here.
    project.compose(&["--profile", "*", "config", "--quiet"]);
    step("up, in the order of health");
    project.up(2);
    project.client.be(&project.secrets());
    each_waited_for_what_it_needs(&project);
    everything_is_hardened(&project);
    nobody_else_is_answered(&project);

    step("an example, from outside");
    an_example_is_trained_and_served(&project);

    step("the leader is killed");
    the_leader_is_killed(&project);
    step("a worker is paused");
    a_worker_is_paused(&project);
    step("the leader is cut off from etcd");
    the_leader_is_cut_off(&project);
    step("an etcd member is stopped");
    an_etcd_member_is_stopped(&project);

    step("every coordinator is restarted, workers come and go, under load");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // Ends the load also when a check fails, or the scope would wait for it for ever.
        struct Stops<'a>(&'a AtomicBool);
        impl Drop for Stops<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stops = Stops(&stop);
        let load = scope.spawn(|| project.submit_until(&stop));
        let goes_on = || {
            let before = project.acknowledged();
            wait_for("the load goes on", seconds(60), || {
                assert!(!load.is_finished(), "the load has failed");
                (project.acknowledged() > before + 1).then_some(())
            });
        };
        for coordinator in COORDINATORS {
            let container = project.container(coordinator);
            engine.run(&["restart", &container]);
            project.wait_for_health(&container);
            goes_on();
        }
        project.up(4);
        wait_for("four workers and the serving one", seconds(60), || {
            (workers(&project).len() == 5).then_some(())
        });
        goes_on();
        project.up(1);
        assert_eq!(project.containers("worker").len(), 1);
        goes_on();
    });
    project.check();

    step("what watches sees all of it");
    prometheus_sees_every_process(&project);

    step("down, and up again");
    let before = project.acknowledged();
    project.down();
    assert_eq!(
        engine.run(&[
            "ps",
            "--all",
            "--quiet",
            "--filter",
            "label=com.docker.compose.project=emberline-test"
        ]),
        ""
    );
    project.up(2);
    project.check();
    let run = project.submit(&project.journal.chains(2, 2));
    project.succeeds(&run);
    assert_eq!(project.acknowledged(), before + 1);
    project.check();
    the_model_is_served(&project);
}

/// The times of a container's state are of the same clock, and can be compared as texts.
fn time<'a>(state: &'a Value, what: &str) -> &'a str {
    state[what].as_str().unwrap()
}

fn each_waited_for_what_it_needs(project: &Project<'_>) {
    let state = |service: &str| {
        let container = project.container(service);
        project.engine.inspect(&container)["State"].clone()
    };
    let setup = state("setup");
    assert_eq!(setup["ExitCode"], 0);
    for service in [&MEMBERS[..], &["s3"]].concat() {
        assert!(
            time(&setup, "FinishedAt") < time(&state(service), "StartedAt"),
            "{service}"
        );
    }
    for service in COORDINATORS {
        let begun = state(service);
        for needed in [&MEMBERS[..], &["s3"]].concat() {
            assert!(time(&state(needed), "StartedAt") < time(&begun, "StartedAt"));
            project.wait_for_health(&project.container(needed));
        }
        project.wait_for_health(&project.container(service));
    }
}

fn everything_is_hardened(project: &Project<'_>) {
    let all = project.compose(&["ps", "--all", "--format", "{{.Name}}"]);
    assert!(all.lines().count() >= 12, "{all}");
    for name in all.lines() {
        let container = project.engine.inspect(name);
        let host = &container["HostConfig"];
        assert_eq!(host["ReadonlyRootfs"], true, "{name}");
        assert_eq!(host["CapDrop"][0], "ALL", "{name}");
        assert_eq!(host["SecurityOpt"][0], "no-new-privileges:true", "{name}");
        assert_eq!(host["Privileged"], false, "{name}");
        let is_setup = name.contains("setup");
        assert!(is_setup || host["CapAdd"].is_null(), "{name}");
        let user = container["Config"]["User"].as_str().unwrap();
        assert_eq!(user.starts_with("0:"), is_setup, "{name} runs as `{user}`");
        assert!(!user.is_empty(), "{name}");
        if !is_setup {
            assert_ne!(host["Memory"], 0, "{name} has no limit of memory");
            assert_eq!(host["RestartPolicy"]["Name"], "unless-stopped", "{name}");
        }
        // What is secret is in files.
        let environment = container["Config"]["Env"].to_string();
        assert!(!environment.contains("SECRET"), "{name}: {environment}");
        // Who has neither the authority's key nor etcd's certificates cannot have lost them.
        let mounts = container["Mounts"].to_string();
        assert_eq!(mounts.contains("_authority"), is_setup, "{name}");
        assert!(
            !name.contains("worker") || !mounts.contains("etcd"),
            "{name}"
        );
    }
}

fn an_example_is_trained_and_served(project: &Project<'_>) {
    let example = repository().join("examples/predictive-maintenance/pipeline.yaml");
    let pipeline = fs::read_to_string(example).unwrap();
    let run = project.submit_from(&pipeline, "/data/predictive-maintenance");
    let ended = project.succeeds(&run);
    assert_eq!(ended.tasks.len(), 7, "{ended:#?}");
    the_model_is_served(project);
}

/// Asked over REST, by the port that is published, with the certificate and the token of the command line;
/// without them nobody is answered.
fn the_model_is_served(project: &Project<'_>) {
    let secrets = project.secrets();
    let model = format!(
        "https://{}/v2/models/predictive-maintenance",
        project.serving
    );
    let file = |name: &str| secrets.join(name).display().to_string();
    let ask = |url: &str, body: Option<&str>| {
        let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
        let mut python = Command::new("python3");
        python.args(["-c", ASK, url, body.unwrap_or_default(), &ca, &cert, &key]);
        python.arg(file("token"));
        let mut last = String::new();
        wait_for(url, seconds(60), || {
            let output = python.output().unwrap();
            if !output.status.success() && text(&output) != last {
                last = text(&output);
                println!("{url}: {last}");
            }
            serde_json::from_slice::<Value>(&output.stdout).ok()
        })
    };
    let told = ask(&model, None);
    let inputs = told["inputs"].as_array().unwrap().iter();
    let inputs = inputs.map(|input| {
        let value = match input["datatype"].as_str().unwrap() {
            "BYTES" => json!("L"),
            _ => json!(100),
        };
        json!({"name": input["name"], "datatype": input["datatype"], "shape": [1], "data": [value]})
    });
    let request = json!({"inputs": inputs.collect::<Vec<_>>()}).to_string();
    let answer = ask(&format!("{model}/infer"), Some(&request));
    let outputs = answer["outputs"].as_array().unwrap();
    assert!(!outputs.is_empty(), "{answer:#}");
}

/// A client of HTTPS that is not ours.
const ASK: &str = "
import ssl, sys, urllib.request
url, body, ca, cert, key, token = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
context.load_cert_chain(cert, key)
headers = {'Content-Type': 'application/json', 'Authorization': 'Bearer ' + open(token).read().strip()}
request = urllib.request.Request(url, body.encode() or None, headers)
print(urllib.request.urlopen(request, timeout=20, context=context).read().decode())
";

/// Without a certificate there is no connection, and without a token no answer.
fn nobody_else_is_answered(project: &Project<'_>) {
    let stranger = Client::new(vec![project.coordinators[0].clone()]);
    let refused = stranger.run("r-1", seconds(1)).unwrap_err();
    let no_connection = [Code::Unavailable, Code::Internal, Code::Unknown];
    assert!(no_connection.contains(&refused.code()), "{refused:?}");
    let mut half = Client::new(project.coordinators.clone());
    half.be_without_token(&project.secrets());
    let refused = half.run("r-1", seconds(60)).unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
}

/// What runs while the leader dies goes on, and is not started again.
fn the_leader_is_killed(project: &Project<'_>) {
    let (leader, term) = project.wait_for_leader();
    let run = project.submit(&project.journal.gated("kill", ""));
    project.wait_for_begin(&run, "wait", 1);
    let container = project.container(&leader);
    project.engine.run(&["kill", &container]);
    let (next, _) = project.wait_for_leader_after(term);
    assert_ne!(next, leader);
    project.journal.open("kill");
    project.succeeds(&run);
    assert_eq!(project.journal.begun(&run, "wait"), 1);
    project.engine.run(&["start", &container]);
    project.wait_for_health(&container);
}

/// Its attempt runs elsewhere; what it says when it wakes up does not count.
fn a_worker_is_paused(project: &Project<'_>) {
    let run = project.submit(&project.journal.gated("pause", ""));
    project.wait_for_begin(&run, "wait", 1);
    let seen = project.client.run(&run, seconds(60)).unwrap();
    let task = seen.tasks.iter().find(|t| t.task == "wait").unwrap();
    // The name of a worker is its host's, which is the beginning of the container's id.
    let paused = project.compose(&["ps", "--no-trunc", "--format", "{{.ID}}"]);
    let paused = paused.lines().find(|id| id.starts_with(&task.worker));
    let paused = paused.map_or_else(|| project.container(&task.worker), str::to_owned);
    project.engine.run(&["pause", &paused]);
    project.wait_for_begin(&run, "wait", 2);
    project.engine.run(&["unpause", &paused]);
    project.journal.open("pause");
    let ended = project.succeeds(&run);
    let task = ended.tasks.iter().find(|t| t.task == "wait").unwrap();
    assert_eq!(task.attempt, 2, "{task:#?}");
    wait_for("it is connected again", seconds(60), || {
        (workers(project).len() == 3).then_some(())
    });
}

/// The names of the workers that are connected.
fn workers(project: &Project<'_>) -> Vec<String> {
    let workers = project.compose(&[
        "run", "--rm", "--no-TTY", "cli", "workers", "list", "-o", "json",
    ]);
    let all: Vec<Value> = serde_json::from_str(&workers).unwrap();
    let connected = all.iter().filter(|w| w["state"] == "connected");
    connected.map(|w| w["worker"].to_string()).collect()
}

fn the_leader_is_cut_off(project: &Project<'_>) {
    let (leader, term) = project.wait_for_leader();
    let container = project.container(&leader);
    let network = "emberline-test_state";
    project
        .engine
        .run(&["network", "disconnect", network, &container]);
    let (next, _) = project.wait_for_leader_after(term);
    assert_ne!(next, leader);
    let run = project.submit(&project.journal.chains(2, 2));
    project.succeeds(&run);
    project.engine.run(&[
        "network", "connect", "--alias", &leader, network, &container,
    ]);
    project.wait_for_health(&container);
}

fn an_etcd_member_is_stopped(project: &Project<'_>) {
    let member = project.container("etcd-1");
    project.engine.run(&["stop", &member]);
    for _ in 0..3 {
        let run = project.submit(&project.journal.chains(2, 2));
        project.succeeds(&run);
    }
    project.engine.run(&["start", &member]);
    project.wait_for_health(&member);
}

/// Each process of the cluster is fetched from by the configuration of `deploy/`.
fn prometheus_sees_every_process(project: &Project<'_>) {
    let expected = [
        ("emberline-coordinator", 3),
        ("emberline-worker", 2),
        ("etcd", 3),
        ("prometheus", 1),
    ];
    let page = "/api/v1/targets?state=active";
    let mut last = Vec::new();
    wait_for("Prometheus sees every process", seconds(90), || {
        let told = http::get(&project.prometheus, page).expect_ok();
        let told: Value = serde_json::from_str(&told).unwrap();
        let targets = told["data"]["activeTargets"].as_array().unwrap();
        let one = |t: &Value| ["scrapeUrl", "health", "lastError"].map(|key| t[key].to_string());
        let mut all: Vec<_> = targets.iter().map(one).collect();
        all.sort();
        if all != last {
            println!("{all:?}");
            last = all;
        }
        let are_up = |(job, count): &(&str, usize)| {
            let of = || targets.iter().filter(|t| t["labels"]["job"] == *job);
            of().count() == *count && of().all(|t| t["health"] == "up")
        };
        expected.iter().all(are_up).then_some(())
    });
    let rules = http::get(&project.prometheus, "/api/v1/rules?type=alert").expect_ok();
    let rules: Value = serde_json::from_str(&rules).unwrap();
    let groups = rules["data"]["groups"].as_array().unwrap();
    assert!(!groups.is_empty(), "the alerts are not there: {rules:#}");
}
