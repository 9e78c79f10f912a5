//! A long-lived process of the binary, a coordinator or a worker: killed, paused, terminated and
//! started again with the same arguments.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{place::binary, processes, seconds, wait_for};

/// One process, or the place for one.
pub struct Node {
    name: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    program: PathBuf,
    /// A command that becomes the program in the end; empty without one.
    before: Vec<String>,
    dir: PathBuf,
    process: Option<Child>,
    /// Where the output of the last start begins in the files of all starts.
    begins: (usize, usize),
}

impl Node {
    /// In a directory of its own below `dir`; it does not run yet.
    #[must_use]
    pub fn new(dir: &Path, name: &str, arguments: Vec<String>) -> Self {
        let dir = dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        Self {
            name: name.to_owned(),
            arguments,
            environment: Vec::new(),
            program: binary(),
            before: Vec::new(),
            dir,
            process: None,
            begins: (0, 0),
        }
    }

    /// With more variables in its environment.
    #[must_use]
    pub fn with_environment(mut self, more: &[(String, String)]) -> Self {
        self.environment.extend(more.iter().cloned());
        self
    }

    /// The next starts are of another build.
    pub fn set_program(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    /// With a disk of its own of that size at `dir`, in a mount namespace of its own. Needs the right
    /// to mount.
    #[must_use]
    pub fn with_small_disk(mut self, dir: &Path, size: &str) -> Self {
        fs::create_dir_all(dir).unwrap();
        let script = "mount -t tmpfs -o size=$0 tmpfs \"$1\" && shift && exec \"$@\"";
        let dir = dir.to_str().unwrap();
        let before = ["unshare", "-m", "sh", "-c", script, size, dir];
        self.before = before.map(str::to_owned).to_vec();
        self
    }

    /// Is started by this command, which becomes the program in the end.
    pub fn run_by(&mut self, before: &[&str]) {
        self.before = before.iter().map(|&word| word.to_owned()).collect();
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts it.
    ///
    /// # Panics
    /// If it runs.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "{} runs", self.name);
        let open = |name: &str| {
            let mut options = File::options();
            options.create(true).append(true);
            options.open(self.dir.join(name)).unwrap()
        };
        let (stdout, stderr) = (open("stdout"), open("stderr"));
        let length = |file: &File| usize::try_from(file.metadata().unwrap().len()).unwrap();
        self.begins = (length(&stdout), length(&stderr));
        let mut command = match self.before.split_first() {
            None => processes::ends_with_the_test(&self.program),
            Some((program, arguments)) => {
                let mut command = processes::ends_with_the_test(program);
                command.args(arguments).arg(&self.program);
                command
            }
        };
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["EMBERLINE_", "AWS_", "RUST_LOG", "TRACEPARENT", "OTEL_"]
                .iter()
                .any(|beginning| name.starts_with(beginning))
            {
                command.env_remove(&*name);
            }
        }
        let child = command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .unwrap();
        self.process = Some(child);
    }

    /// Whether it was started and not seen to end.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Its process id.
    ///
    /// # Panics
    /// If it does not run.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.process.as_ref().expect("it runs"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Kills it as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Stops it from running, without closing anything, until [`Self::go_on`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it run again.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// Asks it to end, as an operator would.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Waits for its end, and gives its exit code.
    ///
    /// # Panics
    /// If it has not ended by then, or was ended by a signal.
    #[track_caller]
    pub fn wait(&mut self, within: Duration) -> i32 {
        let name = self.name.clone();
        let status = wait_for(&format!("{name} ends"), within, || self.ended());
        self.process = None;
        status
            .code()
            .unwrap_or_else(|| panic!("{name} ended with {status}: {}", self.stderr()))
    }

    /// How it ended, if it has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut()?.try_wait().unwrap()
    }

    /// Standard output since the last start.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.read("stdout", self.begins.0)
    }

    /// Standard error since the last start.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.read("stderr", self.begins.1)
    }

    fn read(&self, name: &str, from: usize) -> String {
        let bytes = fs::read(self.dir.join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes[from.min(bytes.len())..]).into_owned()
    }

    /// Waits until standard output has a line with this in it since the last start, and gives the
    /// line.
    ///
    /// # Panics
    /// If it ends before, or does not say it.
    #[track_caller]
    pub fn wait_for_line(&mut self, part: &str) -> String {
        wait_for(&format!("{}: `{part}`", self.name), seconds(20), || {
            let stdout = self.stdout();
            // A line that is not whole yet is none.
            let whole = stdout.split_inclusive('\n').filter(|l| l.ends_with('\n'));
            let mut found = whole.filter(|l| l.contains(part));
            if let Some(line) = found.next() {
                return Some(line.trim_end().to_owned());
            }
            if let Some(status) = self.ended() {
                panic!("{} ended with {status}:\n{}", self.name, self.stderr());
            }
            None
        })
    }

    /// Tells the end of what it has logged, for a test that failed.
    pub fn tell(&self) {
        for name in ["stdout", "stderr"] {
            let text = self.read(name, 0);
            let lines: Vec<_> = text.lines().collect();
            let from = lines.len().saturating_sub(60);
            eprintln!("--- {} of {}, from line {from}", name, self.name);
            for line in &lines[from..] {
                eprintln!("{line}");
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A paused process is killed all the same.
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// How long something took.
#[must_use]
pub fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let value = call();
    (value, start.elapsed())
}
