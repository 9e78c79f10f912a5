//! `validate`: what each rule finds and says, and the two measures of drift against figures that were
//! computed by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use emberline_common::{failure::Reason, spec::ArtifactType};
use emberline_data::{
    Convert, Validate,
    schema::{BatchBuilder, ColumnDef, ColumnType, Schema, Value},
    write::TableWriter,
};
use emberline_worker::{
    documents::{ColumnDrift, RuleFailure, VALIDATION_FILE, Validation},
    stage::{Stage, StageError},
    testing::TestContext,
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use ColumnType::{Float, Integer, Text};

fn table(columns: &[(&str, ColumnType)], rows: &[Vec<Value<'_>>]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let columns = columns.iter().map(|(name, column_type)| ColumnDef {
        name: (*name).to_owned(),
        column_type: *column_type,
    });
    let schema = Schema {
        columns: columns.collect(),
    };
    let mut builder = BatchBuilder::new(&schema);
    let mut writer = TableWriter::create(dir.path(), &schema).unwrap();
    for row in rows {
        for (place, value) in row.iter().enumerate() {
            builder.push(place, *value);
        }
        builder.end_row();
    }
    writer.push(&builder.take().unwrap()).unwrap();
    writer.finish().unwrap();
    dir
}

/// A table of one column of floats.
fn floats(values: impl IntoIterator<Item = f64>) -> TempDir {
    let rows: Vec<_> = values.into_iter().map(|v| vec![Value::Float(v)]).collect();
    table(&[("x", Float)], &rows)
}

/// A table of one column of texts.
fn texts(values: &[&str]) -> TempDir {
    let rows: Vec<_> = values.iter().map(|v| vec![Value::Text(v)]).collect();
    table(&[("x", Text)], &rows)
}

/// What was found, and the error if there is one.
fn validate(data: &Path, reference: Option<&Path>, spec: Json) -> (Validation, Option<StageError>) {
    let mut builder = TestContext::builder()
        .spec(spec)
        .input("data", ArtifactType::Table, data);
    if let Some(reference) = reference {
        builder = builder.input("reference", ArtifactType::Table, reference);
    }
    let test = builder.build();
    let result = Validate.run(&test.ctx);
    let (artifacts, error) = match result {
        Ok(output) => {
            assert!(output.results["rules"].as_u64().unwrap() > 0);
            (output.artifacts, None)
        }
        Err(mut error) => (std::mem::take(&mut error.outputs), Some(error)),
    };
    let path = test.output(&artifacts, "validation").join(VALIDATION_FILE);
    let found: Validation = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(found.passed, found.failures.is_empty());
    (found, error)
}

fn holds(data: &TempDir, spec: Json) {
    let (found, error) = validate(data.path(), None, spec);
    assert!(error.is_none() && found.passed, "{:?}", found.failures);
}

/// The one rule that fails.
#[track_caller]
fn fails(data: &TempDir, spec: Json) -> RuleFailure {
    let (found, error) = validate(data.path(), None, spec);
    let error = error.expect("a rule fails the stage");
    assert_eq!(error.reason, Reason::Data, "{error}");
    assert!(!error.message.contains('\n'), "{error}");
    let [failure] = &found.failures[..] else {
        panic!("one rule fails: {:?}", found.failures);
    };
    assert!(error.message.contains(&failure.message), "{error}");
    failure.clone()
}

fn rows_of(failure: &RuleFailure) -> Vec<u64> {
    failure.examples.iter().map(|e| e.row).collect()
}

#[test]
fn ranges_count_the_rows_that_break_them_and_show_the_first() {
    let data = floats([1.0, 250.5, 3.0, 999.0, -4.0]);
    holds(&data, json!({"columns": {"x": {"min": -4, "max": 999}}}));
    let above = fails(&data, json!({"columns": {"x": {"max": 200}}}));
    assert_eq!(above.rule, "columns.x.max");
    assert_eq!(above.column.as_deref(), Some("x"));
    assert_eq!(above.count, 2);
    assert_eq!(rows_of(&above), [1, 3]);
    assert_eq!(above.examples[0].values["x"], json!(250.5));
    assert!(above.message.contains("2 of 5 values are above 200"));
    assert!(above.message.contains("the farthest is 999"));
    let below = fails(&data, json!({"columns": {"x": {"min": 0}}}));
    assert_eq!((below.count, rows_of(&below)), (1, vec![4]));
    let none = fails(&texts(&["a"]), json!({"columns": {"x": {"min": 0}}}));
    assert!(none.message.contains("`x` is text"), "{}", none.message);
}

