//! What no schema can say of a pipeline: names that must exist, types that must fit, cycles, gates,
//! limits. It works on the tree, so that it can speak of a file that has other mistakes too.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::{
    ArtifactType, OutputRef,
    check::{Finding, join},
    condition::{Condition, Gate},
    kinds::{BuiltinKind, evaluate::METRICS, exec::check_secret_variable},
    signature::{InputSlot, kind_signature},
    suggest::nearest,
    yaml::{Node, Position},
};
use crate::{artifact::check_path, ids::is_name};

/// Tasks of one stage, at most.
pub const MAX_STAGE_TASKS: usize = 10_000;
/// Tasks of one run, at most.
pub const MAX_RUN_TASKS: usize = 100_000;
/// Stages of one pipeline, at most.
pub const MAX_STAGES: usize = 1_000;

struct Stage<'a> {
    name: &'a str,
    node: &'a Node,
    kind: Option<BuiltinKind>,
    inputs: Vec<InputSlot>,
    outputs: Vec<(String, ArtifactType)>,
    tasks: usize,
}

struct Semantics<'a> {
    stages: BTreeMap<&'a str, Stage<'a>>,
    params: &'a Map<String, Value>,
    findings: &'a mut Vec<Finding>,
}

/// Adds what is found to `findings`.
pub fn check(root: &Node, params: &Map<String, Value>, findings: &mut Vec<Finding>) {
    let Some(stages) = root.get("stages") else {
        return;
    };
    if stages.entries().is_empty() {
        add(
            findings,
            stages.at,
            "stages",
            "the pipeline has no stage".to_owned(),
            None,
        );
        return;
    }
    if stages.entries().len() > MAX_STAGES {
        let message = format!(
            "has {} stages, at most {MAX_STAGES} are allowed",
            stages.entries().len()
        );
        add(findings, stages.at, "stages", message, None);
        return;
    }
    for (name, at, _) in root.get("params").map(Node::entries).unwrap_or_default() {
        if !is_name(name) && !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let message = format!(
                "`{}` is no parameter name: use letters, digits and `_`",
                name.escape_debug()
            );
            add(findings, *at, &join("params", name), message, None);
        }
    }
    let mut known = BTreeMap::new();
    for (name, at, node) in stages.entries() {
        if !is_name(name) {
            let cut: String = name.chars().take(80).collect();
            let message = format!(
                "`{}` is no stage name: use 1 to 63 lower-case letters, digits, `_` and `-`",
                cut.escape_debug()
            );
            add(findings, *at, &join("stages", name), message, None);
        }
        known.insert(name.as_str(), describe(name, node));
    }
    let total = known
        .values()
        .map(|s| s.tasks)
        .fold(0, usize::saturating_add);
    if total > MAX_RUN_TASKS {
        let message =
            format!("the stages come to {total} tasks, at most {MAX_RUN_TASKS} are allowed");
        add(findings, stages.at, "stages", message, None);
    }
    let mut semantics = Semantics {
        stages: known,
        params,
        findings,
    };
    for (name, ..) in stages.entries() {
        semantics.stage(name);
    }
    semantics.cycles();
}

fn add(
    findings: &mut Vec<Finding>,
    at: Position,
    field: &str,
    message: String,
    suggestion: Option<String>,
) {
    findings.push(Finding {
        at,
        field: field.to_owned(),
        message,
        suggestion,
    });
}

fn describe<'a>(name: &'a str, node: &'a Node) -> Stage<'a> {
    let kind_name = node.get("kind").and_then(Node::text).unwrap_or_default();
    let kind = BuiltinKind::from_name(kind_name);
    let with = node.get("with").map_or(Value::Null, Node::to_json);
    let signature = kind_signature(kind.unwrap_or(BuiltinKind::Exec), &with);
    let mut outputs = signature.outputs;
    if kind.is_none_or(|k| k == BuiltinKind::Exec) {
        for (output, _, declared) in node.get("outputs").map(Node::entries).unwrap_or_default() {
            if let Ok(t) = serde_json::from_value::<ArtifactType>(declared.to_json()) {
                outputs.push((output.clone(), t));
            }
        }
    }
    let tasks = node
        .get("matrix")
        .map(Node::entries)
        .unwrap_or_default()
        .iter();
    let tasks = tasks.fold(1, |n: usize, (.., values)| {
        n.saturating_mul(values.items().len())
    });
    Stage {
        name,
        node,
        kind,
        inputs: signature.inputs,
        outputs,
        tasks,
    }
}

