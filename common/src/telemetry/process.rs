//! What a process tells of itself, whatever it is: how much memory it has.

use opentelemetry::metrics::Meter;

/// Physical memory of this process in bytes; nothing where the system does not tell.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = kib.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

/// Tells it whenever somebody collects the metrics.
pub(super) fn observe(meter: &Meter) {
    // The meter keeps the callback.
    let _ = meter
        .i64_observable_up_down_counter("process.memory.usage")
        .with_unit("By")
        .with_description("Physical memory that the process uses")
        .with_callback(|observer| {
            let resident = resident().and_then(|bytes| i64::try_from(bytes).ok());
            if let Some(bytes) = resident {
                observer.observe(bytes, &[]);
            }
        })
        .build();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_process_has_some_memory_and_not_all_of_it() {
        let bytes = resident().unwrap();
        assert!((1 << 20..1 << 40).contains(&bytes), "{bytes}");
    }
}
