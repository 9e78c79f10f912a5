//! Which trace a run is, and which span each part of it.
//!
//! The ids are derived from what the parts are called, not drawn: so every process knows the span
//! of an attempt without being told, a next leader closes the spans that a dead one had opened, and
//! what is emitted twice is the same span twice. Nothing here exports anything; see
//! [`telemetry`](crate::telemetry).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    ids::{AttemptId, DeploymentId, Digest, Epoch, RunId, TaskName},
    time::Timestamp,
};

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name([u8; $bytes]);

        impl $name {
            /// The raw bytes.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; $bytes] {
                self.0
            }

            /// Whether it names anything: all zeros name nothing (W3C Trace Context).
            #[must_use]
            pub fn is_valid(self) -> bool {
                self.0 != [0; $bytes]
            }

            fn derive(parts: &[&str]) -> Self {
                // The parts hold no line breaks, so no two lists of parts are one text.
                let digest = Digest::of(parts.join("\n").as_bytes());
                let mut bytes = [0; $bytes];
                bytes.copy_from_slice(&digest.as_bytes()[..$bytes]);
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                const DIGITS: &[u8; 16] = b"0123456789abcdef";
                let mut text = [0; 2 * $bytes];
                for (at, byte) in self.0.iter().enumerate() {
                    text[2 * at] = DIGITS[usize::from(byte >> 4)];
                    text[2 * at + 1] = DIGITS[usize::from(byte & 15)];
                }
                // Digits are text.
                f.write_str(str::from_utf8(&text).unwrap_or_default())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = &'static str;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                const RULE: &str = concat!("no ", $what, ": write lower-case hex digits, not all zero");
                let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
                if text.len() != 2 * $bytes || !text.bytes().all(hex) {
                    return Err(RULE);
                }
                let mut bytes = [0; $bytes];
                for (at, byte) in bytes.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| RULE)?;
                }
                Some(Self(bytes)).filter(|id| id.is_valid()).ok_or(RULE)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(D::Error::custom)
            }
        }
    };
}

hex_id!(
    /// A trace, as 32 hex digits.
    TraceId, 16, "trace id"
);
hex_id!(
    /// A span within its trace, as 16 hex digits.
    SpanId, 8, "span id"
);

/// A span and its trace, as W3C Trace Context hands it on (<https://www.w3.org/TR/trace-context/>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace: TraceId,
    /// The span that what comes next is part of.
    pub span: SpanId,
    /// Whether the trace is recorded.
    pub sampled: bool,
}

impl fmt::Display for TraceContext {
    /// A `traceparent`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = u8::from(self.sampled);
        write!(f, "00-{}-{}-{flags:02x}", self.trace, self.span)
    }
}

impl FromStr for TraceContext {
    type Err = &'static str;
    /// Reads a `traceparent`. Of a version that is not known yet, what follows the four known
    /// fields is ignored, as the specification demands.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const RULE: &str =
            "it is none by W3C Trace Context, e.g. `00-<32 hex digits>-<16 hex digits>-01`";
        let hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut parts = text.split('-');
        let mut next = || parts.next().ok_or(RULE);
        let (version, trace, span, flags) = (next()?, next()?, next()?, next()?);
        let more = parts.next().is_some();
        let known = version.len() == 2 && hex(version) && version != "ff";
        if !known || (version == "00" && more) || flags.len() != 2 || !hex(flags) {
            return Err(RULE);
        }
        let flags = u8::from_str_radix(flags, 16).map_err(|_| RULE)?;
        Ok(Self {
            trace: trace.parse().map_err(|_| RULE)?,
            span: span.parse().map_err(|_| RULE)?,
            sampled: flags & 1 == 1,
        })
    }
}

/// The trace of one run, and its spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunTrace {
    /// The trace.
    pub trace: TraceId,
    /// The span outside of Emberline that the run is part of.
    pub parent: Option<SpanId>,
    /// Whether the trace is recorded, if whoever began it has said so.
    pub sampled: Option<bool>,
    run: RunId,
}

impl RunTrace {
    /// Of a run that was submitted with this `traceparent` (or none: then the run begins a trace).
    #[must_use]
    pub fn of(run: &RunId, traceparent: &str) -> Self {
        let context = traceparent.parse::<TraceContext>().ok();
        Self {
            trace: context.map_or_else(|| TraceId::derive(&["run", run.as_str()]), |c| c.trace),
            parent: context.map(|c| c.span),
            sampled: context.map(|c| c.sampled),
            run: run.clone(),
        }
    }

    /// Of a run that is known to be part of this trace; whether it is recorded was not said.
    #[must_use]
    pub fn within(trace: TraceId, run: &RunId) -> Self {
        Self {
            trace,
            parent: None,
            sampled: None,
            run: run.clone(),
        }
    }

