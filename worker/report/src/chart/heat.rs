//! A confusion matrix as a heat map: what is right in one colour, what is wrong in another, each the
//! stronger the larger its share of the row.

use super::{Figure, label};
use crate::{
    format::{count, percent, plural},
    html::{Attributes, Html, Px, cut},
};

/// The most classes that are drawn.
pub const MAX_CLASSES: usize = 50;
/// Up to this many classes the counts stand in the cells.
const MAX_NUMBERED: usize = 16;

/// Draws `matrix[truth][prediction]`. Rows and columns beyond the number of classes are left out, missing
/// ones count as 0.
pub fn confusion(h: &mut Html, title: &str, classes: &[String], matrix: &[Vec<u64>]) {
    let size = classes.len().min(MAX_CLASSES);
    if size == 0 {
        return;
    }
    let cell = (480.0 / size as f64).clamp(11.0, 104.0);
    let names: Vec<String> = classes[..size].iter().map(|class| cut(class, 14)).collect();
    let longest = names
        .iter()
        .map(|name| name.chars().count())
        .max()
        .unwrap_or(0) as f64;
    let left = 26.0 + longest * 7.0;
    // Names above the columns are turned where they would run into each other.
    let turned = longest * 7.0 + 6.0 > cell;
    let top = if turned { 30.0 + longest * 7.0 } else { 42.0 };
    let side = cell * size as f64;
    let right_now: u64 = (0..size).map(|i| at(matrix, i, i)).sum();
    let total: u64 = matrix.iter().flatten().sum();
    let description = format!(
        "{} of {} predicted right. Rows are the truth, columns the prediction.",
        count(right_now),
        plural(total, "row")
    );
    let figure = Figure {
        title,
        description: &description,
        width: left + side + 12.0,
        height: top + side + 8.0,
        legend: &[
            ("hit", "right".to_owned()),
            (
                "miss",
                "wrong; stronger: a larger share of the true class".to_owned(),
            ),
        ],
    };
    figure.write(h, "chart heat", |h| {
        label(h, left + side / 2.0, 14.0, "middle", "predicted");
        let middle = top + side / 2.0;
        let turn = format!("rotate(-90 12 {})", Px(middle));
        let attributes: Attributes<'_> = &[
            ("x", &"12"),
            ("y", &Px(middle)),
            ("text-anchor", &"middle"),
            ("transform", &turn),
        ];
        h.leaf("text", attributes, "truth");
        for (i, name) in names.iter().enumerate() {
            let place = (i as f64 + 0.5) * cell;
            // Where rows are lower than a line of text, every second name or so is enough.
            let every = (12.0 / cell).ceil().max(1.0) as usize;
            if i % every != 0 {
                continue;
            }
            label(h, left - 8.0, top + place + 4.0, "end", name);
            if turned {
                let (x, y) = (left + place + 4.0, top - 8.0);
                let turn = format!("rotate(-90 {} {})", Px(x), Px(y));
                h.leaf(
                    "text",
                    &[("x", &Px(x)), ("y", &Px(y)), ("transform", &turn)],
                    name,
                );
            } else {
                label(h, left + place, top - 10.0, "middle", name);
            }
        }
        for truth in 0..size {
            row(h, classes, matrix, truth, size, (left, top, cell));
        }
    });
}

fn at(matrix: &[Vec<u64>], truth: usize, predicted: usize) -> u64 {
    matrix
        .get(truth)
        .and_then(|row| row.get(predicted))
        .copied()
        .unwrap_or(0)
}

fn row(
    h: &mut Html,
    classes: &[String],
    matrix: &[Vec<u64>],
    truth: usize,
    size: usize,
    (left, top, cell): (f64, f64, f64),
) {
    let whole: u64 = matrix.get(truth).map_or(0, |row| row.iter().sum());
    let y = top + truth as f64 * cell;
    // Empty cells of large matrices are one rectangle, not thousands.
    let side = cell * size as f64;
    let attributes: Attributes<'_> = &[
        ("class", &"none"),
        ("x", &Px(left)),
        ("y", &Px(y + 0.75)),
        ("width", &Px(side - 1.5)),
        ("height", &Px(cell - 1.5)),
        ("rx", &"2"),
    ];
    h.empty("rect", attributes);
    for predicted in 0..size {
        let rows = at(matrix, truth, predicted);
        if rows == 0 && size > MAX_NUMBERED {
            continue;
        }
        let share = rows as f64 / whole.max(1) as f64;
        // The root shows rare confusions too.
        let strength = if rows == 0 {
            0.0
        } else {
            0.12 + 0.88 * share.sqrt()
        };
        let x = left + predicted as f64 * cell;
        h.element("g", &[], |h| {
            h.leaf(
                "title",
                &[],
                format_args!(
                    "truth {}, predicted {}: {} ({} of the class)",
                    cut(&classes[truth], 60),
                    cut(&classes[predicted], 60),
                    plural(rows, "row"),
                    percent(rows as f64, whole as f64)
                ),
            );
            let class = if truth == predicted { "hit" } else { "miss" };
            let attributes: Attributes<'_> = &[
                ("class", &class),
                ("x", &Px(x)),
                ("y", &Px(y + 0.75)),
                ("width", &Px(cell - 1.5)),
                ("height", &Px(cell - 1.5)),
                ("rx", &"2"),
                ("fill-opacity", &Px(strength)),
            ];
            h.empty("rect", attributes);
            if size <= MAX_NUMBERED {
                numbers(
                    h,
                    rows,
                    whole,
                    (x + cell / 2.0, y + cell / 2.0),
                    cell,
                    strength,
                );
            }
        });
    }
}

/// The count in its cell, and its share where there is room.
fn numbers(h: &mut Html, rows: u64, whole: u64, (x, y): (f64, f64), cell: f64, strength: f64) {
    let class = if strength > 0.6 {
        "inside strong"
    } else {
        "inside"
    };
    let roomy = cell > 70.0;
    let attributes: Attributes<'_> = &[
        ("class", &class),
        ("x", &Px(x)),
        ("y", &Px(if roomy { y } else { y + 4.0 })),
        ("text-anchor", &"middle"),
    ];
    h.leaf("text", attributes, count(rows));
    if roomy {
        let class = format!("{class} small");
        let attributes: Attributes<'_> = &[
            ("class", &class),
            ("x", &Px(x)),
            ("y", &Px(y + 18.0)),
            ("text-anchor", &"middle"),
        ];
        h.leaf("text", attributes, percent(rows as f64, whole as f64));
    }
}
