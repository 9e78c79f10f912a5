//! Files that are made to take all the memory, or all the time: each is refused at a bound, with its
//! place, in a message that is short itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs::File, io::Write as _, path::Path};

use emberline_common::{failure::Reason, spec::ArtifactType};
use emberline_data::{Convert, schema::ColumnType, table::Table};
use emberline_worker::{
    stage::{Stage, StageError, StageOutput},
    testing::TestContext,
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

const GIBIBYTE: u64 = 1 << 30;

fn file(name: &str, content: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(name), content).unwrap();
    dir
}

/// A file that begins so and goes on with zeros to a gibibyte, of which the disk keeps nothing.
fn endless(name: &str, begins: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut file = File::create(dir.path().join(name)).unwrap();
    file.write_all(begins).unwrap();
    file.set_len(GIBIBYTE).unwrap();
    dir
}

/// A compressed file that begins so and goes on with this byte for a gibibyte.
fn bomb(name: &str, begins: &[u8], byte: u8) -> TempDir {
    let member = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let piece = member(&vec![byte; 8 << 20]);
    let mut out = member(begins);
    for _ in 0..GIBIBYTE >> 23 {
        out.extend(&piece);
    }
    assert!(out.len() < 16 << 20, "it is small itself");
    file(name, &out)
}

fn run(dir: &Path, spec: Json) -> (TestContext, Result<StageOutput, StageError>) {
    let test = TestContext::builder()
        .spec(spec)
        .input("data", ArtifactType::Files, dir)
        .build();
    let result = Convert.run(&test.ctx);
    (test, result)
}

#[track_caller]
fn refused(dir: &Path, spec: Json, parts: &[&str]) {
    let (_test, result) = run(dir, spec);
    let Err(error) = result else {
        panic!("it must fail, and say {parts:?}");
    };
    let said = &error.message;
    let shown: String = said.chars().take(1000).collect();
    assert_eq!(error.reason, Reason::Data, "{shown}");
    assert!(said.len() < 600, "{} bytes: {shown}", said.len());
    assert!(!said.contains(char::is_control), "{shown:?}");
    assert!(error.outputs.is_empty());
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in: {shown}");
    }
}

#[test]
fn a_line_of_a_gibibyte_is_refused_before_it_is_read() {
    for (dir, line) in [
        (endless("a.csv", b"a,b\n1,2\n"), "line 3"),
        (endless("a.csv", b"a,b\n1,\"2"), "line 2"),
        (bomb("a.csv.gz", b"a,b\n1,\"2", b'\n'), "line 2"),
        (bomb("a.csv.gz", b"a,b\n1,", b','), "line 2"),
        (bomb("a.csv.gz", b"", b'"'), "line 1"),
        (endless("a.jsonl", b"{\"a\": 1}\n{\"a\": "), "line 2"),
        (bomb("a.jsonl.gz", b"{\"a\": 1}\n", b'['), "line 2"),
    ] {
        refused(
            dir.path(),
            json!({}),
            &["data/a.", line, "more than 16777216 bytes"],
        );
    }
    // Nothing but line ends, which are passed over.
    let blank = bomb("a.csv.gz", b"a,b\n1,2\n", b'\n');
    refused(blank.path(), json!({}), &["more than 16777216 bytes"]);
    let blank = bomb("a.jsonl.gz", b"{\"a\": 1}\n", b'\n');
    refused(blank.path(), json!({}), &["more than 16777216 bytes"]);
}

#[test]
fn a_hundred_thousand_columns_are_refused() {
    let names: Vec<String> = (0..100_000).map(|n| format!("c{n}")).collect();
    let csv = file("a.csv", format!("{}\n", names.join(",")).as_bytes());
    refused(csv.path(), json!({}), &["100000 columns, more than 4096"]);
    let bare = file("a.csv", ",".repeat(99_999).as_bytes());
    let spec = json!({"read": {"data": {"header": false}}});
    refused(bare.path(), spec, &["100000 columns, more than 4096"]);
    let object: serde_json::Map<_, _> = names.into_iter().map(|name| (name, json!(1))).collect();
    let lines = file("a.jsonl", Json::Object(object).to_string().as_bytes());
    refused(lines.path(), json!({}), &["4097 columns, more than 4096"]);
    // One more in each line.
    let grows: String = (0..5000).map(|n| format!("{{\"c{n}\": 1}}\n")).collect();
    let lines = file("a.jsonl", grows.as_bytes());
    refused(lines.path(), json!({}), &["4097 columns, more than 4096"]);
}

