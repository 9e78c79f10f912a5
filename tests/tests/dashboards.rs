//! The dashboards and alerts of `deploy/`, asked for by a real Prometheus of a real cluster: whatever
//! they name must be there.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use emberline_tests::{
    Fleet, OtlpReceiver, PrometheusServer, Traffic,
    cluster::{Builder, Cluster},
    place::repository,
    processes,
    prometheus_server::promtool,
    promql::selectors,
    seconds, traffic, wait_for,
};
use serde_json::{Value, json};

const DASHBOARDS: [&str; 2] = ["emberline-cluster", "emberline-delivery"];

/// What may be without data on a cluster where all has happened, and why.
const MAY_BE_EMPTY: [(&str, &str); 1] = [(
    "emberline_certificate_expiry_timestamp_seconds",
    "only processes with certificates have it, and this cluster has none",
)];

/// Alerts that fire on this cluster, since what they tell of was done to it.
const FIRES: [&str; 1] = ["EmberlineRollback"];

/// A strategy that comes to wait for a person, once some requests were answered.
const CANARY: &str = ", strategy: { type: canary, steps: [ { weight: 50, for: 100ms } ], min_requests: 5, approval: true }";

fn file(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap()
}

fn dashboard(name: &str) -> Value {
    serde_json::from_str(&file(&format!("deploy/grafana/dashboards/{name}.json"))).unwrap()
}

/// The panels that show something: not the rows.
fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    panels.filter(|panel| panel["type"] != "row")
}

/// Each expression of a dashboard as Grafana would send it, with the title of its panel.
fn expressions(dashboard: &Value) -> Vec<(String, String)> {
    let of = |panel: &Value| {
        let title = panel["title"].as_str().unwrap().to_owned();
        let targets = panel["targets"].as_array().unwrap().clone();
        targets.into_iter().map(move |target| {
            let mut expression = target["expr"].as_str().unwrap().to_owned();
            for (variable, value) in [
                ("$__rate_interval", "10s"),
                ("$model", ".*"),
                ("$pipeline", ".*"),
                ("$environment", ".*"),
            ] {
                expression = expression.replace(variable, value);
            }
            assert!(!expression.contains('$'), "{title}: {expression}");
            (title.clone(), expression)
        })
    };
    panels(dashboard).flat_map(of).collect()
}

