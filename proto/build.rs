//! Compiles `proto/godwit/v1/*.proto` with protox (no protoc to install).

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["machine", "device", "bucket", "transfer", "agent", "controller", "runner"]
        .map(|name| format!("proto/godwit/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(&files, [Path::new("proto")])?;
    if std::env::var_os("CARGO_FEATURE_RPC").is_some() {
        tonic_prost_build::configure().bytes(".godwit.v1.Chunk.frame").compile_fds(descriptors)?;
    } else {
        prost_build::Config::new().bytes([".godwit.v1.Chunk.frame"]).compile_fds(descriptors)?;
    }
    Ok(())
}
