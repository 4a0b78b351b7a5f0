//! The tensors of a model as FP32, in this process's own memory or a GPU's. Nothing is mapped: a file that shrinks under a
//! map ends the process.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::{Device, Tensor};
use half::{bf16, f16};

use crate::backend::LoadError;
use crate::backend::safetensors::{Place, Stored};
use crate::error::quoted;
use crate::tensor::DataType;

/// Bytes that are converted at a time, a multiple of every datatype's size.
const CONVERTED_BYTES: usize = 1 << 20;

/// Reads tensors by name, each when it is asked for.
pub struct Tensors<'a> {
    places: &'a BTreeMap<String, Place>,
    files: BTreeMap<&'a str, File>,
    device: &'a Device,
}

impl<'a> Tensors<'a> {
    /// `device`: where tensors are put.
    pub fn open(
        folder: &Path,
        places: &'a BTreeMap<String, Place>,
        device: &'a Device,
    ) -> Result<Tensors<'a>, LoadError> {
        let mut files = BTreeMap::new();
        for place in places.values() {
            if !files.contains_key(&*place.file) {
                let file = File::open(folder.join(&place.file)).map_err(|error| unreadable(&place.file, &error))?;
                files.insert(&*place.file, file);
            }
        }
        Ok(Tensors { places, files, device })
    }

    pub fn vector(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let place = self.place(name)?;
        // Opened with the places.
        let file = self.files.get(&*place.file).ok_or_else(|| missing(name))?;
        floats(file, &place.stored).map_err(|error| unreadable(name, &error))
    }

    pub fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        let dims = self.place(name)?.stored.dims.as_slice();
        self.placed(self.vector(name)?, dims, name)
    }

    /// A matrix [out, in], as PyTorch keeps it, as [in, out]: a product with few rows takes that as it lies, and would
    /// rearrange the other with every call, for as long as it multiplies.
    pub fn transposed(&self, name: &str) -> Result<Tensor, LoadError> {
        let values = self.vector(name)?;
        let [rows, columns] = self.place(name)?.stored.dims[..] else {
            return Err(LoadError::BadModel(format!("tensor `{}` is no matrix", quoted(name))));
        };
        let mut transposed = vec![0f32; values.len()];
        for (row, values) in values.chunks_exact(columns.max(1)).enumerate() {
            let targets = transposed.iter_mut().skip(row).step_by(rows.max(1));
            targets.zip(values).for_each(|(to, from)| *to = *from);
        }
        self.placed(transposed, &[columns, rows], name)
    }

    /// A GPU that cannot take it is one that cannot be used.
    pub fn placed(&self, values: Vec<f32>, dims: &[usize], name: &str) -> Result<Tensor, LoadError> {
        Tensor::from_vec(values, dims, self.device).map_err(|error| {
            let message = format!("tensor `{}`: {}", quoted(name), super::text_of(&error));
            if self.device.is_cpu() { super::refused(message) } else { LoadError::Unavailable(message) }
        })
    }

    fn place(&self, name: &str) -> Result<&'a Place, LoadError> {
        self.places.get(name).ok_or_else(|| missing(name))
    }
}

/// The description has checked that it is there.
fn missing(name: &str) -> LoadError {
    LoadError::BadModel(format!("tensor `{}` is missing", quoted(name)))
}

fn unreadable(name: &str, error: &io::Error) -> LoadError {
    LoadError::BadModel(format!("`{}` cannot be read: {error}", quoted(name)))
}

fn floats(file: &File, stored: &Stored) -> io::Result<Vec<f32>> {
    if stored.dtype == DataType::Fp32 {
        let mut floats = vec![0f32; stored.bytes / 4];
        file.read_exact_at(bytemuck::cast_slice_mut(&mut floats), stored.offset)?;
        return Ok(floats);
    }
    let convert: fn(u16) -> f32 = match stored.dtype {
        DataType::Fp16 => |bits| f16::from_bits(bits).to_f32(),
        DataType::Bf16 => |bits| bf16::from_bits(bits).to_f32(),
        other => return Err(io::Error::other(format!("{other}, expected FP32, FP16 or BF16"))),
    };
    let mut floats = Vec::with_capacity(stored.bytes / 2);
    let mut buffer = vec![0u16; CONVERTED_BYTES.min(stored.bytes) / 2];
    let mut done = 0;
    while done < stored.bytes {
        let part = (stored.bytes - done).min(CONVERTED_BYTES) / 2;
        file.read_exact_at(bytemuck::cast_slice_mut(&mut buffer[..part]), stored.offset + done as u64)?;
        floats.extend(buffer[..part].iter().map(|bits| convert(*bits)));
        done += 2 * part;
    }
    Ok(floats)
}
