//! The formats of tables, each as a file that a stage has as its input.

use std::{
    fs, panic,
    path::{Path, PathBuf},
    sync::Once,
};

use emberline_common::spec::ArtifactType;
use emberline_data::read::TableSource;
use emberline_worker::testing::TestContext;
use tempfile::TempDir;

pub fn csv(data: &[u8]) {
    read("x.csv", data);
}

pub fn json_lines(data: &[u8]) {
    read("x.jsonl", data);
}

pub fn parquet(data: &[u8]) {
    let_parsers_panic();
    read("x.parquet", data);
}

/// Where the parser of Parquet panics, its reader says that the file is damaged: that does no harm,
/// and must be caught.
fn let_parsers_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let file = info.location().map_or("", |location| location.file());
            if !["/parquet-", "/arrow-"].iter().any(|of| file.contains(of)) {
                others(info);
            }
        }));
    });
}

pub fn idx(data: &[u8]) {
    read("x.idx", data);
}

/// A stage's context, and where its one file is.
struct Place {
    test: TestContext,
    file: PathBuf,
    _dir: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Place {
    fn new(name: &str) -> Option<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().ok()?;
        let within = runtime.enter();
        // In memory, where there is such a place.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        let dir = dir.ok()?;
        let file = dir.path().join(name);
        fs::write(&file, "").ok()?;
        let builder = TestContext::builder();
        let test = builder
            .input("raw", ArtifactType::Files, dir.path())
            .build();
        drop(within);
        Some(Self {
            test,
            file,
            _dir: dir,
            _runtime: runtime,
        })
    }
}

fn read(name: &'static str, data: &[u8]) {
    thread_local! {
        static PLACE: std::cell::RefCell<Option<(&'static str, Place)>> = const { std::cell::RefCell::new(None) };
    }
    PLACE.with_borrow_mut(|place| {
        if place.as_ref().is_none_or(|(known, _)| *known != name) {
            *place = Place::new(name).map(|new| (name, new));
        }
        let Some((_, Place { test, file, .. })) = place else {
            panic!("there is no place for files");
        };
        assert!(
            fs::write(&*file, data).is_ok(),
            "the file cannot be written"
        );
        let ctx = &test.ctx;
        let mut input = ctx.inputs[0].clone();
        // As somebody's file, and as a table that a command has made.
        for artifact_type in [ArtifactType::Files, ArtifactType::Table] {
            input.artifact_type = artifact_type;
            let Ok(source) = TableSource::open(&input, None, ctx) else {
                continue;
            };
            let columns = source.schema().columns.len();
            let _ = source.read(ctx, &mut |batch| {
                assert_eq!(batch.num_columns(), columns);
                Ok(())
            });
        }
    });
}
