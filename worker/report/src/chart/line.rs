//! Curves: learning curves, ROC, precision and recall.

use super::{Figure, Plot, colour, label, stroke, thin, ticks::Scale};
use crate::{
    format::number,
    html::{Attributes, Html, Px, cut},
};

/// The most points of a curve that are drawn.
const MAX_POINTS: usize = 400;
/// The most places that show their values under the pointer.
const MAX_BANDS: usize = 120;

/// One curve.
pub struct Series<'a> {
    /// Its name in the legend.
    pub name: &'a str,
    /// In the order of `x`.
    pub points: Vec<[f64; 2]>,
}

/// What the axes run over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axes {
    /// Epochs across (whole numbers from 1), anything up.
    Epochs,
    /// From 0 to 1 both ways.
    Shares,
}

/// A point that stands out.
pub struct Mark {
    /// Where.
    pub at: [f64; 2],
    /// What it is.
    pub label: String,
}

/// A chart of curves.
pub struct Lines<'a> {
    /// The heading.
    pub title: &'a str,
    /// What is to be seen.
    pub description: String,
    /// What the axes run over.
    pub axes: Axes,
    /// The names of the axes: across, up.
    pub names: [&'a str; 2],
    /// The curves.
    pub series: Vec<Series<'a>>,
    /// A point that stands out; for epochs, the whole epoch does.
    pub mark: Option<Mark>,
    /// A dashed line between two points, to compare with.
    pub guide: Option<[[f64; 2]; 2]>,
    /// Fill below the first curve.
    pub filled: bool,
}

impl Lines<'_> {
    /// Writes it.
    pub fn write(&self, h: &mut Html) {
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        let plot = match self.axes {
            Axes::Epochs => Plot {
                width: 540.0,
                height: 300.0,
                x: Scale::whole(points().map(|p| p[0]), 8),
                y: Scale::of(points().map(|p| p[1]), 5),
            },
            Axes::Shares => Plot {
                width: 420.0,
                height: 390.0,
                x: Scale::of([0.0, 1.0], 5),
                y: Scale::of([0.0, 1.0], 5),
            },
        };
        let names = self.series.iter().enumerate();
        let legend: Vec<(&'static str, String)> = names
            .filter(|_| self.series.len() > 1)
            .map(|(i, series)| (colour(i), series.name.to_owned()))
            .collect();
        let figure = Figure {
            title: self.title,
            description: &self.description,
            width: plot.width,
            height: plot.height,
            legend: &legend,
        };
        figure.write(h, "chart", |h| self.draw(h, &plot));
    }

    fn draw(&self, h: &mut Html, plot: &Plot) {
        plot.axes(h, self.names[0], self.names[1]);
        if let Some([from, to]) = self.guide {
            let place = |p: [f64; 2]| (plot.at_x(p[0]), plot.at_y(p[1]));
            stroke(h, "guide", place(from), place(to));
        }
        if let Some(mark) = self.mark.as_ref().filter(|_| self.axes == Axes::Epochs) {
            let x = plot.at_x(mark.at[0]);
            stroke(h, "mark", (x, plot.top()), (x, plot.bottom()));
            let (_, right) = plot.sides();
            // On the side where there is room.
            let (x, anchor) = if x > right - 90.0 {
                (x - 6.0, "end")
            } else {
                (x + 6.0, "start")
            };
            label(h, x, plot.top() + 8.0, anchor, &cut(&mark.label, 40));
        }
        for (i, series) in self.series.iter().enumerate() {
            self.curve(h, plot, i, series);
        }
        if let Some(mark) = self.mark.as_ref().filter(|_| self.axes == Axes::Shares) {
            let (x, y) = (plot.at_x(mark.at[0]), plot.at_y(mark.at[1]));
            let attributes: Attributes<'_> = &[
                ("class", &"spot"),
                ("cx", &Px(x)),
                ("cy", &Px(y)),
                ("r", &"5"),
            ];
            h.empty("circle", attributes);
            let (x, anchor) = if mark.at[0] > 0.55 {
                (x - 10.0, "end")
            } else {
                (x + 10.0, "start")
            };
            let y = if mark.at[1] > 0.8 { y + 18.0 } else { y - 8.0 };
            label(h, x, y, anchor, &cut(&mark.label, 40));
        }
        self.bands(h, plot);
    }

    fn curve(&self, h: &mut Html, plot: &Plot, number: usize, series: &Series<'_>) {
        let points = thin(&series.points, MAX_POINTS);
        let finite: Vec<&[f64; 2]> = points
            .iter()
            .filter(|p| p.iter().all(|v| v.is_finite()))
            .collect();
        if let [only] = finite[..] {
            let class = format!("dot {}", colour(number));
            let (x, y) = (plot.at_x(only[0]), plot.at_y(only[1]));
            h.empty(
                "circle",
                &[
                    ("class", &class),
                    ("cx", &Px(x)),
                    ("cy", &Px(y)),
                    ("r", &"4"),
                ],
            );
            return;
        }
        let (Some(first), Some(last)) = (finite.first(), finite.last()) else {
            return;
        };
        let path = plot.path(&points);
        if self.filled && number == 0 && finite.len() == points.len() {
            let floor = Px(plot.bottom());
            let area = format!(
                "{path}L{} {floor}L{} {floor}Z",
                Px(plot.at_x(last[0])),
                Px(plot.at_x(first[0]))
            );
            h.empty("path", &[("class", &"area"), ("d", &area)]);
        }
        let class = format!("line {}", colour(number));
        h.empty("path", &[("class", &class), ("d", &path)]);
    }

    /// Strips that show the values at their place under the pointer.
    fn bands(&self, h: &mut Html, plot: &Plot) {
        let Some(longest) = self.series.iter().max_by_key(|series| series.points.len()) else {
            return;
        };
        if self.axes == Axes::Shares || longest.points.len() > MAX_BANDS {
            return;
        }
        let (left, right) = plot.sides();
        let width = ((right - left) / longest.points.len().max(1) as f64).max(2.0);
        for [at, _] in longest.points.iter().filter(|p| p[0].is_finite()) {
            h.element("g", &[("class", &"band")], |h| {
                let mut text = format!("{} {}", self.names[0], number(*at));
                for series in &self.series {
                    if let Some([_, y]) = series.points.iter().find(|p| p[0] == *at) {
                        text.push_str(&format!("\n{} {}", cut(series.name, 60), number(*y)));
                    }
                }
                h.leaf("title", &[], text);
                let x = plot.at_x(*at);
                let attributes: Attributes<'_> = &[
                    ("x", &Px(x - width / 2.0)),
                    ("y", &Px(plot.top())),
                    ("width", &Px(width)),
                    ("height", &Px(plot.bottom() - plot.top())),
                ];
                h.empty("rect", attributes);
                stroke(h, "now", (x, plot.top()), (x, plot.bottom()));
            });
        }
    }
}
