//! What people and programs read: tables, JSON, and texts of strangers made harmless.

use std::{
    io::{self, Write as _},
    time::Duration,
};

pub use emberline_common::text::clean;
use serde::Serialize;

/// Whether to colour: on a terminal, unless `NO_COLOR` is set.
pub fn colours(terminal: bool) -> bool {
    terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Prints a line; an error where nobody reads any more.
pub fn line(text: impl AsRef<str>) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{}", text.as_ref())
}

/// Prints a value as JSON.
pub fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

/// Prints rows under a head, each column as wide as its widest cell.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| r.iter().map(|c| clean(c)).collect())
        .collect();
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in &cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = io::stdout().lock();
    let mut print = |row: &[String]| {
        let padded: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        writeln!(out, "{}", padded.join("  ").trim_end())
    };
    print(&head.iter().map(|&h| h.to_owned()).collect::<Vec<_>>())?;
    cells.iter().try_for_each(|row| print(row))
}

/// A length of time for people: `0.42s`, `12.3s`, `4m05s`, `2h03m`, `3d04h`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        s if s < 10.0 => format!("{s:.2}s"),
        s if s < 100.0 => format!("{s:.1}s"),
        s if s < 3600.0 => format!("{}m{:02}s", time.as_secs() / 60, time.as_secs() % 60),
        s if s < 172_800.0 => {
            format!("{}h{:02}m", time.as_secs() / 3600, time.as_secs() / 60 % 60)
        }
        _ => format!(
            "{}d{:02}h",
            time.as_secs() / 86_400,
            time.as_secs() / 3600 % 24
        ),
    }
}

/// A number of bytes for people.
#[allow(clippy::cast_precision_loss, reason = "shown with one digit")]
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{count} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_short() {
        assert_eq!(duration(Duration::from_millis(420)), "0.42s");
        assert_eq!(duration(Duration::from_secs(245)), "4m05s");
        assert_eq!(duration(Duration::from_secs(47 * 3600)), "47h00m");
        assert_eq!(duration(Duration::from_secs(49 * 3600)), "2d01h");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(7), "7 B");
    }
}
