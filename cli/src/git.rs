//! What Git says of the work tree that a pipeline file lives in: which revision a run is started
//! for, and which commits it brings.
//!
//! Git itself is asked, as it is installed: it knows each form of a repository, and whom to trust.
//! Without it, or outside of a work tree, there is no revision; that is no error.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use emberline_common::{
    delivery::{Change, ChangeKind, Commit, MAX_COMMITS},
    time::Timestamp,
    wire::without_credentials,
};
use tokio::process::Command;

/// How long one question may take.
const WITHIN: Duration = Duration::from_secs(10);

/// A work tree.
pub struct WorkTree {
    directory: PathBuf,
}

/// What one call of Git came to.
struct Answer {
    ok: bool,
    stdout: String,
    stderr: String,
}

impl WorkTree {
    /// The work tree that this directory is part of; none if there is none.
    ///
    /// # Errors
    /// One line, if there is one that Git does not read.
    pub async fn of(directory: &Path) -> Result<Option<Self>, String> {
        let tree = Self {
            directory: directory.to_path_buf(),
        };
        let answer = match tree.git(&["rev-parse", "--is-inside-work-tree"]).await {
            Ok(answer) => answer,
            // Nobody expects Git where there is no repository.
            Err(_) if !directory.ancestors().any(|d| d.join(".git").exists()) => return Ok(None),
            Err(why) => return Err(why),
        };
        match answer.ok {
            true if answer.stdout == "true" => Ok(Some(tree)),
            // A bare repository, or the inside of `.git`.
            true => Ok(None),
            false if answer.stderr.contains("not a git repository") => Ok(None),
            false => Err(answer.why()),
        }
    }

    /// What is checked out, without the commits that came before; none if nothing was ever
    /// committed. The tree is dirty if a file that Git follows has changed, or if it does not
    /// follow one of `files`.
    ///
    /// # Errors
    /// One line, if Git does not tell.
    pub async fn change(&self, files: &[PathBuf]) -> Result<Option<Change>, String> {
        let head = self
            .git(&["log", "-1", "--format=%H %ct %at", "HEAD"])
            .await?;
        if !head.ok {
            return Ok(None);
        }
        let mut words = head.stdout.split(' ');
        let mut next = || words.next().unwrap_or_default();
        let (revision, committed_at, authored_at) =
            (next().to_owned(), seconds(next()), seconds(next()));
        let branch = self
            .git(&["symbolic-ref", "--quiet", "--short", "HEAD"])
            .await?;
        let modified = ["status", "--porcelain", "--untracked-files=no"];
        let modified = self.git(&modified).await?.must()?;
        let mut followed = vec!["ls-files", "--error-unmatch", "--"];
        let files: Vec<_> = files.iter().filter_map(|file| file.to_str()).collect();
        followed.extend(&files);
        let followed = self.git(&followed).await?;
        Ok(Some(Change {
            kind: ChangeKind::Code,
            repository: without_credentials(self.repository().await?),
            branch: branch.stdout,
            revision,
            id: String::new(),
            committed_at,
            authored_at: Some(authored_at),
            pushed_at: None,
            dirty: !modified.is_empty() || !followed.ok,
            commits: Vec::new(),
            left_out: 0,
        }))
    }

    /// Where it was cloned from: `origin`, else the first that is known; empty if none is.
    async fn repository(&self) -> Result<String, String> {
        let origin = self.git(&["remote", "get-url", "origin"]).await?;
        if origin.ok {
            return Ok(origin.stdout);
        }
        let all = self.git(&["remote"]).await?.must()?;
        let Some(first) = all.lines().next() else {
            return Ok(String::new());
        };
        Ok(self.git(&["remote", "get-url", first]).await?.stdout)
    }

    /// Adds the commits that came to `change` since one of these revisions at the least. What this
    /// clone does not have is given back.
    ///
    /// # Errors
    /// One line, if Git does not tell.
    pub async fn add_commits(
        &self,
        change: &mut Change,
        since: &[String],
    ) -> Result<Vec<String>, String> {
        let mut unknown = Vec::new();
        let mut lists = Vec::new();
        for base in since {
            // They come from elsewhere: nothing that Git could take for an option.
            let hex = base.len() >= 40 && base.bytes().all(|b| b.is_ascii_hexdigit());
            let exists = format!("{base}^{{commit}}");
            if !hex || !self.git(&["cat-file", "-e", &exists]).await?.ok {
                unknown.push(base.clone());
                continue;
            }
            let range = ["log", "--format=%H %ct", &change.revision, "--not", base];
            lists.push(self.git(&range).await?.must()?);
        }
        // What is new to any place is brought; the longest list has all of it, mostly.
        lists.sort_by_key(|list| std::cmp::Reverse(list.len()));
        let mut seen = HashSet::new();
        let lines = lists.iter().flat_map(|list| list.lines());
        let all: Vec<_> = lines
            .filter_map(|line| line.split_once(' '))
            .filter(|(revision, _)| seen.insert(*revision))
            .collect();
        let left_out = all.len().saturating_sub(MAX_COMMITS);
        change.left_out = u32::try_from(left_out).unwrap_or(u32::MAX);
        let newest = all.into_iter().take(MAX_COMMITS);
        let commits = newest.map(|(revision, committed_at)| Commit {
            revision: revision.to_owned(),
            committed_at: seconds(committed_at),
            pushed_at: None,
        });
        change.commits = commits.collect();
        Ok(unknown)
    }

    async fn git(&self, arguments: &[&str]) -> Result<Answer, String> {
        let mut command = Command::new("git");
        command
            .arg("-C")
            .arg(&self.directory)
            // Nothing that the repository's own settings could run.
            .args(["-c", "core.fsmonitor=false"])
            .args(arguments)
            .env("LC_ALL", "C")
            .env("GIT_OPTIONAL_LOCKS", "0")
            .env("GIT_TERMINAL_PROMPT", "0")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(WITHIN, command.output()).await;
        let output = output
            .map_err(|_| format!("`git` did not answer within {} s", WITHIN.as_secs()))?
            .map_err(|e| format!("cannot run `git`: {e}"))?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
        Ok(Answer {
            ok: output.status.success(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        })
    }
}

impl Answer {
    fn must(self) -> Result<String, String> {
        if self.ok {
            Ok(self.stdout)
        } else {
            Err(self.why())
        }
    }

    fn why(&self) -> String {
        let line = self.stderr.lines().next().unwrap_or("it says nothing");
        format!("`git`: {line}")
    }
}

/// Seconds since 1970 as Git writes them.
fn seconds(text: &str) -> Timestamp {
    Timestamp(text.parse::<u64>().unwrap_or(0).saturating_mul(1_000_000))
}
