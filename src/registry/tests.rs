//! Helpers of this module's tests, and the registry as a whole on the fake engine.

use std::fs;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::task::Poll;
use std::time::{Duration, Instant};

use super::loader::CompareGoldens;
use super::probe::Probe;
use super::{AtStart, Config, Control, Done, Engines, Left, Registry, Status, Version, report};
use crate::backend::fake::{self, Fake};
use crate::backend::{Artifact, Backend, Device, Instance, LoadError, LoadOptions, Model, RunError};
use crate::error::Kind;
use crate::monitor::Monitor;
use crate::request::{Budget, BudgetConfig, ModelRef, Permit, Prepared, Priority, VersionId};
use crate::scheduler::Gate;
use crate::tensor::{DataType, Dim, OutputKind, Shape, Signature, Tensor, TensorSpec};

/// Names, datatypes and dimensions, -1 for a free one.
pub fn signature(inputs: &[(&str, DataType, &[i64])], outputs: &[(&str, DataType, &[i64])]) -> Signature {
    let spec = |(name, dtype, dims): &(&str, DataType, &[i64])| TensorSpec {
        name: (*name).into(),
        dtype: *dtype,
        dims: Some(dims.iter().map(|d| usize::try_from(*d).map_or(Dim::Free(None), Dim::Fixed)).collect()),
    };
    Signature { inputs: inputs.iter().map(spec).collect(), outputs: outputs.iter().map(spec).collect() }
}

/// A model made of a closure, ready to be asked.
pub fn probe(
    signature: &Signature,
    run: impl Fn(&[Tensor]) -> Result<Vec<Tensor>, RunError> + Send + Sync + 'static,
) -> Probe {
    let model = Arc::new(Fake::new(signature.clone()).computing(run));
    Probe::new(model, &Gate::new(1), 1).unwrap()
}

/// A registry of copies of the repository's own small models, on a fake engine.
struct Setup {
    dir: tempfile::TempDir,
    fake: Fake,
    monitor: Arc<Monitor>,
}

impl Setup {
    /// `fake` computes; its signature is each file's own.
    fn new(fake: Fake) -> Setup {
        Setup { dir: tempfile::tempdir().unwrap(), fake, monitor: Monitor::new() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join("models").join(path)
    }

    /// Copies a file of the repository.
    fn copy(&self, from: &str, to: &str) -> &Setup {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(from);
        self.write(to, fs::read(from).unwrap())
    }

    fn write(&self, to: &str, content: impl AsRef<[u8]>) -> &Setup {
        fs::create_dir_all(self.path(to).parent().unwrap()).unwrap();
        fs::write(self.path(to), content).unwrap();
        self
    }

    fn config(&self) -> Config {
        Config {
            root: self.path(""),
            cache_dir: Some(self.dir.path().join("cache")),
            drain_timeout: Duration::from_secs(60),
            ..Config::default()
        }
    }

    fn engines(&self) -> Engines {
        let only = Engines::only(Arc::new(self.fake.clone()));
        Engines { onnxruntime_reason: "a fake".into(), gpus: || Ok(2), ..only }
    }

    fn start(&self) -> Arc<Registry> {
        self.start_with(self.config(), self.engines())
    }

    fn start_with(&self, config: Config, engines: Engines) -> Arc<Registry> {
        let monitor = Arc::clone(&self.monitor);
        let registry = Registry::start_with(config, engines, 2, Gate::new(2), monitor).unwrap();
        registry.wait_loaded();
        registry
    }

    /// Loads that failed so far.
    fn failures(&self) -> u64 {
        let text = self.monitor.render();
        let series = "tidegate_model_loads_total{outcome=\"failed\"} ";
        text.lines().find_map(|line| line.strip_prefix(series)).expect("the series").parse().unwrap()
    }

    /// The folder that this registry keeps its copies in.
    fn run_folder(&self) -> PathBuf {
        let entries = fs::read_dir(self.dir.path().join("cache")).unwrap().map(|entry| entry.unwrap().path());
        entries.into_iter().find(|path| path.is_dir()).unwrap()
    }

    fn cached(&self) -> usize {
        let entries = fs::read_dir(self.dir.path().join("cache")).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).map(|run| fs::read_dir(run).unwrap().count()).sum()
    }
}

/// Two looks: a change counts when it was seen twice.
fn settle(registry: &Registry) {
    registry.poll();
    registry.poll();
}

/// `model/version state`, with the reason where there is one.
fn index(registry: &Registry) -> Vec<String> {
    let line = |status: Status| format!("{}/{} {:?} {}", status.model, status.version, status.state, status.reason);
    registry.status().into_iter().map(|status| line(status).trim_end().to_string()).collect()
}

fn choose(registry: &Registry, name: &str, version: Option<u64>) -> crate::error::Result<Arc<Version>> {
    let version = version.and_then(VersionId::new);
    registry.table().choose(&ModelRef { name: name.into(), version })
}

/// Looks until it is so.
fn await_that(registry: &Registry, what: &str, so: impl Fn() -> bool) {
    let patience = Instant::now() + Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < patience, "{what} never comes: {:?}", index(registry));
        registry.poll();
    }
}

