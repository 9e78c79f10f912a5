//! What people do to the registry: aliases, tags, notes, imports, deletions.
//!
//! A version's artifact, metrics, schema and lineage never change. What is in service is not
//! deleted: what is live somewhere, on its way to it, or named by an alias.

use std::{collections::BTreeMap, fmt};

use emberline_common::{
    delivery::DeploymentOutcome,
    ids::{Alias, DeploymentId, Digest, EnvironmentName, ModelName},
    labels,
    run_view::{CodeRevision, Imported, ModelRegistration, ModelVersion, Origin},
};
use thiserror::Error;

use super::{
    Engine,
    api::{Outcome, Refusal},
};

/// The longest notes of a version, in bytes.
pub const MAX_NOTES_BYTES: usize = 4 << 10;
/// The most aliases of a model.
pub const MAX_ALIASES: usize = 256;

/// A version of a model, by its number or by an alias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VersionRef {
    /// Its number, from 1.
    Number(u32),
    /// A name that points to it.
    Alias(Alias),
}

impl fmt::Display for VersionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Alias(alias) => write!(f, "{alias}"),
        }
    }
}

impl std::str::FromStr for VersionRef {
    type Err = String;

    /// What has digits only is a number, anything else an alias.
    fn from_str(text: &str) -> Result<Self, String> {
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            return match text.parse() {
                Ok(number) if number > 0 => Ok(Self::Number(number)),
                _ => Err(format!("`{text}` is no version: they are numbered from 1")),
            };
        }
        text.parse().map(Self::Alias).map_err(|_| {
            let text: String = text.chars().take(80).collect();
            format!(
                "`{}` is neither a version's number nor an alias",
                text.escape_debug()
            )
        })
    }
}

/// What a person wants of the registry.
#[derive(Debug, Clone)]
pub enum RegistryCommand {
    /// Move an alias, or take it away.
    Alias {
        /// Of which model.
        model: ModelName,
        /// Which.
        alias: Alias,
        /// To which version; to none takes it away.
        to: Option<VersionRef>,
        /// Only if it names this version now; 0 is none.
        expected: Option<u32>,
    },
    /// Change a version's tags or notes.
    Annotate {
        /// Of which model.
        model: ModelName,
        /// Which.
        version: VersionRef,
        /// Tags to set.
        set: BTreeMap<String, String>,
        /// Tags to take away; one that is not there is no mistake.
        remove: Vec<String>,
        /// The new notes.
        notes: Option<String>,
    },
    /// Delete a version.
    Delete {
        /// Of which model.
        model: ModelName,
        /// Which.
        version: VersionRef,
    },
    /// Register a version that comes from another registry.
    Import(Box<ImportedVersion>),
}

/// A version from another registry. Its artifact is stored.
#[derive(Debug, Clone)]
pub struct ImportedVersion {
    /// What to register, and the alias to move to it.
    pub registration: ModelRegistration,
    /// Only if the alias names this version now; 0 is none.
    pub expected: Option<u32>,
    /// What it was there.
    pub imported: Imported,
    /// As it was there.
    pub lineage: BTreeMap<String, Digest>,
    /// As it was there.
    pub code: Option<CodeRevision>,
    /// As it was there.
    pub tags: BTreeMap<String, String>,
}

/// A version and what refers to it.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionView {
    /// Itself.
    pub version: ModelVersion,
    /// The aliases that name it.
    pub aliases: Vec<Alias>,
    /// Where it is live.
    pub live_in: Vec<EnvironmentName>,
}

/// Why the registry stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RegistryRefusal {
    /// There is no such model.
    #[error("there is no model `{0}`")]
    NoSuchModel(ModelName),
    /// The model has no such version.
    #[error("the model `{model}` has no version `{version}`")]
    NoSuchVersion {
        /// The model.
        model: ModelName,
        /// What was asked for.
        version: VersionRef,
    },
    /// Somebody else has moved the alias.
    #[error("the alias `{alias}` of `{model}` {}, {}", names(*found), expected_names(*expected))]
    AliasMoved {
        /// The model.
        model: ModelName,
        /// The alias.
        alias: Alias,
        /// What it names; 0 is none.
        found: u32,
        /// What it should have named; 0 is none.
        expected: u32,
    },
    /// The version is in service.
    #[error("version {version} of `{model}` {by}")]
    InService {
        /// The model.
        model: ModelName,
        /// The version.
        version: u32,
        /// By what, and what to do.
        by: Service,
    },
    /// A field of the request breaks a rule.
    #[error("{what}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// What is wrong.
        what: String,
    },
}

