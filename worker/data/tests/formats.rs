//! `convert` beyond CSV: JSON lines, Parquet, IDX, SQL and the split, with good and with bad input.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    path::Path,
    thread,
    time::{Duration, Instant},
};

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
use serde_json::{Value as Json, json};
use tempfile::TempDir;

fn files(contents: &[(&str, &[u8])]) -> TempDir {
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
    #[track_caller]
    fn table(&self, name: &str) -> Table {
        let output = self.result.as_ref().unwrap();
        Table::read_dir(self.test.output(&output.artifacts, name)).unwrap()
    }
}

fn run(dir: &Path, spec: Json) -> Ran {
    let test = TestContext::builder()
        .spec(spec)
        .input("data", ArtifactType::Files, dir)
        .build();
    let result = Convert.run(&test.ctx);
    Ran { test, result }
}

fn one(name: &str, content: &[u8], spec: Json) -> Ran {
    run(files(&[(name, content)]).path(), spec)
}

fn column(table: &Table, name: &str) -> Vec<String> {
    let column = table.column(name).unwrap();
    (0..table.rows)
        .map(|row| column.value(row).to_string())
        .collect()
}

/// One line that says all of it, of the right class, and no output.
#[track_caller]
fn refused(ran: &Ran, reason: Reason, parts: &[&str]) {
    let Err(error) = &ran.result else {
        panic!("it must fail, and say {parts:?}");
    };
    assert_eq!(error.reason, reason, "{error}");
    assert!(!error.message.contains('\n'), "one line: {error}");
    assert!(error.message.len() < 600, "one line: {error}");
    assert!(error.outputs.is_empty());
    for part in parts {
        assert!(error.message.contains(part), "{part:?} is not in: {error}");
    }
}

mod json_lines {
    use super::*;

    #[test]
    fn fields_are_found_in_all_lines_and_missing_ones_are_null() {
        let text = "{\"a\": 1, \"b\": \"x\"}\r\n\n{\"b\": null, \"c\": true, \"a\": 2.5}\n";
        for (name, content) in [
            ("a.jsonl", text.as_bytes().to_vec()),
            ("a.ndjson.gz", gz(text.as_bytes())),
        ] {
            let table = one(name, &content, json!({})).table("data");
            assert_eq!(column(&table, "a"), ["1", "2.5"]);
            assert_eq!(column(&table, "b"), ["x", "null"]);
            assert_eq!(column(&table, "c"), ["null", "true"]);
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_line() {
        let cases: &[(&[u8], &[&str])] = &[
            (b"", &["data/a.jsonl", "empty"]),
            (b"{\"a\": 1}\n{\"a\": 2\n", &["line 2"]),
            (b"{\"a\": 1}\n[1, 2]\n", &["line 2", "object"]),
            (b"{\"a\": 1}\n{\"a\": {\"b\": 1}}\n", &["line 2", "`a`"]),
            (b"{\"a\": 1}\n{\"a\": \"x\"}\n", &["line 2", "`a`"]),
            (b"{\"a\": 1, \"a\": 2}\n", &["line 1", "`a`", "twice"]),
            (b"{\"a\": \"\xff\"}\n", &["line 1"]),
        ];
        for (content, parts) in cases {
            refused(&one("a.jsonl", content, json!({})), Reason::Data, parts);
        }
        let deep = "{\"a\":".repeat(5000);
        refused(
            &one("a.jsonl", deep.as_bytes(), json!({})),
            Reason::Data,
            &["line 1"],
        );
    }
}

mod parquet_files {
    use super::*;

    /// Found by fuzzing: the parser panics on it.
    #[test]
    fn a_table_that_no_parser_survives_is_told_as_damaged() {
        const FOUND: &[u8] =
            include_bytes!("../../../tests/fuzz/corpus/parquet/found-negative-column-start");
        refused(
            &one("a.parquet", FOUND, json!({})),
            Reason::Data,
            &["data/a.parquet"],
        );
        let dir = files(&[("a.parquet", FOUND)]);
        let error = Table::read_dir(dir.path()).unwrap_err();
        assert_eq!(error.reason, Reason::Storage, "{error}");
        assert!(
            error.message.contains("cannot read the table's file"),
            "{error}"
        );
    }

    /// The Parquet file of a table with two rows.
    fn parquet() -> Vec<u8> {
        let ran = one("a.csv", b"n,t\n1,x\n2,y\n", json!({}));
        let output = ran.result.as_ref().unwrap();
        let dir = ran.test.output(&output.artifacts, "data").to_owned();
        let file = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|e| e == "parquet"))
            .unwrap();
        std::fs::read(file).unwrap()
    }

    #[test]
    fn a_table_that_was_written_is_read_again() {
        let table = one("a.parquet", &parquet(), json!({})).table("data");
        assert_eq!(column(&table, "n"), ["1", "2"]);
        assert_eq!(column(&table, "t"), ["x", "y"]);
        assert_eq!(
            table.column("n").unwrap().column_type(),
            ColumnType::Integer
        );
    }

