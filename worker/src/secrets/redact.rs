//! Taking secrets out of what an attempt says: as they are, line by line, and in the encodings that
//! programs put them into without being asked.

use std::{borrow::Cow, collections::BTreeMap, fmt, io::Read, ops::Range, sync::Arc};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use emberline_common::{ids::SecretName, telemetry::Span};
use memchr::memmem;
use opentelemetry::Value as Attribute;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::{MIN_BYTES, SHOWN, Secret};

/// Values that are looked for in outputs; a shorter one could stand there by chance.
const OUTPUT_BYTES: usize = 8;
const PIECE_BYTES: usize = 1 << 20;

/// See the module. Cheap to clone; without secrets it costs nothing.
#[derive(Clone, Default)]
pub struct Redactor(Option<Arc<Patterns>>);

struct Patterns {
    all: Vec<Zeroizing<Vec<u8>>>,
    /// The values alone, for outputs.
    plain: Vec<(SecretName, Zeroizing<Vec<u8>>)>,
    longest: usize,
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secrets = self.0.as_ref().map_or(0, |p| p.plain.len());
        write!(f, "Redactor({secrets} secrets)")
    }
}

impl Redactor {
    /// Of these secrets.
    pub(super) fn of(values: &BTreeMap<SecretName, Secret>) -> Self {
        if values.is_empty() {
            return Self(None);
        }
        let mut all = Vec::new();
        let mut plain = Vec::new();
        for (name, value) in values {
            let value = value.reveal();
            forms(value, &mut all);
            plain.push((name.clone(), Zeroizing::new(value.as_bytes().to_vec())));
        }
        all.sort_unstable_by(|a, b| a.as_slice().cmp(b.as_slice()));
        all.dedup();
        Self(Some(Arc::new(Patterns {
            longest: all.iter().map(|form| form.len()).max().unwrap_or_default(),
            all,
            plain,
        })))
    }

    /// The longest that anything can be that it takes out, in bytes.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.0.as_ref().map_or(0, |patterns| patterns.longest)
    }

    /// The text without secrets.
    #[must_use]
    pub fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let found = self.ranges(text.as_bytes());
        if found.is_empty() {
            return Cow::Borrowed(text);
        }
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        for range in found {
            // What is found is text within text: it begins and ends with a character.
            out.push_str(text.get(at..range.start).unwrap_or_default());
            out.push_str(SHOWN);
            at = range.end;
        }
        out.push_str(text.get(at..).unwrap_or_default());
        Cow::Owned(out)
    }

    /// The text without secrets, in its place.
    pub fn string(&self, text: &mut String) {
        if let Cow::Owned(without) = self.text(text) {
            *text = without;
        }
    }

    /// Where bytes can be parted without parting a secret: `at`, or the end of one that lies across
    /// it. Of what comes after `at` there must be [`longest`](Self::longest) bytes, or all.
    #[must_use]
    pub fn cut(&self, bytes: &[u8], at: usize) -> usize {
        let across = |range: &Range<usize>| range.start < at && at < range.end;
        let found = self.ranges(bytes).into_iter().find(across);
        found.map_or(at, |range| range.end)
    }

    /// An object without secrets: in names and in values.
    #[must_use]
    pub fn object(&self, object: Map<String, Value>) -> Map<String, Value> {
        if self.0.is_none() {
            return object;
        }
        let entries = object.into_iter();
        entries
            .map(|(name, value)| (self.text(&name).into_owned(), self.value(value)))
            .collect()
    }

    fn value(&self, value: Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(&text).into_owned()),
            Value::Object(object) => Value::Object(self.object(object)),
            Value::Array(items) => items.into_iter().map(|item| self.value(item)).collect(),
            Value::Number(number) => match self.text(&number.to_string()) {
                Cow::Borrowed(_) => Value::Number(number),
                Cow::Owned(text) => Value::String(text),
            },
            other => other,
        }
    }

    /// A span without secrets.
    pub(crate) fn span(&self, span: &mut Span) {
        if self.0.is_none() {
            return;
        }
        self.string(&mut span.name);
        if let Some(error) = &mut span.error {
            self.string(error);
        }
        let events = span.events.iter_mut().flat_map(|e| &mut e.attributes);
        for attribute in span.attributes.iter_mut().chain(events) {
            if let Cow::Owned(text) = self.text(&attribute.value.as_str()) {
                attribute.value = Attribute::from(text);
            }
        }
    }

    /// The secret whose value stands in this text, if one does: for names and metadata of outputs.
    #[must_use]
    pub fn find(&self, text: &str) -> Option<&SecretName> {
        let patterns = self.0.as_ref()?;
        let mut plain = patterns.plain.iter();
        let found = plain.find(|(_, value)| memmem::find(text.as_bytes(), value).is_some());
        found.map(|(name, _)| name)
    }

    /// The secret whose value stands in these bytes, if one does. Short values are not looked for.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn find_in(&self, mut from: impl Read) -> std::io::Result<Option<SecretName>> {
        let Some(patterns) = &self.0 else {
            return Ok(None);
        };
        let sought = || (patterns.plain.iter()).filter(|(_, value)| value.len() >= OUTPUT_BYTES);
        let Some(longest) = sought().map(|(_, value)| value.len()).max() else {
            return Ok(None);
        };
        let mut piece = vec![0; PIECE_BYTES + longest];
        let mut filled = 0;
        loop {
            let read = from.read(&mut piece[filled..])?;
            let looked = &piece[..filled + read];
            for (name, value) in sought() {
                if memmem::find(looked, value).is_some() {
                    return Ok(Some(name.clone()));
                }
            }
            if read == 0 {
                return Ok(None);
            }
            // What could be the beginning of one is looked at once more.
            let kept = looked.len().min(longest - 1);
            let from = looked.len() - kept;
            piece.copy_within(from..from + kept, 0);
            filled = kept;
        }
    }

    /// Whether there is anything to look for in outputs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Where secrets stand, from the beginning, those that touch as one.
    fn ranges(&self, bytes: &[u8]) -> Vec<Range<usize>> {
        let Some(patterns) = &self.0 else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for pattern in &patterns.all {
            let mut from = 0;
            while let Some(at) = memmem::find(&bytes[from..], pattern) {
                found.push(from + at..from + at + pattern.len());
                // Also those that overlap.
                from += at + 1;
            }
        }
        found.sort_unstable_by_key(|range| (range.start, range.end));
        let mut merged: Vec<Range<usize>> = Vec::with_capacity(found.len());
        for range in found {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        merged
    }
}

