//! YAML with positions: the subset that a pipeline file may use.
//!
//! Hostile files end here, cheaply: the size is looked at first, and aliases, anchors, merge keys and
//! tags are refused, so that no text can grow beyond its own length.

use std::collections::HashMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};
use serde_json::{Number, Value};

/// The largest pipeline file, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
const MAX_DEPTH: usize = 64;
const MAX_PROBLEMS: usize = 100;

/// A place in the text: line and column from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Where.
    pub at: Position,
    /// What.
    pub value: NodeValue,
}

/// What stands at a place.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeValue {
    /// Null, a boolean, a number or a text.
    Scalar(Value),
    /// A list.
    List(Vec<Node>),
    /// Keys (with their places) and values, in the order of the file.
    Map(Vec<(String, Position, Node)>),
}

impl Node {
    /// As plain JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match &self.value {
            NodeValue::Scalar(value) => value.clone(),
            NodeValue::List(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            NodeValue::Map(entries) => Value::Object(
                entries
                    .iter()
                    .map(|(k, _, v)| (k.clone(), v.to_json()))
                    .collect(),
            ),
        }
    }

    /// From plain JSON; everything stands at one place.
    #[must_use]
    pub fn from_json(value: &Value, at: Position) -> Self {
        let value = match value {
            Value::Array(items) => {
                NodeValue::List(items.iter().map(|v| Self::from_json(v, at)).collect())
            }
            Value::Object(map) => NodeValue::Map(
                map.iter()
                    .map(|(k, v)| (k.clone(), at, Self::from_json(v, at)))
                    .collect(),
            ),
            scalar => NodeValue::Scalar(scalar.clone()),
        };
        Self { at, value }
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            NodeValue::Map(entries) => entries.iter().find(|(k, ..)| k == key).map(|(.., v)| v),
            _ => None,
        }
    }

    /// The entries of a map; none for anything else.
    #[must_use]
    pub fn entries(&self) -> &[(String, Position, Self)] {
        match &self.value {
            NodeValue::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The items of a list; none for anything else.
    #[must_use]
    pub fn items(&self) -> &[Self] {
        match &self.value {
            NodeValue::List(items) => items,
            _ => &[],
        }
    }

    /// The text, if it is one.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            NodeValue::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// Where the deepest part of the path that is there stands.
    #[must_use]
    pub fn place(&self, path: &[&str]) -> Position {
        let mut node = self;
        for part in path {
            let next = match &node.value {
                NodeValue::List(items) => part.parse::<usize>().ok().and_then(|i| items.get(i)),
                _ => node.get(part),
            };
            match next {
                Some(next) => node = next,
                None => break,
            }
        }
        node.at
    }
}

/// Something that is wrong with the text itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct YamlProblem {
    /// Where.
    pub at: Position,
    /// What, in one line.
    pub message: String,
}

fn position(marker: Marker) -> Position {
    let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).max(1);
    Position {
        line: clamp(marker.line()),
        column: clamp(marker.col() + 1),
    }
}

/// What a text has in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Its value, unless something in it has none: a mistake of grammar, an alias, a bad number.
    pub root: Option<Node>,
    /// Everything that is wrong with the text itself.
    pub problems: Vec<YamlProblem>,
}

/// Reads one document. After a mistake of grammar nothing more can be read.
#[must_use]
pub fn parse(text: &str) -> Document {
    let start = Position { line: 1, column: 1 };
    if text.len() > MAX_BYTES {
        let message = format!(
            "the file has {} bytes; at most {MAX_BYTES} are read",
            text.len()
        );
        let problems = vec![YamlProblem { at: start, message }];
        return Document {
            root: None,
            problems,
        };
    }
    let mut reader = Reader {
        parser: Parser::new_from_str(text),
        problems: Vec::new(),
        has_gaps: false,
    };
    let root = match reader.document() {
        Ok(root) => Some(root),
        Err(problem) => {
            reader.problems.push(problem);
            None
        }
    };
    Document {
        root: root.filter(|_| !reader.has_gaps),
        problems: reader.problems,
    }
}

struct Reader<'a> {
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    problems: Vec<YamlProblem>,
    /// Whether some value could not be read.
    has_gaps: bool,
}

/// A collection that is being read.
enum Open {
    List(Position, Vec<Node>),
    Map {
        at: Position,
        entries: Vec<(String, Position, Node)>,
        /// The line of each key.
        lines: HashMap<String, u32>,
        /// The key whose value comes next.
        key: Option<(String, Position)>,
    },
}

