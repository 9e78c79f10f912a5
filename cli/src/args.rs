//! The command line, as clap reads it.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use emberline_common::{
    access::Role,
    ids::TokenName,
    spec::{ByteSize, DurationText},
};
use emberline_worker::kinds::collect::{Allowed, Reach};

use crate::{exit::Exit, security::SecurityArguments};

/// A lightweight MLOps engine: from raw data to a trained, checked, registered model.
#[derive(Debug, Parser)]
#[command(
    name = "emberline",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "\
Exit codes: 0 success · 1 the run failed or was cancelled · 2 wrong input · 3 no cluster · 130 interrupted"
)]
pub struct Arguments {
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArguments,
    /// Log more to standard error (`-v`, `-vv`); `RUST_LOG` gives full control.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// How log lines are written.
    #[arg(long, global = true, env = "EMBERLINE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Print nothing but errors and what was asked for.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Which cluster.
#[derive(Debug, Clone, Args)]
pub struct ClusterArguments {
    /// The coordinators' addresses, e.g. `10.0.0.1:7420,10.0.0.2:7420`; whichever leads is found. Without it, the embedded cluster of the state directory is used, and started if it does not run.
    #[arg(long, global = true, env = "EMBERLINE_SERVER")]
    pub server: Option<String>,
    /// How long to look for the coordinator that leads before giving up. By default 30s; but a single address at which nobody is to be reached at the beginning is given up at once.
    #[arg(long, global = true, env = "EMBERLINE_CONNECT_TIMEOUT")]
    pub connect_timeout: Option<DurationText>,
    /// Where the embedded cluster keeps its state.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_STATE_DIR",
        default_value = ".emberline"
    )]
    pub state_dir: PathBuf,
    /// The most that each worker of the embedded cluster keeps of artifacts in its cache.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_CACHE_SIZE",
        default_value = "10GiB"
    )]
    pub cache_size: ByteSize,
    /// Who we are.
    #[command(flatten)]
    pub security: SecurityArguments,
    /// Where a coordinator of this process tells what happens.
    #[command(flatten)]
    pub events: EventsArguments,
    /// What the stages may have that workers of this process run.
    #[command(flatten)]
    pub stages: StagesArguments,
}

/// What the stages may have that workers of this process run.
#[derive(Debug, Clone, Default, Args)]
pub struct StagesArguments {
    /// The directory with the secrets of workers of this process, one file each; what is not there is looked for in the environment as `EMBERLINE_SECRET_<NAME>`.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_SECRETS_DIR",
        value_name = "DIR",
        hide_short_help = true
    )]
    pub secrets_dir: Option<PathBuf>,
    /// A host, an address or a network (`10.0.0.0/8`) that `collect` may reach although it is refused by default, as loopback is to a worker of a cluster; may be given several times.
    #[arg(
        long = "collect-allow",
        global = true,
        env = "EMBERLINE_COLLECT_ALLOW",
        value_delimiter = ',',
        value_name = "HOST|CIDR",
        hide_short_help = true
    )]
    pub collect_allow: Vec<Allowed>,
    /// The directory below which `collect` takes files of the worker's machine, and nowhere else; may be given several times. By default it takes any file that the worker may read but its own.
    #[arg(
        long = "collect-root",
        global = true,
        env = "EMBERLINE_COLLECT_ROOT",
        value_delimiter = ',',
        value_name = "DIR",
        hide_short_help = true
    )]
    pub collect_root: Vec<PathBuf>,
}

impl StagesArguments {
    /// What `collect` may reach; never the worker's own state and secrets.
    ///
    /// # Errors
    /// If a root is not there.
    pub fn reach(&self, reach: Reach, state_dir: &Path) -> Result<Reach, Exit> {
        let mut roots = Vec::with_capacity(self.collect_root.len());
        for root in &self.collect_root {
            let found = root
                .canonicalize()
                .map_err(|e| Exit::input(format!("`--collect-root {}`: {e}", root.display())))?;
            roots.push(found);
        }
        let own = [Some(state_dir.to_path_buf()), self.secrets_dir.clone()];
        Ok(reach
            .allow(self.collect_allow.iter().cloned())
            .below(roots)
            .keep_out_of(own.into_iter().flatten()))
    }
}

