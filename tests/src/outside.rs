//! The invariants, checked from the outside: the state directory read with code of its own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// The SHA-256 of some bytes, in hex.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Where the object of a digest is.
#[must_use]
pub fn object(state: &Path, digest: &str) -> PathBuf {
    state.join("objects/cas").join(&digest[..2]).join(digest)
}

/// Every object that is stored under a digest.
#[must_use]
pub fn objects(state: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let Ok(prefixes) = fs::read_dir(state.join("objects/cas")) else {
        return out;
    };
    for prefix in prefixes {
        let entries = fs::read_dir(prefix.unwrap().path()).unwrap();
        out.extend(entries.map(|entry| entry.unwrap().path()));
    }
    out.sort();
    out
}

/// Every object hashes to its name, so nothing half-written is visible under a final name.
///
/// # Panics
/// If one does not.
#[track_caller]
pub fn every_object_hashes_to_its_name(state: &Path) {
    for path in objects(state) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        // What is being written has a suffix of its own until it is whole.
        if name.len() == 64 {
            let found = sha256(&fs::read(&path).unwrap());
            assert_eq!(found, name, "{} is damaged", path.display());
        }
    }
}

/// An artifact is stored whole: its manifest, each file, each size, each digest. Gives its files as
/// pairs of path and bytes.
///
/// # Panics
/// If it is not.
#[track_caller]
pub fn artifact(state: &Path, manifest: &str) -> Vec<(String, Vec<u8>)> {
    let bytes = fs::read(object(state, manifest))
        .unwrap_or_else(|e| panic!("the manifest {manifest} is not stored: {e}"));
    assert_eq!(sha256(&bytes), manifest);
    let parsed: Value = serde_json::from_slice(&bytes).unwrap();
    let files = parsed["files"].as_array().unwrap();
    files
        .iter()
        .map(|file| {
            let path = file["path"].as_str().unwrap().to_owned();
            let digest = file["sha256"].as_str().unwrap();
            let bytes = fs::read(object(state, digest))
                .unwrap_or_else(|e| panic!("`{path}` of {manifest} is not stored: {e}"));
            assert_eq!(sha256(&bytes), digest, "`{path}` of {manifest}");
            assert_eq!(bytes.len() as u64, file["bytes"], "`{path}` of {manifest}");
            (path, bytes)
        })
        .collect()
}

/// The log of an attempt as it is stored.
#[derive(Debug)]
pub struct Log {
    /// Its lines.
    pub lines: Vec<String>,
    /// Whether its end is there, with the right count and digest.
    pub is_sealed: bool,
}

/// Reads a log chunk by chunk. `None` if the attempt has logged nothing.
///
/// # Panics
/// If it is damaged: a record that is none, an end that does not fit, something after the end.
#[must_use]
#[track_caller]
pub fn log(state: &Path, run: &str, task: &str, attempt: u64) -> Option<Log> {
    let dir = state.join(format!("objects/logs/{run}/{task}/{attempt}"));
    let (mut lines, mut hasher, mut is_sealed) = (Vec::new(), Sha256::new(), false);
    for sequence in 0.. {
        let Ok(chunk) = fs::read_to_string(dir.join(format!("{sequence:08}"))) else {
            if sequence == 0 {
                return None;
            }
            break;
        };
        for line in chunk.split_inclusive('\n') {
            assert!(!is_sealed, "records after the end in {}", dir.display());
            let record: Value = serde_json::from_str(line).unwrap();
            if let Some(end) = record.get("end") {
                let digest: String = hasher
                    .clone()
                    .finalize()
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect();
                assert_eq!(end["lines"], lines.len() as u64, "{}", dir.display());
                assert_eq!(end["sha256"], digest, "{}", dir.display());
                is_sealed = true;
            } else {
                hasher.update(line.as_bytes());
                lines.push(record["text"].as_str().unwrap_or_default().to_owned());
            }
        }
    }
    Some(Log { lines, is_sealed })
}

/// A run that has ended: each output of each task is stored whole, and the log of each task's last
/// attempt is complete.
///
/// # Panics
/// If not.
#[track_caller]
pub fn run_is_whole(state: &Path, run: &Value) {
    every_object_hashes_to_its_name(state);
    let id = run["run"].as_str().unwrap();
    for task in run["tasks"].as_array().unwrap() {
        let (name, attempt) = (
            task["task"].as_str().unwrap(),
            task["attempt"].as_u64().unwrap(),
        );
        for output in task["outputs"].as_array().unwrap() {
            let files = artifact(state, output["manifest"].as_str().unwrap());
            let bytes: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
            assert_eq!(output["bytes"], bytes, "{name}/{}", output["name"]);
        }
        if task["state"] == "succeeded"
            && let Some(log) = log(state, id, name, attempt)
        {
            assert!(log.is_sealed, "the log of {name} has no end");
        }
    }
}
