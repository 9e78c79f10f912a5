//! A file's bytes, decompressed if it starts like a gzip file, whatever its name.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek},
};

use emberline_worker::stage::StageError;
use flate2::read::MultiGzDecoder;

use super::SourceFile;

/// Opens a file. The second part is whether it is compressed.
pub fn open(file: &SourceFile) -> Result<(Box<dyn Read>, bool), StageError> {
    let mut handle = File::open(&file.path).map_err(|e| StageError::io("open", &file.path, e))?;
    let mut magic = Vec::new();
    handle
        .by_ref()
        .take(2)
        .read_to_end(&mut magic)
        .and_then(|_| handle.rewind())
        .map_err(|e| StageError::io("read", &file.path, e))?;
    if magic == [0x1f, 0x8b] {
        let decoder = MultiGzDecoder::new(BufReader::with_capacity(64 << 10, handle));
        Ok((Box::new(decoder), true))
    } else {
        Ok((Box::new(handle), false))
    }
}

/// A read that failed: bad compressed data is the data's fault, the rest is the disk's.
pub fn failed(file: &SourceFile, error: io::Error) -> StageError {
    match error.kind() {
        io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::Other => StageError::data(format!("`{}` is damaged: {error}", file.label)),
        _ => StageError::io("read", &file.path, error),
    }
}
