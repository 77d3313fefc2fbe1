//! Compiles `proto/godwit/v1/*.proto` with protox (no protoc to install).

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["machine", "device", "bucket", "transfer", "agent", "controller", "runner", "journal"]
        .map(|name| format!("proto/godwit/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new([Path::new("proto")])?;
    compiler.include_imports(true).open_files(&files)?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    let descriptors = compiler.file_descriptor_set();
    if std::env::var_os("CARGO_FEATURE_RPC").is_some() {
        tonic_prost_build::configure()
            .bytes(".godwit.v1.Chunk.frame")
            .bytes(".godwit.v1.PagesPart.frame")
            .bytes(".godwit.v1.AppendJournalRequest.blocks")
            .compile_fds(descriptors)?;
    } else {
        prost_build::Config::new()
            .bytes([".godwit.v1.Chunk.frame", ".godwit.v1.PagesPart.frame", ".godwit.v1.AppendJournalRequest.blocks"])
            .compile_fds(descriptors)?;
    }
    Ok(())
}