/// Where what happens is told to others, as CDEvents.
#[derive(Debug, Clone, Args)]
pub struct EventsArguments {
    /// The file that a coordinator of this process appends CDEvents to, one on each line.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_EVENTS_FILE",
        value_name = "PATH",
        hide_short_help = true
    )]
    pub events_file: Option<PathBuf>,
    /// The sink that a coordinator of this process posts CDEvents to, each in a CloudEvent.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_EVENTS_SINK",
        hide_env_values = true,
        value_name = "URL",
        hide_short_help = true
    )]
    pub events_sink: Option<String>,
    /// What CDEvents give as their source: a URI reference that names this cluster among others.
    #[arg(
        long,
        global = true,
        env = "EMBERLINE_EVENTS_SOURCE",
        value_name = "URI",
        default_value = "/emberline",
        hide_short_help = true
    )]
    pub events_source: String,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object for each line.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline and follow it to its end.
    Run(RunArguments),
    /// Submit a pipeline and leave; needs a cluster that stays up (`emberline dev` or `--server`).
    Submit(LeaveArguments),
    /// Check a pipeline file; every mistake is told at once.
    Validate {
        /// The pipeline file.
        file: PathBuf,
        /// A parameter's value; may be given several times.
        #[arg(short, long = "param", value_name = "NAME=VALUE")]
        params: Vec<String>,
    },
    /// Say what a run would execute now, what it would reuse, and why.
    Plan(SubmitArguments),
    /// List, show, follow, stop and repeat runs.
    #[command(subcommand)]
    Runs(RunsCommand),
    /// List, fetch and collect artifacts.
    #[command(subcommand)]
    Artifacts(ArtifactsCommand),
    /// List, compare, alias, export and import registered models.
    #[command(subcommand)]
    Models(ModelsCommand),
    /// List, show and follow deployments, approve them, and mark them as failed.
    #[command(subcommand)]
    Deployments(DeploymentsCommand),
    /// Make live again what was live before, or give up what is under way.
    Rollback(RollbackArguments),
    /// Say what is live where.
    Environments,
    /// Tell what turned out to be true of predictions of a served model.
    Feedback(FeedbackArguments),
    /// Show DORA's metrics of delivery, or explain one deployment's lead time.
    Dora(DoraArguments),
    /// Tell the cluster what outside systems know: merged changes, incidents.
    #[command(subcommand)]
    Events(EventsCommand),
    /// Show the cluster's leader, workers and queue.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// List workers, and let them end.
    #[command(subcommand)]
    Workers(WorkersCommand),
    /// Make, list and revoke tokens.
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// Make, show and revoke the certificates of a cluster.
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Say whether a process of this machine is well, by the exit code: for containers and their orchestrators.
    Health {
        /// What it is.
        what: Healthy,
        /// Where it answers: a coordinator at its `--listen`, a worker at its `--metrics-listen`. By default 127.0.0.1:7420, or 127.0.0.1:9464.
        address: Option<String>,
    },
    /// Be a coordinator of a cluster: serve, and lead whenever nobody else does.
    Coordinator(Box<CoordinatorArguments>),
    /// Be a worker of a cluster: run what its leader assigns.
    Worker(WorkerArguments),
    /// Start the embedded cluster and keep it up until Ctrl-C.
    Dev {
        /// The address to serve on; loopback only.
        #[arg(long, default_value = "127.0.0.1:7420")]
        listen: String,
        /// Workers to start.
        #[arg(long, default_value_t = 2)]
        workers: u32,
        /// Where the first of them serves models; loopback only. By default ten ports above `--listen`.
        #[arg(long, value_name = "HOST:PORT")]
        serve: Option<String>,
        /// The one environment whose models it serves.
        #[arg(long, default_value = "production", value_name = "NAME")]
        environment: String,
    },
    /// Write a starter pipeline that runs as it is.
    Init {
        /// The directory to write to.
        #[arg(default_value = ".")]
        directory: PathBuf,
        /// What to start with.
        #[arg(long, value_enum, default_value_t = Template::Tabular)]
        template: Template,
    },
    /// Look at what a cluster stands on (disk, object store, etcd, clocks, coordinators), and say what to fix.
    Doctor(DoctorArguments),
    /// Measure this machine: dispatch, throughput, start-up, memory, artifacts, serving.
    Bench(BenchArguments),
    /// Ask a served model as standard input says: the second process of `bench serve`.
    #[command(name = "bench-ask", hide = true)]
    BenchAsk,
    /// Start a cluster on this machine, kill and pause its parts at random under load, and judge what became of the runs. Needs `etcd`.
    Chaos(ChaosArguments),
    /// Print the JSON Schema of the pipeline file.
    Schema,
    /// Print the pipeline reference as Markdown.
    Reference,
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// What to submit.
#[derive(Debug, Args)]
pub struct SubmitArguments {
    /// The pipeline file.
    pub file: PathBuf,
    /// A parameter's value; may be given several times.
    #[arg(short, long = "param", value_name = "NAME=VALUE")]
    pub params: Vec<String>,
    /// Reuse nothing: every stage runs.
    #[arg(long)]
    pub no_cache: bool,
    /// Override the pipeline's priority.
    #[arg(long, allow_hyphen_values = true)]
    pub priority: Option<i32>,
}

