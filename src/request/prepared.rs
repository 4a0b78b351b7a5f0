//! From the request as sent to the request as checked.

use std::time::Instant;

use super::{InferRequest, MAX_TIMEOUT, NamedTensor, Permit, Priority};
use crate::error::{Error, Result, quoted};
use crate::tensor::{Ragged, Shape, Signature, Tensor, TensorSpec, Uneven, bucket, wire_shape};

/// How a version batches, as far as checking a request needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching<'a> {
    /// All inputs and outputs share their leading dimension: it counts rows.
    pub enabled: bool,
    /// The most rows one request may carry, where that is declared; then every input has a leading dimension that is
    /// free, whether or not the version batches.
    pub max_batch_size: Option<usize>,
    /// Where requests of different lengths may share a batch.
    pub ragged: Option<&'a Ragged>,
}

impl Batching<'_> {
    /// Whether the leading dimension of every one of the `outputs` counts rows.
    pub fn has_rows(&self, outputs: &[TensorSpec]) -> bool {
        let by_rows = |spec: &TensorSpec| spec.dims.is_none() || spec.has_free_rows();
        self.enabled || self.max_batch_size.is_some() && outputs.iter().all(by_rows)
    }
}

/// A request checked against a signature. Nothing downstream checks again.
#[derive(Debug)]
pub struct Prepared {
    /// One tensor per input of the signature, in its order.
    pub inputs: Vec<Tensor>,
    /// Positions of the requested outputs, in the order asked for; all of them where none was named.
    pub outputs: Vec<usize>,
    /// Rows of the request, at least 1, where the version batches or declares how many a request may have; else 1.
    pub rows: usize,
    /// Requests whose keys are equal may share a batch: see [`batch_key`].
    pub key: Box<[usize]>,
    /// Of its sequences, where it may share a batch with requests of other lengths.
    pub length: Option<usize>,
    pub deadline: Option<Instant>,
    pub priority: Priority,
}

impl Prepared {
    pub fn input_bytes(&self) -> usize {
        self.inputs.iter().map(|input| input.data().len()).sum()
    }

    /// Resolves names to positions and checks datatypes, shapes, rows and requested outputs.
    pub fn check(
        request: InferRequest,
        permit: &Permit,
        signature: &Signature,
        batching: Batching<'_>,
    ) -> Result<Prepared> {
        let InferRequest { model, inputs, outputs, timeout, priority, .. } = request;
        let model = model.name;
        let inputs = resolve_inputs(inputs, signature, &model)?;
        let rows = match batching {
            Batching { enabled: true, .. } => common_rows(&inputs, signature, &model)?,
            Batching { max_batch_size: Some(_), .. } => {
                inputs.iter().filter_map(Tensor::rows).max().unwrap_or(1).max(1)
            }
            Batching { max_batch_size: None, .. } => 1,
        };
        if let Some(max) = batching.max_batch_size.filter(|max| rows > *max) {
            return Err(Error::invalid(format!("inference request batch-size must be <= {max} for '{model}'")));
        }
        let length = batching.ragged.map_or(Ok(None), |ragged| common_length(ragged, &inputs, signature, &model))?;
        Ok(Prepared {
            outputs: resolve_outputs(&outputs, signature, &model)?,
            rows,
            key: if batching.enabled {
                batch_key(&inputs, signature, batching.ragged.zip(length))
            } else {
                Box::default()
            },
            length,
            inputs,
            deadline: timeout.and_then(|timeout| permit.arrived().checked_add(timeout.min(MAX_TIMEOUT))),
            priority,
        })
    }
}

/// The extents of all free dimensions but the leading ones, after the rank where none is declared: `[2, 3]` beside `[4]`
/// is not `[2]` beside `[3, 4]`. Of axes along sequences only the bucket that their length falls into. Empty for a model
/// whose rows have a fixed shape.
pub fn batch_key(inputs: &[Tensor], signature: &Signature, ragged: Option<(&Ragged, usize)>) -> Box<[usize]> {
    let sequence_axis = |position: usize| Some(ragged?.0.inputs.get(position)?.as_ref()?.axis);
    let mut key = Vec::new();
    for (position, (tensor, spec)) in inputs.iter().zip(&signature.inputs).enumerate() {
        let dims = tensor.shape().dims();
        match &spec.dims {
            None => {
                key.push(dims.len());
                key.extend(dims.iter().skip(1));
            }
            Some(specs) => {
                let along = sequence_axis(position);
                let free = |axis: &usize| specs[*axis].is_free() && along != Some(*axis);
                key.extend((1..dims.len()).filter(free).map(|axis| dims[axis]));
            }
        }
    }
    key.extend(ragged.map(|(_, length)| bucket(length)));
    key.into()
}