/// One FP32 row of `width` ones through the version's scheduler.
fn submit(version: &Version, width: usize) -> crate::error::Result<Vec<Tensor>> {
    let (prepared, permit) = row(width);
    block_on(version.scheduler().submit(prepared, permit)).map(|answer| answer.outputs)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

fn row(width: usize) -> (Prepared, Permit) {
    let tensor = Tensor::from_vec(Shape::new([1, width]).unwrap(), vec![1f32; width]).unwrap();
    let prepared = Prepared {
        length: None,
        inputs: vec![tensor],
        outputs: vec![0],
        rows: 1,
        key: Box::default(),
        deadline: None,
        priority: Priority::default(),
    };
    (prepared, Budget::new(BudgetConfig::default()).admit(0, Instant::now()).unwrap())
}

const SENTINEL: &str = "tests/traps/sentinel/1/model.onnx";
const LOGITS: &str = "tests/traps/logits/1/model.onnx";

fn echo() -> Fake {
    Fake::echo(1)
}

fn stop(registry: &Registry) {
    assert_eq!(registry.shutdown(Instant::now() + Duration::from_secs(60)), Left::default());
}

#[test]
fn a_stop_tells_that_a_load_is_still_inside_an_engine() {
    let gate = fake::Gate::new();
    let setup = Setup::new(echo().gated(&gate));
    setup.copy(SENTINEL, "m/1/model.onnx");
    let monitor = Arc::clone(&setup.monitor);
    let registry = Registry::start_with(setup.config(), setup.engines(), 2, Gate::new(2), monitor).unwrap();
    gate.wait_for(1);
    assert_eq!(registry.shutdown(Instant::now()), Left { jobs: 0, threads: true });
    gate.open();
    drop(registry.shared.wait(None, |progress| progress.threads == 0));
    stop(&registry);
}

#[test]
fn models_are_loaded_side_by_side_and_versions_of_one_in_order() {
    let gate = fake::Gate::new();
    let setup = Setup::new(echo().gated(&gate));
    for model in ["a/1", "a/2", "b/1", "c/1"] {
        setup.copy(SENTINEL, &format!("{model}/model.onnx"));
    }
    let monitor = Arc::clone(&setup.monitor);
    let registry = Registry::start_with(setup.config(), setup.engines(), 2, Gate::new(2), monitor).unwrap();
    // Each of them waits in its first run, and has said that it warms up; that may not have been heard yet.
    gate.wait_for(2);
    let since = Instant::now();
    let expected = ["a/1 Discovered", "a/2 Warming", "b/1 Warming", "c/1 Discovered"];
    while index(&registry) != expected && since.elapsed() < Duration::from_secs(60) {
        std::thread::yield_now();
    }
    assert_eq!(index(&registry), expected);
    gate.open();
    registry.wait_loaded();
    assert_eq!(index(&registry), ["a/1 Ready", "a/2 Ready", "b/1 Ready", "c/1 Ready"]);
    stop(&registry);
}

#[test]
fn versions_load_and_a_bad_one_fails_alone() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").copy(SENTINEL, "m/3/model.onnx");
    setup.copy("tests/traps_bad/corrupt/1/model.onnx", "m/4/model.onnx").write("empty/1/model.onnx", "");
    let registry = setup.start();
    let index = index(&registry);
    assert!(index[0].starts_with("empty/1 Failed not an ONNX model"), "{index:?}");
    assert_eq!(index[1..3], ["m/1 Ready", "m/3 Ready"]);
    assert!(index[3].starts_with("m/4 Failed not an ONNX model"));
    assert!(registry.is_loaded() && !registry.all_ready());
    let version = choose(&registry, "m", None).unwrap();
    assert_eq!((version.id().to_string(), version.platform()), ("3".into(), "fake"));
    assert!(version.batching().enabled, "{:?}", version.facts().batching);
    assert_eq!(version.facts().backend_reason, "a fake");
    assert_eq!(submit(&version, 8).unwrap()[0].shape().dims(), [1, 8]);
    assert_eq!(choose(&registry, "empty", None).err().unwrap().kind(), Kind::NotFound);
    // Equal content is kept once.
    assert_eq!(setup.cached(), 1);
    drop(version);
    stop(&registry);
    assert_eq!(setup.cached(), 0);
}

#[test]
fn what_the_file_says_of_its_rows_is_the_reason() {
    let setup = Setup::new(echo());
    for trap in ["int8_dynamic", "recurrent", "scalar", "fixed_batch"] {
        setup.copy(&format!("tests/traps/{trap}/1/model.onnx"), &format!("{trap}/model.onnx"));
    }
    let registry = setup.start();
    let reason = |name| choose(&registry, name, Some(1)).unwrap().facts().batching.reason.clone();
    assert!(reason("int8_dynamic").contains("DynamicQuantizeLinear"));
    assert_eq!(reason("recurrent"), "input `state` has a fixed leading dimension of 2");
    assert_eq!(reason("scalar"), "input `scale` is a scalar, without a leading dimension");
    assert_eq!(reason("fixed_batch"), "input `image` has a fixed leading dimension of 1");
    stop(&registry);
}

#[test]
fn a_declared_maximum_of_rows_holds_unbatched_and_fails_the_load_where_rows_cannot_be_counted() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").write("m/model.toml", "batching = { enabled = false, max_batch_size = 2 }");
    for trap in ["scalar", "fixed_batch"] {
        setup.copy(&format!("tests/traps/{trap}/1/model.onnx"), &format!("{trap}/model.onnx"));
        setup.write(&format!("{trap}/model.toml"), "batching = { max_batch_size = 2 }");
    }
    let registry = setup.start();
    let version = choose(&registry, "m", None).unwrap();
    let batching = version.batching();
    assert_eq!((batching.enabled, batching.max_batch_size), (false, Some(2)));
    let failed = |why: &str| format!("Failed model.toml declares a `max_batch_size`, but input {why}");
    let index = index(&registry);
    assert_eq!(index[0], format!("fixed_batch/1 {}", failed("`image` has a fixed leading dimension of 1")));
    assert_eq!(index[2], format!("scalar/1 {}", failed("`scale` is a scalar, without a leading dimension")));
    stop(&registry);
}

