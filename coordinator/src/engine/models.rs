//! The registry's data: immutable versions, and aliases that move. Who may change what is decided
//! in [`registry`](super::registry).

use std::collections::BTreeMap;

use emberline_common::{
    ids::{Alias, Digest, ModelName},
    run_view::{ArtifactRef, ModelVersion, Origin},
};

use super::{
    api::{ModelView, RegistryRefusal, VersionRef, Write},
    records::{MAX_VALUE_BYTES, ModelRecord, encode, keys},
};

#[derive(Debug, Default)]
struct Model {
    head: ModelRecord,
    versions: BTreeMap<u32, ModelVersion>,
    by_artifact: BTreeMap<Digest, u32>,
}

impl Model {
    fn view(&self, name: &ModelName) -> ModelView {
        ModelView {
            model: name.clone(),
            latest_version: self.head.latest,
            versions: self.versions.len(),
            aliases: self.head.aliases.clone(),
        }
    }
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

    /// The number of a version that is named by its number or by an alias.
    ///
    /// # Errors
    /// If there is no such model, alias or version.
    pub fn resolve(&self, name: &ModelName, version: &VersionRef) -> Result<u32, RegistryRefusal> {
        let no_model = || RegistryRefusal::NoSuchModel(name.clone());
        let model = self.models.get(name).ok_or_else(no_model)?;
        let number = match version {
            VersionRef::Number(number) => model.versions.contains_key(number).then_some(*number),
            VersionRef::Alias(alias) => model.head.aliases.get(alias).copied(),
        };
        number.ok_or_else(|| RegistryRefusal::NoSuchVersion {
            model: name.clone(),
            version: version.clone(),
        })
    }

    /// The version that an alias names, also of a model that there is not yet.
    pub fn named_by(&self, name: &ModelName, alias: &Alias) -> Option<u32> {
        self.models.get(name)?.head.aliases.get(alias).copied()
    }

    /// The version that an artifact is, if it is one.
    pub fn of_artifact(&self, name: &ModelName, manifest: &Digest) -> Option<u32> {
        self.models.get(name)?.by_artifact.get(manifest).copied()
    }

    /// How many aliases a model has.
    pub fn alias_count(&self, name: &ModelName) -> usize {
        let model = self.models.get(name);
        model.map_or(0, |model| model.head.aliases.len())
    }

    /// The aliases of a version.
    pub fn aliases_of(&self, name: &ModelName, version: u32) -> Vec<Alias> {
        let model = self.models.get(name).into_iter();
        let aliases = model.flat_map(|model| &model.head.aliases);
        aliases
            .filter(|(_, to)| **to == version)
            .map(|(alias, _)| alias.clone())
            .collect()
    }

    /// Moves an alias of a model that there is, or takes it away.
    pub fn set_alias(
        &mut self,
        name: &ModelName,
        alias: &Alias,
        version: Option<u32>,
        writes: &mut Vec<Write>,
    ) {
        let Some(model) = self.models.get_mut(name) else {
            return;
        };
        let before = match version {
            Some(version) => model.head.aliases.insert(alias.clone(), version),
            None => model.head.aliases.remove(alias),
        };
        if before != version {
            writes.push(Write::Put {
                key: keys::model(name),
                value: encode(&model.head),
            });
        }
    }

    /// Puts another record in the place of a version's, which differs in its tags and notes only.
    ///
    /// # Errors
    /// If it would be larger than the state takes; nothing has changed then.
    pub fn annotate(
        &mut self,
        version: ModelVersion,
        writes: &mut Vec<Write>,
    ) -> Result<(), RegistryRefusal> {
        let name = version.registration.model.clone();
        let Some(model) = self.models.get_mut(&name) else {
            return Err(RegistryRefusal::NoSuchModel(name));
        };
        if model.versions.get(&version.version) == Some(&version) {
            return Ok(());
        }
        let value = encode(&version);
        if value.len() > MAX_VALUE_BYTES {
            return Err(RegistryRefusal::Invalid {
                field: "notes",
                what: format!(
                    "the version's record would have {} bytes with it, at most {MAX_VALUE_BYTES} are kept",
                    value.len()
                ),
            });
        }
        writes.push(Write::Put {
            key: keys::version(&name, version.version),
            value,
        });
        model.versions.insert(version.version, version);
        Ok(())
    }

    /// Removes a version. Its number is never given again, for the head keeps the highest.
    pub fn remove(
        &mut self,
        name: &ModelName,
        version: u32,
        writes: &mut Vec<Write>,
    ) -> Option<ModelVersion> {
        let model = self.models.get_mut(name)?;
        let removed = model.versions.remove(&version)?;
        let manifest = removed.registration.artifact.manifest;
        model.by_artifact.remove(&manifest);
        writes.push(Write::Delete {
            key: keys::version(name, version),
        });
        Some(removed)
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
        versions.filter_map(|version| match &version.origin {
            Origin::Run(made_by) => Some(made_by.pipeline_revision),
            // The text is where the bundle was written.
            Origin::Bundle { .. } => None,
        })
    }

    pub fn artifacts(&self) -> impl Iterator<Item = &ArtifactRef> {
        let versions = self
            .models
            .values()
            .flat_map(|model| model.versions.values());
        versions.map(|version| &version.registration.artifact)
    }

    pub fn views(&self) -> impl Iterator<Item = ModelView> + '_ {
        self.models.iter().map(|(name, model)| model.view(name))
    }

    pub fn version(&self, name: &ModelName, version: u32) -> Option<&ModelVersion> {
        self.models.get(name)?.versions.get(&version)
    }

    /// A model, and the numbers of its versions.
    pub fn view(&self, name: &ModelName) -> Option<(ModelView, Vec<u32>)> {
        let model = self.models.get(name)?;
        Some((model.view(name), model.versions.keys().copied().collect()))
    }
}
