//! Artifacts: to look at, to read, to store what travels with a submission, and to collect.

use std::{sync::Arc, time::Duration};

use emberline_common::{
    ids::{ArtifactName, Digest, TaskName},
    wire,
};
use emberline_proto::v1::{
    ArtifactFile, CollectGarbageRequest, CollectGarbageResponse, GetArtifactRequest,
    GetArtifactResponse, PutBlobRequest, PutBlobResponse, ReadBlobRequest, ReadBlobResponse,
    artifact_service_server::ArtifactService,
};
use futures::{StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, Context, in_time, status, translate};
use crate::gc;

/// The largest piece of a file in one message.
const PIECE_BYTES: usize = 256 << 10;
/// The largest piece that a client may send.
const MAX_PIECE_BYTES: usize = 1 << 20;
/// How long a client may take for the next piece.
const PIECE_WITHIN: Duration = Duration::from_secs(30);
const DEFAULT_MIN_AGE: Duration = Duration::from_hours(24);

pub(crate) struct Artifacts(pub(crate) Arc<Context>);

impl Artifacts {
    /// A manifest's digest, or `RUN/TASK/OUTPUT`.
    async fn find(&self, text: &str) -> Result<Digest, Status> {
        if let Ok(digest) = text.parse() {
            return Ok(digest);
        }
        let parts: Vec<&str> = text.split('/').collect();
        let [run, task, output] = parts.as_slice() else {
            return Err(status::bad_field(
                "artifact",
                "write a manifest's SHA-256 (64 lower-case hex digits), or `RUN/TASK/OUTPUT`",
            ));
        };
        let task: TaskName = wire::id("artifact", task).map_err(translate::bad)?;
        let output: ArtifactName = wire::id("artifact", output).map_err(translate::bad)?;
        let view = self.0.lookup.view(run).await;
        let view = view.map_err(status::from_lookup)?;
        let Some(found) = view.tasks.iter().find(|t| t.task == task) else {
            return Err(status::not_found("task", task.as_str()));
        };
        found
            .outputs
            .iter()
            .find(|o| o.name == output)
            .map(|o| o.manifest)
            .ok_or_else(|| status::not_found("output", text))
    }

    async fn get(&self, text: &str) -> Result<GetArtifactResponse, Status> {
        let digest = self.find(text).await?;
        let manifest = self.0.artifacts.get_manifest(&digest).await;
        let manifest = manifest.map_err(|e| status::from_artifact(&e))?;
        Ok(GetArtifactResponse {
            manifest: digest.to_string(),
            files: manifest
                .files
                .into_iter()
                .map(|file| ArtifactFile {
                    path: file.path,
                    sha256: file.sha256.to_string(),
                    bytes: file.bytes,
                })
                .collect(),
            media_type: manifest.artifact_type.as_str().to_owned(),
            metadata_json: wire::object_text(&manifest.metadata),
        })
    }

    async fn put(&self, mut pieces: Streaming<PutBlobRequest>) -> Result<PutBlobResponse, Status> {
        let mut expected: Option<Digest> = None;
        let mut writer = self.0.artifacts.writer();
        while let Some(piece) = tokio::time::timeout(PIECE_WITHIN, pieces.message())
            .await
            .map_err(|_| status::timed_out("the next piece"))??
        {
            match &expected {
                None => {
                    expected = Some(wire::id("sha256", &piece.sha256).map_err(translate::bad)?);
                }
                Some(first) if !piece.sha256.is_empty() && piece.sha256 != first.to_string() => {
                    return Err(status::bad_field("sha256", "it differs from the first one"));
                }
                Some(_) => {}
            }
            if piece.data.len() > MAX_PIECE_BYTES {
                return Err(status::too_large(format!(
                    "a piece has {} bytes, at most {MAX_PIECE_BYTES} are taken",
                    piece.data.len()
                )));
            }
            let written = writer.write(piece.data.into()).await;
            written.map_err(|e| status::from_artifact(&e))?;
        }
        let Some(expected) = expected else {
            return Err(status::bad_field("sha256", "the first message has it"));
        };
        let (_, bytes) = writer
            .finish(Some(expected))
            .await
            .map_err(|e| status::from_artifact(&e))?;
        Ok(PutBlobResponse { bytes })
    }

    async fn collect(
        &self,
        request: CollectGarbageRequest,
    ) -> Result<CollectGarbageResponse, Status> {
        let options = gc::Options {
            dry_run: request.dry_run,
            min_age: match request.min_age_seconds {
                None => DEFAULT_MIN_AGE,
                Some(seconds) => Duration::from_secs(seconds),
            },
            forget_runs_older_than: request
                .forget_runs_older_than_seconds
                .map(Duration::from_secs),
        };
        let found = self.0.collector.collect(options).await;
        let found = found.map_err(|e| status::from_collection(&e))?;
        Ok(CollectGarbageResponse {
            kept_objects: found.kept.objects,
            kept_bytes: found.kept.bytes,
            removed_objects: found.removed.objects,
            removed_bytes: found.removed.bytes,
            young_objects: found.young.objects,
            forgotten_runs: found.forgotten_runs,
            removed: found.first_removed,
        })
    }
}

#[tonic::async_trait]
impl ArtifactService for Artifacts {
    type ReadBlobStream = Answers<ReadBlobResponse>;

    async fn get_artifact(
        &self,
        request: Request<GetArtifactRequest>,
    ) -> Result<Response<GetArtifactResponse>, Status> {
        in_time("the answer", self.get(&request.get_ref().artifact)).await
    }

    async fn read_blob(
        &self,
        request: Request<ReadBlobRequest>,
    ) -> Result<Response<Self::ReadBlobStream>, Status> {
        let digest: Digest =
            wire::id("sha256", &request.get_ref().sha256).map_err(translate::bad)?;
        let stop = self.0.tasks.stopping().clone();
        let pieces = self.0.artifacts.read(&digest).flat_map(|piece| {
            stream::iter(match piece {
                Ok(mut bytes) => {
                    let mut pieces = Vec::with_capacity(bytes.len() / PIECE_BYTES + 1);
                    while !bytes.is_empty() {
                        let data = bytes.split_to(bytes.len().min(PIECE_BYTES));
                        pieces.push(Ok(ReadBlobResponse { data: data.into() }));
                    }
                    pieces
                }
                Err(e) => vec![Err(status::from_artifact(&e))],
            })
        });
        let pieces = pieces.take_until(async move { stop.cancelled().await });
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn put_blob(
        &self,
        request: Request<Streaming<PutBlobRequest>>,
    ) -> Result<Response<PutBlobResponse>, Status> {
        // Limited by the wait for each piece, not as a whole: a blob may be large.
        self.put(request.into_inner()).await.map(Response::new)
    }

    async fn collect_garbage(
        &self,
        request: Request<CollectGarbageRequest>,
    ) -> Result<Response<CollectGarbageResponse>, Status> {
        // As long as it takes: the store may be large. It stops when the client leaves.
        self.collect(request.into_inner()).await.map(Response::new)
    }
}
