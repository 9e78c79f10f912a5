//! Replays what is kept of what was searched: no search, but what was found once stays found.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

use emberline_fuzz::TARGETS;

#[test]
fn nothing_in_the_corpus_does_harm() {
    let corpus = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("corpus");
    for (name, target) in TARGETS {
        let mut replayed = 0;
        for entry in fs::read_dir(corpus.join(name))
            .into_iter()
            .flatten()
            .flatten()
        {
            // Told when it panics.
            println!("{}", entry.path().display());
            let bytes = fs::read(entry.path()).unwrap_or_default();
            target(&bytes);
            replayed += 1;
        }
        assert!(replayed > 0, "{} has no `{name}`", corpus.display());
    }
    for entry in fs::read_dir(&corpus).into_iter().flatten().flatten() {
        let known = TARGETS.iter().any(|(name, _)| entry.file_name() == *name);
        assert!(known, "{} belongs to no target", entry.path().display());
    }
}
