//! Values that look like secrets. A pipeline and its parameters are stored, and shown to whoever may
//! look at a run: a secret does not belong in them, wherever it stands.

use serde_json::{Map, Value};

use super::{
    check::{Finding, join},
    yaml::{Node, NodeValue, Position},
};
use crate::access::Token;

/// Adds what is found in the file, and in the values that a submit gives its parameters.
pub fn check(root: &Node, given: &Map<String, Value>, findings: &mut Vec<Finding>) {
    walk(root, "", findings);
    let at = root.get("params").map_or(root.at, |params| params.at);
    for (name, value) in given {
        walk(&Node::from_json(value, at), &join("params", name), findings);
    }
}

fn walk(node: &Node, field: &str, findings: &mut Vec<Finding>) {
    match &node.value {
        NodeValue::Map(entries) => {
            for (key, _, value) in entries {
                walk(value, &join(field, key), findings);
            }
        }
        NodeValue::List(items) => {
            for (i, item) in items.iter().enumerate() {
                walk(item, &format!("{field}[{i}]"), findings);
            }
        }
        NodeValue::Scalar(Value::String(text)) => {
            if let Some(what) = looks_like(text) {
                findings.push(finding(node.at, field, what));
            }
        }
        NodeValue::Scalar(_) => {}
    }
}

fn finding(at: Position, field: &str, what: &str) -> Finding {
    Finding {
        at,
        field: field.to_owned(),
        message: format!("this looks like {what}: it would be stored and shown with the run"),
        suggestion: Some("give it to the worker and name it under `secrets`".to_owned()),
    }
}

/// What a text has in it; a secret may stand in the middle of a command.
fn looks_like(text: &str) -> Option<&'static str> {
    if text.contains("-----BEGIN") && text.contains("PRIVATE KEY") {
        return Some("a private key");
    }
    text.split(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c)))
        .find_map(word_looks_like)
}

fn word_looks_like(word: &str) -> Option<&'static str> {
    let word = word.trim_matches(['.', '-']);
    let begins = |with: &[&str]| with.iter().any(|prefix| word.starts_with(prefix));
    let is_key = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit();
    if begins(&["AKIA", "ASIA"]) && word.len() == 20 && word.bytes().all(is_key) {
        Some("an AWS access key")
    } else if begins(&["ghp_", "gho_", "ghs_", "github_pat_"]) && word.len() >= 36 {
        Some("a GitHub token")
    } else if word.starts_with("eyJ") && word.matches('.').count() == 2 && word.len() > 60 {
        Some("a JSON web token")
    } else if begins(&["emb.", "emw."]) && Token::parse(word).is_ok() {
        Some("a token of Emberline")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;
    use crate::spec::{parse_pipeline, yaml};

    fn found(text: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        check(&yaml::parse(text).root.unwrap(), &Map::new(), &mut findings);
        findings
    }

    #[test]
    fn each_kind_is_known_wherever_it_stands() {
        let own = format!("emb.ci.{}", "0123456789abcdef".repeat(4));
        let github = format!("ghp_{}", "a1B2".repeat(9));
        let web = format!("eyJ{0}.eyJ{0}.{0}", "abcd".repeat(8));
        for (secret, what) in [
            ("AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
            (github.as_str(), "a GitHub token"),
            (web.as_str(), "a JSON web token"),
            (own.as_str(), "a token of Emberline"),
        ] {
            for (text, field) in [
                (format!("params: {{ key: {secret} }}"), "params.key"),
                (
                    format!("params: {{ a: [{{ b: {secret} }}] }}"),
                    "params.a[0].b",
                ),
                (
                    format!(
                        "stages: {{ s: {{ with: {{ command: [sh, -c, 'KEY={secret} run'] }} }} }}"
                    ),
                    "stages.s.with.command[2]",
                ),
                (
                    format!(
                        "stages: {{ s: {{ with: {{ env: {{ AUTH: 'Bearer {secret}.' }} }} }} }}"
                    ),
                    "stages.s.with.env.AUTH",
                ),
            ] {
                let found = found(&text);
                assert_eq!(found.len(), 1, "{text}: {found:?}");
                assert_eq!(found[0].field, field);
                assert!(found[0].message.contains(what), "{text}: {found:?}");
                // The mistake is shown to many.
                assert!(!found[0].message.contains(secret));
            }
        }
        let key = "params: { key: \"-----BEGIN EC PRIVATE KEY-----\\nMHcC\" }";
        assert!(found(key)[0].message.contains("a private key"));
    }

    #[test]
    fn what_a_submit_gives_is_looked_at_too() {
        let text = "pipeline: p\nparams: { key: none, list: [] }\nstages: { s: { kind: noop } }\n";
        let given = json!({"key": "AKIAIOSFODNN7EXAMPLE", "list": [["ASIAIOSFODNN7EXAMPLE"]]});
        let told = parse_pipeline("p.yaml", text, given.as_object().unwrap()).unwrap_err();
        let told: Vec<_> = told.iter().map(|d| (d.line, d.field.as_str())).collect();
        assert_eq!(told, [(2, "params.key"), (2, "params.list[0][0]")]);
    }

    #[test]
    fn what_only_begins_like_one_is_taken() {
        for text in [
            "AKIA",
            "ASIAN-markets",
            "ghp_short",
            "eyJ.a.b",
            "emb.ci.secret",
            "file:data/embers.csv",
            "${params.key}",
        ] {
            assert_eq!(looks_like(text), None, "{text}");
        }
    }
}
