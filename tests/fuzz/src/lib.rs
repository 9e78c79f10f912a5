//! Readers of what strangers write: each takes any bytes and must neither panic, nor hang, nor take
//! more memory than it is allowed.
//!
//! `run.sh` searches for bytes with which one does; `tests/corpus.rs` replays what is kept of that
//! in `corpus/`, one directory for each of [`TARGETS`].

#![allow(
    clippy::panic,
    reason = "a panic is how a target says that something is wrong"
)]

mod protocol;
mod tables;

use std::{cell::OnceCell, sync::OnceLock};

use emberline_common::{
    artifact::{ArtifactStore, Manifest},
    attempt_log::{AttemptLogReader, LogStream, chunk_key},
    ids::AttemptId,
    spec::{kinds::BuiltinKind, parse_pipeline},
};
use emberline_coordinator::events::{MAX_EVENT_BYTES, heard};
use emberline_train::{Bundle, Model};
use object_store::ObjectStoreExt as _;
use serde_json::Map;
use tokio::runtime::{Builder, Runtime};

/// What is fed: its name, and what takes the bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 13] = [
    ("attempt_log", attempt_log),
    ("bundle", bundle),
    ("csv", tables::csv),
    ("event", event),
    ("idx", tables::idx),
    ("infer_grpc", infer_grpc),
    ("infer_json", infer_json),
    ("json_lines", tables::json_lines),
    ("manifest", manifest),
    ("parquet", tables::parquet),
    ("pipeline", pipeline),
    ("request", protocol::request),
    ("session", protocol::session),
];

/// The one that `EMBERLINE_FUZZ_TARGET` names.
///
/// # Panics
/// If it names none: the message has those that there are.
#[must_use]
pub fn chosen() -> fn(&[u8]) {
    static CHOSEN: OnceLock<fn(&[u8])> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let name = std::env::var("EMBERLINE_FUZZ_TARGET").unwrap_or_default();
        let found = TARGETS.into_iter().find(|(target, _)| *target == name);
        let names = TARGETS.map(|(name, _)| name);
        assert!(
            found.is_some(),
            "EMBERLINE_FUZZ_TARGET is `{name}`, none of {names:?}"
        );
        found.map_or(pipeline, |(_, target)| target)
    })
}

fn pipeline(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(checked) = parse_pipeline("p.yaml", text, &Map::new()) {
        // What is accepted can be written down, read again, and is the same.
        let written = serde_json::to_string(&checked.spec);
        let written = written.unwrap_or_else(|e| panic!("{e}: {text}"));
        let again = serde_json::from_str(&written).unwrap_or_else(|e| panic!("{e}: {written}"));
        assert!(checked.spec == again, "{written}");
        for (_, stage) in &checked.spec.stages {
            let kind = BuiltinKind::from_name(stage.kind.as_str());
            assert!(kind.is_some() || stage.kind.as_str().contains('/'));
        }
    }
}

fn manifest(data: &[u8]) {
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(data)
        && manifest.check().is_ok()
    {
        for file in &manifest.files {
            let path = std::path::Path::new(&file.path);
            let is_below = path
                .components()
                .all(|c| matches!(c, std::path::Component::Normal(_)));
            assert!(is_below, "{}", file.path);
        }
        let _ = manifest.bytes();
    }
}

/// Chunks, with a zero between them.
fn attempt_log(data: &[u8]) {
    thread_local! {
        static RUNTIME: Option<Runtime> = Builder::new_current_thread().build().ok();
    }
    let Ok(store) = ArtifactStore::open("memory:") else {
        return;
    };
    let (Ok(run), Ok(task)) = ("r".parse(), "t".parse()) else {
        return;
    };
    let id = AttemptId {
        run,
        task,
        attempt: 1,
    };
    let read = async {
        for (number, chunk) in (0..).zip(data.split(|byte| *byte == 0)) {
            let key = chunk_key(LogStream::Log, &id, number);
            let stored = store.logs().put(&key, chunk.to_vec().into()).await;
            assert!(stored.is_ok());
        }
        let mut reader = AttemptLogReader::new(store, LogStream::Log, id);
        while let Ok(Some(chunk)) = reader.next_chunk().await {
            assert_eq!(chunk.end.as_ref(), reader.end());
        }
    };
    RUNTIME.with(|runtime| runtime.as_ref().map(|runtime| runtime.block_on(read)));
}

fn event(data: &[u8]) {
    if data.len() <= MAX_EVENT_BYTES {
        let _ = heard(data, "/emberline");
    }
}

fn bundle(data: &[u8]) {
    if let Ok(bundle) = Bundle::read(&mut &*data) {
        // It is the very bytes that it would write, and a model that can be asked.
        let mut written = Vec::new();
        assert!(bundle.write(&mut written).is_ok() && written == data);
        let _ = bundle.model();
    }
}

/// A model with columns of every type, to be asked.
fn with_model(ask: impl FnOnce(&Model)) {
    thread_local! {
        static MODEL: OnceCell<Option<Model>> = const { OnceCell::new() };
    }
    const BUNDLE: &[u8] = include_bytes!("../model.bundle");
    MODEL.with(|model| {
        let model = model.get_or_init(|| Bundle::read(&mut &*BUNDLE).ok()?.model().ok());
        assert!(model.is_some(), "model.bundle is none");
        if let Some(model) = model {
            ask(model);
        }
    });
}

/// The first two bytes are how much of the rest is JSON; all of it if there is not so much.
fn infer_json(data: &[u8]) {
    let Some((length, body)) = data.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_be_bytes(*length)).min(body.len());
    with_model(|model| {
        let _ = emberline_serve::fuzzing::json(model, body, length);
    });
}

fn infer_grpc(data: &[u8]) {
    with_model(|model| {
        let _ = emberline_serve::fuzzing::grpc(model, data);
    });
}
