//! What this machine (or the container that it is) has: CPUs and memory within the cgroup's limits,
//! and GPUs by their device files. Nothing is started or asked to find them.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
};

use emberline_common::resources::Resources;

/// CPUs, memory and GPUs that this process may use.
///
/// GPUs are NVIDIA's devices (`/dev/nvidia0`, `/dev/nvidia1`, …), of these at most as many as
/// `CUDA_VISIBLE_DEVICES` leaves visible; where there is none, render nodes
/// (`/dev/dri/renderD128`, …), which every vendor's driver makes. NVIDIA's driver makes both, hence
/// never the sum. A container sees those that were given to it. An integrated GPU counts like any
/// other: a worker that should not offer it says so by `--gpus 0`.
#[must_use]
pub fn resources() -> Resources {
    // The standard library knows affinity and the CPU quotas of both cgroup versions.
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Resources {
        cpu_millis: u32::try_from(cpus.saturating_mul(1000)).unwrap_or(u32::MAX),
        memory_bytes: memory_bytes(Path::new("/")),
        gpus: gpus(
            Path::new("/"),
            std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(),
        ),
    }
}

/// See [`resources`]. `visible` is the value of `CUDA_VISIBLE_DEVICES`.
fn gpus(root: &Path, visible: Option<&str>) -> u32 {
    let nvidia = devices(&root.join("dev"), "nvidia");
    if nvidia == 0 {
        return devices(&root.join("dev/dri"), "renderD");
    }
    let Some(visible) = visible else {
        return nvidia;
    };
    // As the driver reads it: the list ends at the first entry that is none.
    let entries = visible.split(',').map(str::trim);
    let named = entries.take_while(|entry| !entry.is_empty() && !entry.starts_with('-'));
    nvidia.min(u32::try_from(named.count()).unwrap_or(u32::MAX))
}

/// Entries of a directory that are named like this and a number.
fn devices(dir: &Path, name: &str) -> u32 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    let numbered = entries.filter_map(Result::ok).filter(|entry| {
        let file = entry.file_name();
        let number = file.to_str().and_then(|file| file.strip_prefix(name));
        number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    });
    u32::try_from(numbered.count()).unwrap_or(u32::MAX)
}

/// The machine's memory, or the tightest limit of the cgroups that the process is in.
fn memory_bytes(root: &Path) -> u64 {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| {
            rest.trim()
                .trim_end_matches("kB")
                .trim()
                .parse::<u64>()
                .ok()
        })
        .map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    let limit = cgroup_limit(root).unwrap_or(u64::MAX);
    match total.min(limit) {
        u64::MAX => 0,
        bytes => bytes,
    }
}

fn cgroup_limit(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut lowest = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, group) = (parts.next()?, parts.next()?);
        let (mount, file) = if controllers.is_empty() {
            ("sys/fs/cgroup", "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            continue;
        };
        // A limit on any group above holds as well. Inside a container the path may be one of the
        // host that is not mounted here: then only the mount's own root is found.
        let mut group = Path::new(group.trim_start_matches('/'));
        loop {
            let text = fs::read_to_string(root.join(mount).join(group).join(file));
            if let Some(bytes) = text.ok().and_then(|text| text.trim().parse::<u64>().ok()) {
                lowest = Some(lowest.map_or(bytes, |low: u64| low.min(bytes)));
            }
            match group.parent() {
                Some(parent) => group = parent,
                None => break,
            }
        }
    }
    lowest
}

/// Makes a directory, and those above it, that no other user of this machine may look into. One that
/// is there stays as it is.
///
/// # Errors
/// If it cannot be made.
pub fn private_dir(dir: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_tightest_limit_of_the_groups_above_counts() {
        let root = machine(&[
            ("proc/meminfo", "MemTotal:       8000000 kB\n"),
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.max", "1048576\n"),
        ]);
        assert_eq!(memory_bytes(root.path()), 1 << 20);
    }

    #[test]
    fn without_a_limit_it_is_the_machines_memory() {
        let root = machine(&[
            ("proc/meminfo", "MemTotal:       1024 kB\n"),
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
        ]);
        assert_eq!(memory_bytes(root.path()), 1 << 20);
    }

    #[test]
    fn the_first_version_of_cgroups_is_known() {
        let root = machine(&[
            ("proc/meminfo", "MemTotal:       8000 kB\n"),
            ("proc/self/cgroup", "5:cpu,memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "4096\n"),
        ]);
        assert_eq!(memory_bytes(root.path()), 4096);
    }

    #[test]
    fn gpus_are_found_by_their_device_files() {
        let nvidia = machine(&[
            ("dev/nvidia0", ""),
            ("dev/nvidia1", ""),
            ("dev/nvidiactl", ""),
            ("dev/nvidia-uvm", ""),
            ("dev/dri/renderD128", ""),
            ("dev/dri/renderD129", ""),
            ("dev/dri/card0", ""),
        ]);
        assert_eq!(gpus(nvidia.path(), None), 2, "each counts once");
        let other = machine(&[("dev/dri/renderD128", ""), ("dev/dri/card0", "")]);
        assert_eq!(gpus(other.path(), None), 1);
        assert_eq!(gpus(machine(&[]).path(), None), 0);
    }

    #[test]
    fn gpus_that_are_hidden_are_not_offered() {
        let root = machine(&[("dev/nvidia0", ""), ("dev/nvidia1", "")]);
        for (visible, left) in [
            ("", 0),
            ("-1", 0),
            ("1", 1),
            ("0, 1", 2),
            ("0,1,2,3", 2),
            ("GPU-8932f937,-1,1", 1),
        ] {
            assert_eq!(gpus(root.path(), Some(visible)), left, "{visible:?}");
        }
    }

    #[test]
    fn this_machine_has_something() {
        assert!(resources().cpu_millis >= 1000);
        assert!(resources().memory_bytes > 0);
    }
}
