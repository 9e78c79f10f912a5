//! The file that `AWS_SHARED_CREDENTIALS_FILE` names: keys of a bucket in the format of `aws configure`, so that they
//! can be mounted as a secret and need not stand in the environment.
//!
//! It is read only where the variable names it and no key is in the environment; nothing is looked for
//! in anybody's home.

use std::fs;

/// What the environment calls them, and the file.
const KEYS: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "aws_access_key_id"),
    ("AWS_SECRET_ACCESS_KEY", "aws_secret_access_key"),
    ("AWS_SESSION_TOKEN", "aws_session_token"),
];

/// The keys of a profile, under the names that they have in the environment.
///
/// # Errors
/// In one line: the file cannot be read, or is none, or has no such keys. No value is told.
pub(super) fn read(path: &str, profile: &str) -> Result<Vec<(String, String)>, String> {
    let told = |why: &str| {
        format!("AWS_SHARED_CREDENTIALS_FILE names `{path}`, which cannot be used: {why}")
    };
    let text = fs::read_to_string(path).map_err(|e| told(&e.to_string()))?;
    parse(&text, profile).map_err(|why| told(&why))
}

fn parse(text: &str, profile: &str) -> Result<Vec<(String, String)>, String> {
    let (mut found, mut is_there, mut section) = (Vec::new(), false, None);
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = Some(name.trim());
            is_there |= section == Some(profile);
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            return Err(format!(
                "line {number} is neither `[profile]` nor `key = value`"
            ));
        };
        let known = KEYS.iter().find(|(_, name)| *name == key.trim());
        if let Some((variable, _)) = known.filter(|_| section == Some(profile)) {
            found.push(((*variable).to_owned(), value.trim().to_owned()));
        }
    }
    if !is_there {
        return Err(format!("it has no profile `[{profile}]`"));
    }
    for (variable, name) in &KEYS[..2] {
        if !found
            .iter()
            .any(|(v, value)| v == variable && !value.is_empty())
        {
            return Err(format!("`[{profile}]` has no `{name}`"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const TEXT: &str = "\
# Two of them.
[default]
aws_access_key_id = one
aws_secret_access_key=of=one

[other]
aws_access_key_id = two
aws_secret_access_key = of two
aws_session_token = t
region = here
";

    fn pairs(found: &[(String, String)]) -> Vec<(&str, &str)> {
        found
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect()
    }

    #[test]
    fn a_profile_gives_its_keys_alone() {
        assert_eq!(
            pairs(&parse(TEXT, "default").unwrap()),
            [
                ("AWS_ACCESS_KEY_ID", "one"),
                ("AWS_SECRET_ACCESS_KEY", "of=one")
            ]
        );
        assert_eq!(
            pairs(&parse(TEXT, "other").unwrap()),
            [
                ("AWS_ACCESS_KEY_ID", "two"),
                ("AWS_SECRET_ACCESS_KEY", "of two"),
                ("AWS_SESSION_TOKEN", "t")
            ]
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        for (text, told) in [
            ("", "no profile `[default]`"),
            ("[other]\naws_access_key_id = a", "no profile `[default]`"),
            (
                "[default]\naws_access_key_id = a",
                "no `aws_secret_access_key`",
            ),
            (
                "[default]\naws_access_key_id =\naws_secret_access_key = s",
                "no `aws_access_key_id`",
            ),
            ("[default]\nsecret", "line 2"),
        ] {
            let why = parse(text, "default").unwrap_err();
            assert!(why.contains(told), "{text:?}: {why}");
        }
        let why = read("/nowhere/credentials", "default").unwrap_err();
        assert!(why.contains("`/nowhere/credentials`"), "{why}");
    }
}
