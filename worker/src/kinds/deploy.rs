//! `deploy`: a model into the registry. What it is all about happens at the leader, in the commit
//! of the task; here the registration is put together from what the model and its evaluation say.

use std::{fs, path::Path};

use emberline_common::{
    ids::StageKind,
    run_view::{ModelRegistration, Results},
    spec::{
        ArtifactType,
        kinds::{BuiltinKind, DeploySpec},
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::{
    documents::{EVALUATION_FILE, Evaluation, MODEL_FILE, ModelDocument, VERSION_FILE},
    stage::{
        Input, Produced, ProducedContent, Registration, Stage, StageContext, StageError,
        StageOutput,
    },
};

/// The largest document that is read.
const MAX_DOCUMENT_BYTES: u64 = 64 << 20;

/// The kind `deploy`.
pub struct Deploy;

impl Stage for Deploy {
    fn kind(&self) -> StageKind {
        super::kind(BuiltinKind::Deploy)
    }

    fn version(&self) -> u32 {
        BuiltinKind::Deploy.version()
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: DeploySpec = ctx.spec()?;
        let input = ctx.input("model")?;
        let model: ModelDocument = document(input, MODEL_FILE)?;
        if model.format != 1 {
            return Err(StageError::user(format!(
                "the input `model` has format {}, this program knows 1",
                model.format
            )));
        }
        let evaluation: Option<Evaluation> = ctx
            .optional_input("evaluation")?
            .map(|input| document(input, EVALUATION_FILE))
            .transpose()?;
        let schema = serde_json::to_value(&model.inputs)
            .map_err(|e| StageError::system(format!("cannot write the model's schema: {e}")))?;
        let registration = ModelRegistration {
            model: spec.model,
            alias: spec.alias,
            artifact: input.artifact.clone(),
            metrics: metrics(&model, evaluation.as_ref()),
            schema,
            notes: spec.notes.unwrap_or_default(),
        };
        let output = super::output("version");
        let dir = ctx.output_dir(&output)?;
        let text = serde_json::to_vec_pretty(&json!({
            "registration": registration,
            "run": ctx.attempt.run,
            "task": ctx.attempt.task,
            "pipeline": ctx.pipeline,
        }))
        .map_err(|e| StageError::system(format!("cannot write {VERSION_FILE}: {e}")))?;
        let path = dir.join(VERSION_FILE);
        fs::write(&path, text).map_err(|e| StageError::io("write", &path, e))?;
        ctx.log(match &registration.alias {
            Some(alias) => format!(
                "registers `{}` and moves `{alias}` to it",
                registration.model
            ),
            None => format!("registers `{}`", registration.model),
        });
        let mut results = Results::new();
        results.insert("model".to_owned(), registration.model.as_str().into());
        let artifact = registration.artifact.manifest.to_string();
        results.insert("artifact".to_owned(), artifact.into());
        if let Some(alias) = &registration.alias {
            results.insert("alias".to_owned(), alias.as_str().into());
        }
        Ok(StageOutput {
            artifacts: vec![Produced {
                name: output,
                content: ProducedContent::Directory {
                    dir,
                    artifact_type: ArtifactType::Version,
                    metadata: Map::new(),
                },
            }],
            results,
            registration: Some(Registration(registration)),
        })
    }
}

/// What was measured on the test part; without an evaluation, what the best epoch showed.
fn metrics(model: &ModelDocument, evaluation: Option<&Evaluation>) -> Results {
    let values = match evaluation {
        Some(evaluation) => Some(&evaluation.metrics),
        None => model
            .history
            .iter()
            .find(|epoch| epoch.epoch == model.best_epoch)
            .map(|epoch| &epoch.values),
    };
    values
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.clone(), Value::from(*value)))
        .collect()
}

fn document<T: DeserializeOwned>(input: &Input, file: &str) -> Result<T, StageError> {
    let wrong = |why: String| {
        StageError::user(format!(
            "the input `{}` (from `{}`) has no usable `{file}`: {why}",
            input.name, input.producer
        ))
    };
    if !input.files.iter().any(|path| path == Path::new(file)) {
        return Err(wrong("it is not there".to_owned()));
    }
    let path = input.dir.join(file);
    let bytes = fs::metadata(&path)
        .map_err(|e| StageError::io("read", &path, e))?
        .len();
    if bytes > MAX_DOCUMENT_BYTES {
        return Err(wrong(format!("it has {bytes} bytes")));
    }
    let text = fs::read(&path).map_err(|e| StageError::io("read", &path, e))?;
    serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))
}
