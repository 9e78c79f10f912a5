//! From a pipeline's text to a checked [`PipelineSpec`], or to every mistake in it.
//!
//! The order: YAML with places, parameters filled in, the file's shape against the schema, each
//! stage's `with` against its kind's schema, then what no schema can say ([`super::semantics`]).

use std::fmt;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    PipelineSpec,
    check::{Checker, Finding, join},
    expand::{fill, fill_text},
    kinds::{
        BuiltinKind, CollectSpec, ConvertSpec, DeploySpec, EvaluateSpec, ExecSpec, NoopSpec,
        ReportSpec, TrainSpec, ValidateSpec,
    },
    schema, secrets, semantics,
    suggest::nearest,
    yaml::{self, Node, NodeValue},
};
use crate::ids::Digest;

/// Combinations of a matrix whose filled-in `with` is checked.
const CHECKED_COMBINATIONS: usize = 64;
/// Mistakes that are told; of more only the number. Nobody reads them all.
const MAX_MISTAKES: usize = 100;

/// One mistake in a pipeline file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// The file's name as given.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// From 1.
    pub column: u32,
    /// The field at fault, e.g. `stages.train.with.epochs`; empty for the file itself.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub suggestion: Option<String>,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)?;
        self.suggestion
            .as_ref()
            .map_or(Ok(()), |s| write!(f, " ({s})"))
    }
}

/// A pipeline without a mistake that can be seen before it runs.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckedPipeline {
    /// `${params.…}` is filled in, `${matrix.…}` still there.
    pub spec: PipelineSpec,
    /// The parameters' final values.
    pub params: Map<String, Value>,
    /// The SHA-256 of the text.
    pub revision: Digest,
}

/// Checks a pipeline. `params` are the values that a submit sets; the rest take their defaults.
///
/// # Errors
/// Every mistake, in the order of the file; after the first 100 only how many more there are.
pub fn parse_pipeline(
    file_name: &str,
    text: &str,
    params: &Map<String, Value>,
) -> Result<CheckedPipeline, Vec<Diagnostic>> {
    let mut findings = Vec::new();
    let parsed = check_text(text, params, &mut findings);
    findings.sort();
    findings.dedup();
    if let Some(next) = findings.get(MAX_MISTAKES) {
        let rest = Finding {
            at: next.at,
            field: String::new(),
            message: format!(
                "{} more mistakes from here on",
                findings.len() - MAX_MISTAKES
            ),
            suggestion: None,
        };
        findings.truncate(MAX_MISTAKES);
        findings.push(rest);
    }
    match parsed {
        Some((spec, params)) if findings.is_empty() => Ok(CheckedPipeline {
            spec,
            params,
            revision: Digest::of(text.as_bytes()),
        }),
        _ => Err(findings
            .into_iter()
            .map(|f| diagnostic(file_name, f))
            .collect()),
    }
}

fn diagnostic(file: &str, finding: Finding) -> Diagnostic {
    Diagnostic {
        file: file.to_owned(),
        line: finding.at.line.max(1),
        column: finding.at.column.max(1),
        field: finding.field,
        message: finding.message,
        suggestion: finding.suggestion,
    }
}

