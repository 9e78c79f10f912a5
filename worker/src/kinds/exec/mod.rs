//! `exec`: any command, in a directory and a process group of its own.
//!
//! The command sees directories by environment variables and nothing of the worker but `PATH`,
//! `HOME`, `LANG` and `TZ`; secrets that it names it is given as variables. However it ends, nothing of its group is left running. Start with
//! [`Exec`]; [`group`] knows processes, [`output`] reads what they print.

mod group;
mod output;

pub(crate) use group::end_leftovers;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use emberline_common::{
    artifact::check_path,
    failure::Reason,
    ids::{SecretName, StageKind},
    run_view::Results,
    spec::kinds::{BuiltinKind, ExecSpec, exec::check_secret_variable},
};
use serde_json::{Map, Value};
use tokio::process::{Child, Command};

use crate::stage::{
    LogSource, Produced, ProducedContent, Stage, StageContext, StageError, StageOutput, StopReason,
};
use group::Group;
use output::Capture;

/// What a command may write to `$EMBERLINE_RESULTS`, in bytes.
const MAX_RESULTS_BYTES: u64 = 64 << 10;
/// Between asking a group to end and ending it.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// How often the memory of a group is added up.
const MEMORY_INTERVAL: Duration = Duration::from_millis(100);
/// How long the rest of the output is waited for once the group is gone.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);

/// The kind `exec`.
pub struct Exec;

impl Stage for Exec {
    fn kind(&self) -> StageKind {
        super::kind(BuiltinKind::Exec)
    }

    fn version(&self) -> u32 {
        BuiltinKind::Exec.version()
    }

    fn secrets(&self, spec: &Value) -> Result<Vec<SecretName>, StageError> {
        let spec: ExecSpec = crate::stage::spec(spec.clone())?;
        Ok(spec.secrets.into_values().collect())
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: ExecSpec = ctx.spec()?;
        let place = Place::make(ctx)?;
        let mut command = place.command(ctx, &spec)?;
        let (ended, tail) = ctx.block_on(watch(ctx, &spec, &place, &mut command))?;
        ended.check(&spec, &tail)?;
        let mut artifacts = Vec::with_capacity(ctx.outputs.len());
        for (name, artifact_type) in ctx.outputs.iter().cloned() {
            // Made before the command; not made again, so that it is told if the command took it away.
            let dir = ctx.output_path(&name);
            artifacts.push(Produced {
                name,
                content: ProducedContent::Directory {
                    dir,
                    artifact_type,
                    metadata: Map::new(),
                },
            });
        }
        Ok(StageOutput {
            artifacts,
            results: place.results()?,
            registration: None,
        })
    }
}

/// Where the command runs.
struct Place {
    work: PathBuf,
    tmp: PathBuf,
    results: PathBuf,
}

impl Place {
    fn make(ctx: &StageContext) -> Result<Self, StageError> {
        let place = Self {
            work: ctx.work_dir.join("work"),
            tmp: ctx.work_dir.join("tmp"),
            results: ctx.work_dir.join("results.json"),
        };
        for dir in [&place.work, &place.tmp] {
            fs::create_dir_all(dir).map_err(|e| StageError::io("make the directory", dir, e))?;
        }
        for file in &ctx.files {
            check_path(&file.path).map_err(|why| StageError::user(format!("`files`: {why}")))?;
            let to = place.work.join(&file.path);
            if let Some(dir) = to.parent() {
                fs::create_dir_all(dir)
                    .map_err(|e| StageError::io("make the directory", dir, e))?;
            }
            // A copy: the command may change its files, the cache's must not.
            fs::copy(&file.local, &to).map_err(|e| StageError::io("write", &to, e))?;
            let mode = if file.executable { 0o755 } else { 0o644 };
            fs::set_permissions(&to, fs::Permissions::from_mode(mode))
                .map_err(|e| StageError::io("set the mode of", &to, e))?;
        }
        Ok(place)
    }

