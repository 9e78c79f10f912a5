//! Kills, signals, and what is left afterwards: an acknowledged run ends, what was finished is not
//! done again, nothing is committed twice.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{collections::BTreeMap, fs, path::Path};

use emberline_tests::{Dev, Place, outside, place::task, processes, seconds, wait_for};
use rustix::process::Signal;
use serde_json::Value;

/// The pipeline of `init`, with a training that takes long enough to be killed in.
fn long_training(place: &Place, epochs: u32) {
    place.emberline(&["init", "."]).run().expect_code(0);
    let text = fs::read_to_string(place.path("pipeline.yaml")).unwrap();
    let settings = format!("epochs: {epochs}\n      checkpoint_every: 100ms");
    let changed = text.replace("epochs: 30", &settings);
    assert_ne!(text, changed);
    place.write("pipeline.yaml", changed);
}

/// The run whose acknowledgement is on the command's standard error.
fn run_of(stderr: &str) -> Option<String> {
    let line = stderr.lines().find(|l| l.starts_with("run r-"))?;
    line.split(' ').nth(1).map(str::to_owned)
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_training_that_was_killed_goes_on_and_finished_tasks_are_not_repeated() {
    let undisturbed = Place::new();
    long_training(&undisturbed, 600);
    let expected = undisturbed.run("pipeline.yaml");

    let place = Place::new();
    long_training(&place, 600);
    let mut process = place.emberline(&["run", "pipeline.yaml"]).start();
    let id = wait_for("a run", seconds(20), || run_of(&process.stderr()));
    let checkpoint = place
        .state()
        .join(format!("objects/checkpoints/{id}/train"));
    wait_for("a checkpoint", seconds(30), || {
        assert!(
            !process.has_ended(),
            "it was faster than the test: {}",
            process.stderr()
        );
        checkpoint.exists().then_some(())
    });
    process.kill();

    let resumed = place
        .emberline(&["run", "pipeline.yaml", "--resume", &id, "-o", "json", "-q"])
        .run()
        .expect_code(0)
        .json();
    assert_eq!(resumed["run"], id.as_str());
    assert_eq!(resumed["state"], "succeeded");
    for name in ["raw", "parts", "check"] {
        assert_eq!(task(&resumed, name)["attempt"], 1, "{name} was done again");
        let outputs = |run| task(run, name)["outputs"].clone();
        assert_eq!(outputs(&resumed), outputs(&expected), "{name}");
    }
    assert_eq!(task(&resumed, "train")["attempt"], 2);
    // The second attempt went on from the checkpoint, to the same weights bit for bit.
    let log = outside::log(&place.state(), &id, "train", 2).unwrap();
    assert!(log.is_sealed);
    let first_epoch = log.lines.iter().find(|l| l.starts_with("epoch")).unwrap();
    assert!(!first_epoch.starts_with("epoch 1/"), "{first_epoch}");
    let model = |run| task(run, "train")["outputs"][0]["manifest"].clone();
    assert_eq!(model(&resumed), model(&expected));
    outside::run_is_whole(&place.state(), &resumed);

    // What the lost attempt wrote is there, and said to be cut.
    let cut = outside::log(&place.state(), &id, "train", 1);
    assert!(cut.is_none_or(|log| !log.is_sealed));
    let other = place.write(
        "other.yaml",
        "pipeline: other\nstages: { a: { kind: noop } }\n",
    );
    let other = other.to_str().unwrap();
    let wrong = place
        .emberline(&["run", other, "--resume", &id])
        .run()
        .expect_code(2);
    assert!(
        wrong.errors()[0].contains("is of pipeline `pumps`, not of `other`"),
        "{wrong}"
    );
}

/// Tasks in `width` chains, each of which writes down when it begins and when it ends.
fn journal_pipeline(place: &Place, width: usize, length: usize) -> std::path::PathBuf {
    let journal = place.path("journal");
    let mut text = String::from("pipeline: journal\nstages:\n");
    for chain in 0..width {
        for step in 0..length {
            let needs = match step {
                0 => String::new(),
                _ => format!("needs: [t{chain}-{}], ", step - 1),
            };
            text += &format!(
                "  t{chain}-{step}: {{ kind: exec, cache: false, {needs}outputs: {{ out: files }}, resources: {{ cpu: 0.1 }}, retries: {{ lost_workers: 100 }}, with: {{ command: [sh, work.sh], files: [work.sh] }} }}\n"
            );
        }
    }
    let script = format!(
        "echo \"begin $EMBERLINE_TASK $EMBERLINE_ATTEMPT\" >> {0}\necho \"$EMBERLINE_TASK $EMBERLINE_ATTEMPT $$\" | tee \"$EMBERLINE_OUTPUT_OUT/who\"\necho \"end $EMBERLINE_TASK $EMBERLINE_ATTEMPT\" >> {0}\n",
        journal.display()
    );
    place.write("work.sh", script);
    place.write("journal.yaml", text);
    journal
}

/// Each task has committed once: what it is credited with was made by the attempt that is told,
/// and no task began again after it was seen as done.
fn tasks_committed_once(place: &Place, run: &Value) {
    for task in run["tasks"].as_array().unwrap() {
        let (name, attempt) = (task["task"].as_str().unwrap(), &task["attempt"]);
        assert_eq!(task["state"], "succeeded", "{name}");
        let files = outside::artifact(
            &place.state(),
            task["outputs"][0]["manifest"].as_str().unwrap(),
        );
        let who = String::from_utf8(files[0].1.clone()).unwrap();
        assert!(
            who.starts_with(&format!("{name} {attempt} ")),
            "{who} for attempt {attempt}"
        );
        // The log that is shown is that attempt's too.
        let log = outside::log(
            &place.state(),
            run["run"].as_str().unwrap(),
            name,
            attempt.as_u64().unwrap(),
        );
        assert_eq!(log.unwrap().lines, [who.trim_end()]);
    }
}

#[test]
fn kills_at_any_moment_lose_no_run_and_commit_no_task_twice() {
    let place = Place::new();
    let journal = journal_pipeline(&place, 4, 12);
    let mut process = place.emberline(&["run", "journal.yaml"]).start();
    let id = wait_for("a run", seconds(20), || run_of(&process.stderr()));
    // What was seen as done, with its attempt and its outputs.
    let mut done: BTreeMap<String, (Value, Value)> = BTreeMap::new();
    let mut steps = 3_u32;
    for kill in 0.. {
        let before = lines(&journal).len();
        // At a moment that differs from kill to kill, counted in what has happened by then.
        steps = (steps * 7 + 5) % 17;
        let mut seed = u64::from(steps);
        wait_for("progress", seconds(30), || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let far = lines(&journal).len() >= before + steps as usize;
            (process.has_ended() || (far && seed >> 62 == 0)).then_some(())
        });
        if process.has_ended() {
            break;
        }
        process.kill();
        assert!(kill < 100, "it does not get on");
        // Without workers, only looking: nothing that was done is undone.
        let run = place.json(&["runs", "show", &id]);
        for (name, (attempt, outputs)) in &done {
            let task = task(&run, name);
            assert_eq!(task["state"], "succeeded", "{name}");
            assert_eq!(
                (&task["attempt"], &task["outputs"]),
                (attempt, outputs),
                "{name}"
            );
        }
        for task in run["tasks"].as_array().unwrap() {
            if task["state"] == "succeeded" {
                let name = task["task"].as_str().unwrap().to_owned();
                done.insert(name, (task["attempt"].clone(), task["outputs"].clone()));
            }
        }
        outside::every_object_hashes_to_its_name(&place.state());
        process = place
            .emberline(&["run", "journal.yaml", "--resume", &id])
            .start();
    }
    process.finish().expect_code(0);
    let run = place.json(&["runs", "show", &id]);
    assert_eq!(run["state"], "succeeded");
    tasks_committed_once(&place, &run);
    outside::run_is_whole(&place.state(), &run);
    assert!(done.len() > 5, "the kills were too late to mean anything");
    // A task that ran in one attempt only has begun once, and after all that it waits for has ended.
    let journal = lines(&journal);
    for task in run["tasks"].as_array().unwrap() {
        let (name, attempt) = (task["task"].as_str().unwrap(), &task["attempt"]);
        let begun = journal
            .iter()
            .filter(|l| l.starts_with(&format!("begin {name} ")));
        assert!(begun.count() as u64 <= attempt.as_u64().unwrap(), "{name}");
        let begin = journal
            .iter()
            .position(|l| *l == format!("begin {name} {attempt}"))
            .unwrap();
        for needed in task["needs"].as_array().unwrap() {
            let end = format!("end {} ", needed.as_str().unwrap());
            let end = journal.iter().position(|l| l.starts_with(&end)).unwrap();
            assert!(end < begin, "{name} began before {needed} had ended");
        }
    }
    assert!(processes::of_attempts_below(&place.dir()).is_empty());
}