/// The `label_values(metric, label)` of a dashboard's variables.
fn variables(dashboard: &Value) -> Vec<(String, String)> {
    let all = dashboard["templating"]["list"].as_array().unwrap().iter();
    let queries = all.filter(|variable| variable["type"] == "query");
    let pairs = queries.map(|variable| {
        let query = variable["query"]["query"].as_str().unwrap();
        let inner = query.strip_prefix("label_values(").unwrap();
        let (metric, label) = inner.strip_suffix(')').unwrap().split_once(", ").unwrap();
        (metric.to_owned(), label.to_owned())
    });
    pairs.collect()
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

/// When an expression is asked for: now, or, where it looks at whole minutes, when the next one begins.
/// What was scraped last counts for 5 minutes.
fn asked_at(expression: &str) -> u64 {
    let minutes = [":1m]", ":30s]"]
        .iter()
        .any(|step| expression.contains(step));
    if minutes {
        now().next_multiple_of(60)
    } else {
        now()
    }
}

/// What is wrong with an expression, if it is: it cannot be evaluated, or gives nothing, or one of its
/// selectors gives nothing.
fn wrong(
    prometheus: &PrometheusServer,
    what: &str,
    expression: &str,
    needs_data: bool,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let found = prometheus.query(expression, asked_at(expression));
    let selectors = selectors(expression);
    let excused = |selector: &String| {
        MAY_BE_EMPTY
            .iter()
            .any(|(name, _)| selector.starts_with(name))
    };
    match found {
        Err(error) => wrong.push(format!("{what}: `{expression}`: {error}")),
        Ok(series) if series.is_empty() && needs_data && !selectors.iter().any(excused) => {
            wrong.push(format!("{what}: `{expression}` gives nothing"));
        }
        Ok(_) => {}
    }
    if selectors.is_empty() {
        wrong.push(format!("{what}: `{expression}` names no metric"));
    }
    for selector in selectors.iter().filter(|selector| !excused(selector)) {
        match prometheus.query(selector, now()) {
            Ok(series) if !series.is_empty() => {}
            Ok(_) => wrong.push(format!("{what}: nobody exports `{selector}`")),
            Err(error) => wrong.push(format!("{what}: `{selector}`: {error}")),
        }
    }
    wrong
}

/// A cluster with everything that dashboards tell of, and a Prometheus that looks at it.
struct Watched {
    prometheus: PrometheusServer,
    traffic: Traffic,
    cluster: Cluster,
    _fleet: Fleet,
    _receiver: OtlpReceiver,
}

fn watched() -> Watched {
    // Without a collector nothing can be dropped on the way to it.
    let receiver = OtlpReceiver::start();
    let mut cluster = Builder::new()
        .coordinators(2)
        .workers(0)
        .impatient()
        .environment(&receiver.environment())
        .worker_arguments(&["--serve", "127.0.0.1:0"])
        .prepare();
    let mut pages = Vec::new();
    for _ in 0..2 {
        let page = format!("127.0.0.1:{}", processes::free_port());
        let index = cluster.add_worker_with(&["--metrics-listen", &page]);
        cluster.workers[index].start();
        pages.push(page);
    }
    for coordinator in &mut cluster.coordinators {
        coordinator.start();
    }
    cluster.wait_until_it_serves();
    let jobs = [
        ("emberline-coordinator", cluster.servers().to_vec()),
        ("emberline-worker", pages),
        ("etcd", vec![cluster.etcd.address(0)]),
    ];
    let prometheus = PrometheusServer::start(&jobs, &file("deploy/prometheus/alerts.yml"));
    wait_for("every target answers", seconds(20), || {
        prometheus.targets_down().is_empty().then_some(())
    });
    let (fleet, traffic) = busy(&mut cluster);
    Watched {
        prometheus,
        traffic,
        cluster,
        _fleet: fleet,
        _receiver: receiver,
    }
}

/// Lets everything happen that there is a figure for; some of it goes on.
fn busy(cluster: &mut Cluster) -> (Fleet, Traffic) {
    let fleet = Fleet::new().on(cluster.servers());
    let first = fleet.deliver("good", 1, "");
    fleet.wait_for_outcome(&first, "live", seconds(20));
    let second = fleet.deliver("bad", 2, "");
    fleet.wait_for_outcome(&second, "live", seconds(20));
    let _ = fleet.json(&["rollback", "production"]);
    // The same again: all but the deployment is reused.
    let third = fleet.deliver("good", 1, "");
    fleet.wait_for_outcome(&third, "live", seconds(20));
    let traffic = Traffic::start(&fleet.addresses()[0], "pumps", 2);
    wait_for("enough requests", seconds(20), || {
        let so_far = traffic.so_far();
        let answered: u64 = so_far.by_version.values().sum();
        assert_eq!(so_far.failures, Vec::<String>::new());
        (answered >= traffic::PRESSURES).then_some(())
    });
    let labels: Vec<String> = (0..traffic::PRESSURES)
        .map(|n| json!({"id": format!("r-{n}"), "row": 0, "label": if n > 31 { "worn" } else { "healthy" }}))
        .map(|label| label.to_string())
        .collect();
    fleet.place.write("labels.jsonl", labels.join("\n"));
    let told = fleet.call(&["feedback", "pumps", "labels.jsonl"]);
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    // One that waits for a person, as long as nobody comes.
    fleet.deliver("good", 3, CANARY);
    // One that waits for somebody to load it: nobody serves that environment.
    for (seed, strategy) in [(1, ""), (4, CANARY)] {
        fleet.deliver("good", seed, &format!(", environment: staging{strategy}"));
    }
    // A run that fails, one that runs, and one that waits.
    let fails = "pipeline: fails\nstages: { s: { kind: exec, cache: false, with: { command: [sh, -c, 'exit 1'] } } }\n";
    let failed = cluster.submit(fails);
    wait_for("it has failed", seconds(20), || {
        let summary = cluster.run(&failed).summary.unwrap();
        summary.failure.is_some().then_some(())
    });
    cluster.gated_run();
    cluster.submit(
        "pipeline: waits\nstages: { s: { kind: noop, cache: false, labels: { nobody: has } } }\n",
    );
    (fleet, traffic)
}

/// Each rule, by name.
fn rules(prometheus: &PrometheusServer) -> BTreeMap<String, Value> {
    let rules = prometheus.rules().into_iter();
    rules
        .map(|rule| (rule["name"].as_str().unwrap().to_owned(), rule))
        .collect()
}

/// Everything that is wrong with the dashboards and alerts, as this Prometheus sees them.
fn all_wrong(prometheus: &PrometheusServer) -> Vec<String> {
    let mut all = Vec::new();
    for name in DASHBOARDS {
        let dashboard = dashboard(name);
        for (title, expression) in expressions(&dashboard) {
            all.extend(wrong(
                prometheus,
                &format!("{name}, {title}"),
                &expression,
                true,
            ));
        }
        for (metric, label) in variables(&dashboard) {
            // A label that is not there is empty, and a matcher for empty ones matches it.
            let selector = format!("{metric}{{{label}!=\"\"}}");
            all.extend(wrong(
                prometheus,
                &format!("{name}, a variable"),
                &selector,
                true,
            ));
        }
    }
    for (name, rule) in rules(prometheus) {
        let expression = rule["query"].as_str().unwrap();
        // An alert that does not fire gives nothing.
        all.extend(wrong(prometheus, &name, expression, false));
        if rule["health"] != "ok" {
            all.push(format!("{name}: {}", rule["lastError"]));
        }
    }
    all
}

#[test]
fn every_panel_and_alert_is_answered_on_a_cluster_where_all_has_happened() {
    let mut watched = watched();
    let prometheus = &watched.prometheus;
    let deadline = Instant::now() + seconds(60);
    let wrong_at_last = wait_for("all is answered", seconds(90), || {
        let wrong = all_wrong(prometheus);
        (wrong.is_empty() || Instant::now() > deadline).then_some(wrong)
    });
    assert!(wrong_at_last.is_empty(), "{wrong_at_last:#?}");

    // The check sees what it is there to see.
    for (expression, what) in [
        (
            "sum(emberline_nobody_exports_this)",
            "nobody exports `emberline_nobody_exports_this`",
        ),
        (
            "emberline_queue_depth{instance=\"x\"} or vector(0)",
            "nobody exports",
        ),
        ("sum(emberline_queue_depth", "parse error"),
        ("emberline_queue_depth > 1e9", "gives nothing"),
        ("vector(1)", "names no metric"),
    ] {
        let wrong = wrong(prometheus, "planted", expression, true);
        assert!(
            wrong.iter().any(|w| w.contains(what)),
            "{expression}: {wrong:?}"
        );
    }
    for (name, _) in MAY_BE_EMPTY {
        let found = prometheus.query(name, now()).unwrap();
        assert!(found.is_empty(), "`{name}` has data: it may not be empty");
    }

    // What fires is what has happened, and nothing else.
    let state = |name: &str| {
        rules(prometheus)[name]["state"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    wait_for("the rollback is told", seconds(20), || {
        (state(FIRES[0]) == "firing").then_some(())
    });
    let firing: Vec<String> = (rules(prometheus).into_iter())
        .filter(|(_, rule)| rule["state"] == "firing")
        .map(|(name, _)| name)
        .collect();
    assert_eq!(firing, FIRES);
    assert_eq!(watched.traffic.so_far().failures, Vec::<String>::new());

    // A cluster without a leader is seen, although nobody is left to say so.
    assert_eq!(state("EmberlineNoLeader"), "inactive");
    for coordinator in &mut watched.cluster.coordinators {
        coordinator.kill();
    }
    wait_for("that nobody leads is seen", seconds(20), || {
        (state("EmberlineNoLeader") == "pending").then_some(())
    });
    assert_eq!(state("EmberlineTargetDown"), "pending");
}

#[test]
fn prometheus_takes_the_rules_their_tests_and_the_configuration() {
    let prometheus = |name: &str| {
        let path = repository().join("deploy/prometheus").join(name);
        path.display().to_string()
    };
    promtool(&["check", "rules", &prometheus("alerts.yml")]);
    promtool(&["test", "rules", &prometheus("alerts.test.yml")]);
    promtool(&["check", "config", &prometheus("prometheus.yml")]);
}

#[test]
fn each_alert_says_what_to_do_and_is_tested() {
    let prometheus = PrometheusServer::start(&[], &file("deploy/prometheus/alerts.yml"));
    let (tests, guide) = (
        file("deploy/prometheus/alerts.test.yml"),
        file("docs/operations.md"),
    );
    let rules = rules(&prometheus);
    assert!(rules.len() > 20, "{rules:#?}");
    for (name, rule) in &rules {
        assert!(name.starts_with("Emberline"), "{name}");
        let severity = rule["labels"]["severity"].as_str();
        assert!(
            matches!(severity, Some("critical" | "warning" | "info")),
            "{name}: {severity:?}"
        );
        for annotation in ["summary", "description"] {
            let text = rule["annotations"][annotation].as_str();
            assert!(text.is_some_and(|t| t.len() > 10), "{name}: {annotation}");
        }
        let url = rule["annotations"]["runbook_url"].as_str().unwrap();
        let anchor = format!("/docs/operations.md#{}", name.to_lowercase());
        assert!(url.ends_with(&anchor), "{name}: {url}");
        // A heading of one word is its own anchor.
        let heading = format!("\n### {name}\n");
        assert_eq!(
            guide.matches(&heading).count(),
            1,
            "{name} in docs/operations.md"
        );
        let test = format!("  - name: {name}\n");
        assert!(tests.contains(&test), "{name} in alerts.test.yml");
    }
    // Every link within the guide leads to a heading.
    let headings: BTreeSet<String> = (guide.lines())
        .filter_map(|line| line.strip_prefix('#'))
        .map(|heading| {
            let name = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = name
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.collect::<String>().replace(' ', "-")
        })
        .collect();
    for link in guide.split("](#").skip(1) {
        let anchor = link.split(')').next().unwrap();
        assert!(headings.contains(anchor), "#{anchor} of {headings:?}");
    }
    // And the guide has no section of an alert that is none.
    let sections = guide
        .lines()
        .filter_map(|line| line.strip_prefix("### Emberline"));
    for section in sections {
        assert!(
            rules.contains_key(&format!("Emberline{section}")),
            "{section}"
        );
    }
}

#[test]
fn dashboards_are_what_grafana_takes() {
    let mut uids = BTreeSet::new();
    for name in DASHBOARDS {
        let dashboard = dashboard(name);
        assert!(dashboard["schemaVersion"].as_u64().unwrap() >= 39, "{name}");
        assert!(uids.insert(dashboard["uid"].as_str().unwrap().to_owned()));
        let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = panel["title"].as_str().unwrap();
            assert!(
                ids.insert(panel["id"].as_u64().unwrap()),
                "{name}, {title}: its id"
            );
            let place = |what: &str| panel["gridPos"][what].as_u64().unwrap();
            assert!(
                place("x") + place("w") <= 24,
                "{name}, {title}: too far right"
            );
            for x in place("x")..place("x") + place("w") {
                for y in place("y")..place("y") + place("h") {
                    assert!(taken.insert((x, y)), "{name}, {title}: over another");
                }
            }
        }
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().unwrap();
            assert!(
                panel["description"].as_str().unwrap().len() > 15,
                "{name}, {title}"
            );
            let defaults = &panel["fieldConfig"]["defaults"];
            assert!(defaults["unit"].is_string(), "{name}, {title}: no unit");
            assert!(
                defaults["thresholds"]["steps"][0].is_object(),
                "{name}, {title}"
            );
            for target in panel["targets"].as_array().unwrap() {
                assert_eq!(
                    target["datasource"]["uid"], "${datasource}",
                    "{name}, {title}"
                );
            }
        }
    }
}
