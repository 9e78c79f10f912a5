//! Secrets: named by a pipeline, kept by the worker's machine, and nowhere else.
//!
//! A stage says [which it needs](crate::stage::Stage::secrets); they are looked up when an attempt
//! begins, and live as long as it does. Their values are in no record, no cache key and no message;
//! [`Redactor`] takes them out of whatever an attempt says.

mod redact;
mod source;

use std::{collections::BTreeMap, fmt};

use emberline_common::ids::SecretName;
use zeroize::Zeroizing;

pub use redact::Redactor;
pub use source::SecretSource;

/// What is shown in the place of a secret.
pub const SHOWN: &str = "***";
/// The shortest value. What is shorter stands in too many words to be taken out of them.
pub const MIN_BYTES: usize = 4;
/// The longest value; a system hands no variable of more than twice that to a command.
pub const MAX_BYTES: u64 = 64 << 10;

/// The value of a secret. It is not shown by `Debug`, and its memory is wiped when it is dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// With what is to be kept secret.
    ///
    /// # Errors
    /// Why this is none: it is too short, too long, or no text.
    pub fn new(value: Zeroizing<String>) -> Result<Self, String> {
        if value.is_empty() {
            return Err("is empty".to_owned());
        }
        if value.len() < MIN_BYTES {
            return Err(format!(
                "has fewer than {MIN_BYTES} bytes: it could not be kept out of the log"
            ));
        }
        if value.len() as u64 > MAX_BYTES {
            return Err(format!("has more than {MAX_BYTES} bytes"));
        }
        if value.contains('\0') {
            return Err("has a NUL byte: it is no text".to_owned());
        }
        Ok(Self(value))
    }

    /// The value itself: not for a message.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SHOWN)
    }
}

/// The secrets of one attempt.
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    values: BTreeMap<SecretName, Secret>,
    redactor: Redactor,
}

impl Secrets {
    /// These.
    #[must_use]
    pub fn new(values: BTreeMap<SecretName, Secret>) -> Self {
        Self {
            redactor: Redactor::of(&values),
            values,
        }
    }

    /// The one of that name, if the stage has asked for it.
    #[must_use]
    pub fn get(&self, name: &SecretName) -> Option<&Secret> {
        self.values.get(name)
    }

    /// What takes them out of texts.
    #[must_use]
    pub fn redactor(&self) -> Redactor {
        self.redactor.clone()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn secret(value: &str) -> Result<Secret, String> {
        Secret::new(Zeroizing::new(value.to_owned()))
    }

    #[test]
    fn a_secret_does_not_show_itself() {
        let name: SecretName = "api-key".parse().unwrap();
        let secrets = Secrets::new([(name.clone(), secret("planted-canary").unwrap())].into());
        let shown = format!("{secrets:?} {secrets:#?}");
        assert!(!shown.contains("planted"), "{shown}");
        assert_eq!(secrets.get(&name).unwrap().reveal(), "planted-canary");
    }

    #[test]
    fn what_cannot_be_a_secret_is_refused() {
        for (value, part) in [("", "empty"), ("abc", "fewer than 4"), ("abc\0d", "NUL")] {
            assert!(secret(value).unwrap_err().contains(part), "{value:?}");
        }
        let long = "x".repeat(usize::try_from(MAX_BYTES).unwrap());
        assert!(secret(&long).is_ok());
        assert!(
            secret(&format!("{long}x"))
                .unwrap_err()
                .contains("more than")
        );
    }
}
