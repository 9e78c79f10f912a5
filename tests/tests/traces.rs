//! The traces of one machine, as a collector receives them: whole, attribute by attribute, part of
//! whatever began them, and of no help to anyone who is not to know a secret.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use emberline_tests::{
    Dev, HttpProxy, S3Server,
    otlp::{Span, Trace},
    place::{millis, task},
    seconds, wait_for,
    watched::{ARRIVES, Watched},
};
use serde_json::{Value, json};

const OUTSIDE: &str = "b7ad6b7169203331";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{OUTSIDE}-{flags}")
}

/// A span has these attributes and no others; null stands for any value.
#[track_caller]
fn has_exactly(span: &Span, expected: &Value) {
    let expected: BTreeMap<String, Value> = serde_json::from_value(expected.clone()).unwrap();
    let names = |all: &BTreeMap<String, Value>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&span.attributes), names(&expected), "{span:#?}");
    for (name, value) in expected.iter().filter(|(_, value)| !value.is_null()) {
        assert_eq!(&span.attributes[name], value, "`{name}` of {span:#?}");
    }
}

/// What is right below a span, by name.
fn below(trace: &Trace, span: &Span) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for child in trace.children(span) {
        *out.entry(child.name.clone()).or_default() += 1;
    }
    out
}

#[test]
fn one_trace_tells_all_from_the_commit_to_the_live_model() {
    let watched = Watched::new();
    let revision = watched.starter();
    let url = ("EMBERLINE_RUN_URL", "https://ml.example.org/r/{run}");
    let run = watched.run("tree/pipeline.yaml", &[url]);
    assert_eq!(run["state"], "succeeded", "{run:#}");
    let id = run["run"].as_str().unwrap();
    let trace = watched.only_trace("");

    let root = trace.one("RUN pumps");
    assert_eq!((root.kind, root.error.as_deref()), ("SERVER", None));
    assert_eq!(run["trace_id"], root.trace.as_str());
    has_exactly(
        root,
        &json!({
            "cicd.pipeline.name": "pumps",
            "cicd.pipeline.run.id": id,
            "cicd.pipeline.action.name": "RUN",
            "cicd.pipeline.result": "success",
            "cicd.pipeline.run.url.full": format!("https://ml.example.org/r/{id}"),
            "emberline.trigger": "manual",
            "vcs.repository.url.full": "https://git.example.org/pumps.git",
            "vcs.ref.head.name": "main",
            "vcs.ref.head.revision": revision,
        }),
    );
    assert_eq!(
        root.millis(),
        (millis(&run["created_at"]), millis(&run["finished_at"]))
    );

    for (stage, kind, of_type) in [
        ("raw", "collect", None),
        ("parts", "convert", None),
        ("check", "validate", Some("test")),
        ("train", "train", Some("build")),
        ("evaluate", "evaluate", Some("test")),
        ("deploy", "deploy", Some("deploy")),
        ("report", "report", None),
    ] {
        let span = trace.one(stage);
        let record = task(&run, stage);
        assert_eq!(
            (span.parent.as_str(), span.kind),
            (root.id.as_str(), "INTERNAL")
        );
        let mut expected = json!({
            "cicd.pipeline.task.name": stage,
            "cicd.pipeline.task.run.id": format!("{id}/{stage}/1"),
            "cicd.pipeline.task.run.url.full": format!("https://ml.example.org/r/{id}/tasks/{stage}/1"),
            "cicd.pipeline.task.run.result": "success",
            "cicd.worker.id": record["worker"],
            "cicd.worker.name": record["worker"],
            "emberline.attempt": 1,
            "emberline.stage.kind": kind,
        });
        if let Some(of_type) = of_type {
            expected["cicd.pipeline.task.type"] = json!(of_type);
        }
        has_exactly(span, &expected);
        let times = (
            millis(&record["started_at"]),
            millis(&record["finished_at"]),
        );
        assert_eq!(span.millis(), times, "{stage}");
        // It has waited, and from that on without a gap.
        let waits: Vec<_> = trace.named(&format!("queue {stage}")).collect();
        let reasons: Vec<_> = waits
            .iter()
            .map(|w| w.attribute("emberline.wait.reason"))
            .collect();
        // Of no length, for it could start at once, a wait is left out.
        let expected = match stage {
            "raw" => [vec![], vec!["capacity"]],
            _ => [vec!["inputs"], vec!["inputs", "capacity"]],
        };
        assert!(
            expected.iter().any(|e| reasons == *e),
            "{stage}: {reasons:?}"
        );
        let mut at = root.start;
        for wait in waits {
            has_exactly(
                wait,
                &json!({
                    "cicd.pipeline.run.state": "pending",
                    "emberline.wait.reason": null,
                    "cicd.pipeline.task.name": stage,
                    "emberline.attempt": 1,
                }),
            );
            assert_eq!((wait.start, wait.parent.as_str()), (at, root.id.as_str()));
            at = wait.end;
        }
        assert_eq!(span.start, at, "{stage}");
    }

    // What an attempt gets, does and puts is part of it.
    let train = trace.one("train");
    let expected = [
        ("epoch", 30),
        ("get train", 1),
        ("get validation", 1),
        ("put model", 1),
    ];
    let expected = expected.map(|(name, times)| (name.to_owned(), times));
    assert_eq!(below(&trace, train), BTreeMap::from(expected));
    let put = trace
        .children(train)
        .find(|span| span.name == "put model")
        .unwrap();
    assert_eq!(put.kind, "CLIENT");
    let model = &task(&run, "train")["outputs"][0];
    has_exactly(
        put,
        &json!({
            "emberline.artifact.digest": model["manifest"],
            "emberline.artifact.bytes": model["bytes"],
            "emberline.cache.hit": false,
            "server.address": null,
        }),
    );
    let mut epochs: Vec<_> = trace.named("epoch").collect();
    epochs.sort_by_key(|span| span.start);
    for (number, epoch) in (1..).zip(epochs) {
        has_exactly(epoch, &json!({ "emberline.epoch": number }));
        let [measured] = epoch.events.as_slice() else {
            panic!("{epoch:#?}");
        };
        let loss = measured.attributes["emberline.train_loss"].as_f64();
        assert!(loss.is_some_and(|loss| loss > 0.0), "{measured:#?}");
    }

    let deployment = trace.one("deploy pumps");
    assert_eq!(deployment.parent, root.id);
    has_exactly(
        deployment,
        &json!({
            "deployment.id": "d1",
            "deployment.name": "pumps",
            "deployment.environment.name": "production",
            "deployment.status": "succeeded",
            "emberline.model.version": 1,
        }),
    );

    // Who leads says so in a trace of its own.
    let leads = watched
        .receiver
        .wait_for("the term's end", ARRIVES, |received| {
            let found = received.spans.iter().find(|span| span.name == "lead");
            found.cloned().ok_or_else(String::new)
        });
    assert_ne!(leads.trace, root.trace);
    has_exactly(
        &leads,
        &json!({ "cicd.system.component": "coordinator", "emberline.epoch": 1 }),
    );
    watched.receiver.read(|received| {
        assert!(!received.mentions("planted-git-token"));
        let resource = &received.spans[0].resource;
        assert_eq!(resource["service.name"], "emberline");
        assert!(resource.contains_key("service.instance.id"));
    });
}

