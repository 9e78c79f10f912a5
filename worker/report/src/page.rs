//! The page as a whole: head, sections with their places in the table of contents, and the bound
//! on its size.

use crate::{html::Html, material::Material, sections};

/// The largest page. A section that would go over it is left out, and the page says so.
pub const MAX_PAGE_BYTES: usize = 2_000_000;
/// What may be written after the sections.
const RESERVE: usize = 4_000;
const STYLE: &str = include_str!("style.css");
/// Nothing may be loaded and nothing may run, whatever a text on the page says.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// Writes the page.
pub fn write(material: &Material<'_>) -> String {
    let sections = written(material);
    let mut html = Html::new();
    html.raw("<!DOCTYPE html>\n");
    html.element("html", &[("lang", &"en")], |h| {
        h.element("head", &[], |h| {
            h.empty("meta", &[("charset", &"utf-8")]);
            h.empty(
                "meta",
                &[
                    ("http-equiv", &"Content-Security-Policy"),
                    ("content", &POLICY),
                ],
            );
            h.empty(
                "meta",
                &[
                    ("name", &"viewport"),
                    ("content", &"width=device-width, initial-scale=1"),
                ],
            );
            h.empty(
                "meta",
                &[("name", &"color-scheme"), ("content", &"light dark")],
            );
            h.leaf("title", &[], format_args!("{} · Emberline", material.title));
            h.element("style", &[], |h| h.raw(STYLE));
        });
        h.element("body", &[], |h| {
            sections::headline::write(h, material);
            h.element("main", &[], |h| {
                sections::failure::write(h, material);
                contents(h, &sections);
                for section in &sections {
                    write_section(h, section);
                }
            });
            sections::lineage::footer(h, material);
        });
    });
    html.raw("\n");
    html.into_string()
}

fn contents(h: &mut Html, sections: &[(&'static sections::Section, Html)]) {
    if sections.len() < 2 {
        return;
    }
    h.element("nav", &[("aria-label", &"Sections")], |h| {
        for (section, _) in sections {
            let target = format!("#{}", section.id);
            h.leaf("a", &[("href", &target)], section.title);
        }
    });
}

/// The sections that have something to tell, as far as they fit.
fn written(material: &Material<'_>) -> Vec<(&'static sections::Section, Html)> {
    let mut budget = MAX_PAGE_BYTES - STYLE.len() - RESERVE;
    let mut head = Html::new();
    sections::headline::write(&mut head, material);
    sections::failure::write(&mut head, material);
    budget = budget.saturating_sub(head.len());
    let mut out = Vec::new();
    for section in &sections::ALL {
        let mut body = Html::new();
        (section.write)(&mut body, material);
        if body.is_empty() {
            continue;
        }
        if body.len() > budget {
            body = Html::new();
            body.paragraph(
                "muted",
                "Left out: with it this page would be larger than 2 MB. The artifacts of the run hold it all.",
            );
        }
        budget = budget.saturating_sub(body.len());
        out.push((section, body));
    }
    out
}

fn write_section(h: &mut Html, (section, body): &(&'static sections::Section, Html)) {
    h.element("section", &[("id", &section.id), ("class", &"card")], |h| {
        h.leaf("h2", &[], section.title);
        h.append(body);
    });
}
