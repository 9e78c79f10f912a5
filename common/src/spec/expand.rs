//! From a stage as written to its tasks: the matrix, and `${…}` references.

use serde_json::{Map, Value};

use super::StageSpec;

/// The matrix values of each task of a stage: one empty map without a matrix, else one map for each
/// combination, in the order in which the last name varies fastest.
#[must_use]
pub fn matrix_values(stage: &StageSpec) -> Vec<Map<String, Value>> {
    let mut out = vec![Map::new()];
    for (name, values) in &stage.matrix {
        let mut next = Vec::with_capacity(out.len() * values.len());
        for chosen in &out {
            for value in values {
                let mut chosen = chosen.clone();
                chosen.insert(name.clone(), value.clone());
                next.push(chosen);
            }
        }
        out = next;
    }
    out
}

/// How many tasks a stage has; `usize::MAX` where that cannot be counted.
#[must_use]
pub fn matrix_size(stage: &StageSpec) -> usize {
    stage
        .matrix
        .values()
        .fold(1, |n, values| n.saturating_mul(values.len()))
}

/// Fills in `${matrix.name}` everywhere in a stage's `with`. A text that is only a reference takes
/// the value with its type; `$${` stands for a plain `${`.
///
/// # Errors
/// Names the reference that there is no value for.
pub fn fill(with: &Value, matrix: &Map<String, Value>) -> Result<Value, String> {
    Ok(match with {
        Value::String(text) => fill_text(text, "matrix", matrix)?,
        Value::Array(items) => Value::Array(
            items
                .iter()
                .map(|v| fill(v, matrix))
                .collect::<Result<_, _>>()?,
        ),
        Value::Object(map) => Value::Object(
            map.iter()
                .map(|(k, v)| Ok((k.clone(), fill(v, matrix)?)))
                .collect::<Result<_, String>>()?,
        ),
        other => other.clone(),
    })
}

/// Fills in the references `${scope.name}` of one text; those of other scopes stay as they are.
/// In the scope `matrix`, which is the last to be filled in, `$${` becomes `${`.
///
/// # Errors
/// Names the reference that there is no value for, or that is not closed.
pub fn fill_text(text: &str, scope: &str, values: &Map<String, Value>) -> Result<Value, String> {
    let last_scope = scope == "matrix";
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            out.push_str(&rest[..at - usize::from(last_scope)]);
            out.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        let end = rest[at..]
            .find('}')
            .ok_or_else(|| format!("`{rest}` has a `${{` without its `}}`"))?;
        let (reference, after) = (&rest[at + 2..at + end], &rest[at + end + 1..]);
        out.push_str(&rest[..at]);
        match reference.trim().split_once('.') {
            Some((s, name)) if s == scope => {
                let value = values
                    .get(name)
                    .ok_or_else(|| format!("`${{{reference}}}` names no value of `{scope}`"))?;
                if at == 0 && after.is_empty() && out.is_empty() {
                    return Ok(value.clone());
                }
                match value {
                    Value::String(s) => out.push_str(s),
                    other => out.push_str(&other.to_string()),
                }
            }
            Some(("params" | "matrix", _)) => out.push_str(&rest[at..=at + end]),
            _ => {
                return Err(format!(
                    "`${{{reference}}}` is no reference: write `${{params.name}}` or `${{matrix.name}}`, or `$${{` for a plain `${{`"
                ));
            }
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(Value::String(out))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn values(value: &Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn a_text_that_is_only_a_reference_takes_the_type() {
        let matrix = values(&json!({"lr": 0.1, "tag": "a"}));
        let with = json!({"rate": "${matrix.lr}", "name": "m-${matrix.tag}-${matrix.lr}", "n": [1, "${matrix.tag}"]});
        let filled = fill(&with, &matrix);
        assert_eq!(
            filled,
            Ok(json!({"rate": 0.1, "name": "m-a-0.1", "n": [1, "a"]}))
        );
    }

    #[test]
    fn what_is_escaped_or_of_another_scope_stays() {
        let params = values(&json!({"x": 1}));
        let first = fill_text("$${params.x} ${matrix.y} ${params.x}", "params", &params);
        assert_eq!(first, Ok(json!("$${params.x} ${matrix.y} 1")));
        let second = fill_text(
            "$${params.x} ${matrix.y}",
            "matrix",
            &values(&json!({"y": "b"})),
        );
        assert_eq!(second, Ok(json!("${params.x} b")));
    }

    #[test]
    fn a_reference_without_a_value_is_named() {
        for text in ["${matrix.z}", "${oops}", "${matrix.z"] {
            assert!(
                fill_text(text, "matrix", &Map::new()).is_err(),
                "{text} was taken"
            );
        }
    }

    #[test]
    fn the_last_name_of_a_matrix_varies_fastest() -> Result<(), serde_json::Error> {
        let stage: StageSpec = serde_json::from_value(
            json!({"kind": "noop", "matrix": {"a": [1, 2], "b": ["x", "y"]}}),
        )?;
        let all: Vec<_> = matrix_values(&stage)
            .into_iter()
            .map(Value::Object)
            .collect();
        assert_eq!(
            all,
            [
                json!({"a":1,"b":"x"}),
                json!({"a":1,"b":"y"}),
                json!({"a":2,"b":"x"}),
                json!({"a":2,"b":"y"})
            ]
        );
        assert_eq!(matrix_size(&stage), 4);
        Ok(())
    }
}
