//! Artifacts: immutable bytes, stored under their SHA-256.
//!
//! Bytes are written first and referred to after. Nothing here relies on conditional writes, and
//! nothing lists the store to find state: a digest names its bytes for ever, and whoever holds the
//! digest can check them. Start with [`ArtifactStore`]; a whole artifact is a [`Manifest`] of files.

mod credentials_file;
mod error;
mod explain;
mod manifest;
mod patience;
mod probe;
mod read;
mod s3;
mod store;
mod writer;

pub use error::ArtifactError;
pub use explain::{Explanation, StoreFault, explain};
pub use manifest::{MAX_FILES, MAX_MANIFEST_BYTES, Manifest, ManifestFile, check_path};
pub use patience::Patience;
pub use probe::{Probe, ProbeStep};
pub use s3::{Environment, open_s3};
pub use store::{ArtifactStore, digest_of_file};
pub use writer::BlobWriter;

#[cfg(test)]
mod tests;
