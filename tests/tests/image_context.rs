//! What `.dockerignore` lets an image be built from is a whole workspace. The tests with containers
//! take a program that is built already, and would not notice.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use emberline_tests::place::repository;

/// What is left out of a directory that is let in.
const LEFT_OUT: [&str; 3] = ["target", ".emberline", "__pycache__"];

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let name = entry.unwrap().file_name();
            if !LEFT_OUT.iter().any(|out| name == *out) {
                copy(&from.join(&name), &to.join(&name));
            }
        }
    } else {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    }
}

#[test]
fn an_image_is_built_from_a_whole_workspace() {
    let root = repository();
    let rules = fs::read_to_string(root.join(".dockerignore")).unwrap();
    assert!(rules.lines().any(|line| line == "*"), "{rules}");
    for out in LEFT_OUT {
        assert!(rules.contains(&format!("\n**/{out}\n")), "{rules}");
    }
    let context = tempfile::tempdir().unwrap();
    // One is put there by who has a program already.
    let let_in = rules.lines().filter_map(|line| line.strip_prefix('!'));
    for path in let_in.filter(|path| *path != "prebuilt") {
        copy(&root.join(path), &context.path().join(path));
    }
    let read = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--locked", "--offline", "--no-deps"])
        .args(["--format-version", "1"])
        .current_dir(context.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&read.stderr);
    assert!(read.status.success(), "{told}");
}