/// What a run is started for. The Git work tree that the pipeline file lives in says the rest.
#[derive(Debug, Args)]
pub struct CauseArguments {
    /// What starts it.
    #[arg(long, env = "EMBERLINE_TRIGGER", value_enum, default_value_t = Trigger::Manual)]
    pub trigger: Trigger,
    /// The number of the pull request.
    #[arg(long, env = "EMBERLINE_CHANGE_ID", value_name = "ID")]
    pub change_id: Option<String>,
    /// The failed deployment that it is to repair, e.g. `d17`: then what it deploys counts as unplanned.
    #[arg(long, value_name = "DEPLOYMENT")]
    pub repairs: Option<String>,
}

/// What starts a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Trigger {
    /// A person.
    Manual,
    /// The clock.
    Schedule,
    /// New data.
    Data,
    /// A commit.
    Commit,
}

/// What to submit, to leave it then.
#[derive(Debug, Args)]
pub struct LeaveArguments {
    /// What to submit.
    #[command(flatten)]
    pub submit: SubmitArguments,
    /// What for.
    #[command(flatten)]
    pub cause: CauseArguments,
}

/// What to run.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// What to submit.
    #[command(flatten)]
    pub submit: SubmitArguments,
    /// What for.
    #[command(flatten)]
    pub cause: CauseArguments,
    /// Follow this run, which an earlier process began, instead of submitting a new one.
    #[arg(long, value_name = "RUN")]
    pub resume: Option<String>,
    /// Submit and leave; needs a cluster that stays up (`emberline dev` or `--server`).
    #[arg(long, conflicts_with = "resume")]
    pub detach: bool,
    /// Workers of the embedded cluster.
    #[arg(long, default_value_t = 2)]
    pub workers: u32,
}

