//! What a bundle says about itself: its first file, `bundle.json`.

use std::collections::BTreeMap;

use emberline_common::{
    ids::{Digest, ModelName},
    run_view::{CodeRevision, MadeBy, Results},
    time::{Timestamp, rfc3339},
};
use serde::{Deserialize, Serialize};

/// What the registry that a bundle was written from knew of the version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// The model's name.
    pub model: ModelName,
    /// The version's number.
    pub version: u32,
    /// When it was registered.
    #[serde(with = "rfc3339")]
    pub created_at: Timestamp,
    /// Metrics by name.
    #[serde(default)]
    pub metrics: Results,
    /// Notes for people.
    #[serde(default)]
    pub notes: String,
    /// Tags.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// The artifacts that it descends from: `task/output` to the SHA-256 of the manifest.
    #[serde(default)]
    pub lineage: BTreeMap<String, Digest>,
    /// The code that its run was started for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<CodeRevision>,
    /// The version that it came after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u32>,
    /// The run that registered it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_by: Option<MadeBy>,
}

/// All of `bundle.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    pub format: u32,
    pub about: About,
    pub artifact: Artifact,
    pub files: Vec<File>,
}

/// The artifact that the version is: its manifest, as it lay in the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Artifact {
    pub sha256: Digest,
    pub manifest: String,
}

/// Another file of the bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub name: String,
    pub sha256: Digest,
    pub bytes: u64,
}

/// The field that says how the rest is to be read.
#[derive(Deserialize)]
pub(super) struct Format {
    pub format: u32,
}
