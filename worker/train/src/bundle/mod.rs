//! A model version in one file, for other registries and for programs of one's own.
//!
//! A bundle is a plain tar archive of six files, in this order and with no others: `bundle.json`
//! ([`About`], and the SHA-256 of all that follows), `model.json` and `weights.bpk` (the artifact as
//! it lies in the store, see [`crate::model`]), `weights.safetensors`, `schema.json`,
//! `preprocessing.json`. The same version gives the same bytes. `docs/guide/models.md` tells it byte
//! for byte.
//!
//! A bundle may come from anywhere: [`Bundle::open`] checks all of it before anything is used, and
//! writes nothing to the disk.

mod about;
mod tar;
mod tensors;
#[cfg(test)]
mod tests;

use std::{
    fs,
    io::{self, Read, Write},
    path::Path,
};

use emberline_common::{artifact::Manifest, ids::Digest, spec::ArtifactType};
use emberline_worker::documents::{MODEL_FILE, WEIGHTS_FILE};
use serde_json::Value;

pub use about::About;
use about::{Artifact, Document, File, Format};

use crate::{backend::Compute, error::TrainError, model::Model};

/// The version of the form that this crate writes and reads.
pub const FORMAT: u32 = 1;
/// What a bundle says about itself.
pub const ABOUT_FILE: &str = "bundle.json";
/// The weights as safetensors.
pub const TENSORS_FILE: &str = "weights.safetensors";
/// The raw columns that the model takes.
pub const SCHEMA_FILE: &str = "schema.json";
/// How raw columns become numbers.
pub const PREPROCESSING_FILE: &str = "preprocessing.json";

const MAX_ABOUT_BYTES: u64 = 1 << 20;
const MAX_DOCUMENT_BYTES: u64 = 64 << 20;
/// More than a network of the most parameters has.
const MAX_WEIGHTS_BYTES: u64 = 2 << 30;

/// The files after the first, in their order, each with the most bytes that are read.
const FILES: [(&str, u64); 5] = [
    (MODEL_FILE, MAX_DOCUMENT_BYTES),
    (WEIGHTS_FILE, MAX_WEIGHTS_BYTES),
    (TENSORS_FILE, MAX_WEIGHTS_BYTES),
    (SCHEMA_FILE, MAX_DOCUMENT_BYTES),
    (PREPROCESSING_FILE, MAX_DOCUMENT_BYTES),
];

/// Why a file is no bundle, or a version cannot become one.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It cannot be opened or read.
    #[error("the bundle cannot be read: {0}")]
    Read(#[source] io::Error),
    /// It cannot be written.
    #[error("the bundle cannot be written: {0}")]
    Write(#[source] io::Error),
    /// It is not whole, was changed, or is something else.
    #[error("it is no bundle, or a damaged one: {0}")]
    Damaged(String),
    /// It is of a later version.
    #[error("the bundle has format {found}, this program reads format {FORMAT}")]
    Format {
        /// Its format.
        found: u64,
    },
    /// Its model cannot be loaded.
    #[error(transparent)]
    Model(#[from] TrainError),
}

/// A bundle whose every byte was checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    told: Document,
    schema: Value,
    /// `bundle.json`, and the files of [`FILES`].
    contents: [Vec<u8>; 6],
}

fn damaged(why: impl Into<String>) -> BundleError {
    BundleError::Damaged(why.into())
}

fn json(name: &str, value: &impl serde::Serialize) -> Result<Vec<u8>, BundleError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| damaged(format!("`{name}` has no JSON: {e}")))?;
    text.push(b'\n');
    Ok(text)
}

fn parse<T: serde::de::DeserializeOwned>(name: &str, text: &[u8]) -> Result<T, BundleError> {
    serde_json::from_slice(text).map_err(|e| damaged(format!("`{name}`: {e}")))
}

impl Bundle {
    /// A bundle of a version: what the registry knows of it, and the bytes of its artifact's
    /// manifest and files as they lie in the store.
    ///
    /// # Errors
    /// If these do not belong together, or are no model of this crate.
    pub fn new(
        about: About,
        manifest: &[u8],
        document: Vec<u8>,
        weights: Vec<u8>,
    ) -> Result<Self, BundleError> {
        let model = Model::from_parts(&document, weights.clone(), &Compute::cpu())?;
        let tensors = tensors::write(model.network())?;
        let schema = json(SCHEMA_FILE, &model.document().inputs)?;
        let preprocessing = json(PREPROCESSING_FILE, &model.document().preprocessing)?;
        let files = [document, weights, tensors, schema, preprocessing];
        let listed = FILES.iter().zip(&files).map(|((name, _), content)| File {
            name: (*name).to_owned(),
            sha256: Digest::of(content),
            bytes: content.len() as u64,
        });
        let manifest = std::str::from_utf8(manifest)
            .map_err(|_| damaged("the artifact's manifest is no text"))?;
        let first = Document {
            format: FORMAT,
            about,
            artifact: Artifact {
                sha256: Digest::of(manifest.as_bytes()),
                manifest: manifest.to_owned(),
            },
            files: listed.collect(),
        };
        let first = json(ABOUT_FILE, &first)?;
        let [document, weights, tensors, schema, preprocessing] = files;
        let contents = [first, document, weights, tensors, schema, preprocessing];
        let limits = [MAX_ABOUT_BYTES]
            .into_iter()
            .chain(FILES.map(|(_, most)| most));
        if contents
            .iter()
            .zip(limits)
            .any(|(content, most)| content.len() as u64 > most)
        {
            return Err(damaged("the model is too large for a bundle"));
        }
        // What is written is what would be read.
        Self::checked(contents)
    }

