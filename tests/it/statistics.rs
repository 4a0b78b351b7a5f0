//! What Triton's clients ask about a model, over REST and gRPC: statistics that count exactly, and the configuration.

use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};
use tidegate::protocol::grpc::proto::{
    InferBatchStatistics, InferStatistics, ModelConfigRequest, ModelInferRequest, ModelStatistics,
    ModelStatisticsRequest, StatisticDuration, model_config::SchedulingChoice,
};
use tonic::{Code, Status};

use crate::grpc::{Client, client, echo};
use crate::support::{Models, TestServer};

fn duration(total: &Option<StatisticDuration>) -> Value {
    let StatisticDuration { count, ns } = total.expect("every duration is there");
    json!({"count": count, "ns": ns})
}

/// A gRPC answer in REST's words, field by field.
fn in_json(model: &ModelStatistics) -> Value {
    let InferStatistics { success, fail, queue, compute_input, compute_infer, compute_output, cache_hit, cache_miss } =
        model.inference_stats.as_ref().unwrap();
    let batch = |batch: &InferBatchStatistics| {
        json!({
            "batch_size": batch.batch_size, "compute_input": duration(&batch.compute_input),
            "compute_infer": duration(&batch.compute_infer), "compute_output": duration(&batch.compute_output),
        })
    };
    assert!(model.response_stats.is_empty() && model.memory_usage.is_empty());
    json!({
        "name": model.name, "version": model.version, "last_inference": model.last_inference,
        "inference_count": model.inference_count, "execution_count": model.execution_count,
        "inference_stats": {
            "success": duration(success), "fail": duration(fail), "queue": duration(queue),
            "compute_input": duration(compute_input), "compute_infer": duration(compute_infer),
            "compute_output": duration(compute_output), "cache_hit": duration(cache_hit),
            "cache_miss": duration(cache_miss),
        },
        "batch_stats": model.batch_stats.iter().map(batch).collect::<Vec<_>>(),
        "memory_usage": [], "response_stats": {},
    })
}

async fn over_grpc(client: &mut Client, name: &str, version: &str) -> Result<Value, Status> {
    let request = ModelStatisticsRequest { name: name.into(), version: version.into() };
    let answer = client.model_statistics(request).await?.into_inner();
    Ok(json!({"model_stats": answer.model_stats.iter().map(in_json).collect::<Vec<_>>()}))
}

fn over_rest(server: &TestServer, path: &str) -> Value {
    let reply = server.get(&format!("/v2/models{path}/stats"));
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{}", reply.text());
    reply.json()
}

/// `[success, fail, queue, compute_input, compute_infer, compute_output]`, counts only.
fn counts(model: &Value) -> [u64; 6] {
    ["success", "fail", "queue", "compute_input", "compute_infer", "compute_output"]
        .map(|phase| model["inference_stats"][phase]["count"].as_u64().unwrap())
}

fn rows(rows: usize) -> Value {
    json!({"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": vec![0.5; rows * 4]}]})
}

