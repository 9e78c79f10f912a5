//! A tree against a schema: every mistake at once, each with its place and what to write instead.
//!
//! This walks the part of JSON Schema that our own types turn into, and no more. Formats that begin
//! with `emberline ` are checked by the types' own parsers, so that the message is theirs.

use serde_json::Value;

use super::{
    OutputRef,
    suggest::nearest,
    units::{ByteSize, DurationText},
    yaml::{Node, NodeValue, Position},
};
use crate::ids::{
    Alias, ArtifactName, Digest, EnvironmentName, ModelName, PipelineName, RunId, SecretName,
    StageKind, StageName,
};

/// Something wrong at a place, before it knows its file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Where.
    pub at: Position,
    /// The field, e.g. `stages.train.with.epochs`.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub suggestion: Option<String>,
}

/// Walks one schema.
pub struct Checker<'a> {
    definitions: Option<&'a Value>,
    /// What was found so far.
    pub findings: Vec<Finding>,
}

impl<'a> Checker<'a> {
    /// For a root schema with its `$defs`.
    #[must_use]
    pub fn new(root: &'a Value) -> Self {
        Self {
            definitions: root.get("$defs"),
            findings: Vec::new(),
        }
    }

    fn note(&mut self, at: Position, field: &str, message: String, suggestion: Option<String>) {
        self.findings.push(Finding {
            at,
            field: field.to_owned(),
            message,
            suggestion,
        });
    }

    fn resolve(&self, schema: &'a Value) -> &'a Value {
        let name = schema.get("$ref").and_then(Value::as_str);
        let name = name.and_then(|r| r.strip_prefix("#/$defs/"));
        match (name, self.definitions) {
            (Some(name), Some(definitions)) => definitions.get(name).unwrap_or(schema),
            _ => schema,
        }
    }

    /// Checks `node`, which stands at the field `path`, against `schema`.
    pub fn check(&mut self, node: &Node, schema: &'a Value, path: &str) {
        let schema = self.resolve(schema);
        let Some(rules) = schema.as_object() else {
            return;
        };
        for union in ["oneOf", "anyOf"] {
            if let Some(branches) = rules.get(union).and_then(Value::as_array) {
                self.check_union(node, branches, path);
                return;
            }
        }
        if !self.check_type(node, schema, path) {
            return;
        }
        match &node.value {
            NodeValue::Map(entries) => self.check_map(node, entries, schema, path),
            NodeValue::List(items) => {
                let count = items.len() as u64;
                self.check_count(
                    node.at,
                    path,
                    count,
                    schema,
                    ["minItems", "maxItems"],
                    "entries",
                );
                if let Some(inner) = rules.get("items") {
                    for (i, item) in items.iter().enumerate() {
                        self.check(item, inner, &format!("{path}[{i}]"));
                    }
                }
            }
            NodeValue::Scalar(value) => self.check_scalar(node.at, value, schema, path),
        }
    }

    fn check_type(&mut self, node: &Node, schema: &Value, path: &str) -> bool {
        let allowed: Vec<&str> = match schema.get("type") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
            _ => return true,
        };
        let (actual, shown) = match &node.value {
            NodeValue::Map(_) => ("object", "a map".to_owned()),
            NodeValue::List(_) => ("array", "a list".to_owned()),
            NodeValue::Scalar(Value::Null) => ("null", "nothing".to_owned()),
            NodeValue::Scalar(Value::Bool(b)) => ("boolean", format!("`{b}`")),
            NodeValue::Scalar(Value::Number(n)) if n.is_f64() => ("number", format!("`{n}`")),
            NodeValue::Scalar(Value::Number(n)) => ("integer", format!("`{n}`")),
            NodeValue::Scalar(other) => ("string", shorten(other)),
        };
        let whole = matches!(&node.value, NodeValue::Scalar(Value::Number(n)) if n.as_f64().is_some_and(|f| f.fract() == 0.0));
        let fits = allowed.iter().any(|allowed| {
            *allowed == actual
                || (*allowed == "number" && actual == "integer")
                || (*allowed == "integer" && actual == "number" && whole)
        });
        if fits {
            return true;
        }
        let wanted: Vec<&str> = allowed
            .iter()
            .filter(|t| **t != "null")
            .map(|t| type_name(t))
            .collect();
        let quote =
            allowed.contains(&"string") && matches!(actual, "integer" | "number" | "boolean");
        let suggestion =
            quote.then(|| format!("put it in quotes: \"{}\"", shown.trim_matches('`')));
        self.note(
            node.at,
            path,
            format!("expected {}, found {shown}", wanted.join(" or ")),
            suggestion,
        );
        false
    }