#[test]
fn a_version_that_is_added_serves_and_one_that_is_removed_drains() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = setup.start();
    setup.copy(LOGITS, "m/2/model.onnx");
    registry.poll();
    assert_eq!(index(&registry), ["m/1 Ready"]);
    registry.poll();
    assert_eq!(index(&registry), ["m/1 Ready", "m/2 Ready"]);
    // A request chooses version 2, which is removed before it is submitted.
    let chosen = choose(&registry, "m", None).unwrap();
    fs::remove_dir_all(setup.path("m/2")).unwrap();
    settle(&registry);
    assert_eq!(index(&registry), ["m/1 Ready", "m/2 Draining"]);
    assert_eq!(choose(&registry, "m", None).unwrap().id().to_string(), "1");
    assert_eq!(choose(&registry, "m", Some(2)).err().unwrap().kind(), Kind::NotFound);
    assert!(submit(&chosen, 4).is_ok());
    drop(chosen);
    await_that(&registry, "the end of version 2", || registry.status().len() == 1 && setup.cached() == 1);
    stop(&registry);
}

#[test]
fn a_replacement_takes_over_and_a_failed_one_does_not() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = setup.start();
    let first = choose(&registry, "m", None).unwrap();
    setup.write("m/1/model.onnx", "broken");
    settle(&registry);
    let index_now = index(&registry);
    assert!(
        index_now[0].starts_with("m/1 Ready still serving the files before the last change, which failed: not an ONNX"),
        "{index_now:?}"
    );
    assert!(Arc::ptr_eq(&first, &choose(&registry, "m", None).unwrap()));
    setup.copy(LOGITS, "m/1/model.onnx");
    settle(&registry);
    assert_eq!(index(&registry), ["m/1 Ready"]);
    let second = choose(&registry, "m", Some(1)).unwrap();
    assert_ne!(first.digest(), second.digest());
    assert!(submit(&first, 8).is_ok(), "the old version answers whoever still holds it");
    drop((first, second));
    stop(&registry);
}

#[test]
fn files_that_were_only_touched_load_nothing() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = setup.start();
    let first = choose(&registry, "m", None).unwrap();
    setup.copy(SENTINEL, "m/1/copy").write("m/README.md", "more");
    fs::rename(setup.path("m/1/copy"), setup.path("m/1/model.onnx")).unwrap();
    settle(&registry);
    assert!(Arc::ptr_eq(&first, &choose(&registry, "m", None).unwrap()));
    setup.write("m/model.toml", "batching = false");
    settle(&registry);
    assert!(!choose(&registry, "m", None).unwrap().batching().enabled);
    drop(first);
    stop(&registry);
}

#[test]
fn the_version_policy_changes_what_serves() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").copy(SENTINEL, "m/2/model.onnx").write("m/3/model.onnx", "broken");
    setup.write("m/model.toml", "versions = { latest = 1 }");
    let registry = setup.start();
    assert_eq!(registry.table().ready_versions("m"), [VersionId::new(2).unwrap()]);
    assert_eq!(choose(&registry, "m", Some(1)).err().unwrap().kind(), Kind::NotFound);
    setup.write("m/model.toml", "versions = [1]");
    settle(&registry);
    assert_eq!(registry.table().ready_versions("m"), [VersionId::new(1).unwrap()]);
    setup.write("m/model.toml", "version = 1");
    settle(&registry);
    let broken = index(&registry);
    assert!(broken[0].contains("Ready still serving") && broken[0].contains("`versions`, perhaps"), "{broken:?}");
    stop(&registry);
}

/// Runs `act` on a thread of its own; fails the test where it does not end.
fn ends<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(act()));
    ended.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|error| panic!("{what}: {error}"))
}

#[test]
fn a_bad_version_among_the_latest_is_tried_once() {
    let setup = Setup::new(echo());
    setup.write("m/1/model.onnx", "broken").copy(SENTINEL, "m/2/model.onnx");
    setup.write("m/model.toml", "versions = { latest = 2 }");
    let (config, engines, monitor) = (setup.config(), setup.engines(), Arc::clone(&setup.monitor));
    let registry = ends("the start", move || {
        let registry = Registry::start_with(config, engines, 2, Gate::new(2), monitor).unwrap();
        registry.wait_loaded();
        registry
    });
    let is_index = |second: &str| {
        let index = index(&registry);
        index.len() == 2 && index[0].starts_with("m/1 Failed not an ONNX model") && index[1] == second
    };
    assert!(is_index("m/2 Ready"), "{:?}", index(&registry));
    let settle = || {
        let registry = Arc::clone(&registry);
        ends("a look", move || settle(&registry));
    };
    // With two that serve, the bad one is out of sight, and remembered when one of them goes.
    setup.copy(LOGITS, "m/3/model.onnx");
    settle();
    assert_eq!(index(&registry), ["m/2 Ready", "m/3 Ready"]);
    fs::remove_dir_all(setup.path("m/3")).unwrap();
    settle();
    await_that(&registry, "the end of version 3", || is_index("m/2 Ready"));
    assert_eq!(setup.failures(), 1);
    setup.copy(LOGITS, "m/1/model.onnx");
    settle();
    assert_eq!(index(&registry), ["m/1 Ready", "m/2 Ready"], "mended, it is tried again");
    stop(&registry);
}