/// What to do with runs.
#[derive(Debug, Subcommand)]
pub enum RunsCommand {
    /// List runs, newest first.
    List {
        /// Only runs of this pipeline.
        #[arg(long)]
        pipeline: Option<String>,
        /// At most this many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show a run with its tasks.
    Show {
        /// The run's id, or the beginning of it.
        run: String,
    },
    /// Follow a run to its end.
    Watch {
        /// The run's id, or the beginning of it.
        run: String,
    },
    /// Ask a run to stop.
    Cancel {
        /// The run's id, or the beginning of it.
        run: String,
        /// Why, for the record.
        #[arg(long, default_value = "asked for by a person")]
        why: String,
    },
    /// Start an unsuccessful run again from its tasks that did not succeed, and follow it.
    Retry {
        /// The run's id, or the beginning of it.
        run: String,
    },
    /// Print the log of a run.
    Logs {
        /// The run's id, or the beginning of it.
        run: String,
        /// Only this task.
        #[arg(long)]
        task: Option<String>,
        /// Only this attempt; by default the last.
        #[arg(long, default_value_t = 0)]
        attempt: u32,
        /// Go on until the run has ended.
        #[arg(short, long)]
        follow: bool,
        /// Print the metrics' points instead.
        #[arg(long)]
        metrics: bool,
    },
}

/// What to do with artifacts.
#[derive(Debug, Subcommand)]
pub enum ArtifactsCommand {
    /// List the artifacts of a run, or the files of one artifact.
    Ls {
        /// A run, `RUN/TASK/OUTPUT`, or a manifest's SHA-256.
        what: String,
    },
    /// Fetch an artifact into a directory.
    Get {
        /// `RUN/TASK/OUTPUT`, or a manifest's SHA-256.
        artifact: String,
        /// The directory to make.
        #[arg(default_value = ".")]
        directory: PathBuf,
    },
    /// Remove what no run, cache entry or model refers to.
    Gc {
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
        /// Keep what is younger, e.g. `24h`.
        #[arg(long, default_value = "24h")]
        min_age: String,
        /// Also forget ended runs (their logs and cache entries) and logs of predictions that are older, e.g. `30d`.
        #[arg(long)]
        forget_older_than: Option<String>,
    },
}

/// What to do with models. `version` is clap's own name for `--version`, so here it has another id.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// List models with their aliases.
    List,
    /// Show a model with its versions, or all of one version.
    Show {
        /// The model's name.
        model: String,
        /// The version: a number, or an alias.
        #[arg(id = "model_version", value_name = "VERSION")]
        version: Option<String>,
    },
    /// Say what differs between two versions: metrics, schema, preprocessing, training, data, code.
    Diff {
        /// The model's name.
        model: String,
        /// A version: a number, or an alias.
        a: String,
        /// Another one.
        b: String,
    },
    /// Let an alias name a version, or take it away.
    Alias {
        /// The model's name.
        model: String,
        /// The alias, e.g. `champion`.
        alias: String,
        /// The version: a number, or another alias.
        #[arg(
            id = "model_version",
            value_name = "VERSION",
            required_unless_present = "remove",
            conflicts_with = "remove"
        )]
        version: Option<String>,
        /// Only if the alias names this version now; 0 means that it is not set.
        #[arg(long, value_name = "N")]
        expected: Option<u32>,
        /// Take the alias away.
        #[arg(long)]
        remove: bool,
    },
    /// Set a version's tags, or take them away.
    Tag {
        /// The model's name.
        model: String,
        /// The version: a number, or an alias.
        #[arg(id = "model_version", value_name = "VERSION")]
        version: String,
        /// Tags to set, e.g. `team=vision`.
        #[arg(value_name = "KEY=VALUE", required_unless_present = "remove")]
        tags: Vec<String>,
        /// A tag to take away; may be given several times.
        #[arg(long, value_name = "KEY")]
        remove: Vec<String>,
    },
    /// Replace a version's notes.
    Note {
        /// The model's name.
        model: String,
        /// The version: a number, or an alias.
        #[arg(id = "model_version", value_name = "VERSION")]
        version: String,
        /// The new notes; empty for none.
        notes: String,
    },
    /// Delete a version that is not in service. Its number is never given again.
    Delete {
        /// The model's name.
        model: String,
        /// Its number.
        #[arg(id = "model_version", value_name = "VERSION")]
        version: String,
    },
    /// Write a version as one file, for other clusters and for programs of your own.
    Export {
        /// The model's name.
        model: String,
        /// The version: a number, or an alias.
        #[arg(id = "model_version", value_name = "VERSION")]
        version: String,
        /// The file to write; by default `MODEL-VERSION.bundle`.
        file: Option<PathBuf>,
    },
    /// Register the version in a file that `export` has written. The same artifact is the same version.
    Import {
        /// The file.
        file: PathBuf,
        /// The model's name here; by default the one in the file.
        #[arg(long, value_name = "MODEL")]
        name: Option<String>,
        /// The alias to move to it.
        #[arg(long)]
        alias: Option<String>,
        /// Only if the alias names this version now; 0 means that it is not set.
        #[arg(long, value_name = "N", requires = "alias")]
        expected: Option<u32>,
    },
}

