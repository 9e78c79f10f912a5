//! What the environment says about telemetry: the variables of the OpenTelemetry specification
//! (<https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>).

use std::time::Duration;

use thiserror::Error;

use crate::trace::TraceId;

/// A variable that says nothing that can be meant.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{variable} is `{value}`: {rule}")]
pub struct WrongVariable {
    /// Its name.
    pub variable: String,
    /// What it says.
    pub value: String,
    /// What it could say.
    pub rule: &'static str,
}

/// Which traces are exported.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Whether what the caller has decided counts.
    by_parent: bool,
    /// Of the traces that nobody has decided on: those whose id is below this, as the
    /// specification's `TraceIdRatioBased`.
    below: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            by_parent: true,
            below: u64::MAX,
        }
    }
}

impl Sampling {
    /// Whether a trace is exported. The same in every process with the same setting.
    #[must_use]
    pub fn takes(&self, trace: TraceId, decided: Option<bool>) -> bool {
        match decided {
            Some(decided) if self.by_parent => decided,
            _ => {
                let [.., a, b, c, d, e, f, g, h] = trace.to_bytes();
                let low = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1;
                self.below == u64::MAX || low < self.below
            }
        }
    }

    fn of(name: &str, argument: Option<&str>) -> Result<Self, WrongVariable> {
        let wrong = |variable: &str, value: &str, rule| WrongVariable {
            variable: variable.to_owned(),
            value: value.to_owned(),
            rule,
        };
        let by_parent = name.starts_with("parentbased_");
        let ratio = match name.trim_start_matches("parentbased_") {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => {
                let text = argument.unwrap_or("1");
                let ratio = text.parse::<f64>().ok();
                let ratio = ratio.filter(|ratio| (0.0..=1.0).contains(ratio));
                ratio.ok_or_else(|| {
                    wrong(
                        "OTEL_TRACES_SAMPLER_ARG",
                        text,
                        "write a number from 0 to 1",
                    )
                })?
            }
            _ => {
                return Err(wrong(
                    "OTEL_TRACES_SAMPLER",
                    name,
                    "use always_on, always_off or traceidratio, each also as parentbased_…",
                ));
            }
        };
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a ratio from 0 to 1 of 2^63"
        )]
        let below = if ratio >= 1.0 {
            u64::MAX
        } else {
            (ratio * (1_u64 << 63) as f64) as u64
        };
        Ok(Self { by_parent, below })
    }
}

/// How items leave: how many wait at most, how many go together, and how long they wait for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Batching {
    pub queue: usize,
    pub batch: usize,
    pub delay: Duration,
    pub timeout: Duration,
}

/// All that the environment says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    pub traces: bool,
    pub metrics: bool,
    pub logs: bool,
    pub sampling: Sampling,
    pub spans: Batching,
    pub records: Batching,
    /// None where every address is an `http` one.
    pub tls: Option<Tls>,
}

/// How a collector at an `https` address is known, and how it knows us. All of it is PEM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Tls {
    /// Who vouches for it; without it, whoever this machine trusts.
    pub ca: Option<Vec<u8>>,
    /// Our certificate and its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Tls {
    fn of(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, WrongVariable> {
        const CERTIFICATE: &str = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
        const KEY: &str = "OTEL_EXPORTER_OTLP_CLIENT_KEY";
        let file = |name: &str| {
            let Some(path) = get(name) else {
                return Ok(None);
            };
            std::fs::read(&path).map(Some).map_err(|_| WrongVariable {
                variable: name.to_owned(),
                value: path,
                rule: "name a PEM file that can be read",
            })
        };
        let identity = match (file(CERTIFICATE)?, file(KEY)?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (certificate, _) => {
                let (there, missing) = match certificate {
                    Some(_) => (
                        CERTIFICATE,
                        "OTEL_EXPORTER_OTLP_CLIENT_KEY has to be set, too",
                    ),
                    None => (
                        KEY,
                        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE has to be set, too",
                    ),
                };
                return Err(WrongVariable {
                    variable: there.to_owned(),
                    value: get(there).unwrap_or_default(),
                    rule: missing,
                });
            }
        };
        Ok(Self {
            ca: file("OTEL_EXPORTER_OTLP_CERTIFICATE")?,
            identity,
        })
    }
}

