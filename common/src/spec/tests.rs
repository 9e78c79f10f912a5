//! The pipeline file from the outside: real ones are taken, wrong ones are told all their mistakes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use proptest::prelude::*;
use serde_json::{Map, json};

use super::*;

const MAINTENANCE: &str = include_str!("../../../examples/predictive-maintenance/pipeline.yaml");
const DIGITS: &str = include_str!("../../../examples/digits/pipeline.yaml");

fn check(text: &str) -> Vec<String> {
    let found = parse_pipeline("p.yaml", text, &Map::new())
        .err()
        .unwrap_or_default();
    found.iter().map(ToString::to_string).collect()
}

/// One stage `x` with these lines, below a `raw` collect stage.
fn with_stage(lines: &str) -> String {
    format!(
        "pipeline: p\nstages:\n  raw: {{kind: collect, with: {{sources: [{{url: 'file:a.csv'}}]}}}}\n  x:\n{}",
        lines
            .lines()
            .map(|l| format!("    {l}\n"))
            .collect::<String>()
    )
}

#[track_caller]
fn expect(text: &str, wanted: &[&str]) {
    let found = check(text);
    for wanted in wanted {
        assert!(
            found.iter().any(|f| f.contains(wanted)),
            "no `{wanted}` in {found:#?}"
        );
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
fn the_examples_are_taken() {
    for text in [MAINTENANCE, DIGITS] {
        assert_eq!(check(text), Vec::<String>::new());
    }
}

#[test]
fn parameters_are_filled_in_with_their_types() {
    let given = json!({"seed": 3}).as_object().cloned().unwrap();
    let checked = parse_pipeline("p.yaml", MAINTENANCE, &given).unwrap();
    assert_eq!(checked.spec.stages["train"].with["seed"], json!(3));
    assert_eq!(checked.params["seed"], json!(3));
    let unknown = json!({"sed": 3}).as_object().cloned().unwrap();
    let found = parse_pipeline("p.yaml", MAINTENANCE, &unknown).unwrap_err();
    assert!(
        found[0].to_string().contains("did you mean `seed`?"),
        "{found:?}"
    );
}

#[test]
fn every_mistake_is_told_at_once_with_place_and_suggestion() {
    let text = "pipeline: P!\nprioritty: 3\nstages:\n  raw:\n    kind: colect\n    with: {}\n  t:\n    kind: convert\n    inputs: {raw: rw.data}\n    timeout: 5\n    with:\n      split: {test: 2}\n";
    expect(
        text,
        &[
            "p.yaml:1:11: pipeline: `P!` is no pipeline name",
            "p.yaml:2:1: prioritty: unknown field `prioritty` (did you mean `priority`?)",
            "p.yaml:5:11: stages.raw.kind: unknown stage kind `colect` (did you mean `collect`?)",
            "p.yaml:9:19: stages.t.inputs.raw: there is no stage `rw` (did you mean `raw`?)",
            "p.yaml:10:14: stages.t.timeout: expected a text, found `5`",
            "p.yaml:12:21: stages.t.with.split.test: `2` must be at most 1",
            "p.yaml:12:14: stages.t.with.split: `test` and `validation` together",
        ],
    );
}

#[test]
fn an_unknown_kind_is_one_mistake_whoever_uses_its_stage() {
    let text = "pipeline: p\nstages:\n  raw: {kind: colect}\n  t: {kind: convert, inputs: {raw: raw.data}}\n";
    expect(text, &["unknown stage kind `colect`"]);
}

#[test]
fn a_cycle_is_printed_as_a_path() {
    let text = "pipeline: p\nstages:\n  a: {kind: noop, needs: [c]}\n  b: {kind: noop, needs: [a]}\n  c: {kind: noop, needs: [b]}\n  d: {kind: noop, needs: [d]}\n";
    let found = check(text);
    assert!(
        found.iter().any(|f| f.contains("a → b → c → a")
            || f.contains("b → c → a → b")
            || f.contains("c → a → b → c")),
        "{found:?}"
    );
    assert!(
        found.iter().any(|f| f.contains("cannot wait for itself")),
        "{found:?}"
    );
    assert_eq!(found.len(), 2, "{found:?}");
}

#[test]
fn types_between_stages_must_fit() {
    expect(
        &with_stage(
            "kind: train\ninputs: {train: raw.data}\nwith: {task: classification, label: y, model: {family: mlp}}",
        ),
        &["`raw.data` is of type files, needed is table (put a `convert` stage between them)"],
    );
    expect(
        &with_stage("kind: validate\ninputs: {dat: raw.data}"),
        &[
            "no input `dat` (did you mean `data`?)",
            "the input `data` is missing",
        ],
    );
    expect(
        &with_stage("kind: convert\ninputs: {raw: raw.dta}"),
        &["has no output `dta` (did you mean `data`?)"],
    );
    expect(
        &with_stage("kind: convert"),
        &["the stage has no input (e.g. `name: raw.data`)"],
    );
}

#[test]
fn gates_conditions_and_metrics_are_read_before_anything_runs() {
    let evaluate = "kind: evaluate\nwhen: raw.n > 1 and params.z == 1\ninputs: {model: m.model, test: raw.data}\nwith: {gates: {f2: '>= 1', f1: '=> 0.6'}}";
    let found = check(&with_stage(evaluate));
    for wanted in [
        "there is no stage `m`",
        "raw.data` is of type files",
        "there is no metric `f2` (did you mean `f1`?)",
        "`=> 0.6` is no gate",
        "`params.z` names no parameter",
    ] {
        assert!(
            found.iter().any(|f| f.contains(wanted)),
            "no `{wanted}` in {found:#?}"
        );
    }
    expect(
        &with_stage("kind: noop\nwhen: raw.n > 1"),
        &["does not wait for `raw` (add `needs: [raw]`)"],
    );
    expect(
        &with_stage("kind: noop\nwhen: 'raw.n >'\nneeds: [raw]"),
        &["column 8: a value is missing here"],
    );
}

#[test]
fn a_matrix_is_checked_with_its_values() {
    let good = "kind: exec\nmatrix: {n: [1, 2]}\nwith: {command: ['echo', 'a-${matrix.n}'], max_log: '${matrix.n}MiB'}";
    expect(&with_stage(good), &[]);
    let unknown = "kind: exec\nmatrix: {num: [1, 2]}\nwith: {command: ['echo', '${matrix.nun}']}";
    expect(&with_stage(unknown), &["did you mean `${matrix.num}`?"]);
    let wrong = "kind: exec\nmatrix: {n: [1, 2]}\nwith: {command: '${matrix.n}'}";
    expect(
        &with_stage(wrong),
        &["stages.x.with.command: expected a list, found `1`"],
    );
    let many = format!(
        "kind: noop\nmatrix: {{a: {0:?}, b: {0:?}}}",
        (0..200).collect::<Vec<_>>()
    );
    expect(&with_stage(&many), &["comes to 40000 tasks, at most 10000"]);
    let empty = "kind: noop\nmatrix: {a: []}";
    expect(&with_stage(empty), &["has no values"]);
}

#[test]
fn paths_and_urls_that_lead_out_are_refused() {
    let exec = "kind: exec\nwith: {command: [x], files: ['../a', '/etc/passwd', 'ok.py']}";
    expect(
        &with_stage(exec),
        &[
            "files[0]: the path `../a`",
            "files[1]: the path `/etc/passwd`",
        ],
    );
    let collect = "kind: collect\nwith:\n  sources:\n    - url: ftp://h/x\n    - url: 'https://u:p@h/x'\n    - url: 'https://h/x#y'\n    - url: data.csv\n    - {url: 'file:a', as: ../b}";
    expect(
        &with_stage(collect),
        &[
            "`ftp:` is not known",
            "user or password",
            "fragment",
            "has no scheme: write `file:data.csv`",
            "as: the path `../b`",
        ],
    );
}

#[test]
fn what_looks_like_a_secret_is_refused() {
    let text = "pipeline: p\nparams: {key: AKIAIOSFODNN7EXAMPLE}\nstages: {x: {kind: noop}}\n";
    expect(text, &["params.key: this looks like an AWS access key"]);
}

#[test]
fn tagged_unions_are_told_by_their_tag() {
    let train = |model: &str| {
        format!(
            "kind: train\ninputs: {{train: t.data}}\nwith: {{task: classification, label: y, model: {model}}}"
        )
    };
    let base = |x: &str| {
        with_stage(x).replace(
            "  x:\n",
            "  t: {kind: convert, inputs: {raw: raw.data}}\n  x:\n",
        )
    };
    expect(
        &base(&train("{family: mpl}")),
        &["`mpl` is not one of `mlp`, `cnn` (did you mean `mlp`?)"],
    );
    expect(
        &base(&train("{family: mlp, hiden: [3]}")),
        &["unknown field `hiden` (did you mean `hidden`?)"],
    );
    expect(
        &base(&train("{hidden: [3]}")),
        &["`family` is missing: one of `mlp`, `cnn`"],
    );
    expect(&base(&train("mlp")), &["expected a map with `family`"]);
    expect(&base(&train("{family: cnn}")), &["`image` is missing"]);
}

#[test]
fn hostile_names_come_out_as_one_clean_line() {
    for name in [
        "",
        "../x",
        "a\\nb",
        "a\\0b",
        "\\e[31m",
        "ä",
        // Cyrillic.
        "х",
        &"n".repeat(10_000),
    ] {
        let text = format!("pipeline: p\nstages:\n  \"{name}\": {{kind: noop}}\n");
        let found = check(&text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].len() < 400 && !found[0].chars().any(char::is_control),
            "{found:?}"
        );
    }
}

#[test]
fn a_byte_order_mark_and_line_ends_of_windows_are_taken_and_half_a_character_is_not() {
    let text = "\u{feff}pipeline: p\r\nstages:\r\n  a: {kind: noop}\r\n";
    expect(text, &[]);
    // Lines are counted as in an editor.
    expect(
        &text.replace("noop", "nop"),
        &["p.yaml:3:13: stages.a.kind: unknown stage kind `nop`"],
    );
    for half in ["\\ud800", "\\udfff", "\\U0000d800", "\\U00110000"] {
        let found = check(&format!(
            "pipeline: p\ndescription: \"{half}\"\nstages: {{a: {{kind: noop}}}}\n"
        ));
        assert_eq!(found.len(), 1, "{half}: {found:?}");
        assert!(found[0].starts_with("p.yaml:2:"), "{half}: {found:?}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_it_panic_and_every_place_is_in_the_text(text in "\\PC{0,200}") {
        for found in parse_pipeline("p", &text, &Map::new()).err().unwrap_or_default() {
            prop_assert!(found.line as usize <= text.lines().count() + 1, "{found}");
        }
    }

    #[test]
    fn a_damaged_real_pipeline_never_makes_it_panic(at in 0..MAINTENANCE.len(), cut in 0_usize..40, put in "[\\PC\n ]{0,8}") {
        let start = (0..=at).rev().find(|i| MAINTENANCE.is_char_boundary(*i)).unwrap_or(0);
        let end = (start + cut..=MAINTENANCE.len()).find(|i| MAINTENANCE.is_char_boundary(*i)).unwrap_or(MAINTENANCE.len());
        let text = format!("{}{put}{}", &MAINTENANCE[..start], &MAINTENANCE[end..]);
        for found in parse_pipeline("p", &text, &Map::new()).err().unwrap_or_default() {
            prop_assert!(found.line as usize <= text.lines().count() + 1, "{found}");
            prop_assert!(!found.to_string().contains('\n'), "{found:?}");
        }
    }
}