    #[test]
    fn a_damaged_file_is_refused_by_name() {
        let whole = parquet();
        let mut changed = whole.clone();
        let middle = changed.len() / 3;
        changed[middle..middle + 40].fill(0xff);
        let cut = &whole[..whole.len() - 9];
        for content in [
            &b""[..],
            b"PAR1",
            cut,
            &changed,
            b"no parquet at all, but long enough",
        ] {
            refused(
                &one("a.parquet", content, json!({})),
                Reason::Data,
                &["data/a.parquet"],
            );
        }
    }
}

mod idx_files {
    use super::*;

    /// `count` images of 2×3 pixels.
    fn images(count: u32) -> Vec<u8> {
        let mut out = vec![0, 0, 8, 3];
        for size in [count, 2, 3] {
            out.extend(size.to_be_bytes());
        }
        out.extend((0..count * 6).map(|i| i as u8));
        out
    }

    fn labels(labels: &[u8]) -> Vec<u8> {
        let mut out = vec![0, 0, 8, 1];
        out.extend((labels.len() as u32).to_be_bytes());
        out.extend(labels);
        out
    }

    fn spec() -> Json {
        json!({"read": {"data": {"format": "idx", "labels": "*labels*"}}})
    }

    #[test]
    fn images_and_labels_are_joined_by_position() {
        let dir = files(&[
            ("t-images-idx3-ubyte.gz", &gz(&images(3))),
            ("t-labels-idx1-ubyte", &labels(&[7, 0, 9])),
        ]);
        let table = run(dir.path(), spec()).table("data");
        assert_eq!(column(&table, "label"), ["7", "0", "9"]);
        let image = table.column("image").unwrap();
        assert_eq!(image.value(1), Value::Bytes(&[6, 7, 8, 9, 10, 11]));
    }

    #[test]
    fn a_broken_header_too_few_bytes_or_labels_are_refused() {
        let huge = [&[0, 0, 8, 3][..], &[0xff; 12]].concat();
        let short = &images(3)[..20];
        let cases: &[(&[u8], &[u8])] = &[
            (b"\x01\x02\x03\x04", &[1, 2, 3]),
            (&huge, &[1, 2, 3]),
            (short, &[1, 2, 3]),
            (&images(3), &[1, 2]),
            (b"", &[]),
        ];
        for (content, numbers) in cases {
            let dir = files(&[("i-idx3-ubyte", content), ("labels-idx1", &labels(numbers))]);
            refused(&run(dir.path(), spec()), Reason::Data, &["data/"]);
        }
        let only = files(&[("i-idx3-ubyte", &images(1))]);
        let ran = run(only.path(), spec());
        assert!(ran.result.unwrap_err().message.contains("*labels*"));
    }
}

mod sql {
    use super::*;

    const CSV: &[u8] = b"kind,n\na,1\nb,2\na,4\n";

    fn query(sql: &str) -> Ran {
        one("a.csv", CSV, json!({ "sql": sql }))
    }

    #[test]
    fn a_query_groups_and_joins() {
        let table = query("SELECT kind, sum(n) AS total FROM data GROUP BY kind ORDER BY kind");
        let table = table.table("data");
        assert_eq!(column(&table, "kind"), ["a", "b"]);
        assert_eq!(column(&table, "total"), ["5", "2"]);
        let (left, right) = (
            files(&[("a.csv", CSV)]),
            files(&[("b.csv", b"kind,w\na,10\n")]),
        );
        let test = TestContext::builder()
            .spec(json!({"sql": "SELECT n * w AS x FROM data JOIN more_rows USING (kind)"}))
            .input("data", ArtifactType::Files, left.path())
            .input("more-rows", ArtifactType::Files, right.path())
            .build();
        let output = Convert.run(&test.ctx).unwrap();
        let table = Table::read_dir(test.output(&output.artifacts, "data")).unwrap();
        assert_eq!(column(&table, "x"), ["10", "40"]);
    }

    #[test]
    fn a_wrong_query_is_the_users_mistake_and_says_what_is_wrong() {
        for (sql, part) in [
            ("SELEC 1", "syntax"),
            ("SELECT * FROM dta", "dta"),
            ("SELECT m FROM data", "m"),
            ("SELECT 1; SELECT 2", "one"),
            ("", "SELECT"),
            ("DROP TABLE data", "not authorized"),
            ("DELETE FROM data", "not authorized"),
            ("ATTACH '/etc/passwd' AS p", "not authorized"),
            ("PRAGMA database_list", "not authorized"),
            ("SELECT load_extension('x')", "load_extension"),
            ("SELECT random() AS r FROM data", "random"),
            ("SELECT date('NOW') AS d FROM data", "time it is now"),
            ("SELECT strftime('%s') AS d FROM data", "time it is now"),
            ("SELECT unixepoch ( ) AS d FROM data", "time it is now"),
            ("SELECT current_date AS d FROM data", "current_date"),
            ("SELECT n AS a, n AS a FROM data", "`a`"),
        ] {
            refused(&query(sql), Reason::UserError, &[part]);
        }
    }

