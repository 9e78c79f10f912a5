//! Secrets and credentials: canaries are planted, stages do their worst with them, and then every
//! place that anything is written to or sent to is searched.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, io::Read as _, path::Path};

use emberline_proto::v1::RunState;
use emberline_tests::{
    OtlpReceiver, Place, S3Server,
    client::state_of,
    cluster::{Builder, Cluster},
    place::{binary, task},
    processes, s3, seconds, wait_for,
    watched::ARRIVES,
};
use serde_json::{Value, json};

/// What every form of it that needs no encoding has in it, and the whole.
const CORE: &str = "canary-7c1";
const VALUE: &str = "planted+canary-7c1/\"ä\"";
/// Of `CORE` in base64, wherever it begins, what does not depend on its neighbours.
const BASE64: [&str; 3] = ["Y2FuYXJ5LTdjM", "NhbmFyeS03Yz", "jYW5hcnktN2Mx"];
/// What the worker's environment has that no command may see.
const OWN: [(&str, &str); 4] = [
    (
        "EMBERLINE_TOKEN",
        "emb.canary.0badc0de0badc0de0badc0de0badc0de0badc0de0badc0de0badc0de0badc0de",
    ),
    ("AWS_SESSION_TOKEN", "canary-of-a-session"),
    ("EMBERLINE_SECRET_OTHER", "canary-of-another"),
    ("ETCD_PASSWORD", "canary-of-etcd"),
];

/// A stage that says its secret in many ways.
const LEAKY: &str = r#"
echo "plain: $API_KEY"
echo "in the middle:x${API_KEY}y" >&2
printf '%s' "$API_KEY" | base64 -w0; echo
printf 'u:%s' "$API_KEY" | base64 -w0; echo
printf 'us:%s' "$API_KEY" | base64 -w0; echo
printf '%s\n' "$API_KEY" | sed 's/+/%2B/; s|/|%2F|; s/"/%22/g; s/ä/%C3%A4/'
printf '{"key": "%s"}\n' "$(printf '%s' "$API_KEY" | sed 's/"/\\"/g')"
tr '\0' '\n' < /proc/self/environ
env
head -c 16370 /dev/zero | tr '\0' x; printf '%s and more\n' "$API_KEY"
printf '%s' "$API_KEY" | head -c 14; sleep 0.05; printf '%s\n' "$API_KEY" | tail -c +15
printf '%s' "$MULTI"
set -x
: "$API_KEY"
"#;

fn leaky(end: &str, more: &Value) -> Value {
    let mut stage = json!({"kind": "exec", "outputs": {"o": "files"}, "with": {
        "command": ["sh", "-c", format!("{LEAKY}\n{end}").replace("${", "$${")],
        "secrets": {"API_KEY": "api-key", "MULTI": "multi.line"},
    }});
    for (name, value) in more.as_object().unwrap() {
        stage[name] = value.clone();
    }
    stage
}

/// The pipeline, whose stages fail and succeed in every way in which they can tell something.
fn pipeline() -> String {
    let results = r#"printf '{"key": "%s", "n": 1}' "$(printf '%s' "$API_KEY" | sed 's/"/\\"/g')" > "$EMBERLINE_RESULTS""#;
    let stored = r#"echo "a file: $API_KEY" > "$EMBERLINE_OUTPUT_O/x""#;
    let named = r#"{ set +x; } 2> /dev/null; mkdir "$EMBERLINE_OUTPUT_O/${API_KEY%/*}" && : > "$EMBERLINE_OUTPUT_O/$API_KEY""#;
    json!({"pipeline": "leaky", "fail_fast": false, "stages": {
        "fails": leaky("echo the last words: $API_KEY >&2; exit 3", &json!({"retries": {"errors": 1, "backoff": "10ms"}})),
        "tells": leaky(results, &json!({})),
        "stores": leaky(stored, &json!({})),
        "names": leaky(named, &json!({})),
        "spawns": {"kind": "exec", "with": {"command": ["no-such-program"], "secrets": {"API_KEY": "api-key"}}},
        "lacks": {"kind": "exec", "retries": {"errors": 0}, "with": {"command": ["true"], "secrets": {"K": "no-such-secret"}}},
    }})
    .to_string()
}

/// What is said of a place that has a canary in it.
fn leaks(place: &str, bytes: &[u8], canaries: &[&str], out: &mut Vec<String>) {
    let text = String::from_utf8_lossy(bytes);
    for canary in canaries {
        if text.contains(canary) {
            out.push(format!("`{canary}` is in {place}"));
        }
    }
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        if flate2::read::GzDecoder::new(bytes)
            .read_to_end(&mut plain)
            .is_ok()
        {
            leaks(&format!("{place}, unpacked"), &plain, canaries, out);
        }
    }
}