    fn command(&self, ctx: &StageContext, spec: &ExecSpec) -> Result<Command, StageError> {
        let (program, args) = spec
            .command
            .split_first()
            .ok_or_else(|| StageError::user("`command` is empty: name a program"))?;
        // `./x` is meant from the working directory, as in a shell; a bare name from `PATH`.
        let program = if program.contains('/') && !program.starts_with('/') {
            self.work.join(program).into_os_string()
        } else {
            OsString::from(program)
        };
        let mut secrets = Vec::with_capacity(spec.secrets.len());
        for (variable, name) in &spec.secrets {
            check_secret_variable(variable)
                .map_err(|why| StageError::user(format!("`secrets`: {why}")))?;
            secrets.push((variable, ctx.secret(name)?.reveal()));
        }
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(&self.work)
            .env_clear()
            .envs(
                ["PATH", "HOME", "LANG", "TZ"]
                    .into_iter()
                    .filter_map(|name| std::env::var_os(name).map(|value| (name, value))),
            )
            .envs(&spec.env)
            .envs(secrets)
            .env("TMPDIR", &self.tmp)
            .envs(self.variables(ctx)?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        Ok(command)
    }

    fn variables(&self, ctx: &StageContext) -> Result<BTreeMap<String, OsString>, StageError> {
        let mut out: BTreeMap<String, OsString> = BTreeMap::new();
        out.insert("EMBERLINE_RUN".into(), ctx.attempt.run.as_str().into());
        out.insert("EMBERLINE_TASK".into(), ctx.attempt.task.as_str().into());
        out.insert(
            "EMBERLINE_ATTEMPT".into(),
            ctx.attempt.attempt.to_string().into(),
        );
        out.insert("EMBERLINE_PIPELINE".into(), ctx.pipeline.as_str().into());
        out.insert(group::MARK.into(), self.results.clone().into());
        if !ctx.traceparent.is_empty() {
            out.insert("TRACEPARENT".into(), ctx.traceparent.clone().into());
        }
        let mut add = |prefix: &str, name: &str, path: OsString| {
            let variable = format!("{prefix}{}", name.to_uppercase().replace('-', "_"));
            match out.insert(variable.clone(), path) {
                None => Ok(()),
                Some(_) => Err(StageError::user(format!(
                    "two names become `${variable}`: rename one of them"
                ))),
            }
        };
        let mut named: BTreeMap<&str, Vec<&Path>> = BTreeMap::new();
        for input in &ctx.inputs {
            named
                .entry(input.name.as_str())
                .or_default()
                .push(&input.dir);
        }
        for (name, dirs) in named {
            // Those of a matrix are one directory with one numbered link to each.
            let path = match dirs[..] {
                [dir] => dir.to_path_buf(),
                _ => {
                    let all = ctx.work_dir.join("several").join(name);
                    fs::create_dir_all(&all)
                        .map_err(|e| StageError::io("make the directory", &all, e))?;
                    for (index, dir) in dirs.iter().enumerate() {
                        let link = all.join(index.to_string());
                        std::os::unix::fs::symlink(dir, &link)
                            .map_err(|e| StageError::io("link", &link, e))?;
                    }
                    all
                }
            };
            add("EMBERLINE_INPUT_", name, path.into())?;
        }
        for (name, _) in &ctx.outputs {
            add(
                "EMBERLINE_OUTPUT_",
                name.as_str(),
                ctx.output_dir(name)?.into(),
            )?;
        }
        Ok(out)
    }

    fn results(&self) -> Result<Results, StageError> {
        let wrong = |why: String| StageError::user(format!("$EMBERLINE_RESULTS {why}"));
        match fs::symlink_metadata(&self.results) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Results::new()),
            Err(e) => return Err(StageError::io("read", &self.results, e)),
            Ok(meta) if !meta.is_file() => return Err(wrong("is not a regular file".into())),
            Ok(meta) if meta.len() > MAX_RESULTS_BYTES => {
                return Err(wrong(format!("has {} bytes: it is too large", meta.len())));
            }
            Ok(_) => {}
        }
        let text = fs::read(&self.results).map_err(|e| StageError::io("read", &self.results, e))?;
        match serde_json::from_slice(&text) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(_) => Err(wrong("is no JSON object".into())),
            Err(e) => Err(wrong(format!("is no JSON: {e}"))),
        }
    }
}

/// How a command ended.
enum Ended {
    ByItself(ExitStatus),
    /// It was asked to stop.
    Stopped(StopReason),
    /// Its group used more memory than it had reserved.
    TooMuchMemory {
        used: u64,
        limit: u64,
    },
}

