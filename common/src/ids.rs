//! Ids and names as types of their own, parsed once at the border.
//!
//! A `String` is only text for people; whatever names a thing is one of these. Names that end up in
//! a key or a path (`stage`, `task`, `artifact`, `model`) follow one allow-list, so that no text of
//! a user can ever climb out of the place that it names.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use thiserror::Error;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{}` is no {what}: {rule}", text.escape_debug())]
pub struct InvalidId {
    /// What it should have been, e.g. `stage name`.
    pub what: &'static str,
    /// The text, cut to 80 characters.
    pub text: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

const NAME_RULE: &str =
    "use 1 to 63 lower-case letters, digits, `_` and `-`, and begin with a letter or digit";

/// Whether `text` is `[a-z0-9][a-z0-9_-]{0,62}`.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && !matches!(bytes[0], b'-' | b'_')
        && bytes
            .iter()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}

fn invalid(what: &'static str, text: &str, rule: &'static str) -> InvalidId {
    InvalidId {
        what,
        text: text.chars().take(80).collect(),
        rule,
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:expr, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "format": concat!("emberline ", $what) })
            }
        }

        impl $name {
            /// Parses and checks.
            ///
            /// # Errors
            /// [`InvalidId`] with the rule that the text breaks.
            pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidId> {
                let text = text.as_ref();
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.into())) } else { Err(invalid($what, text, $rule)) }
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str { &self.0 }

            /// The text, shared and not copied.
            #[must_use]
            pub fn shared(&self) -> Arc<str> { Arc::clone(&self.0) }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.pad(&self.0) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}", self.0) }
        }
        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> { Self::new(text) }
        }
        impl AsRef<str> for $name { fn as_ref(&self) -> &str { &self.0 } }
        impl Borrow<str> for $name { fn borrow(&self) -> &str { &self.0 } }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> { s.serialize_str(&self.0) }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                Self::new(&text).map_err(D::Error::custom)
            }
        }
    };
}

text_id!(
    /// One execution of a pipeline revision.
    RunId, "run id", NAME_RULE, is_name
);
text_id!(
    /// A token's name.
    TokenName, "token name", NAME_RULE, is_name
);
text_id!(
    /// A pipeline's name.
    PipelineName, "pipeline name", NAME_RULE, is_name
);
text_id!(
    /// A stage's name within its pipeline.
    StageName, "stage name", NAME_RULE, is_name
);
text_id!(
    /// A task's name within its run: the stage's name, for a matrix followed by `.` and the index.
    TaskName, "task name", "use a stage name, for a matrix followed by `.` and the index",
    |text| match text.split_once('.') {
        None => is_name(text),
        Some((stage, index)) => {
            is_name(stage) && !index.is_empty() && index.len() <= 7
                && index.bytes().all(|b| b.is_ascii_digit())
        }
    }
);
text_id!(
    /// The name of one output of a stage, or of one input.
    ArtifactName, "artifact name", NAME_RULE, is_name
);
text_id!(
    /// The name of a secret, which a worker knows the value of.
    SecretName, "secret name",
    "use 1 to 63 letters, digits, `_`, `-` and `.`, and begin with a letter or digit",
    |text| {
        let bytes = text.as_bytes();
        (1..=63).contains(&bytes.len()) && bytes[0].is_ascii_alphanumeric()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
    }
);
text_id!(
    /// A model's name in the registry.
    ModelName, "model name", NAME_RULE, is_name
);
text_id!(
    /// A movable name for one version of a model, e.g. `champion`.
    Alias, "alias", NAME_RULE, is_name
);
text_id!(
    /// A place where one version of each model is live, e.g. `production`.
    EnvironmentName, "environment name", NAME_RULE, is_name
);
text_id!(
    /// A worker's name, stable over restarts.
    WorkerName, "worker name",
    "use 1 to 253 letters, digits, `.`, `_` and `-`, and begin with a letter or digit",
    |text| (1..=253).contains(&text.len())
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
);
text_id!(
    /// One life of a worker's process; two processes with one name differ in it.
    Incarnation, "incarnation", NAME_RULE, is_name
);
text_id!(
    /// A stage kind: a built-in one, or `vendor/kind` for a user's own.
    StageKind, "stage kind", "use a built-in kind, or `vendor/kind` for your own",
    |text| match text.split_once('/') {
        None => is_name(text),
        Some((vendor, kind)) => is_name(vendor) && is_name(kind),
    }
);

