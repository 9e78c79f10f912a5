//! Tokens: who may call the API.

use std::{sync::Arc, time::Duration};

use emberline_common::{
    access::{Role, TokenHash},
    ids::{TokenName, WorkerName},
    time::Timestamp,
    wire,
};
use emberline_proto::v1::{
    CreateTokenRequest, CreateTokenResponse, CredentialView, ListTokensRequest, ListTokensResponse,
    RevokeTokenRequest, RevokeTokenResponse, TokenRole, TokenView,
    token_service_server::TokenService,
};
use tonic::{Request, Response, Status};

use super::{
    Context,
    access::{self, Subject},
    in_time, status, translate,
};
use crate::engine::api::{Command, Outcome, TokenCommand, TokenRecord};

/// No token is made for a shorter time.
const LEAST_TTL: Duration = Duration::from_secs(1);
/// Nor for a longer one, but for those without an end.
const MOST_TTL: Duration = Duration::from_hours(24 * 3650);

pub(crate) struct Tokens(pub(crate) Arc<Context>);

impl Tokens {
    async fn command(&self, command: TokenCommand) -> Result<usize, Status> {
        let command = Command::Tokens(command);
        match self.0.runtime.command(command).await {
            Ok(Outcome::Revoked { credentials }) => Ok(credentials),
            Ok(_) => Err(Status::internal(
                "an answer to something else: please report this",
            )),
            Err(e) => Err(status::from_runtime(e)),
        }
    }
}

#[tonic::async_trait]
impl TokenService for Tokens {
    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let made_by = access::caller(&request)?.by.to_string();
        let subject = Subject::of(&request);
        let request = request.into_inner();
        subject.is(request.name.as_str());
        let name: TokenName = wire::id("name", &request.name).map_err(translate::bad)?;
        let role = role(request.role())?;
        let hash: TokenHash =
            (request.hash.parse()).map_err(|why: &str| status::bad_field("hash", why))?;
        let ttl = ttl(request.ttl)?;
        if self.0.gate.in_file().await.iter().any(|t| t.name == name) {
            return Err(status::exists(format!(
                "the coordinators' file has a token `{name}`: choose another name"
            )));
        }
        in_time("the answer", async {
            self.command(TokenCommand::Create {
                name: name.clone(),
                role,
                hash,
                ttl,
                made_by,
            })
            .await?;
            let key = name.clone();
            let made = self
                .0
                .runtime
                .read(move |engine| engine.access().tokens.get(&key).cloned());
            let made = made.await.map_err(status::from_runtime)?;
            Ok(CreateTokenResponse {
                token: made.map(|record| view(&name, &record)),
            })
        })
        .await
    }

    async fn list_tokens(
        &self,
        _: Request<ListTokensRequest>,
    ) -> Result<Response<ListTokensResponse>, Status> {
        in_time("the answer", async {
            let in_file = self.0.gate.in_file().await;
            let table = self.0.runtime.read(|engine| Arc::clone(engine.access()));
            let table = table.await.map_err(status::from_runtime)?;
            let made = table.tokens.iter().map(|(name, record)| view(name, record));
            let in_file = in_file.iter().map(|token| TokenView {
                name: token.name.to_string(),
                role: TokenRole::from(token.role).into(),
                in_file: true,
                ..TokenView::default()
            });
            let mut tokens: Vec<TokenView> = in_file.chain(made).collect();
            tokens.sort_by(|a, b| a.name.cmp(&b.name));
            let credentials = table.credentials.iter();
            let credentials = credentials.map(|(worker, record)| CredentialView {
                worker: worker.to_string(),
                joined_by: record.joined_by.to_string(),
                issued_at: Some(record.issued_at.into()),
                expires_at: Some(record.expires_at.into()),
            });
            Ok(ListTokensResponse {
                tokens,
                credentials: credentials.collect(),
            })
        })
        .await
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Result<Response<RevokeTokenResponse>, Status> {
        let subject = Subject::of(&request);
        let request = request.into_inner();
        subject.is(match request.worker.as_str() {
            "" => request.name.clone(),
            worker => format!("worker {worker}"),
        });
        let name: Option<TokenName> =
            wire::optional_id("name", &request.name).map_err(translate::bad)?;
        let worker: Option<WorkerName> =
            wire::optional_id("worker", &request.worker).map_err(translate::bad)?;
        let command = match (name, worker) {
            (Some(name), None) => {
                if self.0.gate.in_file().await.iter().any(|t| t.name == name) {
                    return Err(status::failed_precondition(
                        "IN_FILE",
                        format!("the coordinators' file has the token `{name}`: take it out there"),
                    ));
                }
                TokenCommand::Revoke { name }
            }
            (None, Some(worker)) => TokenCommand::RevokeWorker { worker },
            _ => return Err(status::bad_field("name", "say either a name or a worker")),
        };
        in_time("the answer", async {
            let credentials = self.command(command).await?;
            Ok(RevokeTokenResponse {
                credentials: u32::try_from(credentials).unwrap_or(u32::MAX),
            })
        })
        .await
    }
}

fn role(role: TokenRole) -> Result<Role, Status> {
    match role {
        TokenRole::Viewer => Ok(Role::Viewer),
        TokenRole::Operator => Ok(Role::Operator),
        TokenRole::Admin => Ok(Role::Admin),
        TokenRole::Worker => Ok(Role::Worker),
        TokenRole::Unspecified => Err(status::bad_field("role", "it is missing")),
    }
}

fn ttl(ttl: Option<prost_types::Duration>) -> Result<Option<Duration>, Status> {
    let Some(ttl) = ttl else { return Ok(None) };
    let given = Duration::try_from(ttl).ok();
    match given.filter(|ttl| (LEAST_TTL..=MOST_TTL).contains(ttl)) {
        Some(ttl) => Ok(Some(ttl)),
        None => Err(status::bad_field("ttl", "it must be between 1s and 3650d")),
    }
}

fn view(name: &TokenName, record: &TokenRecord) -> TokenView {
    TokenView {
        name: name.to_string(),
        role: TokenRole::from(record.role).into(),
        made_by: record.made_by.clone(),
        created_at: Some(record.created_at.into()),
        expires_at: record.expires_at.map(Timestamp::into),
        in_file: false,
    }
}
