//! Metrics and logs as a collector and Prometheus get them, and that neither of these is ever in the
//! way of a run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, time::Instant};

use emberline_tests::{
    Call, Dev, OtlpReceiver, Place, http,
    otlp::{Answer, MetricKind},
    place::repository,
    processes, prometheus, seconds,
    watched::{ARRIVES, Watched},
};
use serde_json::{Value, json};

use MetricKind::{Counter, Gauge, Histogram, UpDownCounter};

/// What is told of a run that trains and deploys: docs/guide/telemetry.md lists the same.
const METRICS: [(&str, &str, MetricKind); 28] = [
    ("cicd.pipeline.run.duration", "s", Histogram),
    ("cicd.pipeline.run.active", "{run}", UpDownCounter),
    ("cicd.pipeline.run.errors", "{error}", Counter),
    ("cicd.system.errors", "{error}", Counter),
    ("cicd.worker.count", "{count}", UpDownCounter),
    ("emberline.dispatch.latency", "s", Histogram),
    ("emberline.commit.latency", "s", Histogram),
    ("emberline.queue.depth", "{task}", Gauge),
    ("emberline.queue.oldest", "s", Gauge),
    ("emberline.attempt.failures", "{attempt}", Counter),
    ("emberline.coordinator.leading", "{coordinator}", Gauge),
    ("emberline.coordinator.term", "{term}", Gauge),
    ("emberline.store.unavailable", "s", Gauge),
    ("emberline.worker.connected", "{worker}", Gauge),
    ("emberline.worker.sessions", "{session}", Counter),
    ("emberline.deployments", "{deployment}", Gauge),
    ("emberline.deployment.last.timestamp", "s", Gauge),
    ("process.memory.usage", "By", UpDownCounter),
    ("emberline.cache.hits", "{hit}", Counter),
    ("emberline.artifact.io", "By", Counter),
    ("emberline.training.throughput", "{sample}/s", Gauge),
    ("emberline.telemetry.dropped", "{item}", Counter),
    (
        "emberline.dora.deployment_frequency",
        "{deployment}/d",
        Gauge,
    ),
    ("emberline.dora.change_lead_time", "s", Gauge),
    ("emberline.dora.data_lead_time", "s", Gauge),
    ("emberline.dora.change_fail_rate", "1", Gauge),
    ("emberline.dora.recovery_time", "s", Gauge),
    ("emberline.dora.rework_rate", "1", Gauge),
];

/// What is told of models in service, by whoever serves some.
const SERVING: [&str; 9] = [
    "emberline.serving.requests",
    "emberline.serving.request.duration",
    "emberline.serving.batch.size",
    "emberline.serving.queue.rows",
    "emberline.serving.drift",
    "emberline.serving.prediction.drift",
    "emberline.serving.labels",
    "emberline.serving.quality",
    "emberline.serving.log.dropped",
];

/// A worker of its own process, which tasks ask for by the label `name`.
fn worker(watched: &Watched, dev: &Dev, name: &str, more: &[&str]) -> Call {
    let state = watched.place.path(name).display().to_string();
    let label = format!("name={name}");
    let arguments = [
        "worker",
        "--server",
        &dev.address,
        "--name",
        name,
        "--label",
        &label,
        "--state-dir",
        &state,
    ];
    let call = watched.place.emberline(&[&arguments, more].concat());
    call.envs(&watched.environment(&[]))
}

/// A machine that stays up, on which all has happened that there is a metric for.
fn all_has_happened(watched: &Watched) -> Dev {
    let dev = Dev::start_in(&watched.place, &[], &watched.environment(&[]));
    watched.starter();
    let commands: [&[&str]; 3] = [
        &["run", "tree/pipeline.yaml", "-q"],
        &["run", "tree/pipeline.yaml", "-q", "-p", "seed=2"],
        // Back to the first, so that there is a failure with its end.
        &["rollback", "production", "--why", "bad", "-q"],
    ];
    for command in commands {
        watched.place.emberline(command).run().expect_code(0);
    }
    let fails = watched.scripts("fails", &[("s", "exit 1", json!({}))]);
    watched
        .place
        .emberline(&["run", &fails, "-q"])
        .run()
        .expect_code(1);
    // Its worker is another process, which is killed: an error of the system's.
    let script = "kill -9 $PPID";
    let lost = watched.scripts(
        "lost",
        &[(
            "s",
            script,
            json!({ "retries": { "lost_workers": 0 }, "labels": { "name": "victim" } }),
        )],
    );
    let worker = worker(watched, &dev, "victim", &[]).start();
    watched
        .place
        .emberline(&["run", &lost, "-q"])
        .run()
        .expect_code(1);
    let _ = worker.finish();
    dev
}

