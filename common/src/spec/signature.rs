//! What goes into a stage and what comes out of it, by its kind and settings.

use serde_json::Value;

use super::{ArtifactType, StageSpec, kinds::BuiltinKind};

/// One input that a kind knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InputSlot {
    /// Its name; `*` stands for any name.
    pub name: &'static str,
    /// What it may be.
    pub types: &'static [ArtifactType],
    /// Whether it must be there.
    pub required: bool,
    /// Whether it may come from a stage with a matrix.
    pub many: bool,
}

/// What goes in and what comes out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// The inputs. For kinds of one's own: any.
    pub inputs: Vec<InputSlot>,
    /// The outputs by name.
    pub outputs: Vec<(String, ArtifactType)>,
}

const ANY: &[ArtifactType] = &[
    ArtifactType::Files,
    ArtifactType::Table,
    ArtifactType::Model,
    ArtifactType::Validation,
    ArtifactType::Evaluation,
    ArtifactType::Version,
    ArtifactType::Page,
];
const TABLE: &[ArtifactType] = &[ArtifactType::Table];

const fn slot(name: &'static str, types: &'static [ArtifactType], required: bool) -> InputSlot {
    InputSlot {
        name,
        types,
        required,
        many: false,
    }
}

/// The signature of a stage. What its `with` does not say clearly counts as not said; the checker
/// tells that mistake by itself.
#[must_use]
pub fn signature(stage: &StageSpec) -> Signature {
    let declared = || {
        stage
            .outputs
            .iter()
            .map(|(name, t)| (name.to_string(), *t))
            .collect()
    };
    match BuiltinKind::from_name(stage.kind.as_str()) {
        Some(kind) => {
            let mut out = kind_signature(kind, &stage.with);
            if kind == BuiltinKind::Exec {
                out.outputs = declared();
            }
            out
        }
        None => Signature {
            inputs: vec![InputSlot {
                name: "*",
                types: ANY,
                required: false,
                many: true,
            }],
            outputs: declared(),
        },
    }
}

/// The signature of a built-in kind with these settings; the outputs of `exec` are declared elsewhere.
#[must_use]
pub fn kind_signature(kind: BuiltinKind, with: &Value) -> Signature {
    use ArtifactType as T;
    let any_many = InputSlot {
        name: "*",
        types: ANY,
        required: false,
        many: true,
    };
    let (inputs, outputs): (Vec<InputSlot>, Vec<(&str, T)>) = match kind {
        BuiltinKind::Collect => (vec![], vec![("data", T::Files)]),
        BuiltinKind::Convert => {
            let outputs = match with.get("split") {
                None | Some(Value::Null) => vec![("data", T::Table)],
                Some(split) => {
                    let share = split
                        .get("validation")
                        .and_then(Value::as_f64)
                        .unwrap_or(0.0);
                    let mut parts = vec![("train", T::Table), ("test", T::Table)];
                    if share > 0.0 {
                        parts.insert(1, ("validation", T::Table));
                    }
                    parts
                }
            };
            (vec![slot("*", &[T::Files, T::Table], true)], outputs)
        }
        BuiltinKind::Validate => (
            vec![slot("data", TABLE, true), slot("reference", TABLE, false)],
            vec![("validation", T::Validation)],
        ),
        BuiltinKind::Train => (
            vec![slot("train", TABLE, true), slot("validation", TABLE, false)],
            vec![("model", T::Model)],
        ),
        BuiltinKind::Evaluate => (
            vec![
                InputSlot {
                    name: "model",
                    types: &[T::Model],
                    required: true,
                    many: true,
                },
                slot("test", TABLE, true),
                slot("validation", TABLE, false),
            ],
            vec![("evaluation", T::Evaluation), ("model", T::Model)],
        ),
        BuiltinKind::Deploy => (
            vec![
                slot("model", &[T::Model], true),
                slot("evaluation", &[T::Evaluation], false),
            ],
            vec![("version", T::Version)],
        ),
        BuiltinKind::Report => (vec![any_many], vec![("page", T::Page)]),
        BuiltinKind::Exec | BuiltinKind::Noop => (vec![any_many], vec![]),
    };
    Signature {
        inputs,
        outputs: outputs
            .into_iter()
            .map(|(name, t)| (name.to_owned(), t))
            .collect(),
    }
}