impl From<crate::spec::kinds::BuiltinKind> for StageKind {
    fn from(kind: crate::spec::kinds::BuiltinKind) -> Self {
        Self(kind.as_str().into())
    }
}

impl EnvironmentName {
    /// `production`: where a model is deployed to if nothing else is said.
    #[must_use]
    pub fn production() -> Self {
        Self("production".into())
    }
}

impl TaskName {
    /// The task of a stage without a matrix.
    #[must_use]
    pub fn of_stage(stage: &StageName) -> Self {
        Self(stage.0.clone())
    }

    /// The task of a stage's matrix element, from 0.
    #[must_use]
    pub fn of_matrix(stage: &StageName, index: usize) -> Self {
        Self(format!("{stage}.{index}").into())
    }
}

/// The leader's term: the create revision of the leader key. It only ever grows.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One deployment, counted over the whole cluster; shown as `d17`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct DeploymentId(pub u64);

impl fmt::Display for DeploymentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("d{}", self.0))
    }
}

impl FromStr for DeploymentId {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let digits = text.strip_prefix('d').unwrap_or(text);
        let plain = !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| plain);
        number
            .map(Self)
            .ok_or_else(|| invalid("deployment", text, "write it as it is shown, e.g. `d17`"))
    }
}

/// One try of a task on one worker. Only the highest number of a task counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptId {
    /// The run.
    pub run: RunId,
    /// The task.
    pub task: TaskName,
    /// From 1.
    pub attempt: u32,
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.run, self.task, self.attempt)
    }
}

/// A SHA-256, shown as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Of what a hasher was fed.
    #[must_use]
    pub fn from_hasher(hasher: sha2::Sha256) -> Self {
        use sha2::Digest as _;
        Self(hasher.finalize().into())
    }

    /// From raw bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 hex digits, for people.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0_u8; 64];
        for (i, byte) in self.0.iter().enumerate() {
            text[2 * i] = HEX[usize::from(byte >> 4)];
            text[2 * i + 1] = HEX[usize::from(byte & 15)];
        }
        f.pad(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        const RULE: &str = "write 64 lower-case hex digits";
        let bytes = text.as_bytes();
        if bytes.len() != 64 {
            return Err(invalid("SHA-256", text, RULE));
        }
        let nibble = |b: u8| match b {
            b'0'..=b'9' => Ok(b - b'0'),
            b'a'..=b'f' => Ok(b - b'a' + 10),
            _ => Err(invalid("SHA-256", text, RULE)),
        };
        let mut out = [0_u8; 32];
        for (i, slot) in out.iter_mut().enumerate() {
            *slot = nibble(bytes[2 * i])? << 4 | nibble(bytes[2 * i + 1])?;
        }
        Ok(Self(out))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl JsonSchema for Digest {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Sha256".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "format": "emberline SHA-256",
            "pattern": "^[0-9a-f]{64}$",
            "description": "A SHA-256 as 64 lower-case hex digits."
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_climb_out_of_a_path_are_refused() {
        for bad in [
            "",
            "../x",
            "a/b",
            "A",
            "-a",
            "_a",
            "a b",
            "a\0",
            "ä",
            &"a".repeat(64),
        ] {
            assert!(StageName::new(bad).is_err(), "{bad:?} was taken");
        }
        assert!(StageName::new("a-b_9").is_ok());
    }

    #[test]
    fn a_task_name_is_a_stage_name_with_an_optional_index() {
        for bad in ["a.", ".1", "a.x", "a.1.2", "a.12345678"] {
            assert!(TaskName::new(bad).is_err(), "{bad:?} was taken");
        }
        assert!(TaskName::new("train.12").is_ok());
    }

    #[test]
    fn a_digest_reads_back_what_it_shows() -> Result<(), InvalidId> {
        let digest = Digest::of(b"abc");
        assert!(digest.to_string().starts_with("ba7816bf8f01cfea"));
        assert_eq!(digest.to_string().parse::<Digest>()?, digest);
        assert!("BA".repeat(32).parse::<Digest>().is_err());
        Ok(())
    }
}
