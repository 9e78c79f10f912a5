//! One trace as a tree, and what must hold of it.

use std::collections::BTreeMap;

use super::Span;

/// The spans of one trace, each once, by when they began.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Its spans.
    pub spans: Vec<Span>,
}

/// What must be the same of a span that is sent again: everything but who sends it.
fn same(a: &Span, b: &Span) -> bool {
    let mut a = a.clone();
    a.resource.clone_from(&b.resource);
    a == *b
}

impl Trace {
    /// Of all that was received of it: what was sent more than once is folded.
    pub(super) fn of<'a>(spans: impl Iterator<Item = &'a Span>) -> Result<Self, String> {
        let mut by_id: BTreeMap<&str, &Span> = BTreeMap::new();
        for span in spans {
            let first = *by_id.entry(&span.id).or_insert(span);
            if !same(first, span) {
                return Err(format!(
                    "two spans of one id differ: {first:#?} and {span:#?}"
                ));
            }
        }
        let mut spans: Vec<Span> = by_id.into_values().cloned().collect();
        spans.sort_by(|a, b| (a.start, &a.name).cmp(&(b.start, &b.name)));
        Ok(Self { spans })
    }

    /// Its spans as an indented list, for messages.
    #[must_use]
    pub fn tell(&self) -> String {
        let mut out = String::from("\n");
        for span in self.spans.iter().filter(|s| self.get(&s.parent).is_none()) {
            self.tell_below(span, 0, &mut out);
        }
        out
    }

    fn tell_below(&self, span: &Span, depth: usize, out: &mut String) {
        let error = span.error.as_deref().map(|e| format!(" ERROR {e}"));
        let error = error.unwrap_or_default();
        let (indent, name, id, parent) = ("  ".repeat(depth), &span.name, &span.id, &span.parent);
        *out += &format!("{indent}{name} [{id} in {parent}]{error}\n");
        for child in self.children(span) {
            self.tell_below(child, depth + 1, out);
        }
    }

    /// The span of that id.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Span> {
        self.spans.iter().find(|span| span.id == id)
    }

    /// The spans of that name, by when they began.
    pub fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Span> {
        self.spans.iter().filter(move |span| span.name == name)
    }

    /// The only span of that name.
    ///
    /// # Panics
    /// If there is none, or another one.
    #[must_use]
    #[track_caller]
    pub fn one(&self, name: &str) -> &Span {
        let found: Vec<_> = self.named(name).collect();
        let [one] = found.as_slice() else {
            panic!("{} spans `{name}` in {}", found.len(), self.tell());
        };
        one
    }

    /// The spans right below one.
    pub fn children<'a>(&'a self, span: &Span) -> impl Iterator<Item = &'a Span> {
        (self.spans.iter()).filter(move |child| child.parent == span.id && child.id != span.id)
    }

    /// It is one complete tree: one span has no parent here, and its parent is `outside` (empty for
    /// none); the parent of each other one is there; every span ends, not before it begins, and
    /// begins not before its parent.
    ///
    /// # Errors
    /// What does not hold.
    pub fn is_whole(&self, outside: &str) -> Result<(), String> {
        let wrong = |what: String| Err(format!("{what} in {}", self.tell()));
        let roots: Vec<_> = (self.spans.iter())
            .filter(|span| self.get(&span.parent).is_none())
            .collect();
        let [root] = roots.as_slice() else {
            return wrong(format!("{} spans without a parent", roots.len()));
        };
        if root.parent != outside {
            return wrong(format!("the root is part of `{}`", root.parent));
        }
        for span in &self.spans {
            let name = &span.name;
            if span.trace.len() != 32 || span.id.len() != 16 {
                return wrong(format!("`{name}` has no ids"));
            }
            if span.start == 0 || span.end < span.start {
                return wrong(format!("`{name}` is from {} to {}", span.start, span.end));
            }
            if self.get(&span.parent).is_some_and(|p| span.start < p.start) {
                return wrong(format!("`{name}` begins before its parent"));
            }
            // Who is part of itself, over however many, is not below the root.
            let (mut above, mut steps) = (span, 0);
            while let Some(parent) = self.get(&above.parent) {
                (above, steps) = (parent, steps + 1);
                if steps > self.spans.len() {
                    return wrong(format!("`{name}` is part of itself"));
                }
            }
        }
        Ok(())
    }

    /// The same, and how often each name is there.
    ///
    /// # Errors
    /// What does not hold.
    pub fn is_whole_with(&self, outside: &str, names: &[(&str, usize)]) -> Result<(), String> {
        self.is_whole(outside)?;
        for (name, times) in names {
            let found = self.named(name).count();
            if found != *times {
                let tell = self.tell();
                return Err(format!("{found} spans `{name}` and not {times} in {tell}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(id: &str, parent: &str, start: u64) -> Span {
        Span {
            resource: BTreeMap::new(),
            trace: "0af7651916cd43dd8448eb211c80319c".to_owned(),
            id: id.repeat(16),
            parent: parent.repeat(16),
            name: id.to_owned(),
            kind: "INTERNAL",
            start,
            end: start + 1,
            attributes: BTreeMap::new(),
            events: Vec::new(),
            links: Vec::new(),
            error: None,
            flags: 1,
        }
    }

    fn wrong(spans: &[Span]) -> String {
        let trace = Trace::of(spans.iter()).unwrap();
        trace.is_whole("").unwrap_err()
    }

    #[test]
    fn a_tree_is_whole_also_when_a_part_came_twice() {
        let spans = [span("a", "", 1), span("b", "a", 2), span("b", "a", 2)];
        let trace = Trace::of(spans.iter()).unwrap();
        trace
            .is_whole_with("", &[("a", 1), ("b", 1), ("c", 0)])
            .unwrap();
        assert_eq!(trace.children(trace.one("a")).count(), 1);
        assert!(trace.is_whole_with("", &[("b", 2)]).is_err());
        assert!(trace.is_whole("f").is_err(), "it begins nowhere else");
    }

    #[test]
    fn an_orphan_a_second_root_a_circle_and_an_early_child_are_seen() {
        let orphan = wrong(&[span("a", "", 1), span("b", "c", 2)]);
        assert!(orphan.starts_with("2 spans without a parent"), "{orphan}");
        let none = wrong(&[]);
        assert!(none.starts_with("0 spans without a parent"), "{none}");
        let circle = wrong(&[span("a", "", 1), span("b", "c", 2), span("c", "b", 2)]);
        assert!(circle.starts_with("`b` is part of itself"), "{circle}");
        let early = wrong(&[span("a", "", 5), span("b", "a", 4)]);
        assert!(early.starts_with("`b` begins before its parent"), "{early}");
    }

    #[test]
    fn two_different_spans_of_one_id_are_seen() {
        let mut other = span("b", "a", 2);
        other.name = "c".to_owned();
        let spans = [span("a", "", 1), span("b", "a", 2), other];
        assert!(Trace::of(spans.iter()).is_err());
    }
}
