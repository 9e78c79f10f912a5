//! Commands that misbehave: each ends with the right reason in one line, and nothing of it is left.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use emberline_tests::{Dev, Place, outside, place::task, processes, seconds, wait_for};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

/// A pipeline of one `exec` stage `s`, as JSON, which is YAML too.
fn one(place: &Place, command: &[&str], more: &Value) -> Value {
    let mut stage = json!({"kind": "exec", "with": {"command": command}});
    merge(&mut stage, more);
    let pipeline = json!({"pipeline": "one", "stages": {"s": stage}});
    place.write("one.yaml", pipeline.to_string());
    place.run("one.yaml")
}

fn merge(into: &mut Value, more: &Value) {
    for (name, value) in more.as_object().unwrap() {
        match into.get_mut(name) {
            Some(old @ Value::Object(_)) => merge(old, value),
            _ => into[name] = value.clone(),
        }
    }
}

/// The stage failed for this reason, with this in its message; the run has the same reason, and
/// nothing of the command is left.
#[track_caller]
fn failed(place: &Place, run: &Value, reason: &str, part: &str) {
    let stage = task(run, "s");
    assert_eq!(stage["state"], "failed", "{run:#}");
    assert_eq!(stage["failure"]["reason"], reason, "{run:#}");
    let message = stage["failure"]["message"].as_str().unwrap();
    assert!(message.contains(part), "{message}");
    assert_eq!(run["failure"]["reason"], reason);
    assert_eq!(stage["outputs"], json!([]));
    nothing_is_left(place);
    outside::run_is_whole(&place.state(), run);
}

#[track_caller]
fn nothing_is_left(place: &Place) {
    let left = processes::of_attempts_below(&place.dir());
    assert!(left.is_empty(), "{left:?} are left");
}

#[test]
fn one_that_never_ends_is_stopped_at_its_timeout() {
    let place = Place::new();
    // It does not even listen to a polite request.
    let script = "trap '' TERM; echo begun; while :; do sleep 0.05; done";
    let run = one(&place, &["sh", "-c", script], &json!({"timeout": "300ms"}));
    failed(&place, &run, "timeout", "time limit");
    let log = outside::log(&place.state(), run["run"].as_str().unwrap(), "s", 1).unwrap();
    assert!(
        log.is_sealed && log.lines.contains(&"begun".to_owned()),
        "{log:?}"
    );
}

#[test]
fn a_run_that_takes_too_long_is_stopped_as_a_whole() {
    let place = Place::new();
    let pipeline = json!({"pipeline": "slow", "timeout": "500ms", "stages": {
        "s": {"kind": "exec", "with": {"command": ["sleep", "1000"]}},
        "after": {"kind": "noop", "needs": ["s"]},
    }});
    place.write("slow.yaml", pipeline.to_string());
    let run = place.run("slow.yaml");
    assert_eq!(run["state"], "failed");
    assert_eq!(run["failure"]["reason"], "timeout", "{run:#}");
    assert_ne!(task(&run, "after")["state"], "succeeded");
    nothing_is_left(&place);
}

#[test]
fn cancelling_ends_grandchildren_and_those_that_left_the_group() {
    let place = Place::new();
    let script = "sleep 1001 & (sleep 1002 & setsid sleep 1003 & wait) & setsid sh -c 'sleep 1004 & wait' & wait";
    let pipeline = json!({"pipeline": "family", "stages": {
        "s": {"kind": "exec", "with": {"command": ["sh", "-c", script]}},
    }});
    place.write("family.yaml", pipeline.to_string());
    let dev = Dev::start(&place);
    let submitted = place
        .emberline(&["run", "family.yaml", "--detach"])
        .run()
        .expect_code(0);
    let id = submitted.stdout.trim();
    wait_for("the whole family", seconds(20), || {
        (processes::of_attempts_below(&place.dir()).len() >= 7).then_some(())
    });
    let family = processes::of_attempts_below(&place.dir());
    place
        .emberline(&["runs", "cancel", id, "--why", "enough"])
        .run()
        .expect_code(0);
    let ended = place.emberline(&["runs", "watch", id]).run().expect_code(1);
    assert!(ended.stdout.contains("was cancelled"), "{ended}");
    for pid in family {
        assert!(
            !processes::is_alive(pid.as_raw_nonzero().get()),
            "{pid:?} lives"
        );
    }
    let run = place.json(&["runs", "show", id]);
    assert_eq!(run["failure"]["message"], "enough");
    // Asked again, it is still cancelled; that is no mistake.
    place
        .emberline(&["runs", "cancel", id])
        .run()
        .expect_code(0);
    dev.stop().expect_code(0);
}