/// What a version is in service by.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Service {
    /// It is live.
    #[error("is live in `{0}`: deploy another one there first")]
    Live(EnvironmentName),
    /// An alias names it.
    #[error("is named by the alias `{0}`: move or remove the alias first")]
    Alias(Alias),
    /// It is becoming live.
    #[error("is becoming live by `{0}`: wait for its end")]
    Deployment(DeploymentId),
}

fn names(version: u32) -> String {
    match version {
        0 => "is not set".to_owned(),
        version => format!("names version {version}"),
    }
}

fn expected_names(version: u32) -> String {
    match version {
        0 => "but was expected not to be set".to_owned(),
        version => format!("not {version} as was expected"),
    }
}

fn invalid(field: &'static str, what: impl Into<String>) -> RegistryRefusal {
    let what = what.into();
    RegistryRefusal::Invalid { field, what }
}

/// Checks notes: a text of several lines.
fn check_notes(notes: &str) -> Result<(), RegistryRefusal> {
    if notes.len() > MAX_NOTES_BYTES {
        let bytes = notes.len();
        return Err(invalid(
            "notes",
            format!("they have {bytes} bytes, at most {MAX_NOTES_BYTES} are kept"),
        ));
    }
    if notes
        .chars()
        .any(|c| c.is_control() && !matches!(c, '\n' | '\t'))
    {
        return Err(invalid("notes", "they have control characters"));
    }
    Ok(())
}

impl Engine {
    pub(super) fn change_registry(&mut self, command: RegistryCommand) -> Result<Outcome, Refusal> {
        let view = match command {
            RegistryCommand::Alias {
                model,
                alias,
                to,
                expected,
            } => self.move_alias(&model, &alias, to.as_ref(), expected),
            RegistryCommand::Annotate {
                model,
                version,
                set,
                remove,
                notes,
            } => self.annotate(&model, &version, set, &remove, notes),
            RegistryCommand::Delete { model, version } => self.delete_version(&model, &version),
            RegistryCommand::Import(imported) => self.import(*imported),
        };
        Ok(Outcome::Version(Box::new(view?)))
    }

    pub(super) fn view_of(
        &self,
        model: &ModelName,
        number: u32,
    ) -> Result<VersionView, RegistryRefusal> {
        let found = self.models.version(model, number);
        let version = found.ok_or_else(|| RegistryRefusal::NoSuchVersion {
            model: model.clone(),
            version: VersionRef::Number(number),
        })?;
        Ok(VersionView {
            version: version.clone(),
            aliases: self.models.aliases_of(model, number),
            live_in: self.live_in(model, number).cloned().collect(),
        })
    }