impl Settings {
    /// Reads it.
    ///
    /// # Errors
    /// The first variable that says nothing that can be meant.
    pub fn of(get: &dyn Fn(&str) -> Option<String>) -> Result<Self, WrongVariable> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let number = |name: &str, default: u64| match get(name) {
            None => Ok(default),
            Some(text) => {
                let number = text
                    .parse::<u64>()
                    .ok()
                    .filter(|n| (1..=1 << 24).contains(n));
                number.ok_or(WrongVariable {
                    variable: name.to_owned(),
                    value: text,
                    rule: "write a whole number from 1 to 16777216",
                })
            }
        };
        let off = get("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"));
        let signal = |name: &str| {
            let names = [
                format!("OTEL_EXPORTER_OTLP_{name}_ENDPOINT"),
                "OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(),
            ];
            let exporter = format!("OTEL_{name}_EXPORTER");
            match get(&exporter).as_deref() {
                None | Some("otlp") => {}
                Some("none") => return Ok(false),
                Some(other) => {
                    return Err(WrongVariable {
                        variable: exporter,
                        value: other.to_owned(),
                        rule: "use otlp or none",
                    });
                }
            }
            for name in names {
                let Some(value) = get(&name) else { continue };
                let is_url = url::Url::parse(&value)
                    .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
                if !is_url {
                    return Err(WrongVariable {
                        variable: name,
                        value,
                        rule: "write the collector's gRPC address, e.g. http://localhost:4317",
                    });
                }
                return Ok(!off);
            }
            Ok(false)
        };
        if let Some(protocol) = get("OTEL_EXPORTER_OTLP_PROTOCOL").filter(|p| p != "grpc") {
            return Err(WrongVariable {
                variable: "OTEL_EXPORTER_OTLP_PROTOCOL".to_owned(),
                value: protocol,
                rule: "only grpc is spoken",
            });
        }
        let batching = |prefix: &str, queue: u64| -> Result<Batching, WrongVariable> {
            let number = |name: &str, default| number(&format!("OTEL_{prefix}_{name}"), default);
            let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
            Ok(Batching {
                queue: size(number("MAX_QUEUE_SIZE", queue)?),
                batch: size(number("MAX_EXPORT_BATCH_SIZE", 512)?),
                delay: Duration::from_millis(number("SCHEDULE_DELAY", 1000)?),
                timeout: Duration::from_millis(number("EXPORT_TIMEOUT", 10_000)?),
            })
        };
        let tls = Tls::of(&get)?;
        let is_secure = ["", "TRACES_", "METRICS_", "LOGS_"].iter().any(|signal| {
            let endpoint = get(&format!("OTEL_EXPORTER_OTLP_{signal}ENDPOINT"));
            endpoint.is_some_and(|url| url.starts_with("https:"))
        });
        let sampler = get("OTEL_TRACES_SAMPLER");
        let sampler = sampler.as_deref().unwrap_or("parentbased_always_on");
        Ok(Self {
            traces: signal("TRACES")?,
            metrics: signal("METRICS")?,
            logs: signal("LOGS")?,
            sampling: Sampling::of(sampler, get("OTEL_TRACES_SAMPLER_ARG").as_deref())?,
            spans: batching("BSP", 8_192)?,
            records: batching("BLRP", 8_192)?,
            tls: is_secure.then_some(tls),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, WrongVariable> {
        Settings::of(&|name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_an_endpoint_nothing_is_exported() {
        let settings = settings(&[]).unwrap();
        assert!(!settings.traces && !settings.metrics && !settings.logs);
    }

    #[test]
    fn a_signal_can_be_turned_off_or_sent_elsewhere() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317");
        let some = settings(&[endpoint, ("OTEL_LOGS_EXPORTER", "none")]).unwrap();
        assert!(some.traces && some.metrics && !some.logs);
        let own = (
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "http://localhost:4317",
        );
        let some = settings(&[own]).unwrap();
        assert!(some.traces && !some.metrics && !some.logs);
        let none = settings(&[endpoint, ("OTEL_SDK_DISABLED", "true")]).unwrap();
        assert!(!none.traces && !none.metrics && !none.logs);
    }

    #[test]
    fn what_cannot_be_meant_is_one_line_with_its_name() {
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/none/ca.pem"),
        ] {
            let wrong = settings(&[(name, value)]).unwrap_err().to_string();
            assert!(
                wrong.starts_with(&format!("{name} is `{value}`: ")),
                "{wrong}"
            );
        }
        let half = settings(&[("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/dev/null")]).unwrap_err();
        assert!(half.to_string().ends_with("has to be set, too"), "{half}");
        let ratio = [
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "2"),
        ];
        assert!(settings(&ratio).is_err());
    }

    #[test]
    fn a_ratio_takes_that_part_of_all_traces_and_the_same_ones_always() {
        let sampling = Sampling::of("traceidratio", Some("0.25")).unwrap();
        let traces = (0..4000).map(|n| {
            let run = crate::ids::RunId::new(format!("r{n}")).unwrap();
            crate::trace::RunTrace::of(&run, "").trace
        });
        let taken = traces
            .filter(|trace| sampling.takes(*trace, Some(false)))
            .count();
        assert!((850..1150).contains(&taken), "{taken} of 4000");
    }

    #[test]
    fn whoever_began_a_trace_decides_unless_told_otherwise() {
        let trace: TraceId = "0af7651916cd43dd8448eb211c80319c".parse().unwrap();
        let by_parent = Sampling::default();
        assert!(by_parent.takes(trace, None) && by_parent.takes(trace, Some(true)));
        assert!(!by_parent.takes(trace, Some(false)));
        assert!(
            Sampling::of("always_on", None)
                .unwrap()
                .takes(trace, Some(false))
        );
        let off = Sampling::of("parentbased_always_off", None).unwrap();
        assert!(!off.takes(trace, None) && off.takes(trace, Some(true)));
    }
}
