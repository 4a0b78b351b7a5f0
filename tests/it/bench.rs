//! `tidegate bench` as a person at a shell uses it: a child process against a server, or against one that misbehaves.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::{run, stderr, stdout};
use crate::support::{Models, TestServer, root, without_onnxruntime};

/// Short, for what is not about time.
const QUICK: [&str; 6] = ["--rounds", "2", "--duration", "300ms", "--warm-up", "0"];

fn bench(arguments: &[&str]) -> Output {
    run(&[&["bench"], arguments].concat(), &[])
}

/// What was measured, of a command that ended with `code`.
fn measured_with(arguments: &[&str], code: i32) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let output = bench(&[arguments, &["--json", file.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{}{}", stdout(&output), stderr(&output));
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

fn measured(arguments: &[&str]) -> Value {
    measured_with(arguments, 0)
}

/// Where a server is, as arguments.
fn place(server: &TestServer) -> [String; 4] {
    let (http, grpc) = (server.addresses.http, server.addresses.grpc);
    ["--url".into(), format!("http://{http}"), "--grpc-url".into(), format!("grpc://{grpc}")]
}

fn with<'a>(place: &'a [String], arguments: &[&'a str]) -> Vec<&'a str> {
    place.iter().map(String::as_str).chain(arguments.iter().copied()).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn every_protocol_is_measured_in_closed_and_open_loops() {
    let models = Models::new().with("digits");
    let server = TestServer::of(models.path()).start();
    let place = place(&server);
    let common = ["-m", "digits", "-p", "json,binary,grpc"];
    for load in [["-c", "1,3"], ["-r", "200,400"]] {
        let report = measured(&with(&place, &[&common[..], &load, &QUICK].concat()));
        assert_eq!(report["schema"], "tidegate-bench/1");
        assert_eq!(report["models"][0]["inputs"], json!(["image FP32 [1,64]"]));
        let cells = report["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 6);
        for cell in cells {
            let side = &cell["sides"][0];
            assert_eq!((&side["role"], &side["errors"], &side["unsent"]), (&json!("server"), &json!([]), &json!(0)));
            let rounds = side["throughput"]["rounds"].as_array().unwrap();
            assert!(rounds.len() == 2 && rounds.iter().all(|rate| number(rate) > 0.0), "{side}");
            let latency = |name: &str| number(&side["latency_ms"][name]["median"]);
            assert!(0.0 < latency("p50") && latency("p50") <= latency("p99") && latency("p99") <= latency("max"));
            assert!(side["curve"].as_array().unwrap().len() > 8, "{side}");
            assert!(side["client_cpu_us"]["median"].is_number() || !cfg!(target_os = "linux"));
        }
        let (first, last) = (&cells[0], &cells[5]);
        assert_eq!((&first["protocol"], &last["protocol"]), (&json!("json"), &json!("grpc")));
        let expected = match load[0] {
            "-c" => [json!({"loop": "closed", "clients": 1}), json!({"loop": "closed", "clients": 3})],
            _ => [200.0, 400.0].map(|rate| json!({"loop": "open", "rate": rate, "arrivals": "poisson"})),
        };
        assert_eq!([&first["load"], &last["load"]], [&expected[0], &expected[1]]);
    }
}

#[test]
fn what_cannot_be_measured_is_told_before_it_is() {
    let models = Models::new().with("digits");
    let server = TestServer::of(models.path()).start();
    let place = place(&server);
    for (arguments, code, told) in [
        (&["-m", "absent"][..], 1, "absent"),
        (&["-m", "absent", "-p", "grpc"], 1, "NOT_FOUND"),
        (&["-m", "digits", "--shape", "image:1,3"], 1, "image"),
        (&["-m", "digits", "--shape", "other:1"], 2, "`other`"),
        (&["-m", "digits", "--path", "/nowhere"], 1, "HTTP 404"),
        (&["-m", "digits", "--data", "/nowhere.json"], 2, "/nowhere.json"),
    ] {
        let output = bench(&with(&place, arguments));
        assert_eq!((output.status.code(), stdout(&output)), (Some(code), String::new()), "{arguments:?}");
        assert!(stderr(&output).contains(told), "{arguments:?}: {}", stderr(&output));
    }
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = bench(&["-m", "digits", "-u", &format!("http://{nobody}")]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
}

#[test]
fn several_models_share_the_requests_by_their_weights() {
    let models = Models::new().with("digits").with("tumor");
    let server = TestServer::of(models.path()).start();
    let place = place(&server);
    let report = measured(&with(&place, &[&["-m", "digits:2=3", "-m", "tumor"][..], &QUICK].concat()));
    let sent = report["models"].as_array().unwrap();
    let of = |model: &Value| (model["model"].clone(), model["version"].clone(), model["weight"].clone());
    assert_eq!(of(&sent[0]), (json!("digits"), json!("2"), json!(3)));
    assert_eq!(of(&sent[1]), (json!("tumor"), json!(""), json!(1)));
    let metrics = server.metrics();
    let answered = |model: &str| metrics.sum("tidegate_requests_total", &[&format!("model=\"{model}\"")]);
    let (three, one) = (answered("digits"), answered("tumor"));
    // Each also answered its 32 different requests once, before anything was measured.
    let share = (three - 32.0) / (one - 32.0);
    assert!((2.5..3.5).contains(&share), "{three} and {one}");
}

#[test]
fn data_comes_from_files_and_folders() {
    let models = Models::new().with("digits").with("identity_fp32");
    let server = TestServer::of(models.path()).start();
    let place = place(&server);
    let folder = tempfile::tempdir().unwrap();
    let sample = root().join("models/digits/sample.json");
    std::fs::copy(&sample, folder.path().join("a.json")).unwrap();
    let mut array = b"\x93NUMPY\x01\x00".to_vec();
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 64), }";
    array.extend([64, 0]);
    array.extend(format!("{header:<63}\n").into_bytes());
    array.extend([0; 2 * 64 * 4]);
    std::fs::write(folder.path().join("b.npy"), array).unwrap();
    for (path, requests, input) in [
        (sample.clone(), 1, "image FP32 [1,64]"),
        (folder.path().join("b.npy"), 1, "image FP32 [2,64]"),
        (folder.path().to_path_buf(), 2, "image FP32 [1,64]"),
    ] {
        let data = ["-m", "digits", "-p", "binary,grpc", "--data", path.to_str().unwrap()];
        let report = measured(&with(&place, &[&data[..], &QUICK].concat()));
        let sent = &report["models"][0];
        assert_eq!((&sent["requests"], &sent["inputs"]), (&json!(requests), &json!([input])), "{}", path.display());
    }
    let lengths = ["-m", "identity_fp32", "-p", "json", "--lengths", "3,5", "--batch-rows", "2"];
    let report = measured(&with(&place, &[&lengths[..], &QUICK].concat()));
    assert_eq!(report["models"][0]["inputs"], json!(["x FP32 [2,3]"]));
}

#[test]
fn servers_are_compared_round_by_round_and_the_page_needs_nothing_else() {
    let models = Models::new().with("digits");
    let (server, other) = (TestServer::of(models.path()).start(), TestServer::of(models.path()).start());
    let place = place(&server);
    let compared = format!("http://{},grpc://{}", other.addresses.http, other.addresses.grpc);
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let arguments = ["-m", "digits", "-p", "binary,grpc", "-c", "1,2", "--compare", &compared, "--echo"];
    let html = ["--html", page.to_str().unwrap()];
    let report = measured(&with(&place, &[&arguments[..], &html, &QUICK].concat()));
    for cell in report["cells"].as_array().unwrap() {
        let sides: Vec<&Value> = cell["sides"].as_array().unwrap().iter().map(|side| &side["role"]).collect();
        assert_eq!(sides, ["server", "compared", "echo"]);
        assert!(cell["sides"][2]["server_cpu_us"]["median"].is_number() || !cfg!(target_os = "linux"));
        let ratios = cell["ratios"].as_array().unwrap();
        assert_eq!(ratios.len(), 2);
        for ratio in ratios {
            assert_eq!(ratio["over"], "server");
            for name in ["throughput", "p50", "p99"] {
                assert!(number(&ratio[name]["low"]) <= number(&ratio[name]["high"]), "{ratio}");
                assert_eq!(ratio[name]["rounds"].as_array().unwrap().len(), 2);
            }
        }
    }
    let asked = other.metrics();
    assert!(asked.sum("tidegate_requests_total", &[]) > 0.0, "the compared server was asked");
    assert_eq!(asked.sum("tidegate_inflight", &[]), 0.0);
    let page = std::fs::read_to_string(page).unwrap();
    for foreign in ["http://", "https://", "<script", "src=", "href=", "url(", "@import"] {
        assert!(!page.contains(foreign), "the page has `{foreign}`");
    }
    for own in ["Latency by percentile", "Throughput", "Ratios, round by round", "<polyline", "prefers-color-scheme"] {
        assert!(page.contains(own), "the page has no `{own}`");
    }
    assert!(!page.contains("NaN"));
}

#[test]
fn an_engine_takes_turns_with_a_server_on_the_same_rows() {
    let engine: &[&str] = if without_onnxruntime() { &["--engine", "tract"] } else { &[] };
    let models = Models::new().with("digits");
    let server = TestServer::of(models.path()).start();
    let place = place(&server);
    let digits = models.path().join("digits");
    let beside = ["--engine-of", digits.to_str().unwrap(), "--engine-layout", "4x1x1"];
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let told = ["--html", page.to_str().unwrap()];
    let asked = [&["-m", "digits", "-c", "1,2"], &beside[..], engine, &told, &QUICK].concat();
    let report = measured(&with(&place, &asked));
    assert!(std::fs::read_to_string(page).unwrap().contains("<h2>The engine alone, in turns with the servers</h2>"));
    for cell in report["cells"].as_array().unwrap() {
        let engine = &cell["engine"];
        assert_eq!((&engine["rows"], &engine["instances"], &engine["threads"]), (&json!(4), &json!(1), &json!(1)));
        assert_eq!(engine["rows_per_second"]["rounds"].as_array().unwrap().len(), 2);
        assert!(number(&engine["rows_per_second"]["median"]) > 0.0);
    }
    let empty = tempfile::tempdir().unwrap();
    let elsewhere = ["--engine-of", empty.path().to_str().unwrap(), "--engine-layout", "4x1x1"];
    let refused = bench(&with(&place, &[&["-m", "digits"], &elsewhere[..], engine, &QUICK].concat()));
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

#[test]
fn the_echo_is_measured_alone_and_served_for_others() {
    let sizes = ["--request-bytes", "2KiB", "--response-bytes", "300KiB"];
    let report = measured(&[&["--echo", "-p", "json,binary,grpc", "-c", "2"][..], &sizes, &QUICK].concat());
    for cell in report["cells"].as_array().unwrap() {
        let side = &cell["sides"][0];
        assert_eq!((&side["role"], &side["errors"]), (&json!("echo"), &json!([])));
        assert!(number(&side["throughput"]["median"]) > 0.0);
    }
    let mut serving = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["bench", "--echo", "--serve", "--response-bytes", "10B"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(serving.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address: SocketAddr = line.split(' ').next().unwrap().strip_prefix("http://").unwrap().parse().unwrap();
    let reply = crate::support::exchange(address, "POST", "/any", &[], b"whatever");
    assert_eq!((reply.status, reply.body.len()), (200, 10));
    serving.kill().unwrap();
    serving.wait().unwrap();
}

#[test]
fn an_engine_is_measured_without_a_server() {
    let engine: &[&str] = if without_onnxruntime() { &["--engine", "tract"] } else { &[] };
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let digits = root().join("models/digits");
    let alone = |path: &Path, more: &[&str]| {
        let arguments = ["--in-process", path.to_str().unwrap(), "--rounds", "2", "--duration", "10ms"];
        let html = ["--html", page.to_str().unwrap(), "--batches", "1,4"];
        measured(&[&arguments[..], &html, more, engine].concat())
    };
    let report = alone(&digits, &["-m", "digits:2"]);
    let [ceiling] = &report["ceilings"].as_array().unwrap()[..] else { panic!("one version: {report}") };
    assert_eq!(
        (&ceiling["model"], &ceiling["version"], &ceiling["batches"]),
        (&json!("digits"), &json!("2"), &json!(true))
    );
    let cells = ceiling["cells"].as_array().unwrap();
    assert!(cells.iter().all(|cell| number(&cell["rows_per_second"]["median"]) > 0.0));
    assert!(cells.len().is_multiple_of(2) && cells[0]["rows"] == 1 && cells[1]["rows"] == 4);
    let single = &cells[ceiling["best_single"].as_u64().unwrap() as usize];
    assert_eq!((&single["rows"], &single["instances"]), (&json!(1), &json!(1)));
    assert!(std::fs::read_to_string(&page).unwrap().contains("the engine alone"));

    let lengths = alone(&root().join("tests/traps/encoder"), &["--lengths", "4,8"]);
    let lengths: Vec<&Value> = lengths["ceilings"].as_array().unwrap().iter().map(|one| &one["length"]).collect();
    assert_eq!(lengths, [4, 8]);
    let unbatched = alone(&root().join("tests/traps/fixed_batch"), &[]);
    assert!(unbatched["ceilings"][0]["cells"].as_array().unwrap().iter().all(|cell| cell["rows"] == 1));
    let nothing = bench(&["--in-process", digits.to_str().unwrap(), "-m", "other"]);
    assert_eq!(nothing.status.code(), Some(2), "{}", stdout(&nothing));
}

#[test]
fn an_objective_that_cannot_be_met_is_missed_and_the_search_for_it_ends() {
    let models = Models::new().with("digits");
    let server = TestServer::of(models.path()).start();
    let place = place(&server);
    let report = measured_with(&with(&place, &[&["-m", "digits", "--slo", "p50=1us"][..], &QUICK].concat()), 1);
    assert_eq!((&report["verdict"]["slo"], &report["verdict"]["slo_met"]), (&json!("p50=1µs"), &json!(false)));
    let ramp = ["-m", "digits", "--slo", "p50=1us", "--ramp", "-r", "40", "--duration", "50ms", "--warm-up", "0"];
    let report = measured_with(&with(&place, &ramp), 1);
    let ramp = &report["ramps"][0];
    assert_eq!((&ramp["rate"], &ramp["probes"][0]["rate"]), (&Value::Null, &json!(40.0)));
    let met = measured(&with(&place, &[&["-m", "digits", "--slo", "p50=60s"][..], &QUICK].concat()));
    assert_eq!(met["verdict"]["slo_met"], true);
}

/// What a server that misbehaves does with a request.
#[derive(Clone, Copy)]
enum Does {
    Answer,
    /// In chunks behind an early head, with a trailer.
    AnswerInParts,
    /// With a body that ends where the connection does.
    AnswerAndClose,
    Refuse,
    Close,
    Babble,
    Nothing,
}

/// A server of HTTP/1.1 on threads that answers as `does` says to each request by its number, but only when `stalled`
/// lets it. Threads end with their connections.
fn stub(does: fn(usize) -> Does, stalled: impl Fn() -> Duration + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (requests, stalled) = (Arc::new(AtomicUsize::new(0)), Arc::new(stalled));
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (requests, stalled) = (Arc::clone(&requests), Arc::clone(&stalled));
            std::thread::spawn(move || serve(stream, does, &requests, &*stalled));
        }
    });
    address
}

/// `None` at the connection's end, whoever ended it.
fn serve(
    stream: TcpStream,
    does: fn(usize) -> Does,
    requests: &AtomicUsize,
    stalled: &dyn Fn() -> Duration,
) -> Option<()> {
    const BODY: &str = r#"{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[1]}]}"#;
    stream.set_nodelay(true).ok()?;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut writer = stream;
    // Nothing is ever sent here: to wait for it is to let time pass.
    let (_kept, never) = mpsc::channel::<()>();
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = text.trim().parse().ok()?;
            }
            if line.trim().is_empty() {
                break;
            }
        }
        std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink()).ok()?;
        let stall = stalled();
        if !stall.is_zero() {
            let _ = never.recv_timeout(stall);
        }
        let answer = match does(requests.fetch_add(1, Ordering::SeqCst)) {
            Does::Answer => format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{BODY}", BODY.len()),
            Does::AnswerInParts => {
                let (one, other) = BODY.split_at(20);
                let chunk = |part: &str, more: &str| format!("{:x}{more}\r\n{part}\r\n", part.len());
                let chunks = chunk(one, ";name=value") + &chunk(other, "") + "0\r\nchecksum: 1\r\n\r\n";
                let early = "HTTP/1.1 103 Early Hints\r\nlink: <a>\r\n\r\n";
                format!("{early}HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}")
            }
            Does::AnswerAndClose => {
                let _ = writer.write_all(format!("HTTP/1.1 200 OK\r\n\r\n{BODY}").as_bytes());
                return None;
            }
            Does::Refuse => "HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy".into(),
            Does::Close => return None,
            Does::Babble => "whatever\r\n\r\n".into(),
            Does::Nothing => {
                let mut rest = Vec::new();
                let _ = reader.read_to_end(&mut rest);
                return None;
            }
        };
        writer.write_all(answer.as_bytes()).ok()?;
    }
}

/// A whole request, for servers that have no metadata.
fn request(folder: &Path) -> String {
    let path = folder.join("request.json");
    std::fs::write(&path, r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}"#).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn errors_are_counted_by_kind() {
    let folder = tempfile::tempdir().unwrap();
    let data = request(folder.path());
    // Each time by a stub that begins to count anew. The first two requests are those that are looked at before
    // anything is measured.
    let report = |duration: &str, max_errors: &str, code: i32| {
        let address = stub(
            |number| match number {
                0 | 1 => Does::Answer,
                n if n % 10 == 2 => Does::Refuse,
                n if n % 10 == 4 => Does::Close,
                n if n % 10 == 6 => Does::Babble,
                n if n % 10 == 8 => Does::Nothing,
                _ => Does::Answer,
            },
            || Duration::ZERO,
        );
        let url = format!("http://{address}");
        let arguments = ["-m", "m", "-u", &url, "-p", "json", "--data", &data, "-c", "2", "--timeout", "500ms"];
        let time = ["--rounds", "1", "--duration", duration, "--warm-up", "0", "--max-errors", max_errors];
        measured_with(&[&arguments[..], &time].concat(), code)["cells"][0]["sides"][0].clone()
    };
    let kinds = |side: &Value| -> Vec<String> {
        side["errors"].as_array().unwrap().iter().map(|errors| errors["kind"].as_str().unwrap().to_string()).collect()
    };
    // The long one is for a machine that is slower than any.
    let mut side = report("3s", "0", 1);
    if kinds(&side).len() < 4 {
        side = report("60s", "0", 1);
    }
    assert_eq!(kinds(&side), ["HTTP 503", "connection closed", "malformed answer", "timeout"]);
    assert_eq!(side["errors"][0]["first"], "busy");
    assert!(side["answers"].as_u64().unwrap() > 0);
    report("3s", "1000000", 0);
}

#[test]
fn answers_are_read_to_their_end_however_that_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let data = request(folder.path());
    let ways = |number| match number % 4 {
        1 | 2 => Does::AnswerInParts,
        3 => Does::AnswerAndClose,
        _ => Does::Answer,
    };
    let url = format!("http://{}", stub(ways, || Duration::ZERO));
    let arguments = ["-m", "m", "-u", &url, "-p", "json", "--data", &data, "-c", "2"];
    let report = measured(&[&arguments[..], &QUICK].concat());
    let side = &report["cells"][0]["sides"][0];
    assert_eq!(side["errors"], json!([]), "{side}");
    assert!(side["answers"].as_u64().unwrap() >= 4, "{side}");
}

