//! What Triton's clients ask about a model, as the messages of the gRPC service, which REST writes as JSON: made in one
//! place, the two protocols cannot differ. Pure.

use std::time::Duration;

use super::grpc::proto::model_config::SchedulingChoice;
use super::grpc::proto::model_instance_group::Kind;
use super::grpc::proto::model_queue_policy::TimeoutAction;
use super::grpc::proto::model_version_policy::{All, Latest, PolicyChoice, Specific};
use super::grpc::proto::{self, StatisticDuration};
use crate::engine::{Compute, Device, Setup, Sharing, Total, VersionPolicy, VersionStatistics};
use crate::request::{Batching, Priority};
use crate::tensor::{DataType, TensorSpec};

/// The configuration in effect, whoever set it: `model.toml`, a default, or what was found out about the model.
pub(super) fn config(setup: Setup) -> proto::ModelConfig {
    let batched = has_batch(&setup);
    // Clients refuse by themselves to send more than this: where nothing bounds the rows, nothing may.
    let max_batch_size = if batched { setup.max_batch_size.unwrap_or(usize::MAX) } else { 0 };
    let inputs = setup.signature.inputs.iter().zip(&setup.input_reshapes);
    let outputs = setup.signature.outputs.iter().zip(&setup.output_reshapes).zip(&setup.labels);
    proto::ModelConfig {
        name: setup.name.to_string(),
        platform: setup.platform.to_string(),
        backend: setup.backend.to_string(),
        version_policy: Some(version_policy(&setup.versions)),
        max_batch_size: int32(max_batch_size),
        input: inputs.map(|(spec, reshape)| input(spec, reshape.as_deref(), batched)).collect(),
        output: outputs
            .map(|((spec, reshape), labels)| output(spec, reshape.as_deref(), labels.as_deref(), batched))
            .collect(),
        default_model_filename: setup.model_file.clone().unwrap_or_default(),
        instance_group: instance_groups(&setup),
        scheduling_choice: setup.sharing.as_ref().map(dynamic_batching),
        model_transaction_policy: Some(proto::ModelTransactionPolicy { decoupled: false }),
        response_cache: Some(proto::ModelResponseCache { enable: false }),
        ..Default::default()
    }
}

/// Every input and output has a leading dimension of rows: it batches, or `model.toml` bounds the rows of a request, which
/// speaks for the inputs.
fn has_batch(setup: &Setup) -> bool {
    let batching = Batching { enabled: setup.batching, max_batch_size: setup.max_batch_size, ragged: None };
    batching.has_rows(&setup.signature.outputs)
}

fn input(spec: &TensorSpec, reshape: Option<&[i64]>, batched: bool) -> proto::ModelInput {
    proto::ModelInput {
        name: spec.name.to_string(),
        data_type: data_type(spec.dtype).into(),
        dims: dims(spec, batched),
        reshape: self::reshape(reshape, batched),
        ..Default::default()
    }
}

/// Without the batch's dimension, as the dimensions it stands beside.
fn reshape(models: Option<&[i64]>, batched: bool) -> Option<proto::ModelTensorReshape> {
    let shape = models?.iter().copied().skip(usize::from(batched)).collect();
    Some(proto::ModelTensorReshape { shape })
}

fn output(spec: &TensorSpec, reshape: Option<&[i64]>, labels: Option<&str>, batched: bool) -> proto::ModelOutput {
    proto::ModelOutput {
        name: spec.name.to_string(),
        data_type: data_type(spec.dtype).into(),
        dims: dims(spec, batched),
        reshape: self::reshape(reshape, batched),
        label_filename: labels.unwrap_or_default().to_string(),
        ..Default::default()
    }
}

/// Without the batch's dimension, where there is one.
fn dims(spec: &TensorSpec, batched: bool) -> Vec<i64> {
    let dims = spec.to_wire();
    // A tensor of unknown rank is said to have one free dimension, which is not the batch's.
    let skipped = usize::from(batched && spec.dims.is_some());
    dims.into_iter().skip(skipped).collect()
}

