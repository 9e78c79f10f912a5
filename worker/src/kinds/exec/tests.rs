#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Instant;

use emberline_common::{resources::Resources, spec::ArtifactType};
use serde_json::json;

use super::*;
use crate::testing::{TestContext, TestContextBuilder};

fn sh(script: &str) -> TestContextBuilder {
    TestContext::builder().spec(json!({"command": ["sh", "-c", script]}))
}

fn run(builder: TestContextBuilder) -> (TestContext, Result<StageOutput, StageError>) {
    let test = builder.build();
    let result = Exec.run(&test.ctx);
    (test, result)
}

fn fails(builder: TestContextBuilder, reason: Reason, part: &str) -> TestContext {
    let (test, result) = run(builder);
    let error = result.unwrap_err();
    assert_eq!(error.reason, reason, "{error}");
    assert!(error.message.contains(part), "{error}");
    test
}

/// Whether a process is there and is no zombie.
fn lives(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    })
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn inputs_outputs_results_and_both_streams_go_where_they_belong() {
    let input = tempfile::tempdir().unwrap();
    fs::write(input.path().join("x"), "hello").unwrap();
    let script = r#"
        cat "$EMBERLINE_INPUT_THE_DATA/x" > "$EMBERLINE_OUTPUT_OUT_1/y"
        echo one; echo two >&2
        echo '{"n": 3}' > "$EMBERLINE_RESULTS"
    "#;
    let (test, result) = run(sh(script)
        .input("the-data", ArtifactType::Files, input.path())
        .declare_output("out-1", ArtifactType::Files));
    let output = result.unwrap();
    let dir = test.output(&output.artifacts, "out-1");
    assert_eq!(fs::read_to_string(dir.join("y")).unwrap(), "hello");
    assert_eq!(output.results["n"], 3);
    let lines = test.sink.lines();
    assert!(
        lines.contains(&(LogSource::Stdout, "one".into())),
        "{lines:?}"
    );
    assert!(
        lines.contains(&(LogSource::Stderr, "two".into())),
        "{lines:?}"
    );
}

#[test]
fn the_command_sees_nothing_else_of_the_workers_environment() {
    let (test, result) = run(TestContext::builder().spec(json!({
        "command": ["env"], "env": {"MINE": "1", "EMBERLINE_RUN": "forged"},
    })));
    result.unwrap();
    let names: Vec<String> = test
        .sink
        .lines()
        .into_iter()
        .map(|(_, line)| line.split('=').next().unwrap().to_owned())
        .collect();
    assert!(names.contains(&"MINE".to_owned()));
    for name in &names {
        let known = ["PATH", "HOME", "LANG", "TZ", "TMPDIR", "MINE"].contains(&name.as_str());
        assert!(known || name.starts_with("EMBERLINE_"), "{name}");
    }
    assert!(test.sink.text().contains("EMBERLINE_RUN=test"));
}

#[test]
fn files_of_the_submission_lie_in_the_working_directory_as_copies() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("s");
    fs::write(&script, "#!/bin/sh\necho ran; echo changed > tools/s.sh\n").unwrap();
    let (test, result) = run(TestContext::builder()
        .spec(json!({"command": ["tools/s.sh"], "files": ["tools/s.sh"]}))
        .file("tools/s.sh", &script, true));
    result.unwrap();
    assert_eq!(test.sink.text(), "ran");
    assert!(fs::read_to_string(&script).unwrap().contains("echo ran"));
}

#[test]
fn a_failed_command_is_told_with_its_code_and_its_last_words() {
    fails(
        sh("echo first >&2; echo why >&2; exit 3"),
        Reason::UserError,
        "exit code 3: first | why",
    );
    fails(
        sh("kill -SEGV $$"),
        Reason::UserError,
        "killed by signal 11",
    );
    let bad_data = TestContext::builder()
        .spec(json!({"command": ["sh", "-c", "exit 65"], "data_exit_codes": [65]}));
    fails(bad_data, Reason::Data, "exit code 65");
    let missing = TestContext::builder().spec(json!({"command": ["no-such-program"]}));
    fails(missing, Reason::UserError, "no such program");
    fails(
        sh("echo 'no json' > $EMBERLINE_RESULTS"),
        Reason::UserError,
        "no JSON",
    );
    fails(
        sh("ln -s /etc/passwd $EMBERLINE_RESULTS"),
        Reason::UserError,
        "regular file",
    );
}

