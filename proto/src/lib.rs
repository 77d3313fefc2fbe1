//! Every byte that leaves a Godwit process.
//!
//! - [`v1`]: the protobuf messages of `proto/godwit/v1/*.proto` and, with the feature `rpc`, their gRPC services.
//! - [`frame`]: the one envelope of wire, bucket and journal: magic, kind, version, length, BLAKE3, body.
//! - [`leaf`]: BLAKE3 of pages, many at once.
//! - [`seal`], with the feature `seal`: frames compressed and encrypted for the bucket.
//! - [`wrap`], with it: their keys under a cluster's.
//! - [`capability`]: what a guest needs and a host has, how the two compare, and their names.
//! - [`digest`]: what two sides of a transfer compare.
//! - [`heap`], with the feature `rpc`: what a process that carries them does with freed buffers.
//! - [`lane`], with it: calls that carry frames and do not copy them.
//! - [`ids`]: identifiers that cannot be confused with each other.
//! - [`status`]: what can go wrong, as a code that travels.
//!
//! This crate refuses to know the engine, the runtime, files and policy.

pub mod capability;
pub mod digest;
pub mod frame;
#[cfg(feature = "rpc")]
pub mod heap;
pub mod ids;
#[cfg(feature = "rpc")]
pub mod lane;
pub mod leaf;
#[cfg(feature = "seal")]
pub mod seal;
pub mod status;
#[cfg(feature = "seal")]
pub mod wrap;

/// Messages and services of package `godwit.v1`, generated at build time.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated; documented in the .proto files"
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/godwit.v1.rs"));
}

/// The schema of [`v1`], an encoded `google.protobuf.FileDescriptorSet`: what tools need that show messages by the names of
/// their fields.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
