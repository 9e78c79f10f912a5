//! Where a worker has its secrets from: one file each in a directory, as Docker and Kubernetes mount
//! them, or its environment.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{ErrorKind, Read as _},
    path::{Path, PathBuf},
};

use emberline_common::ids::{SecretName, WorkerName};
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2},
    io::Errno,
};
use zeroize::Zeroizing;

use super::{MAX_BYTES, Secret, Secrets};
use crate::stage::StageError;

/// What the names of secrets in the environment begin with.
const PREFIX: &str = "EMBERLINE_SECRET_";

/// See the module.
#[derive(Debug, Clone)]
pub struct SecretSource {
    worker: WorkerName,
    dir: Option<PathBuf>,
}

impl SecretSource {
    /// Of a worker, with its directory if it has one.
    #[must_use]
    pub const fn new(worker: WorkerName, dir: Option<PathBuf>) -> Self {
        Self { worker, dir }
    }

    /// Looks all of them up.
    ///
    /// # Errors
    /// Reason `user_error`, naming the first that is missing or cannot be used, and where it was
    /// looked for.
    pub fn look_up(&self, names: &[SecretName]) -> Result<Secrets, StageError> {
        let mut values = BTreeMap::new();
        for name in names {
            if !values.contains_key(name) {
                values.insert(name.clone(), self.one(name)?);
            }
        }
        Ok(Secrets::new(values))
    }

    fn one(&self, name: &SecretName) -> Result<Secret, StageError> {
        let worker = &self.worker;
        let variable = variable(name);
        if let Some(dir) = &self.dir
            && let Some(file) = open(dir, name).map_err(|e| self.unusable(name, dir, &e))?
        {
            let value = read(file).map_err(|why| self.unusable(name, dir, &why))?;
            return Secret::new(value).map_err(|why| self.unusable(name, dir, &why));
        }
        if let Some(value) = std::env::var_os(&variable) {
            let wrong = |why: &str| {
                StageError::user(format!(
                    "the secret `{name}` cannot be used: `{variable}` in the environment of the worker `{worker}` {why}"
                ))
            };
            let value = value.into_string().map_err(|_| wrong("is no text"))?;
            return Secret::new(Zeroizing::new(value)).map_err(|why| wrong(&why));
        }
        let file = match &self.dir {
            Some(dir) => format!("there is no file of that name in `{}`", dir.display()),
            None => "it has no `--secrets-dir`".to_owned(),
        };
        Err(StageError::user(format!(
            "the worker `{worker}` does not have the secret `{name}`: {file}, and `{variable}` is not in its environment"
        )))
    }

    fn unusable(&self, name: &SecretName, dir: &Path, why: &dyn std::fmt::Display) -> StageError {
        StageError::user(format!(
            "the secret `{name}` cannot be used: the file in `{}` of the worker `{}` {why}",
            dir.display(),
            self.worker
        ))
    }
}

/// The variable that has a secret: in capitals, with `_` for what no variable has in its name.
fn variable(name: &SecretName) -> String {
    let name = name.as_str().to_uppercase().replace(['-', '.'], "_");
    format!("{PREFIX}{name}")
}

/// Opens a secret's file; none if it is not there. Links are followed within the directory only:
/// Kubernetes mounts each file as a link to a link.
fn open(dir: &Path, name: &SecretName) -> Result<Option<File>, String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = openat(
        CWD,
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|dir| {
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        openat2(dir, name.as_str(), flags, Mode::empty(), within)
    });
    match opened {
        Ok(file) => Ok(Some(file.into())),
        // An older kernel, or a sandbox that lets nothing else be called.
        Err(Errno::NOSYS | Errno::PERM) => open_by_path(dir, name, flags),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::XDEV) => Err("is a link out of that directory".to_owned()),
        Err(e) => Err(format!("cannot be opened: {}", std::io::Error::from(e))),
    }
}

fn open_by_path(dir: &Path, name: &SecretName, flags: OFlags) -> Result<Option<File>, String> {
    let told = |e: std::io::Error| format!("cannot be opened: {e}");
    let dir = dir.canonicalize().map_err(told)?;
    let path = match dir.join(name.as_str()).canonicalize() {
        Ok(path) => path,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(told(e)),
    };
    if !path.starts_with(&dir) {
        return Err("is a link out of that directory".to_owned());
    }
    let file = openat(CWD, &path, flags | OFlags::NOFOLLOW, Mode::empty());
    file.map(|file| Some(file.into()))
        .map_err(|e| told(e.into()))
}