fn check_text(
    text: &str,
    given: &Map<String, Value>,
    findings: &mut Vec<Finding>,
) -> Option<(PipelineSpec, Map<String, Value>)> {
    let document = yaml::parse(text);
    findings.extend(document.problems.into_iter().map(|p| Finding {
        at: p.at,
        field: String::new(),
        message: p.message,
        suggestion: None,
    }));
    let mut root = document.root?;
    // Before anything is filled in, so that each is told where somebody wrote it.
    secrets::check(&root, given, findings);
    let params = final_params(&root, given, findings);
    if let NodeValue::Map(entries) = &mut root.value {
        for (key, _, value) in entries.iter_mut().filter(|(key, ..)| key != "params") {
            fill_params(value, key, &params, findings);
        }
    }
    let pipeline_schema = schema::pipeline_schema();
    let mut checker = Checker::new(&pipeline_schema);
    checker.check(&root, &pipeline_schema, "");
    findings.append(&mut checker.findings);
    let mut typed_with = true;
    for (name, _, stage) in root.get("stages").map(Node::entries).unwrap_or_default() {
        typed_with &= check_stage_with(stage, &join("stages", name), findings);
    }
    semantics::check(&root, &params, findings);
    if !findings.is_empty() || !typed_with {
        return None;
    }
    match serde_json::from_value::<PipelineSpec>(root.to_json()) {
        Ok(spec) => Some((spec, params)),
        Err(e) => {
            findings.push(Finding {
                at: root.at,
                field: String::new(),
                message: e.to_string(),
                suggestion: None,
            });
            None
        }
    }
}

fn final_params(
    root: &Node,
    given: &Map<String, Value>,
    findings: &mut Vec<Finding>,
) -> Map<String, Value> {
    let declared = root.get("params");
    let mut out = Map::new();
    for (name, _, value) in declared.map(Node::entries).unwrap_or_default() {
        out.insert(name.clone(), value.to_json());
    }
    for (name, value) in given {
        let at = declared.map_or(root.at, |d| d.at);
        if out.contains_key(name) {
            out.insert(name.clone(), value.clone());
        } else {
            findings.push(Finding {
                at,
                field: join("params", name),
                message: format!("the pipeline has no parameter `{}`", name.escape_debug()),
                suggestion: nearest(name, out.keys().map(String::as_str))
                    .map(|n| format!("did you mean `{n}`?")),
            });
        }
    }
    out
}

fn fill_params(
    node: &mut Node,
    path: &str,
    params: &Map<String, Value>,
    findings: &mut Vec<Finding>,
) {
    match &mut node.value {
        NodeValue::Map(entries) => {
            for (key, _, value) in entries {
                fill_params(value, &join(path, key), params, findings);
            }
        }
        NodeValue::List(items) => {
            for (i, item) in items.iter_mut().enumerate() {
                fill_params(item, &format!("{path}[{i}]"), params, findings);
            }
        }
        NodeValue::Scalar(Value::String(text)) if text.contains("${") => {
            match fill_text(text, "params", params) {
                Ok(value) => *node = Node::from_json(&value, node.at),
                Err(message) => {
                    let suggestion = unknown_name(text, "params")
                        .and_then(|name| nearest(name, params.keys().map(String::as_str)))
                        .map(|name| format!("did you mean `${{params.{name}}}`?"));
                    findings.push(Finding {
                        at: node.at,
                        field: path.to_owned(),
                        message,
                        suggestion,
                    });
                }
            }
        }
        NodeValue::Scalar(_) => {}
    }
}

/// The first name that a text refers to in a scope.
fn unknown_name<'a>(text: &'a str, scope: &str) -> Option<&'a str> {
    let after = text.split("${").nth(1)?;
    let (reference, _) = after.split_once('}')?;
    reference.trim().strip_prefix(scope)?.strip_prefix('.')
}

/// Checks `with` against the schema and the type of its kind, for the first combinations of the
/// matrix. Says whether the stage's kind is a built-in one with a `with` of the right type.
fn check_stage_with(stage: &Node, path: &str, findings: &mut Vec<Finding>) -> bool {
    let Some(kind) = stage
        .get("kind")
        .and_then(Node::text)
        .and_then(BuiltinKind::from_name)
    else {
        return true;
    };
    let empty = Node {
        at: stage.at,
        value: NodeValue::Map(Vec::new()),
    };
    let with = stage
        .get("with")
        .filter(|n| n.value != NodeValue::Scalar(Value::Null));
    let with = with.unwrap_or(&empty);
    let path = format!("{path}.with");
    let schema = schema::kind_schema(kind);
    let before = findings.len();
    for chosen in combinations(stage.get("matrix")) {
        let mut filled = with.clone();
        if let Err(finding) = fill_matrix(&mut filled, &path, &chosen) {
            findings.push(finding);
            break;
        }
        let mut checker = Checker::new(&schema);
        checker.check(&filled, &schema, &path);
        let untyped = checker
            .findings
            .is_empty()
            .then(|| typed(kind, filled.to_json()))
            .flatten();
        findings.append(&mut checker.findings);
        if let Some(message) = untyped {
            findings.push(Finding {
                at: with.at,
                field: path.clone(),
                message,
                suggestion: None,
            });
        }
        if findings.len() > before {
            break;
        }
    }
    findings.len() == before
}