#[test]
fn a_bad_version_that_is_wanted_only_later_is_tried_once() {
    let setup = Setup::new(echo());
    setup.write("m/1/model.onnx", "broken").copy(SENTINEL, "m/2/model.onnx").copy(LOGITS, "m/3/model.onnx");
    setup.write("m/model.toml", "versions = { latest = 2 }");
    let registry = setup.start();
    assert_eq!((index(&registry).len(), setup.failures()), (2, 0), "version 1 is not looked at");
    fs::remove_dir_all(setup.path("m/3")).unwrap();
    let looking = Arc::clone(&registry);
    ends("a look", move || settle(&looking));
    await_that(&registry, "the end of version 3", || index(&registry).len() == 2);
    assert!(index(&registry)[0].starts_with("m/1 Failed") && index(&registry)[1] == "m/2 Ready");
    assert_eq!((setup.failures(), setup.cached()), (1, 1));
    stop(&registry);
}

#[test]
fn labels_and_kinds_are_checked_against_the_outputs() {
    let setup = Setup::new(echo());
    for model in ["good", "odd", "explicit", "stray"] {
        setup.copy("models/digits/1/model.onnx", &format!("{model}/1/model.onnx"));
        setup
            .write(&format!("{model}/three.txt"), "a\nb\nc\n")
            .copy("models/digits/labels.txt", &format!("{model}/ten.txt"));
    }
    setup.write("good/model.toml", "labels = \"ten.txt\"").write("odd/model.toml", "labels = \"three.txt\"");
    setup.write("explicit/model.toml", "[outputs.probabilities]\nlabels = \"three.txt\"");
    setup.write("stray/model.toml", "[outputs.probability]\nkind = \"values\"");
    let registry = setup.start();
    let facts = |name| choose(&registry, name, None).unwrap().facts().clone();
    assert_eq!(facts("good").outputs[0].labels.as_ref().unwrap().len(), 10);
    let odd = facts("odd");
    assert!(odd.outputs[0].labels.is_none() && odd.warnings.iter().any(|warning| warning.contains("do not fit")));
    let index = index(&registry);
    assert!(index[0].contains("3 names, expected the 10 classes of output `probabilities`"), "{index:?}");
    assert!(index[3].contains("expected `probabilities`, perhaps"), "{index:?}");
    stop(&registry);
}

#[test]
fn refused_inventions_are_a_warning_and_declared_warm_ups_a_failure() {
    let refusing = echo().computing(|_| Err(RunError::InvalidArgument("out of bounds\nat node 3".into())));
    let setup = Setup::new(refusing);
    setup.copy(SENTINEL, "m/1/model.onnx").copy(SENTINEL, "declared/1/model.onnx");
    setup.write("declared/model.toml", "warmup = [\"warmup.json\"]");
    let row = r#"{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [1, 2, 3, 4, 5, 6, 7, 8]}]}"#;
    setup.write("declared/warmup.json", row);
    let registry = setup.start();
    assert_eq!(index(&registry)[0], "declared/1 Failed warm-up `warmup.json`: out of bounds");
    let facts = choose(&registry, "m", None).unwrap().facts().clone();
    assert_eq!(facts.warnings, ["warm-up: the model refuses invented inputs: out of bounds"]);
    assert_eq!(facts.batching.reason, "self-test inconclusive: the model refuses invented inputs: out of bounds");
    stop(&registry);
}

#[test]
fn a_panicking_engine_fails_its_version_only_where_it_must() {
    let setup = Setup::new(echo().computing(|_| panic!("on purpose")));
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = setup.start();
    let facts = choose(&registry, "m", None).unwrap().facts().clone();
    assert!(!facts.batching.enabled && facts.batching.reason.contains("the engine panicked"));
    stop(&registry);
}

/// An engine that makes one instance and panics when it is asked for another.
struct OneLife(Fake);

struct OneLifeModel(Arc<dyn Model>, AtomicBool);

impl Backend for OneLife {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn version(&self) -> String {
        self.0.version()
    }

    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError> {
        Ok(Arc::new(OneLifeModel(self.0.load(artifact, options)?, AtomicBool::new(false))))
    }

    fn instances_share_weights(&self, _: &Artifact, _: &LoadOptions) -> bool {
        true
    }

    fn spreads_runs(&self) -> bool {
        true
    }
}

impl Model for OneLifeModel {
    fn signature(&self) -> &Signature {
        self.0.signature()
    }

    fn output_kinds(&self) -> &[OutputKind] {
        self.0.output_kinds()
    }

    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        assert!(!self.1.swap(true, Ordering::Relaxed), "on purpose");
        self.0.instance()
    }

    fn warnings(&self) -> &[String] {
        &[]
    }
}

#[test]
fn an_engine_that_panics_again_after_the_warm_up_fails_its_version_alone() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").write("m/model.toml", "batching = false");
    let fragile = OneLife(echo().computing(|_| panic!("on purpose")));
    let engines = Engines { onnxruntime: Some(Arc::new(fragile)), ..setup.engines() };
    let registry = setup.start_with(setup.config(), engines);
    assert_eq!(index(&registry), ["m/1 Failed the engine panicked while it loaded the model"]);
    setup.copy("tests/traps_bad/corrupt/1/model.onnx", "n/1/model.onnx");
    settle(&registry);
    assert!(index(&registry)[1].starts_with("n/1 Failed not an ONNX model"), "the folder is still watched");
    stop(&registry);
}

#[test]
fn a_failure_that_may_pass_is_tried_again_and_others_are_not() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").write("bad/1/model.onnx", "broken");
    let registry = setup.start();
    let run = setup.run_folder();
    fs::remove_dir_all(&run).unwrap();
    setup.copy(SENTINEL, "n/1/model.onnx");
    settle(&registry);
    assert!(index(&registry)[2].starts_with("n/1 Failed the model cache cannot be written"), "{:?}", index(&registry));
    fs::create_dir(&run).unwrap();
    await_that(&registry, "a second attempt", || index(&registry)[2] == "n/1 Ready");
    assert!(index(&registry)[0].starts_with("bad/1 Failed"));
    stop(&registry);
}