fn data_type(dtype: DataType) -> proto::DataType {
    match dtype {
        DataType::Bool => proto::DataType::TypeBool,
        DataType::Uint8 => proto::DataType::TypeUint8,
        DataType::Uint16 => proto::DataType::TypeUint16,
        DataType::Uint32 => proto::DataType::TypeUint32,
        DataType::Uint64 => proto::DataType::TypeUint64,
        DataType::Int8 => proto::DataType::TypeInt8,
        DataType::Int16 => proto::DataType::TypeInt16,
        DataType::Int32 => proto::DataType::TypeInt32,
        DataType::Int64 => proto::DataType::TypeInt64,
        DataType::Fp16 => proto::DataType::TypeFp16,
        DataType::Bf16 => proto::DataType::TypeBf16,
        DataType::Fp32 => proto::DataType::TypeFp32,
        DataType::Fp64 => proto::DataType::TypeFp64,
        DataType::Bytes => proto::DataType::TypeString,
    }
}

fn version_policy(versions: &VersionPolicy) -> proto::ModelVersionPolicy {
    let choice = match versions {
        VersionPolicy::All => PolicyChoice::All(All {}),
        VersionPolicy::Latest(n) => {
            PolicyChoice::Latest(Latest { num_versions: u32::try_from(*n).unwrap_or(u32::MAX) })
        }
        VersionPolicy::Listed(versions) => {
            let versions = versions.iter().map(|version| i64::try_from(version.number()).unwrap_or(i64::MAX));
            PolicyChoice::Specific(Specific { versions: versions.collect() })
        }
    };
    proto::ModelVersionPolicy { policy_choice: Some(choice) }
}

/// One for each device.
fn instance_groups(setup: &Setup) -> Vec<proto::ModelInstanceGroup> {
    let group = |(number, (device, count)): (usize, &(Device, usize))| {
        let (kind, gpus) = match device {
            Device::Cpu => (Kind::Cpu, Vec::new()),
            Device::Cuda(id) => (Kind::Gpu, vec![i32::try_from(*id).unwrap_or(i32::MAX)]),
        };
        proto::ModelInstanceGroup {
            name: format!("{}_{number}", setup.name),
            kind: kind.into(),
            count: int32(*count),
            gpus,
            ..Default::default()
        }
    };
    setup.instances.iter().enumerate().map(group).collect()
}

fn dynamic_batching(sharing: &Sharing) -> SchedulingChoice {
    let microseconds = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    SchedulingChoice::DynamicBatching(proto::ModelDynamicBatching {
        preferred_batch_size: vec![int32(sharing.preferred_rows)],
        max_queue_delay_microseconds: microseconds(sharing.max_delay),
        priority_levels: Priority::LEVELS.into(),
        default_priority_level: Priority::default().level().into(),
        default_queue_policy: Some(proto::ModelQueuePolicy {
            timeout_action: TimeoutAction::Reject.into(),
            default_timeout_microseconds: sharing.default_timeout.map_or(0, microseconds),
            allow_timeout_override: true,
            max_queue_size: u32::try_from(sharing.max_queue_requests).unwrap_or(u32::MAX),
        }),
        ..Default::default()
    })
}