#[test]
fn at_most_so_many_examples_are_kept() {
    let data = floats((0..50).map(f64::from));
    let spec = |examples: u32| json!({"columns": {"x": {"max": 10}}, "examples": examples});
    let few = fails(&data, spec(3));
    assert_eq!((few.count, rows_of(&few)), (39, vec![11, 12, 13]));
    assert!(fails(&data, spec(0)).examples.is_empty());
}

#[test]
fn nulls_are_refused_above_their_share() {
    let values = [
        Value::Float(1.0),
        Value::Null,
        Value::Float(2.0),
        Value::Null,
    ];
    let rows: Vec<_> = values.iter().map(|v| vec![*v]).collect();
    let data = table(&[("x", Float)], &rows);
    holds(&data, json!({"columns": {"x": {"max_null_fraction": 0.5}}}));
    let many = fails(&data, json!({"columns": {"x": {"max_null_fraction": 0.4}}}));
    assert_eq!(many.rule, "columns.x.max_null_fraction");
    assert_eq!((many.count, rows_of(&many)), (2, vec![1, 3]));
    // Without a rule, none is allowed.
    assert_eq!(fails(&data, json!({"columns": {"x": {}}})).count, 2);
}

#[test]
fn nan_and_infinities_are_refused_unless_allowed() {
    let data = floats([1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
    holds(&data, json!({"columns": {"x": {"allow_non_finite": true}}}));
    let bad = fails(&data, json!({"columns": {"x": {}}}));
    assert_eq!(bad.rule, "columns.x.allow_non_finite");
    assert_eq!((bad.count, rows_of(&bad)), (3, vec![1, 2, 3]));
}

#[test]
fn values_that_are_not_allowed_are_named() {
    let data = texts(&["L", "M", "X\ny", "H", "X\ny"]);
    holds(
        &data,
        json!({"columns": {"x": {"allowed": ["L", "M", "H", "X\ny"]}}}),
    );
    let bad = fails(
        &data,
        json!({"columns": {"x": {"allowed": ["L", "M", "H"]}}}),
    );
    assert_eq!((bad.rule.as_str(), bad.count), ("columns.x.allowed", 2));
    assert!(bad.message.contains("`X y`"), "{}", bad.message);
    let rows: Vec<_> = [0, 1, 2].map(|v| vec![Value::Integer(v)]).to_vec();
    let labels = table(&[("x", Integer)], &rows);
    holds(&labels, json!({"columns": {"x": {"allowed": [0, 1, 2.0]}}}));
    let third = fails(&labels, json!({"columns": {"x": {"allowed": [0, 1]}}}));
    assert_eq!(rows_of(&third), [2]);
}

#[test]
fn a_type_that_is_another_is_named() {
    let data = texts(&["1"]);
    holds(&data, json!({"columns": {"x": {"type": "text"}}}));
    let other = fails(&data, json!({"columns": {"x": {"type": "float"}}}));
    assert_eq!(other.message, "`x` is text, not float");
}

#[test]
fn what_stands_twice_is_found_alone_and_as_a_set() {
    let rows = [(1, "a"), (2, "a"), (1, "b"), (1, "a")];
    let rows: Vec<_> = rows
        .iter()
        .map(|(n, t)| vec![Value::Integer(*n), Value::Text(t)])
        .collect();
    let data = table(&[("n", Integer), ("t", Text)], &rows);
    let alone = fails(&data, json!({"columns": {"n": {"unique": true}}}));
    assert_eq!(
        (alone.rule.as_str(), rows_of(&alone)),
        ("columns.n.unique", vec![2, 3])
    );
    let set = fails(&data, json!({"unique": [["n", "t"]]}));
    assert_eq!((set.rule.as_str(), rows_of(&set)), ("unique[0]", vec![3]));
    let unknown = fails(&data, json!({"unique": [["n", "tt"]]}));
    assert!(
        unknown.message.contains("no column `tt`"),
        "{}",
        unknown.message
    );
    let first = table(&[("n", Integer), ("t", Text)], &rows[..3]);
    holds(&first, json!({"unique": [["n", "t"]]}));
}

#[test]
fn a_label_of_one_class_and_a_constant_column_are_refused() {
    let data = texts(&["no", "no", "no"]);
    let one = fails(&data, json!({"columns": {"x": {"min_distinct": 2}}}));
    assert_eq!(
        one.message,
        "`x` has 1 different values, at least 2 are wanted"
    );
    holds(
        &texts(&["no", "yes"]),
        json!({"columns": {"x": {"min_distinct": 2}}}),
    );
}

#[test]
fn counts_of_rows_are_bounded_on_both_sides() {
    let data = floats([1.0, 2.0, 3.0]);
    holds(&data, json!({"min_rows": 3, "max_rows": 3}));
    assert_eq!(
        fails(&data, json!({"min_rows": 4})).message,
        "3 rows, at least 4 are wanted"
    );
    assert_eq!(
        fails(&data, json!({"max_rows": 2})).message,
        "3 rows, at most 2 are wanted"
    );
    // Without a word about it, an empty table is refused.
    assert_eq!(fails(&floats([]), json!({})).rule, "min_rows");
}

#[test]
fn columns_that_are_missing_forbidden_or_unknown_are_named() {
    let data = table(
        &[("torque", Float), ("TWF", Integer)],
        &[vec![Value::Float(1.0), Value::Integer(0)]],
    );
    let missing = fails(&data, json!({"columns": {"torqe": {}}}));
    assert!(
        missing.message.contains("`torque`"),
        "a suggestion: {}",
        missing.message
    );
    holds(&data, json!({"columns": {"torqe": {"optional": true}}}));
    let leak = fails(
        &data,
        json!({"forbidden_columns": {"TWF": "it says the answer"}}),
    );
    assert_eq!(leak.rule, "forbidden_columns.TWF");
    assert_eq!(
        leak.message,
        "the column `TWF` must not be there: it says the answer"
    );
    let other = fails(
        &data,
        json!({"columns": {"torque": {}}, "allow_other_columns": false}),
    );
    assert!(other.message.contains("`TWF`"), "{}", other.message);
}

#[test]
fn every_failed_rule_is_told_and_a_warning_lets_the_run_go_on() {
    let data = floats([1.0, f64::NAN, 7.0, 7.0]);
    let spec = json!({
        "min_rows": 10, "on_failure": "warn",
        "columns": {"x": {"max": 5, "unique": true}},
    });
    let (found, error) = validate(data.path(), None, spec);
    assert!(error.is_none());
    let rules: Vec<_> = found.failures.iter().map(|f| f.rule.as_str()).collect();
    let wanted = [
        "min_rows",
        "columns.x.allow_non_finite",
        "columns.x.max",
        "columns.x.unique",
    ];
    assert_eq!(rules, wanted);
    assert!(!found.passed);
}

fn drift(data: &TempDir, reference: &TempDir, spec: Json) -> (ColumnDrift, Option<StageError>) {
    let spec = json!({"columns": {}, "drift": spec});
    let (mut found, error) = validate(data.path(), Some(reference.path()), spec);
    assert_eq!(found.drift.len(), 1, "{:?}", found.failures);
    (found.drift.remove(0), error)
}

#[track_caller]
fn near(value: f64, wanted: f64) {
    assert!((value - wanted).abs() < 1e-9, "{value}, not {wanted}");
}

/// The reference has one value in each bin. Of the data, two are in the first and none in the last,
/// which counts with a share of 1e-4: 0.1·ln 2 + (1e-4 − 0.1)·ln(1e-4 / 0.1).
#[test]
fn stability_index_and_distance_of_numbers_are_those_computed_by_hand() {
    let reference = floats((1..=10).map(f64::from));
    let data = floats([1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    let (found, error) = drift(&data, &reference, json!({"max_psi": 0.5}));
    near(found.psi, 0.759_399_470_426);
    near(found.ks.unwrap(), 0.1);
    assert!(found.ks_p.unwrap() > 0.999);
    assert!(!found.passed && error.unwrap().message.contains("drifted"));
}

/// Shifted by half of the range: the distribution functions are 0.5 apart, and
/// Q(√5 · 0.5) = 2 (e^−2.5 − e^−10 + e^−22.5 − …).
#[test]
fn the_p_value_of_a_shift_is_the_one_computed_by_hand() {
    let reference = floats((1..=10).map(f64::from));
    let data = floats((6..=15).map(f64::from));
    let wanted = 2.0 * ((-2.5_f64).exp() - (-10.0_f64).exp() + (-22.5_f64).exp());
    let spec = json!({"max_psi": 100, "min_ks_p": 0.2});
    let (found, error) = drift(&data, &reference, spec);
    near(found.ks.unwrap(), 0.5);
    near(found.ks_p.unwrap(), wanted);
    let error = error.unwrap();
    assert!(error.message.contains("Kolmogorov-Smirnov 0.5"), "{error}");
    let (found, error) = drift(&data, &reference, json!({"max_psi": 100, "min_ks_p": 0.1}));
    assert!(found.passed && error.is_none());
}

/// 0.4·ln 1.8 + (1e-4 − 0.5)·ln(1e-4 / 0.5) + (0.1 − 1e-4)·ln(0.1 / 1e-4), the last for a category
/// that the reference does not have.
#[test]
fn the_stability_index_of_texts_is_the_one_computed_by_hand() {
    let reference = texts(&["a", "a", "a", "a", "a", "b", "b", "b", "b", "b"]);
    let data = texts(&["a", "a", "a", "a", "a", "a", "a", "a", "a", "c"]);
    let (found, _) = drift(&data, &reference, json!({}));
    near(found.psi, 5.182_944_294_720);
    assert_eq!((found.ks, found.passed), (None, false));
}

#[test]
fn two_halves_of_one_sample_have_not_drifted() {
    // Numbers of a linear congruential generator (Knuth), so that the halves are alike, not equal.
    let mut state = 1_u64;
    let mut number = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as f64
    };
    let (a, b): (Vec<f64>, Vec<f64>) = (0..2000).map(|_| (number(), number())).unzip();
    let spec = json!({"max_psi": 0.1, "min_ks_p": 0.01});
    let (found, error) = drift(&floats(a.clone()), &floats(b), spec.clone());
    assert!(error.is_none() && found.passed, "{found:?}");
    let shifted = a.iter().map(|v| v * 1.3);
    let (found, error) = drift(&floats(shifted), &floats(a.clone()), spec);
    assert!(error.is_some() && !found.passed, "{found:?}");
}

#[test]
fn a_constant_column_has_drifted_only_when_it_is_another_constant() {
    let (same, error) = drift(&floats([3.0; 20]), &floats([3.0; 30]), json!({}));
    near(same.psi, 0.0);
    assert!(error.is_none());
    for constant in [4.0, 2.0] {
        let (other, error) = drift(&floats([constant; 20]), &floats([3.0; 30]), json!({}));
        assert!(other.psi > 1.0 && error.is_some(), "{constant}");
    }
}

#[test]
fn what_cannot_be_compared_is_said() {
    let spec = || json!({"columns": {"x": {"allow_non_finite": true}}, "drift": {}});
    let says = |data: &TempDir, reference: &TempDir, text: &str| {
        let (found, error) = validate(data.path(), Some(reference.path()), spec());
        assert!(
            error.unwrap().message.contains(text),
            "{:?}",
            found.failures
        );
    };
    says(
        &floats([f64::NAN; 5]),
        &floats([1.0; 5]),
        "no values to compare",
    );
    says(&texts(&["a"]), &floats([1.0]), "cannot be compared");
    let (found, error) = validate(
        floats([1.0]).path(),
        Some(texts(&["a"]).path()),
        json!({"drift": {"columns": ["y"]}}),
    );
    assert!(error.is_some());
    assert_eq!(found.failures[0].rule, "drift.columns.y");
    let data = floats([1.0]);
    let test = TestContext::builder()
        .spec(json!({"drift": {}}))
        .input("data", ArtifactType::Table, data.path())
        .build();
    let error = Validate.run(&test.ctx).unwrap_err();
    assert_eq!(error.reason, Reason::UserError);
    assert!(error.message.contains("`reference`"), "{error}");
}

#[test]
fn the_causes_of_failure_are_refused_as_features_of_ai4i() {
    let file = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
        .join("../../examples/predictive-maintenance/data/ai4i2020.csv");
    let raw = tempfile::tempdir().unwrap();
    std::fs::copy(file, raw.path().join("ai4i2020.csv")).unwrap();
    let test = TestContext::builder()
        .input("data", ArtifactType::Files, raw.path())
        .build();
    let output = Convert.run(&test.ctx).unwrap();
    let causes = ["TWF", "HDF", "PWF", "OSF", "RNF"];
    let forbidden: serde_json::Map<_, _> = causes
        .iter()
        .map(|c| {
            (
                (*c).to_owned(),
                json!("one of the causes that make up the label"),
            )
        })
        .collect();
    let (found, error) = validate(
        test.output(&output.artifacts, "data"),
        None,
        json!({"forbidden_columns": forbidden}),
    );
    let refused: Vec<_> = found
        .failures
        .iter()
        .filter_map(|f| f.column.as_deref())
        .collect();
    assert_eq!(refused, causes);
    assert_eq!(error.unwrap().reason, Reason::Data);
}