#[test]
fn a_number_with_more_digits_than_any_is_a_text_or_refused() {
    // As long as a field may be.
    let digits = "9".repeat(4 << 20);
    let dir = file("a.csv", format!("n\n1\n{digits}\n-{digits}\n").as_bytes());
    refused(dir.path(), json!({}), &["line 4", "4194305 bytes"]);
    let dir = file("a.csv", format!("n\n1\n{digits}\n1e999999999\n").as_bytes());
    let (test, result) = run(dir.path(), json!({}));
    let output = result.unwrap();
    let table = Table::read_dir(test.output(&output.artifacts, "data")).unwrap();
    let column = table.column("n").unwrap();
    assert_eq!(column.column_type(), ColumnType::Text);
    assert_eq!(column.value(1).to_string().len(), digits.len());
    for column_type in ["integer", "float", "boolean"] {
        let spec = json!({"read": {"data": {"types": {"n": column_type}}}});
        let line = if column_type == "boolean" {
            "line 3"
        } else {
            "`n`"
        };
        refused(dir.path(), spec, &[line, column_type]);
    }
    for number in [digits.as_str(), "1e400", "-1e999999999"] {
        let dir = file(
            "a.jsonl",
            format!("{{\"n\": 1}}\n{{\"n\": {number}}}\n").as_bytes(),
        );
        refused(dir.path(), json!({}), &["line 2"]);
    }
}

#[test]
fn names_and_values_are_shown_cut_and_without_control_characters() {
    let evil = "=cmd|' /C calc'!A0\u{1b}[2J\u{7}\n</script>";
    let twice = file("a.csv", format!("\"{evil}\",\"{evil}\"\n1,2\n").as_bytes());
    refused(twice.path(), json!({}), &["=cmd|", "twice"]);
    let spec = json!({"read": {"data": {"types": {"n": "float"}}}});
    let value = file("a.csv", format!("n\n\"{evil}\"\n").as_bytes());
    refused(value.path(), spec, &["=cmd|", "`n`", "not a float"]);
    let spec = json!({"read": {"data": {"types": {evil: "float"}}}});
    let named = file("a.csv", format!("\"{evil}\"\nhigh\n").as_bytes());
    refused(named.path(), spec, &["=cmd|", "not a float"]);
    let long = "x".repeat(1 << 20);
    for line in [
        format!("\"{long}\""),
        format!("{{\"a\": 1, \"{long}\": 2}}"),
        format!("{{\"a\": 1, \"a{long}\": 2, \"a{long}\": 3}}"),
        format!("{{\"a\": {long}}}"),
        format!("{{\"{}\": {{}}}}", "\\u001b[2J"),
        format!("\"{}\"", "\\u001b[2J\\n\\u009b"),
    ] {
        let dir = file("a.jsonl", line.as_bytes());
        refused(dir.path(), json!({}), &["line 1"]);
    }
}

#[test]
fn half_a_character_and_other_encodings_are_refused_with_their_place() {
    for half in [r"\ud800", r"\udc00\ud800", r"\ud800\u0041"] {
        for line in [
            format!("{{\"a\": \"{half}\"}}"),
            format!("{{\"{half}\": 1}}"),
        ] {
            let dir = file("a.jsonl", format!("{{}}\n{line}\n").as_bytes());
            refused(dir.path(), json!({}), &["line 2", "column"]);
        }
    }
    // Surrogates as bytes, overlong, UTF-16 with and without its mark, and a mark in the middle.
    for (bytes, part) in [
        (&b"a\n\xed\xa0\x80\n"[..], "byte 2"),
        (b"a\n\xc0\xaf\n", "byte 2"),
        (b"\xff\xfea\x00\n\x00", "byte 0"),
        (b"\xfe\xff\x00a\x00\n", "byte 0"),
        (b"a\n1\n\xf0\x9f\x98", "byte 4"),
    ] {
        let dir = file("a.csv", bytes);
        refused(dir.path(), json!({}), &["UTF-8", part]);
        let dir = file("a.jsonl", bytes);
        refused(dir.path(), json!({}), &["line"]);
    }
}
