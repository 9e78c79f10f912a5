//! Conditions such as `evaluate.f1 >= 0.7 and params.region == "eu"`.
//!
//! Grammar: `or` binds loosest, then `and`, then `not`, then one comparison (`== != < <= > >=`) of
//! two operands. An operand is a number, a text in quotes, `true`, `false`, a dotted reference, or
//! a condition in parentheses. A reference alone must be a boolean.

use std::{cmp::Ordering, fmt, str::FromStr};

use serde_json::Value;

/// The longest condition, in bytes; it also bounds the depth.
pub const MAX_BYTES: usize = 1000;
const MAX_DEPTH: usize = 32;

/// A parsed condition.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    text: String,
    root: Node,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Literal(Value),
    Reference(Vec<String>),
    Not(Box<Node>),
    Both(Box<Node>, Box<Node>),
    Either(Box<Node>, Box<Node>),
    Compare(Box<Node>, Comparison, Box<Node>),
}

/// How two values are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    AtMost,
    /// `>`
    Greater,
    /// `>=`
    AtLeast,
}

impl Comparison {
    /// Whether it holds for that order.
    #[must_use]
    pub const fn holds(self, order: Ordering) -> bool {
        match self {
            Self::Equal => order.is_eq(),
            Self::NotEqual => order.is_ne(),
            Self::Less => order.is_lt(),
            Self::AtMost => order.is_le(),
            Self::Greater => order.is_gt(),
            Self::AtLeast => order.is_ge(),
        }
    }
}

/// A gate such as `>= 0.60`: a comparison with a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    /// How.
    pub comparison: Comparison,
    /// With what.
    pub limit: f64,
}

impl Gate {
    /// Whether the value passes; NaN never does.
    #[must_use]
    pub fn passes(&self, value: f64) -> bool {
        value
            .partial_cmp(&self.limit)
            .is_some_and(|order| self.comparison.holds(order))
    }
}

impl FromStr for Gate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("`{}` is no gate: write e.g. `>= 0.60`", text.escape_debug());
        let trimmed = text.trim();
        let symbol = trimmed.chars().take_while(|c| "<>=!".contains(*c)).count();
        let (symbol, number) = trimmed.split_at(symbol);
        let comparison = comparison(symbol).ok_or_else(fail)?;
        let limit: f64 = number.trim().parse().map_err(|_| fail())?;
        if limit.is_finite() {
            Ok(Self { comparison, limit })
        } else {
            Err(fail())
        }
    }
}

fn comparison(symbol: &str) -> Option<Comparison> {
    Some(match symbol {
        "==" => Comparison::Equal,
        "!=" => Comparison::NotEqual,
        "<" => Comparison::Less,
        "<=" => Comparison::AtMost,
        ">" => Comparison::Greater,
        ">=" => Comparison::AtLeast,
        _ => return None,
    })
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Number(f64),
    Text(String),
    Name(Vec<String>),
    Compare(Comparison),
    Open,
    Close,
}

fn tokens(text: &str) -> Result<Vec<(usize, Token)>, String> {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let token = match bytes[at] {
            b if b.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            b'(' => {
                at += 1;
                Token::Open
            }
            b')' => {
                at += 1;
                Token::Close
            }
            b'<' | b'>' | b'=' | b'!' => {
                while at < bytes.len() && b"<>=!".contains(&bytes[at]) {
                    at += 1;
                }
                let symbol = &text[start..at];
                Token::Compare(comparison(symbol).ok_or_else(|| {
                    format!(
                        "column {}: `{symbol}` is no comparison: use == != < <= > >=",
                        start + 1
                    )
                })?)
            }
            quote @ (b'"' | b'\'') => {
                let length = text[at + 1..].find(quote as char);
                let length = length.ok_or_else(|| {
                    format!("column {}: the text has no closing quote", start + 1)
                })?;
                at += length + 2;
                Token::Text(text[start + 1..at - 1].to_owned())
            }
            b if b.is_ascii_digit() || b == b'-' || b == b'+' => {
                at += 1;
                while at < bytes.len()
                    && (bytes[at].is_ascii_alphanumeric()
                        || bytes[at] == b'.'
                        || (b"+-".contains(&bytes[at]) && matches!(bytes[at - 1], b'e' | b'E')))
                {
                    at += 1;
                }
                let number = &text[start..at];
                let parsed = number.parse::<f64>().ok().filter(|n| n.is_finite());
                Token::Number(
                    parsed
                        .ok_or_else(|| format!("column {}: `{number}` is no number", start + 1))?,
                )
            }
            b if b.is_ascii_alphabetic() || b == b'_' => {
                while at < bytes.len()
                    && (bytes[at].is_ascii_alphanumeric() || b"._-".contains(&bytes[at]))
                {
                    at += 1;
                }
                let parts: Vec<String> = text[start..at].split('.').map(str::to_owned).collect();
                if parts.iter().any(String::is_empty) {
                    return Err(format!(
                        "column {}: `{}` has an empty part",
                        start + 1,
                        &text[start..at]
                    ));
                }
                Token::Name(parts)
            }
            _ => {
                let shown = text[at..].chars().next().unwrap_or(' ').escape_debug();
                return Err(format!("column {}: `{shown}` is not expected", start + 1));
            }
        };
        out.push((start, token));
    }
    Ok(out)
}