#[test]
fn a_run_is_part_of_the_trace_that_it_was_started_in_and_hands_it_on_to_commands() {
    let watched = Watched::new();
    let file = watched.tells();
    let run = watched.run(&file, &[("TRACEPARENT", &traceparent("01"))]);
    let trace = watched.only_trace(OUTSIDE);
    assert_eq!(
        (
            run["trace_id"].as_str(),
            trace.one("RUN tells").trace.as_str()
        ),
        (Some(TRACE), TRACE)
    );
    let attempt = trace.one("s");
    assert_eq!(watched.seen(&run), format!("00-{TRACE}-{}-01", attempt.id));
}

#[test]
fn a_trace_that_its_beginner_does_not_record_is_not_exported_but_handed_on() {
    let watched = Watched::new();
    let file = watched.tells();
    let run = watched.run(&file, &[("TRACEPARENT", &traceparent("00"))]);
    assert_eq!(run["state"], "succeeded");
    let seen = watched.seen(&run);
    assert!(
        seen.starts_with(&format!("00-{TRACE}-")) && seen.ends_with("-00"),
        "{seen}"
    );
    // Something else arrives, so that it is not merely late.
    let other = watched.run(&file, &[]);
    let trace = watched.only_trace("");
    assert_eq!(other["trace_id"], trace.spans[0].trace.as_str());
}

#[test]
fn without_a_collector_the_given_trace_goes_on_in_the_commands() {
    let watched = Watched::new();
    let file = watched.tells();
    let call = watched.place.emberline(&["run", &file, "-o", "json", "-q"]);
    let given = traceparent("01");
    let run = call.env("TRACEPARENT", &given).run().expect_code(0).json();
    assert_eq!(watched.seen(&run), given);
}

