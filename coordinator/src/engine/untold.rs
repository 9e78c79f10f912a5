//! What outside systems have to be told of: ended runs and deployments, by their ids.
//!
//! Each is noted in the commit that it came about in, with a mark that grows; what has changed again
//! gets a new mark. So whoever tells goes through the marks in order, and what changed while it was
//! being told is not taken for told.

use std::collections::BTreeMap;

use super::{Engine, api::Write, records::keys};

/// The subjects, in the order in which they are to be told.
#[derive(Debug, Default)]
pub(super) struct Untold {
    by_mark: BTreeMap<u64, String>,
    marks: BTreeMap<String, u64>,
    last: u64,
}

impl Untold {
    /// Puts it behind all others.
    pub(super) fn insert(&mut self, subject: String) {
        self.last += 1;
        if let Some(before) = self.marks.insert(subject.clone(), self.last) {
            self.by_mark.remove(&before);
        }
        self.by_mark.insert(self.last, subject);
    }

    /// Whether it was there.
    fn remove(&mut self, subject: &str) -> bool {
        let mark = self.marks.remove(subject);
        mark.is_some_and(|mark| self.by_mark.remove(&mark).is_some())
    }

    /// Takes out all up to this mark.
    fn remove_up_to(&mut self, mark: u64) -> Vec<String> {
        let later = self.by_mark.split_off(&(mark + 1));
        let told = std::mem::replace(&mut self.by_mark, later);
        let told: Vec<String> = told.into_values().collect();
        for subject in &told {
            self.marks.remove(subject);
        }
        told
    }
}

impl Engine {
    /// Notes that outside systems have to be told of something, if there are any.
    pub(super) fn untell(&mut self, subject: String) {
        if self.config.keep_untold {
            self.out.writes.push(Write::Put {
                key: keys::untold(&subject),
                value: b"{}".to_vec(),
            });
            self.untold.insert(subject);
        }
    }

    /// Outside systems have been told of all up to this mark.
    pub(super) fn told(&mut self, mark: u64) {
        for subject in self.untold.remove_up_to(mark) {
            let key = keys::untold(&subject);
            self.out.writes.push(Write::Delete { key });
        }
    }

    /// It is forgotten, so nothing can be told of it.
    pub(super) fn never_tell(&mut self, subject: &str) {
        if self.untold.remove(subject) {
            let key = keys::untold(subject);
            self.out.writes.push(Write::Delete { key });
        }
    }

    /// What outside systems have to be told of, or may not have been: ended runs by their id, and
    /// deployments by theirs; those with a later mark than this one, each with its own.
    pub fn untold(&self, after: u64) -> impl Iterator<Item = (u64, &str)> {
        let later = self.untold.by_mark.range(after.saturating_add(1)..);
        later.map(|(mark, subject)| (*mark, subject.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_again_is_not_told_with_what_came_before_it() {
        let mut untold = Untold::default();
        for subject in ["d1", "r", "d1"] {
            untold.insert(subject.to_owned());
        }
        assert_eq!(untold.remove_up_to(2), ["r"]);
        assert_eq!(untold.remove_up_to(3), ["d1"]);
        assert!(!untold.remove("d1"));
    }
}
