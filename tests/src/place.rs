//! A directory of a test's own, and the binary run in it: with a deadline, its output captured, and
//! nothing of it left when the test is over.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use tempfile::TempDir;

use crate::processes;

/// How long a command may take unless a test says otherwise.
const DEADLINE: Duration = Duration::from_secs(60);

/// The binary under test: `EMBERLINE_BIN`, or the one that was built beside the tests.
///
/// # Panics
/// If there is none: the message says how to build it.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("EMBERLINE_BIN") {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "EMBERLINE_BIN names no file: {path:?}");
        return path;
    }
    // `target/<profile>/deps/<test>`, so the binary is two steps up.
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join("emberline");
    assert!(
        path.is_file(),
        "there is no `{}`: build it with `cargo build -p emberline-cli` (with the profile of the tests), or name one with EMBERLINE_BIN",
        path.display()
    );
    path
}

/// The root of the repository: where the tests are run, for with a target directory that is shared
/// they may have been compiled from another clone of the same sources.
///
/// # Panics
/// If a test is run by something else than Cargo.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
        .parent()
        .unwrap()
        .to_path_buf()
}

/// A directory in which commands run, with their state in `.emberline`.
pub struct Place {
    root: TempDir,
    calls: AtomicU32,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// A new, empty one.
    #[must_use]
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("work")).unwrap();
        Self {
            root,
            calls: AtomicU32::new(0),
        }
    }

    /// The directory that commands run in.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.root.path().join("work")
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir().join(relative)
    }

    /// The state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.path(".emberline")
    }

    /// Writes a file and the directories above it.
    pub fn write(&self, relative: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// Copies a directory of the repository here, under its own name.
    pub fn copy_example(&self, name: &str) {
        fn copy(from: &Path, to: &Path) {
            fs::create_dir_all(to).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                let target = to.join(entry.file_name());
                match entry.file_type().unwrap() {
                    kind if kind.is_dir() => copy(&entry.path(), &target),
                    _ => drop(fs::copy(entry.path(), target).unwrap()),
                }
            }
        }
        copy(&repository().join("examples").join(name), &self.path(name));
    }

    /// The binary with these arguments.
    pub fn emberline<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Call {
        let mut command = Command::new(binary());
        command
            .args(arguments)
            .current_dir(self.dir())
            .stdin(Stdio::null())
            .process_group(0);
        // What somebody has set for his shell is not the test's.
        for (name, _) in std::env::vars_os() {
            let shown = name.to_string_lossy();
            if ["EMBERLINE_", "OTEL_", "RUST_LOG", "TRACEPARENT"]
                .iter()
                .any(|beginning| shown.starts_with(beginning))
            {
                command.env_remove(&name);
            }
        }
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let arguments = arguments.iter().map(|a| a.as_ref().to_string_lossy());
        Call {
            shown: arguments.collect::<Vec<_>>().join(" "),
            command,
            stdout: self.root.path().join(format!("{number}.stdout")),
            stderr: self.root.path().join(format!("{number}.stderr")),
            within: DEADLINE,
        }
    }

    /// Runs the binary, which must leave with 0, and reads its output as JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.extend(["-o", "json"]);
        self.emberline(&all).run().expect_code(0).json()
    }

    /// Runs a pipeline file to its end and gives the run as JSON, however it ended.
    pub fn run(&self, file: &str) -> Value {
        let output = self.emberline(&["run", file, "-o", "json", "-q"]).run();
        assert!(matches!(output.code, Some(0 | 1)), "{output}");
        output.json()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Only after a test that failed half-way is anything left here.
        for pid in processes::of_attempts_below(self.root.path()) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// A command line that has not started.
pub struct Call {
    shown: String,
    command: Command,
    stdout: PathBuf,
    stderr: PathBuf,
    within: Duration,
}

impl Call {
    /// With this environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// With these environment variables.
    #[must_use]
    pub fn envs(mut self, variables: &[(String, String)]) -> Self {
        self.command.envs(variables.iter().map(|(k, v)| (k, v)));
        self
    }

    /// With another deadline.
    #[must_use]
    pub fn within(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// Starts it.
    #[must_use]
    pub fn start(mut self) -> Running {
        let child = self
            .command
            .stdout(File::create(&self.stdout).unwrap())
            .stderr(File::create(&self.stderr).unwrap())
            .spawn()
            .unwrap();
        Running {
            deadline: Instant::now() + self.within,
            child,
            call: self,
            status: None,
        }
    }

    /// Runs it to its end.
    #[must_use]
    pub fn run(self) -> Output {
        self.start().finish()
    }
}

/// A process of the binary.
pub struct Running {
    call: Call,
    child: Child,
    status: Option<ExitStatus>,
    deadline: Instant,
}

impl Running {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().unwrap();
        }
        self.status.is_some()
    }

    /// What it has printed so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.call.stdout).unwrap()).into_owned()
    }

    /// What it has printed on standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.call.stderr).unwrap()).into_owned()
    }

    /// Kills it as a power cut would, and waits until it is gone.
    pub fn kill(mut self) -> Output {
        let _ = kill_process(self.pid(), Signal::KILL);
        self.deadline = Instant::now() + Duration::from_secs(10);
        self.finish()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// At the deadline.
    #[must_use]
    pub fn finish(mut self) -> Output {
        while !self.has_ended() {
            if Instant::now() > self.deadline {
                let (stdout, stderr) = (self.stdout(), self.stderr());
                panic!(
                    "`emberline {}` has not ended within {:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}",
                    self.call.shown, self.call.within
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = self.status.unwrap();
        Output {
            call: self.call.shown.clone(),
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            let _ = kill_process_group(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// How a process ended, and what it said.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its arguments.
    pub call: String,
    /// Its exit code, if it left by itself.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`emberline {}` left with {:?} (signal {:?})\n--- stdout\n{}\n--- stderr\n{}",
            self.call, self.code, self.signal, self.stdout, self.stderr
        )
    }
}

impl Output {
    /// Itself, if it left with this code.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        self
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e} in {self}"))
    }

    /// The mistakes that it told, one a line, without the word `error`.
    ///
    /// # Panics
    /// If standard error has a line that is none: a mistake must be one line.
    #[must_use]
    #[track_caller]
    pub fn errors(&self) -> Vec<&str> {
        let lines = self.stderr.lines();
        lines
            .map(|line| {
                line.strip_prefix("error: ")
                    .unwrap_or_else(|| panic!("`{line}` is no mistake in {self}"))
            })
            .collect()
    }
}

/// One task of a run as `-o json` prints it.
///
/// # Panics
/// If there is none of that name.
#[must_use]
#[track_caller]
pub fn task<'a>(run: &'a Value, name: &str) -> &'a Value {
    let tasks = run["tasks"].as_array().unwrap_or_else(|| panic!("{run:#}"));
    tasks
        .iter()
        .find(|t| t["task"] == name)
        .unwrap_or_else(|| panic!("no task `{name}` in {run:#}"))
}

/// The states of a run's tasks, by name.
#[must_use]
pub fn states(run: &Value) -> Vec<(&str, &str)> {
    let tasks = run["tasks"].as_array().unwrap();
    tasks
        .iter()
        .map(|t| (t["task"].as_str().unwrap(), t["state"].as_str().unwrap()))
        .collect()
}

/// A time as `-o json` prints it, in milliseconds since 1970.
///
/// # Panics
/// If it is none.
#[must_use]
#[track_caller]
pub fn millis(time: &Value) -> u64 {
    let text = time.as_str().unwrap_or_else(|| panic!("{time} is no time"));
    let time: jiff::Timestamp = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
    u64::try_from(time.as_millisecond()).unwrap()
}
