//! Files of this machine.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use emberline_common::{spec::kinds::collect::Source, time::Timestamp};
use rustix::fs::OFlags;

use super::{Snapshot, matches, name_of, one_file_only};
use crate::{outputs, stage::StageError};

const PIECE_BYTES: usize = 1 << 20;

/// Takes what a `file:` path names: a file, a directory (`…/`) or a pattern.
pub(super) fn collect(
    snapshot: &mut Snapshot<'_>,
    source: &Source,
    path: &str,
) -> Result<(), StageError> {
    // An absolute path stays what it is.
    let full = snapshot.ctx.base_dir.join(path);
    if path.ends_with('/') {
        one_file_only(source)?;
        let found = outputs::list(&full, &format!("the source `{path}`"));
        let found = found.map_err(|error| missing(&full, error))?;
        if found.is_empty() {
            return Err(StageError::user(format!(
                "there is no file below `{}`",
                full.display()
            )));
        }
        for name in found {
            take(snapshot, &full.join(&name), &name, None)?;
        }
        return Ok(());
    }
    let last = path.rsplit('/').next().unwrap_or(path);
    if !last.contains('*') {
        return take(snapshot, &full, name_of(source, last), source.sha256);
    }
    one_file_only(source)?;
    let dir = full.parent().map(Path::to_path_buf).unwrap_or_default();
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    let entries = fs::read_dir(&dir)
        .map_err(|e| missing(&dir, StageError::io("list the directory", &dir, e)))?;
    for entry in entries {
        let entry = entry.map_err(|e| StageError::io("list the directory", &dir, e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| matches(last, name)) else {
            continue;
        };
        let kind = entry
            .file_type()
            .map_err(|e| StageError::io("look at", &entry.path(), e))?;
        // Directories are not meant by a pattern; whatever else is no file, is refused below.
        if !kind.is_dir() {
            found.push((name.to_owned(), entry.path()));
        }
    }
    if found.is_empty() {
        return Err(StageError::user(format!(
            "no file matches `{}`",
            full.display()
        )));
    }
    found.sort_unstable();
    for (name, path) in found {
        take(snapshot, &path, &name, None)?;
    }
    Ok(())
}

/// What is not there is the user's mistake, not the disk's.
fn missing(path: &Path, error: StageError) -> StageError {
    match fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            StageError::user(format!("there is no directory `{}`", path.display()))
        }
        Ok(meta) if !meta.is_dir() => {
            StageError::user(format!("`{}` is no directory", path.display()))
        }
        _ => error,
    }
}

fn take(
    snapshot: &mut Snapshot<'_>,
    path: &Path,
    name: &str,
    expected: Option<emberline_common::ids::Digest>,
) -> Result<(), StageError> {
    let mut file = open(path)?;
    snapshot
        .reach
        .check_file(&file, path)
        .map_err(StageError::user)?;
    let modified = file.metadata().and_then(|metadata| metadata.modified());
    let modified = modified.ok().map(Timestamp::from);
    let mut incoming = snapshot.begin(name)?;
    let mut piece = vec![0_u8; PIECE_BYTES];
    loop {
        let read = file
            .read(&mut piece)
            .map_err(|e| StageError::io("read", path, e))?;
        if read == 0 {
            return snapshot.end(incoming, expected, modified);
        }
        snapshot.write(&mut incoming, &piece[..read])?;
    }
}

/// Opens a regular file; a link is not followed, and nothing is waited for.
fn open(path: &Path) -> Result<File, StageError> {
    let refused = |what: &str| {
        StageError::user(format!(
            "`{}` is {what}: only regular files can be collected",
            path.display()
        ))
    };
    // Looked at before it is opened, and once more after: opening a FIFO or a device does things.
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Err(StageError::user(format!(
                "there is no file `{}`",
                path.display()
            )));
        }
        Err(e) => return Err(StageError::io("look at", path, e)),
    };
    if meta.is_symlink() {
        return Err(refused("a symbolic link"));
    }
    if meta.is_dir() {
        return Err(StageError::user(format!(
            "`{}` is a directory: end it with `/` to take everything below it",
            path.display()
        )));
    }
    if !meta.is_file() {
        return Err(refused("not a regular file"));
    }
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|e| match e.kind() {
        ErrorKind::PermissionDenied => StageError::user(format!(
            "`{}` may not be read by this worker",
            path.display()
        )),
        _ => StageError::io("open", path, e),
    })?;
    match file.metadata() {
        Ok(meta) if meta.is_file() => Ok(file),
        Ok(_) => Err(refused("not a regular file")),
        Err(e) => Err(StageError::io("look at", path, e)),
    }
}
