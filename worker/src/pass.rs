//! What a worker shows of itself: the token that it joins by, and the credential that it is given
//! then, which is kept on its disk and is of use to no other worker.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use emberline_common::{
    access::{Token, TokenKind},
    ids::WorkerName,
};
use http::HeaderValue;

/// See the module.
#[derive(Debug)]
pub(crate) struct Pass {
    join: Option<Token>,
    credential: Mutex<Option<Token>>,
    file: PathBuf,
    worker: WorkerName,
}

/// What is shown to a leader.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    /// For the header `authorization`; nothing, where nothing is known.
    pub header: Option<HeaderValue>,
    is_credential: bool,
}

impl Pass {
    /// With the credential that is kept in that directory, if there is one.
    pub fn open(join: Option<Token>, state_dir: &Path, worker: WorkerName) -> Self {
        let file = state_dir.join("credential");
        let kept = fs::read_to_string(&file);
        let kept = kept.ok().and_then(|text| Token::parse(&text).ok());
        // Of a worker that was named otherwise before it is of no use.
        let ours = TokenKind::Worker(worker.clone());
        let credential = kept.filter(|kept| *kept.kind() == ours);
        Self {
            join,
            credential: Mutex::new(credential),
            file,
            worker,
        }
    }

    /// The credential, else the token.
    pub fn show(&self) -> Shown {
        let credential = self.credential.lock();
        let credential = credential.unwrap_or_else(PoisonError::into_inner);
        let shown = credential.as_ref().or(self.join.as_ref());
        let header = shown.and_then(Token::header);
        Shown {
            header,
            is_credential: credential.is_some(),
        }
    }

    /// The leader did not know it: a credential that is refused may be one of another life of the
    /// cluster, or have expired while the worker was away. The token comes next, if there is one.
    pub fn refused(&self, shown: &Shown) {
        if !shown.is_credential || self.join.is_none() {
            return;
        }
        tracing::info!("the credential is not known to the leader: the token is shown again");
        let mut credential = self
            .credential
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *credential = None;
    }

    /// Takes the next credential, and keeps it.
    pub fn take(&self, text: &str) {
        let ours = TokenKind::Worker(self.worker.clone());
        let Some(token) = Token::parse(text)
            .ok()
            .filter(|token| *token.kind() == ours)
        else {
            tracing::warn!("the leader sent a credential that is none of this worker's");
            return;
        };
        // Another one cannot join by it, but it could take over this worker's name.
        if let Err(error) = keep(&self.file, text) {
            tracing::warn!(%error, "the credential cannot be kept: the next start needs the token");
        }
        let mut credential = self
            .credential
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *credential = Some(token);
    }
}

/// A small file that nobody else may read, replaced as a whole.
fn keep(path: &Path, text: &str) -> io::Result<()> {
    let partial = path.with_extension("partial");
    let _ = fs::remove_file(&partial);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)?;
    file.write_all(text.as_bytes())?;
    file.sync_data()?;
    fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt as _;

    use emberline_common::ids::TokenName;

    use super::*;

    fn worker(name: &str) -> WorkerName {
        WorkerName::new(name).unwrap()
    }

    fn credential(name: &str) -> Token {
        Token::generate(TokenKind::Worker(worker(name))).unwrap()
    }

    fn shown(pass: &Pass) -> Option<String> {
        let header = pass.show().header?;
        Some(header.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_credential_goes_before_the_token_and_outlives_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let name = TokenName::new("join").unwrap();
        let join = Token::generate(TokenKind::Named(name)).unwrap();
        let open = |join| Pass::open(join, directory.path(), worker("w1"));
        let pass = open(Some(join.clone()));
        assert_eq!(shown(&pass), Some(format!("Bearer {}", join.reveal())));
        let given = credential("w1");
        pass.take(given.reveal());
        assert_eq!(shown(&pass), Some(format!("Bearer {}", given.reveal())));
        let mode = fs::metadata(directory.path().join("credential")).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
        let next = open(None);
        assert_eq!(shown(&next), Some(format!("Bearer {}", given.reveal())));
        next.refused(&next.show());
        assert!(shown(&next).is_some(), "there is nothing else to show");
        pass.refused(&pass.show());
        assert_eq!(shown(&pass), Some(format!("Bearer {}", join.reveal())));
    }

    #[test]
    fn one_of_another_worker_is_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let pass = Pass::open(None, directory.path(), worker("w1"));
        pass.take(credential("w2").reveal());
        assert_eq!(shown(&pass), None);
        pass.take("nonsense");
        assert_eq!(shown(&pass), None);
        pass.take(credential("w1").reveal());
        let renamed = Pass::open(None, directory.path(), worker("w2"));
        assert_eq!(shown(&renamed), None);
    }
}