impl Semantics<'_> {
    fn add(&mut self, at: Position, field: &str, message: String, suggestion: Option<String>) {
        add(self.findings, at, field, message, suggestion);
    }

    fn did_you_mean<'b>(word: &str, names: impl IntoIterator<Item = &'b str>) -> Option<String> {
        nearest(word, names).map(|name| format!("did you mean `{name}`?"))
    }

    fn stage(&mut self, name: &str) {
        let Some(stage) = self.stages.get(name) else {
            return;
        };
        let (node, kind, tasks) = (stage.node, stage.kind, stage.tasks);
        let path = join("stages", name);
        self.kind(node, kind, &path);
        self.inputs(name, node, &path);
        self.needs(name, node, &path);
        self.condition(name, node, &path);
        if let Some(outputs) = node.get("outputs") {
            if kind.is_some_and(|k| k != BuiltinKind::Exec) && !outputs.entries().is_empty() {
                let message =
                    "only `exec` and kinds of your own declare outputs; this kind has its own"
                        .to_owned();
                self.add(outputs.at, &join(&path, "outputs"), message, None);
            }
            for (output, at, _) in outputs.entries().iter().filter(|(o, ..)| !is_name(o)) {
                let message = format!(
                    "`{}` is no artifact name: use lower-case letters, digits, `_` and `-`",
                    output.escape_debug()
                );
                self.add(*at, &join(&join(&path, "outputs"), output), message, None);
            }
        }
        if let Some(matrix) = node.get("matrix") {
            let field = join(&path, "matrix");
            if tasks > MAX_STAGE_TASKS {
                let message =
                    format!("comes to {tasks} tasks, at most {MAX_STAGE_TASKS} are allowed");
                self.add(matrix.at, &field, message, None);
            }
            for (value_name, at, values) in matrix.entries() {
                if values.items().is_empty() {
                    self.add(
                        *at,
                        &join(&field, value_name),
                        "has no values".to_owned(),
                        None,
                    );
                }
            }
        }
        let with_path = join(&path, "with");
        if let (Some(kind), Some(with)) = (kind, node.get("with")) {
            self.with(kind, with, node, &with_path);
        }
    }

    fn kind(&mut self, node: &Node, kind: Option<BuiltinKind>, path: &str) {
        let Some(named) = node.get("kind") else {
            return;
        };
        let Some(text) = named.text() else { return };
        if kind.is_none() && !text.contains('/') {
            let names = || BuiltinKind::ALL.iter().map(|k| k.as_str());
            let suggestion = Self::did_you_mean(text, names()).or_else(|| {
                Some(format!(
                    "built-in kinds: {}; or `vendor/kind` for your own",
                    names().collect::<Vec<_>>().join(", ")
                ))
            });
            let cut: String = text.chars().take(80).collect();
            self.add(
                named.at,
                &join(path, "kind"),
                format!("unknown stage kind `{}`", cut.escape_debug()),
                suggestion,
            );
        }
    }

    fn inputs(&mut self, name: &str, node: &Node, path: &str) {
        let Some(stage) = self.stages.get(name) else {
            return;
        };
        let slots = stage.inputs.clone();
        let field = join(path, "inputs");
        let given = node.get("inputs");
        let entries = given.map(Node::entries).unwrap_or_default();
        for (input, at, value) in entries {
            let field = join(&field, input);
            if !is_name(input) {
                let message = format!(
                    "`{}` is no input name: use lower-case letters, digits, `_` and `-`",
                    input.escape_debug()
                );
                self.add(*at, &field, message, None);
            }
            let slot = slots
                .iter()
                .find(|s| s.name == input || s.name == "*")
                .copied();
            if slot.is_none() {
                let known: Vec<&str> = slots.iter().map(|s| s.name).collect();
                let suggestion = Self::did_you_mean(input, known.iter().copied()).or_else(|| {
                    Some(if known.is_empty() {
                        "it takes none".to_owned()
                    } else {
                        format!("it takes: {}", known.join(", "))
                    })
                });
                self.add(
                    *at,
                    &field,
                    format!("this kind has no input `{}`", input.escape_debug()),
                    suggestion,
                );
            }
            let Some(reference) = value.text().and_then(|t| t.parse::<OutputRef>().ok()) else {
                continue;
            };
            self.reference(name, &reference, value.at, &field, slot);
        }
        for slot in slots.iter().filter(|s| s.required) {
            let there = if slot.name == "*" {
                !entries.is_empty()
            } else {
                entries.iter().any(|(input, ..)| input == slot.name)
            };
            if !there {
                let at = given.map_or(node.at, |g| g.at);
                let types: Vec<&str> = slot.types.iter().map(|t| t.as_str()).collect();
                let (message, shown) = if slot.name == "*" {
                    ("the stage has no input".to_owned(), "name")
                } else {
                    (format!("the input `{}` is missing", slot.name), slot.name)
                };
                let suggestion = self.producer_of(name, slot.types).map_or_else(
                    || format!("`{shown}: stage.output` of type {}", types.join(" or ")),
                    |from| format!("e.g. `{shown}: {from}`"),
                );
                self.add(at, &field, message, Some(suggestion));
            }
        }
    }

    /// An output that could be taken, for a suggestion.
    fn producer_of(&self, not: &str, types: &[ArtifactType]) -> Option<String> {
        self.stages
            .values()
            .filter(|s| s.name != not)
            .find_map(|s| {
                let (output, _) = s.outputs.iter().find(|(_, t)| types.contains(t))?;
                Some(format!("{}.{output}", s.name))
            })
    }

    fn reference(
        &mut self,
        name: &str,
        reference: &OutputRef,
        at: Position,
        field: &str,
        slot: Option<InputSlot>,
    ) {
        if reference.stage.as_str() == name {
            self.add(
                at,
                field,
                "a stage cannot take its own output".to_owned(),
                None,
            );
            return;
        }
        let Some(from) = self.stages.get(reference.stage.as_str()) else {
            let suggestion =
                Self::did_you_mean(reference.stage.as_str(), self.stages.keys().copied());
            self.add(
                at,
                field,
                format!("there is no stage `{}`", reference.stage),
                suggestion,
            );
            return;
        };
        let found = from
            .outputs
            .iter()
            .find(|(o, _)| *o == reference.output.as_str());
        let Some((_, found)) = found else {
            let kind = from.node.get("kind").and_then(Node::text);
            if from.kind.is_none() && !kind.is_some_and(|kind| kind.contains('/')) {
                // What a stage of no known kind gives is not known either, and its kind is told.
                return;
            }
            let names: Vec<&str> = from.outputs.iter().map(|(o, _)| o.as_str()).collect();
            let suggestion = Self::did_you_mean(reference.output.as_str(), names.iter().copied())
                .or_else(|| {
                    Some(if names.is_empty() {
                        "it has none".to_owned()
                    } else {
                        format!("it has: {}", names.join(", "))
                    })
                });
            let message = format!(
                "the stage `{}` has no output `{}`",
                reference.stage, reference.output
            );
            self.add(at, field, message, suggestion);
            return;
        };
        let Some(slot) = slot else { return };
        let (found, from_tasks) = (*found, from.tasks);
        if !slot.types.contains(&found) {
            let wanted: Vec<&str> = slot.types.iter().map(|t| t.as_str()).collect();
            let hint = (found == ArtifactType::Files && slot.types.contains(&ArtifactType::Table))
                .then(|| "put a `convert` stage between them".to_owned());
            let message = format!(
                "`{reference}` is of type {}, needed is {}",
                found.as_str(),
                wanted.join(" or ")
            );
            self.add(at, field, message, hint);
        }
        if from_tasks > 1 && !slot.many {
            let message = format!(
                "`{reference}` comes from a matrix of {from_tasks} tasks; this input takes one artifact"
            );
            self.add(at, field, message, None);
        }
    }

    fn needs(&mut self, name: &str, node: &Node, path: &str) {
        for (i, need) in node
            .get("needs")
            .map(Node::items)
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            let Some(text) = need.text() else { continue };
            let field = format!("{path}.needs[{i}]");
            if text == name {
                self.add(
                    need.at,
                    &field,
                    "a stage cannot wait for itself".to_owned(),
                    None,
                );
            } else if !self.stages.contains_key(text) {
                let suggestion = Self::did_you_mean(text, self.stages.keys().copied());
                self.add(
                    need.at,
                    &field,
                    format!("there is no stage `{}`", text.escape_debug()),
                    suggestion,
                );
            }
        }
    }

    fn condition(&mut self, name: &str, node: &Node, path: &str) {
        let Some(when) = node.get("when") else { return };
        let Some(text) = when.text() else { return };
        let field = join(path, "when");
        let condition = match text.parse::<Condition>() {
            Ok(condition) => condition,
            Err(message) => return self.add(when.at, &field, message, None),
        };
        let upstream = self.upstream(name);
        for reference in condition.references() {
            let shown = reference.join(".");
            match reference[0].as_str() {
                "params" if self.params.contains_key(&reference[1]) => {}
                "params" => {
                    let suggestion =
                        Self::did_you_mean(&reference[1], self.params.keys().map(String::as_str));
                    self.add(
                        when.at,
                        &field,
                        format!("`{shown}` names no parameter"),
                        suggestion,
                    );
                }
                "matrix"
                    if node
                        .get("matrix")
                        .is_some_and(|m| m.get(&reference[1]).is_some()) => {}
                "matrix" => self.add(
                    when.at,
                    &field,
                    format!("`{shown}` names no value of the matrix"),
                    None,
                ),
                stage if !self.stages.contains_key(stage) => {
                    let suggestion = Self::did_you_mean(stage, self.stages.keys().copied());
                    self.add(
                        when.at,
                        &field,
                        format!("there is no stage `{stage}`"),
                        suggestion,
                    );
                }
                stage if !upstream.contains(stage) => {
                    let message = format!(
                        "`{shown}` is not known yet: this stage does not wait for `{stage}`"
                    );
                    self.add(
                        when.at,
                        &field,
                        message,
                        Some(format!("add `needs: [{stage}]`")),
                    );
                }
                stage if self.stages.get(stage).is_some_and(|s| s.tasks > 1) => {
                    let message = format!("`{shown}` comes from a matrix and has several values");
                    self.add(when.at, &field, message, None);
                }
                _ => {}
            }
        }
    }

    fn direct(&self, name: &str) -> Vec<&str> {
        let Some(stage) = self.stages.get(name) else {
            return Vec::new();
        };
        let inputs = stage
            .node
            .get("inputs")
            .map(Node::entries)
            .unwrap_or_default()
            .iter();
        let inputs = inputs.filter_map(|(.., v)| v.text()?.split_once('.').map(|(stage, _)| stage));
        let needs = stage
            .node
            .get("needs")
            .map(Node::items)
            .unwrap_or_default()
            .iter();
        inputs.chain(needs.filter_map(Node::text)).collect()
    }

    fn upstream(&self, name: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut open: Vec<String> = self.direct(name).into_iter().map(str::to_owned).collect();
        while let Some(next) = open.pop() {
            if seen.insert(next.clone()) {
                open.extend(self.direct(&next).into_iter().map(str::to_owned));
            }
        }
        seen
    }

    /// Each cycle once, as a path. Depth first, without recursion.
    fn cycles(&mut self) {
        let names: Vec<String> = self.stages.keys().map(|&n| n.to_owned()).collect();
        let mut done: BTreeSet<String> = BTreeSet::new();
        for start in &names {
            let mut path: Vec<(String, Vec<String>)> = Vec::new();
            let enter = |name: &str| {
                let next = self
                    .direct(name)
                    .into_iter()
                    .filter(|n| self.stages.contains_key(n));
                (name.to_owned(), next.map(str::to_owned).collect::<Vec<_>>())
            };
            if done.contains(start) {
                continue;
            }
            path.push(enter(start));
            let mut found: Option<Vec<String>> = None;
            while let Some((name, next)) = path.last_mut() {
                let Some(to) = next.pop() else {
                    done.insert(name.clone());
                    path.pop();
                    continue;
                };
                if let Some(from) = path.iter().position(|(n, _)| *n == to) {
                    if path.len() - from > 1 {
                        let mut cycle: Vec<String> =
                            path[from..].iter().map(|(n, _)| n.clone()).collect();
                        cycle.push(to);
                        // We walked from a stage to what it needs; people read the other way.
                        cycle.reverse();
                        found = Some(cycle);
                        done.extend(path.iter().map(|(n, _)| n.clone()));
                        break;
                    }
                } else if !done.contains(&to) {
                    path.push(enter(&to));
                }
            }
            if let Some(cycle) = found {
                let at = self
                    .stages
                    .get(cycle[0].as_str())
                    .map(|s| s.node.at)
                    .unwrap_or_default();
                let message = format!("the stages wait for each other: {}", cycle.join(" → "));
                self.add(at, &join("stages", &cycle[0]), message, None);
            }
        }
    }

    fn with(&mut self, kind: BuiltinKind, with: &Node, stage: &Node, path: &str) {
        match kind {
            BuiltinKind::Collect => self.sources(with, path),
            BuiltinKind::Convert => self.split(with, stage, path),
            BuiltinKind::Train => {
                let has_validation = stage
                    .get("inputs")
                    .is_some_and(|i| i.get("validation").is_some());
                let early = with
                    .get("early_stopping")
                    .filter(|e| !e.entries().is_empty());
                if let Some(early) = early.filter(|_| !has_validation) {
                    let message = "needs the input `validation`".to_owned();
                    let suggestion = Some(
                        "add `validation: <split stage>.validation` under `inputs`".to_owned(),
                    );
                    self.add(early.at, &join(path, "early_stopping"), message, suggestion);
                }
                let label = with.get("label").and_then(Node::text).unwrap_or_default();
                for list in ["features", "exclude"] {
                    for (i, name) in with
                        .get(list)
                        .map(Node::items)
                        .unwrap_or_default()
                        .iter()
                        .enumerate()
                    {
                        if !label.is_empty() && name.text() == Some(label) {
                            let message = format!("`{}` is the label", label.escape_debug());
                            self.add(name.at, &format!("{path}.{list}[{i}]"), message, None);
                        }
                    }
                }
            }
            BuiltinKind::Evaluate => self.evaluation(with, path),
            BuiltinKind::Exec => {
                for (i, file) in with
                    .get("files")
                    .map(Node::items)
                    .unwrap_or_default()
                    .iter()
                    .enumerate()
                {
                    if let Some(Err(message)) = file.text().map(check_path) {
                        self.add(file.at, &format!("{path}.files[{i}]"), message, None);
                    }
                }
                let env = with.get("env");
                for (name, at, _) in with.get("secrets").map(Node::entries).unwrap_or_default() {
                    let wrong = check_secret_variable(name).err();
                    let twice = env.is_some_and(|env| env.get(name).is_some());
                    let wrong = wrong.or_else(|| {
                        twice.then(|| format!("`{}` is in `env`, too", name.escape_debug()))
                    });
                    if let Some(message) = wrong {
                        let field = join(&join(path, "secrets"), name);
                        self.add(*at, &field, message, None);
                    }
                }
            }
            BuiltinKind::Deploy => self.canary(with, path),
            BuiltinKind::Validate | BuiltinKind::Report | BuiltinKind::Noop => {}
        }
    }

    /// A canary that takes back requests would send a client from the new version to the old one.
    fn canary(&mut self, with: &Node, path: &str) {
        let steps = with.get("strategy").and_then(|s| s.get("steps"));
        let mut last = 0.0;
        for (i, step) in steps
            .map(Node::items)
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            let Some((node, weight)) = step
                .get("weight")
                .and_then(|n| Some((n, n.to_json().as_f64()?)))
            else {
                continue;
            };
            if weight <= last {
                let message = format!("is {weight}, not more than the {last} of the step before");
                let field = format!("{path}.strategy.steps[{i}].weight");
                self.add(node.at, &field, message, None);
            }
            last = weight;
        }
    }

    fn sources(&mut self, with: &Node, path: &str) {
        for (i, source) in with
            .get("sources")
            .map(Node::items)
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            let field = format!("{path}.sources[{i}]");
            if let Some(url) = source.get("url")
                && let Some(Err(message)) = url.text().map(check_source_url)
            {
                self.add(url.at, &join(&field, "url"), message, None);
            }
            if let Some(bearer) = source.get("bearer")
                && let Some(url) = source.get("url").and_then(Node::text)
                && !url.contains("${")
                && !url.starts_with("http")
            {
                let message = "is for a source at `https:`".to_owned();
                self.add(bearer.at, &join(&field, "bearer"), message, None);
            }
            if let Some(name) = source.get("as")
                && let Some(Err(message)) = name.text().map(check_path)
            {
                self.add(name.at, &join(&field, "as"), message, None);
            }
        }
    }

    fn split(&mut self, with: &Node, stage: &Node, path: &str) {
        let inputs = stage.get("inputs").map(Node::entries).unwrap_or_default();
        if inputs.len() > 1 && with.get("sql").is_none() {
            let message = format!(
                "has {} inputs: `sql` must say how to join them",
                inputs.len()
            );
            self.add(with.at, path, message, None);
        }
        for (name, at, _) in with.get("read").map(Node::entries).unwrap_or_default() {
            if !inputs.iter().any(|(input, ..)| input == name) {
                let suggestion = Self::did_you_mean(name, inputs.iter().map(|(i, ..)| i.as_str()));
                let message = format!("the stage has no input `{}`", name.escape_debug());
                self.add(*at, &join(&join(path, "read"), name), message, suggestion);
            }
        }
        let Some(split) = with.get("split") else {
            return;
        };
        let share = |name: &str| {
            split
                .get(name)
                .and_then(|n| n.to_json().as_f64())
                .unwrap_or(0.0)
        };
        if share("test") + share("validation") >= 1.0 {
            let message = "`test` and `validation` together leave nothing for `train`".to_owned();
            self.add(split.at, &join(path, "split"), message, None);
        }
        if split.get("test").is_some() && share("test") <= 0.0 {
            self.add(
                split.place(&["test"]),
                &format!("{path}.split.test"),
                "must be more than 0".to_owned(),
                None,
            );
        }
    }

    fn evaluation(&mut self, with: &Node, path: &str) {
        let metric = |text: &str, at: Position, field: &str, this: &mut Self| {
            if !METRICS.contains(&text) {
                let suggestion = Self::did_you_mean(text, METRICS)
                    .or_else(|| Some(format!("metrics: {}", METRICS.join(", "))));
                this.add(
                    at,
                    field,
                    format!("there is no metric `{}`", text.escape_debug()),
                    suggestion,
                );
            }
        };
        for (name, at, gate) in with.get("gates").map(Node::entries).unwrap_or_default() {
            let field = join(&join(path, "gates"), name);
            metric(name, *at, &field, self);
            if let Some(Err(message)) = gate.text().map(str::parse::<Gate>) {
                self.add(gate.at, &field, message, None);
            }
        }
        for (node, field) in [
            (with.get("select_by"), join(path, "select_by")),
            (
                with.get("compare").and_then(|c| c.get("metric")),
                format!("{path}.compare.metric"),
            ),
        ] {
            if let Some((node, text)) = node.and_then(|n| Some((n, n.text()?)))
                && !text.contains("${")
            {
                metric(text, node.at, &field, self);
            }
        }
    }
}

