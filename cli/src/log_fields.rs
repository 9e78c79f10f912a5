//! How the fields of an event are written to the log of this process: whatever texts of strangers
//! are in them, an event is one line, and gives a terminal no orders.

use tracing_subscriber::{
    field::MakeExt as _,
    fmt::{FormatFields, format::debug_fn},
};

use crate::output::clean;

/// As the library writes them (`message name=value …`), but cleaned: of its own accord it lets line
/// ends pass, and in values also escapes.
pub fn fields() -> impl for<'writer> FormatFields<'writer> + Send + Sync + 'static {
    debug_fn(|to, field, value| {
        let value = clean(&format!("{value:?}"));
        match field.name() {
            "message" => write!(to, "{value}"),
            name if to.has_ansi_escapes() => {
                write!(to, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}")
            }
            name => write!(to, "{name}={value}"),
        }
    })
    .delimited(" ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
    };

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn texts_of_strangers_end_no_line_and_colour_none() {
        let evil = "a\r\n2026-01-01T00:00:00Z ERROR forged\u{1b}[2J\u{7}\u{9b}31m\u{202e}\0z";
        for colours in [false, true] {
            let kept = Kept::default();
            let to = kept.clone();
            let lines = tracing_subscriber::fmt::layer()
                .with_writer(move || to.clone())
                .fmt_fields(fields())
                .with_ansi(colours);
            let subscriber = tracing_subscriber::registry().with(lines);
            tracing::subscriber::with_default(subscriber, || {
                let span = tracing::error_span!("attempt", why = %evil);
                let _in_it = span.enter();
                tracing::warn!(why = %evil, "{evil}");
                tracing::warn!("the next one");
            });
            let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), 2, "{text}");
            assert!(text.ends_with("the next one\n"), "{text}");
            assert!(text.contains(r"a\r\n2026"), "{text}");
            for harmful in ["\u{1b}[2J", "\u{7}", "\u{9b}", "\u{202e}", "\0", "\r"] {
                assert!(!text.contains(harmful), "{harmful:?}: {text:?}");
            }
        }
    }
}