#[test]
fn a_stopped_command_takes_its_whole_group_with_it() {
    let script = r#"
        trap '' TERM
        sh -c 'trap "" TERM; echo child $$; while :; do sleep 1; done' &
        setsid sh -c 'echo child $$; while :; do sleep 1; done' &
        while :; do sleep 1; done
    "#;
    let test = sh(script).build();
    let (ctx, sink) = (test.ctx.clone(), test.sink.clone());
    let running = std::thread::spawn(move || Exec.run(&ctx));
    let children: Vec<String> = wait_for("both children", || {
        let lines = sink.lines();
        let pids = lines
            .iter()
            .filter_map(|(_, line)| line.strip_prefix("child "));
        let pids: Vec<String> = pids.map(str::to_owned).collect();
        (pids.len() == 2).then_some(pids)
    });
    assert!(children.iter().all(|pid| lives(pid)));
    test.stop(StopReason::Timeout);
    let error = running.join().unwrap().unwrap_err();
    assert_eq!(error.reason, Reason::Timeout);
    for pid in children {
        assert!(!lives(&pid), "{pid} outlived its command");
    }
}

#[test]
fn what_a_command_leaves_in_the_background_ends_with_it() {
    let (test, result) = run(sh("sleep 1000 & echo child $!"));
    result.unwrap();
    let text = test.sink.text();
    assert!(!lives(text.strip_prefix("child ").unwrap()));
}

#[test]
fn a_command_that_goes_over_its_memory_is_ended_with_reason_oom() {
    let builder =
        sh("head -c 200000000 /dev/zero | tail -c 200000000 | sleep 30").resources(Resources {
            cpu_millis: 1000,
            memory_bytes: 64 << 20,
            gpus: 0,
        });
    fails(builder, Reason::Oom, "raise `resources.memory`");
}

#[test]
fn gigabytes_without_a_line_end_are_dropped_beyond_the_limit_and_the_command_goes_on() {
    let builder = TestContext::builder().spec(json!({
        "command": ["sh", "-c", "head -c 300000000 /dev/zero; printf '\\377ok' >&2"],
        "max_log": "1MiB",
    }));
    let (test, result) = run(builder);
    result.unwrap();
    let kept: usize = test.sink.lines().iter().map(|(_, line)| line.len()).sum();
    assert!(kept < 3 << 20, "{kept}");
    let text = test.sink.lines().pop().unwrap().1;
    assert!(text.contains("more bytes"), "{text}");
}

#[test]
fn bytes_that_are_no_text_are_replaced() {
    let (test, result) = run(sh(r"printf 'a\377b\r\n'"));
    result.unwrap();
    assert_eq!(test.sink.text(), "a\u{fffd}b");
}

#[test]
fn a_fork_bomb_is_ended_as_a_whole() {
    // Bounded by itself, so that a failure of this test does not take the machine with it.
    let script = r#"
        f() { [ "$1" -gt 0 ] || { sleep 1000; return; }; f $(($1 - 1)) & f $(($1 - 1)) & wait; }
        f 6 & echo started; wait
    "#;
    let test = sh(script).build();
    let (ctx, sink) = (test.ctx.clone(), test.sink.clone());
    let running = std::thread::spawn(move || Exec.run(&ctx));
    wait_for("the bomb", || (!sink.lines().is_empty()).then_some(()));
    test.stop(StopReason::Cancelled);
    assert_eq!(
        running.join().unwrap().unwrap_err().reason,
        Reason::Cancelled
    );
    let place = test.ctx.work_dir.to_string_lossy().into_owned();
    let left = fs::read_dir("/proc").unwrap().filter(|entry| {
        let path = entry.as_ref().unwrap().path();
        let pid = path.file_name().unwrap().to_string_lossy().into_owned();
        fs::read(path.join("environ"))
            .is_ok_and(|env| String::from_utf8_lossy(&env).contains(&place))
            && lives(&pid)
    });
    assert_eq!(left.count(), 0);
}

