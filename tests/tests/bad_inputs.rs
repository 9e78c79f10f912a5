//! Wrong and hostile inputs, through the binary as a user has it: one line for each mistake, that
//! says where; the right exit code; nothing half-made; and the next good run works.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fmt::Write as _,
    fs,
    time::{Duration, Instant},
};

use emberline_tests::{Place, outside, place::task};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

const GOOD: &str = "pipeline: good\nstages:\n  a: { kind: exec, outputs: { o: files }, with: { command: [sh, -c, 'echo fine > $EMBERLINE_OUTPUT_O/x'] } }\n";

/// A file that nobody has to wait for to be refused.
const SOON: Duration = Duration::from_secs(5);

/// The mistakes of a pipeline file: by `run`, which must refuse before anything is made, and the
/// same by `validate`.
fn mistakes(place: &Place, file: &str) -> Vec<String> {
    let started = Instant::now();
    let run = place.emberline(&["run", file]).run().expect_code(2);
    assert!(
        started.elapsed() < SOON,
        "{:?} for {file}",
        started.elapsed()
    );
    assert_eq!(run.stdout, "");
    let found: Vec<String> = run.errors().into_iter().map(str::to_owned).collect();
    assert!(!found.is_empty(), "{run}");
    let validate = place.emberline(&["validate", file]).run().expect_code(2);
    assert_eq!(validate.errors(), found);
    found
}