#[test]
fn a_model_file_beyond_protobuf_is_refused_before_it_is_copied() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = setup.start();
    // Whatever is copied from now on fails of the copy.
    fs::remove_dir_all(setup.run_folder()).unwrap();
    setup.write("n/1/model.onnx", "");
    fs::File::create(setup.path("n/1/model.onnx")).unwrap().set_len(2 << 30).unwrap();
    settle(&registry);
    assert!(index(&registry)[1].contains("2147483648 bytes, expected at most"), "{:?}", index(&registry));
    stop(&registry);
}

#[test]
fn a_run_that_does_not_end_holds_up_no_other_retirement() {
    let gate = fake::Gate::new();
    gate.open();
    let setup = Setup::new(echo().gated(&gate));
    setup.copy(SENTINEL, "hung/1/model.onnx").copy(LOGITS, "m/1/model.onnx").copy(LOGITS, "n/1/model.onnx");
    let config = Config { drain_timeout: Duration::from_secs(3600), ..setup.config() };
    let registry = setup.start_with(config, setup.engines());
    let version = choose(&registry, "hung", None).unwrap();
    gate.hold();
    let (prepared, permit) = row(8);
    block_on(async {
        let mut answer = pin!(version.scheduler().submit(prepared, permit));
        assert!(poll_fn(|context| Poll::Ready(answer.as_mut().poll(context).is_pending())).await);
        gate.wait_for(1);
    });
    drop(version);
    fs::remove_dir_all(setup.path("hung")).unwrap();
    settle(&registry);
    fs::remove_dir_all(setup.path("n")).unwrap();
    settle(&registry);
    await_that(&registry, "the end of `n`", || index(&registry) == ["hung/1 Draining", "m/1 Ready"]);
    gate.open();
    await_that(&registry, "the end of `hung`", || index(&registry) == ["m/1 Ready"] && setup.cached() == 1);
    stop(&registry);
}

#[test]
fn what_is_in_use_at_the_drain_timeout_leaves_the_index_and_is_cleared_up_after_its_last_user() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").copy(LOGITS, "m/2/model.onnx");
    let registry = setup.start_with(Config { drain_timeout: Duration::ZERO, ..setup.config() }, setup.engines());
    let used = choose(&registry, "m", Some(2)).unwrap();
    fs::remove_dir_all(setup.path("m/2")).unwrap();
    settle(&registry);
    await_that(&registry, "the drain timeout", || index(&registry) == ["m/1 Ready"]);
    assert_eq!(setup.cached(), 2);
    drop(used);
    await_that(&registry, "the end of the files", || setup.cached() == 1);
    stop(&registry);
}

#[test]
fn validation_compares_with_the_goldens_and_serving_does_not_unless_told() {
    let setup = Setup::new(echo());
    setup
        .copy("models/digits/1/model.onnx", "m/1/model.onnx")
        .copy("models/digits/1/expected.json", "m/1/expected.json");
    setup.copy(SENTINEL, "plain/1/model.onnx");
    let scan = setup.config().folder().scan().unwrap();
    let reports =
        report::report_with(&setup.config(), setup.engines(), 2, scan.clone(), CompareGoldens::IfThere).unwrap();
    assert!(reports[0].outcome.as_ref().unwrap_err().starts_with("`expected.json`: case `held-out row 0`: output"));
    assert!(reports[1].outcome.is_ok() && reports[1].goldens.is_none());
    let unchecked =
        report::report_with(&setup.config(), setup.engines(), 2, scan, CompareGoldens::IfConfigured).unwrap();
    assert!(unchecked.iter().all(|report| report.outcome.is_ok()));
    assert_eq!(setup.cached(), 0);
    let registry = setup.start();
    assert!(registry.all_ready());
    setup.write("m/model.toml", "[goldens]\non_load = true");
    settle(&registry);
    assert!(index(&registry)[0].contains("Ready still serving") && index(&registry)[0].contains("`expected.json`"));
    stop(&registry);
}

#[test]
fn a_device_that_is_not_there_fails_its_version_alone_or_gives_way_where_it_is_told_to() {
    let setup = Setup::new(echo().with_gpus(1));
    for (model, settings) in [
        ("fallen", "device = 'cuda:1'\ndevice_fallback = 'cpu'"),
        ("gpu", "device = 'cuda'\ninstances = 5"),
        ("plain", ""),
        ("refused", "device = 'cuda:1'"),
    ] {
        setup.copy(SENTINEL, &format!("{model}/1/model.onnx")).write(&format!("{model}/model.toml"), settings);
    }
    let registry = setup.start();
    let refusal = "refused/1 Failed device `cuda:1` cannot be used: the fake engine has 1 GPUs";
    assert_eq!(index(&registry), ["fallen/1 Ready", "gpu/1 Ready", "plain/1 Ready", refusal]);
    let facts = |name| choose(&registry, name, None).unwrap().facts().clone();
    let told = |name| {
        let facts = facts(name);
        let reason = facts.properties().into_iter().find(|(key, _)| *key == "device_reason").unwrap().1;
        (facts.device(), facts.instances(), reason, facts.warnings)
    };
    assert_eq!(told("gpu"), ("cuda:0".into(), 5, "named in model.toml".into(), vec![]));
    assert_eq!(told("plain"), ("cpu".into(), 2, "by default".into(), vec![]));
    let why = "in a GPU's place: device `cuda:1` cannot be used: the fake engine has 1 GPUs";
    assert_eq!(told("fallen"), ("cpu".into(), 2, why.into(), vec![format!("runs on the CPU {why}")]));
    let metrics = setup.monitor.render();
    for (model, device) in [("fallen", "cpu"), ("gpu", "cuda:0")] {
        let mut series = metrics.lines().filter(|line| line.starts_with("tidegate_model_info{model=\""));
        let line = series.find(|line| line.contains(&format!("model=\"{model}\""))).unwrap();
        assert!(line.contains(&format!("device=\"{device}\"")), "{line}");
    }
    stop(&registry);
}

