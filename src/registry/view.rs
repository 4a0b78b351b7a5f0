//! A model as its settings declare it: tensors of other shapes than the model's own (Triton's `reshape`), extents fixed that
//! the model leaves free, and, where asked for, only the outputs that are declared.
//!
//! Knows what [`super::declared`] has checked; owns the patterns of shapes and how tensors go from one to the other.

use std::sync::Arc;

use super::model_config::{ModelConfig, TensorConfig};
use crate::backend::{Batch, BatchInput, Instance, LoadError, Model, RunError};
use crate::tensor::{Dim, OutputKind, Shape, Signature, Tensor, TensorSpec, wire_shape};

/// Whether every tensor of the one pattern can take the shape of the other: as many -1, which stand for each other in
/// order, and as many elements before, between and after them.
pub fn interchangeable(one: &[i64], other: &[i64]) -> bool {
    let segments = |pattern: &[i64]| -> Option<Vec<u64>> {
        let product = |extents: &[i64]| {
            extents.iter().try_fold(1u64, |product, extent| product.checked_mul(u64::try_from(*extent).ok()?))
        };
        pattern.split(|extent| *extent == -1).map(product).collect()
    };
    segments(one).is_some_and(|segments_of_one| segments(other) == Some(segments_of_one))
}

/// The model itself where the settings declare nothing else than it says.
pub fn of(model: Arc<dyn Model>, config: &ModelConfig) -> Arc<dyn Model> {
    let own = model.signature();
    let inputs = own.inputs.iter().map(|spec| Seen::new(spec, config.inputs.get(&*spec.name))).collect::<Vec<_>>();
    let outputs = own.outputs.iter().enumerate().filter_map(|(position, spec)| {
        let declared = config.outputs.get(&*spec.name);
        let wanted = declared.is_some() || !config.only_declared_outputs;
        wanted.then(|| (position, Seen::new(spec, declared.map(|output| &output.tensor))))
    });
    let (positions, outputs): (Vec<_>, Vec<_>) = outputs.unzip();
    let specs = |seen: &[Seen]| seen.iter().map(|seen| seen.spec.clone()).collect();
    let signature = Signature { inputs: specs(&inputs), outputs: specs(&outputs) };
    let reshaped = inputs.iter().chain(&outputs).any(|seen| seen.reshape.is_some());
    if signature == *own && !reshaped {
        return model;
    }
    let kinds = positions.iter().zip(&outputs).map(|(position, seen)| seen.kind(model.output_kinds()[*position]));
    let kinds = kinds.collect();
    let layout = Layout {
        inputs: inputs.into_iter().map(|seen| seen.reshape).collect(),
        outputs: positions.into_iter().zip(outputs).collect(),
    };
    Arc::new(View { model, signature, kinds, layout: Arc::new(layout) })
}

/// One tensor as clients see it.
struct Seen {
    spec: TensorSpec,
    reshape: Option<Reshape>,
    /// The settings have fixed what the model leaves free.
    narrowed: bool,
}

/// Clients' shapes and the model's own, as patterns: -1 for any extent.
struct Reshape {
    clients: Vec<i64>,
    models: Vec<i64>,
}

struct Layout {
    /// By the model's input.
    inputs: Vec<Option<Reshape>>,
    /// Where the model has them.
    outputs: Vec<(usize, Seen)>,
}

struct View {
    model: Arc<dyn Model>,
    signature: Signature,
    kinds: Vec<OutputKind>,
    layout: Arc<Layout>,
}

struct ViewInstance {
    instance: Box<dyn Instance>,
    layout: Arc<Layout>,
}

impl Seen {
    fn new(own: &TensorSpec, declared: Option<&TensorConfig>) -> Seen {
        let Some(shape) = declared.and_then(|declared| declared.shape.as_deref()) else {
            return Seen { spec: own.clone(), reshape: None, narrowed: false };
        };
        let models = declared.and_then(|declared| declared.reshape.as_deref()).unwrap_or(shape);
        // What is free keeps its symbol.
        let mut free = models
            .iter()
            .enumerate()
            .filter(|(_, extent)| **extent == -1)
            .map(|(axis, _)| own.dims.as_ref().and_then(|dims| dims.get(axis).cloned()).unwrap_or(Dim::Free(None)));
        let dim = |extent: &i64| match usize::try_from(*extent) {
            Ok(extent) => Dim::Fixed(extent),
            Err(_) => free.next().unwrap_or(Dim::Free(None)),
        };
        let spec = TensorSpec { dims: Some(shape.iter().map(dim).collect()), ..own.clone() };
        let reshape = (models != shape).then(|| Reshape { clients: shape.to_vec(), models: models.to_vec() });
        let narrowed = reshape.is_none() && spec != *own;
        Seen { spec, reshape, narrowed }
    }

