//! Texts of strangers, made harmless for whoever reads them in a terminal or line by line.

/// Whether a character ends a line, gives a terminal an order, or turns the direction of text around.
#[must_use]
pub fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// The text in one line and safe for a terminal: what is harmful in it is escaped.
#[must_use]
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmful(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_harmful_is_escaped_and_the_rest_is_left() {
        assert_eq!(
            clean("a\x1b[31mb\nc\u{202e}\u{9b}\u{2028}"),
            "a\\u{1b}[31mb\\nc\\u{202e}\\u{9b}\\u{2028}"
        );
        assert_eq!(clean("ü → ok \\n"), "ü → ok \\n");
        let once = clean("\u{7}\\u{7}");
        assert_eq!(clean(&once), once);
    }
}
