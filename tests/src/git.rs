//! A real Git repository of a test's own, with commits made at a time that the test says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A work tree.
pub struct WorkTree {
    dir: PathBuf,
}

impl WorkTree {
    /// A new repository at this directory, on branch `main`, without commits.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        let tree = Self {
            dir: dir.to_path_buf(),
        };
        tree.git(&["init", "-q", "-b", "main"], 0);
        tree
    }

    /// It was cloned from there.
    pub fn set_origin(&self, url: &str) {
        self.git(&["remote", "add", "origin", url], 0);
    }

    /// Commits all that is there, as of that second, and gives the revision.
    pub fn commit(&self, message: &str, at: u64) -> String {
        self.git(&["add", "-A"], at);
        self.git(&["commit", "-q", "--allow-empty", "-m", message], at);
        self.git(&["rev-parse", "HEAD"], at)
    }

    /// Runs `git`, which must do it, and gives what it prints.
    ///
    /// # Panics
    /// If it fails.
    pub fn git(&self, arguments: &[&str], at: u64) -> String {
        let date = format!("{at} +0000");
        let mut command = Command::new("git");
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"GIT_") {
                command.env_remove(name);
            }
        }
        let output = command
            .arg("-C")
            .arg(&self.dir)
            .args(arguments)
            // Nobody's own settings count.
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_AUTHOR_NAME", "A. Tester")
            .env("GIT_AUTHOR_EMAIL", "tester@example.org")
            .env("GIT_COMMITTER_NAME", "A. Tester")
            .env("GIT_COMMITTER_EMAIL", "tester@example.org")
            .env("GIT_AUTHOR_DATE", &date)
            .env("GIT_COMMITTER_DATE", &date)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "git {arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}
