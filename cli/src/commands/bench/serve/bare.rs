//! What the model does by itself: the same rows, encoded and computed by one thread that calls it, with no
//! server around it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use emberline_data::table::Table;
use emberline_proto::v1::{GetArtifactRequest, GetModelVersionRequest};
use emberline_train::{Model, backend::Compute};
use emberline_worker::documents::{MODEL_FILE, WEIGHTS_FILE};

use super::rows::{ROWS, Rows};
use crate::{client::Cluster, fetch};

/// How long each measurement takes.
const LASTS: Duration = Duration::from_millis(500);
/// The larger batch.
const BATCH: usize = 64;
/// The largest file of a model that is read.
const MAX_FILE_BYTES: u64 = 2 << 30;

/// The model of a registered version.
pub(super) async fn fetched(cluster: &Cluster, model: &str, version: u32) -> anyhow::Result<Model> {
    let request = GetModelVersionRequest {
        model: model.to_owned(),
        version: version.to_string(),
    };
    let found = cluster.models().get_model_version(request).await?;
    let found = found.into_inner().version.unwrap_or_default();
    let request = GetArtifactRequest {
        artifact: found.artifact.unwrap_or_default().manifest,
    };
    let artifact = cluster.artifacts().get_artifact(request).await?;
    let files = artifact.into_inner().files;
    let mut parts = Vec::new();
    for path in [MODEL_FILE, WEIGHTS_FILE] {
        let file = files.iter().find(|file| file.path == path);
        let file = file.with_context(|| format!("the model `{model}` has no `{path}`"))?;
        parts.push(fetch::bytes(cluster, &file.sha256, MAX_FILE_BYTES).await?);
    }
    let [document, weights] = <[Vec<u8>; 2]>::try_from(parts).unwrap_or_default();
    Ok(Model::from_parts(&document, weights, &Compute::cpu())?)
}

/// Rows in a second, one at a time and many at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bare {
    pub one: f64,
    pub many: f64,
}

impl Bare {
    /// Measures it now.
    pub(super) async fn measure(model: &Arc<Model>, rows: &Arc<Rows>) -> anyhow::Result<Self> {
        let (model, rows) = (Arc::clone(model), Arc::clone(rows));
        tokio::task::spawn_blocking(move || {
            Ok(Self {
                one: rate(&model, &rows, 1)?,
                many: rate(&model, &rows, BATCH)?,
            })
        })
        .await?
    }

    /// Between two measurements, since the machine's neighbours change.
    pub(super) const fn between(self, other: Self) -> Self {
        Self {
            one: f64::midpoint(self.one, other.one),
            many: f64::midpoint(self.many, other.many),
        }
    }
}

fn rate(model: &Model, rows: &Rows, batch: usize) -> anyhow::Result<f64> {
    let starts = (0..ROWS).step_by(batch);
    let tables: Vec<Table> = (starts.map(|at| rows.table(at..at + batch))).collect();
    // Once through all of them before it counts.
    for table in &tables {
        model.predict(table)?;
    }
    let begun = Instant::now();
    let mut computed = 0_u32;
    for table in tables.iter().cycle() {
        std::hint::black_box(model.predict(table)?);
        computed += 1;
        if begun.elapsed() >= LASTS {
            break;
        }
    }
    #[allow(clippy::cast_precision_loss, reason = "64")]
    let rows = f64::from(computed) * batch as f64;
    Ok(rows / begun.elapsed().as_secs_f64())
}
