//! Labels of workers, which stages ask for, and tags of model versions, which people look for. They
//! travel in every registration and in every answer, so there is a limit to them.

use std::collections::BTreeMap;

/// Labels of one worker, or tags of one version, at most.
pub const MAX_LABELS: usize = 64;
/// Bytes of a label's key, and of its value, at most.
pub const MAX_LABEL_BYTES: usize = 253;

/// Checks a worker's labels.
///
/// # Errors
/// What is wrong with the first that is wrong, in one line.
pub fn check(labels: &BTreeMap<String, String>) -> Result<(), String> {
    check_named("label", labels)
}

/// Checks the tags of a model version, by the same rules.
///
/// # Errors
/// What is wrong with the first that is wrong, in one line.
pub fn check_tags(tags: &BTreeMap<String, String>) -> Result<(), String> {
    check_named("tag", tags)
}

fn check_named(name: &str, labels: &BTreeMap<String, String>) -> Result<(), String> {
    if labels.len() > MAX_LABELS {
        return Err(format!(
            "there are {} {name}s, at most {MAX_LABELS} are allowed",
            labels.len()
        ));
    }
    for (key, value) in labels {
        if key.is_empty() {
            return Err(format!("the key of a {name} is empty"));
        }
        let both = [("key", key), ("value", value)];
        for (what, text) in both {
            // What is wrong may be long: its beginning is enough to find it.
            let shown: String = key.chars().take(40).collect();
            if text.len() > MAX_LABEL_BYTES {
                return Err(format!(
                    "the {what} of {name} `{}` has {} bytes, at most {MAX_LABEL_BYTES} are allowed",
                    shown.escape_debug(),
                    text.len()
                ));
            }
            if text.chars().any(char::is_control) {
                return Err(format!(
                    "the {what} of {name} `{}` has control characters",
                    shown.escape_debug()
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn labels_have_limits() {
        let long = "x".repeat(MAX_LABEL_BYTES);
        check(&labels(&[("zone", "a"), ("empty", ""), (&long, &long)])).unwrap();
        let longer = "x".repeat(MAX_LABEL_BYTES + 1);
        for (key, value, part) in [
            ("", "a", "is empty"),
            ("k", longer.as_str(), "value of label `k` has 254 bytes"),
            (longer.as_str(), "v", "key of label `xxxx"),
            ("k", "a\nb", "value of label `k` has control characters"),
            (
                "\u{1b}[31m",
                "v",
                "label `\\u{1b}[31m` has control characters",
            ),
        ] {
            let told = check(&labels(&[(key, value)])).unwrap_err();
            assert!(told.contains(part), "{told}");
            assert!(!told.contains(char::is_control), "{told}");
        }
        let many = (0..=MAX_LABELS).map(|n| (n.to_string(), String::new()));
        let many: BTreeMap<_, _> = many.collect();
        assert!(check(&many).unwrap_err().contains("65 labels"));
        assert!(check_tags(&many).unwrap_err().contains("65 tags"));
    }
}
