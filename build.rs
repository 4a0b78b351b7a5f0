//! Compiles the protocol buffers under `proto/`, one function each, without a system protoc.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    onnx()?;
    open_inference()?;
    Ok(())
}

/// The model format. `bytes` fields share the buffer they are decoded from: reading a model copies no weights.
fn onnx() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/onnx.proto");
    let files = protox::compile(["proto/onnx.proto"], ["proto"])?;
    prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    Ok(())
}

#[allow(clippy::disallowed_methods, reason = "only cargo knows where to write")]
fn out_dir() -> Result<PathBuf, Box<dyn Error>> {
    Ok(PathBuf::from(std::env::var("OUT_DIR")?))
}

/// The gRPC service: messages, server and client, and their descriptors. The codec refuses hostile messages before they
/// are decoded.
fn open_inference() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/open_inference.proto");
    println!("cargo:rerun-if-changed=proto/model_config.proto");
    let files = protox::compile(["proto/open_inference.proto"], ["proto"])?;
    // What reflection shows and REST writes JSON by, without the comments that the generated code carries.
    let mut described = protox::Compiler::new(["proto"])?;
    described.include_imports(true).open_file("open_inference.proto")?;
    std::fs::write(out_dir()?.join("open_inference.bin"), described.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::protocol::grpc::codec::CheckedCodec")
        .build_transport(false)
        .compile_fds(files)?;
    Ok(())
}
