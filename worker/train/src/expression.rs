//! Expressions of derived features: `+ - * / ( )`, numbers and column names, no more. Evaluated for
//! each row in double precision; bounded in length and depth.

use std::fmt;

/// The longest expression, in bytes.
const MAX_LENGTH: usize = 4096;
/// The deepest nesting.
const MAX_DEPTH: usize = 64;

/// A parsed expression.
#[derive(Debug, Clone, PartialEq)]
pub struct Expression {
    root: Node,
    columns: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Number(f64),
    Column(usize),
    Negative(Box<Node>),
    Binary(Operator, Box<Node>, Box<Node>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
}

/// Why a text is no expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpressionError {
    /// The character at fault, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for ExpressionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at character {}: {}", self.column, self.message)
    }
}

impl Expression {
    /// Parses an expression.
    ///
    /// # Errors
    /// Where and why it is none.
    pub fn parse(text: &str) -> Result<Self, ExpressionError> {
        if text.len() > MAX_LENGTH {
            return Err(ExpressionError {
                column: 1,
                message: format!("it is longer than {MAX_LENGTH} bytes"),
            });
        }
        let mut parser = Parser {
            chars: text.chars().collect(),
            at: 0,
            columns: Vec::new(),
        };
        let root = parser.sum(0)?;
        parser.skip_space();
        if parser.at < parser.chars.len() {
            return Err(parser.error("an operator `+ - * /` or the end is expected here"));
        }
        Ok(Self {
            root,
            columns: parser.columns,
        })
    }

    /// The columns that it names, each once.
    #[must_use]
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Its value for each row; `columns` are in the order of [`Self::columns`].
    #[must_use]
    pub fn evaluate(&self, columns: &[impl AsRef<[f64]>], rows: usize) -> Vec<f64> {
        (0..rows)
            .map(|row| value(&self.root, columns, row))
            .collect()
    }
}

fn value(node: &Node, columns: &[impl AsRef<[f64]>], row: usize) -> f64 {
    match node {
        Node::Number(number) => *number,
        Node::Column(index) => columns[*index].as_ref()[row],
        Node::Negative(inner) => -value(inner, columns, row),
        Node::Binary(operator, left, right) => {
            let (left, right) = (value(left, columns, row), value(right, columns, row));
            match operator {
                Operator::Add => left + right,
                Operator::Subtract => left - right,
                Operator::Multiply => left * right,
                Operator::Divide => left / right,
            }
        }
    }
}

struct Parser {
    chars: Vec<char>,
    at: usize,
    columns: Vec<String>,
}

impl Parser {
    fn error(&self, message: impl Into<String>) -> ExpressionError {
        ExpressionError {
            column: self.at + 1,
            message: message.into(),
        }
    }

    fn skip_space(&mut self) {
        while self.chars.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
    }

    fn operator(&mut self, known: &[(char, Operator)]) -> Option<Operator> {
        self.skip_space();
        let next = self.chars.get(self.at)?;
        let found = known.iter().find(|(sign, _)| sign == next)?.1;
        self.at += 1;
        Some(found)
    }

    fn sum(&mut self, depth: usize) -> Result<Node, ExpressionError> {
        let signs = [('+', Operator::Add), ('-', Operator::Subtract)];
        self.chain(&signs, depth, Self::product)
    }

    fn product(&mut self, depth: usize) -> Result<Node, ExpressionError> {
        let signs = [('*', Operator::Multiply), ('/', Operator::Divide)];
        self.chain(&signs, depth, Self::factor)
    }

    /// Operands of one precedence from left to right.
    fn chain(
        &mut self,
        signs: &[(char, Operator)],
        depth: usize,
        operand: fn(&mut Self, usize) -> Result<Node, ExpressionError>,
    ) -> Result<Node, ExpressionError> {
        let mut left = operand(self, depth)?;
        // Each link is one level deeper when evaluated.
        let mut links = depth;
        while let Some(operator) = self.operator(signs) {
            links += 1;
            if links > MAX_DEPTH {
                return Err(self.error(format!("it is longer than {MAX_DEPTH} operations")));
            }
            let right = operand(self, links)?;
            left = Node::Binary(operator, Box::new(left), Box::new(right));
        }
        Ok(left)
    }

