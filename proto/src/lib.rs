//! The wire contract of Emberline: the types generated from `proto/emberline/v1/*.proto`, and those of
//! the public inference protocol from `proto/inference/v2/*.proto`.
//!
//! This crate has no logic. Wire types stay at the wire: handlers turn them into domain types
//! (`emberline_common`) at the border and never hand them on.

/// Version 1 of the API. The documentation of each item is the comment in its `.proto` file.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("emberline.v1");
}

/// The Open Inference Protocol, version 2. The documentation of each item is the comment in its
/// `.proto` file.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The encoded descriptors of every proto here, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The version of the worker protocol that this build speaks.
pub const WORKER_PROTOCOL_VERSION: u32 = 1;