impl Reader<'_> {
    fn next(&mut self) -> Result<(Event<'_>, Position), YamlProblem> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => Ok((event, position(span.start))),
            Some(Err(e)) => {
                let message = format!("this is no YAML: {}", e.info());
                Err(YamlProblem {
                    at: position(*e.marker()),
                    message,
                })
            }
            None => Ok((Event::StreamEnd, Position { line: 1, column: 1 })),
        }
    }

    fn note(&mut self, at: Position, message: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(YamlProblem {
                at,
                message: message.into(),
            });
        }
    }

    fn refuse_extras(&mut self, at: Position, anchor: usize, tagged: bool) {
        if anchor != 0 {
            self.note(
                at,
                "anchors (`&name`) are not allowed: write the value out, or use a parameter",
            );
        }
        if tagged {
            self.note(at, "tags (`!name`) are not allowed");
        }
    }

    /// A loop, not a recursion: depth is bounded by a number and not by the stack.
    fn document(&mut self) -> Result<Node, YamlProblem> {
        let mut open: Vec<Open> = Vec::new();
        let mut root: Option<Node> = None;
        loop {
            let (event, at) = self.next()?;
            let node = match event {
                Event::Nothing | Event::StreamStart | Event::DocumentEnd => continue,
                Event::DocumentStart(_) => {
                    if root.is_some() {
                        let message = "a second document begins here: one file has one pipeline";
                        return Err(YamlProblem {
                            at,
                            message: message.to_owned(),
                        });
                    }
                    continue;
                }
                Event::StreamEnd => break,
                Event::Alias(_) => {
                    self.has_gaps = true;
                    self.note(at, "aliases (`*name`) are not allowed: write the value out, or use a parameter");
                    Node {
                        at,
                        value: NodeValue::Scalar(Value::Null),
                    }
                }
                Event::Scalar(text, style, anchor, tag) => {
                    let (text, tagged) = (text.into_owned(), tag.is_some());
                    let plain = matches!(style, ScalarStyle::Plain);
                    self.refuse_extras(at, anchor, tagged);
                    if let Some(Open::Map {
                        key: key @ None, ..
                    }) = open.last_mut()
                    {
                        *key = Some((text, at));
                        continue;
                    }
                    let value = if plain {
                        plain_scalar(&text)
                    } else {
                        Ok(Value::String(text))
                    };
                    let value = value.unwrap_or_else(|message| {
                        self.has_gaps = true;
                        self.note(at, message);
                        Value::Null
                    });
                    Node {
                        at,
                        value: NodeValue::Scalar(value),
                    }
                }
                Event::SequenceStart(anchor, tag) => {
                    let tagged = tag.is_some();
                    self.refuse_extras(at, anchor, tagged);
                    Self::check_depth(&open, at)?;
                    open.push(Open::List(at, Vec::new()));
                    continue;
                }
                Event::MappingStart(anchor, tag) => {
                    let tagged = tag.is_some();
                    self.refuse_extras(at, anchor, tagged);
                    Self::check_depth(&open, at)?;
                    open.push(Open::Map {
                        at,
                        entries: Vec::new(),
                        lines: HashMap::new(),
                        key: None,
                    });
                    continue;
                }
                Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                    Some(Open::List(at, items)) => Node {
                        at,
                        value: NodeValue::List(items),
                    },
                    Some(Open::Map { at, entries, .. }) => Node {
                        at,
                        value: NodeValue::Map(entries),
                    },
                    None => continue,
                },
            };
            match open.last_mut() {
                None => root = Some(node),
                Some(Open::List(_, items)) => items.push(node),
                Some(Open::Map { key: None, .. }) => {
                    let message = "a key must be a plain text".to_owned();
                    return Err(YamlProblem {
                        at: node.at,
                        message,
                    });
                }
                Some(Open::Map {
                    entries,
                    lines,
                    key,
                    ..
                }) => {
                    let Some((key, key_at)) = key.take() else {
                        continue;
                    };
                    if key == "<<" {
                        self.note(
                            key_at,
                            "merge keys (`<<`) are not allowed: write the fields out",
                        );
                    } else if let Some(line) = lines.get(&key) {
                        let shown = key.escape_debug().to_string();
                        self.note(
                            key_at,
                            format!("`{shown}` stands twice: first in line {line}"),
                        );
                    } else {
                        lines.insert(key.clone(), key_at.line);
                        entries.push((key, key_at, node));
                    }
                }
            }
        }
        root.ok_or_else(|| YamlProblem {
            at: Position { line: 1, column: 1 },
            message: "the file is empty".to_owned(),
        })
    }

    fn check_depth(open: &[Open], at: Position) -> Result<(), YamlProblem> {
        if open.len() < MAX_DEPTH {
            return Ok(());
        }
        Err(YamlProblem {
            at,
            message: format!("nested deeper than {MAX_DEPTH} levels"),
        })
    }
}

