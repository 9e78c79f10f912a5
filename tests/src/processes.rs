//! What runs on this machine, as `/proc` says.

use std::{fs, path::Path};

use rustix::process::Pid;

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
