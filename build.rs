//! Compiles the protocol buffers under `proto/`, one function each, without a system protoc.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    onnx()?;
    open_inference()?;
    model_config()?;
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

/// Triton's `config.pbtxt`, for the registry, which knows nothing of the protocol: structs without a service, and the
/// descriptors that the text is read by.
fn model_config() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/model_config.proto");
    let folder = out_dir()?.join("model_config");
    std::fs::create_dir_all(&folder)?;
    let mut described = protox::Compiler::new(["proto"])?;
    described.open_file("model_config.proto")?;
    std::fs::write(folder.join("model_config.bin"), described.encode_file_descriptor_set())?;
    let files = protox::compile(["proto/model_config.proto"], ["proto"])?;
    prost_build::Config::new().btree_map(["."]).out_dir(folder).compile_fds(files)?;
    Ok(())
}
