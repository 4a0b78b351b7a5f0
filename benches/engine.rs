//! What the server adds to a run: the whole path on an engine that answers at once, beside the bare run.

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use tidegate::backend::fake::Fake;
use tidegate::backend::{Batch, Model};
use tidegate::engine::Engine;
use tidegate::monitor::Monitor;
use tidegate::pool::Pool;
use tidegate::registry::{Config, Engines, Registry};
use tidegate::request::{BudgetConfig, InferRequest, ModelRef, NamedTensor, Origin, Phase, Priority, Protocol};
use tidegate::scheduler::Gate;
use tidegate::tensor::{Shape, Tensor};
use tokio::sync::watch;

pub const WIDTH: usize = 8;
const ORIGIN: Origin = Origin { protocol: Protocol::Http };
const CORES: usize = 2;

/// An engine that serves one model, `sentinel`, by handing its input back. Held with the folder it loaded from.
pub struct Served {
    pub engine: Arc<Engine>,
    _phase: watch::Sender<Phase>,
    _folder: tempfile::TempDir,
}

/// A request of any size is its caller's own run, however long that takes under valgrind: which thread runs it must not
/// depend on the time.
const LONGEST_INLINE: Duration = Duration::from_secs(60);

pub fn serve(fake: Fake) -> Served {
    serve_with(fake, "", Monitor::new())
}

/// `settings`: a `model.toml`. The fake stands where ONNX Runtime would; the file only has to be an ONNX model.
pub fn serve_with(fake: Fake, settings: &str, monitor: Arc<Monitor>) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("sentinel");
    std::fs::create_dir_all(model.join("1")).unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/traps/sentinel/1/model.onnx");
    std::fs::copy(file, model.join("1/model.onnx")).unwrap();
    std::fs::write(model.join("model.toml"), settings).unwrap();
    let config = Config {
        root: folder.path().into(),
        temp_dir: std::env::temp_dir(),
        longest_inline: Some(LONGEST_INLINE),
        ..Config::default()
    };
    let engines = Engines::only(Arc::new(fake));
    let registry = Registry::start_with(config, engines, CORES, Gate::new(CORES), Arc::clone(&monitor)).unwrap();
    registry.wait_loaded();
    let (phase, phases) = watch::channel(Phase::Ready);
    let engine =
        Engine::new(registry, monitor, BudgetConfig::default(), Duration::MAX, phases, Pool::new(CORES).unwrap());
    Served { engine: Arc::new(engine), _phase: phase, _folder: folder }
}

fn row() -> Tensor {
    Tensor::from_vec(Shape::new([1, WIDTH]).unwrap(), vec![1f32; WIDTH]).unwrap()
}

pub fn request(fake: &Fake) -> InferRequest {
    InferRequest {
        id: String::new(),
        model: ModelRef { name: "sentinel".into(), version: None },
        inputs: vec![NamedTensor { name: Arc::clone(&fake.signature().inputs[0].name), tensor: row() }],
        outputs: Vec::new(),
        timeout: None,
        priority: Priority::default(),
        route_key: None,
    }
}

pub async fn infer(engine: &Engine, request: InferRequest) {
    let trace = engine.begin(ORIGIN);
    let permit = engine.admit(&trace, 32).unwrap();
    engine.infer(&trace, request, permit).await.unwrap();
    trace.finish(None);
}

pub fn group() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("engine");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(CORES).enable_all().build().unwrap();
    let fake = Fake::echo(WIDTH);
    let served = serve(fake.clone());

    group.throughput(Throughput::Elements(1));
    let mut instance = fake.instance().unwrap();
    let inputs = [row()];
    group.bench_function("the bare run", |b| b.iter(|| instance.run(&Batch::new(&[&inputs])).unwrap()));
    group.bench_function("one caller", |b| {
        b.iter(|| runtime.block_on(infer(&served.engine, request(&fake))));
    });
    for callers in [8u64, 64] {
        group.throughput(Throughput::Elements(callers));
        group.bench_function(format!("{callers} callers at once"), |b| {
            b.iter(|| {
                runtime.block_on(async {
                    let calls: Vec<_> = (0..callers)
                        .map(|_| {
                            let engine = Arc::clone(&served.engine);
                            let request = request(&fake);
                            tokio::spawn(async move { infer(&engine, request).await })
                        })
                        .collect();
                    for call in calls {
                        call.await.unwrap();
                    }
                });
            });
        });
    }
    group.finish();
}
