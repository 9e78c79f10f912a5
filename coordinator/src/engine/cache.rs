//! Which outputs of earlier tasks can be used again, and why not.

use std::collections::{BTreeMap, BTreeSet};

use emberline_common::{
    ids::{ArtifactName, Digest, PipelineName, TaskName},
    spec::{
        ArtifactType, Ordered, StageSpec,
        kinds::{BuiltinKind, CollectSpec, ExecSpec},
    },
};
use serde_json::{Value, json};

use super::{
    api::{AssignedInput, StageFile, Write},
    records::{CacheRecord, MAX_VALUE_BYTES, encode, keys},
};

/// What a task's outputs depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fingerprint {
    /// Digest of everything but the inputs.
    pub spec: Digest,
    /// Digest of each input's manifests, in order.
    pub inputs: BTreeMap<ArtifactName, Digest>,
}

impl Fingerprint {
    pub fn of(
        stage: &StageSpec,
        version: u32,
        with: &Value,
        inputs: &[AssignedInput],
        files: &[StageFile],
    ) -> Self {
        let outputs: &Ordered<ArtifactName, ArtifactType> = &stage.outputs;
        let files: Vec<Value> = files
            .iter()
            .map(|file| json!([file.path, file.sha256, file.executable]))
            .collect();
        let spec = json!([stage.kind, version, canonical(with), outputs, files]);
        let mut lists: BTreeMap<ArtifactName, Vec<u8>> = BTreeMap::new();
        for input in inputs {
            let list = lists.entry(input.name.clone()).or_default();
            list.extend_from_slice(input.artifact.manifest.as_bytes());
        }
        Self {
            spec: Digest::of(spec.to_string().as_bytes()),
            inputs: lists
                .into_iter()
                .map(|(name, list)| (name, Digest::of(&list)))
                .collect(),
        }
    }

    pub fn key(&self) -> Digest {
        Digest::of(&encode(&(&self.spec, &self.inputs)))
    }
}

/// The same value with the keys of every object in order.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            Value::Object(
                sorted
                    .into_iter()
                    .map(|(key, value)| (key.clone(), canonical(value)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        other => other.clone(),
    }
}

/// The submitted files that a stage names, or the one that it does not have.
pub(super) fn stage_files(
    stage: &StageSpec,
    with: &Value,
    files: &[StageFile],
) -> Result<Vec<StageFile>, String> {
    if stage.kind.as_str() != BuiltinKind::Exec.as_str() {
        return Ok(Vec::new());
    }
    let named = serde_json::from_value::<ExecSpec>(with.clone())
        .map(|spec| spec.files)
        .unwrap_or_default();
    let find = |path: String| {
        let found = files.iter().find(|file| file.path == path).cloned();
        found.ok_or_else(|| format!("the file `{path}` was not submitted with the run"))
    };
    named.into_iter().map(find).collect()
}

/// Why a stage's outputs are never used again, if so.
pub(super) fn never(stage: &StageSpec, with: &Value) -> Option<&'static str> {
    if !stage.cache {
        return Some("`cache: false`");
    }
    match BuiltinKind::from_name(stage.kind.as_str())? {
        BuiltinKind::Report | BuiltinKind::Deploy | BuiltinKind::Noop => {
            Some("this kind is never reused")
        }
        BuiltinKind::Collect => {
            let pinned = serde_json::from_value::<CollectSpec>(with.clone())
                .is_ok_and(|spec| spec.sources.iter().all(|source| source.sha256.is_some()));
            (!pinned).then_some("its sources can change: not every one has a `sha256`")
        }
        _ => None,
    }
}

#[derive(Debug)]
struct Entry {
    record: CacheRecord,
    used: u64,
}

/// The entries.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: BTreeMap<Digest, Entry>,
    by_use: BTreeMap<u64, Digest>,
    by_manifest: BTreeMap<Digest, BTreeSet<Digest>>,
    /// The latest entry of each task, to say what has changed.
    latest: BTreeMap<(PipelineName, TaskName), Digest>,
    clock: u64,
}

