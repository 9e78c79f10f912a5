//! `tokens`: who may call the cluster. A token's secret is made here; the cluster is told its hash.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::Duration,
};

use emberline_common::{
    access::{Role, StaticToken, Token, TokenKind, read_tokens, tokens_line},
    ids::TokenName,
    spec::DurationText,
    time::Timestamp,
};
use emberline_proto::v1::{
    CreateTokenRequest, CredentialView, ListTokensRequest, RevokeTokenRequest, TokenRole,
    TokenView, token_service_client::TokenServiceClient,
};
use serde_json::{Value, json};

use crate::{
    args::{ClusterArguments, Format, TokensCommand},
    client::Cluster,
    exit::Exit,
    leader_channel::LeaderChannel,
    output::{self, clean},
};

/// How long a token to join by is valid, where it is not said.
const JOIN_TTL: Duration = Duration::from_secs(3600);

/// Does one of them.
pub async fn tokens(
    arguments: &ClusterArguments,
    command: TokensCommand,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    if let TokensCommand::Generate {
        name,
        role,
        to,
        hashes,
    } = &command
    {
        return generate(name, *role, to, hashes, quiet);
    }
    let cluster = Cluster::connect(arguments, 0).await?;
    let mut client = cluster.tokens();
    let outcome = match command {
        TokensCommand::Create {
            name,
            role,
            ttl,
            file,
        } => create(&mut client, name, role, ttl, file.as_deref(), format).await,
        TokensCommand::List => list(&mut client, format).await,
        TokensCommand::Revoke { name, worker } => {
            let name = name.map(|name| name.to_string()).unwrap_or_default();
            revoke(&mut client, name, worker.unwrap_or_default(), quiet, format).await
        }
        TokensCommand::Generate { .. } => Ok(()),
    };
    let closed = cluster.close().await;
    outcome.and(closed)
}

/// Without a cluster.
fn generate(
    name: &TokenName,
    role: Role,
    to: &Path,
    hashes: &Path,
    quiet: bool,
) -> anyhow::Result<()> {
    let known = if hashes.exists() {
        read_tokens(hashes).map_err(|e| Exit::input(e.to_string()))?
    } else {
        Vec::new()
    };
    let known = known.iter().find(|token| token.name == *name);
    if to.exists() {
        return check_pair(name, role, to, hashes, known).map_err(Into::into);
    }
    if known.is_some() {
        return Err(Exit::input(format!(
            "`{}` has a token `{name}`, but `{}` is not there: take its line out, or bring the file back",
            hashes.display(),
            to.display()
        ))
        .into());
    }
    let token = Token::generate(TokenKind::Named(name.clone()))?;
    let line = tokens_line(&StaticToken {
        name: name.clone(),
        role,
        hash: token.hash(),
    });
    // The token first: a hash whose token nobody has is of no use, and would be in the way.
    write_secret(to, token.reveal()).map_err(|e| cannot(to, &e))?;
    append(hashes, &line).map_err(|e| cannot(hashes, &e))?;
    if !quiet {
        let (to, hashes) = (to.display(), hashes.display());
        output::line(format!(
            "made the token {name} ({role}): {to}, its hash in {hashes}"
        ))?;
    }
    Ok(())
}

/// A token that was made before must be the one whose hash is there.
fn check_pair(
    name: &TokenName,
    role: Role,
    to: &Path,
    hashes: &Path,
    known: Option<&StaticToken>,
) -> Result<(), Exit> {
    let text = std::fs::read_to_string(to).map_err(|e| cannot(to, &e))?;
    let token = Token::parse(&text).map_err(|e| Exit::input(format!("`{}`: {e}", to.display())))?;
    if *token.kind() != TokenKind::Named(name.clone()) {
        return Err(Exit::input(format!(
            "`{}` is not the token `{name}`",
            to.display()
        )));
    }
    match known {
        Some(known) if known.hash == token.hash() && known.role == role => Ok(()),
        Some(_) => Err(Exit::input(format!(
            "`{}` has another token or another role for `{name}` than `{}`",
            hashes.display(),
            to.display()
        ))),
        None => {
            // It was stopped between the two.
            let line = tokens_line(&StaticToken {
                name: name.clone(),
                role,
                hash: token.hash(),
            });
            append(hashes, &line).map_err(|e| cannot(hashes, &e))
        }
    }
}

fn cannot(path: &Path, e: &io::Error) -> Exit {
    Exit::input(format!("`{}`: {e}", path.display()))
}

fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_data()
}

fn append(path: &Path, line: &str) -> io::Result<()> {
    let mut file: File = OpenOptions::new().append(true).create(true).open(path)?;
    file.write_all(line.as_bytes())?;
    file.sync_data()
}