/// The whole of a file but for the line end at its end, which editors and `echo` put there.
fn read(file: File) -> Result<Zeroizing<String>, String> {
    let told = |e: std::io::Error| format!("cannot be read: {e}");
    let meta = file.metadata().map_err(told)?;
    if !meta.is_file() {
        return Err("is not a regular file".to_owned());
    }
    // Room for all of it at once: what grows leaves copies behind.
    let room = usize::try_from(meta.len().min(MAX_BYTES)).unwrap_or_default() + 3;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    file.take(MAX_BYTES + 3)
        .read_to_end(&mut bytes)
        .map_err(told)?;
    let mut value =
        Zeroizing::new(String::from_utf8(std::mem::take(&mut *bytes)).map_err(|e| {
            drop(Zeroizing::new(e.into_bytes()));
            "is no text: it is not UTF-8".to_owned()
        })?);
    if value.ends_with('\n') {
        value.pop();
        if value.ends_with('\r') {
            value.pop();
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn source(dir: &Path) -> SecretSource {
        SecretSource::new("w0".parse().unwrap(), Some(dir.to_path_buf()))
    }

    fn look_up(source: &SecretSource, name: &str) -> Result<String, String> {
        let name: SecretName = name.parse().unwrap();
        let found = source.look_up(std::slice::from_ref(&name));
        let found = found.map_err(|e| e.message)?;
        Ok(found.get(&name).unwrap().reveal().to_owned())
    }

    #[test]
    fn a_file_is_a_secret_without_its_last_line_end() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content, value) in [
            ("plain", "one two", "one two"),
            ("line", "value\n", "value"),
            ("crlf", "value\r\n", "value"),
            ("two", "value\n\n", "value\n"),
            ("Dotted.Name", "value", "value"),
        ] {
            fs::write(dir.path().join(name), content).unwrap();
            assert_eq!(look_up(&source(dir.path()), name).unwrap(), value, "{name}");
        }
    }

    #[test]
    fn links_lead_anywhere_within_the_directory_and_nowhere_else() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("key"), "stolen").unwrap();
        let dir = tempfile::tempdir().unwrap();
        // As Kubernetes mounts them.
        fs::create_dir(dir.path().join("..2026_01")).unwrap();
        fs::write(dir.path().join("..2026_01/key"), "mounted").unwrap();
        symlink("..2026_01", dir.path().join("..data")).unwrap();
        symlink("..data/key", dir.path().join("key")).unwrap();
        symlink(outside.path().join("key"), dir.path().join("absolute")).unwrap();
        let up = format!(
            "../{}/key",
            outside.path().file_name().unwrap().to_str().unwrap()
        );
        symlink(up, dir.path().join("relative")).unwrap();
        let source = source(dir.path());
        assert_eq!(look_up(&source, "key").unwrap(), "mounted");
        for name in ["absolute", "relative"] {
            let error = look_up(&source, name).unwrap_err();
            assert!(error.contains("a link out of that directory"), "{error}");
            let flags = OFlags::RDONLY | OFlags::NONBLOCK;
            let error = open_by_path(dir.path(), &name.parse().unwrap(), flags).unwrap_err();
            assert!(error.contains("a link out of that directory"), "{error}");
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let file = open_by_path(dir.path(), &"key".parse().unwrap(), flags).unwrap();
        assert_eq!(&*read(file.unwrap()).unwrap(), "mounted");
    }

    #[test]
    fn what_is_no_secret_is_told_in_one_line_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        fs::write(dir.path().join("bytes"), b"abcdef\xff").unwrap();
        fs::write(dir.path().join("short"), "abc").unwrap();
        fs::write(dir.path().join("long"), vec![b'x'; 70_000]).unwrap();
        rustix::fs::mknodat(
            CWD,
            dir.path().join("fifo"),
            rustix::fs::FileType::Fifo,
            Mode::from(0o600),
            0,
        )
        .unwrap();
        for (name, part) in [
            ("dir", "not a regular file"),
            ("bytes", "not UTF-8"),
            ("short", "fewer than 4 bytes"),
            ("long", "more than 65536 bytes"),
            ("fifo", "not a regular file"),
        ] {
            let error = look_up(&source(dir.path()), name).unwrap_err();
            assert!(error.contains(part) && error.contains("`w0`"), "{error}");
            assert!(!error.contains('\n') && !error.contains("abc"), "{error}");
        }
    }

    #[test]
    fn a_missing_one_is_told_with_every_place_where_it_was_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let error = look_up(&source(dir.path()), "api-key.v2").unwrap_err();
        let place = format!(
            "the worker `w0` does not have the secret `api-key.v2`: there is no file of that name in `{}`, and `EMBERLINE_SECRET_API_KEY_V2` is not in its environment",
            dir.path().display()
        );
        assert_eq!(error, place);
        let without = SecretSource::new("w0".parse().unwrap(), None);
        let error = look_up(&without, "api-key").unwrap_err();
        assert!(error.contains("no `--secrets-dir`"), "{error}");
        // A directory that is not there has no secret either.
        let error = look_up(&source(&dir.path().join("gone")), "api-key").unwrap_err();
        assert!(error.contains("no file of that name"), "{error}");
    }
}
