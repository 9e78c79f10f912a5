//! A worker of your own with a stage kind of your own.
//!
//! `demo/word-count` counts the words of its input and takes a `min_length`. In a pipeline:
//!
//! ```yaml
//! count:
//!   kind: demo/word-count
//!   inputs: { text: raw.data }
//!   with: { min_length: 4 }
//!   outputs: { counts: files }
//! ```
//!
//! Start a cluster (`emberline dev`), then this worker with the address that it shows:
//! `cargo run -p emberline-worker --example own_stage -- 127.0.0.1:7420`

use std::{collections::BTreeMap, error::Error, fs, sync::Arc, time::Duration};

use emberline_common::ids::{StageKind, WorkerName};
use emberline_worker::{
    Worker, WorkerConfig, builtin_stages,
    kinds::collect::Reach,
    stage::{Produced, ProducedContent, Stage, StageContext, StageError, StageOutput},
};
use serde::Deserialize;
use serde_json::Map;

/// What stands under `with`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WordCountSpec {
    #[serde(default)]
    min_length: usize,
}

struct WordCount(StageKind);

impl Stage for WordCount {
    fn kind(&self) -> StageKind {
        self.0.clone()
    }

    fn version(&self) -> u32 {
        1
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: WordCountSpec = ctx.spec()?;
        let input = ctx.input("text")?;
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for file in &input.files {
            // Asked between pieces of work, so that a cancelled run stops soon.
            ctx.check_cancelled()?;
            let path = input.dir.join(file);
            let text = fs::read_to_string(&path)
                .map_err(|e| StageError::data(format!("`{}`: {e}", file.display())))?;
            for word in text
                .split_whitespace()
                .filter(|word| word.len() >= spec.min_length)
            {
                *counts.entry(word.to_lowercase()).or_default() += 1;
            }
            ctx.log(format!("read {}", file.display()));
        }

        // An output is a directory with files; it is stored when this returns.
        let (name, artifact_type) = ctx.outputs.first().cloned().ok_or_else(|| {
            StageError::user("declare an output, e.g. `outputs: { counts: files }`")
        })?;
        let dir = ctx.output_dir(&name)?;
        let path = dir.join("counts.json");
        let json =
            serde_json::to_vec_pretty(&counts).map_err(|e| StageError::system(e.to_string()))?;
        fs::write(&path, json).map_err(|e| StageError::io("write", &path, e))?;

        // Results can be used in conditions: `when: count.words > 100`.
        let mut results = Map::new();
        results.insert("words".to_owned(), counts.values().sum::<u64>().into());
        Ok(StageOutput {
            artifacts: vec![Produced {
                name,
                content: ProducedContent::Directory {
                    dir,
                    artifact_type,
                    metadata: Map::new(),
                },
            }],
            results,
            registration: None,
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let leader = std::env::args()
        .nth(1)
        .ok_or("usage: own_stage LEADER (host:port)")?;
    let config = WorkerConfig {
        name: WorkerName::new("own-stage")?,
        leaders: vec![leader],
        state_dir: std::env::temp_dir().join("emberline-own-stage"),
        ..WorkerConfig::default()
    };
    let worker = Worker::builder(config)
        .stages(builtin_stages(Reach::default()))
        .stage(Arc::new(WordCount(StageKind::new("demo/word-count")?)))
        .start()
        .await?;
    let mut leader = worker.leader();
    leader.wait_for(Option::is_some).await?;
    eprintln!("connected; Ctrl-C to drain");
    tokio::signal::ctrl_c().await?;
    worker.drain(Duration::from_secs(60)).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use emberline_common::spec::ArtifactType;
    use emberline_worker::testing::TestContext;
    use serde_json::json;

    use super::*;

    #[test]
    fn words_are_counted() -> Result<(), Box<dyn Error>> {
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join("a.txt"), "a tale of two Tale")?;
        let test = TestContext::builder()
            .spec(json!({"min_length": 3}))
            .input("text", ArtifactType::Files, dir.path())
            .declare_output("counts", ArtifactType::Files)
            .build();
        let output = WordCount(StageKind::new("demo/word-count")?).run(&test.ctx)?;
        assert_eq!(output.results["words"], 3);
        let counts = test.output(&output.artifacts, "counts").join("counts.json");
        assert!(fs::read_to_string(counts)?.contains("\"tale\": 2"));
        Ok(())
    }
}