async fn create(
    client: &mut TokenServiceClient<LeaderChannel>,
    name: TokenName,
    role: Role,
    ttl: Option<DurationText>,
    file: Option<&Path>,
    format: Format,
) -> anyhow::Result<()> {
    let token = Token::generate(TokenKind::Named(name.clone()))?;
    let ttl = ttl.map(|ttl| ttl.0);
    let ttl = ttl.or_else(|| (role == Role::Worker).then_some(JOIN_TTL));
    if let Some(file) = file {
        // What cannot be written is found out before it is made.
        write_secret(file, token.reveal()).map_err(|e| cannot(file, &e))?;
    }
    let request = CreateTokenRequest {
        name: name.to_string(),
        role: TokenRole::from(role).into(),
        hash: token.hash().to_string(),
        ttl: ttl.map(prost_types::Duration::try_from).transpose()?,
    };
    let made = client.create_token(request).await;
    let made = match made {
        Ok(made) => made.into_inner().token.unwrap_or_default(),
        Err(status) => {
            if let Some(file) = file {
                let _ = std::fs::remove_file(file);
            }
            return Err(status.into());
        }
    };
    match (format, file) {
        (Format::Json, file) => {
            let mut value = token_json(&made);
            match file {
                Some(file) => value["file"] = json!(file),
                None => value["token"] = json!(token.reveal()),
            }
            output::json(&value)
        }
        (Format::Text, Some(_)) => Ok(()),
        (Format::Text, None) => Ok(output::line(token.reveal())?),
    }
}

async fn list(
    client: &mut TokenServiceClient<LeaderChannel>,
    format: Format,
) -> anyhow::Result<()> {
    let found = client.list_tokens(ListTokensRequest {}).await?.into_inner();
    if format == Format::Json {
        return output::json(&json!({
            "tokens": found.tokens.iter().map(token_json).collect::<Vec<_>>(),
            "workers": found.credentials.iter().map(worker_json).collect::<Vec<_>>(),
        }));
    }
    let tokens: Vec<Vec<String>> = (found.tokens.iter())
        .map(|token| {
            let by = if token.in_file {
                "(file)"
            } else {
                &token.made_by
            };
            vec![
                token.name.clone(),
                role_name(token.role()).to_owned(),
                until(token.expires_at),
                by.to_owned(),
            ]
        })
        .collect();
    output::table(&["TOKEN", "ROLE", "UNTIL", "MADE BY"], &tokens)?;
    if !found.credentials.is_empty() {
        output::line("")?;
        let workers: Vec<Vec<String>> = (found.credentials.iter())
            .map(|c| vec![c.worker.clone(), c.joined_by.clone(), until(c.expires_at)])
            .collect();
        output::table(&["WORKER", "JOINED BY", "UNTIL"], &workers)?;
    }
    Ok(())
}

async fn revoke(
    client: &mut TokenServiceClient<LeaderChannel>,
    name: String,
    worker: String,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let request = RevokeTokenRequest {
        name: name.clone(),
        worker: worker.clone(),
    };
    let gone = client.revoke_token(request).await?.into_inner().credentials;
    if format == Format::Json {
        return output::json(&json!({"name": name, "worker": worker, "workers": gone}));
    }
    if !quiet {
        output::line(match (worker.is_empty(), gone) {
            (false, _) => format!("worker {} has to join again", clean(&worker)),
            (true, 0) => format!("revoked {name}"),
            (true, 1) => format!("revoked {name}, and 1 worker that had joined by it"),
            (true, n) => format!("revoked {name}, and {n} workers that had joined by it"),
        })?;
    }
    Ok(())
}

fn token_json(token: &TokenView) -> Value {
    json!({
        "name": token.name,
        "role": role_name(token.role()),
        "made_by": token.made_by,
        "in_file": token.in_file,
        "expires_at": moment(token.expires_at),
    })
}

fn worker_json(credential: &CredentialView) -> Value {
    json!({
        "worker": credential.worker,
        "joined_by": credential.joined_by,
        "expires_at": moment(credential.expires_at),
    })
}

fn moment(at: Option<prost_types::Timestamp>) -> Option<String> {
    let at = Timestamp::try_from(at?).ok()?;
    Some(at.to_string())
}

fn until(at: Option<prost_types::Timestamp>) -> String {
    moment(at).unwrap_or_else(|| "revoked".to_owned())
}

const fn role_name(role: TokenRole) -> &'static str {
    match role {
        TokenRole::Unspecified => "-",
        TokenRole::Viewer => "viewer",
        TokenRole::Operator => "operator",
        TokenRole::Admin => "admin",
        TokenRole::Worker => "worker",
    }
}
