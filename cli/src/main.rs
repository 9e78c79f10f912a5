//! `emberline`: the one binary. It parses the command line, finds or starts a cluster, and leaves
//! with an exit code that says what happened; everything else is in the other crates.

mod args;
mod client;
mod commands;
mod embedded;
mod exit;
mod fetch;
mod git;
mod leader_channel;
mod local_cluster;
mod log_fields;
mod moment;
mod output;
mod progress;
mod reopen;
mod security;
mod telemetry;
mod upload;

use std::process::ExitCode;

use clap::Parser as _;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::{args::Arguments, exit::Exit};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Tokens, keys and secrets are in this process's environment and memory: of the processes of the
    // same user, the commands of stages among them, none looks into it. Where it cannot be had, all
    // else works as well.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    // What whoever started this process left open in it (a lock, a pipe, a file with a secret) is not
    // that of the commands that it starts.
    close_fds::set_fds_cloexec(3, &[]);
    // What stays up says what it does; the rest only what goes wrong.
    let stays = matches!(
        arguments.command,
        args::Command::Coordinator(_) | args::Command::Worker(_)
    );
    let verbose = arguments.verbose.max(u8::from(stays && !arguments.quiet));
    telemetry::init_logs(verbose, arguments.log_format);
    // One provider for every TLS connection of the process; a second installation changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(async {
            telemetry::start(&arguments.command)?;
            let outcome = commands::dispatch(arguments).await;
            telemetry::end().await;
            outcome
        }),
        Err(e) => Err(Exit::cluster(format!("cannot start the async runtime: {e}")).into()),
    };
    exit::leave(outcome)
}