#[test]
fn what_fails_says_so_and_the_next_attempt_is_linked_to_the_one_before() {
    let watched = Watched::new();
    let again = json!({ "retries": { "errors": 1, "backoff": "10ms" } });
    let file = watched.scripts(
        "fails",
        &[
            ("once", "exit 7", again),
            ("after", "true", json!({ "needs": ["once"] })),
        ],
    );
    let run = watched.run(&file, &[]);
    assert_eq!(run["state"], "failed");
    let trace = watched.only_trace("");
    let root = trace.one("RUN fails");
    assert!(root.is("cicd.pipeline.result", "failure") && root.is("error.type", "user_error"));
    assert!(root.error.is_some());
    let attempts: Vec<_> = trace.named("once").collect();
    let [first, second] = attempts.as_slice() else {
        panic!("{}", trace.tell());
    };
    for (attempt, number) in [(first, 1), (second, 2)] {
        assert_eq!(attempt.attribute("emberline.attempt"), &json!(number));
        assert!(attempt.is("cicd.pipeline.task.run.result", "failure"));
        assert!(attempt.is("error.type", "user_error") && attempt.error.is_some());
    }
    assert_eq!(first.links, []);
    assert_eq!(second.links, [(first.trace.clone(), first.id.clone())]);
    let waits = trace.named("queue once");
    let reasons: Vec<_> = waits
        .map(|w| w.attribute("emberline.wait.reason"))
        .collect();
    assert!(reasons.contains(&&json!("backoff")), "{reasons:?}");
    assert!(
        trace
            .one("after")
            .is("cicd.pipeline.task.run.result", "skip")
    );
}

#[test]
fn what_is_reused_is_a_moment_in_the_trace() {
    let watched = Watched::new();
    let pipeline = json!({
        "pipeline": "same",
        "stages": { "s": { "kind": "exec", "with": { "command": ["true"] } } },
    });
    watched.place.write("same.yaml", pipeline.to_string());
    watched.run("same.yaml", &[]);
    let run = watched.run("same.yaml", &[]);
    let trace = watched.trace_of(&run);
    let reused = trace.one("s");
    assert!(reused.is("cicd.pipeline.task.run.result", "skip"));
    assert_eq!(reused.attribute("emberline.cache.hit"), &json!(true));
    assert_eq!(reused.start, reused.end);
}

#[test]
fn a_retried_run_is_a_second_span_in_the_same_trace() {
    let watched = Watched::new();
    let script = "test -e '$GATE/open'";
    let gate = watched.place.path("gate");
    let script = script.replace("$GATE", &gate.display().to_string());
    let file = watched.scripts("again", &[("s", &script, json!({}))]);
    let run = watched.run(&file, &[]);
    assert_eq!(run["state"], "failed");
    let _ = watched.only_trace("");
    watched.place.write("gate/open", "");
    let id = run["run"].as_str().unwrap();
    let retry = watched.place.emberline(&["runs", "retry", id, "-q"]);
    retry.envs(&watched.environment(&[])).run().expect_code(0);
    watched
        .receiver
        .wait_for("both turns", ARRIVES, |received| {
            let trace = received.trace(run["trace_id"].as_str().unwrap())?;
            let turns: Vec<_> = trace.named("RUN again").collect();
            let [first, second] = turns.as_slice() else {
                return Err(format!("{} turns in {}", turns.len(), trace.tell()));
            };
            let well = first.is("cicd.pipeline.result", "failure")
                && second.is("cicd.pipeline.result", "success")
                && first.end <= second.start
                && trace
                    .spans
                    .iter()
                    .all(|span| span.parent.is_empty() || trace.get(&span.parent).is_some());
            well.then_some(()).ok_or_else(|| trace.tell())
        });
}

