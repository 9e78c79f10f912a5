//! `convert` on real data and on bad input, through the public stage.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use emberline_common::{failure::Reason, spec::ArtifactType};
use emberline_data::{
    Convert,
    schema::{ColumnType, Value},
    table::Table,
};
use emberline_worker::{
    stage::{Stage, StageError, StageOutput, StopReason},
    testing::TestContext,
};
use serde_json::json;

/// A directory with one file of the examples.
fn example(path: &str) -> tempfile::TempDir {
    let path = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
        .join("../../examples")
        .join(path);
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    files(&[(&name, &std::fs::read(&path).unwrap())])
}

fn files(contents: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in contents {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

struct Ran {
    test: TestContext,
    result: Result<StageOutput, StageError>,
}

impl Ran {
    fn table(&self, name: &str) -> Table {
        let output = self.result.as_ref().expect("the stage succeeds");
        Table::read_dir(self.test.output(&output.artifacts, name)).unwrap()
    }
    fn error(&self) -> (Reason, String) {
        let Err(error) = &self.result else {
            panic!("the stage must fail");
        };
        assert!(!error.message.contains('\n'), "one line: {}", error.message);
        (error.reason, error.message.clone())
    }
}

fn run(dir: &Path, spec: serde_json::Value) -> Ran {
    let test = TestContext::builder()
        .spec(spec)
        .input("data", ArtifactType::Files, dir)
        .build();
    let result = Convert.run(&test.ctx);
    Ran { test, result }
}

fn csv(content: &[u8], spec: serde_json::Value) -> Ran {
    run(files(&[("a.csv", content)]).path(), spec)
}

fn column(table: &Table, name: &str) -> Vec<String> {
    let column = table.column(name).expect("the column is there");
    (0..table.rows)
        .map(|row| column.value(row).to_string())
        .collect()
}

#[track_caller]
fn refused(ran: &Ran, reason: Reason, parts: &[&str]) {
    let (got, message) = ran.error();
    assert_eq!(got, reason, "{message}");
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn ai4i_is_read_with_the_types_of_its_columns() {
    let ran = run(
        example("predictive-maintenance/data/ai4i2020.csv").path(),
        json!({ "read": { "data": { "format": "csv" } } }),
    );
    let table = ran.table("data");
    assert_eq!(table.rows, 10_000);
    assert_eq!(table.columns.len(), 14);
    let types: Vec<_> = table
        .columns
        .iter()
        .map(|c| (c.name.as_str(), c.column_type()))
        .collect();
    assert_eq!(types[2], ("Type", ColumnType::Text));
    assert_eq!(types[3], ("Air temperature [K]", ColumnType::Float));
    assert_eq!(types[5], ("Rotational speed [rpm]", ColumnType::Integer));
    let failures = table.column("Machine failure").unwrap();
    let sum: f64 = (0..table.rows).filter_map(|row| failures.number(row)).sum();
    assert_eq!(sum, 339.0);
}

#[test]
fn a_stratified_split_has_exact_shares_and_is_the_same_each_time() {
    let spec = json!({
        "sql": "SELECT \"Type\", \"Torque [Nm]\" AS torque, \"Machine failure\" AS failure, UDI FROM data",
        "read": { "data": { "format": "csv" } },
        "split": { "test": 0.2, "validation": 0.1, "seed": 7, "stratify": "failure" }
    });
    let ran = run(
        example("predictive-maintenance/data/ai4i2020.csv").path(),
        spec.clone(),
    );
    let (train, validation, test) = (
        ran.table("train"),
        ran.table("validation"),
        ran.table("test"),
    );
    assert_eq!((train.rows, validation.rows, test.rows), (7000, 1000, 2000));
    let failures = |t: &Table| {
        let c = t.column("failure").unwrap();
        (0..t.rows)
            .filter(|row| c.number(*row) == Some(1.0))
            .count()
    };
    // 339 · 0.2 = 67.8, · 0.1 = 33.9, · 0.7 = 237.3: the remainders 0.8 and 0.9 get the two left.
    assert_eq!(
        (failures(&train), failures(&validation), failures(&test)),
        (237, 34, 68)
    );
    let again = run(
        example("predictive-maintenance/data/ai4i2020.csv").path(),
        spec,
    );
    assert_eq!(column(&test, "UDI"), column(&again.table("test"), "UDI"));
    let mut all: Vec<String> = [&train, &validation, &test]
        .iter()
        .flat_map(|t| column(t, "UDI"))
        .collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 10_000, "no row is in two parts or in none");
}

#[test]
fn digits_without_a_header_are_read_from_gzip() {
    let ran = run(
        example("digits/data/digits.csv.gz").path(),
        json!({ "read": { "data": { "format": "csv", "header": false } }, "rename": { "column_64": "digit" } }),
    );
    let table = ran.table("data");
    assert_eq!((table.rows, table.columns.len()), (1797, 65));
    let digits = table.column("digit").unwrap();
    let zeros = (0..table.rows)
        .filter(|row| digits.value(*row) == Value::Integer(0))
        .count();
    assert_eq!(zeros, 178);
}

#[test]
fn a_stop_is_heard() {
    let dir = files(&[("a.csv", b"x\n1\n")]);
    let test = TestContext::builder()
        .input("data", ArtifactType::Files, dir.path())
        .build();
    test.stop(StopReason::Cancelled);
    assert_eq!(
        Convert.run(&test.ctx).unwrap_err().reason,
        Reason::Cancelled
    );
}

mod csv_files {
    use super::*;

    #[test]
    fn quotes_crlf_bom_gz_and_formulas_are_kept_as_they_are() {
        let text = "\u{feff}a,b\r\n\"x, \"\"y\"\"\nz\",=SUM(A1)\r\n,+1\r\n".as_bytes();
        for content in [text.to_vec(), gz(text)] {
            let table = csv(&content, json!({})).table("data");
            assert_eq!(column(&table, "a"), ["x, \"y\"\nz", "null"]);
            assert_eq!(column(&table, "b"), ["=SUM(A1)", "+1"]);
        }
    }

    #[test]
    fn given_types_null_values_and_delimiter_are_used() {
        let spec = json!({ "read": { "data": {
            "delimiter": ";", "null_values": ["", "NA"], "types": { "zip": "text", "flag": "boolean" } } } });
        let table = csv(b"zip;flag;n\n0123;1;NA\n4;0;2\n", spec).table("data");
        assert_eq!(column(&table, "zip"), ["0123", "4"]);
        assert_eq!(column(&table, "flag"), ["true", "false"]);
        assert_eq!(
            table.column("n").unwrap().column_type(),
            ColumnType::Integer
        );
        assert_eq!(column(&table, "n"), ["null", "2"]);
    }

    #[test]
    fn several_files_are_one_table_with_one_type_for_each_column() {
        let dir = files(&[("a.csv", b"x\n1\n"), ("b.csv", b"x\n2.5\n")]);
        assert_eq!(
            column(&run(dir.path(), json!({})).table("data"), "x"),
            ["1", "2.5"]
        );
        let dir = files(&[("a.csv", b"x\n1\n"), ("b.csv", b"y\n2.5\n")]);
        refused(
            &run(dir.path(), json!({})),
            Reason::Data,
            &["b.csv", "other columns"],
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_file_line_and_column() {
        let long = format!("a\n\"{}\"\n", "x".repeat(5 << 20));
        let unclosed_long = format!("a,b\n1,\"{}", "x\n".repeat(9 << 20));
        let wide = format!(
            "{}\n",
            (0..10_000)
                .map(|i| format!("c{i}"))
                .collect::<Vec<_>>()
                .join(",")
        );
        let cases: &[(&[u8], &[&str])] = &[
            (b"", &["data/a.csv", "empty"]),
            (b"a,b\n", &["data/a.csv", "no rows"]),
            (b"a,b\n1,2\n3\n", &["line 3", "1 fields", "header has 2"]),
            (b"a,b\r\n1,2\r\n3,4,5\r\n", &["line 3", "3 fields"]),
            (b"a,b\n\"x\ny\",2\n3\n", &["line 4"]),
            (b"a,b\n1,2\n3,\"4\n5,6\n", &["line 3", "never closed"]),
            (b"a,b,a\n1,2,3\n", &["line 1", "`a`", "twice", "1 and 3"]),
            (b"a,,c\n1,2,3\n", &["line 1", "column 2", "no name"]),
            (
                b"a,b\n1,2\nx,\xff\xfe\n",
                &["line 3", "`b`", "UTF-8", "byte 10"],
            ),
            (b"\xff\xfea\x00", &["UTF-8", "byte 0"]),
            (long.as_bytes(), &["line 2", "`a`", "5242880 bytes"]),
            (unclosed_long.as_bytes(), &["line 2", "more than", "quote"]),
            (wide.as_bytes(), &["10000 columns"]),
            (&[0x1f, 0x8b, 8, 0, 0], &["data/a.csv", "damaged"]),
        ];
        for (content, parts) in cases {
            refused(&csv(content, json!({})), Reason::Data, parts);
        }
        let typed = json!({ "read": { "data": { "types": { "n": "integer" } } } });
        refused(
            &csv(b"n\n1\n\nx1\n", typed.clone()),
            Reason::Data,
            &["line 4", "column `n`", "`x1` is not an integer"],
        );
        refused(&csv(b"m\n1\n", typed), Reason::Data, &["no column `n`"]);
        refused(
            &csv(
                b"n\n1\n",
                json!({ "read": { "data": { "delimiter": "ab" } } }),
            ),
            Reason::UserError,
            &["delimiter"],
        );
        refused(
            &csv(b"n\n1\n", json!({ "read": { "dta": {} } })),
            Reason::UserError,
            &["dta", "data"],
        );
    }
}