    fn check_map(
        &mut self,
        node: &Node,
        entries: &[(String, Position, Node)],
        schema: &'a Value,
        path: &str,
    ) {
        let fields = schema.get("properties").and_then(Value::as_object);
        let rest = schema.get("additionalProperties");
        for (key, key_at, value) in entries {
            let inner = join(path, key);
            match (fields.and_then(|f| f.get(key)), rest) {
                (Some(field), _) => self.check(value, field, &inner),
                (None, Some(Value::Bool(false))) => {
                    let known = || {
                        fields
                            .into_iter()
                            .flat_map(|f| f.keys())
                            .map(String::as_str)
                    };
                    let message = format!("unknown field `{}`", key.escape_debug());
                    let suggestion = match nearest(key, known()) {
                        Some(name) => Some(format!("did you mean `{name}`?")),
                        None => Some(format!(
                            "known fields: {}",
                            known().collect::<Vec<_>>().join(", ")
                        )),
                    };
                    self.note(*key_at, &inner, message, suggestion);
                }
                (None, Some(rest)) => self.check(value, rest, &inner),
                (None, None) => {}
            }
        }
        for required in schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            if let Some(name) = required.as_str()
                && node.get(name).is_none()
            {
                let hint = fields
                    .and_then(|f| f.get(name))
                    .and_then(|f| f.get("description"));
                let hint = hint.and_then(Value::as_str).map(first_sentence);
                self.note(
                    node.at,
                    &join(path, name),
                    format!("`{name}` is missing"),
                    hint,
                );
            }
        }
    }

    /// One of several: by its tag where there is one, else the branch with the same type.
    fn check_union(&mut self, node: &Node, branches: &'a [Value], path: &str) {
        let constants: Vec<&str> = branches
            .iter()
            .flat_map(|b| {
                let listed = b
                    .get("enum")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten();
                listed.chain(b.get("const")).filter_map(Value::as_str)
            })
            .collect();
        if !constants.is_empty() && constants.len() >= branches.len() {
            match node.text() {
                Some(text) if constants.contains(&text) => {}
                Some(text) => {
                    let suggestion = nearest(text, constants.iter().copied())
                        .map(|name| format!("did you mean `{name}`?"));
                    let list = constants.join("`, `");
                    let shown = shorten(&Value::String(text.to_owned()));
                    self.note(
                        node.at,
                        path,
                        format!("{shown} is not one of `{list}`"),
                        suggestion,
                    );
                }
                None => {
                    let list = constants.join("`, `");
                    self.note(node.at, path, format!("expected one of `{list}`"), None);
                }
            }
            return;
        }
        if let Some((tag, choices)) = tag_of(branches) {
            let Some(chosen) = node.get(tag) else {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                let names = names.join("`, `");
                let message = if matches!(node.value, NodeValue::Map(_)) {
                    format!("`{tag}` is missing: one of `{names}`")
                } else {
                    format!("expected a map with `{tag}`: one of `{names}`")
                };
                self.note(node.at, &join(path, tag), message, None);
                return;
            };
            let text = chosen.text().unwrap_or_default();
            if let Some((_, branch)) = choices.iter().find(|(name, _)| *name == text) {
                self.check(node, branch, path);
            } else {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                let suggestion =
                    nearest(text, names.iter().copied()).map(|n| format!("did you mean `{n}`?"));
                let message = format!(
                    "{} is not one of `{}`",
                    shorten(&chosen.to_json()),
                    names.join("`, `")
                );
                self.note(chosen.at, &join(path, tag), message, suggestion);
            }
            return;
        }
        // Untagged: the branch that fits, else the one that complains least.
        let mut best: Option<Vec<Finding>> = None;
        for branch in branches {
            let mut attempt = Checker {
                definitions: self.definitions,
                findings: Vec::new(),
            };
            attempt.check(node, branch, path);
            if attempt.findings.is_empty() {
                return;
            }
            let same_type = !attempt
                .findings
                .iter()
                .any(|f| f.at == node.at && f.field == path);
            let better = best
                .as_ref()
                .is_none_or(|b| same_type && attempt.findings.len() <= b.len());
            if better {
                best = Some(attempt.findings);
            }
        }
        self.findings.extend(best.unwrap_or_default());
    }

    fn check_scalar(&mut self, at: Position, value: &Value, schema: &Value, path: &str) {
        if let Some(constant) = schema.get("const")
            && constant != value
        {
            self.note(
                at,
                path,
                format!("expected `{}`", constant.as_str().unwrap_or_default()),
                None,
            );
        }
        if let Some(number) = value.as_f64() {
            for (rule, breaks, words) in [
                (
                    "minimum",
                    (|n, limit| n < limit) as fn(f64, f64) -> bool,
                    "at least",
                ),
                ("maximum", |n, limit| n > limit, "at most"),
            ] {
                if let Some(limit) = schema.get(rule).and_then(Value::as_f64)
                    && breaks(number, limit)
                {
                    self.note(at, path, format!("`{value}` must be {words} {limit}"), None);
                }
            }
        }
        if let Some(text) = value.as_str() {
            let count = text.chars().count() as u64;
            self.check_count(
                at,
                path,
                count,
                schema,
                ["minLength", "maxLength"],
                "characters",
            );
        }
        let format = schema.get("format").and_then(Value::as_str);
        if let Some(Err(message)) = format.and_then(|format| check_format(format, value)) {
            self.note(at, path, message, None);
        }
    }

    fn check_count(
        &mut self,
        at: Position,
        path: &str,
        count: u64,
        schema: &Value,
        [min, max]: [&str; 2],
        of: &str,
    ) {
        if let Some(limit) = schema.get(min).and_then(Value::as_u64)
            && count < limit
        {
            self.note(
                at,
                path,
                format!("has {count} {of}, needs at least {limit}"),
                None,
            );
        }
        if let Some(limit) = schema.get(max).and_then(Value::as_u64)
            && count > limit
        {
            self.note(
                at,
                path,
                format!("has {count} {of}, at most {limit} are allowed"),
                None,
            );
        }
    }
}