fn resolve_inputs(sent: Vec<NamedTensor>, signature: &Signature, model: &str) -> Result<Vec<Tensor>> {
    let mut slots: Vec<Option<Tensor>> = vec![None; signature.inputs.len()];
    let mut names = Vec::with_capacity(sent.len());
    for NamedTensor { name, tensor } in sent {
        let Some((position, spec)) = signature.input(&name) else {
            let expected: Vec<&str> = signature.inputs.iter().map(|spec| &*spec.name).collect();
            return Err(Error::invalid(format!(
                "unexpected inference input '{}' for model '{model}', expected {}",
                quoted(&name),
                name_list(&expected)
            )));
        };
        if slots[position].is_some() {
            return Err(Error::invalid(format!("input '{name}' is given more than once for model '{model}'")));
        }
        slots[position] = Some(checked(tensor, spec, model)?);
        names.push(name);
    }
    let missing: Vec<&str> =
        slots.iter().zip(&signature.inputs).filter(|(slot, _)| slot.is_none()).map(|(_, spec)| &*spec.name).collect();
    if !missing.is_empty() {
        let got: Vec<&str> = names.iter().map(|name| &**name).collect();
        return Err(Error::invalid(format!(
            "expected {} inputs but got {} inputs for model '{model}'. Got input(s) {}, but missing required input(s) \
             {}. Please provide all required input(s).",
            signature.inputs.len(),
            got.len(),
            name_list(&got),
            name_list(&missing),
        )));
    }
    Ok(slots.into_iter().flatten().collect())
}

fn checked(tensor: Tensor, spec: &TensorSpec, model: &str) -> Result<Tensor> {
    if tensor.dtype() != spec.dtype {
        return Err(Error::invalid(format!(
            "inference input '{}' data-type is '{}', but model '{model}' expects '{}'",
            spec.name,
            tensor.dtype(),
            spec.dtype
        )));
    }
    if spec.accepts(tensor.shape()) {
        return Ok(tensor);
    }
    // Triton cannot express a scalar and its users send [1].
    if spec.dims.as_ref().is_some_and(Vec::is_empty) && tensor.shape().dims() == [1] {
        return tensor.reshaped(Shape::scalar()).map_err(|error| Error::internal(error.to_string()));
    }
    Err(Error::invalid(format!(
        "unexpected shape for input '{}' for model '{model}'. Expected {}, got {}",
        spec.name,
        wire_shape(&spec.to_wire()),
        tensor.shape()
    )))
}

fn common_rows(inputs: &[Tensor], signature: &Signature, model: &str) -> Result<usize> {
    let mut named = inputs.iter().zip(&signature.inputs).map(|(tensor, spec)| (tensor.rows().unwrap_or(1), &spec.name));
    let Some((rows, first)) = named.next() else { return Ok(1) };
    if rows == 0 {
        return Err(Error::invalid(format!(
            "input '{first}' has batch size 0 for model '{model}', expected at least 1"
        )));
    }
    match named.find(|(other, _)| *other != rows) {
        None => Ok(rows),
        Some((other, name)) => Err(Error::invalid(format!(
            "input '{name}' has batch size {other} for model '{model}', but input '{first}' has {rows}"
        ))),
    }
}

/// The length of a request's sequences; `None` where they are uneven and need not be even.
fn common_length(ragged: &Ragged, inputs: &[Tensor], signature: &Signature, model: &str) -> Result<Option<usize>> {
    match ragged.length(inputs) {
        Ok(length) => Ok(Some(length)),
        Err(_) if !ragged.even => Ok(None),
        Err(Uneven { first: (first, expected), other: (other, found) }) => {
            let name = |position: usize| &signature.inputs[position].name;
            Err(Error::invalid(format!(
                "input '{}' has length {found} for model '{model}', but input '{}' has {expected}",
                name(other),
                name(first)
            )))
        }
    }
}

fn resolve_outputs(names: &[String], signature: &Signature, model: &str) -> Result<Vec<usize>> {
    if names.is_empty() {
        return Ok((0..signature.outputs.len()).collect());
    }
    let mut positions = Vec::with_capacity(names.len());
    for name in names {
        let (position, _) = signature.output(name).ok_or_else(|| {
            Error::invalid(format!("unexpected inference output '{}' for model '{model}'", quoted(name)))
        })?;
        if positions.contains(&position) {
            return Err(Error::invalid(format!("output '{name}' is requested more than once for model '{model}'")));
        }
        positions.push(position);
    }
    Ok(positions)
}