#[test]
fn what_a_command_leaves_running_in_the_background_ends_with_it() {
    let place = Place::new();
    let script = "setsid sleep 1001 & sleep 1002 & echo done";
    let run = one(&place, &["sh", "-c", script], &json!({}));
    assert_eq!(run["state"], "succeeded");
    nothing_is_left(&place);
}

#[test]
fn one_that_prints_gigabytes_goes_on_with_a_bounded_log_in_bounded_memory() {
    let place = Place::new();
    // 2 GiB of short lines; 1 MiB of them are kept.
    let script = "yes 'a line of some length, again and again and again' | head -c 2147483648; echo last >&2";
    let stage =
        json!({"kind": "exec", "with": {"command": ["sh", "-c", script], "max_log": "1MiB"}});
    place.write(
        "loud.yaml",
        json!({"pipeline": "loud", "stages": {"s": stage}}).to_string(),
    );
    let mut process = place
        .emberline(&["run", "loud.yaml"])
        .within(seconds(120))
        .start();
    let mut peak = 0;
    wait_for("the end", seconds(120), || {
        peak = processes::peak_memory(process.pid()).unwrap_or(0).max(peak);
        process.has_ended().then_some(())
    });
    process.finish().expect_code(0);
    assert!(
        peak > 0 && peak < 300 << 20,
        "{} MiB at the most",
        peak >> 20
    );
    let runs = place.json(&["runs", "list"]);
    let id = runs[0]["run"].as_str().unwrap();
    let log = outside::log(&place.state(), id, "s", 1).unwrap();
    assert!(log.is_sealed);
    let bytes: usize = log.lines.iter().map(|l| l.len() + 1).sum();
    assert!(bytes < (1 << 20) + 100_000, "{bytes} bytes of log");
    let told = log
        .lines
        .iter()
        .any(|l| l.contains("more bytes than") && l.contains("dropped"));
    assert!(told, "{:?}", log.lines.last());
}

#[test]
fn lines_that_are_no_text_or_never_end_are_kept_harmless() {
    let place = Place::new();
    let script =
        r"printf 'a\033[31mred\rover\n\377\376bytes\n'; head -c 100000 /dev/zero | tr '\0' x; echo";
    let run = one(&place, &["sh", "-c", script], &json!({}));
    let id = run["run"].as_str().unwrap();
    let log = place.emberline(&["runs", "logs", id]).run().expect_code(0);
    assert!(
        log.stdout.contains(r"a\u{1b}[31mred\rover"),
        "{}",
        &log.stdout[..200]
    );
    assert!(!log.stdout.contains('\u{1b}'));
    assert!(log.stdout.contains("\u{fffd}bytes"));
    assert!(log.stdout.lines().all(|l| l.len() < 20_000));
    let x = log.stdout.matches('x').count();
    assert!(x >= 100_000, "{x} of 100000 bytes of the long line");
}