#[test]
fn two_names_that_become_one_variable_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let builder = sh("true")
        .input("a-b", ArtifactType::Files, dir.path())
        .input("a_b", ArtifactType::Files, dir.path());
    fails(builder, Reason::UserError, "EMBERLINE_INPUT_A_B");
}

#[tokio::test]
async fn a_command_does_not_outlive_a_worker_that_is_killed() {
    let mut child = Command::new("sh")
        .args(["-c", "trap '' TERM HUP; sleep 1000 & sleep 1000"])
        .process_group(0)
        .spawn()
        .unwrap();
    let group = Group::of(&child, Path::new("/nowhere")).unwrap();
    let guard = group.guard().await.expect("there is a shell");
    // What the system does with a worker's end of the pipe when the worker is killed.
    drop(guard);
    let ended = tokio::time::timeout(Duration::from_secs(20), child.wait()).await;
    assert_eq!(ended.expect("it was ended").unwrap().signal(), Some(9));
}

const CANARY: &str = "planted-canary-7c1";

fn with_secret(script: &str) -> TestContextBuilder {
    let spec = json!({"command": ["sh", "-c", script], "secrets": {"API_KEY": "api-key"}});
    TestContext::builder().spec(spec).secret("api-key", CANARY)
}

#[test]
fn a_command_has_the_secrets_that_it_names_and_its_words_lose_them() {
    let script = "echo \"$API_KEY\" | wc -c; echo key: $API_KEY; echo no $API_KEY >&2; exit 3";
    let test = fails(
        with_secret(script),
        Reason::UserError,
        "exit code 3: no ***",
    );
    let text = test.sink.text();
    assert!(text.contains(&format!("{}\n", CANARY.len() + 1)), "{text}");
    assert!(
        text.contains("key: ***") && !text.contains("canary"),
        "{text}"
    );
    assert_eq!(
        Exec.secrets(&test.ctx.spec).unwrap(),
        ["api-key".parse().unwrap()]
    );
}

#[test]
fn a_secret_is_taken_out_wherever_a_long_line_is_broken_and_however_it_comes() {
    for before in [
        0,
        1,
        LINE - 30,
        LINE - 9,
        LINE - 1,
        LINE,
        LINE + 1,
        2 * LINE - 9,
    ] {
        // In two halves, and with more of the line after it.
        let script = format!(
            "head -c {before} /dev/zero | tr '\\0' x; printf %.9s \"$API_KEY\"; sleep 0.01; \
             printf %s \"${{API_KEY#planted-c}}\"; head -c 5000 /dev/zero | tr '\\0' y; echo"
        );
        let (test, result) = run(with_secret(&script));
        result.unwrap();
        let lines = test.sink.lines();
        let text: String = lines.iter().map(|(_, line)| line.as_str()).collect();
        let expected = format!("{}***{}", "x".repeat(before), "y".repeat(5000));
        assert!(text == expected, "with {before} bytes before it");
        assert!(lines.iter().all(|(_, line)| line.len() <= LINE));
    }
}

const LINE: usize = 16 << 10;

#[test]
fn variables_that_cannot_have_a_secret_are_refused() {
    for (variable, part) in [
        ("A-B", "no name of a variable"),
        ("EMBERLINE_RUN", "set by the worker itself"),
    ] {
        let spec = json!({"command": ["true"], "secrets": {variable: "api-key"}});
        let builder = TestContext::builder().spec(spec).secret("api-key", CANARY);
        fails(builder, Reason::UserError, part);
    }
}