    /// What the model gave, as it is given to clients.
    fn given(&self, output: Tensor) -> Result<Tensor, String> {
        let because = |why: String| format!("output `{}`: {why}, as declared", self.spec.name);
        match &self.reshape {
            Some(reshape) => reshaped(output, &reshape.models, &reshape.clients).map_err(because),
            None if self.narrowed && !self.spec.accepts(output.shape()) => {
                Err(because(format!("found {}, expected {}", output.shape(), wire_shape(&self.spec.to_wire()))))
            }
            None => Ok(output),
        }
    }

    /// Numbers along a last axis that is another one are not classes any more.
    fn kind(&self, own: OutputKind) -> OutputKind {
        match (&self.reshape, own) {
            (None, _) | (_, OutputKind::Labels) => own,
            (Some(reshape), _) if reshape.clients.last() == reshape.models.last() => own,
            (Some(_), _) => OutputKind::Values,
        }
    }
}

fn reshaped(tensor: Tensor, from: &[i64], to: &[i64]) -> Result<Tensor, String> {
    let dims = tensor.shape().dims();
    let fits = |(pattern, extent): (&i64, &usize)| *pattern == -1 || usize::try_from(*pattern) == Ok(*extent);
    if dims.len() != from.len() || !from.iter().zip(dims).all(fits) {
        return Err(format!("found {}, expected {}", tensor.shape(), wire_shape(from)));
    }
    let mut free = from.iter().zip(dims).filter(|(pattern, _)| **pattern == -1).map(|(_, extent)| *extent);
    let dims = to.iter().map(|extent| usize::try_from(*extent).ok().or_else(|| free.next()));
    let shape = Shape::new(dims.flatten().collect::<Vec<_>>()).map_err(|error| error.to_string())?;
    tensor.reshaped(shape).map_err(|error| error.to_string())
}

/// One input of all jobs.
fn joined(input: BatchInput) -> Result<Tensor, String> {
    let data = input.contiguous(1).cloned().unwrap_or_else(|| {
        let mut joined = vec![0; input.byte_length()];
        input.gather_into(&mut joined);
        joined.into()
    });
    Tensor::new(input.dtype(), input.shape(), data).map_err(|error| error.to_string())
}

impl Model for View {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn output_kinds(&self) -> &[OutputKind] {
        &self.kinds
    }

    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        let instance = self.model.instance()?;
        Ok(Box::new(ViewInstance { instance, layout: Arc::clone(&self.layout) }))
    }

    fn warnings(&self) -> &[String] {
        self.model.warnings()
    }
}