/// What to do with deployments.
#[derive(Debug, Subcommand)]
pub enum DeploymentsCommand {
    /// List deployments, newest first.
    List {
        /// Only those of this pipeline.
        #[arg(long)]
        pipeline: Option<String>,
        /// Only those in this environment.
        #[arg(long)]
        environment: Option<String>,
        /// Only those of this model.
        #[arg(long)]
        model: Option<String>,
        /// At most this many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show a deployment with the changes that it carries.
    Show {
        /// Its id, e.g. `d17`.
        deployment: String,
    },
    /// Follow a deployment until nothing more will happen by itself.
    Watch {
        /// Its id, e.g. `d17`.
        deployment: String,
    },
    /// Let a deployment go live that waits for it, or will.
    Approve {
        /// Its id, e.g. `d17`.
        deployment: String,
    },
    /// Say that a deployment has failed, for the metrics of delivery. What is live stays live; one that is under way is given up.
    MarkFailed {
        /// Its id, e.g. `d17`.
        deployment: String,
        /// Why, for the record.
        #[arg(long)]
        why: String,
        /// Since when it did harm, as an RFC 3339 time; by default since it was live.
        #[arg(long, value_name = "TIME")]
        since: Option<String>,
    },
}

/// What to roll back.
#[derive(Debug, Args)]
pub struct RollbackArguments {
    /// The environment, e.g. `production`.
    pub environment: String,
    /// The model; needed where several are live.
    #[arg(long)]
    pub model: Option<String>,
    /// Why, for the record.
    #[arg(long, default_value = "asked for by a person")]
    pub why: String,
    /// Only if this deployment is what would be undone.
    #[arg(long, value_name = "DEPLOYMENT")]
    pub expected: Option<String>,
}

/// What turned out to be true.
#[derive(Debug, Args)]
pub struct FeedbackArguments {
    /// The model.
    pub model: String,
    /// The file with one JSON object for each row, one after the other: `{"id": "order-4711", "row": 0, "label": "ok"}`; `-` for standard input.
    pub file: PathBuf,
    /// The environment whose replicas have answered.
    #[arg(long, default_value = "production", value_name = "NAME")]
    pub environment: String,
}

/// Which metrics of delivery.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DoraArguments {
    /// Explain one lead time instead.
    #[command(subcommand)]
    pub command: Option<DoraCommand>,
    /// Where the window begins: a time, a date, or how long ago (`7d`); by default 30 days before its end.
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Where the window ends; by default now.
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// Only deployments of this pipeline.
    #[arg(long)]
    pub pipeline: Option<String>,
    /// Only deployments into this environment.
    #[arg(long)]
    pub environment: Option<String>,
    /// Count rollbacks as deployments, too.
    #[arg(long)]
    pub include_rollbacks: bool,
    /// How long after it became live a deployment can fail; by default 24h.
    #[arg(long, value_name = "DURATION")]
    pub failure_window: Option<DurationText>,
}

/// What to explain.
#[derive(Debug, Subcommand)]
pub enum DoraCommand {
    /// Cut a deployment's lead time into segments that add up to it.
    Explain {
        /// Its id, e.g. `d17`.
        deployment: String,
    },
}

/// What to tell.
#[derive(Debug, Subcommand)]
pub enum EventsCommand {
    /// Send CDEvents (`change.merged`, `incident.detected`, `incident.resolved`) from a file.
    Send {
        /// The file with one JSON object after the other; `-` for standard input.
        file: PathBuf,
    },
}

/// What to do to a cluster.
#[derive(Debug, Args)]
pub struct ChaosArguments {
    /// The plan of the faults; by default a new one, which is printed.
    #[arg(long)]
    pub seed: Option<u64>,
    /// How long faults are made.
    #[arg(long, default_value = "60s")]
    pub duration: DurationText,
    /// Members of etcd.
    #[arg(long, default_value_t = 3)]
    pub etcd: usize,
    /// Coordinators.
    #[arg(long, default_value_t = 3)]
    pub coordinators: usize,
    /// Workers.
    #[arg(long, default_value_t = 3)]
    pub workers: usize,
    /// Clients that submit one run after the other.
    #[arg(long, default_value_t = 8)]
    pub clients: usize,
}

