//! The registry: immutable versions, and aliases that move.

use std::collections::BTreeMap;

use emberline_common::{
    ids::{Alias, Digest, ModelName},
    run_view::{ArtifactRef, ModelVersion},
};

use super::{
    api::{ModelView, Write},
    records::{MAX_VALUE_BYTES, ModelRecord, encode, keys},
};

#[derive(Debug, Default)]
struct Model {
    head: ModelRecord,
    versions: BTreeMap<u32, ModelVersion>,
    by_artifact: BTreeMap<Digest, u32>,
}

/// All models.
#[derive(Debug, Default)]
pub(super) struct Registry {
    models: BTreeMap<ModelName, Model>,
}

impl Registry {
    /// Registers a version (its number is set here). The same artifact again is the same version.
    ///
    /// # Errors
    /// If the version's record would be larger than the state takes; nothing has changed then.
    pub fn register(
        &mut self,
        mut version: ModelVersion,
        writes: &mut Vec<Write>,
    ) -> Result<u32, String> {
        let name = version.registration.model.clone();
        let manifest = version.registration.artifact.manifest;
        let known = self.models.get(&name);
        let known_version = known.and_then(|model| model.by_artifact.get(&manifest).copied());
        let latest = known.map_or(0, |model| model.head.latest);
        let number = known_version.unwrap_or(latest + 1);
        version.version = number;
        let value = encode(&version);
        if known_version.is_none() && value.len() > MAX_VALUE_BYTES {
            return Err(format!(
                "the version's schema, metrics and lineage take {} bytes, at most {MAX_VALUE_BYTES} are kept",
                value.len()
            ));
        }
        let model = self.models.entry(name.clone()).or_default();
        let before = model.head.clone();
        if known_version.is_none() {
            writes.push(Write::Put {
                key: keys::version(&name, number),
                value,
            });
            model.head.latest = number;
            model.by_artifact.insert(manifest, number);
            model.versions.insert(number, version);
        }
        if model.head != before {
            writes.push(Write::Put {
                key: keys::model(&name),
                value: encode(&model.head),
            });
        }
        Ok(number)
    }

    /// Moves an alias to a version that there is.
    pub fn point(
        &mut self,
        model: &ModelName,
        alias: &Alias,
        version: u32,
        writes: &mut Vec<Write>,
    ) {
        let Some(found) = self.models.get_mut(model) else {
            return;
        };
        let moved = found.head.aliases.insert(alias.clone(), version) != Some(version);
        if moved {
            writes.push(Write::Put {
                key: keys::model(model),
                value: encode(&found.head),
            });
        }
    }

    /// Moves the aliases of a version that was rolled back to the one that is live again, if that
    /// one was registered under them.
    pub fn move_back(&mut self, model: &ModelName, bad: u32, good: u32, writes: &mut Vec<Write>) {
        let Some(found) = self.models.get_mut(model) else {
            return;
        };
        let own = (found.versions.get(&good)).and_then(|v| v.registration.alias.clone());
        let Some(alias) = own.filter(|alias| found.head.aliases.get(alias) == Some(&bad)) else {
            return;
        };
        found.head.aliases.insert(alias, good);
        writes.push(Write::Put {
            key: keys::model(model),
            value: encode(&found.head),
        });
    }

    pub fn load_head(&mut self, name: ModelName, head: ModelRecord) {
        self.models.entry(name).or_default().head = head;
    }

    pub fn load_version(&mut self, version: ModelVersion) {
        let name = version.registration.model.clone();
        let model = self.models.entry(name).or_default();
        let manifest = version.registration.artifact.manifest;
        model.by_artifact.insert(manifest, version.version);
        model.versions.insert(version.version, version);
    }

    /// The version that an alias names.
    pub fn by_alias(&self, model: &ModelName, alias: &Alias) -> Option<&ModelVersion> {
        let model = self.models.get(model)?;
        model.versions.get(model.head.aliases.get(alias)?)
    }

    /// The texts of the pipelines that made versions.
    pub fn revisions(&self) -> impl Iterator<Item = Digest> + '_ {
        let versions = self
            .models
            .values()
            .flat_map(|model| model.versions.values());
        versions.map(|version| version.pipeline_revision)
    }

    pub fn artifacts(&self) -> impl Iterator<Item = &ArtifactRef> {
        let versions = self
            .models
            .values()
            .flat_map(|model| model.versions.values());
        versions.map(|version| &version.registration.artifact)
    }

    pub fn views(&self) -> impl Iterator<Item = ModelView> + '_ {
        self.models.iter().map(|(name, model)| ModelView {
            model: name.clone(),
            latest_version: model.head.latest,
            aliases: model.head.aliases.clone(),
        })
    }

    pub fn version(&self, name: &ModelName, version: u32) -> Option<&ModelVersion> {
        self.models.get(name)?.versions.get(&version)
    }

    pub fn view(&self, name: &ModelName) -> Option<(ModelView, Vec<ModelVersion>)> {
        let model = self.models.get(name)?;
        let view = ModelView {
            model: name.clone(),
            latest_version: model.head.latest,
            aliases: model.head.aliases.clone(),
        };
        Some((view, model.versions.values().rev().cloned().collect()))
    }
}
