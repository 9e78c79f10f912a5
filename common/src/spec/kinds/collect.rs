//! `collect`: an immutable snapshot of files from outside.
//!
//! In: nothing. Out: `data` (files).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{Digest, SecretName},
    spec::ByteSize,
};

/// Fetches files and stores them as one artifact. Since its sources can change, it runs each time, unless every source has a `sha256`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CollectSpec {
    /// Where the files come from; at least one.
    #[schemars(length(min = 1, max = 10_000))]
    pub sources: Vec<Source>,
    /// Fail with reason `data` if all files together are larger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<ByteSize>,
}

/// One source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// `file:data/x.csv` (relative to the pipeline file, or absolute), `http://…`, `https://…` or `s3://bucket/key`. A `file:` path or `s3:` key may end in `/` (everything below it) or have `*` in its last part.
    pub url: String,
    /// The name of the file in the artifact; the last part of the URL if not given. Only for a source of one file.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "as")]
    pub name: Option<String>,
    /// The name of a secret of the worker that is sent as `Authorization: Bearer …`. Only for `https:`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bearer: Option<SecretName>,
    /// The SHA-256 that the file must have; otherwise the stage fails with reason `data`. Only for a source of one file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
}