#[test]
fn a_version_on_several_devices_is_tested_and_warmed_on_each_and_has_instances_on_all() {
    let fake = echo().with_gpus(2);
    let setup = Setup::new(fake.clone());
    let groups = "[[instance_group]]\ndevice = 'cpu'\ncount = 1\n[[instance_group]]\ndevice = 'cuda:all'\ncount = 3";
    setup.copy(SENTINEL, "m/1/model.onnx").write("m/model.toml", groups);
    let registry = setup.start();
    let version = choose(&registry, "m", None).unwrap();
    let facts = version.facts();
    assert_eq!((facts.device().as_str(), facts.instances()), ("cuda:0,cuda:1,cpu", 7));
    assert!(facts.batching.enabled && facts.threads().starts_with("cuda:0: 3 instance(s)"), "{}", facts.threads());
    for device in [Device::Cuda(0), Device::Cuda(1), Device::Cpu] {
        let mut rows = fake.log().into_iter().filter(|run| run.device == device).map(|run| run.rows);
        assert!(rows.any(|rows| rows == facts.preferred_rows), "{device} has run a full batch");
    }
    assert_eq!(fake.instances(), 3, "one of each device, warm");
    stop(&registry);
}

#[test]
fn a_root_without_models_is_an_error() {
    let setup = Setup::new(echo());
    setup.write("m/README.md", "");
    let refused = Registry::start_with(setup.config(), setup.engines(), 2, Gate::new(2), Arc::clone(&setup.monitor));
    assert!(refused.err().unwrap().to_string().contains("holds no model"));
}

/// A registry that serves what it is asked for; looked at only by hand.
fn explicit(setup: &Setup, at_start: &[&str]) -> Arc<Registry> {
    let at_start = AtStart::Named(at_start.iter().map(|name| name.to_string()).collect());
    let control = Control::Explicit { at_start, interval: Duration::from_secs(3600) };
    setup.start_with(Config { control, ..setup.config() }, setup.engines())
}

/// Waits for what becomes of a request.
fn told(ask: impl FnOnce(Done) -> crate::error::Result<()>) -> crate::error::Result<()> {
    let (tell, told) = std::sync::mpsc::channel();
    ask(Box::new(move |outcome| tell.send(outcome).unwrap()))?;
    told.recv_timeout(Duration::from_secs(60)).expect("an answer")
}

fn load(registry: &Registry, model: &str) -> Result<(), String> {
    told(|done| registry.load(model, None, done)).map_err(|error| error.to_string())
}

fn load_with(registry: &Registry, model: &str, config: &str) -> Result<(), String> {
    told(|done| registry.load(model, Some(config.into()), done)).map_err(|error| error.to_string())
}

fn unload(registry: &Registry, model: &str) {
    told(|done| registry.unload(model, done)).unwrap();
}

fn idle(registry: &Registry) -> Vec<String> {
    registry.table().idle().iter().map(|model| model.to_string()).collect()
}

#[test]
fn what_is_asked_for_is_served_and_nothing_else() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "a/1/model.onnx").copy(SENTINEL, "b/1/model.onnx").copy(LOGITS, "b/2/model.onnx");
    let registry = explicit(&setup, &["a"]);
    assert_eq!((index(&registry), idle(&registry)), (vec!["a/1 Ready".into()], vec!["b".into()]));
    let first = choose(&registry, "a", None).unwrap();
    setup.copy(LOGITS, "a/2/model.onnx").copy(SENTINEL, "c/1/model.onnx");
    settle(&registry);
    assert_eq!((index(&registry), idle(&registry)), (vec!["a/1 Ready".into()], vec!["b".into(), "c".into()]));
    assert_eq!(load(&registry, "b"), Ok(()));
    assert_eq!(index(&registry), ["a/1 Ready", "b/1 Ready", "b/2 Ready"]);
    assert_eq!(load(&registry, "a"), Ok(()));
    assert_eq!(index(&registry)[..2], ["a/1 Ready", "a/2 Ready"]);
    assert!(Arc::ptr_eq(&first, &choose(&registry, "a", Some(1)).unwrap()), "what did not change is not loaded again");
    assert_eq!(load(&registry, "x"), Err("failed to load 'x', failed to poll from model repository".into()));
    assert!(registry.all_ready() && idle(&registry) == ["c"]);
    stop(&registry);
}

#[test]
fn what_is_unloaded_is_no_longer_chosen_and_answers_whoever_chose_it() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").copy(LOGITS, "m/2/model.onnx").write("m/3/model.onnx", "broken");
    let registry = explicit(&setup, &["m"]);
    let chosen = choose(&registry, "m", Some(1)).unwrap();
    unload(&registry, "m");
    let refused = choose(&registry, "m", None).err().unwrap();
    assert_eq!(refused.message(), "Request for unknown model: 'm' has no available versions");
    assert_eq!((refused.kind(), &*index(&registry)[0]), (Kind::NotFound, "m/1 Draining"));
    assert!(submit(&chosen, 8).is_ok());
    drop(chosen);
    await_that(&registry, "the end", || index(&registry) == ["m/1 Unloaded unloaded", "m/2 Unloaded unloaded"]);
    assert_eq!(setup.cached(), 0);
    // Nobody need know whether it is served, or there.
    unload(&registry, "m");
    unload(&registry, "nothing");
    fs::remove_dir_all(setup.path("m/3")).unwrap();
    assert_eq!(load(&registry, "m"), Ok(()));
    assert_eq!(index(&registry), ["m/1 Ready", "m/2 Ready"]);
    unload(&registry, "m");
    fs::remove_dir_all(setup.path("m")).unwrap();
    await_that(&registry, "the end of its name", || index(&registry).is_empty() && idle(&registry).is_empty());
    stop(&registry);
}

