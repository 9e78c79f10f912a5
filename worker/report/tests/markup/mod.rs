//! A strict reader of markup: every tag is closed in its order, every attribute is quoted and comes
//! once, every reference is known, every id is the only one, every link within the page leads somewhere.

use std::collections::BTreeSet;

/// Panics where the page is not well formed.
pub fn check(page: &str) {
    let rest = page
        .strip_prefix("<!DOCTYPE html>")
        .expect("a doctype comes first");
    let mut open: Vec<&str> = Vec::new();
    let mut ids = BTreeSet::new();
    let mut targets = BTreeSet::new();
    let mut at = 0;
    while let Some(start) = rest[at..].find('<') {
        text(&rest[at..at + start], &open);
        let tag_at = at + start;
        let end = rest[tag_at..].find('>').expect("a tag ends") + tag_at;
        let tag = &rest[tag_at + 1..end];
        at = end + 1;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(
                open.pop(),
                Some(name),
                "closed in another order near {tag_at}"
            );
            continue;
        }
        let (tag, alone) = tag
            .strip_suffix('/')
            .map_or((tag, false), |tag| (tag, true));
        let name = tag.split(' ').next().unwrap();
        assert!(
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric()),
            "`{name}` is no tag"
        );
        for (attribute, value) in attributes(&tag[name.len()..]) {
            references(value);
            match attribute {
                "id" => assert!(ids.insert(value), "the id `{value}` comes twice"),
                "href" => {
                    targets.insert(value.strip_prefix('#').expect("links stay on the page"));
                }
                "d" | "x" | "y" | "x1" | "x2" | "y1" | "y2" | "cx" | "cy" | "r" | "width"
                | "height" | "viewBox" => {
                    let known = |c: char| c.is_ascii_digit() || ".- MLHCZacz".contains(c);
                    assert!(
                        value.chars().all(known),
                        "{attribute}=\"{value}\" is no place"
                    );
                    let size = matches!(attribute, "width" | "height" | "r");
                    assert!(
                        !size || !value.starts_with('-'),
                        "{attribute}=\"{value}\" is negative"
                    );
                }
                _ => {}
            }
        }
        if !alone {
            open.push(name);
        }
    }
    text(&rest[at..], &open);
    assert!(open.is_empty(), "left open: {open:?}");
    assert!(
        targets.is_subset(&ids),
        "links that lead nowhere: {targets:?} {ids:?}"
    );
}

fn text(text: &str, open: &[&str]) {
    if open.last() == Some(&"style") {
        return;
    }
    assert!(!text.contains('>'), "a bare `>` in {text:?}");
    references(text);
    assert!(
        !text
            .chars()
            .any(|c| c.is_control() && c != '\n' && c != '\t'),
        "{text:?}"
    );
}

fn references(text: &str) {
    for part in text.split('&').skip(1) {
        let name = part.split_once(';').expect("a reference ends").0;
        assert!(
            matches!(name, "amp" | "lt" | "gt" | "quot" | "#39"),
            "`&{name};`"
        );
    }
}

fn attributes(mut text: &str) -> Vec<(&str, &str)> {
    let mut out: Vec<(&str, &str)> = Vec::new();
    while !text.is_empty() {
        text = text.strip_prefix(' ').expect("a blank before an attribute");
        let (name, rest) = text
            .split_once("=\"")
            .expect("an attribute has a quoted value");
        assert!(
            name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
            "`{name}`"
        );
        assert!(
            out.iter().all(|(known, _)| *known != name),
            "`{name}` comes twice"
        );
        let (value, rest) = rest.split_once('"').expect("a value ends");
        out.push((name, value));
        text = rest;
    }
    out
}