/// The value of an unquoted scalar, as YAML 1.2's core schema reads it.
fn plain_scalar(text: &str) -> Result<Value, String> {
    Ok(match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => {
            let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
            if matches!(unsigned.to_ascii_lowercase().as_str(), ".inf" | ".nan") {
                return Err(format!("`{text}` is not allowed: numbers are finite"));
            }
            let numeric = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
                && unsigned.bytes().any(|b| b.is_ascii_digit())
                && unsigned
                    .bytes()
                    .all(|b| b.is_ascii_digit() || b".eE+-".contains(&b));
            if !numeric {
                return Ok(Value::String(text.to_owned()));
            }
            let plain = text.strip_prefix('+').unwrap_or(text);
            if let Ok(n) = plain.parse::<i64>() {
                Value::Number(n.into())
            } else if let Ok(n) = plain.parse::<u64>() {
                Value::Number(n.into())
            } else {
                match plain.parse::<f64>() {
                    Ok(n) if n.is_finite() => {
                        Number::from_f64(n).map_or(Value::Null, Value::Number)
                    }
                    Ok(_) => return Err(format!("`{}` is too large a number", cut(text))),
                    Err(_) => Value::String(text.to_owned()),
                }
            }
        }
    })
}

fn cut(text: &str) -> String {
    text.chars().take(40).collect()
}

/// A value as a person writes it on a command line: a number, a boolean, null, or else a text.
#[must_use]
pub fn scalar_from_text(text: &str) -> Value {
    plain_scalar(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problems(text: &str) -> Vec<YamlProblem> {
        parse(text).problems
    }

    #[test]
    fn scalars_have_the_types_of_yaml_1_2() {
        let text = "{a: 1, b: -2.5e3, c: yes, d: 'true', e: true, f: ~, g: 1.2.3, h: 0x1F, i: 2024-01-01, j: +3}";
        let read = parse(text).root.map(|n| n.to_json());
        let expected = json!({"a": 1, "b": -2500.0, "c": "yes", "d": "true", "e": true, "f": null, "g": "1.2.3", "h": "0x1F", "i": "2024-01-01", "j": 3});
        assert_eq!(read, Some(expected));
    }

    #[test]
    fn every_value_knows_its_place() {
        let root = parse("a:\n  - x\n  - b: 1\n").root;
        let place = |path: &[&str]| root.as_ref().map(|root| root.place(path));
        let expected = |line, column| Some(Position { line, column });
        assert_eq!(place(&["a", "1", "b"]), expected(3, 8));
        assert_eq!(place(&["a", "0", "nope"]), expected(2, 5));
    }

    #[test]
    fn a_key_that_stands_twice_hides_no_other_mistake() {
        let read = parse("a: 1\nb: 2\na: 3\n");
        assert_eq!(read.problems.len(), 1, "{:?}", read.problems);
        assert_eq!(
            read.root.map(|n| n.to_json()),
            Some(json!({"a": 1, "b": 2}))
        );
        assert!(parse("a: *x\n").root.is_none());
    }

    #[test]
    fn what_could_grow_is_refused() {
        let bomb = "a: &a [x]\nb: *a\nc: !!python/object:x y\n<<: {z: 1}\nd: 1\nd: 2\n";
        let found = problems(bomb);
        for (line, word) in [
            (1, "anchors"),
            (2, "aliases"),
            (3, "tags"),
            (4, "merge"),
            (6, "twice"),
        ] {
            assert!(
                found
                    .iter()
                    .any(|p| p.at.line == line && p.message.contains(word)),
                "{word} in line {line}: {found:?}"
            );
        }
    }

    #[test]
    fn size_depth_documents_and_emptiness_are_bounded() {
        assert!(
            problems(&"x".repeat(MAX_BYTES + 1))[0]
                .message
                .contains("bytes")
        );
        assert!(
            problems(&"[".repeat(10_000))
                .iter()
                .any(|p| p.message.contains("deeper") || p.message.contains("YAML"))
        );
        assert!(
            problems(&"- ".repeat(10_000))
                .iter()
                .any(|p| p.message.contains("deeper") || p.message.contains("YAML"))
        );
        assert!(
            problems("a: 1\n---\nb: 2\n")
                .iter()
                .any(|p| p.message.contains("second document"))
        );
        assert!(problems("").iter().any(|p| p.message.contains("empty")));
        assert!(
            problems("a: .nan")
                .iter()
                .any(|p| p.message.contains("finite"))
        );
        assert!(
            problems("? [a]\n: b")
                .iter()
                .any(|p| p.message.contains("key"))
        );
    }
}