#[test]
fn a_load_that_fails_takes_nothing_away_and_is_tried_again_when_asked() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").write("bad/1/model.onnx", "broken").write("none/1/model.onnx", "x");
    setup.write("none/model.toml", "versions = [7]");
    let registry = explicit(&setup, &["m"]);
    let first = choose(&registry, "m", None).unwrap();
    for failures in [1, 2] {
        let error = load(&registry, "bad").unwrap_err();
        let start = "load failed for model 'bad': version 1 is at UNAVAILABLE state: not an ONNX model";
        assert!(error.starts_with(start) && error.ends_with(';'), "{error}");
        assert_eq!(setup.failures(), failures, "tried again each time, and only then");
        settle(&registry);
    }
    setup.write("m/1/model.onnx", "broken");
    let error = load(&registry, "m").unwrap_err();
    assert!(error.contains("version 1 is at READY state: still serving the files before"), "{error}");
    // Whatever leaves with a load leaves when it has succeeded.
    fs::remove_dir_all(setup.path("m/1")).unwrap();
    setup.write("m/2/model.onnx", "broken");
    let error = load(&registry, "m").unwrap_err();
    assert!(error.starts_with("load failed for model 'm': version 2 is at UNAVAILABLE state: "), "{error}");
    assert!(Arc::ptr_eq(&first, &choose(&registry, "m", None).unwrap()));
    drop(first);
    setup.copy(LOGITS, "m/2/model.onnx");
    assert_eq!(load(&registry, "m"), Ok(()));
    assert_eq!(registry.table().ready_versions("m"), [VersionId::new(2).unwrap()]);
    assert_eq!(load(&registry, "none"), Err("failed to load 'none', no version is available".into()));
    stop(&registry);
}

