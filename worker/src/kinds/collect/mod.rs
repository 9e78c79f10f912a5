//! `collect`: an immutable snapshot of files from outside.
//!
//! What a source names comes from a pipeline file, so it is looked at before it is followed: only
//! regular files, no links, no addresses that only this machine can see ([`Reach`]). Start with
//! [`Collect`]; [`files`] and [`web`] know where bytes come from, [`Snapshot`] is where they go.

mod files;
mod reach;
mod web;

pub use reach::{Allowed, Reach};

#[cfg(test)]
mod tests;

use std::{
    collections::HashSet,
    fs::{self, File},
    io::Write,
    path::PathBuf,
    sync::Arc,
};

use emberline_common::{
    artifact::{MAX_FILES, check_path},
    ids::{Digest, SecretName, StageKind},
    run_view::Results,
    spec::{
        ArtifactType,
        kinds::{BuiltinKind, CollectSpec, collect::Source},
    },
    time::Timestamp,
};
use serde_json::{Map, Value};
use sha2::Digest as _;

use crate::stage::{Produced, ProducedContent, Stage, StageContext, StageError, StageOutput};

/// The kind `collect`.
#[derive(Default)]
pub struct Collect(Arc<Reach>);

impl Collect {
    /// From within this reach.
    #[must_use]
    pub fn within(reach: Reach) -> Self {
        Self(Arc::new(reach))
    }
}

impl Stage for Collect {
    fn kind(&self) -> StageKind {
        super::kind(BuiltinKind::Collect)
    }

    fn version(&self) -> u32 {
        BuiltinKind::Collect.version()
    }

    fn secrets(&self, spec: &Value) -> Result<Vec<SecretName>, StageError> {
        let spec: CollectSpec = crate::stage::spec(spec.clone())?;
        let sources = spec.sources.into_iter();
        Ok(sources.filter_map(|source| source.bearer).collect())
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: CollectSpec = ctx.spec()?;
        if spec.sources.is_empty() {
            return Err(StageError::user("`sources` is empty: name at least one"));
        }
        let output = super::output("data");
        let mut snapshot = Snapshot {
            ctx,
            reach: &self.0,
            dir: ctx.output_dir(&output)?,
            names: HashSet::new(),
            bytes: 0,
            limit: spec.max_bytes.map(|limit| limit.0),
            modified: Some(Timestamp::default()),
        };
        for (index, source) in spec.sources.iter().enumerate() {
            ctx.check_cancelled()?;
            #[allow(clippy::cast_precision_loss, reason = "a share for people")]
            ctx.progress(index as f64 / spec.sources.len() as f64, &source.url);
            let place = Place::of(&source.url)?;
            if source.bearer.is_some() && !matches!(place, Place::Http(_)) {
                return Err(StageError::user(format!(
                    "the source `{}` takes no `bearer`: that is for `https:`",
                    shown(&source.url)
                )));
            }
            match place {
                Place::Local(path) => files::collect(&mut snapshot, source, path)?,
                Place::Http(url) => ctx.block_on(web::http(&mut snapshot, source, url))?,
                Place::S3(url) => ctx.block_on(web::s3(&mut snapshot, source, &url))?,
            }
        }
        ctx.log(format!(
            "collected {} files, {} bytes",
            snapshot.names.len(),
            snapshot.bytes
        ));
        let mut results = Results::new();
        results.insert("files".to_owned(), snapshot.names.len().into());
        results.insert("bytes".to_owned(), snapshot.bytes.into());
        // When the data arrived, as far as their sources tell.
        if let Some(modified) = snapshot.modified {
            results.insert("modified_at".to_owned(), modified.exact().into());
        }
        let mut metadata = Map::new();
        let urls = spec.sources.iter().map(|source| source.url.as_str().into());
        metadata.insert("sources".to_owned(), Value::Array(urls.collect()));
        Ok(StageOutput {
            artifacts: vec![Produced {
                name: output,
                content: ProducedContent::Directory {
                    dir: snapshot.dir,
                    artifact_type: ArtifactType::Files,
                    metadata,
                },
            }],
            results,
            registration: None,
        })
    }
}

/// Where a source is.
enum Place<'a> {
    Local(&'a str),
    Http(url::Url),
    S3(url::Url),
}

