//! The model registry.

use std::sync::Arc;

use emberline_common::{
    ids::{Alias, ModelName},
    wire,
};
use emberline_proto::v1::{
    AnnotateVersionRequest, AnnotateVersionResponse, DeleteVersionRequest, DeleteVersionResponse,
    GetModelRequest, GetModelResponse, GetModelVersionRequest, GetModelVersionResponse,
    ImportVersionRequest, ImportVersionResponse, ListModelsRequest, ListModelsResponse,
    ModelVersionView, ModelView, RemoveAliasRequest, RemoveAliasResponse, SetAliasRequest,
    SetAliasResponse, model_service_server::ModelService,
};
use tonic::{Request, Response, Status};

use super::{Context, access::Subject, imports, in_time, status, translate};
use crate::engine::{
    Engine,
    api::{self, Command, Outcome, RegistryCommand, VersionRef},
};

pub(crate) struct Models(pub(crate) Arc<Context>);

fn view(model: api::ModelView) -> ModelView {
    ModelView {
        model: model.model.to_string(),
        latest_version: model.latest_version,
        versions: u32::try_from(model.versions).unwrap_or(u32::MAX),
        aliases: model
            .aliases
            .into_iter()
            .map(|(alias, version)| (alias.to_string(), version))
            .collect(),
    }
}

/// One version, which is part of the request.
fn version_ref(text: &str) -> Result<VersionRef, Status> {
    text.parse()
        .map_err(|why: String| status::bad_field("version", why))
}

fn model_name(text: &str) -> Result<ModelName, Status> {
    wire::id("model", text).map_err(translate::bad)
}

fn alias_name(text: &str) -> Result<Alias, Status> {
    wire::id("alias", text).map_err(translate::bad)
}

fn found(
    engine: &Engine,
    name: &ModelName,
    version: &VersionRef,
) -> Result<ModelVersionView, Status> {
    let found = engine.version_view(name, version);
    let found = found.map_err(|e| status::from_registry(&e))?;
    Ok(translate::model_version(&found))
}

impl Models {
    /// Gives a command whose outcome is a version.
    async fn command(&self, command: RegistryCommand) -> Result<ModelVersionView, Status> {
        let command = Command::Registry(command);
        match self.0.runtime.command(command).await {
            Ok(Outcome::Version(version)) => Ok(translate::model_version(&version)),
            Ok(_) => Err(Status::internal(
                "an answer to something else: please report this",
            )),
            Err(e) => Err(status::from_runtime(e)),
        }
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
            let name = model_name(&request.get_ref().model)?;
            let found = self.0.runtime.read({
                let name = name.clone();
                move |engine| {
                    let (model, versions) = engine.model(&name)?;
                    let versions = versions.iter().map(translate::model_version).collect();
                    let model = Some(view(model));
                    Some(GetModelResponse { model, versions })
                }
            });
            found
                .await
                .map_err(status::from_runtime)?
                .ok_or_else(|| status::not_found("model", name.as_str()))
        })
        .await
    }

    async fn get_model_version(
        &self,
        request: Request<GetModelVersionRequest>,
    ) -> Result<Response<GetModelVersionResponse>, Status> {
        in_time("the answer", async {
            let request = request.into_inner();
            let name = model_name(&request.model)?;
            let version = version_ref(&request.version)?;
            let read = self
                .0
                .runtime
                .read(move |engine| found(engine, &name, &version));
            let version = Some(read.await.map_err(status::from_runtime)??);
            Ok(GetModelVersionResponse { version })
        })
        .await
    }

    async fn set_alias(
        &self,
        request: Request<SetAliasRequest>,
    ) -> Result<Response<SetAliasResponse>, Status> {
        in_time("the answer", async {
            let subject = Subject::of(&request);
            let request = request.into_inner();
            subject.is(format!("{}@{}", request.model, request.alias));
            let command = RegistryCommand::Alias {
                model: model_name(&request.model)?,
                alias: alias_name(&request.alias)?,
                to: Some(version_ref(&request.version)?),
                expected: request.expected,
            };
            let version = Some(self.command(command).await?);
            Ok(SetAliasResponse { version })
        })
        .await
    }

    async fn remove_alias(
        &self,
        request: Request<RemoveAliasRequest>,
    ) -> Result<Response<RemoveAliasResponse>, Status> {
        in_time("the answer", async {
            let subject = Subject::of(&request);
            let request = request.into_inner();
            subject.is(format!("{}@{}", request.model, request.alias));
            let command = RegistryCommand::Alias {
                model: model_name(&request.model)?,
                alias: alias_name(&request.alias)?,
                to: None,
                expected: request.expected,
            };
            let version = Some(self.command(command).await?);
            Ok(RemoveAliasResponse { version })
        })
        .await
    }

    async fn annotate_version(
        &self,
        request: Request<AnnotateVersionRequest>,
    ) -> Result<Response<AnnotateVersionResponse>, Status> {
        in_time("the answer", async {
            let subject = Subject::of(&request);
            let request = request.into_inner();
            subject.is(format!("{}@{}", request.model, request.version));
            let command = RegistryCommand::Annotate {
                model: model_name(&request.model)?,
                version: version_ref(&request.version)?,
                set: request.set_tags.into_iter().collect(),
                remove: request.remove_tags,
                notes: request.notes,
            };
            let version = Some(self.command(command).await?);
            Ok(AnnotateVersionResponse { version })
        })
        .await
    }

    async fn delete_version(
        &self,
        request: Request<DeleteVersionRequest>,
    ) -> Result<Response<DeleteVersionResponse>, Status> {
        in_time("the answer", async {
            let subject = Subject::of(&request);
            let request = request.into_inner();
            subject.is(format!("{}@{}", request.model, request.version));
            let command = RegistryCommand::Delete {
                model: model_name(&request.model)?,
                version: version_ref(&request.version)?,
            };
            let version = Some(self.command(command).await?);
            Ok(DeleteVersionResponse { version })
        })
        .await
    }

    async fn import_version(
        &self,
        request: Request<ImportVersionRequest>,
    ) -> Result<Response<ImportVersionResponse>, Status> {
        in_time("the import", async {
            let subject = Subject::of(&request);
            // Held until the commit has been answered: nothing refers to the artifact before.
            let (import, _hold) = imports::import(&self.0, request.into_inner()).await?;
            subject.is(import.registration.model.as_str());
            let command = RegistryCommand::Import(Box::new(import));
            let version = Some(self.command(command).await?);
            Ok(ImportVersionResponse { version })
        })
        .await
    }
}
