//! The text format of Prometheus, read strictly: what a scraper would stumble over, or would take
//! for something else, is a mistake.
//!
//! Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use std::collections::{BTreeMap, BTreeSet};

use crate::otlp::MetricKind;

/// All samples of one name.
#[derive(Debug, Clone, Default)]
pub struct Family {
    /// `counter`, `gauge`, `histogram` or `summary`.
    pub kind: String,
    /// Each sample.
    pub samples: Vec<Sample>,
}

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its name: the family's, for a histogram with an ending.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// What a metric of OpenTelemetry is called there.
#[must_use]
pub fn family(name: &str, unit: &str, kind: MetricKind) -> String {
    let mut out = name.replace('.', "_");
    let unit = match unit {
        "s" => "_seconds",
        "By" => "_bytes",
        "1" => "_ratio",
        unit if unit.ends_with("}/s") => "_per_second",
        unit if unit.ends_with("}/d") => "_per_day",
        _ => "",
    };
    if !out.ends_with(unit) {
        out += unit;
    }
    if kind == MetricKind::Counter {
        out += "_total";
    }
    out
}

fn is_name(text: &str, more: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || more.contains(c);
    !text.is_empty() && text.chars().all(fits) && !text.starts_with(|c: char| c.is_ascii_digit())
}

fn value(text: &str) -> f64 {
    match text {
        "+Inf" => f64::INFINITY,
        "-Inf" => f64::NEG_INFINITY,
        _ => text
            .parse()
            .unwrap_or_else(|_| panic!("`{text}` is no value")),
    }
}

/// The labels in braces at the beginning of a text, and what follows.
fn labels(mut text: &str) -> (BTreeMap<String, String>, &str) {
    let mut out = BTreeMap::new();
    let Some(inner) = text.strip_prefix('{') else {
        return (out, text);
    };
    text = inner;
    while !text.starts_with('}') {
        let (name, rest) = text.split_once("=\"").expect("a label");
        assert!(is_name(name, ""), "`{name}` is no label");
        let (mut value, mut escaped, mut end) = (String::new(), false, None);
        for (at, c) in rest.char_indices() {
            match (escaped, c) {
                (false, '\\') => escaped = true,
                (false, '"') => {
                    end = Some(at + 1);
                    break;
                }
                (true, 'n') => (value, escaped) = (value + "\n", false),
                (true, c) => {
                    assert!("\\\"".contains(c), "`\\{c}` is no escape");
                    (value, escaped) = (value + &c.to_string(), false);
                }
                (false, c) => value.push(c),
            }
        }
        let before = out.insert(name.to_owned(), value);
        assert!(before.is_none(), "the label `{name}` is there twice");
        text = &rest[end.expect("the label's end")..];
        text = text.strip_prefix(',').unwrap_or(text);
    }
    (out, &text[1..])
}

/// Reads a page, and checks it.
///
/// # Panics
/// If it breaks a rule of the format.
#[must_use]
pub fn check(page: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let (mut told, mut helped) = (String::new(), BTreeSet::new());
    assert!(
        page.is_empty() || page.ends_with('\n'),
        "the last line has no end"
    );
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').unwrap_or((help, ""));
            assert!(!text.trim().is_empty(), "`{name}` says nothing of itself");
            assert!(helped.insert(name.to_owned()), "`{name}` has two helps");
        } else if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, kind) = of.split_once(' ').expect("a type");
            assert!(is_name(name, ":"), "`{name}` is no name");
            assert!(
                ["counter", "gauge", "histogram", "summary"].contains(&kind),
                "{line}"
            );
            let family = Family {
                kind: kind.to_owned(),
                samples: Vec::new(),
            };
            let before = families.insert(name.to_owned(), family);
            assert!(before.is_none(), "`{name}` is told twice");
            name.clone_into(&mut told);
        } else if !line.is_empty() && !line.starts_with('#') {
            let end = line.find(['{', ' ']).unwrap_or_else(|| panic!("{line}"));
            let (labels, rest) = labels(&line[end..]);
            let mut rest = rest.split_whitespace();
            let sample = Sample {
                name: line[..end].to_owned(),
                labels,
                value: value(rest.next().unwrap_or_else(|| panic!("{line}"))),
            };
            let family = families.get_mut(&told).unwrap_or_else(|| panic!("{line}"));
            let ending = sample
                .name
                .strip_prefix(&told)
                .expect("a name of its family");
            let fits = match family.kind.as_str() {
                "histogram" => ["_bucket", "_sum", "_count"].contains(&ending),
                _ => ending.is_empty(),
            };
            assert!(fits, "`{}` is no sample of `{told}`", sample.name);
            let mut others = family.samples.iter();
            let twice = others.any(|s| (&s.name, &s.labels) == (&sample.name, &sample.labels));
            assert!(!twice, "{line} is there twice");
            family.samples.push(sample);
        }
    }
    for (name, family) in &families {
        assert!(helped.contains(name), "`{name}` has no help");
        family.check(name);
    }
    families
}

