//! What an expression of `PromQL` asks for: its selectors. As much of the language as it takes to find
//! them, read by code that Prometheus has no part in.

/// Words that are followed by a list of labels in parentheses.
const LABEL_LISTS: [&str; 6] = [
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
];
/// Words that are no metrics although no parenthesis follows: operators, and aggregations, which may have
/// their labels before their parenthesis.
const WORDS: [&str; 17] = [
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "sum",
    "min",
    "max",
    "avg",
    "count",
    "group",
    "stddev",
    "stdvar",
    "topk",
    "bottomk",
    "quantile",
    "count_values",
];

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == ':'
}

/// What is left of a text behind the bracket that closes the one it begins with. Quoted text counts as
/// it stands.
fn behind(text: &str, (open, close): (char, char)) -> &str {
    let (mut depth, mut quoted) = (0, None);
    for (at, c) in text.char_indices() {
        match quoted {
            Some(quote) if c == quote => quoted = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quoted = Some(c),
            None if c == open => depth += 1,
            None if c == close => {
                depth -= 1;
                if depth == 0 {
                    return &text[at + 1..];
                }
            }
            None => {}
        }
    }
    panic!("a `{open}` is not closed: {text}")
}

/// Each metric that an expression names, with the matchers that follow it, as written.
///
/// # Panics
/// If a bracket is not closed.
#[must_use]
pub fn selectors(expression: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = expression.trim_start();
    while let Some(first) = rest.chars().next() {
        rest = match first {
            '[' => behind(rest, ('[', ']')),
            '{' => {
                let after = behind(rest, ('{', '}'));
                found.push(rest[..rest.len() - after.len()].to_owned());
                after
            }
            c if c.is_ascii_digit() => rest.trim_start_matches(|c| is_of_a_name(c) || c == '.'),
            c if is_of_a_name(c) => {
                let after = rest.trim_start_matches(is_of_a_name);
                let name = &rest[..rest.len() - after.len()];
                let next = after.trim_start();
                if LABEL_LISTS.contains(&name) {
                    if next.starts_with('(') {
                        behind(next, ('(', ')'))
                    } else {
                        after
                    }
                } else if next.starts_with('(') || WORDS.contains(&name) {
                    after
                } else if after.starts_with('{') {
                    let behind = behind(after, ('{', '}'));
                    found.push(rest[..rest.len() - behind.len()].to_owned());
                    behind
                } else {
                    found.push(name.to_owned());
                    after
                }
            }
            c => &rest[c.len_utf8()..],
        };
        rest = rest.trim_start();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_selector_is_found_and_nothing_else() {
        for (expression, expected) in [
            ("up == 0", &["up"][..]),
            (
                "time() - max by (a_b, c) (m{x=\"1\"}) < 900",
                &["m{x=\"1\"}"],
            ),
            (
                "(sum(a) or vector(0)) == 0 and on () sum(b) > 1e3",
                &["a", "b"],
            ),
            (
                "histogram_quantile(0.99, sum by (le) (rate(h_bucket{a=~\"x|}y\"}[5m])))",
                &["h_bucket{a=~\"x|}y\"}"],
            ),
            ("changes(max(t)[30m:30s]) > 3", &["t"]),
            ("a / ignoring(b) group_left(c) d", &["a", "d"]),
            ("max(sum without (a) (b{c=\"d\"}))", &["b{c=\"d\"}"]),
            ("sum(rate(a[$__rate_interval])) * 60", &["a"]),
        ] {
            assert_eq!(selectors(expression), expected, "{expression}");
        }
    }
}