#[test]
fn settings_given_with_a_load_hold_until_the_next() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").copy(LOGITS, "m/2/model.onnx");
    setup.write("m/model.toml", "batching = { max_batch_size = 7 }");
    let registry = explicit(&setup, &["m"]);
    let served = || {
        let versions = registry.table().ready_versions("m");
        let version = choose(&registry, "m", None).unwrap();
        (versions.len(), version.batching().max_batch_size)
    };
    assert_eq!(served(), (2, Some(7)));
    assert_eq!(load_with(&registry, "m", r#"{"name": "m", "max_batch_size": 4}"#), Ok(()));
    assert_eq!(served(), (1, Some(4)), "the file's settings do not count: the latest version is Triton's policy");
    for config in ["{", r#"{"name": "n"}"#, r#"{"backend": "python"}"#] {
        let error = load_with(&registry, "m", config).unwrap_err();
        assert!(error.starts_with("parameter `config`: "), "{error}");
    }
    let error = load_with(&registry, "m", r#"{"input": [{"name": "x", "data_type": "TYPE_INT8"}]}"#).unwrap_err();
    assert!(error.contains("which failed: parameter `config`: input `x`"), "{error}");
    assert_eq!(served(), (1, Some(4)));
    assert_eq!(load(&registry, "m"), Ok(()));
    assert_eq!(served(), (2, Some(7)));
    stop(&registry);
}

#[test]
fn requests_to_load_wait_in_a_bounded_line_and_each_is_answered() {
    let gate = fake::Gate::new();
    let setup = Setup::new(echo().gated(&gate));
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = explicit(&setup, &[]);
    let (tell, answers) = std::sync::mpsc::channel();
    let ask = || {
        let tell = tell.clone();
        registry.load("m", None, Box::new(move |outcome| tell.send(outcome).unwrap()))
    };
    ask().unwrap();
    gate.wait_for(1);
    assert!(matches!(&index(&registry)[..], [line] if line == "m/1 Loading" || line == "m/1 Warming"));
    assert!(idle(&registry).is_empty());
    let mut asked = 1;
    let refused = loop {
        match ask() {
            Ok(()) => asked += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((asked, refused.kind()), (32, Kind::Overloaded));
    gate.open();
    for _ in 0..asked {
        assert_eq!(answers.recv_timeout(Duration::from_secs(60)).unwrap(), Ok(()));
    }
    assert!(ask().is_ok(), "there is room again");
    assert_eq!(answers.recv_timeout(Duration::from_secs(60)).unwrap(), Ok(()));
    stop(&registry);
}

#[test]
fn what_is_kept_of_the_model_s_own_settings_is_what_describes_it() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").write("m/model.toml", "threads = 2\n[goldens]\non_load = true");
    let registry = explicit(&setup, &[]);
    let error = load_with(&registry, "m", r#"{"max_batch_size": 4}"#).unwrap_err();
    assert!(error.contains("`expected.json`: is not there"), "{error}");
    setup.write("m/model.toml", "[encoder]");
    let error = load_with(&registry, "m", r#"{"max_batch_size": 4}"#).unwrap_err();
    assert!(error.contains("`encoder`: found beside `model.onnx`"), "{error}");
    setup.write("m/model.toml", "encode");
    let error = load_with(&registry, "m", r#"{"max_batch_size": 4}"#).unwrap_err();
    assert!(error.contains("model.toml: `line 1`"), "{error}");
    setup.write("m/model.toml", "threads = 2");
    assert_eq!(load_with(&registry, "m", r#"{"max_batch_size": 4}"#), Ok(()));
    assert_eq!(choose(&registry, "m", None).unwrap().facts().config.threads, None);
    stop(&registry);
}

#[test]
fn a_panic_over_one_request_ends_no_loading() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = explicit(&setup, &[]);
    registry.load("m", None, Box::new(|_| panic!("on purpose"))).unwrap();
    assert_eq!(load(&registry, "m"), Ok(()));
    settle(&registry);
    assert_eq!((index(&registry), registry.unanswered().kind()), (vec!["m/1 Ready".into()], Kind::Internal));
    stop(&registry);
    assert_eq!(registry.unanswered().kind(), Kind::NotReady);
}

#[test]
fn what_is_asked_for_and_failed_for_a_reason_that_may_pass_is_tried_again() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx").copy(SENTINEL, "n/1/model.onnx").copy(SENTINEL, "o/1/model.onnx");
    let registry = explicit(&setup, &["m"]);
    // Its last load failed for good, and takes nothing away, whatever else is tried again.
    fs::remove_dir_all(setup.path("m/1")).unwrap();
    setup.write("m/2/model.onnx", "broken");
    assert!(load(&registry, "m").is_err());
    let run = setup.run_folder();
    let aside = setup.dir.path().join("aside");
    fs::rename(&run, &aside).unwrap();
    for model in ["n", "o"] {
        let error = load(&registry, model).unwrap_err();
        assert!(error.contains("the model cache cannot be written"), "{error}");
    }
    unload(&registry, "o");
    fs::rename(&aside, &run).unwrap();
    await_that(&registry, "a second attempt", || index(&registry).contains(&"n/1 Ready".into()));
    assert!(choose(&registry, "m", Some(1)).is_ok() && choose(&registry, "o", None).is_err());
    stop(&registry);
}

#[test]
fn requests_without_end_do_not_keep_the_folder_from_being_looked_at() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let control = Control::Explicit { at_start: AtStart::Named([].into()), interval: Duration::from_millis(500) };
    let registry = setup.start_with(Config { control, ..setup.config() }, setup.engines());
    setup.copy(SENTINEL, "n/1/model.onnx");
    let patience = Instant::now() + Duration::from_secs(60);
    while idle(&registry) != ["m", "n"] {
        assert!(Instant::now() < patience, "it never looks");
        unload(&registry, "nothing");
    }
    stop(&registry);
}

#[test]
fn loads_and_unloads_of_one_model_come_one_after_the_other() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = explicit(&setup, &[]);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let registry = &registry;
            scope.spawn(move || {
                for turn in 0..16 {
                    if (thread + turn) % 2 == 0 {
                        assert_eq!(load(registry, "m"), Ok(()));
                    } else {
                        unload(registry, "m");
                    }
                }
            });
        }
    });
    assert_eq!(load(&registry, "m"), Ok(()));
    await_that(&registry, "rest", || index(&registry) == ["m/1 Ready"] && setup.cached() == 1);
    stop(&registry);
}

#[test]
fn a_stopped_registry_answers_nobody_and_holds_nobody_up() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    let registry = explicit(&setup, &[]);
    stop(&registry);
    let (tell, told) = std::sync::mpsc::channel();
    // Refused, or dropped unanswered, depending on how far the stop has come.
    let _ = registry.load("m", None, Box::new(move |outcome| tell.send(outcome).unwrap()));
    drop(registry);
    assert_eq!(told.recv_timeout(Duration::from_secs(60)), Err(RecvTimeoutError::Disconnected));
}

#[test]
fn models_to_load_at_start_must_be_there() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "digits/1/model.onnx").copy(SENTINEL, "wine/1/model.onnx");
    let start = |at_start| {
        let control = Control::Explicit { at_start, interval: Duration::from_secs(3600) };
        let (config, monitor) = (Config { control, ..setup.config() }, Arc::clone(&setup.monitor));
        Registry::start_with(config, setup.engines(), 2, Gate::new(2), monitor)
    };
    let error = start(AtStart::Named(["digit".into(), "wine".into()].into())).err().unwrap().to_string();
    assert!(error.contains("no model `digit` to load at start, expected `digits`, perhaps"), "{error}");
    let all = start(AtStart::All).unwrap();
    all.wait_loaded();
    assert_eq!(index(&all), ["digits/1 Ready", "wine/1 Ready"]);
    setup.copy(SENTINEL, "later/1/model.onnx");
    settle(&all);
    assert_eq!((index(&all).len(), idle(&all)), (2, vec!["later".into()]), "all that were there");
    stop(&all);
    for model in ["digits", "wine", "later"] {
        fs::remove_dir_all(setup.path(model)).unwrap();
    }
    let empty = start(AtStart::Named([].into())).unwrap();
    setup.copy(SENTINEL, "m/1/model.onnx");
    assert_eq!(load(&empty, "m"), Ok(()), "models may come later");
    stop(&empty);
}

#[test]
fn what_the_folder_decides_is_not_asked_for() {
    let setup = Setup::new(echo());
    setup.copy(SENTINEL, "m/1/model.onnx");
    for control in [Control::None, Control::Poll(Duration::from_secs(3600))] {
        let registry = setup.start_with(Config { control, ..setup.config() }, setup.engines());
        let refused = registry.load("m", None, Box::new(|_| unreachable!())).unwrap_err();
        let text = "explicit model load / unload is not allowed if polling is enabled";
        assert_eq!((refused.kind(), refused.message()), (Kind::NotReady, text));
        assert!(registry.unload("m", Box::new(|_| unreachable!())).is_err() && registry.all_ready());
        stop(&registry);
    }
}