impl Family {
    fn check(&self, name: &str) {
        if self.kind == "counter" {
            assert!(
                name.ends_with("_total"),
                "the counter `{name}` has no `_total`"
            );
            assert!(self.samples.iter().all(|s| s.value >= 0.0), "{self:#?}");
        }
        if self.kind != "histogram" {
            return;
        }
        // Buckets are cumulative, and the last one is all.
        let mut last: BTreeMap<BTreeMap<String, String>, (f64, f64)> = BTreeMap::new();
        for bucket in self.samples.iter().filter(|s| s.name.ends_with("_bucket")) {
            let mut labels = bucket.labels.clone();
            let until = value(&labels.remove("le").expect("a bucket's end"));
            let before = last.insert(labels, (until, bucket.value));
            let (end, count) = before.unwrap_or((f64::NEG_INFINITY, 0.0));
            assert!(until > end && bucket.value >= count, "{bucket:?}");
        }
        for count in self.samples.iter().filter(|s| s.name.ends_with("_count")) {
            assert_eq!(
                last.get(&count.labels),
                Some(&(f64::INFINITY, count.value)),
                "{name}"
            );
        }
    }

    /// The sum of the samples that have these labels and perhaps others.
    #[must_use]
    pub fn total(&self, with: &[(&str, &str)]) -> f64 {
        let has = |sample: &&Sample| {
            with.iter()
                .all(|(name, value)| sample.labels.get(*name).is_some_and(|v| v == value))
        };
        self.samples.iter().filter(has).map(|s| s.value).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# HELP a_total Things.
# TYPE a_total counter
a_total{x=\"1\",y=\"a \\\"b\\\" \\\\ \\n\"} 2
a_total{x=\"2\"} 3
# HELP b_seconds Times.
# TYPE b_seconds histogram
b_seconds_bucket{le=\"0.1\"} 1
b_seconds_bucket{le=\"+Inf\"} 2
b_seconds_sum 0.7
b_seconds_count 2
";

    #[test]
    fn a_page_is_read() {
        let families = check(PAGE);
        let a = &families["a_total"];
        assert!((a.total(&[]) - 5.0).abs() < 1e-9);
        assert!((a.total(&[("x", "2")]) - 3.0).abs() < 1e-9);
        assert_eq!(a.samples[0].labels["y"], "a \"b\" \\ \n");
        assert_eq!(families["b_seconds"].samples.len(), 4);
    }

    #[test]
    fn what_breaks_the_format_is_seen() {
        for (good, bad) in [
            ("# TYPE a_total counter", "# TYPE a_total number"),
            ("# HELP a_total Things.\n", ""),
            ("a_total{x=\"2\"} 3", "a_total{x=\"2\"} x"),
            ("a_total{x=\"2\"} 3", "c_total{x=\"2\"} 3"),
            (
                "a_total{x=\"2\"} 3",
                "a_total{x=\"2\"} 3\na_total{x=\"2\"} 4",
            ),
            ("a_total{x=\"2\"} 3", "a_total{x=\"2\"} -3"),
            ("le=\"+Inf\"} 2", "le=\"+Inf\"} 0"),
            ("b_seconds_count 2", "b_seconds_count 3"),
        ] {
            let page = PAGE.replace(good, bad);
            assert_ne!(page, PAGE);
            let read = std::panic::catch_unwind(|| check(&page));
            assert!(read.is_err(), "{bad:?} was not seen");
        }
    }

    #[test]
    fn a_metric_of_opentelemetry_has_its_name_there() {
        let name = |name, unit, kind| family(name, unit, kind);
        assert_eq!(name("a.b", "s", MetricKind::Histogram), "a_b_seconds");
        assert_eq!(name("a.bytes", "By", MetricKind::Counter), "a_bytes_total");
        assert_eq!(name("a.b", "{run}", MetricKind::Gauge), "a_b");
    }
}
