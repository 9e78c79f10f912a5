//! The archive around a bundle's files: plain ustar, and only the bytes that [`write`] gives.
//!
//! A reader that knows every byte of a header beforehand has nothing to interpret: no paths, links,
//! owners, extensions or sparse files, and nothing is ever unpacked by a name from the file.

use std::io::{self, Read, Write};

use super::BundleError;

/// Everything is padded to whole blocks.
const BLOCK: usize = 512;

/// The header of a regular file: mode 0644, owner 0, time 0.
fn header(name: &str, bytes: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{bytes:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    // The checksum is taken with blanks in its own place.
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(329, b"0000000\0");
    put(337, b"0000000\0");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// Bytes that fill up the last block.
const fn padding(bytes: u64) -> usize {
    let rest = (bytes % BLOCK as u64) as usize;
    if rest == 0 { 0 } else { BLOCK - rest }
}

/// Writes one file. Its name must be short.
pub fn write(out: &mut dyn Write, name: &str, content: &[u8]) -> io::Result<()> {
    let bytes = content.len() as u64;
    out.write_all(&header(name, bytes))?;
    out.write_all(content)?;
    out.write_all(&[0; BLOCK][..padding(bytes)])
}

/// Writes the end: two blocks of zeros.
pub fn write_end(out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])
}

fn fill(from: &mut dyn Read, block: &mut [u8], what: &str) -> Result<(), BundleError> {
    from.read_exact(block).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => BundleError::Damaged(format!("it ends in {what}")),
        _ => BundleError::Read(e),
    })
}

/// Reads the file that must come next, of at most so many bytes.
pub fn read(from: &mut dyn Read, name: &str, at_most: u64) -> Result<Vec<u8>, BundleError> {
    let mut block = [0; BLOCK];
    fill(from, &mut block, &format!("the header of `{name}`"))?;
    let size = std::str::from_utf8(&block[124..135]).ok();
    let size = size.and_then(|size| u64::from_str_radix(size, 8).ok());
    let size = size.filter(|size| block == header(name, *size));
    let size = size.ok_or_else(|| {
        BundleError::Damaged(format!("the header of `{name}` is not the one of a bundle"))
    })?;
    if size > at_most {
        return Err(BundleError::Damaged(format!(
            "`{name}` has {size} bytes, at most {at_most} are read"
        )));
    }
    // Memory grows with what is there, not with what the header says.
    let mut content = Vec::new();
    let read = from.take(size).read_to_end(&mut content);
    read.map_err(BundleError::Read)?;
    if content.len() as u64 != size {
        return Err(BundleError::Damaged(format!("it ends in `{name}`")));
    }
    let padding = &mut block[..padding(size)];
    fill(from, padding, &format!("the padding of `{name}`"))?;
    if padding.iter().any(|byte| *byte != 0) {
        return Err(BundleError::Damaged(format!(
            "the padding of `{name}` is not zero"
        )));
    }
    Ok(content)
}

/// Reads the end, after which nothing may come.
pub fn read_end(from: &mut dyn Read) -> Result<(), BundleError> {
    let mut end = [0; 2 * BLOCK];
    fill(from, &mut end, "the end of the archive")?;
    let more = from.read(&mut [0]).map_err(BundleError::Read)?;
    if more > 0 || end.iter().any(|byte| *byte != 0) {
        return Err(BundleError::Damaged(
            "something follows the last file".to_owned(),
        ));
    }
    Ok(())
}
