//! What runs on this machine, as `/proc` says, and how to start what must not outlive the test.

use std::{
    ffi::OsStr,
    fs,
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::process::Pid;

/// A command that is killed when the thread that started it ends, even if that is killed itself.
/// It has a process group of its own, and its process id is that of the program.
#[must_use]
pub fn ends_with_the_test(program: impl AsRef<OsStr>) -> Command {
    // `setpriv` asks the kernel for it and then becomes the program.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .process_group(0);
    command
}

/// A loopback port that nobody listens on, and that no other test is given while this one runs: for
/// servers that come back on the same port after they were killed.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Below the ports that the kernel gives to outgoing connections, else one of these may take it
    // while its server is down. Test processes that run side by side have different beginnings.
    const BELOW: u32 = 32_000;
    const OF_ONE_PROCESS: u32 = 20;
    let first = (std::process::id() % 1_000) * OF_ONE_PROCESS;
    for _ in 0..1_000 {
        let port = BELOW - 1 - (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        let port = u16::try_from(port).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// Living processes with an environment variable that begins so.
fn with_environment(beginning: &[u8]) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|all| {
                all.split(|b| *b == 0)
                    .any(|variable| variable.starts_with(beginning))
            }) && is_alive(*pid)
        })
        .filter_map(Pid::from_raw)
        .collect()
}

/// The processes of commands whose attempts have their directory below this one: the commands
/// themselves, and whatever they have started and not freed of its environment.
#[must_use]
pub fn of_attempts_below(dir: &Path) -> Vec<Pid> {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let mut beginning = b"EMBERLINE_RESULTS=".to_vec();
    beginning.extend_from_slice(dir.as_os_str().as_encoded_bytes());
    with_environment(&beginning)
}

/// Whether a process is there and is no zombie.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
    })
}

/// The most memory that a living process has held so far, in bytes.
#[must_use]
pub fn peak_memory(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    kib.trim()
        .trim_end_matches("kB")
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}
