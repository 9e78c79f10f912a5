//! The engine, and the command `docker` on it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    place::{binary, repository},
    seconds, wait_for,
};

/// A Docker Engine with the project's images.
pub struct Engine {
    /// Where the tools of these tests are.
    tools: PathBuf,
    /// What names the engine to the client; nothing where the environment does it.
    host: Option<String>,
    own: Option<Child>,
    run: TempDir,
    /// One test at a time.
    _lock: File,
}

impl Engine {
    /// The one that answers, or one of our own; with `emberline:local` and `emberline-worker:local` of the
    /// binary under test.
    ///
    /// # Panics
    /// If there is none and none can be started, or an image cannot be made.
    #[must_use]
    pub fn start() -> Self {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap());
        let tools = std::env::var_os("EMBERLINE_TOOLS")
            .map_or_else(|| home().join(".cache/emberline/tools"), PathBuf::from)
            .join("containers");
        assert!(
            tools.join("bin/docker").exists(),
            "there is no `{}`: `tests/containers/setup.sh` makes it",
            tools.join("bin/docker").display()
        );
        let lock = File::create(tools.join("lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let mut engine = Self {
            tools,
            host: None,
            own: None,
            run: tempfile::tempdir().unwrap(),
            _lock: lock,
        };
        if !engine.answers() {
            engine.launch();
            engine.clear();
        }
        engine.make_images(&[]);
        engine
    }

    fn answers(&self) -> bool {
        let asked = self.docker(&["info"]).output();
        asked.is_ok_and(|output| output.status.success())
    }

    fn launch(&mut self) {
        let run = self.run.path();
        self.host = Some(format!("unix://{}", run.join("socket").display()));
        let log = run.join("log");
        // Not killed with the test, as other servers are, but told to end: it takes its containers with it.
        let mut command = Command::new("setpriv");
        let child = command
            .args([
                "--pdeathsig",
                "TERM",
                "--",
                "dockerd",
                "--log-level",
                "warn",
            ])
            .args(["--host", self.host.as_ref().unwrap()])
            .args(["--group", "root"])
            .arg("--data-root")
            .arg(self.tools.join("engine"))
            .arg("--exec-root")
            .arg(run.join("exec"))
            .arg("--pidfile")
            .arg(run.join("pid"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        self.own = Some(child);
        wait_for("the Docker Engine answers", seconds(60), || {
            let ended = self.own.as_mut()?.try_wait().unwrap();
            let told = || fs::read_to_string(&log).unwrap_or_default();
            if let Some(status) = ended {
                panic!(
                    "no Docker Engine answers, and one of our own (which needs root) left with {status}:\n{}",
                    told()
                );
            }
            self.answers().then_some(())
        });
    }

    /// Removes from an engine of our own what a killed test left, and images and layers that
    /// were replaced.
    fn clear(&self) {
        let left = self.run(&["ps", "--all", "--quiet"]);
        for container in left.lines() {
            self.run(&["rm", "--force", "--volumes", container]);
        }
        self.run(&["system", "prune", "--force", "--volumes"]);
        self.run(&["builder", "prune", "--force", "--keep-storage", "1GB"]);
    }

    /// Makes the images of the binary under test, with variables that
    /// `deploy/local/images.sh` reads.
    ///
    /// # Panics
    /// If that fails.
    pub fn make_images(&self, environment: &[(&str, &str)]) {
        let mut command = self.command(repository().join("deploy/local/images.sh"));
        command.arg(binary()).envs(environment.iter().copied());
        succeeds(command);
    }

    /// A command that finds this engine.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new(program.as_ref());
        command
            .env(
                "PATH",
                format!("{}:{path}", self.tools.join("bin").display()),
            )
            .env("DOCKER_CONFIG", self.tools.join("docker"))
            .env("DOCKER_BUILDKIT", "1")
            .stdin(Stdio::null());
        if let Some(host) = &self.host {
            command.env("DOCKER_HOST", host);
        }
        command
    }

    /// `docker` with these arguments, to be run.
    #[must_use]
    pub fn docker(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(self.tools.join("bin/docker"));
        command.args(arguments);
        command
    }

    /// What `docker` prints with these arguments.
    ///
    /// # Panics
    /// If it fails: what it said is told.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        succeeds(self.docker(arguments))
    }

    /// How `docker` ended with these arguments, and what it said.
    #[must_use]
    pub fn attempt(&self, arguments: &[&str]) -> Output {
        self.docker(arguments).output().unwrap()
    }

    /// What the engine knows of a container, an image, a network or a volume.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    #[track_caller]
    pub fn inspect(&self, name: &str) -> Value {
        let mut all: Value = serde_json::from_str(&self.run(&["inspect", name])).unwrap();
        all[0].take()
    }

    /// The directory of a volume. Needs root, and an engine on this machine.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    #[track_caller]
    pub fn volume(&self, name: &str) -> PathBuf {
        let mountpoint = self.inspect(name)["Mountpoint"].as_str().map(PathBuf::from);
        let dir = mountpoint.expect("a volume has a directory");
        assert!(dir.is_dir(), "cannot look into {}", dir.display());
        dir
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(mut own) = self.own.take() {
            let _ = kill_process(Pid::from_child(&own), Signal::TERM);
            let _ = own.wait();
        }
    }
}

/// Standard output of a command that must succeed.
#[track_caller]
pub(super) fn succeeds(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
