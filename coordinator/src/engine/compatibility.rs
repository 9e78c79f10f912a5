//! Whether a new version takes what clients send now: the columns that the live version takes.

use emberline_common::ids::{EnvironmentName, ModelName};
use serde_json::Value;

/// What is live.
pub(super) struct Live<'a> {
    pub environment: &'a EnvironmentName,
    pub model: &'a ModelName,
    pub version: u32,
    pub schema: &'a Value,
}

/// What a column is called, and what it holds.
fn columns(schema: &Value) -> Option<Vec<(&str, &str)>> {
    let inputs = schema.as_array()?;
    let each = inputs.iter().map(|input| {
        let text = |field: &str| input.get(field)?.as_str();
        Some((text("name")?, text("type")?))
    });
    each.collect()
}

/// Why requests that the live version answers would be refused by one with this schema; none if they would
/// not be, or if either schema is not known.
pub(super) fn refused_by(new: &Value, live: &Live<'_>) -> Option<String> {
    let (new, old) = (columns(new)?, columns(live.schema)?);
    let mut wrong = Vec::new();
    for (name, old_type) in &old {
        match new.iter().find(|(n, _)| n == name) {
            None => wrong.push(format!("does not take the column `{name}`")),
            Some((_, new_type)) if takes(new_type, old_type) => {}
            Some((_, new_type)) => wrong.push(format!(
                "takes `{name}` as {new_type}, and clients send {old_type}"
            )),
        }
    }
    for (name, _) in new.iter().filter(|(n, _)| old.iter().all(|(o, _)| o != n)) {
        wrong.push(format!("needs the column `{name}`, which nobody sends"));
    }
    if wrong.is_empty() {
        return None;
    }
    let more = wrong.len().saturating_sub(5);
    wrong.truncate(5);
    let mut text = wrong.join("; ");
    if more > 0 {
        text += &format!("; and {more} more");
    }
    Some(format!(
        "the new version of `{}` {text}: beside version {} that is live in `{}`; with `allow_schema_change: true` it takes over all the same",
        live.model, live.version, live.environment
    ))
}

/// Whether a column of the one type takes all values of the other.
fn takes(new: &str, old: &str) -> bool {
    new == old || (new == "float" && old == "integer")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn check(new: Value, old: Value) -> Option<String> {
        let live = Live {
            environment: &EnvironmentName::production(),
            model: &"m".parse().unwrap(),
            version: 3,
            schema: &old,
        };
        refused_by(&new, &live)
    }

    #[test]
    fn the_same_columns_in_any_order_are_taken() {
        let old = json!([{"name": "a", "type": "integer"}, {"name": "b", "type": "text"}]);
        let new = json!([{"name": "b", "type": "text"}, {"name": "a", "type": "float"}]);
        assert_eq!(check(new, old), None);
        assert_eq!(check(Value::Null, json!([])), None);
    }

    #[test]
    fn each_column_that_clients_would_fail_on_is_named() {
        let old = json!([{"name": "a", "type": "float"}, {"name": "b", "type": "text"}]);
        let new = json!([{"name": "a", "type": "integer"}, {"name": "c", "type": "text"}]);
        let why = check(new, old).unwrap();
        for part in ["`a` as integer", "`b`", "needs the column `c`", "version 3"] {
            assert!(why.contains(part), "{part}: {why}");
        }
    }
}