fn combinations(matrix: Option<&Node>) -> Vec<Map<String, Value>> {
    let mut out = vec![Map::new()];
    for (name, _, values) in matrix.map(Node::entries).unwrap_or_default() {
        let mut next = Vec::new();
        for chosen in &out {
            for value in values.items() {
                if next.len() < CHECKED_COMBINATIONS {
                    let mut chosen = chosen.clone();
                    chosen.insert(name.clone(), value.to_json());
                    next.push(chosen);
                }
            }
        }
        if !next.is_empty() {
            out = next;
        }
    }
    out
}

fn fill_matrix(node: &mut Node, path: &str, matrix: &Map<String, Value>) -> Result<(), Finding> {
    match &mut node.value {
        NodeValue::Map(entries) => {
            for (key, _, value) in entries {
                fill_matrix(value, &join(path, key), matrix)?;
            }
        }
        NodeValue::List(items) => {
            for (i, item) in items.iter_mut().enumerate() {
                fill_matrix(item, &format!("{path}[{i}]"), matrix)?;
            }
        }
        NodeValue::Scalar(value @ Value::String(_)) => match fill(value, matrix) {
            Ok(filled) => *node = Node::from_json(&filled, node.at),
            Err(message) => {
                let suggestion = value
                    .as_str()
                    .and_then(|text| unknown_name(text, "matrix"))
                    .and_then(|name| nearest(name, matrix.keys().map(String::as_str)))
                    .map(|name| format!("did you mean `${{matrix.{name}}}`?"));
                return Err(Finding {
                    at: node.at,
                    field: path.to_owned(),
                    message,
                    suggestion,
                });
            }
        },
        NodeValue::Scalar(_) => {}
    }
    Ok(())
}

/// What serde says of the kind's own type, where the schema had nothing to say.
fn typed(kind: BuiltinKind, with: Value) -> Option<String> {
    fn read<T: DeserializeOwned>(with: Value) -> Option<String> {
        serde_json::from_value::<T>(with)
            .err()
            .map(|e| e.to_string())
    }
    match kind {
        BuiltinKind::Collect => read::<CollectSpec>(with),
        BuiltinKind::Convert => read::<ConvertSpec>(with),
        BuiltinKind::Validate => read::<ValidateSpec>(with),
        BuiltinKind::Train => read::<TrainSpec>(with),
        BuiltinKind::Evaluate => read::<EvaluateSpec>(with),
        BuiltinKind::Deploy => read::<DeploySpec>(with),
        BuiltinKind::Report => read::<ReportSpec>(with),
        BuiltinKind::Exec => read::<ExecSpec>(with),
        BuiltinKind::Noop => read::<NoopSpec>(with),
    }
}

/// The files beside the pipeline file that must travel with a submission.
#[must_use]
pub fn exec_files(spec: &PipelineSpec) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for stage in spec
        .stages
        .values()
        .filter(|s| s.kind.as_str() == BuiltinKind::Exec.as_str())
    {
        let files = stage
            .with
            .get("files")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        out.extend(files.filter_map(Value::as_str).map(str::to_owned));
    }
    out.sort();
    out.dedup();
    out
}