#[test]
fn a_killed_process_leaves_no_command_behind_and_its_log_says_so() {
    let place = Place::new();
    place.write(
        "p.yaml",
        "pipeline: endless\nstages:\n  wait:\n    kind: exec\n    with: { command: [sh, -c, 'echo started; sleep 1000'] }\n",
    );
    let process = place.emberline(&["run", "p.yaml"]).start();
    let id = wait_for("a run", seconds(20), || run_of(&process.stderr()));
    wait_for("the command's first line is stored", seconds(20), || {
        outside::log(&place.state(), &id, "wait", 1)
    });
    assert!(!processes::of_attempts_below(&place.dir()).is_empty());
    process.kill();
    wait_for("the command is gone", seconds(10), || {
        processes::of_attempts_below(&place.dir())
            .is_empty()
            .then_some(())
    });
    let cancelled = place
        .emberline(&["runs", "cancel", &id])
        .run()
        .expect_code(0);
    assert!(cancelled.stdout.contains(&id), "{cancelled}");
    let run = place.json(&["runs", "show", &id]);
    assert_eq!(run["state"], "cancelled", "{run:#}");
    let log = place
        .emberline(&["runs", "logs", &id, "--task", "wait", "--attempt", "1"])
        .run()
        .expect_code(0);
    assert!(log.stdout.contains("started"), "{log}");
    assert!(
        log.stdout
            .contains("truncated at line 1: the worker was lost"),
        "{log}"
    );
}