/// How to be a coordinator.
#[derive(Debug, Args)]
pub struct CoordinatorArguments {
    /// Its name, for people; by default the machine's.
    #[arg(long, env = "EMBERLINE_NAME")]
    pub name: Option<String>,
    /// The address to serve on. Other than loopback it needs certificates and tokens, or `--insecure`.
    #[arg(long, env = "EMBERLINE_LISTEN", default_value = "127.0.0.1:7420")]
    pub listen: String,
    /// Where others reach it, `host:port`; by default where it listens.
    #[arg(long, env = "EMBERLINE_ADVERTISE")]
    pub advertise: Option<String>,
    /// Serve others than this machine without certificates, or without tokens.
    #[arg(long)]
    pub insecure: bool,
    /// The file with the hashes of tokens that are valid from the start, `ROLE NAME sha256:HEX` on each line; see `tokens generate`. With it, every call needs a token.
    #[arg(long, env = "EMBERLINE_TOKENS_FILE", value_name = "FILE")]
    pub tokens_file: Option<PathBuf>,
    /// The file to which every change is appended with who made it, one JSON object on each line.
    #[arg(long, env = "EMBERLINE_AUDIT_LOG", value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// etcd's members, e.g. `http://10.0.0.1:2379,http://10.0.0.2:2379`.
    #[arg(
        long,
        env = "EMBERLINE_ETCD",
        value_delimiter = ',',
        required = true,
        value_name = "URL"
    )]
    pub etcd: Vec<String>,
    /// How to use etcd.
    #[command(flatten)]
    pub etcd_access: EtcdArguments,
    /// How often the leader lets etcd forget old versions of keys; `0s` never.
    #[arg(long, default_value = "5m")]
    pub etcd_compact_every: DurationText,
    /// Where artifacts, logs and archives are: `s3://bucket/prefix` (with the usual `AWS_…` environment) or `file:///directory` that all machines share.
    #[arg(long, env = "EMBERLINE_ARTIFACTS", value_name = "URL")]
    pub artifacts: String,
    /// The leader's lease, in whole seconds: when a leader's machine vanishes without a word, the next one leads after this long.
    #[arg(long, default_value = "3s")]
    pub lease_ttl: DurationText,
    /// How long nothing may be heard of a worker before its attempts run elsewhere; at least two heartbeats.
    #[arg(long, default_value = "3s")]
    pub worker_grace: DurationText,
    /// How long a worker whose connection was closed may take to come back before its attempts run elsewhere.
    #[arg(long, default_value = "400ms")]
    pub closed_grace: DurationText,
    /// How long a new leader waits for workers to claim the attempts that they still run.
    #[arg(long, default_value = "3s")]
    pub adoption_window: DurationText,
    /// How often workers say that they live.
    #[arg(long, default_value = "1s")]
    pub heartbeat_interval: DurationText,
}

/// How to use etcd.
#[derive(Debug, Args)]
pub struct EtcdArguments {
    /// What all keys in etcd begin with; one for each cluster.
    #[arg(long, env = "EMBERLINE_ETCD_PREFIX", default_value = "emberline")]
    pub etcd_prefix: String,
    /// etcd's user.
    #[arg(long, env = "EMBERLINE_ETCD_USER", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,
    /// The file with the password of etcd's user.
    #[arg(long, env = "EMBERLINE_ETCD_PASSWORD_FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
    /// The authority that signed etcd's certificates, in PEM.
    #[arg(long, env = "EMBERLINE_ETCD_CA")]
    pub etcd_ca: Option<PathBuf>,
    /// Our certificate for etcd, in PEM.
    #[arg(long, env = "EMBERLINE_ETCD_CERT", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// The key of our certificate for etcd, in PEM.
    #[arg(long, env = "EMBERLINE_ETCD_KEY", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
}