    fn live_in<'a>(
        &'a self,
        model: &'a ModelName,
        version: u32,
    ) -> impl Iterator<Item = &'a EnvironmentName> {
        let live = self.environments();
        live.filter(move |(_, m, live)| *m == model && live.version == version)
            .map(|(environment, ..)| environment)
    }

    /// What a new version of a model comes after: what is live where it is deployed to, else what
    /// its alias names.
    pub(super) fn parent_of(
        &self,
        model: &ModelName,
        environment: Option<EnvironmentName>,
        alias: Option<&Alias>,
    ) -> Option<u32> {
        let live = environment
            .and_then(|environment| self.environments.get(&(environment, model.clone())));
        let live = live.map(|live| live.version);
        live.or_else(|| self.models.named_by(model, alias?))
    }

    /// Compare and swap: refused if the alias names something else than was expected. One that names
    /// `to` already is where it is to be: a call may come twice, the first time with its answer lost.
    fn check_alias(
        &self,
        model: &ModelName,
        alias: &Alias,
        to: Option<u32>,
        expected: Option<u32>,
    ) -> Result<(), RegistryRefusal> {
        let now = self.models.named_by(model, alias);
        if now.is_some() && now == to {
            return Ok(());
        }
        let found = now.unwrap_or(0);
        match expected.filter(|expected| *expected != found) {
            Some(expected) => Err(RegistryRefusal::AliasMoved {
                model: model.clone(),
                alias: alias.clone(),
                found,
                expected,
            }),
            None if alias.as_str().bytes().all(|b| b.is_ascii_digit()) => Err(invalid(
                "alias",
                format!("`{alias}` would be taken for a version's number"),
            )),
            None if now.is_none() && self.models.alias_count(model) >= MAX_ALIASES => Err(invalid(
                "alias",
                format!("`{model}` has {MAX_ALIASES} aliases already"),
            )),
            None => Ok(()),
        }
    }

    fn move_alias(
        &mut self,
        model: &ModelName,
        alias: &Alias,
        to: Option<&VersionRef>,
        expected: Option<u32>,
    ) -> Result<VersionView, RegistryRefusal> {
        let target = match to {
            Some(version) => Some(self.models.resolve(model, version)?),
            None => None,
        };
        let Some(target) = target else {
            return self.remove_alias(model, alias, expected);
        };
        self.check_alias(model, alias, Some(target), expected)?;
        let writes = &mut self.out.writes;
        self.models.set_alias(model, alias, Some(target), writes);
        self.view_of(model, target)
    }

    fn remove_alias(
        &mut self,
        model: &ModelName,
        alias: &Alias,
        expected: Option<u32>,
    ) -> Result<VersionView, RegistryRefusal> {
        // Also one of digits only, which a pipeline may have made.
        let named = VersionRef::Alias(alias.clone());
        let found = self.models.resolve(model, &named)?;
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(RegistryRefusal::AliasMoved {
                model: model.clone(),
                alias: alias.clone(),
                found,
                expected,
            });
        }
        let writes = &mut self.out.writes;
        self.models.set_alias(model, alias, None, writes);
        self.view_of(model, found)
    }

    fn annotate(
        &mut self,
        model: &ModelName,
        version: &VersionRef,
        set: BTreeMap<String, String>,
        remove: &[String],
        notes: Option<String>,
    ) -> Result<VersionView, RegistryRefusal> {
        let number = self.models.resolve(model, version)?;
        let mut changed = self.view_of(model, number)?.version;
        for key in remove {
            changed.tags.remove(key);
        }
        changed.tags.extend(set);
        labels::check_tags(&changed.tags).map_err(|why| invalid("tags", why))?;
        if let Some(notes) = notes {
            check_notes(&notes)?;
            changed.registration.notes = notes;
        }
        self.models.annotate(changed, &mut self.out.writes)?;
        self.view_of(model, number)
    }

    fn delete_version(
        &mut self,
        model: &ModelName,
        version: &VersionRef,
    ) -> Result<VersionView, RegistryRefusal> {
        let number = self.models.resolve(model, version)?;
        let view = self.view_of(model, number)?;
        let under_way = self.deployments().find(|deployment| {
            (&deployment.model, deployment.version) == (model, number)
                && deployment.outcome == DeploymentOutcome::InProgress
        });
        let by = (view.live_in.first().cloned().map(Service::Live))
            .or_else(|| under_way.map(|deployment| Service::Deployment(deployment.id)))
            .or_else(|| view.aliases.first().cloned().map(Service::Alias));
        if let Some(by) = by {
            return Err(RegistryRefusal::InService {
                model: model.clone(),
                version: number,
                by,
            });
        }
        self.models.remove(model, number, &mut self.out.writes);
        Ok(view)
    }

    fn import(&mut self, given: ImportedVersion) -> Result<VersionView, RegistryRefusal> {
        let model = given.registration.model.clone();
        check_notes(&given.registration.notes)?;
        labels::check_tags(&given.tags).map_err(|why| invalid("tags", why))?;
        if let Some(alias) = &given.registration.alias {
            let manifest = &given.registration.artifact.manifest;
            let known = self.models.of_artifact(&model, manifest);
            self.check_alias(&model, alias, known, given.expected)?;
        }
        let alias = given.registration.alias.clone();
        let version = ModelVersion {
            version: 0,
            origin: Origin::Bundle {
                imported: given.imported,
            },
            lineage: given.lineage,
            code: given.code,
            parent: self.parent_of(&model, None, given.registration.alias.as_ref()),
            tags: given.tags,
            created_at: self.now,
            registration: given.registration,
        };
        let registered = self.models.register(version, &mut self.out.writes);
        let number = registered.map_err(|why| invalid("lineage", why))?;
        if let Some(alias) = alias {
            self.point(&model, &alias, number);
        }
        self.view_of(&model, number)
    }
}