impl Ended {
    fn check(self, spec: &ExecSpec, tail: &str) -> Result<(), StageError> {
        let name = spec.command.first().map_or("", String::as_str);
        let status = match self {
            Self::ByItself(status) => status,
            Self::Stopped(why) => {
                let what = match why {
                    StopReason::Cancelled => "was stopped on request",
                    StopReason::Timeout => "was ended, for it went over its time limit",
                    StopReason::Preempted => "was given back by its worker",
                };
                return Err(StageError::new(why.reason(), format!("`{name}` {what}")));
            }
            Self::TooMuchMemory { used, limit } => {
                return Err(StageError::new(
                    Reason::Oom,
                    format!(
                        "`{name}` used {} MiB of memory, more than the {} MiB that it had reserved: \
                         raise `resources.memory`",
                        used >> 20,
                        limit >> 20
                    ),
                ));
            }
        };
        if status.success() {
            return Ok(());
        }
        let (reason, what) = match (status.code(), status.signal()) {
            (Some(code), _) if spec.data_exit_codes.contains(&code) => (
                Reason::Data,
                format!("says that the data is bad (exit code {code})"),
            ),
            (Some(code), _) => (Reason::UserError, format!("ended with exit code {code}")),
            (None, Some(9)) => (
                Reason::UserError,
                "was killed by signal 9: by somebody, or by the system for want of memory".into(),
            ),
            (None, signal) => (
                Reason::UserError,
                format!("was killed by signal {}", signal.unwrap_or_default()),
            ),
        };
        let last = if tail.is_empty() {
            String::new()
        } else {
            format!(": {tail}")
        };
        Err(StageError::new(reason, format!("`{name}` {what}{last}")))
    }
}

/// Runs the command to its end, whichever it is. Afterwards nothing of its group is left.
async fn watch(
    ctx: &StageContext,
    spec: &ExecSpec,
    place: &Place,
    command: &mut Command,
) -> Result<(Ended, String), StageError> {
    ctx.check_cancelled()?;
    let mut child = command.spawn().map_err(|e| {
        let name = spec.command.first().map_or("", String::as_str);
        let why = match e.kind() {
            std::io::ErrorKind::NotFound => "there is no such program on this worker".to_owned(),
            std::io::ErrorKind::PermissionDenied => "it is not executable".to_owned(),
            std::io::ErrorKind::ArgumentListTooLong => "its arguments are too long".to_owned(),
            _ => e.to_string(),
        };
        StageError::user(format!("cannot start `{name}`: {why}"))
    })?;
    let group = Group::of(&child, &place.results)?;
    let guard = group.guard().await;
    let capture = Capture::new(ctx.sink.clone(), spec.max_log.0, ctx.secrets.redactor());
    let mut readers = tokio::task::JoinSet::new();
    if let Some(out) = child.stdout.take() {
        readers.spawn(capture.clone().read(LogSource::Stdout, out));
    }
    if let Some(err) = child.stderr.take() {
        readers.spawn(capture.clone().read(LogSource::Stderr, err));
    }
    let ended = ended(ctx, &mut child, &group).await;
    // What it left running in the background does not outlive it.
    group.kill().await;
    if let Some(guard) = guard {
        guard.release().await;
    }
    let all_read = async { while readers.join_next().await.is_some() {} };
    if tokio::time::timeout(OUTPUT_GRACE, all_read).await.is_err() {
        // Somebody outside the group holds the pipe.
        readers.shutdown().await;
    }
    capture.finish();
    Ok((ended?, capture.tail()))
}

async fn ended(ctx: &StageContext, child: &mut Child, group: &Group) -> Result<Ended, StageError> {
    let failed = |e| StageError::system(format!("cannot wait for the command: {e}"));
    let mut stop = ctx.stop.clone();
    let limit = ctx.resources.memory_bytes;
    let mut look = tokio::time::interval(MEMORY_INTERVAL);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            status = child.wait() => return Ok(Ended::ByItself(status.map_err(failed)?)),
            why = stop.wait_for(Option::is_some) => {
                let why = why.ok().and_then(|why| *why).unwrap_or(StopReason::Cancelled);
                group.terminate();
                // Its own time to tidy up; whatever it does then, it is ended.
                let _ = tokio::time::timeout(TERM_GRACE, child.wait()).await;
                return Ok(Ended::Stopped(why));
            }
            _ = look.tick(), if limit > 0 => {
                let used = group.memory().await;
                if used > limit {
                    return Ok(Ended::TooMuchMemory { used, limit });
                }
            }
        }
    }
}