fn ids(id: i64) -> Value {
    json!({"inputs": [{"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": [id]}]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn requests_rows_executions_and_failures_are_counted_exactly() {
    let models = Models::new().with("gather").with("row_coupled");
    models.write("row_coupled/model.toml", "[batching]\nmax_batch_size = 4\n");
    models.add_version("identity_fp32", "1", "1");
    models.add_version("identity_fp32", "1", "2");
    let server = TestServer::of(models.path()).start();
    let mut client = client(&server).await;
    let never = &over_rest(&server, "/identity_fp32/versions/2")["model_stats"][0];
    assert_eq!(
        [&never["last_inference"], &never["inference_count"], &never["execution_count"], &never["batch_stats"]],
        [&json!(0), &json!(0), &json!(0), &json!([])],
        "loading and warming up are nobody's inferences"
    );

    // One at a time, so that none share an execution.
    for (request, status) in [(rows(3), 200), (rows(1), 200), (rows(3), 200), (ids(1), 400)] {
        assert_eq!(server.infer("identity_fp32", &request).status, status);
    }
    client.model_infer(echo(2)).await.unwrap();
    let wrong_shape = ModelInferRequest { raw_input_contents: Vec::new(), ..echo(1) };
    assert_eq!(client.model_infer(wrong_shape).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(server.infer("identity_fp32/versions/1", &rows(5)).status, 200);
    assert_eq!(server.infer("identity_fp32/versions/3", &rows(1)).status, 404, "chosen by no version");
    // Fails in the engine.
    assert_eq!([1, 999].map(|id| server.infer("gather", &ids(id)).status), [200, 400]);

    let settled = |path: &str, expected: [u64; 3]| {
        server.eventually("the last request is counted", |server| {
            let model = &over_rest(server, path)["model_stats"][0];
            let [success, fail, ..] = counts(model);
            [success, fail, model["execution_count"].as_u64().unwrap()] == expected
        });
        over_rest(&server, path)["model_stats"][0].clone()
    };
    let second = settled("/identity_fp32/versions/2", [4, 1, 4]);
    assert_eq!(counts(&second), [4, 1, 4, 4, 4, 4]);
    assert_eq!([&second["inference_count"], &second["execution_count"]], [&json!(9), &json!(4)]);
    let batches = second["batch_stats"].as_array().unwrap().iter();
    let batches: Vec<_> = batches.map(|batch| (&batch["batch_size"], &batch["compute_infer"]["count"])).collect();
    assert_eq!(batches, [(&json!(1), &json!(1)), (&json!(2), &json!(1)), (&json!(3), &json!(2))]);
    let ns = |phase: &str| second["inference_stats"][phase]["ns"].as_u64().unwrap();
    let parts = ns("queue") + ns("compute_input") + ns("compute_infer") + ns("compute_output");
    assert!(parts > 0 && parts <= ns("success"), "{second}");
    assert!(ns("fail") > 0 && second["last_inference"].as_u64().unwrap() > 1_700_000_000_000, "{second}");
    let first = settled("/identity_fp32/versions/1", [1, 0, 1]);
    assert_eq!([&first["inference_count"], &first["batch_stats"][0]["batch_size"]], [&json!(5), &json!(5)]);
    let gather = settled("/gather", [1, 1, 1]);
    assert_eq!([&gather["inference_count"], &gather["execution_count"]], [&json!(1), &json!(1)]);

    // Never shares a batch, and its requests have declared rows.
    assert_eq!(server.infer("row_coupled", &rows(3)).status, 200);
    let coupled = settled("/row_coupled", [1, 0, 1]);
    assert_eq!([&coupled["inference_count"], &coupled["batch_stats"][0]["batch_size"]], [&json!(3), &json!(3)]);
    let config = server.get("/v2/models/row_coupled/config").json();
    assert_eq!([&config["max_batch_size"], &config["dynamic_batching"]], [&json!(4), &Value::Null]);

    // Nothing runs any more: both protocols say the same, whole, by model and by version.
    for (path, name, version) in [
        ("", "", ""),
        ("/identity_fp32", "identity_fp32", ""),
        ("/identity_fp32/versions/1", "identity_fp32", "1"),
        ("/identity_fp32", "identity_fp32", "-1"),
    ] {
        assert_eq!(over_rest(&server, path), over_grpc(&mut client, name, version).await.unwrap(), "{path}");
    }
    assert_eq!(over_rest(&server, "")["model_stats"], json!([gather, first, second, coupled]));
    for (path, name, version, status, code) in [
        ("/nope", "nope", "", 404, Code::NotFound),
        ("/gather/versions/2", "gather", "2", 404, Code::NotFound),
        ("/gather/versions/x", "gather", "x", 400, Code::InvalidArgument),
    ] {
        assert_eq!(server.get(&format!("/v2/models{path}/stats")).status, status);
        assert_eq!(over_grpc(&mut client, name, version).await.unwrap_err().code(), code);
    }
}

#[test]
fn requests_that_share_an_execution_each_count_it() {
    const REQUESTS: usize = 4;
    let models = Models::new().with("gather");
    // The batch is sent when it is full, long before its delay is over.
    models.write(
        "gather/model.toml",
        format!("[batching]\npreferred_rows = {REQUESTS}\nmax_delay = \"60s\"\ntune = false\n"),
    );
    let server = Arc::new(TestServer::of(models.path()).start());
    let callers = (0..REQUESTS).map(|_| {
        let server = Arc::clone(&server);
        thread::spawn(move || server.infer("gather", &ids(1)).status)
    });
    let callers: Vec<_> = callers.collect();
    assert!(callers.into_iter().all(|caller| caller.join().unwrap() == 200));
    server.eventually("the batch is counted", |server| {
        let model = &over_rest(server, "/gather")["model_stats"][0];
        counts(model)[0] == REQUESTS as u64 && model["execution_count"] == 1
    });
    let model = &over_rest(&server, "/gather")["model_stats"][0];
    assert_eq!((counts(model), &model["inference_count"]), ([4, 0, 4, 4, 4, 4], &json!(REQUESTS)));
    let [by_request, by_batch] =
        [&model["inference_stats"], &model["batch_stats"][0]].map(|of| of["compute_infer"]["ns"].as_u64().unwrap());
    assert_eq!((by_request, &model["batch_stats"][0]["batch_size"]), (4 * by_batch, &json!(REQUESTS)));
}

#[test]
fn a_version_loaded_again_begins_at_zero() {
    let models = Models::new().with("identity_fp32");
    let server = TestServer::of(models.path()).start();
    assert_eq!(server.infer("identity_fp32", &rows(1)).status, 200);
    let success = |server: &TestServer| counts(&over_rest(server, "/identity_fp32")["model_stats"][0])[0];
    server.eventually("the request is counted", |server| success(server) == 1);
    models.write("identity_fp32/model.toml", "[batching]\npreferred_rows = 2\n");
    server.eventually("the new load is published", |server| success(server) == 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_configuration_is_what_is_in_effect() {
    let models = Models::new().with("digits").with("identity_fp32").with("scalar").with("identity_bytes");
    models.write(
        "digits/model.toml",
        "instances = 1\nlabels = \"labels.txt\"\nversions = [1, 2]\n\
         [batching]\npreferred_rows = 8\nmax_batch_size = 16\nmax_delay = \"2ms\"\n[limits]\nmax_queue_requests = 50\n",
    );
    models.write("scalar/model.toml", "versions = { latest = 3 }\n");
    let server = TestServer::of(models.path()).start();
    let mut client = client(&server).await;
    let config = |path: &str| {
        let reply = server.get(&format!("/v2/models/{path}/config"));
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{}", reply.text());
        reply.json()
    };
    let digits = config("digits/versions/1");
    let tensor = |name: &str, data_type: &str, dims: Value, more: Value| {
        let mut tensor = json!({"name": name, "data_type": data_type, "dims": dims, "is_shape_tensor": false,
                                "is_non_linear_format_io": false});
        tensor.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        tensor
    };
    let input = json!({"format": "FORMAT_NONE", "allow_ragged_batch": false, "optional": false});
    let engine = server.get("/v2/models/digits").json();
    assert_eq!(
        digits,
        json!({
            "name": "digits", "platform": engine["platform"], "backend": engine["properties"]["backend"], "runtime": "",
            "version_policy": {"specific": {"versions": [1, 2]}}, "max_batch_size": 16,
            "input": [tensor("image", "TYPE_FP32", json!([64]), input.clone())],
            "output": [tensor("probabilities", "TYPE_FP32", json!([10]), json!({"label_filename": "labels.txt"}))],
            "batch_input": [], "batch_output": [],
            "dynamic_batching": {
                "preferred_batch_size": [8], "max_queue_delay_microseconds": 2000, "preserve_ordering": false,
                "priority_levels": 255, "default_priority_level": 128, "priority_queue_policy": {},
                "default_queue_policy": {
                    "timeout_action": "REJECT", "default_timeout_microseconds": 0, "allow_timeout_override": true,
                    "max_queue_size": 50,
                },
            },
            "instance_group": [{
                "name": "digits_0", "kind": "KIND_CPU", "count": 1, "gpus": [], "secondary_devices": [], "profile": [],
                "passive": false, "host_policy": "",
            }],
            "default_model_filename": "", "cc_model_filenames": {}, "metric_tags": {}, "parameters": {},
            "model_warmup": [], "model_transaction_policy": {"decoupled": false}, "response_cache": {"enable": false},
        })
    );
    // Without a bound, clients must not see one.
    let echo = config("identity_fp32");
    assert_eq!([&echo["max_batch_size"], &echo["input"][0]["dims"]], [&json!(i32::MAX), &json!([-1])]);
    assert_eq!(echo["version_policy"], json!({"all": {}}));
    assert_eq!(config("identity_bytes")["input"][0]["data_type"], "TYPE_STRING");
    // Unbatched: whole shapes, and nothing that says how requests share.
    let scalar = config("scalar");
    assert_eq!([&scalar["max_batch_size"], &scalar["dynamic_batching"]], [&json!(0), &Value::Null]);
    assert_eq!([&scalar["input"][0]["dims"], &scalar["input"][1]["dims"]], [&json!([-1, 4]), &json!([])]);
    assert_eq!(scalar["version_policy"], json!({"latest": {"num_versions": 3}}));

    let mut ask = async |name: &str, version: &str| {
        let request = ModelConfigRequest { name: name.into(), version: version.into() };
        client.model_config(request).await.map(|answer| answer.into_inner().config.expect("the configuration"))
    };
    let same = ask("digits", "1").await.unwrap();
    assert_eq!((json!(same.name), json!(same.backend)), (digits["name"].clone(), digits["backend"].clone()));
    assert_eq!((same.max_batch_size, &same.input[0].dims[..], &same.output[0].dims[..]), (16, &[64][..], &[10][..]));
    let Some(SchedulingChoice::DynamicBatching(batching)) = same.scheduling_choice else { panic!("it batches") };
    assert_eq!((&batching.preferred_batch_size[..], batching.max_queue_delay_microseconds), (&[8][..], 2000));
    assert!(ask("scalar", "").await.unwrap().scheduling_choice.is_none());
    for (path, name, version, status, code) in [
        ("nope", "nope", "", 404, Code::NotFound),
        ("digits/versions/3", "digits", "3", 404, Code::NotFound),
        ("digits/versions/0", "digits", "0", 400, Code::InvalidArgument),
    ] {
        assert_eq!(server.get(&format!("/v2/models/{path}/config")).status, status);
        assert_eq!(ask(name, version).await.unwrap_err().code(), code);
    }
}

#[test]
fn what_is_served_is_listed() {
    let models = Models::new().with("identity_fp32");
    let server = TestServer::of(models.path()).start();
    let about = server.get("/v2").json();
    for extension in ["statistics", "model_configuration"] {
        assert!(about["extensions"].as_array().unwrap().contains(&json!(extension)), "{about}");
    }
    for path in ["/v2/models/stats", "/v2/models/identity_fp32/stats", "/v2/models/identity_fp32/config"] {
        assert_eq!(server.get(&format!("{path}/")).json(), server.get(path).json());
        assert_eq!(server.post(path, "").status, 405, "{path}");
    }
}
