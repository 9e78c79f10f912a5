//! A real S3 server: `s3s-fs`, a process of its own that checks signatures and keeps its objects as
//! plain files. So a test can read, damage and remove them behind everybody's back. `ci.sh` installs
//! it. Start with [`S3Server::start`]; faults on the way to it are made by
//! [`HttpProxy`](crate::http_proxy::HttpProxy).

use std::{
    fs::{self, File},
    net::TcpStream,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{outside, wait_for};

/// The bucket that every server has.
pub const BUCKET: &str = "emberline";
/// The access key that the server knows.
pub const ACCESS_KEY: &str = "EMBERLINETESTKEY";
/// Its secret. It must not be found in any output.
pub const SECRET_KEY: &str = "canary-of-a-secret-key";

/// Where the server's program is.
fn program() -> PathBuf {
    let tools = std::env::var_os("EMBERLINE_TOOLS").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/emberline/tools"),
        PathBuf::from,
    );
    let program = tools.join("bin/s3s-fs");
    assert!(
        program.is_file(),
        "there is no `{}`: `./ci.sh` installs it, or `cargo install s3s-fs --version 0.14.1 --features binary --locked --root {}`",
        program.display(),
        tools.display()
    );
    program
}

/// A running server with one bucket, on a loopback port that stays the same over restarts.
pub struct S3Server {
    root: TempDir,
    process: Option<Child>,
    port: u16,
    checks_signatures: bool,
}

impl S3Server {
    /// Starts one, and waits until it answers.
    #[must_use]
    pub fn start() -> Self {
        Self::launch(true)
    }

    /// One that takes every request, signed by nobody: what stands between may then change a
    /// request as it likes.
    #[must_use]
    pub fn start_without_signatures() -> Self {
        Self::launch(false)
    }

    fn launch(checks_signatures: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("data").join(BUCKET)).unwrap();
        let mut server = Self {
            root,
            process: None,
            port: 0,
            checks_signatures,
        };
        server.run();
        server
    }

    fn run(&mut self) {
        let log = self.root.path().join("log");
        let mut command = Command::new(program());
        command
            .args(["--host", "127.0.0.1", "--port", &self.port.to_string()])
            .arg(self.data())
            .env("RUST_LOG", "s3s_fs=info")
            .stdin(Stdio::null())
            .stdout(File::create(&log).unwrap())
            .stderr(Stdio::null())
            .process_group(0);
        if self.checks_signatures {
            command.args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]);
        }
        let mut process = command.spawn().unwrap();
        self.port = wait_for("the S3 server serves", Duration::from_secs(30), || {
            let text = fs::read_to_string(&log).unwrap();
            if let Some(status) = process.try_wait().unwrap() {
                panic!("the S3 server left with {status}:\n{text}");
            }
            let (_, address) = text.split_once("running at http://127.0.0.1:")?;
            let digits = address.split(|c: char| !c.is_ascii_digit()).next()?;
            address.contains('\n').then(|| digits.parse().unwrap())
        });
        self.process = Some(process);
    }

    /// `host:port`.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The URL of a prefix in its bucket.
    #[must_use]
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What a process needs in its environment to use it.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        self.environment_by(&self.address())
    }

    /// The same, by way of a proxy at that `host:port`.
    #[must_use]
    pub fn environment_by(&self, address: &str) -> Vec<(String, String)> {
        let mut variables = vec![
            ("AWS_ENDPOINT_URL", format!("http://{address}")),
            ("AWS_REGION", "us-east-1".to_owned()),
        ];
        if self.checks_signatures {
            variables.push(("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()));
            variables.push(("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()));
        } else {
            variables.push(("AWS_SKIP_SIGNATURE", "true".to_owned()));
        }
        let owned = variables.into_iter().map(|(k, v)| (k.to_owned(), v));
        owned.collect()
    }

    /// Kills it as a power cut would; connections are reset, then refused.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts it again on the same port, with what it had stored.
    pub fn restart(&mut self) {
        self.kill();
        self.run();
        TcpStream::connect(self.address()).unwrap();
    }

    /// Stops it from running, without closing anything, until [`Self::go_on`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it run again.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("the server runs");
        kill_process(Pid::from_child(process), signal).unwrap();
    }

    fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    /// The directory that is the bucket: each object is a file under its key.
    #[must_use]
    pub fn bucket(&self) -> PathBuf {
        self.data().join(BUCKET)
    }

    /// The file of a digest under a prefix.
    #[must_use]
    pub fn object(&self, prefix: &str, digest: &str) -> PathBuf {
        let dir = self.bucket().join(prefix).join("cas");
        dir.join(&digest[..2]).join(digest)
    }

    /// Multipart uploads that were begun and neither completed nor aborted, and parts of any.
    #[must_use]
    pub fn uploads_left(&self) -> Vec<String> {
        let entries = fs::read_dir(self.data()).unwrap();
        let mut left: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| {
                (name.starts_with(".upload-") && name.ends_with(".json"))
                    || name.starts_with(".upload_id-")
            })
            .collect();
        left.sort();
        left
    }

    /// Every object below a prefix hashes to its name, read from the disk and not through S3.
    /// Gives how many there are.
    ///
    /// # Panics
    /// If one does not.
    #[track_caller]
    pub fn every_object_hashes_to_its_name(&self, prefix: &str) -> usize {
        let mut count = 0;
        for path in files_below(&self.bucket().join(prefix).join("cas")) {
            let name = path.file_name().unwrap().to_str().unwrap();
            let found = outside::sha256(&fs::read(&path).unwrap());
            assert_eq!(found, name, "{} is damaged", path.display());
            count += 1;
        }
        count
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// All files below a directory.
#[must_use]
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            out.extend(files_below(&path));
        } else {
            out.push(path);
        }
    }
    out.sort();
    out
}