/// Every form of a value that is taken out.
fn forms(value: &str, all: &mut Vec<Zeroizing<Vec<u8>>>) {
    let mut add = |form: String| {
        let form = Zeroizing::new(form.into_bytes());
        if form.len() >= MIN_BYTES {
            all.push(form);
        }
    };
    add(value.to_owned());
    // A log has lines, so one that has several is never seen whole.
    for line in value.lines().map(str::trim) {
        add(line.to_owned());
    }
    for escaped in [json(value, false), json(value, true)] {
        add(escaped);
    }
    for hex in ["0123456789ABCDEF", "0123456789abcdef"] {
        // As a component; in a path; in a form.
        add(percent(value, hex, "", "%20"));
        add(percent(value, hex, "/", "%20"));
        add(percent(value, hex, "", "+"));
        add(value.bytes().flat_map(|byte| digits(byte, hex)).collect());
    }
    for before in 0..3 {
        // In the middle of something else that is encoded: `user:secret`, say. What of it depends on
        // its neighbours is left out.
        let mut bytes = Zeroizing::new(vec![0; before]);
        bytes.extend_from_slice(value.as_bytes());
        let skipped = [0, 2, 3][before];
        let cut = usize::from(bytes.len() % 3 != 0);
        for encoded in [
            STANDARD_NO_PAD.encode(&*bytes),
            URL_SAFE_NO_PAD.encode(&*bytes),
        ] {
            let encoded = Zeroizing::new(encoded);
            let whole = encoded.get(skipped..encoded.len() - cut);
            add(whole.unwrap_or_default().to_owned());
        }
    }
}

fn digits(byte: u8, hex: &str) -> [char; 2] {
    let digit = |at: u8| char::from(hex.as_bytes()[usize::from(at)]);
    [digit(byte >> 4), digit(byte & 15)]
}

fn percent(value: &str, hex: &str, safe: &str, space: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b' ' => out.push_str(space),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(byte.into());
            }
            other if safe.as_bytes().contains(&other) => out.push(other.into()),
            other => {
                out.push('%');
                out.extend(digits(other, hex));
            }
        }
    }
    out
}

