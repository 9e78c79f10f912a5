//! Truth against prediction, and how the errors are spread.

use super::{Figure, Plot, stroke, thin, ticks::Scale};
use crate::{
    format::{count, number, plural},
    html::{Attributes, Html, Px},
};

/// The most points that are drawn.
const MAX_POINTS: usize = 1000;
/// Bars of the histogram.
const BINS: usize = 24;

/// Points of truth (across) and prediction (up) around the line where both are the same.
pub fn truth_and_prediction(h: &mut Html, points: &[[f64; 2]]) {
    let points = thin(points, MAX_POINTS);
    let finite = || points.iter().filter(|p| p.iter().all(|v| v.is_finite()));
    let scale = Scale::of(finite().flatten().copied(), 5);
    let plot = Plot {
        width: 420.0,
        height: 390.0,
        x: scale.clone(),
        y: scale,
    };
    let description = format!(
        "{} of the test part; on the dashed line the prediction is the truth.",
        plural(finite().count() as u64, "row")
    );
    let figure = Figure {
        title: "Truth and prediction",
        description: &description,
        width: plot.width,
        height: plot.height,
        legend: &[],
    };
    figure.write(h, "chart", |h| {
        plot.axes(h, "truth", "prediction");
        let ends = [plot.x.low, plot.x.high].map(|end| (plot.at_x(end), plot.at_y(end)));
        stroke(h, "guide", ends[0], ends[1]);
        h.element("g", &[("class", &"cloud")], |h| {
            for [x, y] in finite() {
                let (x, y) = (Px(plot.at_x(*x)), Px(plot.at_y(*y)));
                h.empty("circle", &[("cx", &x), ("cy", &y), ("r", &"2.5")]);
            }
        });
    });
}

/// How often the prediction is off by how much.
pub fn errors(h: &mut Html, points: &[[f64; 2]]) {
    let errors: Vec<f64> = points
        .iter()
        .map(|[t, p]| p - t)
        .filter(|e| e.is_finite())
        .collect();
    if errors.is_empty() {
        return;
    }
    let x = Scale::of(errors.iter().copied().chain([0.0]), 6);
    let mut bins = [0u64; BINS];
    for error in &errors {
        let bin = (x.share(*error) * BINS as f64) as usize;
        bins[bin.min(BINS - 1)] += 1;
    }
    let most = bins.iter().copied().max().unwrap_or(1);
    let plot = Plot {
        width: 420.0,
        height: 390.0,
        y: Scale::of([0.0, most as f64], 5),
        x,
    };
    let figure = Figure {
        title: "Errors",
        description: "How many rows are predicted too low (left) or too high (right), and by how much.",
        width: plot.width,
        height: plot.height,
        legend: &[],
    };
    figure.write(h, "chart", |h| {
        plot.axes(h, "prediction - truth", "rows");
        let span = plot.x.high - plot.x.low;
        let edge = |i: usize| plot.x.low + span * (i as f64 / BINS as f64);
        for (i, rows) in bins.iter().enumerate().filter(|(_, rows)| **rows > 0) {
            let (from, to) = (plot.at_x(edge(i)), plot.at_x(edge(i + 1)));
            let top = plot.at_y(*rows as f64);
            let attributes: Attributes<'_> = &[
                ("class", &"bin"),
                ("x", &Px(from + 0.75)),
                ("y", &Px(top)),
                ("width", &Px(to - from - 1.5)),
                ("height", &Px(plot.bottom() - top)),
            ];
            h.element("rect", attributes, |h| {
                let (from, to) = (number(edge(i)), number(edge(i + 1)));
                h.leaf(
                    "title",
                    &[],
                    format_args!("{from} to {to}: {}", count(*rows)),
                );
            });
        }
        let zero = plot.at_x(0.0);
        stroke(h, "guide", (zero, plot.top()), (zero, plot.bottom()));
    });
}