/// How to be a worker. The coordinators are named by `--server`, the directory by `--state-dir`.
#[derive(Debug, Args)]
pub struct WorkerArguments {
    /// Its name, one for each worker and stable over restarts; by default the machine's.
    #[arg(long, env = "EMBERLINE_NAME")]
    pub name: Option<String>,
    /// What stages can ask for by `labels`, e.g. `zone=a`; may be given several times.
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
    /// Attempts at a time, at most; resources bound them as well.
    #[arg(long, default_value_t = 64)]
    pub slots: u32,
    /// CPUs that it gives to tasks; by default those that it may use.
    #[arg(long, alias = "cpus")]
    pub cpu: Option<f64>,
    /// Memory that it gives to tasks; by default what it may use.
    #[arg(long)]
    pub memory: Option<ByteSize>,
    /// GPUs that it gives to tasks; by default those that it finds.
    #[arg(long)]
    pub gpus: Option<u32>,
    /// How long it goes on computing while no leader can be reached; then it stops and discards.
    #[arg(long, default_value = "10m")]
    pub orphan_grace: DurationText,
    /// How long running attempts may go on after SIGTERM before they are checkpointed and given back.
    #[arg(long, default_value = "0s")]
    pub drain_timeout: DurationText,
    /// Serve the worker's metrics there, for Prometheus, under `/metrics`.
    #[arg(long, env = "EMBERLINE_METRICS_LISTEN", value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// Serve models there, over gRPC and HTTP. Other than loopback it needs certificates, or `--insecure`.
    #[arg(long, env = "EMBERLINE_SERVE", value_name = "HOST:PORT")]
    pub serve: Option<String>,
    /// Where clients reach the models that it serves; by default where it listens.
    #[arg(
        long,
        env = "EMBERLINE_SERVE_ADVERTISE",
        value_name = "HOST:PORT",
        requires = "serve"
    )]
    pub serve_advertise: Option<String>,
    /// The one environment whose models it serves.
    #[arg(
        long,
        env = "EMBERLINE_ENVIRONMENT",
        default_value = "production",
        value_name = "NAME"
    )]
    pub environment: String,
    /// Serve others than this machine without certificates.
    #[arg(long)]
    pub insecure: bool,
}

/// What to do with the cluster.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Show leader, workers and queue.
    Status,
}

/// What to look at, beside the coordinators of `--server` and the disk of `--state-dir`.
#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// The object store, as the coordinators are given it.
    #[arg(long, env = "EMBERLINE_ARTIFACTS", value_name = "URL")]
    pub artifacts: Option<String>,
    /// etcd's members, as the coordinators are given them.
    #[arg(
        long,
        env = "EMBERLINE_ETCD",
        value_delimiter = ',',
        value_name = "URL"
    )]
    pub etcd: Vec<String>,
    /// How to use etcd.
    #[command(flatten)]
    pub etcd_access: EtcdArguments,
}

/// What to do with workers.
#[derive(Debug, Subcommand)]
pub enum WorkersCommand {
    /// List the workers that are there.
    List,
    /// Tell a worker to take no more work, to finish what runs, and then to end.
    Drain {
        /// Its name.
        worker: String,
    },
}