#[test]
fn a_call_that_is_traced_in_its_metadata_goes_on_in_the_run() {
    use emberline_proto::v1::SubmitRunRequest;
    let watched = Watched::new();
    let file = watched.tells();
    let dev = Dev::start_in(&watched.place, &[], &watched.environment(&[]));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let run = runtime.block_on(async {
        let mut request = tonic::Request::new(SubmitRunRequest {
            pipeline_yaml: std::fs::read_to_string(watched.place.path(&file)).unwrap(),
            file_name: file.clone(),
            base_dir: watched.place.dir().display().to_string(),
            request_id: "1".to_owned(),
            ..Default::default()
        });
        let context = traceparent("01").parse().unwrap();
        request.metadata_mut().insert("traceparent", context);
        let answer = dev.runs().await.submit_run(request).await.unwrap();
        answer.into_inner().run
    });
    let trace = watched.only_trace(OUTSIDE);
    assert!(trace.one("RUN tells").is("cicd.pipeline.run.id", &run));
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn the_trace_is_shown_with_a_link_by_the_commands_and_on_the_page() {
    let watched = Watched::new();
    watched.starter();
    let url = "https://traces.example.org/t/{trace_id}?x=<b>";
    let run = watched.run("tree/pipeline.yaml", &[("EMBERLINE_TRACE_URL", url)]);
    let trace = run["trace_id"].as_str().unwrap();
    let link = url.replace("{trace_id}", trace);
    assert_eq!(run["trace_url"], link.as_str());
    let show = watched
        .place
        .emberline(&["runs", "show", run["run"].as_str().unwrap()]);
    let shown = show
        .env("EMBERLINE_TRACE_URL", url)
        .run()
        .expect_code(0)
        .stdout;
    assert!(shown.contains(&link), "{shown}");
    let page =
        std::fs::read_to_string(watched.place.path(run["report"].as_str().unwrap())).unwrap();
    let escaped = link.replace('<', "&lt;").replace('>', "&gt;");
    assert!(page.contains(&format!("href=\"{escaped}\"")));
    assert!(page.contains(trace) && !page.contains("?x=<b>"));
    for text in [
        "Where the lead time went",
        "Delivery into production",
        "commit → run accepted",
        "d1: pumps version 1",
    ] {
        assert!(page.contains(text), "{text}");
    }
}

#[test]
fn calls_to_the_object_store_carry_the_span_that_they_are_for() {
    let watched = Watched::new();
    let server = S3Server::start();
    let proxy = HttpProxy::start(&server.address());
    let pipeline = json!({
        "pipeline": "fetch",
        "stages": { "raw": { "kind": "collect", "with": { "sources": [{ "url": format!("s3://{}/given/a.txt", emberline_tests::s3::BUCKET) }] } } },
    });
    watched.place.write("fetch.yaml", pipeline.to_string());
    let given = server.bucket().join("given/a.txt");
    std::fs::create_dir_all(given.parent().unwrap()).unwrap();
    std::fs::write(given, "hello").unwrap();
    let mut variables = server.environment_by(proxy.address());
    variables.extend(watched.environment(&[]));
    let call = watched
        .place
        .emberline(&["run", "fetch.yaml", "-o", "json", "-q"]);
    let run = call.envs(&variables).run().expect_code(0).json();
    let trace = watched.only_trace("");
    let attempt = trace.one("raw");
    let requests = proxy.take_requests();
    let traced: Vec<_> = requests
        .iter()
        .filter_map(|r| r.header("traceparent"))
        .collect();
    assert!(!traced.is_empty(), "{requests:#?}");
    for context in traced {
        let parts: Vec<_> = context.split('-').collect();
        assert_eq!(run["trace_id"], parts[1]);
        let of = trace
            .get(parts[2])
            .unwrap_or_else(|| panic!("{context} in {}", trace.tell()));
        assert!(of.id == attempt.id || of.parent == attempt.id);
    }
}

#[test]
fn a_killed_process_leaves_a_trace_that_the_next_one_makes_whole() {
    let watched = Watched::new();
    let gate = watched.place.path("gate").display().to_string();
    let wait = format!("while ! test -e '{gate}'; do sleep 0.02; done");
    let file = watched.scripts("slow", &[("s", &wait, json!({}))]);
    let call = watched.place.emberline(&["run", &file, "-q"]);
    let running = call.envs(&watched.environment(&[])).start();
    let list = || {
        watched
            .place
            .emberline(&["runs", "list", "-o", "json"])
            .run()
            .expect_code(0)
            .json()
    };
    let id = wait_for("the task runs", seconds(20), || {
        let runs = list();
        let run = runs.get(0)?;
        (run["state"] == "running").then(|| run["run"].as_str().unwrap().to_owned())
    });
    running.kill();
    watched.place.write("gate", "");
    let resumed = watched
        .place
        .emberline(&["run", &file, "--resume", &id, "-q", "-o", "json"]);
    let run = resumed
        .envs(&watched.environment(&[]))
        .within(seconds(60))
        .run()
        .expect_code(0)
        .json();
    let trace = watched.only_trace("");
    assert!(trace.one("RUN slow").is("cicd.pipeline.result", "success"));
    let attempts: Vec<_> = trace.named("s").collect();
    let [lost, second] = attempts.as_slice() else {
        panic!("{}", trace.tell());
    };
    assert!(
        lost.is("error.type", "worker_lost") && lost.is("cicd.pipeline.task.run.result", "error")
    );
    assert_eq!(second.links, [(lost.trace.clone(), lost.id.clone())]);
    assert_eq!(run["trace_id"], lost.trace.as_str());
    // The first leader did not end its term itself.
    watched
        .receiver
        .wait_for("both terms", ARRIVES, |received| {
            let mut terms = received.spans.iter().filter(|s| s.name == "lead");
            let lost = terms.find(|s| s.is("error.type", "leader_lost"));
            lost.map(|_| ()).ok_or_else(|| "no lost term".to_owned())
        });
}
