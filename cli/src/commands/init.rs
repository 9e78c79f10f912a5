//! `init`: a starter pipeline that runs as it is.

use std::path::Path;

use crate::{args::Template, exit::Exit, output};

const TABULAR: &[(&str, &str)] = &[
    (
        "pipeline.yaml",
        include_str!("../../templates/tabular.yaml"),
    ),
    ("data.csv", include_str!("../../templates/pumps.csv")),
];
const EXEC: &[(&str, &str)] = &[
    ("pipeline.yaml", include_str!("../../templates/exec.yaml")),
    ("count.sh", include_str!("../../templates/count.sh")),
];

/// Writes it; what is there already is never overwritten.
pub fn init(directory: &Path, template: Template, quiet: bool) -> anyhow::Result<()> {
    let files = match template {
        Template::Tabular => TABULAR,
        Template::Exec => EXEC,
    };
    for (name, _) in files {
        let path = directory.join(name);
        if path.exists() {
            return Err(Exit::input(format!(
                "`{}` exists already; nothing was written",
                path.display()
            ))
            .into());
        }
    }
    std::fs::create_dir_all(directory).map_err(|e| {
        Exit::input(format!(
            "cannot make the directory `{}`: {e}",
            directory.display()
        ))
    })?;
    for (name, content) in files {
        let path = directory.join(name);
        std::fs::write(&path, content)
            .map_err(|e| Exit::input(format!("cannot write `{}`: {e}", path.display())))?;
        if !quiet {
            output::line(format!("wrote {}", path.display()))?;
        }
    }
    if !quiet {
        output::line(format!(
            "next: emberline run {}",
            directory.join("pipeline.yaml").display()
        ))?;
    }
    Ok(())
}