/// Checks the URL of a `collect` source; `${…}` that is filled in later is let through.
fn check_source_url(text: &str) -> Result<(), String> {
    if text.contains("${") {
        return Ok(());
    }
    let shown: String = text
        .chars()
        .take(80)
        .collect::<String>()
        .escape_debug()
        .to_string();
    let (scheme, rest) = text.split_once(':').ok_or_else(|| {
        format!("`{shown}` has no scheme: write `file:{shown}`, `https://…` or `s3://bucket/key`")
    })?;
    if text.chars().any(char::is_control) {
        return Err(format!("`{shown}` has a control character"));
    }
    match scheme {
        "file" => {
            if rest.is_empty() {
                Err(format!("`{shown}` names no file"))
            } else {
                Ok(())
            }
        }
        "http" | "https" | "s3" => {
            let url = url::Url::parse(text).map_err(|e| format!("`{shown}` is no URL: {e}"))?;
            if !url.username().is_empty() || url.password().is_some() {
                Err(
                    "a URL with user or password would show them in logs; leave them out"
                        .to_owned(),
                )
            } else if url.fragment().is_some() {
                Err(format!("`{shown}` has a fragment (`#…`)"))
            } else if url.host_str().is_none_or(str::is_empty) {
                Err(format!("`{shown}` names no host or bucket"))
            } else {
                Ok(())
            }
        }
        other => Err(format!(
            "`{other}:` is not known: use `file:`, `http:`, `https:` or `s3:`"
        )),
    }
}
