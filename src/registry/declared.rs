//! What a model's settings say of its tensors, held against what the model itself says. Pure.

use super::model_config::{ModelConfig, TensorConfig};
use crate::problem::expected_name;
use crate::tensor::{Dim, Signature, TensorSpec, wire_shape};

/// An error names the tensor, what was found and what was expected.
pub fn check(config: &ModelConfig, signature: &Signature) -> Result<(), String> {
    let at = |reason: String| format!("{}: {reason}", config.file.name());
    for (name, declared) in &config.inputs {
        one("input", name, declared, &signature.inputs).map_err(at)?;
    }
    for (name, output) in &config.outputs {
        one("output", name, &output.tensor, &signature.outputs).map_err(at)?;
    }
    let undeclared = signature.inputs.iter().find(|spec| !config.inputs.contains_key(&*spec.name));
    match undeclared.filter(|_| !config.inputs.is_empty()) {
        Some(spec) => {
            Err(at(format!("the model's input `{}` is not declared, expected all inputs or none", spec.name)))
        }
        None => Ok(()),
    }
}

fn one(side: &str, name: &str, declared: &TensorConfig, specs: &[TensorSpec]) -> Result<(), String> {
    let Some(spec) = specs.iter().find(|spec| &*spec.name == name) else {
        let names: Vec<&str> = specs.iter().map(|spec| &*spec.name).collect();
        return Err(format!("`{side}s.{name}`: no such {side}, expected {}", expected_name(name, &names)));
    };
    // The model's own shape, where clients see another.
    let shape = declared.reshape.as_deref().or(declared.shape.as_deref());
    if declared.dtype.is_some_and(|dtype| dtype != spec.dtype) || !fits(shape, spec) {
        let shape = wire_shape(shape.unwrap_or(&spec.to_wire()));
        let dtype = declared.dtype.unwrap_or(spec.dtype);
        let expected = format!("{} {}", spec.dtype, wire_shape(&spec.to_wire()));
        return Err(format!("{side} `{name}`: found {dtype} {shape}, expected {expected} as in the model"));
    }
    Ok(())
}

/// What the model leaves free may be narrowed; what it fixes must be said so.
fn fits(declared: Option<&[i64]>, spec: &TensorSpec) -> bool {
    let (Some(declared), Some(dims)) = (declared, &spec.dims) else { return true };
    let same = |(declared, dim): (&i64, &Dim)| dim.is_free() || dim.to_wire() == *declared;
    declared.len() == dims.len() && declared.iter().zip(dims).all(same)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DataType;

    #[test]
    fn what_is_declared_must_be_what_the_model_says() {
        let spec = |name: &str, dims| TensorSpec { name: name.into(), dtype: DataType::Fp32, dims };
        let rows = || Some(vec![Dim::Free(None), Dim::Fixed(4)]);
        let signature =
            Signature { inputs: vec![spec("x", rows()), spec("any", None)], outputs: vec![spec("y", rows())] };
        let check = |text: &str| super::check(&ModelConfig::parse(text).unwrap(), &signature);
        let inputs = "inputs = { x = { datatype = 'FP32', shape = [-1, 4] }, any = { shape = [7] } }\n";
        assert_eq!(check(""), Ok(()));
        assert_eq!(check(inputs), Ok(()));
        assert_eq!(check("inputs = { x = { shape = [2, 4] }, any = {} }\noutputs.y.kind = 'values'"), Ok(()));
        let error = |text: &str| check(text).unwrap_err();
        assert_eq!(
            error("inputs = { x = { datatype = 'FP64', shape = [-1, 5] }, any = {} }"),
            "model.toml: input `x`: found FP64 [-1,5], expected FP32 [-1,4] as in the model"
        );
        assert_eq!(
            error("outputs.y.shape = [4]"),
            "model.toml: output `y`: found FP32 [4], expected FP32 [-1,4] as in the model"
        );
        assert_eq!(error("outputs.yy.shape = [4]"), "model.toml: `outputs.yy`: no such output, expected `y`, perhaps");
        assert_eq!(
            error("inputs.x.shape = [-1, 4]"),
            "model.toml: the model's input `any` is not declared, expected all inputs or none"
        );
        assert!(error("outputs.y.shape = [-1, -1]").contains("found FP32 [-1,-1]"));
    }
}
