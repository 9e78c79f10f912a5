//! The stage: reads the inputs, writes the page.

use std::fs;

use emberline_common::{
    ids::{ArtifactName, StageKind},
    spec::{
        ArtifactType,
        kinds::{BuiltinKind, ReportSpec},
    },
};
use emberline_worker::{
    documents::REPORT_FILE,
    stage::{Produced, ProducedContent, Stage, StageContext, StageError, StageOutput},
};
use serde_json::Map;

use crate::{material::Material, page};

/// The stage kind `report`.
#[derive(Debug, Clone, Copy)]
pub struct Report;

impl Stage for Report {
    fn kind(&self) -> StageKind {
        BuiltinKind::Report.into()
    }

    fn version(&self) -> u32 {
        BuiltinKind::Report.version()
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: ReportSpec = ctx.spec()?;
        let material = Material::read(ctx, spec.title);
        for notice in &material.notices {
            ctx.log(notice);
        }
        ctx.check_cancelled()?;
        let text = page::write(&material);
        let name = ArtifactName::new("page").map_err(|e| StageError::system(e.to_string()))?;
        let dir = ctx.output_dir(&name)?;
        let path = dir.join(REPORT_FILE);
        fs::write(&path, &text).map_err(|e| StageError::io("write", &path, e))?;
        ctx.log(format!(
            "wrote {REPORT_FILE}, {}",
            crate::format::bytes(text.len() as u64)
        ));
        Ok(StageOutput {
            artifacts: vec![Produced {
                name,
                content: ProducedContent::Directory {
                    dir,
                    artifact_type: ArtifactType::Page,
                    metadata: Map::new(),
                },
            }],
            ..StageOutput::default()
        })
    }
}