    fn span(&self, parts: &[&str]) -> SpanId {
        SpanId::derive(&[&[self.run.as_str()], parts].concat())
    }

    /// The run's span, from when it was accepted or last retried to its end.
    #[must_use]
    pub fn root(&self, resumed_at: Timestamp) -> SpanId {
        self.span(&["run", &resumed_at.0.to_string()])
    }

    /// The span of an attempt.
    #[must_use]
    pub fn attempt(&self, task: &TaskName, attempt: u32) -> SpanId {
        self.span(&["attempt", task.as_str(), &attempt.to_string()])
    }

    /// The span of a wait of a task for its attempt: `reason` is `inputs`, `capacity` or `backoff`.
    #[must_use]
    pub fn wait(&self, task: &TaskName, attempt: u32, reason: &str) -> SpanId {
        self.span(&["wait", task.as_str(), &attempt.to_string(), reason])
    }

    /// What an attempt hands on to its worker and its commands.
    #[must_use]
    pub fn attempt_context(&self, id: &AttemptId, sampled: bool) -> TraceContext {
        TraceContext {
            trace: self.trace,
            span: self.attempt(&id.task, id.attempt),
            sampled,
        }
    }
}

/// The span of a deployment.
#[must_use]
pub fn deployment(trace: TraceId, deployment: DeploymentId) -> SpanId {
    SpanId::derive(&["deployment", &trace.to_string(), &deployment.to_string()])
}

/// The span of a phase of a deployment, by its number from 0.
#[must_use]
pub fn deployment_phase(trace: TraceId, deployment: DeploymentId, number: usize) -> SpanId {
    let (trace, deployment) = (trace.to_string(), deployment.to_string());
    SpanId::derive(&["phase", &trace, &deployment, &number.to_string()])
}

/// The trace and the span of a leader's term.
#[must_use]
pub fn term(cluster: &str, epoch: Epoch) -> (TraceId, SpanId) {
    let epoch = epoch.to_string();
    let parts = ["term", cluster, &epoch];
    (TraceId::derive(&parts), SpanId::derive(&parts))
}

/// A span id that was not there before, for what has no name of its own.
#[must_use]
pub fn fresh_span() -> SpanId {
    use std::{
        hash::{BuildHasher as _, RandomState},
        sync::atomic::{AtomicU64, Ordering},
    };
    static SEED: std::sync::LazyLock<RandomState> = std::sync::LazyLock::new(RandomState::new);
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let id = SpanId(
            SEED.hash_one(NEXT.fetch_add(1, Ordering::Relaxed))
                .to_be_bytes(),
        );
        if id.is_valid() {
            return id;
        }
    }
}

/// A trace id that was not there before, for what begins a trace and has no name of its own.
#[must_use]
pub fn fresh_trace() -> TraceId {
    let mut id = [0; 16];
    let (first, second) = id.split_at_mut(8);
    first.copy_from_slice(&fresh_span().to_bytes());
    second.copy_from_slice(&fresh_span().to_bytes());
    TraceId(id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TEXT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn run(name: &str) -> RunId {
        RunId::new(name).unwrap()
    }

    #[test]
    fn a_traceparent_reads_back_what_it_shows() {
        let context: TraceContext = TEXT.parse().unwrap();
        assert!(context.sampled);
        assert_eq!(context.to_string(), TEXT);
    }

    #[test]
    fn a_traceparent_is_told_from_other_texts() {
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0G",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        ] {
            assert!(bad.parse::<TraceContext>().is_err(), "{bad:?} was taken");
        }
        let newer = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-else";
        assert!(newer.parse::<TraceContext>().is_ok());
    }

    #[test]
    fn a_run_goes_on_in_the_trace_that_it_was_given() {
        let given = RunTrace::of(&run("r1"), TEXT);
        assert_eq!(given.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(given.parent.unwrap().to_string(), "b7ad6b7169203331");
        let own = RunTrace::of(&run("r1"), "");
        assert_eq!((own.parent, own.sampled), (None, None));
        assert_ne!(own.trace, RunTrace::of(&run("r2"), "").trace);
    }

    #[test]
    fn each_part_of_a_run_has_a_span_of_its_own() {
        let trace = RunTrace::of(&run("r1"), TEXT);
        let task = TaskName::new("train").unwrap();
        let spans = std::collections::BTreeSet::from([
            trace.root(Timestamp(1)),
            trace.root(Timestamp(2)),
            trace.attempt(&task, 1),
            trace.attempt(&task, 2),
            trace.wait(&task, 1, "inputs"),
            trace.wait(&task, 1, "capacity"),
            deployment(trace.trace, DeploymentId(1)),
            RunTrace::of(&run("r2"), TEXT).attempt(&task, 1),
            fresh_span(),
            fresh_span(),
        ]);
        assert_eq!(spans.len(), 10);
    }
}