    /// Reads a file, and checks all of it.
    ///
    /// # Errors
    /// If it cannot be read, is no bundle, or its files do not belong together.
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        let file = fs::File::open(path).map_err(BundleError::Read)?;
        let metadata = file.metadata().map_err(BundleError::Read)?;
        if !metadata.is_file() {
            return Err(damaged("it is no regular file"));
        }
        Self::read(&mut io::BufReader::new(file))
    }

    /// Reads a bundle to its end, and checks all of it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn read(from: &mut dyn Read) -> Result<Self, BundleError> {
        let first = tar::read(from, ABOUT_FILE, MAX_ABOUT_BYTES)?;
        let [document, weights, tensors, schema, preprocessing] = FILES;
        let mut next = |(name, at_most)| tar::read(from, name, at_most);
        let contents = [
            first,
            next(document)?,
            next(weights)?,
            next(tensors)?,
            next(schema)?,
            next(preprocessing)?,
        ];
        tar::read_end(from)?;
        Self::checked(contents)
    }

    fn checked(contents: [Vec<u8>; 6]) -> Result<Self, BundleError> {
        let [first, document, weights, tensors, schema, preprocessing] = &contents;
        let format: Format = parse(ABOUT_FILE, first)?;
        if format.format != FORMAT {
            return Err(BundleError::Format {
                found: format.format.into(),
            });
        }
        let told: Document = parse(ABOUT_FILE, first)?;
        let files = FILES.iter().map(|(name, _)| *name).zip(&contents[1..]);
        if told.files.len() != FILES.len() {
            return Err(damaged(format!("`{ABOUT_FILE}` lists other files")));
        }
        for ((name, content), listed) in files.zip(&told.files) {
            if (listed.name.as_str(), listed.bytes) != (name, content.len() as u64)
                || listed.sha256 != Digest::of(content)
            {
                return Err(damaged(format!(
                    "`{name}` is not the file that `{ABOUT_FILE}` lists"
                )));
            }
        }
        check_manifest(&told)?;
        let model = Model::from_parts(document, weights.clone(), &Compute::cpu())?;
        let own = model.document();
        let inputs = serde_json::to_value(&own.inputs);
        let inputs = inputs.map_err(|e| damaged(format!("`{MODEL_FILE}`: {e}")))?;
        for (name, text, value) in [
            (SCHEMA_FILE, schema, &inputs),
            (PREPROCESSING_FILE, preprocessing, &own.preprocessing),
        ] {
            if parse::<Value>(name, text)? != *value {
                return Err(damaged(format!(
                    "`{name}` is another one than in `{MODEL_FILE}`"
                )));
            }
        }
        tensors::check(tensors, model.network())?;
        Ok(Self {
            schema: inputs,
            told,
            contents,
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// The writer's.
    pub fn write(&self, out: &mut dyn Write) -> Result<(), BundleError> {
        let names = [ABOUT_FILE].into_iter().chain(FILES.map(|(name, _)| name));
        let write = || {
            for (name, content) in names.zip(&self.contents) {
                tar::write(out, name, content)?;
            }
            tar::write_end(out)?;
            out.flush()
        };
        write().map_err(BundleError::Write)
    }

    /// What is known of the version.
    #[must_use]
    pub const fn about(&self) -> &About {
        &self.told.about
    }

    /// The SHA-256 of the artifact's manifest: the same in every registry.
    #[must_use]
    pub const fn artifact(&self) -> Digest {
        self.told.artifact.sha256
    }

    /// The artifact's manifest, as it lies in a store.
    #[must_use]
    pub fn manifest(&self) -> &[u8] {
        self.told.artifact.manifest.as_bytes()
    }

    /// The two files that the manifest lists.
    #[must_use]
    pub fn artifact_files(&self) -> [&[u8]; 2] {
        [&self.contents[1], &self.contents[2]]
    }

    /// The raw columns that the model takes, as JSON.
    #[must_use]
    pub const fn schema(&self) -> &Value {
        &self.schema
    }

    /// The model, ready to predict on the CPU.
    ///
    /// # Errors
    /// None that were not told when it was opened.
    pub fn model(&self) -> Result<Model, BundleError> {
        self.model_on(&Compute::cpu())
    }

    /// The model, ready to predict on a device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn model_on(&self, compute: &Compute) -> Result<Model, BundleError> {
        let [_, document, weights, ..] = &self.contents;
        Ok(Model::from_parts(document, weights.clone(), compute)?)
    }
}

/// Checks that the artifact is what its digest says, and consists of the bundle's own files.
fn check_manifest(told: &Document) -> Result<(), BundleError> {
    let wrong = |why: &str| damaged(format!("the artifact's manifest {why}"));
    let text = told.artifact.manifest.as_bytes();
    if Digest::of(text) != told.artifact.sha256 {
        return Err(wrong("has another SHA-256"));
    }
    let manifest: Manifest =
        serde_json::from_slice(text).map_err(|e| wrong(&format!("cannot be read: {e}")))?;
    manifest
        .check()
        .map_err(|why| wrong(&format!("is wrong: {why}")))?;
    if manifest.artifact_type != ArtifactType::Model {
        return Err(wrong("is of no model"));
    }
    let mine = told.files.iter().take(2);
    let mine = mine.map(|file| (file.name.as_str(), file.sha256, file.bytes));
    let its = manifest.files.iter();
    if !mine.eq(its.map(|file| (file.path.as_str(), file.sha256, file.bytes))) {
        return Err(wrong(&format!(
            "lists other files than `{MODEL_FILE}` and `{WEIGHTS_FILE}`"
        )));
    }
    Ok(())
}