/// `['a','b']`, as the well-known messages list names.
fn name_list(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
    format!("[{}]", names.join(","))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::error::Kind;
    use crate::request::{Budget, BudgetConfig, ModelRef};
    use crate::tensor::{DataType, Dim, SequenceAxis};

    fn spec(name: &str, dims: &[i64]) -> TensorSpec {
        let dims = dims.iter().map(|d| usize::try_from(*d).map_or(Dim::Free(None), Dim::Fixed)).collect::<Vec<_>>();
        TensorSpec { name: name.into(), dtype: DataType::Fp32, dims: Some(dims) }
    }

    fn signature(inputs: &[(&str, &[i64])]) -> Signature {
        Signature {
            inputs: inputs.iter().map(|(name, dims)| spec(name, dims)).collect(),
            outputs: vec![spec("y", &[-1, 2]), spec("z", &[-1])],
        }
    }

    fn tensor(dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims).unwrap();
        let elements = vec![0f32; shape.elements()];
        Tensor::from_vec(shape, elements).unwrap()
    }

    fn check_with(
        inputs: Vec<(&str, Tensor)>,
        outputs: &[&str],
        signature: &Signature,
        batching: Batching<'_>,
    ) -> Result<Prepared> {
        let permit = Budget::new(BudgetConfig::default()).admit(0, Instant::now()).unwrap();
        Prepared::check(request(inputs, outputs), &permit, signature, batching)
    }

    fn request(inputs: Vec<(&str, Tensor)>, outputs: &[&str]) -> InferRequest {
        InferRequest {
            id: String::new(),
            model: ModelRef { name: "m".into(), version: None },
            inputs: inputs.into_iter().map(|(name, tensor)| NamedTensor { name: Arc::from(name), tensor }).collect(),
            outputs: outputs.iter().map(|name| name.to_string()).collect(),
            timeout: None,
            priority: Priority::default(),
            route_key: None,
        }
    }

    const BATCHED: Batching = Batching { enabled: true, max_batch_size: Some(4), ragged: None };
    const UNBATCHED: Batching = Batching { enabled: false, max_batch_size: None, ragged: None };

    fn message(inputs: Vec<(&str, Tensor)>, signature: &Signature) -> String {
        let error = check_with(inputs, &[], signature, BATCHED).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput);
        error.message().to_string()
    }

    #[test]
    fn nobody_waits_longer_than_may_be_waited() {
        let permit = Budget::new(BudgetConfig::default()).admit(0, Instant::now()).unwrap();
        let due = |timeout| {
            let request = InferRequest { timeout, ..request(vec![("x", tensor(&[1, 4]))], &[]) };
            let prepared = Prepared::check(request, &permit, &signature(&[("x", &[-1, 4])]), UNBATCHED).unwrap();
            prepared.deadline.map(|deadline| deadline - permit.arrived())
        };
        let second = Duration::from_secs(1);
        assert_eq!((due(None), due(Some(second))), (None, Some(second)));
        for longer in [MAX_TIMEOUT + second, Duration::MAX] {
            assert_eq!(due(Some(longer)), Some(MAX_TIMEOUT));
        }
    }

    #[test]
    fn well_known_messages_are_verbatim() {
        let one = signature(&[("x", &[-1, 4])]);
        let two = signature(&[("a", &[-1, 4]), ("b", &[-1, 4])]);
        assert_eq!(
            message(vec![("x", tensor(&[1, 5]))], &one),
            "unexpected shape for input 'x' for model 'm'. Expected [-1,4], got [1,5]"
        );
        let ints = Tensor::from_vec(Shape::new([1, 4]).unwrap(), vec![0i32; 4]).unwrap();
        assert_eq!(
            message(vec![("x", ints)], &one),
            "inference input 'x' data-type is 'INT32', but model 'm' expects 'FP32'"
        );
        assert_eq!(
            message(vec![("a", tensor(&[1, 4]))], &two),
            "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['a'], but missing required input(s) ['b']. \
             Please provide all required input(s)."
        );
        assert_eq!(message(vec![("x", tensor(&[5, 4]))], &one), "inference request batch-size must be <= 4 for 'm'");
        assert_eq!(
            check_with(vec![("x", tensor(&[1, 4]))], &["q"], &one, BATCHED).unwrap_err().message(),
            "unexpected inference output 'q' for model 'm'"
        );
    }

    #[test]
    fn positions_follow_the_signature_and_the_request() {
        let two = signature(&[("a", &[-1, 4]), ("b", &[-1, 2])]);
        let sent = vec![("b", tensor(&[3, 2])), ("a", tensor(&[3, 4]))];
        let prepared = check_with(sent, &["z", "y"], &two, BATCHED).unwrap();
        assert_eq!(prepared.inputs[0].shape().dims(), [3, 4]);
        assert_eq!((prepared.rows, &prepared.outputs[..]), (3, &[1, 0][..]));
    }

    #[test]
    fn rows_must_agree_only_where_they_are_rows() {
        let two = signature(&[("a", &[-1, 4]), ("b", &[-1, 2])]);
        let sent = || vec![("a", tensor(&[3, 4])), ("b", tensor(&[2, 2]))];
        assert!(check_with(sent(), &[], &two, BATCHED).is_err());
        assert_eq!(check_with(sent(), &[], &two, UNBATCHED).unwrap().rows, 1);
        let empty = vec![("a", tensor(&[0, 4])), ("b", tensor(&[0, 2]))];
        assert!(check_with(empty, &[], &two, BATCHED).is_err());
    }

    #[test]
    fn a_declared_maximum_holds_where_nothing_is_batched_too() {
        let two = signature(&[("a", &[-1, 4]), ("b", &[-1, 2])]);
        let limited = Batching { enabled: false, max_batch_size: Some(4), ragged: None };
        let of =
            |a: usize, b: usize| check_with(vec![("a", tensor(&[a, 4])), ("b", tensor(&[b, 2]))], &[], &two, limited);
        assert_eq!([of(4, 1), of(0, 0)].map(|checked| checked.unwrap().rows), [4, 1]);
        for (a, b) in [(5, 5), (1, 5)] {
            assert_eq!(of(a, b).unwrap_err().message(), "inference request batch-size must be <= 4 for 'm'");
        }
    }

    #[test]
    fn duplicates_and_strangers_are_refused() {
        let one = signature(&[("x", &[-1, 4])]);
        let twice = vec![("x", tensor(&[1, 4])), ("x", tensor(&[1, 4]))];
        assert!(message(twice, &one).contains("more than once"));
        assert!(message(vec![("X", tensor(&[1, 4]))], &one).contains("expected ['x']"));
        assert!(check_with(vec![("x", tensor(&[1, 4]))], &["y", "y"], &one, BATCHED).is_err());
    }

    #[test]
    fn a_scalar_is_taken_as_one_element_too() {
        let scalar = signature(&[("s", &[])]);
        for dims in [&[][..], &[1]] {
            let prepared = check_with(vec![("s", tensor(dims))], &[], &scalar, UNBATCHED).unwrap();
            assert_eq!(prepared.inputs[0].shape().rank(), 0);
        }
        assert!(check_with(vec![("s", tensor(&[2]))], &[], &scalar, UNBATCHED).is_err());
    }

    #[test]
    fn keys_are_the_free_extents() {
        let ragged = signature(&[("ids", &[-1, -1, 3])]);
        let prepared = check_with(vec![("ids", tensor(&[2, 7, 3]))], &[], &ragged, BATCHED).unwrap();
        assert_eq!(*prepared.key, [7]);
    }

    #[test]
    fn lengths_of_one_bucket_share_a_key_and_must_agree_within_a_request() {
        let signature = signature(&[("ids", &[-1, -1]), ("mask", &[-1, -1]), ("image", &[-1, -1])]);
        let along = || Some(SequenceAxis { axis: 1, fill: [0; 4].into() });
        let ragged = Ragged { inputs: vec![along(), along(), None], outputs: vec![vec![], vec![]], even: true };
        let free = Ragged { even: false, ..ragged.clone() };
        let check_by = |ragged: &Ragged, ids: usize, mask: usize, image: usize| {
            let batching = Batching { ragged: Some(ragged), ..BATCHED };
            let sent = vec![("ids", tensor(&[1, ids])), ("mask", tensor(&[1, mask])), ("image", tensor(&[1, image]))];
            check_with(sent, &[], &signature, batching)
        };
        let check = |ids: usize, mask: usize, image: usize| check_by(&ragged, ids, mask, image);
        let key = |length: usize, image: usize| check(length, length, image).unwrap().key;
        assert_eq!((key(9, 5), check(9, 9, 5).unwrap().length), (key(12, 5), Some(9)));
        assert_ne!(key(12, 5), key(13, 5));
        assert_ne!(key(12, 5), key(12, 6), "other free axes must be equal");
        assert_eq!(
            check(9, 7, 5).unwrap_err().message(),
            "input 'mask' has length 7 for model 'm', but input 'ids' has 9"
        );
        let uneven = check_by(&free, 9, 7, 5).unwrap();
        assert_eq!((&*uneven.key, uneven.length), (&[9, 7, 5][..], None), "shares a batch with its like only");
    }

    #[test]
    fn inputs_of_undeclared_rank_share_a_batch_only_at_equal_ranks() {
        let mut undeclared = signature(&[("a", &[]), ("b", &[])]);
        undeclared.inputs.iter_mut().for_each(|spec| spec.dims = None);
        let key = |a: &[usize], b: &[usize]| batch_key(&[tensor(a), tensor(b)], &undeclared, None);
        assert_eq!(key(&[1, 2, 3], &[1, 4]), key(&[5, 2, 3], &[5, 4]));
        assert_ne!(key(&[1, 2, 3], &[1, 4]), key(&[1, 2], &[1, 3, 4]));
        assert_ne!(key(&[1, 2, 2], &[1]), key(&[1, 2], &[1, 2]));
    }
}