impl Instance for ViewInstance {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Tensor>, RunError> {
        let outputs = if self.layout.inputs.iter().any(Option::is_some) {
            let inputs = self.layout.inputs.iter().zip(batch.inputs()).map(|(reshape, input)| match reshape {
                Some(reshape) => reshaped(joined(input)?, &reshape.clients, &reshape.models),
                None => joined(input),
            });
            let inputs = inputs.collect::<Result<Vec<_>, String>>().map_err(RunError::Failed)?;
            self.instance.run(&Batch::new(&[&inputs]))
        } else {
            self.instance.run(batch)
        }?;
        let wanted = self.layout.outputs.iter().map(|(position, seen)| {
            let output = outputs.get(*position).cloned();
            seen.given(output.ok_or_else(|| format!("output `{}` is missing", seen.spec.name))?)
        });
        wanted.collect::<Result<_, String>>().map_err(RunError::Failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake::Fake;
    use crate::tensor::DataType;

    #[test]
    fn shapes_are_interchangeable_by_their_elements_and_their_free_extents() {
        for (one, other, expected) in [
            (&[1][..], &[][..], true),
            (&[8, 8], &[64], true),
            (&[-1, 1], &[-1], true),
            (&[-1, 4, -1], &[-1, 2, 2, -1], true),
            (&[-1, 4, -1], &[-1, -1, 4], false),
            (&[-1, 4], &[-1, -1], false),
            (&[2], &[3], false),
            (&[-2], &[-2], false),
            (&[i64::MAX, i64::MAX, i64::MAX], &[i64::MAX, i64::MAX, i64::MAX], false),
        ] {
            assert_eq!(interchangeable(one, other), expected, "{one:?} and {other:?}");
        }
    }

    fn spec(name: &str, dims: &[i64]) -> TensorSpec {
        let dim = |extent: &i64| usize::try_from(*extent).map_or(Dim::Free(Some("rows".into())), Dim::Fixed);
        TensorSpec { name: name.into(), dtype: DataType::Fp32, dims: Some(dims.iter().map(dim).collect()) }
    }

    fn model() -> Arc<dyn Model> {
        let inputs = vec![spec("x", &[-1, 4]), spec("z", &[-1, 4])];
        let outputs = vec![spec("left", &[-1, 4]), spec("y", &[-1, 4])];
        Arc::new(Fake::new(Signature { inputs, outputs }).meaning([OutputKind::Values, OutputKind::Logits]))
    }

    fn rows(rows: usize, dims: &[usize]) -> Tensor {
        let shape = Shape::new([&[rows], dims].concat()).unwrap();
        let count = shape.elements();
        Tensor::from_vec(shape, (0..count).map(|i| i as f32).collect()).unwrap()
    }

    #[test]
    fn clients_send_and_get_what_is_declared() {
        let config = ModelConfig::parse(
            "only_declared_outputs = true\ninputs = { x = { shape = [-1, 2, 2], reshape = [-1, 4] }, z = {} }\n\
             outputs.y = { shape = [-1, 2, 2], reshape = [-1, 4] }",
        );
        let model = of(model(), &config.unwrap());
        let signature = model.signature();
        let symbols = |spec: &TensorSpec| (spec.to_wire(), spec.dims.as_ref().unwrap()[0].clone());
        let expected = (vec![-1, 2, 2], Dim::Free(Some("rows".into())));
        assert_eq!(signature.inputs.iter().map(symbols).next(), Some(expected.clone()));
        assert_eq!(signature.outputs.iter().map(symbols).collect::<Vec<_>>(), [expected]);
        assert_eq!(model.output_kinds(), [OutputKind::Values], "not along the classes any more");

        let mut instance = model.instance().unwrap();
        let jobs = [[rows(1, &[2, 2]), rows(1, &[4])], [rows(2, &[2, 2]), rows(2, &[4])]];
        let alone = instance.run(&Batch::new(&[&jobs[1]])).unwrap();
        assert_eq!((alone.len(), alone[0].shape().dims()), (1, &[2, 2, 2][..]));
        let together = instance.run(&Batch::new(&[&jobs[0], &jobs[1]])).unwrap();
        assert_eq!(together[0].shape().dims(), [3, 2, 2]);
        assert_eq!(together[0].split_rows(&[1, 2]).unwrap()[1], alone[0]);
    }

    #[test]
    fn what_the_model_leaves_free_may_be_fixed_and_nothing_declared_is_no_view() {
        let model = model();
        let same = of(Arc::clone(&model), &ModelConfig::parse("outputs.y.kind = 'values'").unwrap());
        assert!(Arc::ptr_eq(&same, &model));
        let fixed = ModelConfig::parse("inputs = { x = { shape = [2, 4] }, z = {} }").unwrap();
        let model = of(model, &fixed);
        assert_eq!(model.signature().inputs[0].to_wire(), [2, 4]);
        assert_eq!(model.signature().outputs.len(), 2);
    }

    #[test]
    fn an_output_of_another_shape_than_declared_fails_the_run() {
        let fake = Fake::echo(4).answering_rows(|_| 0);
        let config = "outputs.y = { shape = [-1, 2, 2], reshape = [-1, 4] }";
        let config = ModelConfig::parse(config).unwrap();
        let run = |fake| of(Arc::new(fake), &config).instance().unwrap().run(&Batch::new(&[&[rows(1, &[4])]]));
        let empty = run(fake).unwrap();
        assert_eq!(empty[0].shape().dims(), [0, 2, 2]);
        let wide = Fake::echo(4).computing(|_| Ok(vec![rows(1, &[5])]));
        let error = run(wide).unwrap_err();
        assert_eq!(error, RunError::Failed("output `y`: found [1,5], expected [-1,4], as declared".into()));

        let free = Signature { inputs: vec![spec("x", &[-1, -1])], outputs: vec![spec("y", &[-1, -1])] };
        let narrowed = ModelConfig::parse("outputs.y.shape = [-1, 4]").unwrap();
        let mut narrowed = of(Arc::new(Fake::new(free)), &narrowed).instance().unwrap();
        assert!(narrowed.run(&Batch::new(&[&[rows(1, &[4])]])).is_ok());
        assert_eq!(narrowed.run(&Batch::new(&[&[rows(1, &[5])]])).unwrap_err(), error);
    }
}
