//! A session that several threads run at once, so that a model's weights are in memory once.
//!
//! The crate `ort` lends a session's `run` to one thread at a time, because some execution providers break where several
//! run. ONNX Runtime itself promises that `Run` may be called on one session from any number of threads: kernels are
//! immutable, and what a run changes (its frame, the arena, the memory patterns) is its own or locked. That promise is
//! believed of the provider for the CPU only, which has kept it since 1.0; the caller sees to it that what has another
//! provider is run by one [`Runner`]. This is the only file that goes past the crate to run.
//!
//! Outputs may outlive the session: the engine's tensors own a share of their allocator, as their handle here does. A
//! panic on this side cannot cross a run, so that it says nothing against the session.

use std::ffi::{CString, c_char};
use std::ptr;
use std::sync::Arc;

use ort::AsPointer;
use ort::logging::LogLevel;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{NoSelectedOutputs, RunOptions, Session, SessionInputValue};
use ort::value::DynValue;

use crate::tensor::{Signature, TensorSpec};

/// A session, with what every run of it asks for.
pub(super) struct Shared {
    session: Session,
    /// In the signature's order, which is the session's.
    inputs: Vec<CString>,
    /// The signature's outputs, in its order: what is not a tensor is never fetched.
    outputs: Vec<CString>,
}

impl Shared {
    pub(super) fn new(session: Session, signature: &Signature) -> ort::Result<Shared> {
        let name = |spec: &TensorSpec| {
            CString::new(&*spec.name).map_err(|_| ort::Error::new("the name of an input or output holds a NUL"))
        };
        let names = |specs: &[TensorSpec]| specs.iter().map(name).collect::<ort::Result<Vec<_>>>();
        Ok(Shared { session, inputs: names(&signature.inputs)?, outputs: names(&signature.outputs)? })
    }
}

/// One thread's runs of a session.
pub(super) struct Runner {
    session: Arc<Shared>,
    options: RunOptions<NoSelectedOutputs>,
    /// The session's own. Outputs hold on to it, and may outlive the session.
    allocator: Allocator,
}

impl Runner {
    pub(super) fn new(session: Arc<Shared>) -> ort::Result<Runner> {
        let mut options = RunOptions::new()?;
        // A failed run is an error its caller gets; a client must not be able to fill the log.
        options.set_log_level(LogLevel::Fatal)?;
        let memory = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Arena, MemoryType::Default)?;
        let allocator = Allocator::new(&session.session, memory)?;
        Ok(Runner { session, options, allocator })
    }

    /// One value per input of the signature, in its order; gives one per output. The engine must not have kept the inputs
    /// once this returns, nor does it.
    pub(super) fn run(&mut self, values: &[SessionInputValue]) -> ort::Result<Vec<Option<DynValue>>> {
        let Shared { session, inputs, outputs } = &*self.session;
        if values.len() != inputs.len() {
            let (found, expected) = (values.len(), inputs.len());
            return Err(ort::Error::new(format!("{found} inputs, expected {expected}")));
        }
        let names = |names: &[CString]| names.iter().map(|name| name.as_ptr()).collect::<Vec<*const c_char>>();
        let (input_names, output_names) = (names(inputs), names(outputs));
        let given: Vec<*const ort::sys::OrtValue> = values.iter().map(|value| value.ptr()).collect();
        let mut made: Vec<*mut ort::sys::OrtValue> = vec![ptr::null_mut(); outputs.len()];
        // SAFETY: every array is as long as the length passed with it; names end in NUL and live in the session, values
        // and options live until the call returns. The session may be in other threads' calls, as the module says.
        let status = unsafe {
            (ort::api().Run)(
                session.ptr().cast_mut(),
                self.options.ptr(),
                input_names.as_ptr(),
                given.as_ptr(),
                given.len(),
                output_names.as_ptr(),
                output_names.len(),
                made.as_mut_ptr(),
            )
        };
        // SAFETY: what a run made, and be it one that failed, is the caller's, each value once; it came from the session's
        // allocator.
        let owned = |value| unsafe { DynValue::from_ptr(value, Some(&self.allocator)) };
        let made: Vec<_> = made.into_iter().map(|value| ptr::NonNull::new(value).map(owned)).collect();
        // SAFETY: the status comes from the call above and is consumed once.
        unsafe { ort::Error::result_from_status(status) }?;
        Ok(made)
    }
}
