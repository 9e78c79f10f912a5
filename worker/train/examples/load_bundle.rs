//! Loads a bundle, as `emberline models export` writes it, and predicts the rows of a CSV file.
//!
//! ```text
//! cargo run --release -p emberline-train --example load_bundle -- m-1.bundle rows.csv
//! ```
//!
//! The file has a column for each input of the model, by name and in any order; see `schema.json`.

use std::{error::Error, path::Path};

use emberline_data::table::{Column, ColumnValues, Table};
use emberline_train::{Bundle, Model, model::Predictions};
use emberline_worker::documents::ModelInput;

/// The columns that a model takes, from a CSV file.
pub fn read_csv(path: &Path, inputs: &[ModelInput]) -> Result<Table, Box<dyn Error>> {
    let mut file = csv::Reader::from_path(path)?;
    let head = file.headers()?.clone();
    let rows = file.records().collect::<Result<Vec<_>, _>>()?;
    let mut columns = Vec::new();
    for input in inputs {
        let at = head.iter().position(|name| name == input.name);
        let at = at.ok_or_else(|| format!("there is no column `{}`", input.name))?;
        let cells = rows.iter().map(|row| &row[at]);
        let values = match input.column_type.as_str() {
            "text" => ColumnValues::Text(cells.map(Some).collect()),
            "float" | "integer" => {
                let numbers = cells.map(|cell| cell.trim().parse().map(Some));
                ColumnValues::Float(numbers.collect::<Result<_, std::num::ParseFloatError>>()?)
            }
            other => return Err(format!("`{}` is {other}, not for CSV", input.name).into()),
        };
        columns.push(Column {
            name: input.name.clone(),
            values,
        });
    }
    Ok(Table {
        rows: rows.len(),
        columns,
    })
}

/// One line for each row: the classes with their probabilities, or the value.
pub fn predict(model: &Model, table: &Table) -> Result<Vec<String>, Box<dyn Error>> {
    Ok(match model.predict(table)?.predictions {
        Predictions::Values(values) => values.iter().map(f64::to_string).collect(),
        Predictions::Probabilities { classes, values } => {
            let names = &model.document().classes;
            let rows = values.chunks(classes).map(|row| {
                let told = names.iter().zip(row).map(|(name, p)| format!("{name} {p}"));
                told.collect::<Vec<_>>().join("  ")
            });
            rows.collect()
        }
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [bundle, rows] = arguments.as_slice() else {
        return Err("usage: load_bundle BUNDLE ROWS.csv".into());
    };
    // Checked as a whole before anything is loaded; nothing is unpacked.
    let bundle = Bundle::open(Path::new(bundle))?;
    let model = bundle.model()?;
    eprintln!(
        "{} version {}",
        bundle.about().model,
        bundle.about().version
    );
    let table = read_csv(Path::new(rows), &model.document().inputs)?;
    for line in predict(&model, &table)? {
        println!("{line}");
    }
    Ok(())
}
