//! One file for each group of commands.

mod artifacts;
mod bench;
mod certs;
mod change;
mod chaos;
mod cluster;
mod coordinator;
mod deployments;
mod dev;
mod doctor;
mod dora;
mod events;
mod feedback;
mod health;
mod init;
mod models;
mod rollback;
mod rollouts;
mod run;
mod runs;
mod submission;
mod tell;
mod tokens;
mod validate;
mod worker;
mod workers;

pub use worker::machine_name;

use clap::CommandFactory as _;

use crate::{
    args::{Arguments, Command},
    output,
};

/// Does what the command line says.
pub async fn dispatch(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments {
        cluster,
        quiet,
        output: format,
        command,
        ..
    } = arguments;
    match command {
        Command::Run(run) => run::run(&cluster, &run, quiet, format).await,
        Command::Submit(submit) => run::submit(&cluster, &submit, format).await,
        Command::Validate { file, params } => validate::validate(&file, &params, quiet, format),
        Command::Plan(submit) => validate::plan(&cluster, &submit, format).await,
        Command::Runs(command) => runs::runs(&cluster, command, quiet, format).await,
        Command::Artifacts(command) => artifacts::artifacts(&cluster, command, quiet, format).await,
        Command::Models(command) => models::models(&cluster, command, format).await,
        Command::Deployments(command) => {
            deployments::deployments(&cluster, command, quiet, format).await
        }
        Command::Rollback(what) => rollback::rollback(&cluster, what, quiet, format).await,
        Command::Feedback(what) => feedback::feedback(&cluster, &what, quiet, format).await,
        Command::Dora(what) => dora::dora(&cluster, what, format).await,
        Command::Events(command) => events::events(&cluster, command, quiet, format).await,
        Command::Environments => rollback::environments(&cluster, format).await,
        Command::Cluster(command) => cluster::cluster(&cluster, &command, format).await,
        Command::Workers(command) => workers::workers(&cluster, command, quiet, format).await,
        Command::Tokens(command) => tokens::tokens(&cluster, command, quiet, format).await,
        Command::Certs(command) => certs::certs(command, quiet, format).await,
        Command::Health { what, address } => health::health(&cluster, what, address, quiet).await,
        Command::Coordinator(how) => coordinator::coordinator(*how, &cluster, quiet).await,
        Command::Worker(how) => worker::worker(&cluster, &how, quiet).await,
        Command::Dev {
            listen,
            workers,
            serve,
            environment,
        } => {
            let serve = dev::Serve {
                listen: serve.as_deref(),
                environment: &environment,
            };
            dev::dev(&cluster, &listen, workers, serve, quiet).await
        }
        Command::Init {
            directory,
            template,
        } => init::init(&directory, template, quiet),
        Command::Doctor(what) => doctor::doctor(&cluster, &what, format).await,
        Command::Bench(what) => bench::bench(&cluster, &what, quiet, format).await,
        Command::BenchAsk => bench::ask().await,
        Command::Chaos(how) => chaos::chaos(&cluster, &how, quiet, format).await,
        Command::Schema => output::json(&emberline_common::spec::schema::json_schema()),
        Command::Reference => Ok(output::line(
            emberline_common::spec::reference::reference_markdown().trim_end(),
        )?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "emberline", &mut script);
            Ok(output::line(String::from_utf8_lossy(&script).trim_end())?)
        }
    }
}

/// The p-quantile of sorted values, by nearest rank.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rank among a few thousand values"
)]
fn quantile(sorted: &[f64], p: f64) -> f64 {
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted
        .get(rank.max(1) - 1)
        .or(sorted.last())
        .copied()
        .unwrap_or(f64::NAN)
}