/// A good run works, in the state that is there, and it is the only one of its name.
fn good_run_works(place: &Place) {
    place.write("good.yaml", GOOD);
    let run = place.run("good.yaml");
    assert_eq!(run["state"], "succeeded", "{run:#}");
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn every_mistake_of_a_file_is_told_at_once_each_with_its_place() {
    let place = Place::new();
    let text = "\
pipeline: bad name
stages:
  a:
    kind: exce
  b:
    kind: exec
    with: { command: [true], comand: x }
    timeout: 5 parsecs
  c:
    kind: noop
    needs: [d, nobody]
  d:
    kind: noop
    needs: [c]
  e:
    kind: collect
    with: { sources: [ { url: 'file:x', sha256: 12 } ] }
    colour: red
  e: { kind: noop }
  ../f: { kind: noop }
";
    place.write("bad.yaml", text);
    let found = mistakes(&place, "bad.yaml");
    for line in &found {
        let mut parts = line.splitn(4, ':');
        assert_eq!(parts.next(), Some("bad.yaml"), "{line}");
        for part in [parts.next(), parts.next()] {
            assert!(part.unwrap().parse::<u32>().unwrap() >= 1, "{line}");
        }
    }
    let has = |beginning: &str, part: &str| {
        let here = found
            .iter()
            .any(|l| l.starts_with(beginning) && l.contains(part));
        assert!(here, "no `{beginning}…{part}` in {found:#?}");
    };
    has("bad.yaml:1:11:", "pipeline");
    has("bad.yaml:4:11:", "`exec`");
    has("bad.yaml:7:", "`command`");
    has("bad.yaml:8:14:", "timeout");
    has("bad.yaml:11:", "nobody");
    has("bad.yaml:", "c → d → c");
    has("bad.yaml:18:", "colour");
    has("bad.yaml:19:3:", "e");
    has("bad.yaml:20:3:", "../f");
    // Nothing was made for a file that is refused.
    assert!(!place.state().exists());
    good_run_works(&place);
}

#[test]
fn hostile_files_are_refused_soon_and_in_one_line() {
    let place = Place::new();
    let deep_flow = format!(
        "pipeline: {}x{}\nstages: {{}}\n",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    let mut deep_block = String::from("pipeline: p\nstages:\n");
    for depth in 1..500 {
        let _ = writeln!(deep_block, "{}a:", " ".repeat(depth));
    }
    let mut many = String::from("pipeline: p\nstages:\n");
    for n in 0..60_000 {
        let _ = writeln!(many, " s{n}: {{}}");
    }
    let bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\npipeline: p\nstages: { s: { kind: noop, needs: *c } }\n";
    for (name, content, part) in [
        (
            "anchors.yaml",
            bomb.as_bytes(),
            "anchors (`&name`) are not allowed",
        ),
        (
            "aliases.yaml",
            bomb.as_bytes(),
            "aliases (`*name`) are not allowed",
        ),
        (
            "tags.yaml",
            b"pipeline: !!python/object:os.system p\nstages: { s: { kind: noop } }\n",
            "tags (`!name`) are not allowed",
        ),
        (
            "merge.yaml",
            b"pipeline: p\nstages: { s: { <<: { kind: noop } } }\n",
            "<<",
        ),
        (
            "flow.yaml",
            deep_flow.as_bytes(),
            "recursion limit exceeded",
        ),
        ("block.yaml", deep_block.as_bytes(), "deep"),
        ("many.yaml", many.as_bytes(), "many.yaml:"),
        (
            "large.yaml",
            &vec![b'#'; 2 << 20],
            "the file has 2097152 bytes; at most 1048576 are read",
        ),
        (
            "latin.yaml",
            b"pipeline: p\ndescription: caf\xe9\nstages: { s: { kind: noop } }\n",
            "latin.yaml:2:",
        ),
        (
            "nul.yaml",
            b"pipeline: p\0q\nstages: { s: { kind: noop } }\n",
            "nul.yaml:1:",
        ),
        (
            "two.yaml",
            b"pipeline: p\nstages: { s: { kind: noop } }\n---\npipeline: q\n",
            "a second document begins here",
        ),
        ("empty.yaml", b"", "empty.yaml:1:1:"),
        ("list.yaml", b"[1, 2]\n", "list.yaml:1:1:"),
        (
            "broken.yaml",
            b"pipeline: p\nstages: { s: [ }\n",
            "this is no YAML",
        ),
        (
            "ansi.yaml",
            b"pipeline: \"p\\e[31m\\n\\u202Eq\"\nstages: { s: { kind: noop } }\n",
            "ansi.yaml:1:11:",
        ),
        (
            "secret.yaml",
            b"pipeline: p\nstages: { s: { kind: noop, with: {} , \"\\e]0;owned\\a\": 1 } }\n",
            "secret.yaml:2:",
        ),
    ] {
        place.write(name, content);
        let found = mistakes(&place, name);
        assert!(
            found.iter().any(|l| l.contains(part)),
            "no `{part}` in {found:#?}"
        );
        assert!(found.len() <= 101, "{} mistakes of {name}", found.len());
        for line in &found {
            let harmless = !line.contains(|c: char| c.is_control() || c == '\u{202e}');
            assert!(harmless && line.len() < 2000, "{line:?}");
        }
    }
    good_run_works(&place);
}

#[test]
fn a_file_that_is_none_is_refused_without_waiting_for_it() {
    let place = Place::new();
    fs::create_dir(place.path("directory")).unwrap();
    mknodat(CWD, place.path("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    for (file, part) in [
        (
            "directory",
            "`directory` is a directory: name the pipeline file in it",
        ),
        ("pipe", "`pipe` is no regular file"),
        ("/dev/zero", "`/dev/zero` is no regular file"),
        (
            "missing.yaml",
            "cannot read the pipeline file `missing.yaml`",
        ),
        ("no\nsuch\u{1b}[31m", r"`no\nsuch\u{1b}[31m`"),
    ] {
        let found = mistakes(&place, file);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(part), "{found:?}");
    }
    assert!(!place.state().exists());
    good_run_works(&place);
}

#[test]
fn wrong_arguments_leave_with_2() {
    let place = Place::new();
    place.write("good.yaml", GOOD);
    for arguments in [
        &["run"][..],
        &["run", "good.yaml", "--unknown"],
        &["frobnicate"],
        &["run", "good.yaml", "--param", "novalue"],
        &["run", "good.yaml", "--param", "nobody=1"],
        &["run", "good.yaml", "--detach"],
        &["artifacts", "gc", "--min-age", "soon"],
        &["runs", "show", "../../etc/passwd"],
        &["artifacts", "get", "../../etc/passwd"],
        &["artifacts", "ls", "r-1/../x"],
        &["dev", "--listen", "nowhere"],
    ] {
        let output = place.emberline(arguments).run().expect_code(2);
        assert!(output.stderr.starts_with("error: "), "{output}");
        assert!(!output.stderr.contains("panicked"), "{output}");
    }
    place.write("files.yaml", "pipeline: f\nstages: { s: { kind: exec, with: { command: [cat, x], files: [missing.txt] } } }\n");
    let missing = place.emberline(&["run", "files.yaml"]).run().expect_code(2);
    assert!(missing.errors()[0].contains("missing.txt"), "{missing}");
    // A secret that is given is neither stored nor shown.
    let keyed = "pipeline: k\nparams: { key: none }\nstages: { s: { kind: noop } }\n";
    place.write("keyed.yaml", keyed);
    let key = "AKIAIOSFODNN7EXAMPLE";
    let given = ["run", "keyed.yaml", "--param", &format!("key={key}")];
    let refused = place.emberline(&given).run().expect_code(2);
    let line = refused.errors()[0];
    assert!(line.contains("params.key: this looks like"), "{line}");
    assert!(!refused.stderr.contains(key), "{refused}");
    good_run_works(&place);
}

/// The pipeline of `init` over other data; gives the run.
fn over(place: &Place, data: impl AsRef<[u8]>) -> Value {
    if !place.path("pipeline.yaml").exists() {
        place.emberline(&["init", "."]).run().expect_code(0);
    }
    place.write("data.csv", data);
    place.run("pipeline.yaml")
}

/// The first stage that failed, why, and with which message. It is the run's failure too.
fn failure(run: &Value) -> (&str, &str, &str) {
    assert_eq!(run["state"], "failed", "{run:#}");
    let tasks = run["tasks"].as_array().unwrap();
    let failed = tasks.iter().find(|t| t["state"] == "failed").unwrap();
    let (reason, message) = (&failed["failure"]["reason"], &failed["failure"]["message"]);
    assert_eq!(&run["failure"]["reason"], reason);
    let message = message.as_str().unwrap();
    assert!(
        !message.contains('\n') && message.len() < 2100,
        "{message:?}"
    );
    (
        failed["task"].as_str().unwrap(),
        reason.as_str().unwrap(),
        message,
    )
}

#[test]
fn data_that_cannot_be_used_fails_the_run_with_reason_data_and_says_where() {
    let place = Place::new();
    place.emberline(&["init", "."]).run().expect_code(0);
    let given = fs::read_to_string(place.path("data.csv")).unwrap();
    let (head, body) = given.split_once('\n').unwrap();
    let first = body.lines().next().unwrap();
    let pressure = head.split(',').position(|c| c == "pressure").unwrap();
    let state = head.split(',').position(|c| c == "state").unwrap();
    let with = |row: &str, column: usize, value: &str| {
        let mut cells: Vec<&str> = row.split(',').collect();
        cells[column] = value;
        cells.join(",")
    };
    let every = |column: usize, value: &str| {
        let changed: Vec<String> = body.lines().map(|row| with(row, column, value)).collect();
        format!("{head}\n{}\n", changed.join("\n"))
    };
    let one =
        |column: usize, value: &str| format!("{head}\n{}\n{body}", with(first, column, value));
    let mut wide = (0..10_000)
        .map(|n| format!("c{n}"))
        .collect::<Vec<_>>()
        .join(",");
    wide += "\n1,2\n";
    let mut latin = given.clone().into_bytes();
    let at = latin.len() - 3;
    latin[at] = 0xe9;
    let long = format!("{head}\n{}\n", "9".repeat(40 << 20));
    let inputs: Vec<(&str, Vec<u8>, &str)> = vec![
        ("nothing", Vec::new(), "data.csv"),
        ("only a head", format!("{head}\n").into_bytes(), ""),
        ("one class", every(state, "healthy").into_bytes(), "state"),
        (
            "an unknown value of the label",
            every(state, "purple").into_bytes(),
            "state",
        ),
        ("no number", one(pressure, "high").into_bytes(), "pressure"),
        ("NaN", every(pressure, "NaN").into_bytes(), "pressure"),
        ("infinity", one(pressure, "inf").into_bytes(), "pressure"),
        (
            "a row that is too short",
            format!("{head}\n1\n{body}").into_bytes(),
            "data.csv",
        ),
        (
            "an open quote",
            format!("{given}\"open,1,2,3").into_bytes(),
            "data.csv",
        ),
        ("no text", latin, "data.csv"),
        ("ten thousand columns", wide.into_bytes(), ""),
        ("one endless line", long.into_bytes(), "data.csv"),
        (
            "a column twice",
            given.replacen("pressure", "state", 1).into_bytes(),
            "state",
        ),
    ];
    for (what, data, part) in inputs {
        let run = over(&place, data);
        let (stage, reason, message) = failure(&run);
        assert!(
            ["parts", "check", "train"].contains(&stage),
            "{what}: `{stage}` failed: {message}"
        );
        assert_eq!(reason, "data", "{what}: {message}");
        assert!(message.contains(part), "{what}: {message}");
        assert_eq!(task(&run, "deploy")["state"], "skipped", "{what}");
        outside::run_is_whole(&place.state(), &run);
    }
    assert_eq!(place.json(&["models", "list"]), Value::Array(Vec::new()));
    let run = over(&place, &given);
    assert_eq!(run["state"], "succeeded", "{run:#}");
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn a_label_that_only_the_test_part_has_is_told_apart() {
    let place = Place::new();
    let read = |value: &str| {
        format!(
            "value,label\n{}",
            (0..40)
                .map(|n| format!(
                    "{n},{}\n",
                    if n % 4 == 0 {
                        value
                    } else if n % 2 == 0 {
                        "a"
                    } else {
                        "b"
                    }
                ))
                .collect::<String>()
        )
    };
    place.write("train.csv", read("a"));
    place.write("test.csv", read("zebra"));
    let text = "\
pipeline: unseen
stages:
  raw: { kind: collect, with: { sources: [ { url: 'file:train.csv' } ] } }
  raw2: { kind: collect, with: { sources: [ { url: 'file:test.csv' } ] } }
  train-table: { kind: convert, inputs: { raw: raw.data } }
  test-table: { kind: convert, inputs: { raw: raw2.data } }
  train:
    kind: train
    inputs: { train: train-table.data, validation: train-table.data }
    with: { task: classification, label: label, model: { family: mlp, hidden: [4] }, epochs: 2, batch_size: 8, seed: 1 }
  evaluate:
    kind: evaluate
    inputs: { model: train.model, validation: train-table.data, test: test-table.data }
    with: { gates: { accuracy: '>= 0.1' } }
";
    place.write("unseen.yaml", text);
    let run = place.run("unseen.yaml");
    let (stage, reason, message) = failure(&run);
    assert_eq!((stage, reason), ("evaluate", "data"), "{message}");
    assert!(
        message.contains("zebra") && message.contains("label"),
        "{message}"
    );
}

#[test]
fn sources_that_are_not_what_was_promised_fail_the_run_in_one_line() {
    let place = Place::new();
    let collect = |url: &str, more: &str| {
        let text = format!(
            "pipeline: c\nstages: {{ raw: {{ kind: collect, retries: {{ faults: 0 }}, with: {{ sources: [ {{ url: {url:?}{more} }} ] }} }} }}\n"
        );
        place.write("c.yaml", text);
        place.run("c.yaml")
    };
    place.write("real.txt", "content\n");
    std::os::unix::fs::symlink("/etc/passwd", place.path("link")).unwrap();
    mknodat(CWD, place.path("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    fs::create_dir(place.path("empty")).unwrap();
    let wrong = format!(", sha256: {}", "f".repeat(64));
    for (url, more, reason, part) in [
        ("file:missing.csv", "", "user_error", "there is no file"),
        ("file:*.nothing", "", "user_error", "no file matches"),
        ("file:empty/", "", "user_error", "there is no file below"),
        ("file:real.txt", wrong.as_str(), "data", "real.txt"),
        ("file:link", "", "user_error", "a symbolic link"),
        ("file:pipe", "", "user_error", "not a regular file"),
        ("file:/dev/zero", "", "user_error", "not a regular file"),
    ] {
        let run = collect(url, more);
        let (stage, got, message) = failure(&run);
        assert_eq!((stage, got), ("raw", reason), "{url}: {message}");
        assert!(message.contains(part), "{url}: {message}");
        assert_eq!(task(&run, "raw")["outputs"], Value::Array(Vec::new()));
    }
    let digest = outside::sha256(b"content\n");
    let run = collect("file:real.txt", &format!(", sha256: {digest}"));
    assert_eq!(run["state"], "succeeded", "{run:#}");
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn what_a_command_says_reaches_the_terminal_only_escaped() {
    let place = Place::new();
    let text = r#"{"pipeline": "esc", "stages": {"s": {"kind": "exec", "with": {"command": ["sh", "-c", "printf 'x\\033[2J\\033]0;owned\\007\\n' >&2; exit 1"]}}}}"#;
    place.write("esc.yaml", text);
    let failed = place.emberline(&["run", "esc.yaml"]).run().expect_code(1);
    let id = failed
        .stdout
        .split("run ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned();
    let shown = place.emberline(&["runs", "show", &id]).run().expect_code(0);
    let logs = place.emberline(&["runs", "logs", &id]).run().expect_code(0);
    for output in [&failed, &shown, &logs] {
        assert!(!output.stdout.contains(['\u{1b}', '\u{7}']), "{output}");
        assert!(!output.stderr.contains(['\u{1b}', '\u{7}']), "{output}");
    }
    assert!(failed.stderr.contains(r"x\u{1b}[2J"), "{failed}");
    assert!(logs.stdout.contains(r"x\u{1b}[2J"), "{logs}");
}