/// A process that can be asked whether it is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Healthy {
    /// A coordinator: it is well when it serves, whether it leads or not.
    Coordinator,
    /// A worker: it is well while it has a session with a leader.
    Worker,
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokensCommand {
    /// Make a token and print it. It cannot be shown again.
    Create {
        /// Its name.
        name: TokenName,
        /// What it allows: viewer, operator, admin, or worker (to join as one).
        #[arg(long)]
        role: Role,
        /// How long it is valid, e.g. `90d`; by default 1h for the role worker, and for ever for others.
        #[arg(long)]
        ttl: Option<DurationText>,
        /// Write it to this file, which only its owner may read, instead of printing it.
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// List tokens, and the workers that have joined.
    List,
    /// Revoke a token, and what workers have that joined by it; or what one worker has. Their sessions end.
    Revoke {
        /// Its name.
        #[arg(required_unless_present = "worker", conflicts_with = "worker")]
        name: Option<TokenName>,
        /// The worker's name.
        #[arg(long)]
        worker: Option<String>,
    },
    /// Make a token without a cluster: the token goes to a file, its hash to the file of hashes that coordinators read by `--tokens-file`. Where the token's file is there already, nothing is done.
    Generate {
        /// Its name.
        name: TokenName,
        /// What it allows: viewer, operator, admin, or worker (to join as one).
        #[arg(long)]
        role: Role,
        /// The file to write the token to; only its owner may read it. For `tokens generate` this is no token to show.
        #[arg(id = "new_token", long = "to", value_name = "FILE")]
        to: PathBuf,
        /// The file to append the hash to.
        #[arg(long, value_name = "FILE")]
        hashes: PathBuf,
    },
}

/// What to do with certificates.
#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// Make an authority and certificates below a directory: `ca.pem` and `ca-key.pem`, and for each name a directory with `cert.pem`, `key.pem` and `ca.pem`. What is there stays, unless it expires soon or its names differ.
    Make(MakeCerts),
    /// Show the certificates below a directory.
    Show {
        /// The directory.
        directory: PathBuf,
    },
    /// Revoke certificates: they are listed in `crl.pem`, for `--tls-crl`.
    Revoke {
        /// The directory.
        directory: PathBuf,
        /// Whose.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Which certificates to make.
#[derive(Debug, Args)]
pub struct MakeCerts {
    /// The directory.
    pub directory: PathBuf,
    /// A coordinator, with the hosts under which others reach it; its name, `localhost`, 127.0.0.1 and ::1 are always among them.
    #[arg(long, value_name = "NAME[:HOST,…]")]
    pub coordinator: Vec<String>,
    /// The worker of that name, with the hosts under which clients reach the models that it serves.
    #[arg(long, value_name = "NAME[:HOST,…]")]
    pub worker: Vec<String>,
    /// Several workers that share a certificate.
    #[arg(long, value_name = "NAME[:HOST,…]")]
    pub workers: Vec<String>,
    /// Whoever calls: a person, a program, Prometheus.
    #[arg(long, value_name = "NAME")]
    pub client: Vec<String>,
    /// A server that is none of ours: etcd, the object store, the collector.
    #[arg(id = "other_server", long = "other", value_name = "NAME[:HOST,…]")]
    pub other: Vec<String>,
    /// How long a certificate is valid.
    #[arg(long, default_value = "30d")]
    pub ttl: DurationText,
    /// One that expires sooner is made anew; by default a third of `--ttl`.
    #[arg(long)]
    pub renew_within: Option<DurationText>,
    /// Stay, and look at them again so often, until SIGTERM.
    #[arg(long, value_name = "DURATION")]
    pub every: Option<DurationText>,
}

/// A starter pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Template {
    /// A table: collect, convert, validate, train, evaluate, deploy, report.
    Tabular,
    /// Commands of your own.
    Exec,
}

/// What to measure.
#[derive(Debug, Args)]
pub struct BenchArguments {
    /// What to measure; if not given, everything that needs no etcd, but for `serve`, which takes minutes.
    #[arg(value_enum)]
    pub what: Vec<BenchKind>,
    /// Rounds of each; the median is printed.
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Workers of the embedded cluster.
    #[arg(long, default_value_t = 2)]
    pub workers: u32,
    /// For `overhead`: the pipeline to run instead of the starter. For `serve`: a pipeline whose model is served, may be given several times; by default the examples of predictive maintenance and digits where they are there, else the starter.
    #[arg(long, value_name = "FILE")]
    pub pipeline: Vec<PathBuf>,
    /// For `serve`: how long each measurement of requests goes on.
    #[arg(long, default_value_t = 3)]
    pub seconds: u32,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchKind {
    /// Time from nothing to the first worker being ready.
    Startup,
    /// Memory of an idle cluster.
    Memory,
    /// Time of one hop in a chain of 1,000 tasks that do nothing.
    Chain,
    /// Tasks that do nothing in a second: 10,000 independent ones.
    Throughput,
    /// Tasks in a second: one, then 10,000, then one.
    Fan,
    /// Artifact bytes in and out in a second.
    Artifacts,
    /// What a pipeline takes beyond its stages' own time.
    Overhead,
    /// The throughput with a collector that takes all, with one that hangs, and without.
    Telemetry,
    /// Requests to served models from a second process, and versions that take over meanwhile.
    Serve,
    /// The chain and the throughput on one member of etcd, beside etcd alone.
    Etcd,
    /// The same on three members of etcd.
    Etcd3,
    /// How long a cluster takes to go on after its leader or a worker has died. Needs etcd.
    Failover,
    /// What a new leader takes with 100,000 live tasks, and what ended runs leave. Needs etcd.
    Takeover,
}