/// As it stands within the quotes of JSON, with or without characters beyond ASCII.
fn json(value: &str, ascii: bool) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c < ' ' || (ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use emberline_common::{
        time::Timestamp,
        trace::{RunTrace, fresh_span},
    };
    use opentelemetry::KeyValue;
    use serde_json::json;

    use super::*;

    fn redactor(values: &[&str]) -> Redactor {
        let values = values.iter().enumerate().map(|(n, value)| {
            let value = Secret::new(Zeroizing::new((*value).to_owned())).unwrap();
            (format!("s{n}").parse().unwrap(), value)
        });
        Redactor::of(&values.collect())
    }

    const VALUE: &str = "pl+nt/ed \"cänary\"?";

    #[test]
    fn a_secret_is_taken_out_as_it_is_and_in_every_common_encoding() {
        let redactor = redactor(&[VALUE]);
        let encoded = [
            VALUE.to_owned(),
            serde_json::to_string(VALUE).unwrap(),
            r#""pl+nt/ed \"c\u00e4nary\"?""#.to_owned(),
            "pl%2Bnt%2Fed%20%22c%C3%A4nary%22%3F".to_owned(),
            "pl%2bnt%2fed%20%22c%c3%a4nary%22%3f".to_owned(),
            "pl%2Bnt/ed%20%22c%C3%A4nary%22%3F".to_owned(),
            "pl%2Bnt%2Fed+%22c%C3%A4nary%22%3F".to_owned(),
            "706c2b6e742f6564202263c3a46e617279223f".to_owned(),
            STANDARD_NO_PAD.encode(VALUE),
            URL_SAFE_NO_PAD.encode(VALUE),
        ];
        for text in encoded {
            let shown = redactor.text(&text).into_owned();
            let left = shown.replace("***", "").replace('"', "");
            assert!(shown.contains("***") && left.len() <= 1, "{text}: {shown}");
        }
    }

    #[test]
    fn a_secret_in_the_middle_of_something_encoded_is_taken_out_wherever_it_begins() {
        let redactor = redactor(&["planted-canary"]);
        for user in ["", "a", "ab", "abc", "abcd"] {
            for after in ["", "x", "xy", "xyz"] {
                let text = STANDARD_NO_PAD.encode(format!("{user}planted-canary{after}"));
                let shown = redactor.text(&text).into_owned();
                let left = STANDARD_NO_PAD.encode(format!("{user}{after}")).len();
                assert!(shown.contains("***"), "{text}");
                assert!(shown.len() <= left + 3 + 4, "{text}: {shown}");
            }
        }
    }

    #[test]
    fn each_line_of_one_with_several_is_taken_out_but_for_those_that_say_nothing() {
        let redactor = redactor(&["{\n  \"key\": \"first-part\",\n}\nlast-line"]);
        assert_eq!(redactor.text("  \"key\": \"first-part\","), "  ***");
        assert_eq!(redactor.text("last-line"), "***");
        assert_eq!(redactor.text("{}"), "{}");
    }

    #[test]
    fn several_that_touch_or_overlap_leave_nothing_of_themselves() {
        let redactor = redactor(&["canary-one", "one-two", "aaaa"]);
        assert_eq!(redactor.text("x canary-one-two y"), "x *** y");
        assert_eq!(redactor.text("aaaaaaa"), "***");
        assert_eq!(redactor.text("ä canary-one ö"), "ä *** ö");
        assert_eq!(Redactor::default().text("canary-one"), "canary-one");
    }

    #[test]
    fn bytes_are_never_parted_within_a_secret() {
        let redactor = redactor(&["canary"]);
        let bytes = b"0123canary9";
        assert_eq!(redactor.cut(bytes, 4), 4);
        for at in 5..10 {
            assert_eq!(redactor.cut(bytes, at), 10);
        }
        assert_eq!(redactor.cut(bytes, 10), 10);
    }

    #[test]
    fn results_lose_them_in_names_texts_and_numbers() {
        let redactor = redactor(&["canary", "12345678"]);
        let Value::Object(results) = json!({
            "a canary": ["x", {"y": "canary!"}], "pin": 12_345_678, "n": 3, "ok": true,
        }) else {
            unreachable!("an object")
        };
        let shown = Value::Object(redactor.object(results));
        let expected = json!({
            "a ***": ["x", {"y": "***!"}], "pin": "***", "n": 3, "ok": true,
        });
        assert_eq!(shown, expected);
    }

    #[test]
    fn spans_lose_them_in_names_attributes_events_and_errors() {
        let redactor = redactor(&["canary"]);
        let now = Timestamp::now();
        let trace = RunTrace::of(&"r".parse().unwrap(), "").trace;
        let mut span = Span::new(trace, fresh_span(), None, "canary", now, now);
        span.attributes = vec![KeyValue::new("a", "x canary"), KeyValue::new("n", 3)];
        span.error = Some("no canary".to_owned());
        span.events.push(emberline_common::telemetry::SpanEvent {
            name: "e",
            at: now,
            attributes: vec![KeyValue::new("b", "canary")],
        });
        redactor.span(&mut span);
        let shown = format!("{span:?}");
        assert!(!shown.contains("canary"), "{shown}");
        assert_eq!(span.attributes[1].value, Attribute::I64(3));
    }

    #[test]
    fn a_value_is_found_in_bytes_across_pieces() {
        let redactor = redactor(&["planted-canary", "tiny"]);
        let mut bytes = vec![b'x'; 3 * PIECE_BYTES];
        assert_eq!(redactor.find_in(bytes.as_slice()).unwrap(), None);
        for at in [0, PIECE_BYTES - 5, PIECE_BYTES + 9, bytes.len() - 14] {
            let mut with = bytes.clone();
            with[at..at + 14].copy_from_slice(b"planted-canary");
            let found = redactor.find_in(with.as_slice()).unwrap();
            assert_eq!(found.unwrap().as_str(), "s0", "{at}");
        }
        bytes[..4].copy_from_slice(b"tiny");
        assert_eq!(redactor.find_in(bytes.as_slice()).unwrap(), None);
        assert_eq!(redactor.find("dir/tiny").unwrap().as_str(), "s1");
    }
}
