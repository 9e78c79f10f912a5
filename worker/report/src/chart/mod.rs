//! Charts as inline SVG: [`line`] curves, [`scatter`] points and their histogram, [`heat`] maps, and
//! bars in a line of text. [`Plot`] is the frame that they share: axes, ticks and places.
//!
//! Whatever the values are, the drawing is well formed: what is not finite is not drawn, and an
//! empty series gives an empty plot.

pub mod bars;
pub mod heat;
pub mod line;
pub mod scatter;
pub mod ticks;

use ticks::Scale;

use crate::html::{Attributes, Html, Px, cut};

/// Colours of series: as many as can be told apart.
pub const SERIES: [&str; 6] = ["s1", "s2", "s3", "s4", "s5", "s6"];

/// The colour of the series of that number.
pub fn colour(series: usize) -> &'static str {
    SERIES[series % SERIES.len()]
}

/// A drawing with its heading and its legend (class and name of each entry).
pub struct Figure<'a> {
    /// The heading.
    pub title: &'a str,
    /// What is to be seen, for those who cannot see it.
    pub description: &'a str,
    /// Width in units of the drawing.
    pub width: f64,
    /// Height in units of the drawing.
    pub height: f64,
    /// Class and name of each entry.
    pub legend: &'a [(&'static str, String)],
}

impl Figure<'_> {
    /// Writes it.
    pub fn write(&self, h: &mut Html, class: &'static str, draw: impl FnOnce(&mut Html)) {
        h.element("figure", &[("class", &class)], |h| {
            h.leaf("figcaption", &[], self.title);
            svg(
                h,
                self.title,
                self.description,
                self.width,
                self.height,
                draw,
            );
            if self.legend.is_empty() {
                return;
            }
            h.element("ul", &[("class", &"legend")], |h| {
                for (class, name) in self.legend {
                    h.element("li", &[], |h| {
                        let class = format!("key {class}");
                        h.leaf("span", &[("class", &class), ("aria-hidden", &"true")], "");
                        h.text(cut(name, 60));
                    });
                }
            });
        });
    }
}

/// Writes a drawing that tells what it shows.
pub fn svg(
    h: &mut Html,
    title: &str,
    description: &str,
    width: f64,
    height: f64,
    draw: impl FnOnce(&mut Html),
) {
    let view = format!("0 0 {} {}", Px(width), Px(height));
    let attributes: Attributes<'_> = &[
        ("role", &"img"),
        ("viewBox", &view),
        ("width", &Px(width)),
        ("height", &Px(height)),
    ];
    h.element("svg", attributes, |h| {
        h.leaf("title", &[], title);
        h.leaf("desc", &[], description);
        draw(h);
    });
}

/// A text in a drawing; `anchor` is `start`, `middle` or `end`.
pub fn label(h: &mut Html, x: f64, y: f64, anchor: &'static str, text: &str) {
    let attributes: Attributes<'_> = &[("x", &Px(x)), ("y", &Px(y)), ("text-anchor", &anchor)];
    h.leaf("text", attributes, text);
}

/// A straight line of a class.
pub fn stroke(h: &mut Html, class: &'static str, from: (f64, f64), to: (f64, f64)) {
    let attributes: Attributes<'_> = &[
        ("class", &class),
        ("x1", &Px(from.0)),
        ("y1", &Px(from.1)),
        ("x2", &Px(to.0)),
        ("y2", &Px(to.1)),
    ];
    h.empty("line", attributes);
}

/// Two axes and the field between them.
pub struct Plot {
    /// Width of the whole drawing.
    pub width: f64,
    /// Height of the whole drawing.
    pub height: f64,
    /// Across.
    pub x: Scale,
    /// Up.
    pub y: Scale,
}

impl Plot {
    const LEFT: f64 = 58.0;
    const RIGHT: f64 = 16.0;
    const TOP: f64 = 14.0;
    const BOTTOM: f64 = 42.0;

    /// The place of a value across.
    pub fn at_x(&self, value: f64) -> f64 {
        Self::LEFT + self.x.share(value) * (self.width - Self::LEFT - Self::RIGHT)
    }

    /// The place of a value up.
    pub fn at_y(&self, value: f64) -> f64 {
        self.bottom() - self.y.share(value) * (self.bottom() - Self::TOP)
    }

    /// The place of the field's upper edge.
    pub const fn top(&self) -> f64 {
        Self::TOP
    }

    /// The place of the field's lower edge.
    pub fn bottom(&self) -> f64 {
        self.height - Self::BOTTOM
    }

    /// The places of the field's left and right edges.
    pub fn sides(&self) -> (f64, f64) {
        (Self::LEFT, self.width - Self::RIGHT)
    }

    /// Draws the axes with their ticks and names.
    pub fn axes(&self, h: &mut Html, x_name: &str, y_name: &str) {
        let (left, right) = self.sides();
        for tick in &self.y.ticks {
            let y = self.at_y(*tick);
            stroke(h, "grid", (left, y), (right, y));
            label(h, left - 8.0, y + 4.0, "end", &self.y.label(*tick));
        }
        for tick in &self.x.ticks {
            let x = self.at_x(*tick);
            stroke(h, "axis", (x, self.bottom()), (x, self.bottom() + 4.0));
            label(h, x, self.bottom() + 17.0, "middle", &self.x.label(*tick));
        }
        stroke(h, "axis", (left, self.bottom()), (right, self.bottom()));
        label(
            h,
            f64::midpoint(left, right),
            self.height - 6.0,
            "middle",
            x_name,
        );
        let (x, y) = (12.0, f64::midpoint(Self::TOP, self.bottom()));
        let turn = format!("rotate(-90 {} {})", Px(x), Px(y));
        let attributes: Attributes<'_> = &[
            ("x", &Px(x)),
            ("y", &Px(y)),
            ("text-anchor", &"middle"),
            ("transform", &turn),
        ];
        h.leaf("text", attributes, y_name);
    }

    /// The path through these points; a point that is not finite breaks it.
    pub fn path(&self, points: &[[f64; 2]]) -> String {
        let mut path = String::new();
        let mut down = false;
        for [x, y] in points {
            if !x.is_finite() || !y.is_finite() {
                down = false;
                continue;
            }
            let step = if down { 'L' } else { 'M' };
            path.push_str(&format!(
                "{step}{} {}",
                Px(self.at_x(*x)),
                Px(self.at_y(*y))
            ));
            down = true;
        }
        path
    }
}

/// At most `most` of these, evenly spread, the last one among them.
pub fn thin<T: Copy>(all: &[T], most: usize) -> Vec<T> {
    if all.len() <= most || most < 2 {
        return all.to_vec();
    }
    (0..most)
        .map(|i| all[i * (all.len() - 1) / (most - 1)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_both_ends() {
        let all: Vec<usize> = (0..1001).collect();
        let few = thin(&all, 5);
        assert_eq!(few, [0, 250, 500, 750, 1000]);
        assert_eq!(thin(&all, 2000).len(), 1001);
    }

    #[test]
    fn a_path_is_broken_where_a_point_is_missing() {
        let unit = || Scale::of([0.0, 1.0], 2);
        let plot = Plot {
            width: 174.0,
            height: 156.0,
            x: unit(),
            y: unit(),
        };
        let path = plot.path(&[[0.0, 0.0], [0.5, f64::NAN], [1.0, 1.0], [1.0, 0.0]]);
        assert_eq!(path, "M58 114M158 14L158 114");
    }
}