fn files_leak(dir: &Path, canaries: &[&str], out: &mut Vec<String>) -> usize {
    let files = s3::files_below(dir);
    for file in &files {
        let name = file.display().to_string();
        leaks(
            &format!("the name of {name}"),
            name.as_bytes(),
            canaries,
            out,
        );
        leaks(&name, &fs::read(file).unwrap(), canaries, out);
    }
    files.len()
}

fn secrets_dir(place: &Place) -> String {
    place.write("secrets/api-key", format!("{VALUE}\n"));
    place.write("secrets/multi.line", "first-canary-7c1\nsecond-canary\n");
    place.path("secrets").display().to_string()
}

#[test]
fn no_planted_secret_is_in_anything_that_is_written_or_sent() {
    let place = Place::new();
    let receiver = OtlpReceiver::start();
    let server = S3Server::start();
    let mut environment = receiver.environment();
    let own = OWN.map(|(name, value)| (name.to_owned(), value.to_owned()));
    // A session token would be sent, and is checked by the server of this test.
    environment.extend(
        own.into_iter()
            .filter(|(name, _)| !name.starts_with("AWS_")),
    );
    environment.push((
        "RUST_LOG".to_owned(),
        "info,emberline_worker=trace,object_store=debug,hyper_util=debug".to_owned(),
    ));
    let mut cluster = Builder::new()
        .coordinators(1)
        .workers(1)
        .on_s3(&server, &server.address())
        .environment(&environment)
        .worker_arguments(&["--secrets-dir", &secrets_dir(&place)])
        .start();
    let run = cluster.submit(&pipeline());
    let ended = wait_for("the run ends", seconds(60), || {
        let seen = cluster.run(&run);
        (state_of(&seen) == RunState::Failed).then_some(seen)
    });
    let of = |name: &str| ended.tasks.iter().find(|t| t.task == name).unwrap().clone();
    let why = |name: &str| of(name).failure.unwrap_or_default().message;
    assert!(
        why("fails").contains("the last words: ***"),
        "{}",
        why("fails")
    );
    assert_eq!(of("fails").attempt, 2);
    assert_eq!(of("tells").results_json, r#"{"key":"***","n":1}"#);
    let refused = "the output `o`: `x` has the value of the secret `api-key` in it";
    assert!(why("stores").contains(refused), "{}", why("stores"));
    assert!(
        why("names").contains("has the value of the secret"),
        "{}",
        why("names")
    );
    assert!(
        why("spawns").contains("no such program"),
        "{}",
        why("spawns")
    );
    let lacks = why("lacks");
    assert!(
        lacks.contains(
            "the worker `w0` does not have the secret `no-such-secret`: there is no file"
        ) && lacks.contains("`EMBERLINE_SECRET_NO_SUCH_SECRET` is not in its environment")
            && !lacks.contains('\n'),
        "{lacks}"
    );
    // What the attempts said is there, without it.
    let servers = cluster.servers().join(",");
    let cli = ["--server", &servers];
    let call = |arguments: &[&str]| {
        let all = [&cli, arguments].concat();
        place.emberline(&all).run().expect_code(0).stdout
    };
    let logs = call(&["runs", "logs", &run, "--task", "tells"]);
    for line in [
        "plain: ***",
        "in the middle:x***y",
        "xxx***",
        "{\"key\": \"***\"}",
    ] {
        assert!(logs.contains(line), "`{line}` is not in\n{logs}");
    }
    assert!(
        !logs.contains("+canary") && !logs.contains("second-canary"),
        "{logs}"
    );
    let shown = [
        logs,
        call(&["runs", "logs", &run]),
        call(&["runs", "show", &run]),
        call(&["runs", "show", &run, "-o", "json"]),
    ]
    .concat();
    // The log of the last attempt has come as telemetry, too.
    receiver.wait_for("the run's trace", ARRIVES, |received| {
        let id = &ended.summary.as_ref().unwrap().trace_id;
        let trace = received.trace(id)?;
        trace.is_whole_with("", &[("RUN leaky", 1)])
    });
    cluster.coordinators[0].terminate();
    cluster.workers[0].terminate();
    cluster.coordinators[0].wait(seconds(20));
    cluster.workers[0].wait(seconds(20));

    let mut canaries = vec![CORE, "second-canary", s3::SECRET_KEY];
    canaries.extend(BASE64);
    canaries.extend(OWN.map(|(_, value)| value));
    let mut found = Vec::new();
    leaks(
        "what the CLI showed",
        shown.as_bytes(),
        &canaries,
        &mut found,
    );
    assert!(files_leak(&server.bucket(), &canaries, &mut found) > 10);
    assert!(files_leak(cluster.root(), &canaries, &mut found) > 4);
    for event in cluster.read_history().events() {
        let value = event.value.clone().unwrap_or_default();
        leaks(&event.key, &value, &canaries, &mut found);
    }
    receiver.read(|received| {
        assert!(received.mentions("RUN leaky") && !received.logs.is_empty());
        for canary in &canaries {
            if received.mentions(canary) {
                found.push(format!("`{canary}` was sent to the collector"));
            }
        }
    });
    assert!(found.is_empty(), "{found:#?}");
    // The search finds what is there: the same pipeline's text is.
    let mut there = Vec::new();
    files_leak(&server.bucket(), &["no-such-secret"], &mut there);
    assert!(!there.is_empty());
}

/// Everything that a command can find out about what it was not given.
const CURIOUS: &str = r#"
tr '\0' '\n' < /proc/self/environ > "$EMBERLINE_OUTPUT_O/environ"
ls -l /proc/self/fd > "$EMBERLINE_OUTPUT_O/fds"
for pid in $PPID $(cat /proc/$PPID/stat | cut -d' ' -f4); do
  cat /proc/$pid/environ > /dev/null 2>> "$EMBERLINE_OUTPUT_O/parents" && echo "read the environment of $pid" >> "$EMBERLINE_OUTPUT_O/parents"
  cat /proc/$pid/mem > /dev/null 2>> "$EMBERLINE_OUTPUT_O/parents" && echo "read the memory of $pid" >> "$EMBERLINE_OUTPUT_O/parents"
done
ls -ld "$EMBERLINE_OUTPUT_O/../../.." | cut -c1-10 > "$EMBERLINE_OUTPUT_O/mode"
"#;

fn curious(cluster: &mut Cluster) -> impl Fn(&str) -> String {
    let pipeline = json!({"pipeline": "curious", "stages": {"s": {
        "kind": "exec", "outputs": {"o": "files"}, "with": {"command": ["sh", "-c", CURIOUS]},
    }}});
    let run = cluster.submit(&pipeline.to_string());
    let ended = cluster.succeeds(&run);
    let manifest = ended.tasks[0].outputs[0].manifest.clone();
    let files = emberline_tests::outside::artifact(&cluster.artifacts(), &manifest);
    move |name: &str| {
        let (_, bytes) = files.iter().find(|(path, _)| path == name).unwrap();
        String::from_utf8_lossy(bytes).into_owned()
    }
}

fn with_own_credentials(server: &S3Server) -> Cluster {
    let own = OWN.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let own: Vec<_> = own
        .into_iter()
        .filter(|(n, _)| !n.starts_with("AWS_"))
        .collect();
    Builder::new()
        .coordinators(1)
        .workers(0)
        .on_s3(server, &server.address())
        .environment(&own)
        .start()
}

#[test]
fn a_command_sees_no_credential_and_no_open_file_of_its_worker() {
    let server = S3Server::start();
    let mut cluster = with_own_credentials(&server);
    let worker = cluster.add_worker();
    // Whoever starts it has something open, as shells and build tools do.
    let open = "exec 9< /etc/passwd; exec \"$0\" \"$@\"";
    cluster.workers[worker].run_by(&["sh", "-c", open]);
    cluster.workers[worker].start();
    cluster.wait_until_it_serves();
    let file = curious(&mut cluster);
    let environ = file("environ");
    assert!(environ.contains("EMBERLINE_RUN="), "{environ}");
    assert!(
        !environ.contains("canary") && !environ.contains("0badc0de"),
        "{environ}"
    );
    for line in environ.lines() {
        let (name, _) = line.split_once('=').unwrap();
        assert!(
            !name.starts_with("AWS_") && !name.contains("TOKEN"),
            "{line}"
        );
        assert!(!name.starts_with("EMBERLINE_SECRET"), "{line}");
    }
    // Standard input, output and error, and the directory that is listed.
    let fds = file("fds");
    assert_eq!(
        fds.lines().filter(|line| line.contains(" -> ")).count(),
        4,
        "{fds}"
    );
    assert!(fds.contains("0 -> /dev/null"), "{fds}");
    assert_eq!(file("mode").trim(), "drwx------");
}

#[test]
fn a_command_cannot_look_into_a_worker_that_is_not_the_administrators() {
    const NOBODY: u32 = 65_534;
    let as_nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let tried = std::process::Command::new(as_nobody[0])
        .args(&as_nobody[1..])
        .arg(binary())
        .arg("--version")
        .output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        eprintln!("not checked: the binary cannot be run here as somebody else");
        return;
    }
    let server = S3Server::start();
    let mut cluster = with_own_credentials(&server);
    let worker = cluster.add_worker();
    let dir = cluster.workers[worker].dir().to_path_buf();
    cluster.workers[worker].run_by(&as_nobody);
    for dir in dir
        .ancestors()
        .take_while(|dir| dir.starts_with(cluster.root()))
    {
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    cluster.workers[worker].start();
    cluster.wait_until_it_serves();
    let parents = curious(&mut cluster)("parents");
    assert!(!parents.contains("read the"), "{parents}");
    let refused = parents.matches("Permission denied").count();
    assert!(refused >= 2, "{parents}");
}

#[test]
fn the_embedded_cluster_has_its_secrets_from_its_environment_or_a_directory() {
    let place = Place::new();
    let dir = secrets_dir(&place);
    let pipeline = json!({"pipeline": "p", "stages": {"s": {"kind": "exec", "with": {
        "command": ["sh", "-c", "[ \"$A\" = \"$B\" ] && echo they are $A"],
        "secrets": {"A": "api-key", "B": "from.the-environment"},
    }}}});
    place.write("p.yaml", pipeline.to_string());
    let run = |value: &str, with_dir: bool| {
        let mut call = place
            .emberline(&["run", "p.yaml", "-o", "json", "-q"])
            .env("EMBERLINE_SECRET_FROM_THE_ENVIRONMENT", value);
        if with_dir {
            call = call.env("EMBERLINE_SECRETS_DIR", &dir);
        }
        let output = call.run();
        assert!(
            !output.stdout.contains(CORE) && !output.stderr.contains(CORE),
            "{output}"
        );
        output.json()
    };
    let first = run(VALUE, true);
    assert_eq!(first["state"], "succeeded", "{first:#}");
    // The names are part of the key, the values are not.
    let again = run("another", true);
    assert_eq!(task(&again, "s")["state"], "cached", "{again:#}");
    place.write(
        "p.yaml",
        pipeline
            .to_string()
            .replace("\"A\":\"api-key\"", "\"A\":\"multi.line\""),
    );
    let other = run(VALUE, true);
    assert_eq!(task(&other, "s")["state"], "failed", "{other:#}");
    let without = run(VALUE, false);
    let why = task(&without, "s")["failure"]["message"].as_str().unwrap();
    assert!(
        why.contains("`multi.line`: it has no `--secrets-dir`"),
        "{why}"
    );
    assert_eq!(task(&without, "s")["attempt"], 1);
    let left = processes::of_attempts_below(&place.dir());
    assert!(left.is_empty());
}

#[test]
fn what_is_wrong_with_secrets_in_a_pipeline_is_told_at_its_line() {
    let place = Place::new();
    let pipeline = "\
pipeline: p
stages:
  s:
    kind: exec
    with:
      command: [env]
      env: { TWICE: x }
      secrets:
        TWICE: a
        EMBERLINE_RUN: b
        not-a-variable: c
        PATHY: ../../etc/shadow
        DOTTED: ..data
        FINE: Api.Key-2
";
    place.write("p.yaml", pipeline);
    let output = place
        .emberline(&["validate", "p.yaml"])
        .run()
        .expect_code(2);
    let errors = output.errors();
    for part in [
        "p.yaml:9:9: stages.s.with.secrets.TWICE: `TWICE` is in `env`, too",
        "p.yaml:10:9: stages.s.with.secrets.EMBERLINE_RUN: `EMBERLINE_RUN` is set by the worker itself",
        "p.yaml:11:9: stages.s.with.secrets.not-a-variable: `not-a-variable` is no name of a variable",
        "p.yaml:12:16: stages.s.with.secrets.PATHY: `../../etc/shadow` is no secret name",
        "p.yaml:13:17: stages.s.with.secrets.DOTTED: `..data` is no secret name",
    ] {
        assert!(
            errors.iter().any(|e| e.starts_with(part)),
            "{part}\n{errors:#?}"
        );
    }
    assert_eq!(errors.len(), 5, "{errors:#?}");
}
