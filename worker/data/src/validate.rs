//! The stage kind `validate`: a table against rules, and against a reference for drift. What it found
//! is written whether the rules hold or not.

use emberline_common::{
    ids::{ArtifactName, StageKind},
    spec::{
        ArtifactType,
        kinds::{BuiltinKind, ValidateSpec, validate::OnRuleFailure},
    },
};
use emberline_worker::{
    documents::{RuleFailure, TableSummary, VALIDATION_FILE, Validation},
    stage::{Produced, ProducedContent, Stage, StageContext, StageError, StageOutput},
};
use serde_json::Map;

use crate::{
    rules::Checker,
    table::{Table, TableReader},
    write::Summary,
};

/// Failed rules that the one line of the error names.
const NAMED_FAILURES: usize = 3;

/// `validate`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Validate;

impl Stage for Validate {
    fn kind(&self) -> StageKind {
        BuiltinKind::Validate.into()
    }

    fn version(&self) -> u32 {
        BuiltinKind::Validate.version()
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: ValidateSpec = ctx.spec()?;
        let input = ctx.input("data")?;
        let reference = ctx.optional_input("reference")?;
        if spec.drift.is_some() && reference.is_none() {
            return Err(StageError::user(
                "`drift` needs the input `reference`: add it under `inputs`",
            ));
        }
        ctx.check_cancelled()?;
        let summary = summarise(TableReader::open(input)?, ctx)?;
        let table = Table::read(input)?;
        let mut checker = Checker::check(&table, &spec);
        ctx.check_cancelled()?;
        if let (Some(drift), Some(reference)) = (&spec.drift, reference) {
            checker.drift(&Table::read(reference)?, drift);
        }
        ctx.check_cancelled()?;
        let found = checker.finish();
        let validation = Validation {
            passed: found.failures.is_empty(),
            rows: table.rows as u64,
            rules_passed: found.passed,
            failures: found.failures,
            drift: found.drift,
            table: summary,
        };
        finish(&validation, &spec, ctx)
    }
}

fn summarise(reader: TableReader, ctx: &StageContext) -> Result<TableSummary, StageError> {
    let mut summary = Summary::new(reader.schema());
    for batch in reader {
        ctx.check_cancelled()?;
        summary.add(&batch?);
    }
    Ok(summary.finish())
}

fn finish(
    validation: &Validation,
    spec: &ValidateSpec,
    ctx: &StageContext,
) -> Result<StageOutput, StageError> {
    let name = ArtifactName::new("validation")
        .map_err(|e| StageError::system(format!("`validation`: {e}")))?;
    let dir = ctx.output_dir(&name)?;
    let path = dir.join(VALIDATION_FILE);
    let json = serde_json::to_vec_pretty(validation)
        .map_err(|e| StageError::system(format!("cannot write the validation as JSON: {e}")))?;
    std::fs::write(&path, json).map_err(|e| StageError::io("write", &path, e))?;
    let failed = validation.failures.len() as u64;
    let rules = validation.rules_passed + failed;
    for failure in &validation.failures {
        ctx.log(format!(
            "rule `{}` failed: {}",
            failure.rule, failure.message
        ));
    }
    for drift in &validation.drift {
        ctx.log(format!("drift of `{}`: PSI {:.4}", drift.column, drift.psi));
    }
    ctx.log(format!("{} of {rules} rules hold", validation.rules_passed));
    let mut metadata = Map::new();
    metadata.insert("passed".to_owned(), validation.passed.into());
    metadata.insert("rows".to_owned(), validation.rows.into());
    metadata.insert("rules_failed".to_owned(), failed.into());
    let produced = Produced {
        name,
        content: ProducedContent::Directory {
            dir,
            artifact_type: ArtifactType::Validation,
            metadata,
        },
    };
    if !validation.passed && spec.on_failure == OnRuleFailure::Fail {
        let message = in_one_line(&validation.failures, rules);
        return Err(StageError::data(message).with_outputs(vec![produced]));
    }
    let mut out = StageOutput {
        artifacts: vec![produced],
        ..StageOutput::default()
    };
    let results = &mut out.results;
    results.insert("passed".to_owned(), validation.passed.into());
    results.insert("rows".to_owned(), validation.rows.into());
    results.insert("rules".to_owned(), rules.into());
    results.insert("rules_failed".to_owned(), failed.into());
    if let Some(psi) = validation.drift.iter().map(|d| d.psi).reduce(f64::max) {
        results.insert("max_psi".to_owned(), psi.into());
    }
    Ok(out)
}

fn in_one_line(failures: &[RuleFailure], rules: u64) -> String {
    let named: Vec<String> = failures
        .iter()
        .take(NAMED_FAILURES)
        .map(|f| f.message.replace(['\n', '\r'], " "))
        .collect();
    let more = match failures.len().saturating_sub(NAMED_FAILURES) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let (failed, named) = (failures.len(), named.join("; "));
    format!("{failed} of {rules} rules failed: {named}{more}")
}