#[test]
fn a_load_without_an_answer_is_a_failure_however_many_errors_are_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let data = request(folder.path());
    // The requests begin before the window and outlast it.
    let address = stub(|number| if number < 2 { Does::Answer } else { Does::Nothing }, || Duration::ZERO);
    let url = format!("http://{address}");
    let arguments = ["-m", "m", "-u", &url, "-p", "json", "--data", &data, "-c", "2", "--timeout", "1s"];
    let time = ["--rounds", "1", "--duration", "100ms", "--warm-up", "0", "--max-errors", "1000"];
    let report = measured_with(&[&arguments[..], &time].concat(), 1);
    let side = &report["cells"][0]["sides"][0];
    assert_eq!((&side["answers"], &side["errors"][0]["kind"]), (&json!(0), &json!("timeout")));
    assert_eq!(report["verdict"]["unanswered"], 1);
}

#[test]
fn an_open_loop_shows_a_stall_that_a_closed_one_hides() {
    const STALL: Duration = Duration::from_secs(1);
    let folder = tempfile::tempdir().unwrap();
    let data = request(folder.path());
    let report = |load: &[&str]| {
        // From one second after the round's first request for another, whoever asks: once for each measurement. The
        // very first request is the one that is tried before there are rounds.
        let (requests, first) = (AtomicUsize::new(0), std::sync::OnceLock::new());
        let address = stub(
            |_| Does::Answer,
            move || {
                if requests.fetch_add(1, Ordering::SeqCst) == 0 {
                    return Duration::ZERO;
                }
                let since = first.get_or_init(Instant::now).elapsed();
                if since < STALL { Duration::ZERO } else { (2 * STALL).saturating_sub(since) }
            },
        );
        let url = format!("http://{address}");
        let arguments = ["-m", "m", "-u", &url, "-p", "json", "--data", &data, "--outstanding", "32"];
        let time = ["--rounds", "1", "--duration", "3s", "--warm-up", "0"];
        measured(&[&arguments[..], &time, load].concat())["cells"][0]["sides"][0].clone()
    };
    let (open, closed) = (report(&["-r", "300"]), report(&["-c", "1"]));
    let millis = |side: &Value, name: &str| number(&side["latency_ms"][name]["median"]);
    // A third of the open loop's requests were due while it stalled; the one client of the closed one waited once.
    // A slow machine adds to both alike.
    assert!(millis(&closed, "max") > millis(&closed, "p90"), "the stall was there: {closed}");
    let hidden = millis(&open, "p90") - millis(&closed, "p90");
    assert!(hidden > STALL.as_secs_f64() * 1e3 / 4.0, "{hidden} ms: {open}\n{closed}");
}
