//! The JSON Schema of the pipeline file, made from the types.
//!
//! Editors use it for completion, the checker walks it, the reference is printed from it. `with` is
//! typed by `kind`: the published schema says so with one `if`/`then` for each built-in kind.

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    PipelineSpec,
    kinds::{
        BuiltinKind, CollectSpec, ConvertSpec, DeploySpec, EvaluateSpec, ExecSpec, NoopSpec,
        ReportSpec, TrainSpec, ValidateSpec,
    },
};

fn generator() -> SchemaGenerator {
    SchemaSettings::draft2020_12().into_generator()
}

fn root_of<T: JsonSchema>() -> Value {
    generator().into_root_schema_for::<T>().to_value()
}

/// The schema of the whole file with `with` left open.
#[must_use]
pub fn pipeline_schema() -> Value {
    root_of::<PipelineSpec>()
}

/// The schema of a built-in kind's `with`.
#[must_use]
pub fn kind_schema(kind: BuiltinKind) -> Value {
    match kind {
        BuiltinKind::Collect => root_of::<CollectSpec>(),
        BuiltinKind::Convert => root_of::<ConvertSpec>(),
        BuiltinKind::Validate => root_of::<ValidateSpec>(),
        BuiltinKind::Train => root_of::<TrainSpec>(),
        BuiltinKind::Evaluate => root_of::<EvaluateSpec>(),
        BuiltinKind::Deploy => root_of::<DeploySpec>(),
        BuiltinKind::Report => root_of::<ReportSpec>(),
        BuiltinKind::Exec => root_of::<ExecSpec>(),
        BuiltinKind::Noop => root_of::<NoopSpec>(),
    }
}

/// The schema to publish: JSON Schema draft 2020-12, with `with` typed by `kind`.
#[must_use]
pub fn json_schema() -> Value {
    let mut root = pipeline_schema();
    let mut definitions = Map::new();
    let mut branches = Vec::new();
    for kind in BuiltinKind::ALL {
        let mut schema = kind_schema(kind);
        if let Some(map) = schema.as_object_mut() {
            map.shift_remove("$schema");
            if let Some(Value::Object(inner)) = map.shift_remove("$defs") {
                definitions.extend(inner);
            }
        }
        let name = format!("with-{}", kind.as_str());
        branches.push(json!({
            "if": { "properties": { "kind": { "const": kind.as_str() } }, "required": ["kind"] },
            "then": { "properties": { "with": { "$ref": format!("#/$defs/{name}") } } }
        }));
        definitions.insert(name, schema);
    }
    if let Some(defs) = root.get_mut("$defs").and_then(Value::as_object_mut) {
        if let Some(stage) = defs.get_mut("StageSpec").and_then(Value::as_object_mut) {
            stage.insert("allOf".to_owned(), Value::Array(branches));
            let names: Vec<_> = BuiltinKind::ALL.iter().map(|k| k.as_str()).collect();
            if let Some(kind) = stage.get_mut("properties").and_then(|p| p.get_mut("kind")) {
                kind["anyOf"] = json!([{ "enum": names }, { "pattern": "^[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*$" }]);
            }
        }
        defs.extend(definitions);
    }
    root["title"] = json!("Emberline pipeline");
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field of every type says what it is.
    #[test]
    fn no_field_is_without_a_description() {
        fn walk(value: &Value, path: &str, missing: &mut Vec<String>) {
            if let Some(fields) = value.get("properties").and_then(Value::as_object) {
                for (name, field) in fields {
                    // The tag of a union is described by its variants.
                    let described =
                        field.get("description").is_some() || field.get("const").is_some();
                    if !described && !path.contains("allOf") {
                        missing.push(format!("{path}.{name}"));
                    }
                }
            }
            match value {
                Value::Object(map) => {
                    map.iter()
                        .for_each(|(k, v)| walk(v, &format!("{path}/{k}"), missing));
                }
                Value::Array(items) => {
                    items
                        .iter()
                        .enumerate()
                        .for_each(|(i, v)| walk(v, &format!("{path}/{i}"), missing));
                }
                _ => {}
            }
        }
        let mut missing = Vec::new();
        walk(&json_schema(), "", &mut missing);
        assert_eq!(missing, Vec::<String>::new());
    }
}