#[test]
fn every_metric_has_its_name_unit_and_kind_and_counts_right() {
    let watched = Watched::new();
    let dev = all_has_happened(&watched);
    watched
        .receiver
        .wait_for("all metrics", ARRIVES, |received| {
            for (name, unit, kind) in METRICS {
                for metric in received.metric(name)? {
                    assert_eq!((metric.unit.as_str(), metric.kind), (unit, kind), "{name}");
                    assert!(!metric.description.is_empty(), "{name}");
                    assert!(metric.is_cumulative, "{name}");
                }
            }
            let count = |name: &str, with: &[(&str, &str)]| received.count(name, with);
            let total = |name: &str, with: &[(&str, &str)]| received.total(name, with);
            let pumps = ("cicd.pipeline.name", "pumps");
            let executing = ("cicd.pipeline.run.state", "executing");
            let success = ("cicd.pipeline.result", "success");
            let is = |what: &str, found: f64, expected: f64| match (found - expected).abs() < 1e-9 {
                true => Ok(()),
                false => Err(format!("{what} is {found} and not {expected}")),
            };
            #[allow(clippy::cast_precision_loss, reason = "small")]
            let runs = count("cicd.pipeline.run.duration", &[pumps, executing, success])? as f64;
            is("runs", runs, 2.0)?;
            is("active", total("cicd.pipeline.run.active", &[])?, 0.0)?;
            let fails = [
                ("cicd.pipeline.name", "fails"),
                ("error.type", "user_error"),
            ];
            is("errors", total("cicd.pipeline.run.errors", &fails)?, 1.0)?;
            let lost = [
                ("cicd.system.component", "worker"),
                ("error.type", "worker_lost"),
            ];
            is("lost", total("cicd.system.errors", &lost)?, 1.0)?;
            let available = [("cicd.worker.state", "available")];
            is("workers", total("cicd.worker.count", &available)?, 2.0)?;
            is("queue", total("emberline.queue.depth", &[])?, 0.0)?;
            let lost = [("error.type", "worker_lost")];
            is("lost", total("emberline.attempt.failures", &lost)?, 1.0)?;
            is("leading", total("emberline.coordinator.leading", &[])?, 1.0)?;
            is("trouble", total("emberline.store.unavailable", &[])?, 0.0)?;
            let rollbacks = [("emberline.deployment.kind", "rollback")];
            is(
                "rollbacks",
                total("emberline.deployments", &rollbacks)?,
                1.0,
            )?;
            // `check` and the tasks before it do not depend on the training's seed; `parts` does.
            if total("emberline.artifact.io", &[("emberline.direction", "put")])? <= 0.0 {
                return Err("nothing was put".to_owned());
            }
            let place = [pumps, ("deployment.environment.name", "production")];
            is(
                "fail rate",
                total("emberline.dora.change_fail_rate", &place)?,
                0.5,
            )?;
            is(
                "rework",
                total("emberline.dora.rework_rate", &place)?,
                1.0 / 3.0,
            )?;
            is(
                "frequency",
                total("emberline.dora.deployment_frequency", &place)?,
                2.0 / 30.0,
            )?;
            let median = [place[0], place[1], ("emberline.dora.quantile", "0.5")];
            let lead = total("emberline.dora.change_lead_time", &median)?;
            // The commit is of November 2023.
            if !(3.0 * 365.0 * 86_400.0..1e10).contains(&lead) {
                return Err(format!("a lead time of {lead} s"));
            }
            Ok(())
        });
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn prometheus_reads_the_same_from_the_coordinator_and_from_a_worker() {
    let watched = Watched::new();
    let dev = all_has_happened(&watched);
    let deadline = Instant::now() + ARRIVES;
    let families = loop {
        let families = prometheus::check(&http::get(&dev.address, "/metrics").expect_ok());
        // The metrics of delivery are computed a moment after a deployment.
        if families.contains_key("emberline_dora_recovery_time_seconds") {
            break families;
        }
        assert!(Instant::now() < deadline, "{:#?}", families.keys());
    };
    for (name, unit, kind) in METRICS {
        let family = prometheus::family(name, unit, kind);
        let found = families.get(&family);
        let found = found.unwrap_or_else(|| panic!("no `{family}` in {:#?}", families.keys()));
        let kind = match kind {
            Counter => "counter",
            Gauge | UpDownCounter => "gauge",
            Histogram => "histogram",
        };
        assert_eq!(found.kind, kind, "{family}");
    }
    let fails = [
        ("cicd_pipeline_name", "fails"),
        ("error_type", "user_error"),
    ];
    let errors = families["cicd_pipeline_run_errors_total"].total(&fails);
    assert!((errors - 1.0).abs() < 1e-9, "{errors}");
    let wrong = http::post(&dev.address, "/metrics", "{}");
    assert_eq!(
        (wrong.status, wrong.headers["allow"].as_str()),
        (405, "GET, HEAD")
    );

    // A worker has a page of its own, where it is asked to.
    let listen = format!("127.0.0.1:{}", processes::free_port());
    let worker = worker(&watched, &dev, "scraped", &["--metrics-listen", &listen]).start();
    let file = watched.scripts(
        "here",
        &[(
            "s",
            "echo x > $EMBERLINE_OUTPUT_OUT/x",
            json!({ "labels": { "name": "scraped" }, "outputs": { "out": "files" } }),
        )],
    );
    watched
        .place
        .emberline(&["run", &file, "-q"])
        .run()
        .expect_code(0);
    let families = prometheus::check(&http::get(&listen, "/metrics").expect_ok());
    let put =
        families["emberline_artifact_io_bytes_total"].total(&[("emberline_direction", "put")]);
    assert!((put - 2.0).abs() < 1e-9, "{put}");
    worker.signal(rustix::process::Signal::TERM);
    worker.finish().expect_code(0);
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn log_records_say_of_which_attempt_they_are() {
    let watched = Watched::new();
    let file = watched.scripts("talks", &[("s", "echo from-the-command", json!({}))]);
    let run = watched.run(&file, &[("RUST_LOG", "info,emberline_worker=trace")]);
    let trace = watched.only_trace("");
    let attempt = trace.one("s").id.clone();
    let id = run["trace_id"].as_str().unwrap();
    watched
        .receiver
        .wait_for("a record of the attempt", ARRIVES, |received| {
            let mut of_attempt = received.logs_of(id).filter(|record| record.span == attempt);
            let said =
                of_attempt.any(|record| record.body.to_string().contains("from-the-command"));
            said.then_some(())
                .ok_or_else(|| format!("{:#?}", received.logs))
        });
    watched.receiver.read(|received| {
        let severities: Vec<_> = received.logs.iter().map(|r| r.severity.as_str()).collect();
        assert!(severities.contains(&"INFO"), "{severities:?}");
    });
}

#[test]
fn log_lines_are_json_where_asked_for_and_say_of_which_attempt_they_are() {
    let watched = Watched::new();
    let file = watched.scripts("talks", &[("s", "true", json!({}))]);
    let call = watched
        .place
        .emberline(&["run", &file, "-q", "-vv", "--log-format", "json"]);
    let output = call.envs(&watched.environment(&[])).run().expect_code(0);
    let trace = watched.only_trace("");
    let lines: Vec<Value> = output
        .stderr
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    for name in ["timestamp", "level", "target", "message"] {
        assert!(
            lines.iter().all(|line| !line[name].is_null()),
            "{name}: {lines:#?}"
        );
    }
    let id = &trace.spans[0].trace;
    let attempt = &trace.one("s").id;
    let of_attempt = lines.iter().any(|line| {
        let text = line.to_string();
        text.contains(id.as_str()) && text.contains(attempt.as_str())
    });
    assert!(of_attempt, "{lines:#?}");
}

/// A run of many small tasks.
fn many(watched: &Watched) -> String {
    let stages: BTreeMap<_, _> = (0..200)
        .map(|n| (format!("s{n}"), json!({ "kind": "noop", "cache": false })))
        .collect();
    let pipeline = json!({ "pipeline": "many", "stages": stages });
    watched.place.write("many.yaml", pipeline.to_string());
    "many.yaml".to_owned()
}

#[test]
fn a_collector_that_is_gone_hangs_or_refuses_changes_no_run() {
    let mut watched = Watched::new();
    let file = many(&watched);
    for what in ["gone", "hangs", "refuses"] {
        match what {
            "gone" => watched.receiver.stop(),
            "hangs" => {
                watched.receiver.start_again();
                watched.receiver.answer(Answer::Hangs);
            }
            _ => watched.receiver.answer(Answer::Refuses),
        }
        let begun = Instant::now();
        let run = watched.run(&file, &[]);
        assert_eq!(run["state"], "succeeded", "{what}: {run:#}");
        // Who leaves gives it two seconds.
        assert!(
            begun.elapsed() < seconds(20),
            "{what}: {:?}",
            begun.elapsed()
        );
    }
    watched.receiver.answer(Answer::Keeps);
    assert_eq!(watched.run(&file, &[])["state"], "succeeded");
    let whole = watched.only_trace("");
    whole
        .is_whole_with("", &[("RUN many", 1), ("s7", 1)])
        .unwrap();
}

#[test]
fn what_there_is_no_room_for_is_dropped_counted_and_warned_of_once() {
    let watched = Watched::new();
    watched.receiver.answer(Answer::Hangs);
    let more = [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "8"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "100"),
    ];
    let dev = Dev::start_in(&watched.place, &[], &watched.environment(&more));
    let file = many(&watched);
    for _ in 0..2 {
        watched
            .place
            .emberline(&["run", &file, "-q"])
            .run()
            .expect_code(0);
    }
    let dropped = || {
        let families = prometheus::check(&http::get(&dev.address, "/metrics").expect_ok());
        families["emberline_telemetry_dropped_total"].total(&[("emberline_signal", "traces")])
    };
    emberline_tests::wait_for("drops are counted", ARRIVES, || {
        (dropped() >= 100.0).then_some(())
    });
    let warnings = emberline_tests::wait_for("a warning", ARRIVES, || {
        let stderr = dev.process().stderr();
        let warnings = stderr
            .lines()
            .filter(|l| l.contains("WARN") && l.contains("spans"))
            .count();
        (warnings > 0).then_some(warnings)
    });
    assert!(warnings <= 3, "{}", dev.process().stderr());
    dev.kill();
}

#[test]
fn a_collector_that_comes_back_gets_what_happens_from_then_on() {
    let mut watched = Watched::new();
    watched.receiver.stop();
    let dev = Dev::start_in(&watched.place, &[], &watched.environment(&[]));
    let file = many(&watched);
    watched
        .place
        .emberline(&["run", &file, "-q"])
        .run()
        .expect_code(0);
    watched.receiver.start_again();
    let tells = watched.tells();
    watched
        .place
        .emberline(&["run", &tells, "-q"])
        .run()
        .expect_code(0);
    watched
        .receiver
        .wait_for("the second run", ARRIVES, |received| {
            let found = received.spans.iter().find(|span| span.name == "RUN tells");
            let found = found.ok_or_else(|| "no run".to_owned())?;
            received.trace(&found.trace)?.is_whole("")
        });
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn variables_that_cannot_be_meant_are_one_line_and_nothing_is_started() {
    let place = Place::new();
    place.write("p.yaml", "pipeline: p\nstages:\n  s: { kind: noop }\n");
    for (name, value) in [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_TRACES_SAMPLER", "now_and_then"),
    ] {
        let output = place
            .emberline(&["run", "p.yaml"])
            .env(name, value)
            .run()
            .expect_code(2);
        let errors = output.errors();
        assert_eq!(errors.len(), 1, "{output}");
        assert!(
            errors[0].starts_with(&format!("{name} is `{value}`: ")),
            "{output}"
        );
    }
    assert!(!place.state().exists());
}

#[test]
fn a_collector_at_an_https_address_is_trusted_by_its_certificate_alone() {
    let place = Place::new();
    let (receiver, authority) = OtlpReceiver::start_with_tls(&place.dir());
    let watched = Watched { place, receiver };
    let file = watched.tells();
    // Nobody vouches for it: nothing is sent, and the run does not mind.
    let run = watched.run(&file, &[]);
    assert_eq!(run["state"], "succeeded");
    assert_eq!(watched.receiver.calls(), 0);
    let ca = authority.display().to_string();
    let run = watched.run(&file, &[("OTEL_EXPORTER_OTLP_CERTIFICATE", &ca)]);
    assert!(
        watched
            .trace_of(&run)
            .one("RUN tells")
            .is("cicd.pipeline.result", "success")
    );
}

#[test]
fn a_machine_that_trusts_nobody_still_exports_to_an_http_address() {
    let watched = Watched::new();
    let file = watched.tells();
    let nobody = [("SSL_CERT_FILE", "/dev/null"), ("SSL_CERT_DIR", "/nowhere")];
    let run = watched.run(&file, &nobody);
    assert_eq!(watched.trace_of(&run).named("s").count(), 1);
}

#[test]
fn the_guide_names_every_metric() {
    let guide = repository().join("docs/guide/telemetry.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    let now_and_then = "emberline.deployment.phase.age";
    let names = METRICS.iter().map(|(name, ..)| *name).chain(SERVING);
    for name in names.chain([now_and_then]) {
        assert!(guide.contains(&format!("`{name}`")), "{name}");
    }
}

#[test]
fn a_ratio_leaves_out_whole_traces() {
    let watched = Watched::new();
    let file = watched.tells();
    let none = [
        ("OTEL_TRACES_SAMPLER", "traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0"),
    ];
    let run = watched.run(&file, &none);
    assert!(watched.seen(&run).ends_with("-00"));
    let run = watched.run(&file, &[("OTEL_TRACES_SAMPLER", "always_on")]);
    assert!(watched.seen(&run).ends_with("-01"));
    let trace = watched.only_trace("");
    assert_eq!(run["trace_id"], trace.spans[0].trace.as_str());
}