impl Cache {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Uses an entry.
    pub fn take(&mut self, key: &Digest) -> Option<CacheRecord> {
        let entry = self.entries.get_mut(key)?;
        self.by_use.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(entry.record.clone())
    }

    pub fn peek(&self, key: &Digest) -> Option<&CacheRecord> {
        self.entries.get(key).map(|entry| &entry.record)
    }

    #[cfg(test)]
    pub fn any(&self) -> Option<Digest> {
        self.by_use.first_key_value().map(|(_, key)| *key)
    }

    /// Adds an entry, and drops those that have not been used for longest.
    pub fn put(&mut self, key: Digest, record: CacheRecord, limit: usize, writes: &mut Vec<Write>) {
        let value = encode(&record);
        if limit == 0 || value.len() > MAX_VALUE_BYTES {
            return;
        }
        writes.push(Write::Put {
            key: keys::cache(&key),
            value,
        });
        self.insert(key, record);
        while self.entries.len() > limit {
            let Some((_, oldest)) = self.by_use.first_key_value() else {
                break;
            };
            let oldest = *oldest;
            self.remove(&oldest, writes);
        }
    }

    /// Adds an entry that is stored already.
    pub fn insert(&mut self, key: Digest, record: CacheRecord) {
        self.forget(&key);
        self.clock += 1;
        for output in &record.outputs {
            self.by_manifest
                .entry(output.manifest)
                .or_default()
                .insert(key);
        }
        self.latest
            .insert((record.pipeline.clone(), record.task.clone()), key);
        self.by_use.insert(self.clock, key);
        let used = self.clock;
        self.entries.insert(key, Entry { record, used });
    }

    fn forget(&mut self, key: &Digest) -> bool {
        let Some(entry) = self.entries.remove(key) else {
            return false;
        };
        self.by_use.remove(&entry.used);
        for output in &entry.record.outputs {
            if let Some(keys) = self.by_manifest.get_mut(&output.manifest) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_manifest.remove(&output.manifest);
                }
            }
        }
        let task = (entry.record.pipeline, entry.record.task);
        if self.latest.get(&task) == Some(key) {
            self.latest.remove(&task);
        }
        true
    }

    fn remove(&mut self, key: &Digest, writes: &mut Vec<Write>) {
        if self.forget(key) {
            writes.push(Write::Delete {
                key: keys::cache(key),
            });
        }
    }

    /// Drops all entries that name a manifest that is missing or corrupted.
    pub fn drop_manifest(&mut self, manifest: &Digest, writes: &mut Vec<Write>) {
        for key in self.by_manifest.get(manifest).cloned().unwrap_or_default() {
            self.remove(&key, writes);
        }
    }

    /// Drops all entries that these runs made.
    pub fn drop_runs(
        &mut self,
        runs: &BTreeSet<emberline_common::ids::RunId>,
        writes: &mut Vec<Write>,
    ) {
        let made = |entry: &Entry| runs.contains(&entry.record.run);
        let keys = self.entries.iter().filter(|(_, entry)| made(entry));
        let keys: Vec<Digest> = keys.map(|(key, _)| *key).collect();
        for key in keys {
            self.remove(&key, writes);
        }
    }

    /// Every manifest that an entry names.
    pub fn manifests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.by_manifest.keys().copied()
    }

    /// Why there is no entry for a task.
    pub fn explain(
        &self,
        pipeline: &PipelineName,
        task: &TaskName,
        fingerprint: &Fingerprint,
    ) -> String {
        let last = self.latest.get(&(pipeline.clone(), task.clone()));
        let Some(last) = last.and_then(|key| self.peek(key)) else {
            return "first time".to_owned();
        };
        let run = &last.run;
        if last.spec != fingerprint.spec {
            return format!("the spec changed since run {run}");
        }
        let changed = fingerprint.inputs.iter();
        let mut changed = changed.filter(|(name, digest)| last.inputs.get(*name) != Some(digest));
        match changed.next() {
            Some((name, _)) => format!("input `{name}` changed since run {run}"),
            None => format!("an input is gone since run {run}"),
        }
    }
}