struct Parser {
    tokens: Vec<(usize, Token)>,
    at: usize,
    depth: usize,
    end: usize,
}

impl Parser {
    fn word(&mut self, word: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some((_, Token::Name(parts))) if parts.len() == 1 && parts[0] == word);
        self.at += usize::from(found);
        found
    }

    fn column(&self) -> usize {
        self.tokens.get(self.at).map_or(self.end, |(at, _)| *at) + 1
    }

    fn either(&mut self) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!(
                "column {}: nested deeper than {MAX_DEPTH}",
                self.column()
            ));
        }
        let mut left = self.both()?;
        while self.word("or") {
            left = Node::Either(Box::new(left), Box::new(self.both()?));
        }
        self.depth -= 1;
        Ok(left)
    }

    fn both(&mut self) -> Result<Node, String> {
        let mut left = self.not()?;
        while self.word("and") {
            left = Node::Both(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Node, String> {
        let mut negations = 0_usize;
        while self.word("not") {
            negations += 1;
        }
        let node = self.compare()?;
        Ok(if negations % 2 == 1 {
            Node::Not(Box::new(node))
        } else {
            node
        })
    }

    fn compare(&mut self) -> Result<Node, String> {
        let left = self.operand()?;
        let Some((_, Token::Compare(how))) = self.tokens.get(self.at) else {
            return Ok(left);
        };
        let how = *how;
        self.at += 1;
        Ok(Node::Compare(
            Box::new(left),
            how,
            Box::new(self.operand()?),
        ))
    }

    fn operand(&mut self) -> Result<Node, String> {
        let column = self.column();
        let token = self.tokens.get(self.at).map(|(_, token)| token.clone());
        self.at += 1;
        match token {
            Some(Token::Number(n)) => Ok(Node::Literal(Value::from(n))),
            Some(Token::Text(text)) => Ok(Node::Literal(Value::from(text))),
            Some(Token::Name(parts)) => match parts.join(".").as_str() {
                "true" => Ok(Node::Literal(Value::Bool(true))),
                "false" => Ok(Node::Literal(Value::Bool(false))),
                "and" | "or" | "not" => Err(format!("column {column}: a value is missing here")),
                _ if parts.len() < 2 => Err(format!(
                    "column {column}: `{}` is no reference: write `stage.result`, `params.name` or `matrix.name`, or put a text in quotes",
                    parts[0]
                )),
                _ => Ok(Node::Reference(parts)),
            },
            Some(Token::Open) => {
                let inner = self.either()?;
                if matches!(self.tokens.get(self.at), Some((_, Token::Close))) {
                    self.at += 1;
                    Ok(inner)
                } else {
                    Err(format!("column {}: `)` is missing here", self.column()))
                }
            }
            _ => Err(format!("column {column}: a value is missing here")),
        }
    }
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_BYTES {
            return Err(format!("the condition is longer than {MAX_BYTES} bytes"));
        }
        let mut parser = Parser {
            tokens: tokens(text)?,
            at: 0,
            depth: 0,
            end: text.len(),
        };
        let root = parser.either()?;
        if parser.at < parser.tokens.len() {
            return Err(format!(
                "column {}: `and` or `or` is missing here",
                parser.column()
            ));
        }
        Ok(Self {
            text: text.to_owned(),
            root,
        })
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Gives the value of a reference, if there is one.
pub type Lookup<'a> = &'a dyn Fn(&[String]) -> Option<Value>;

impl Condition {
    /// Whether it holds.
    ///
    /// # Errors
    /// Names a reference without a value, and values that cannot be compared.
    pub fn eval(&self, lookup: Lookup<'_>) -> Result<bool, String> {
        truth(&self.root, lookup)
    }

    /// All references in it.
    #[must_use]
    pub fn references(&self) -> Vec<Vec<String>> {
        fn walk(node: &Node, out: &mut Vec<Vec<String>>) {
            match node {
                Node::Literal(_) => {}
                Node::Reference(parts) => out.push(parts.clone()),
                Node::Not(inner) => walk(inner, out),
                Node::Both(a, b) | Node::Either(a, b) | Node::Compare(a, _, b) => {
                    walk(a, out);
                    walk(b, out);
                }
            }
        }
        let mut out = Vec::new();
        walk(&self.root, &mut out);
        out
    }
}

fn truth(node: &Node, lookup: Lookup<'_>) -> Result<bool, String> {
    match value(node, lookup)? {
        Value::Bool(b) => Ok(b),
        other => Err(format!(
            "`{other}` is neither true nor false: compare it with something"
        )),
    }
}

fn value(node: &Node, lookup: Lookup<'_>) -> Result<Value, String> {
    Ok(match node {
        Node::Literal(value) => value.clone(),
        Node::Reference(parts) => {
            lookup(parts).ok_or_else(|| format!("there is no value `{}`", parts.join(".")))?
        }
        Node::Not(inner) => Value::Bool(!truth(inner, lookup)?),
        Node::Both(a, b) => Value::Bool(truth(a, lookup)? && truth(b, lookup)?),
        Node::Either(a, b) => Value::Bool(truth(a, lookup)? || truth(b, lookup)?),
        Node::Compare(a, how, b) => {
            let (a, b) = (value(a, lookup)?, value(b, lookup)?);
            let order = match (&a, &b) {
                (Value::Number(x), Value::Number(y)) => x.as_f64().partial_cmp(&y.as_f64()),
                (Value::String(x), Value::String(y)) => Some(x.cmp(y)),
                (Value::Bool(x), Value::Bool(y)) => Some(x.cmp(y)),
                _ => None,
            };
            let order = order.ok_or_else(|| format!("`{a}` and `{b}` cannot be compared"))?;
            Value::Bool(how.holds(order))
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn eval(text: &str) -> Result<bool, String> {
        text.parse::<Condition>()?
            .eval(&|parts| match parts.join(".").as_str() {
                "evaluate.f1" => Some(json!(0.71)),
                "params.region" => Some(json!("eu")),
                "check.passed" => Some(json!(true)),
                _ => None,
            })
    }

    #[test]
    fn conditions_are_read_with_the_usual_precedence() {
        for (text, expected) in [
            ("evaluate.f1 >= 0.7", true),
            (
                "evaluate.f1 < 0.7 or params.region == \"eu\" and check.passed",
                true,
            ),
            ("not (evaluate.f1 < 0.7 or params.region == 'eu')", false),
            ("not not check.passed", true),
            ("1 == 1.0 and -2e-3 < 0", true),
            ("'a' < 'b' and true != false", true),
        ] {
            assert_eq!(eval(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_mistake_is_told_with_its_column() {
        for (text, column) in [
            ("evaluate.f1 >", 14),
            ("evaluate.f1 => 1", 13),
            ("(1 == 1", 8),
            ("1 == 1 1", 8),
            ("f1 > 2", 1),
            ("a.b == 'x", 8),
            ("a..b == 1", 1),
            ("", 1),
            ("1 == 1 and", 11),
        ] {
            let error = text.parse::<Condition>().err().unwrap_or_default();
            assert!(
                error.starts_with(&format!("column {column}:")),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn what_cannot_be_compared_is_said() {
        for text in ["evaluate.f1 == 'x'", "evaluate.nope > 1", "evaluate.f1"] {
            assert!(eval(text).is_err(), "{text} was taken");
        }
    }

    #[test]
    fn depth_and_length_are_bounded() {
        assert!("(".repeat(900).parse::<Condition>().is_err());
        assert!(
            format!("{}true", "not ".repeat(900))
                .parse::<Condition>()
                .is_err()
        );
        assert!(
            format!("{}true", "not ".repeat(200))
                .parse::<Condition>()
                .is_ok()
        );
    }

    #[test]
    fn a_gate_compares_and_never_passes_nan() {
        let gate: Result<Gate, _> = ">= 0.60".parse();
        assert!(
            gate.as_ref()
                .is_ok_and(|g| g.passes(0.6) && !g.passes(0.59) && !g.passes(f64::NAN))
        );
        for bad in ["", "0.6", ">= x", "=> 1", ">= nan", "> inf"] {
            assert!(bad.parse::<Gate>().is_err(), "{bad} was taken");
        }
    }
}