    #[test]
    fn dates_of_columns_can_be_computed() {
        let sql = "SELECT date(n * 86400, 'unixepoch') AS day, strftime('%Y', n, 'unixepoch') AS year FROM data";
        let table = query(sql).table("data");
        assert_eq!(
            column(&table, "day"),
            ["1970-01-02", "1970-01-03", "1970-01-05"]
        );
        assert_eq!(column(&table, "year"), ["1970", "1970", "1970"]);
    }

    #[test]
    fn an_empty_result_is_refused() {
        refused(
            &query("SELECT * FROM data WHERE n > 100"),
            Reason::Data,
            &["no rows"],
        );
    }

    #[test]
    fn an_endless_query_ends_when_the_attempt_is_stopped() {
        let dir = files(&[("a.csv", CSV)]);
        let endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) AS n FROM c";
        let test = TestContext::builder()
            .spec(json!({ "sql": endless }))
            .input("data", ArtifactType::Files, dir.path())
            .build();
        let error = thread::scope(|scope| {
            let running = scope.spawn(|| Convert.run(&test.ctx).unwrap_err());
            // Made right before the first row is asked for.
            let result = test.ctx.work_dir.join("sql-result.bin");
            let deadline = Instant::now() + Duration::from_secs(20);
            while !result.exists() && Instant::now() < deadline {
                thread::yield_now();
            }
            test.stop(StopReason::Timeout);
            running.join().unwrap()
        });
        assert_eq!(error.reason, Reason::Timeout);
    }

    #[test]
    fn what_cannot_be_cast_is_named_with_row_and_column() {
        let ran = one("a.csv", CSV, json!({"cast": {"kind": "integer"}}));
        refused(&ran, Reason::Data, &["`kind`", "`a`", "integer"]);
        let unknown = one("a.csv", CSV, json!({"cast": {"m": "integer"}}));
        refused(&unknown, Reason::Data, &["no column `m`"]);
        let twice = one("a.csv", CSV, json!({"rename": {"n": "kind"}}));
        assert!(twice.result.unwrap_err().message.contains("`kind`"));
        let all = one("a.csv", CSV, json!({"drop": ["n", "kind"]}));
        assert!(all.result.is_err());
    }
}

mod split {
    use super::*;

    fn rows(count: usize) -> Vec<u8> {
        let rows = (0..count).map(|i| format!("{i},{},{}\n", i % 3, i / 4));
        format!("id,class,machine\n{}", rows.collect::<String>()).into_bytes()
    }

    fn cut(count: usize, split: Json) -> Ran {
        one("a.csv", &rows(count), json!({ "split": split }))
    }

    fn ids(ran: &Ran, part: &str) -> BTreeSet<String> {
        column(&ran.table(part), "id").into_iter().collect()
    }

    #[test]
    fn each_row_is_in_one_part_and_the_seed_decides_in_which() {
        let split = |seed: u64| json!({"test": 0.25, "validation": 0.25, "seed": seed});
        let (first, again, other) = (cut(100, split(1)), cut(100, split(1)), cut(100, split(2)));
        let parts = ["train", "validation", "test"].map(|part| ids(&first, part));
        assert_eq!(parts.each_ref().map(BTreeSet::len), [50, 25, 25]);
        let all: BTreeSet<_> = parts.iter().flatten().collect();
        assert_eq!(all.len(), 100);
        assert_eq!(ids(&first, "test"), ids(&again, "test"));
        assert_ne!(ids(&first, "test"), ids(&other, "test"));
    }

    #[test]
    fn what_belongs_together_stays_together() {
        let ran = cut(100, json!({"test": 0.25, "seed": 3, "group": "machine"}));
        let of = |part: &str| -> BTreeSet<String> {
            column(&ran.table(part), "machine").into_iter().collect()
        };
        assert!(of("train").is_disjoint(&of("test")));
        assert_eq!(of("train").len() + of("test").len(), 25);
    }

    #[test]
    fn shares_and_columns_that_make_no_sense_are_refused() {
        for (split, part) in [
            (
                json!({"test": 0.7, "validation": 0.5}),
                "leave nothing to train on",
            ),
            (json!({"test": 0.2, "stratify": "clas"}), "`clas`"),
            (json!({"test": 0.2, "group": "machin"}), "`machin`"),
        ] {
            let error = cut(30, split).result.unwrap_err();
            assert!(error.message.contains(part), "{error}");
            assert!(error.outputs.is_empty());
        }
    }

    #[test]
    fn too_few_rows_for_a_part_are_said() {
        refused(&cut(1, json!({"test": 0.2})), Reason::Data, &["row"]);
        // Its one row could be in one part only: the parts would not have the same shares.
        let text = b"id,class\n1,a\n2,a\n3,a\n4,a\n5,b\n6,a\n7,a\n8,a\n9,a\n10,a\n";
        let ran = one(
            "a.csv",
            text,
            json!({"split": {"test": 0.2, "stratify": "class"}}),
        );
        refused(&ran, Reason::Data, &["`b` of `class`", "too few rows (1)"]);
    }
}
