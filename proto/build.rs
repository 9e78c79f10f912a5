//! Compiles the protos in pure Rust, so that no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

const PROTOS: &[&str] = &[
    "emberline/v1/types.proto",
    "emberline/v1/runs.proto",
    "emberline/v1/serving.proto",
    "emberline/v1/workers.proto",
    "emberline/v1/models.proto",
    "emberline/v1/artifacts.proto",
    "emberline/v1/cluster.proto",
    "emberline/v1/deployments.proto",
    "emberline/v1/dora.proto",
    "emberline/v1/feedback.proto",
    "emberline/v1/tokens.proto",
    "inference/v2/open_inference.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=emberline");
    println!("cargo:rerun-if-changed=inference");
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("descriptors.bin"),
        prost::Message::encode_to_vec(&descriptors),
    )?;
    tonic_prost_build::configure()
        .build_transport(false)
        // Tensors are looked at where they lie in the message, not copied out of it first.
        .bytes(".inference")
        .compile_fds(descriptors)?;
    Ok(())
}