    fn factor(&mut self, depth: usize) -> Result<Node, ExpressionError> {
        if depth > MAX_DEPTH {
            return Err(self.error(format!("it is nested deeper than {MAX_DEPTH}")));
        }
        self.skip_space();
        match self.chars.get(self.at).copied() {
            Some('-') => {
                self.at += 1;
                Ok(Node::Negative(Box::new(self.factor(depth + 1)?)))
            }
            Some('(') => {
                self.at += 1;
                let inner = self.sum(depth + 1)?;
                self.skip_space();
                if self.chars.get(self.at) != Some(&')') {
                    return Err(self.error("a `)` is missing"));
                }
                self.at += 1;
                Ok(inner)
            }
            Some('"') => self.quoted(),
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_alphabetic() || c == '_' => {
                let start = self.at;
                while self
                    .chars
                    .get(self.at)
                    .is_some_and(|c| c.is_alphanumeric() || *c == '_')
                {
                    self.at += 1;
                }
                let name = self.chars[start..self.at].iter().collect();
                Ok(self.column(name))
            }
            Some(c) => Err(self.error(format!(
                "`{}` cannot stand here: write a number, a column's name (other names in double quotes) or `(`",
                c.escape_debug()
            ))),
            None => Err(self.error("it ends too early")),
        }
    }

    fn quoted(&mut self) -> Result<Node, ExpressionError> {
        let start = self.at + 1;
        let length = self.chars[start..].iter().position(|c| *c == '"');
        let Some(length) = length else {
            return Err(self.error("the quote is not closed"));
        };
        self.at = start + length + 1;
        let name = self.chars[start..start + length].iter().collect();
        Ok(self.column(name))
    }

    fn number(&mut self) -> Result<Node, ExpressionError> {
        let start = self.at;
        while let Some(c) = self.chars.get(self.at) {
            let exponent_sign = matches!(c, '+' | '-')
                && matches!(self.chars.get(self.at.wrapping_sub(1)), Some('e' | 'E'));
            if !(c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E') || exponent_sign) {
                break;
            }
            self.at += 1;
        }
        let text: String = self.chars[start..self.at].iter().collect();
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Node::Number(number)),
            _ => {
                self.at = start;
                Err(self.error(format!("`{text}` is no number")))
            }
        }
    }

    fn column(&mut self, name: String) -> Node {
        let index = self
            .columns
            .iter()
            .position(|c| *c == name)
            .unwrap_or_else(|| {
                self.columns.push(name);
                self.columns.len() - 1
            });
        Node::Column(index)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use super::*;

    fn evaluate(text: &str, columns: &[(&str, f64)]) -> f64 {
        let expression = Expression::parse(text).unwrap();
        let values: Vec<Vec<f64>> = expression
            .columns()
            .iter()
            .map(|name| vec![columns.iter().find(|c| c.0 == name).unwrap().1])
            .collect();
        expression.evaluate(&values, 1)[0]
    }

    #[test]
    fn arithmetic_is_as_at_school() {
        assert_eq!(evaluate("1 + 2 * 3 - 4 / 2", &[]), 5.0);
        assert_eq!(evaluate("(1 + 2) * -3", &[]), -9.0);
        assert_eq!(evaluate("8 / 4 / 2 - 1 - 1", &[]), -1.0);
        assert_eq!(evaluate("1.5e-3*2", &[]), 0.003);
        assert_eq!(evaluate("--2", &[]), 2.0);
    }

    #[test]
    fn columns_are_names_or_quoted_names() {
        let columns = [("torque", 40.0), ("Torque [Nm]", 41.0), ("größe_1", 3.0)];
        assert_eq!(evaluate("torque * 2", &columns), 80.0);
        assert_eq!(evaluate("\"Torque [Nm]\" - torque", &columns), 1.0);
        assert_eq!(evaluate("größe_1*größe_1", &columns), 9.0);
        let parsed = Expression::parse("a*b + a").unwrap();
        assert_eq!(parsed.columns(), ["a", "b"]);
    }

    #[test]
    fn what_is_none_says_where() {
        for (text, column) in [
            ("", 1),
            ("a +", 4),
            ("a b", 3),
            ("(a", 3),
            ("\"a", 1),
            ("a ^ 2", 3),
            ("1.2.3", 1),
            ("sum(a)", 4),
        ] {
            let error = Expression::parse(text).unwrap_err();
            assert_eq!(error.column, column, "{text}: {error}");
        }
    }

    #[test]
    fn deep_nesting_and_long_chains_are_refused() {
        let deep = format!("{}a{}", "(".repeat(500), ")".repeat(500));
        assert!(Expression::parse(&deep).is_err());
        assert!(Expression::parse(&"-".repeat(500)).is_err());
        assert!(Expression::parse(&format!("a{}", "+a".repeat(1000))).is_err());
        assert!(Expression::parse(&"a".repeat(5000)).is_err());
    }
}
