//! The model registry, to read.

use std::sync::Arc;

use emberline_common::{ids::ModelName, run_view::ModelVersion, wire};
use emberline_proto::v1::{
    GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse, ModelVersionView,
    ModelView, model_service_server::ModelService,
};
use tonic::{Request, Response, Status};

use super::{Context, in_time, status, translate};
use crate::engine::api;

pub(crate) struct Models(pub(crate) Arc<Context>);

fn view(model: api::ModelView) -> ModelView {
    ModelView {
        model: model.model.to_string(),
        latest_version: model.latest_version,
        aliases: model
            .aliases
            .into_iter()
            .map(|(alias, version)| (alias.to_string(), version))
            .collect(),
    }
}

fn version(version: &ModelVersion) -> ModelVersionView {
    let registration = &version.registration;
    ModelVersionView {
        model: registration.model.to_string(),
        version: version.version,
        artifact: Some((&registration.artifact).into()),
        metrics_json: wire::object_text(&registration.metrics),
        schema_json: if registration.schema.is_null() {
            String::new()
        } else {
            registration.schema.to_string()
        },
        run: version.run.to_string(),
        task: version.task.to_string(),
        pipeline: version.pipeline.to_string(),
        pipeline_revision: version.pipeline_revision.to_string(),
        lineage: version
            .lineage
            .iter()
            .map(|(name, digest)| (name.clone(), digest.to_string()))
            .collect(),
        notes: registration.notes.clone(),
        created_at: Some(version.created_at.into()),
    }
}

#[tonic::async_trait]
impl ModelService for Models {
    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        in_time("the list", async {
            let request = request.into_inner();
            let size = translate::page_size(request.page_size);
            let after: Option<ModelName> =
                wire::optional_id("page_token", &request.page_token).map_err(translate::bad)?;
            let page = self.0.runtime.read(move |engine| {
                let mut models: Vec<ModelView> = engine
                    .models()
                    .filter(|m| after.as_ref().is_none_or(|a| m.model > *a))
                    .take(size + 1)
                    .map(view)
                    .collect();
                let more = models.len() > size;
                models.truncate(size);
                (models, more)
            });
            let (models, more) = page.await.map_err(status::from_runtime)?;
            let next_page_token = match models.last() {
                Some(last) if more => last.model.clone(),
                _ => String::new(),
            };
            Ok(ListModelsResponse {
                models,
                next_page_token,
            })
        })
        .await
    }

    async fn get_model(
        &self,
        request: Request<GetModelRequest>,
    ) -> Result<Response<GetModelResponse>, Status> {
        in_time("the answer", async {
            let name: ModelName =
                wire::id("model", &request.get_ref().model).map_err(translate::bad)?;
            let found = self.0.runtime.read({
                let name = name.clone();
                move |engine| {
                    engine
                        .model(&name)
                        .map(|(model, versions)| GetModelResponse {
                            model: Some(view(model)),
                            versions: versions.iter().map(version).collect(),
                        })
                }
            });
            found
                .await
                .map_err(status::from_runtime)?
                .ok_or_else(|| status::not_found("model", name.as_str()))
        })
        .await
    }
}
