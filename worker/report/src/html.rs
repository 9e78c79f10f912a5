//! Writes markup that is always balanced and always escaped: elements are closures, and text reaches
//! the page only through [`clean`] and [`escape`]. The one way around that is [`Html::raw`], which
//! takes nothing but constants of this program.

use std::fmt::{self, Display, Write as _};

/// Names and values of an element's attributes. Names are constants, values may be anyone's.
pub type Attributes<'a> = &'a [(&'static str, &'a dyn Display)];

/// The heading of a table's column.
#[derive(Debug, Clone, Copy)]
pub enum Heading<'a> {
    /// Of texts.
    Text(&'a str),
    /// Of numbers, which stand to the right.
    Number(&'a str),
}

/// A piece of a page.
#[derive(Debug, Default)]
pub struct Html {
    text: String,
}

impl Html {
    /// An empty piece.
    pub fn new() -> Self {
        Self::default()
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The markup.
    pub fn into_string(self) -> String {
        self.text
    }

    /// Adds another piece.
    pub fn append(&mut self, other: &Self) {
        self.text.push_str(&other.text);
    }

    /// Adds a constant as it is.
    pub fn raw(&mut self, constant: &'static str) {
        self.text.push_str(constant);
    }

    /// Adds text.
    pub fn text(&mut self, text: impl Display) {
        escape(&text.to_string(), &mut self.text);
    }

    /// Adds an element with what `inside` writes.
    pub fn element(
        &mut self,
        tag: &'static str,
        attributes: Attributes<'_>,
        inside: impl FnOnce(&mut Self),
    ) {
        self.start(tag, attributes);
        self.text.push('>');
        inside(self);
        self.text.push_str("</");
        self.text.push_str(tag);
        self.text.push('>');
    }

    /// Adds an element that holds text only.
    pub fn leaf(&mut self, tag: &'static str, attributes: Attributes<'_>, text: impl Display) {
        self.element(tag, attributes, |h| h.text(text));
    }

    /// Adds an element without content.
    pub fn empty(&mut self, tag: &'static str, attributes: Attributes<'_>) {
        self.start(tag, attributes);
        self.text.push_str("/>");
    }

    /// Adds a `div` of a class.
    pub fn div(&mut self, class: &'static str, inside: impl FnOnce(&mut Self)) {
        self.element("div", &[("class", &class)], inside);
    }

    /// Adds a `span` of a class with text.
    pub fn span(&mut self, class: &'static str, text: impl Display) {
        self.leaf("span", &[("class", &class)], text);
    }

    /// Adds a paragraph of a class with text.
    pub fn paragraph(&mut self, class: &'static str, text: impl Display) {
        self.leaf("p", &[("class", &class)], text);
    }

    /// Adds a table in a box that scrolls.
    pub fn table(&mut self, caption: &str, headings: &[Heading<'_>], rows: impl FnOnce(&mut Self)) {
        self.div("scroll", |h| {
            h.element("table", &[], |h| {
                h.leaf("caption", &[], caption);
                h.element("thead", &[], |h| {
                    h.element("tr", &[], |h| {
                        for heading in headings {
                            match heading {
                                Heading::Text(name) => h.leaf("th", &[("scope", &"col")], name),
                                Heading::Number(name) => {
                                    h.leaf("th", &[("scope", &"col"), ("class", &"n")], name);
                                }
                            }
                        }
                    });
                });
                h.element("tbody", &[], rows);
            });
        });
    }

    /// Adds a table's row.
    pub fn row(&mut self, cells: impl FnOnce(&mut Self)) {
        self.element("tr", &[], cells);
    }

    /// Adds the cell that names its row.
    pub fn row_head(&mut self, text: impl Display) {
        self.leaf("th", &[("scope", &"row")], text);
    }

    /// Adds a cell with text.
    pub fn cell(&mut self, text: impl Display) {
        self.leaf("td", &[], text);
    }

    /// Adds a cell with a number.
    pub fn number_cell(&mut self, text: impl Display) {
        self.leaf("td", &[("class", &"n")], text);
    }

    fn start(&mut self, tag: &'static str, attributes: Attributes<'_>) {
        self.text.push('<');
        self.text.push_str(tag);
        for (name, value) in attributes {
            self.text.push(' ');
            self.text.push_str(name);
            self.text.push_str("=\"");
            escape(&value.to_string(), &mut self.text);
            self.text.push('"');
        }
    }
}

/// Appends `text`, cleaned, with everything that means something in markup written as a reference.
pub fn escape(text: &str, out: &mut String) {
    for c in clean(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
}

/// Without escape sequences of terminals, control characters (but for line feeds and tabs), marks
/// that turn the direction of text around, and what XML does not allow.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => {
                // A control sequence ends with a letter or one of a few signs; anything else that
                // follows the escape is text.
                if chars.next_if_eq(&'[').is_some() {
                    while chars
                        .next_if(|c| matches!(c, '\u{20}'..='\u{3f}'))
                        .is_some()
                    {}
                    chars.next_if(|c| matches!(c, '\u{40}'..='\u{7e}'));
                }
            }
            '\n' | '\t' => out.push(c),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}' => {}
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// A text cut to so many characters, with an ellipsis where it was cut.
pub fn cut(text: &str, characters: usize) -> String {
    let text = clean(text);
    if text.chars().count() <= characters {
        return text;
    }
    let mut out: String = text.chars().take(characters.saturating_sub(1)).collect();
    out.push('…');
    out
}

/// A length or place in a drawing: two decimals at most, and never anything but a number.
#[derive(Debug, Clone, Copy)]
pub struct Px(pub f64);

impl Display for Px {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.is_finite() {
            return f.write_char('0');
        }
        let text = format!("{:.2}", self.0);
        let text = text.trim_end_matches('0').trim_end_matches('.');
        f.write_str(if text == "-0" { "0" } else { text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &str) -> String {
        let mut html = Html::new();
        html.text(text);
        html.into_string()
    }

    #[test]
    fn markup_in_text_is_only_text() {
        assert_eq!(
            escaped("</script><b a=\"1\" c='2'>&amp;"),
            "&lt;/script&gt;&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;amp;"
        );
    }

    #[test]
    fn a_value_cannot_leave_its_attribute() {
        let mut html = Html::new();
        html.empty("rect", &[("title", &"\" onload=\"alert(1)")]);
        assert_eq!(
            html.into_string(),
            "<rect title=\"&quot; onload=&quot;alert(1)\"/>"
        );
    }

    #[test]
    fn control_characters_and_colours_of_terminals_are_removed() {
        assert_eq!(
            escaped("\u{1b}[31;1mred\u{1b}[0m\u{7}\r\n\tx\0"),
            "red\n\tx"
        );
        assert_eq!(escaped("a\u{202e}b\u{2066}c\u{ffff}\u{9b}d"), "abcd");
        assert_eq!(escaped("\u{1b}[12"), "");
        assert_eq!(escaped("\u{1b}x"), "x");
    }

    #[test]
    fn lengths_are_always_numbers() {
        let all = [1.0, 0.126, -0.001, f64::NAN, f64::INFINITY, 12.5];
        let texts: Vec<String> = all.iter().map(|v| Px(*v).to_string()).collect();
        assert_eq!(texts, ["1", "0.13", "0", "0", "0", "12.5"]);
    }

    #[test]
    fn a_cut_text_says_so() {
        assert_eq!(cut("ääää", 4), "ääää");
        assert_eq!(cut("äääää", 4), "äää…");
    }
}