#[test]
fn an_end_by_signal_a_bad_code_and_a_data_code_are_told_apart() {
    let place = Place::new();
    let run = one(&place, &["sh", "-c", "kill -SEGV $$"], &json!({}));
    failed(&place, &run, "user_error", "killed by signal 11");
    let run = one(
        &place,
        &["sh", "-c", "echo the cause >&2; exit 3"],
        &json!({}),
    );
    failed(&place, &run, "user_error", "exit code 3: the cause");
    let data = json!({"with": {"data_exit_codes": [3]}, "retries": {"errors": 5}});
    let run = one(&place, &["sh", "-c", "exit 3"], &data);
    failed(&place, &run, "data", "exit code 3");
    assert_eq!(
        task(&run, "s")["attempt"],
        1,
        "bad data is never tried again"
    );
    let run = one(&place, &["no-such-program"], &json!({}));
    failed(
        &place,
        &run,
        "user_error",
        "there is no such program on this worker",
    );
    // The last lines of the log stand beside the error, for people.
    place.write("p.yaml", r#"{"pipeline": "p", "stages": {"s": {"kind": "exec", "with": {"command": ["sh", "-c", "echo why; exit 1"]}}}}"#);
    let told = place.emberline(&["run", "p.yaml"]).run().expect_code(1);
    assert!(
        told.stdout.contains("the last lines of s:\n    why\n"),
        "{told}"
    );
}

#[test]
fn one_that_takes_more_memory_than_it_reserved_is_ended_with_reason_oom() {
    let place = Place::new();
    // A shell that keeps what it reads, in a child of its own.
    let script = "sh -c 'x=$(yes | head -c 200000000); echo $x | wc -c; sleep 1000' & wait";
    let run = one(
        &place,
        &["sh", "-c", script],
        &json!({"resources": {"memory": "64MiB"}}),
    );
    failed(
        &place,
        &run,
        "oom",
        "more than the 64 MiB that it had reserved: raise `resources.memory`",
    );
}

#[test]
fn errors_are_tried_again_as_often_as_allowed_and_each_attempt_has_its_log() {
    let place = Place::new();
    let counter = place.path("counter");
    let script = format!(
        "echo attempt $EMBERLINE_ATTEMPT; echo >> {0}; [ $(wc -l < {0}) -ge 3 ]",
        counter.display()
    );
    let retries = json!({"retries": {"errors": 3, "backoff": "10ms"}});
    let run = one(&place, &["sh", "-c", &script], &retries);
    assert_eq!(run["state"], "succeeded", "{run:#}");
    assert_eq!(task(&run, "s")["attempt"], 3);
    let id = run["run"].as_str().unwrap();
    for attempt in 1..=3 {
        let number = attempt.to_string();
        let log = place
            .emberline(&["runs", "logs", id, "--task", "s", "--attempt", &number])
            .run()
            .expect_code(0);
        assert!(log.stdout.contains(&format!("attempt {attempt}")), "{log}");
        assert!(
            outside::log(&place.state(), id, "s", attempt)
                .unwrap()
                .is_sealed
        );
    }
    fs::remove_file(&counter).unwrap();
    let retries = json!({"retries": {"errors": 1, "backoff": "10ms"}, "cache": false});
    let run = one(&place, &["sh", "-c", &script], &retries);
    failed(&place, &run, "user_error", "exit code 1");
    assert_eq!(task(&run, "s")["attempt"], 2);
}

#[test]
fn a_command_sees_what_it_was_given_and_nothing_else_of_the_worker() {
    let place = Place::new();
    let show = "env | sort > $EMBERLINE_OUTPUT_OUT_PUT/env; pwd > $EMBERLINE_OUTPUT_OUT_PUT/pwd; cat $EMBERLINE_INPUT_IN/x > $EMBERLINE_OUTPUT_OUT_PUT/x; cat tool/data.txt >> $EMBERLINE_OUTPUT_OUT_PUT/x; echo '{\"n\": 7, \"ok\": true}' > $EMBERLINE_RESULTS";
    place.write("tool/data.txt", "travelled\n");
    let pipeline = json!({"pipeline": "env", "params": {"p": 5}, "stages": {
        "make": {"kind": "exec", "outputs": {"o": "files"}, "with": {"command": ["sh", "-c", "echo made > $EMBERLINE_OUTPUT_O/x"]}},
        "s": {"kind": "exec", "inputs": {"in": "make.o"}, "outputs": {"out-put": "files"},
              "with": {"command": ["sh", "-c", show], "files": ["tool/data.txt"], "env": {"GIVEN": "p is ${params.p}"}}},
        "yes": {"kind": "noop", "needs": ["s"], "when": "s.n >= 7 and s.ok == true"},
        "no": {"kind": "noop", "needs": ["s"], "when": "s.n > 7"},
    }});
    place.write("env.yaml", pipeline.to_string());
    let call = place.emberline(&["run", "env.yaml", "-o", "json", "-q", "--param", "p=6"]);
    let run = call
        .env("SECRET_TOKEN", "canary")
        .run()
        .expect_code(0)
        .json();
    let out = outside::artifact(
        &place.state(),
        task(&run, "s")["outputs"][0]["manifest"].as_str().unwrap(),
    );
    let file = |name: &str| {
        let bytes = out.iter().find(|(path, _)| path == name).unwrap().1.clone();
        String::from_utf8(bytes).unwrap()
    };
    let env = file("env");
    let has = |line: String| env.lines().any(|l| l == line);
    assert!(has("GIVEN=p is 6".into()), "{env}");
    assert!(
        has(format!("EMBERLINE_RUN={}", run["run"].as_str().unwrap())),
        "{env}"
    );
    assert!(
        has("EMBERLINE_TASK=s".into()) && has("EMBERLINE_ATTEMPT=1".into()),
        "{env}"
    );
    assert!(
        !env.contains("SECRET_TOKEN") && !env.contains("canary"),
        "{env}"
    );
    let allowed = [
        "EMBERLINE_",
        "PATH=",
        "HOME=",
        "LANG=",
        "TZ=",
        "GIVEN=",
        "TMPDIR=",
        "PWD=",
        "OLDPWD=",
        "SHLVL=",
        "_=",
    ];
    for line in env.lines() {
        assert!(
            allowed.iter().any(|a| line.starts_with(a)),
            "`{line}` came from elsewhere"
        );
    }
    assert_eq!(file("x"), "made\ntravelled\n");
    assert_eq!(task(&run, "s")["results"], json!({"n": 7, "ok": true}));
    assert_eq!(task(&run, "yes")["state"], "succeeded");
    assert_eq!(task(&run, "no")["state"], "skipped");
    // Its directory is its own, and gone.
    assert!(!std::path::Path::new(file("pwd").trim()).exists());
}

#[test]
fn outputs_that_are_no_regular_files_are_refused_by_name() {
    let place = Place::new();
    let outputs = json!({"outputs": {"o": "files"}});
    for (script, part) in [
        (
            "ln -s /etc/passwd $EMBERLINE_OUTPUT_O/secret",
            "`secret` is a symbolic link",
        ),
        (
            "ln -s /etc $EMBERLINE_OUTPUT_O/dir",
            "`dir` is a symbolic link",
        ),
        (
            "mkdir $EMBERLINE_OUTPUT_O/d; mkfifo $EMBERLINE_OUTPUT_O/d/pipe",
            "`d/pipe` is neither a file nor a directory",
        ),
        (
            "rmdir $EMBERLINE_OUTPUT_O; ln -s /etc/apt $EMBERLINE_OUTPUT_O",
            "the output `o` is no directory any more",
        ),
        ("rmdir $EMBERLINE_OUTPUT_O", "the output `o` is missing"),
        ("printf '[1]' > $EMBERLINE_RESULTS", "is no JSON object"),
        (
            "ln -s /etc/passwd $EMBERLINE_RESULTS",
            "is not a regular file",
        ),
        ("head -c 100000 /dev/zero > $EMBERLINE_RESULTS", "too large"),
    ] {
        let run = one(&place, &["sh", "-c", script], &outputs);
        failed(&place, &run, "user_error", part);
        let objects = outside::objects(&place.state());
        let leaked = objects
            .iter()
            .any(|o| fs::read(o).unwrap().starts_with(b"root:"));
        assert!(!leaked, "a file from outside was stored by `{script}`");
    }
    // Devices need more rights than some have.
    let script = "mknod $EMBERLINE_OUTPUT_O/zero c 1 5 || exit 77";
    let run = one(&place, &["sh", "-c", script], &outputs);
    let message = task(&run, "s")["failure"]["message"].as_str().unwrap();
    if message.contains("exit code 77") {
        eprintln!("not checked: this user may not make devices");
    } else {
        failed(
            &place,
            &run,
            "user_error",
            "`zero` is neither a file nor a directory",
        );
    }
    // The next one works, in the same place.
    let run = one(
        &place,
        &["sh", "-c", "echo fine > $EMBERLINE_OUTPUT_O/x"],
        &outputs,
    );
    assert_eq!(run["state"], "succeeded");
}

#[test]
fn files_of_a_stage_that_lead_out_or_are_none_are_refused_before_anything_is_made() {
    use std::os::unix::fs::symlink;
    let place = Place::new();
    let run = |file: &str| {
        let text = format!(
            "pipeline: f\nstages: {{ s: {{ kind: exec, with: {{ command: [cat, {file}], files: [{file}] }} }} }}\n"
        );
        place.write("f.yaml", text);
        place.emberline(&["run", "f.yaml"]).run()
    };
    symlink("/etc/passwd", place.path("link")).unwrap();
    symlink("/etc", place.path("etc")).unwrap();
    symlink("/dev/zero", place.path("zero")).unwrap();
    symlink("nowhere", place.path("dangling")).unwrap();
    symlink("loop", place.path("loop")).unwrap();
    fs::create_dir(place.path("directory")).unwrap();
    mknodat(CWD, place.path("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    for (file, part) in [
        (
            "link",
            "leads out of the pipeline's directory, to `/etc/passwd`",
        ),
        ("etc/passwd", "leads out of the pipeline's directory"),
        ("zero", "leads out of the pipeline's directory"),
        ("dangling", "No such file"),
        ("loop", "symbolic links"),
        ("directory", "is no regular file"),
        ("pipe", "is no regular file"),
        ("../x", "is not relative and plain"),
        ("/etc/passwd", "is not relative and plain"),
    ] {
        let refused = run(file).expect_code(2);
        assert_eq!(refused.errors().len(), 1, "{refused}");
        assert!(refused.errors()[0].contains(part), "{refused}");
        assert!(!refused.stderr.contains("root:"), "{refused}");
    }
    assert_eq!(place.json(&["runs", "list"]), Value::Array(Vec::new()));
    // A link that stays within is a file like any other.
    place.write("directory/real.txt", "fine\n");
    symlink("directory/real.txt", place.path("within")).unwrap();
    run("within").expect_code(0);
}
