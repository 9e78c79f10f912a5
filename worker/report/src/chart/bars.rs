//! Bars in a line of text, as small drawings in the cells of tables.

use super::ticks::Scale;
use crate::html::{Attributes, Html, Px};

const WIDTH: f64 = 120.0;
const HEIGHT: f64 = 14.0;

fn small(h: &mut Html, what: &str, draw: impl FnOnce(&mut Html)) {
    let view = format!("0 0 {} {}", Px(WIDTH), Px(HEIGHT));
    let attributes: Attributes<'_> = &[
        ("class", &"bar"),
        ("role", &"img"),
        ("viewBox", &view),
        ("width", &Px(WIDTH)),
        ("height", &Px(HEIGHT)),
    ];
    h.element("svg", attributes, |h| {
        h.leaf("title", &[], what);
        draw(h);
    });
}

fn rect(h: &mut Html, class: &str, from: f64, to: f64) {
    let attributes: Attributes<'_> = &[
        ("class", &class),
        ("x", &Px(from)),
        ("y", &"4"),
        ("width", &Px((to - from).max(1.5))),
        ("height", &"6"),
        ("rx", &"3"),
    ];
    h.empty("rect", attributes);
}

/// The range of a column within `whole`, with its mean.
pub fn range(
    h: &mut Html,
    whole: [f64; 2],
    (low, high): (f64, f64),
    mean: Option<f64>,
    what: &str,
) {
    let scale = Scale::exactly(whole, 2);
    let place = |value: f64| scale.share(value) * (WIDTH - 4.0) + 2.0;
    small(h, what, |h| {
        rect(h, "track", 0.0, WIDTH);
        rect(h, "fill", place(low), place(high));
        if let Some(mean) = mean.filter(|mean| mean.is_finite()) {
            let x = Px(place(mean));
            h.empty(
                "circle",
                &[("class", &"mean"), ("cx", &x), ("cy", &"7"), ("r", &"4")],
            );
        }
    });
}

/// A value from 0 to `most`, with a line at `limit`.
pub fn amount(h: &mut Html, value: f64, most: f64, limit: Option<f64>, bad: bool, what: &str) {
    let scale = Scale::exactly([0.0, most], 2);
    let place = |value: f64| scale.share(value) * WIDTH;
    small(h, what, |h| {
        rect(h, "track", 0.0, WIDTH);
        if value.is_finite() {
            rect(h, if bad { "fill over" } else { "fill" }, 0.0, place(value));
        }
        if let Some(limit) = limit {
            super::stroke(
                h,
                "limit",
                (place(limit), 1.0),
                (place(limit), HEIGHT - 1.0),
            );
        }
    });
}