impl<'a> Place<'a> {
    fn of(text: &'a str) -> Result<Self, StageError> {
        let wrong = |why: String| {
            StageError::user(format!(
                "the source `{}` cannot be read: {why}",
                shown(text)
            ))
        };
        if let Some(path) = text.strip_prefix("file:") {
            // `file:///abs` and `file:/abs` are the same; `file://host/…` is another machine.
            let path = match path.strip_prefix("//") {
                Some(rest) if rest.starts_with('/') => rest,
                Some(_) => {
                    return Err(wrong(
                        "`file://` names another machine: write `file:path`".into(),
                    ));
                }
                None => path,
            };
            if path.is_empty() || path.contains('\0') {
                return Err(wrong("it names no file".into()));
            }
            return Ok(Self::Local(path));
        }
        let url = url::Url::parse(text).map_err(|e| {
            wrong(format!(
                "{e}; write `file:path`, `https://…` or `s3://bucket/key`"
            ))
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong(
                "it has a user or a password in it, which would be stored".into(),
            ));
        }
        if url.fragment().is_some() {
            return Err(wrong("it has a `#`".into()));
        }
        match url.scheme() {
            "http" | "https" => Ok(Self::Http(url)),
            "s3" if url.query().is_some() => Err(wrong("it has a `?`".into())),
            "s3" => Ok(Self::S3(url)),
            other => Err(wrong(format!(
                "`{other}:` is not known; write `file:path`, `https://…` or `s3://bucket/key`"
            ))),
        }
    }
}

/// A URL for a message: without what may be a secret in its query.
fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let url = match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => {
            format!("{}://…{}", &url[..scheme], &url[at..])
        }
        _ => url.to_owned(),
    };
    url.chars()
        .take(300)
        .collect::<String>()
        .escape_debug()
        .to_string()
}

/// The files collected so far.
struct Snapshot<'a> {
    ctx: &'a StageContext,
    reach: &'a Arc<Reach>,
    dir: PathBuf,
    names: HashSet<String>,
    bytes: u64,
    limit: Option<u64>,
    /// When the newest file was modified last; none if a source does not tell.
    modified: Option<Timestamp>,
}

/// One file on its way into the snapshot.
struct Incoming {
    name: String,
    path: PathBuf,
    file: File,
    hasher: sha2::Sha256,
}

impl Snapshot<'_> {
    /// Begins a file of that name.
    fn begin(&mut self, name: &str) -> Result<Incoming, StageError> {
        check_path(name)
            .map_err(|why| StageError::user(format!("{why}; give it a name by `as`")))?;
        if self.names.len() == MAX_FILES {
            return Err(StageError::user(format!(
                "the sources have more than {MAX_FILES} files"
            )));
        }
        if !self.names.insert(name.to_owned()) {
            return Err(StageError::user(format!(
                "two sources give a file `{name}`: name one of them by `as`"
            )));
        }
        let path = self.dir.join(name);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| StageError::io("make the directory", dir, e))?;
        }
        let file = File::create_new(&path).map_err(|e| StageError::io("make", &path, e))?;
        Ok(Incoming {
            name: name.to_owned(),
            path,
            file,
            hasher: sha2::Sha256::new(),
        })
    }

    /// Takes the next piece of a file.
    fn write(&mut self, incoming: &mut Incoming, piece: &[u8]) -> Result<(), StageError> {
        self.ctx.check_cancelled()?;
        self.bytes = self.bytes.saturating_add(piece.len() as u64);
        if let Some(limit) = self.limit.filter(|limit| self.bytes > *limit) {
            return Err(StageError::data(format!(
                "the sources have more than the {limit} bytes of `max_bytes`; `{}` went over it",
                incoming.name
            )));
        }
        incoming.hasher.update(piece);
        incoming
            .file
            .write_all(piece)
            .map_err(|e| StageError::io("write", &incoming.path, e))
    }

    /// Ends a file: its digest must be the expected one. Its source may know when it was modified.
    fn end(
        &mut self,
        incoming: Incoming,
        expected: Option<Digest>,
        modified: Option<Timestamp>,
    ) -> Result<(), StageError> {
        self.modified = self.modified.zip(modified).map(|(a, b)| a.max(b));
        let found = Digest::from_hasher(incoming.hasher);
        match expected {
            Some(expected) if expected != found => Err(StageError::data(format!(
                "`{}` has the SHA-256 {found}, not {expected} as written in the pipeline",
                incoming.name
            ))),
            _ => Ok(()),
        }
    }
}

/// The name for a source of one file.
fn name_of<'a>(source: &'a Source, last_part: &'a str) -> &'a str {
    source.name.as_deref().unwrap_or(last_part)
}

/// Refuses what makes sense for one file only.
fn one_file_only(source: &Source) -> Result<(), StageError> {
    let field = if source.name.is_some() {
        "as"
    } else if source.sha256.is_some() {
        "sha256"
    } else {
        return Ok(());
    };
    Err(StageError::user(format!(
        "the source `{}` may be several files: `{field}` is for one file",
        shown(&source.url)
    )))
}

/// Whether a name matches a pattern in which `*` stands for any characters. Hidden files must be
/// named as such.
fn matches(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}