/// The tag of a tagged union, and its branches by the tag's value.
fn tag_of(branches: &[Value]) -> Option<(&str, Vec<(&str, &Value)>)> {
    let first = branches.first()?.get("properties")?.as_object()?;
    let (tag, _) = first
        .iter()
        .find(|(_, schema)| schema.get("const").is_some())?;
    let choices = branches
        .iter()
        .map(|b| Some((b.get("properties")?.get(tag)?.get("const")?.as_str()?, b)))
        .collect::<Option<Vec<_>>>()?;
    Some((tag, choices))
}

fn check_format(format: &str, value: &Value) -> Option<Result<(), String>> {
    fn parse<T: std::str::FromStr<Err = E>, E: ToString>(text: &str) -> Result<(), String> {
        text.parse::<T>().map(drop).map_err(|e| e.to_string())
    }
    let text = value.as_str()?;
    Some(match format.strip_prefix("emberline ")? {
        "duration" => parse::<DurationText, _>(text),
        "size" => parse::<ByteSize, _>(text),
        "output reference" => parse::<OutputRef, _>(text),
        "SHA-256" => parse::<Digest, _>(text),
        "run id" => parse::<RunId, _>(text),
        "pipeline name" => parse::<PipelineName, _>(text),
        "stage name" => parse::<StageName, _>(text),
        "artifact name" => parse::<ArtifactName, _>(text),
        "model name" => parse::<ModelName, _>(text),
        "secret name" => parse::<SecretName, _>(text),
        "environment name" => parse::<EnvironmentName, _>(text),
        "alias" => parse::<Alias, _>(text),
        "stage kind" => parse::<StageKind, _>(text),
        _ => return None,
    })
}

/// The path of a field below another.
#[must_use]
pub fn join(path: &str, key: &str) -> String {
    let key: String = key.chars().take(80).collect();
    let key = key.escape_debug().to_string();
    if path.is_empty() {
        key
    } else {
        format!("{path}.{key}")
    }
}

fn type_name(json: &str) -> &str {
    match json {
        "object" => "a map",
        "array" => "a list",
        "string" => "a text",
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "`true` or `false`",
        other => other,
    }
}

fn shorten(value: &Value) -> String {
    let text = value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned);
    let cut: String = text.chars().take(60).collect();
    let dots = if cut.len() < text.len() { "…" } else { "" };
    format!("`{}{dots}`", cut.escape_debug())
}

fn first_sentence(text: &str) -> String {
    text.split_once(". ")
        .map_or(text, |(first, _)| first)
        .to_owned()
}
