//! The list of an artifact's files. It is stored like any other bytes; its digest is the artifact's.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{ids::Digest, spec::ArtifactType};

/// The most files of one artifact.
pub const MAX_FILES: usize = 100_000;
/// The largest manifest, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 20;
const MAX_PATH_BYTES: usize = 1024;

/// An artifact: its files, what it is, and what its producer noted about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this form: 1.
    pub version: u32,
    /// What the artifact is.
    pub artifact_type: ArtifactType,
    /// Its files, in the order of their paths.
    pub files: Vec<ManifestFile>,
    /// What its producer noted about it.
    #[serde(default)]
    pub metadata: Map<String, Value>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Relative, `/`-separated; see [`check_path`].
    pub path: String,
    /// The SHA-256 of its content.
    pub sha256: Digest,
    /// Its size.
    pub bytes: u64,
}

impl Manifest {
    /// Of these files, sorted by path.
    #[must_use]
    pub fn new(
        artifact_type: ArtifactType,
        mut files: Vec<ManifestFile>,
        metadata: Map<String, Value>,
    ) -> Self {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Self {
            version: 1,
            artifact_type,
            files,
            metadata,
        }
    }

    /// The sum of the sizes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files
            .iter()
            .map(|f| f.bytes)
            .fold(0, u64::saturating_add)
    }

    /// Checks what was read from a store: it may come from anywhere.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn check(&self) -> Result<(), String> {
        if self.version != 1 {
            return Err(format!(
                "it has version {}, this program knows 1",
                self.version
            ));
        }
        if self.files.len() > MAX_FILES {
            return Err(format!(
                "it has {} files, more than {MAX_FILES}",
                self.files.len()
            ));
        }
        for file in &self.files {
            check_path(&file.path)?;
        }
        for pair in self.files.windows(2) {
            if pair[0].path >= pair[1].path {
                return Err(format!(
                    "`{}` stands twice or out of order",
                    pair[1].path.escape_debug()
                ));
            }
        }
        let paths: HashSet<&str> = self.files.iter().map(|f| f.path.as_str()).collect();
        for file in &self.files {
            let mut above = file.path.match_indices('/').map(|(at, _)| &file.path[..at]);
            if let Some(dir) = above.find(|dir| paths.contains(dir)) {
                return Err(format!(
                    "`{}` is both a file and a directory",
                    dir.escape_debug()
                ));
            }
        }
        Ok(())
    }
}

/// Checks that a path stays inside the directory that it is joined to: relative, `/`-separated,
/// no empty, `.` or `..` part, no backslash, no control character, at most 1,024 bytes.
///
/// # Errors
/// What is wrong, in one line.
pub fn check_path(path: &str) -> Result<(), String> {
    let shown = || {
        path.chars()
            .take(80)
            .collect::<String>()
            .escape_debug()
            .to_string()
    };
    if path.is_empty() || path.len() > MAX_PATH_BYTES {
        return Err(format!(
            "the path `{}` is empty or longer than {MAX_PATH_BYTES} bytes",
            shown()
        ));
    }
    if path.contains('\\') || path.chars().any(char::is_control) {
        return Err(format!(
            "the path `{}` has a backslash or a control character",
            shown()
        ));
    }
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(format!("the path `{}` is not relative and plain", shown()));
    }
    Ok(())
}
