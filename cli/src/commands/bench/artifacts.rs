//! The object store: bytes in and out, hashed on the way, durable when they are in.

use std::{io::Write as _, path::Path};

use emberline_common::artifact::ArtifactStore;
use tokio::time::Instant;
use url::Url;

use super::Figure;

const MIB: u64 = 256;

/// One large file, which goes in parts, and 1,000 small ones.
pub(super) async fn artifacts(directory: &Path) -> anyhow::Result<Vec<Figure>> {
    let url = Url::from_directory_path(directory.join("objects"))
        .map_err(|()| anyhow::anyhow!("`{}` is no absolute path", directory.display()))?;
    let store = ArtifactStore::open(url.as_str())?;
    let source = directory.join("source");
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let mut file = std::fs::File::create(&source)?;
    for _ in 0..MIB {
        file.write_all(&noise.bytes(1 << 20))?;
    }
    drop(file);
    #[allow(clippy::cast_precision_loss, reason = "256")]
    let mib = MIB as f64;
    let begun = Instant::now();
    let (digest, bytes) = store.put_file(&source).await?;
    let put = mib / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    store
        .get_file(&digest, bytes, &directory.join("copy"))
        .await?;
    let get = mib / begun.elapsed().as_secs_f64();
    let small: Vec<Vec<u8>> = (0..1000).map(|_| noise.bytes(4096)).collect();
    let begun = Instant::now();
    for content in small {
        store.put_bytes(content.into()).await?;
    }
    let small = 1000.0 / begun.elapsed().as_secs_f64();
    Ok(vec![
        Figure::new("put 256 MiB", "MiB/s", put),
        Figure::new("get 256 MiB", "MiB/s", get),
        Figure::new("put 4 KiB, one by one", "objects/s", small),
    ])
}

/// Bytes that no disk can compress: xorshift64 (Marsaglia, 2003).
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(count + 8);
        while out.len() < count {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            out.extend_from_slice(&self.0.to_le_bytes());
        }
        out.truncate(count);
        out
    }
}