fn int32(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// Durations by response are left out, as no model gives several; so is memory, of which the engines do not tell.
pub(super) fn statistics(versions: Vec<VersionStatistics>) -> proto::ModelStatisticsResponse {
    proto::ModelStatisticsResponse { model_stats: versions.into_iter().map(of_version).collect() }
}

fn of_version(version: VersionStatistics) -> proto::ModelStatistics {
    let VersionStatistics { name, version, statistics } = version;
    let [compute_input, compute_infer, compute_output] = phases(&statistics.compute);
    let batch = |(rows, compute): (&usize, &Compute)| {
        let [compute_input, compute_infer, compute_output] = phases(compute);
        proto::InferBatchStatistics { batch_size: *rows as u64, compute_input, compute_infer, compute_output }
    };
    proto::ModelStatistics {
        name: name.to_string(),
        version: version.to_string(),
        last_inference: statistics.last_inference_ms,
        inference_count: statistics.inferences,
        execution_count: statistics.executions,
        inference_stats: Some(proto::InferStatistics {
            success: total(statistics.success),
            fail: total(statistics.fail),
            queue: total(statistics.queue),
            compute_input,
            compute_infer,
            compute_output,
            cache_hit: total(Total::default()),
            cache_miss: total(Total::default()),
        }),
        batch_stats: statistics.batches.iter().map(batch).collect(),
        ..Default::default()
    }
}

fn phases(compute: &Compute) -> [Option<StatisticDuration>; 3] {
    [total(compute.input), total(compute.infer), total(compute.output)]
}

fn total(Total { count, ns }: Total) -> Option<StatisticDuration> {
    Some(StatisticDuration { count, ns })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tensor::{Dim, Signature};

    fn spec(dims: Option<Vec<Dim>>) -> TensorSpec {
        TensorSpec { name: "x".into(), dtype: DataType::Int64, dims }
    }

    #[test]
    fn every_datatype_has_its_own() {
        for dtype in DataType::ALL {
            let name = if dtype == DataType::Bytes { "STRING" } else { dtype.name() };
            assert_eq!(data_type(dtype).as_str_name(), format!("TYPE_{name}"));
        }
    }

    #[test]
    fn only_the_batch_is_left_out_of_dims() {
        let rows = || Dim::Free(Some("batch".into()));
        for (dims, batched, expected) in [
            (Some(vec![rows(), Dim::Fixed(3)]), true, &[3][..]),
            (Some(vec![rows(), Dim::Fixed(3)]), false, &[-1, 3]),
            (Some(vec![rows()]), true, &[]),
            (Some(vec![]), false, &[]),
            (None, true, &[-1]),
            (None, false, &[-1]),
        ] {
            assert_eq!(super::dims(&spec(dims.clone()), batched), expected, "{dims:?}");
        }
    }

    #[test]
    fn devices_and_bounds_are_said_as_they_are() {
        let signature = Signature { inputs: vec![spec(None)], outputs: vec![spec(None)] };
        let setup = |max_batch_size, devices: &[Device]| Setup {
            name: "m".into(),
            platform: "onnxruntime_onnx",
            backend: "onnxruntime",
            instances: devices.iter().map(|device| (*device, 3)).collect(),
            signature: Arc::new(signature.clone()),
            model_file: None,
            input_reshapes: vec![None],
            output_reshapes: vec![None],
            labels: vec![None],
            versions: VersionPolicy::All,
            batching: true,
            max_batch_size,
            sharing: None,
        };
        let bounded = config(setup(Some(7), &[Device::Cuda(1), Device::Cpu]));
        let [gpu, cpu] = &bounded.instance_group[..] else { panic!("{:?}", bounded.instance_group) };
        assert_eq!((bounded.max_batch_size, gpu.kind(), &gpu.gpus[..], gpu.count), (7, Kind::Gpu, &[1][..], 3));
        assert_eq!((cpu.kind(), cpu.gpus.len(), gpu.name.as_str(), cpu.name.as_str()), (Kind::Cpu, 0, "m_0", "m_1"));
        assert!(bounded.scheduling_choice.is_none(), "one whose batching was switched off still takes rows");
        assert_eq!(config(setup(None, &[Device::Cpu])).max_batch_size, i32::MAX);
        // Declared for a version that does not batch: as long as the outputs have rows, too.
        let alone = |max_batch_size, output| {
            let signature = Arc::new(Signature { inputs: vec![spec(None)], outputs: vec![spec(output)] });
            config(Setup { signature, batching: false, ..setup(max_batch_size, &[Device::Cpu]) })
        };
        let rows = || Some(vec![Dim::Free(None), Dim::Fixed(2)]);
        let declared = alone(Some(4), rows());
        assert_eq!((declared.max_batch_size, &declared.output[0].dims[..]), (4, &[2][..]));
        assert_eq!(alone(None, rows()).max_batch_size, 0);
        assert_eq!(alone(Some(4), Some(vec![Dim::Fixed(1)])).max_batch_size, 0);
    }
}