#[test]
fn the_first_interrupt_cancels_the_run_and_leaves_with_130() {
    let place = Place::new();
    place.write(
        "p.yaml",
        "pipeline: endless\nstages:\n  wait:\n    kind: exec\n    with: { command: [sh, -c, 'echo started; sleep 1000 & wait'] }\n  after: { kind: noop, needs: [wait] }\n",
    );
    let process = place.emberline(&["run", "p.yaml"]).start();
    let id = wait_for("a run", seconds(20), || run_of(&process.stderr()));
    wait_for("the command runs", seconds(20), || {
        (!processes::of_attempts_below(&place.dir()).is_empty()).then_some(())
    });
    process.signal(Signal::INT);
    let left = process.finish().expect_code(130);
    let last = left.stderr.lines().last().unwrap();
    assert_eq!(last, format!("error: run `{id}` was cancelled"), "{left}");
    assert!(processes::of_attempts_below(&place.dir()).is_empty());
    let run = place.json(&["runs", "show", &id]);
    assert_eq!(run["state"], "cancelled");
    assert_eq!(run["failure"]["message"], "interrupted by Ctrl-C");
    assert_eq!(task(&run, "wait")["state"], "cancelled");
    assert_eq!(task(&run, "wait")["failure"]["reason"], "cancelled");
    assert_ne!(task(&run, "after")["state"], "succeeded");
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn a_cluster_that_is_terminated_stops_in_order_and_its_runs_go_on_later() {
    let place = Place::new();
    let gate = place.path("gate");
    place.write(
        "p.yaml",
        format!(
            "pipeline: gated\nstages:\n  first: {{ kind: exec, outputs: {{ o: files }}, with: {{ command: [sh, -c, 'echo $EMBERLINE_ATTEMPT > $EMBERLINE_OUTPUT_O/a'] }} }}\n  wait:\n    kind: exec\n    needs: [first]\n    with: {{ command: [sh, -c, 'until [ -e {} ]; do sleep 0.02; done'] }}\n",
            gate.display()
        ),
    );
    let dev = Dev::start(&place);
    let detached = place
        .emberline(&["run", "p.yaml", "--detach"])
        .run()
        .expect_code(0);
    let id = detached.stdout.trim();
    wait_for("the second task runs", seconds(20), || {
        let run = place.json(&["runs", "show", id]);
        (task(&run, "wait")["state"] == "running").then_some(())
    });
    let stopped = dev.stop().expect_code(0);
    assert!(
        stopped
            .stdout
            .contains("emberline serves on http://127.0.0.1:"),
        "{stopped}"
    );
    assert!(!place.state().join("cluster.json").exists());
    assert!(processes::of_attempts_below(&place.dir()).is_empty());

    fs::write(&gate, "").unwrap();
    let dev = Dev::start(&place);
    let watched = place.emberline(&["runs", "watch", id]).run().expect_code(0);
    assert!(watched.stdout.contains("succeeded"), "{watched}");
    let run = place.json(&["runs", "show", id]);
    assert_eq!(task(&run, "first")["attempt"], 1, "it was done again");
    outside::run_is_whole(&place.state(), &run);
    dev.stop().expect_code(0);
}

#[test]
fn one_state_directory_has_one_cluster_and_others_are_its_clients() {
    let place = Place::new();
    place.write("p.yaml", "pipeline: p\nstages: { a: { kind: noop } }\n");
    let dev = Dev::start(&place);
    let second = place
        .emberline(&["dev", "--listen", "127.0.0.1:0"])
        .run()
        .expect_code(3);
    assert_eq!(second.errors().len(), 1, "{second}");
    // A client of the first, not a cluster of its own.
    let run = place.run("p.yaml");
    assert_eq!(run["state"], "succeeded");
    dev.kill();
    // What a killed one left behind misleads nobody.
    assert!(place.state().join("cluster.json").exists());
    let run = place.run("p.yaml");
    assert_eq!(run["state"], "succeeded");
    let open = place
        .emberline(&["dev", "--listen", "0.0.0.0:0"])
        .run()
        .expect_code(2);
    assert!(open.errors()[0].contains("loopback"), "{open}");
    let nobody = place
        .emberline(&["runs", "list", "--server", "http://127.0.0.1:1"])
        .run()
        .expect_code(3);
    assert!(
        nobody.errors()[0].starts_with("cannot reach the coordinator at"),
        "{nobody}"
    );
}

#[test]
fn the_second_interrupt_leaves_at_once_and_the_run_can_be_ended_later() {
    let place = Place::new();
    // It takes its time when it is asked to stop.
    place.write(
        "p.yaml",
        "pipeline: stubborn\nstages:\n  wait:\n    kind: exec\n    with: { command: [sh, -c, 'trap \"\" TERM; while :; do sleep 0.05; done'] }\n",
    );
    let process = place.emberline(&["run", "p.yaml"]).start();
    let id = wait_for("a run", seconds(20), || run_of(&process.stderr()));
    wait_for("the command runs", seconds(20), || {
        (!processes::of_attempts_below(&place.dir()).is_empty()).then_some(())
    });
    process.signal(Signal::INT);
    wait_for("the cancellation", seconds(20), || {
        process
            .stderr()
            .contains("press Ctrl-C again")
            .then_some(())
    });
    process.signal(Signal::INT);
    let left = process.finish().expect_code(130);
    let last = left.stderr.lines().last().unwrap();
    assert_eq!(last, format!("error: left; run `{id}` is not finished"));
    wait_for("the command is gone", seconds(10), || {
        processes::of_attempts_below(&place.dir())
            .is_empty()
            .then_some(())
    });
    let resumed = place
        .emberline(&["run", "p.yaml", "--resume", &id])
        .run()
        .expect_code(1);
    assert!(resumed.stdout.contains("was cancelled"), "{resumed}");
    assert_eq!(place.json(&["runs", "show", &id])["state"], "cancelled");
}

#[test]
fn a_run_that_was_acknowledged_survives_a_kill_right_after() {
    let place = Place::new();
    place.write(
        "p.yaml",
        "pipeline: acknowledged\nparams: { n: 0 }\nstages:\n  a: { kind: exec, outputs: { o: files }, with: { command: [sh, -c, 'echo ${params.n} > $EMBERLINE_OUTPUT_O/n'] } }\n  b: { kind: noop, needs: [a] }\n",
    );
    let mut acknowledged = Vec::new();
    for round in 0..6 {
        let dev = Dev::start(&place);
        for n in 0..3 {
            let param = format!("n={}", round * 3 + n);
            let answer = place
                .emberline(&["run", "p.yaml", "--detach", "--param", &param])
                .run()
                .expect_code(0);
            acknowledged.push((answer.stdout.trim().to_owned(), round * 3 + n));
        }
        dev.kill();
    }
    let dev = Dev::start(&place);
    for (id, n) in &acknowledged {
        place.emberline(&["runs", "watch", id]).run().expect_code(0);
        let run = place.json(&["runs", "show", id]);
        assert_eq!(run["state"], "succeeded", "{run:#}");
        let made = task(&run, "a")["outputs"][0]["manifest"].as_str().unwrap();
        let files = outside::artifact(&place.state(), made);
        assert_eq!(files, [("n".to_owned(), format!("{n}\n").into_bytes())]);
        outside::run_is_whole(&place.state(), &run);
    }
    let all = place.json(&["runs", "list", "--limit", "100"]);
    assert_eq!(
        all.as_array().unwrap().len(),
        acknowledged.len(),
        "a run was made twice"
    );
    dev.stop().expect_code(0);
}

#[test]
fn what_had_left_its_group_before_a_kill_is_ended_by_the_next_start() {
    let place = Place::new();
    place.write(
        "p.yaml",
        "pipeline: daemons\nstages:\n  s: { kind: exec, with: { command: [sh, -c, 'setsid sleep 1000 & wait'] } }\n",
    );
    let process = place.emberline(&["run", "p.yaml"]).start();
    let id = wait_for("a run", seconds(20), || run_of(&process.stderr()));
    wait_for("both processes", seconds(20), || {
        (processes::of_attempts_below(&place.dir()).len() == 2).then_some(())
    });
    process.kill();
    place
        .emberline(&["runs", "cancel", &id])
        .run()
        .expect_code(0);
    place.write(
        "noop.yaml",
        "pipeline: noop\nstages: { a: { kind: noop } }\n",
    );
    assert_eq!(place.run("noop.yaml")["state"], "succeeded");
    assert!(processes::of_attempts_below(&place.dir()).is_empty());
}
