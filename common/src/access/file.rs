//! The file of tokens that are valid from the start, before anybody could make any. It has hashes
//! only, one token on each line: `ROLE NAME sha256:HEX`, and what begins with `#` is said to people.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{Role, TokenHash};
use crate::ids::TokenName;

/// No file of tokens is larger.
const MAX_BYTES: u64 = 1 << 20;

/// One token of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticToken {
    /// Its name.
    pub name: TokenName,
    /// What it allows.
    pub role: Role,
    /// What is known of it.
    pub hash: TokenHash,
}

/// What is wrong with the file.
#[derive(Debug, Error)]
pub enum TokensFileError {
    /// It cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A line of it cannot be read.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it; nothing of what stands there, which may be a secret.
        what: String,
    },
}

/// Reads the file.
///
/// # Errors
/// [`TokensFileError`] with the line.
pub fn read_tokens(path: &Path) -> Result<Vec<StaticToken>, TokensFileError> {
    let failed = |source: io::Error| TokensFileError::Read {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_BYTES {
        return Err(failed(io::Error::other("it is too large")));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let mut tokens: Vec<StaticToken> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |what: String| TokensFileError::Line {
            path: path.to_owned(),
            line: at + 1,
            what,
        };
        let token = parse(line).map_err(wrong)?;
        if tokens.iter().any(|known| known.name == token.name) {
            return Err(wrong(format!(
                "the token `{}` stands there twice",
                token.name
            )));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

fn parse(line: &str) -> Result<StaticToken, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [role, name, hash] = words[..] else {
        return Err(
            "a line is `ROLE NAME sha256:HEX`, as `emberline tokens generate` writes it".into(),
        );
    };
    Ok(StaticToken {
        role: role.parse().map_err(
            |_| "the first word is no role: there are viewer, operator, admin and worker",
        )?,
        name: TokenName::new(name).map_err(|_| "the second word is no name")?,
        hash: hash.parse()?,
    })
}

/// A token as a line of the file.
#[must_use]
pub fn tokens_line(token: &StaticToken) -> String {
    format!("{} {} {}\n", token.role, token.name, token.hash)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn read(text: &str) -> Result<Vec<StaticToken>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        std::fs::write(&path, text).unwrap();
        read_tokens(&path).map_err(|e| e.to_string())
    }

    fn line(role: &str, name: &str) -> String {
        format!("{role} {name} sha256:{}\n", "ab".repeat(32))
    }

    #[test]
    fn what_was_written_is_read() {
        let text = format!(
            "# tokens\n\n{}{}",
            line("admin", "root"),
            line("worker", "join")
        );
        let tokens = read(&text).unwrap();
        assert_eq!(tokens.len(), 2);
        let written: String = tokens.iter().map(tokens_line).collect();
        assert_eq!(read(&written).unwrap(), tokens);
    }

    #[test]
    fn a_wrong_line_is_named_and_not_shown() {
        let secret = "emb.root.0123";
        for (text, at, why) in [
            (secret.to_owned(), 1, "a line is"),
            (format!("\n{}", line("king", "a")), 2, "no role"),
            (line("admin", "No Name"), 1, "a line is"),
            (line("admin", "NO"), 1, "no name"),
            (format!("admin a {secret}"), 1, "the hash of a token"),
            (line("admin", "a") + &line("viewer", "a"), 2, "twice"),
        ] {
            let told = read(&text).unwrap_err();
            assert!(told.contains(&format!("tokens:{at}: ")), "{told}");
            assert!(told.contains(why), "{told}");
            assert!(!told.contains("0123"), "{told}");
        }
    }
}
