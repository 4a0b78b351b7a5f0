//! Requests share executions under load, and every answer is the caller's own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;

use serde_json::json;

use crate::support::{Models, PATIENCE, TestServer, engines};

/// A keep-alive connection that sends binary requests: JSON would dominate the work.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { stream: BufReader::new(stream) }
    }

    /// Sends `rows` of 8 numbers to `sentinel` and returns its answer.
    fn sentinel(&mut self, rows: usize, data: &[f32]) -> Vec<f32> {
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        let header = json!({
            "inputs": [{"name": "x", "shape": [rows, 8], "datatype": "FP32", "parameters": {"binary_data_size": bytes.len()}}],
            "parameters": {"binary_data_output": true},
        })
        .to_string();
        let head = format!(
            "POST /v2/models/sentinel/infer HTTP/1.1\r\nHost: t\r\nInference-Header-Content-Length: {}\r\nContent-Length: {}\r\n\r\n",
            header.len(),
            header.len() + bytes.len()
        );
        let mut message = head.into_bytes();
        message.extend(header.as_bytes());
        message.extend(&bytes);
        self.stream.get_mut().write_all(&message).unwrap();
        let (status, json_length, body) = self.read_response();
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
        body[json_length..].chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    fn read_response(&mut self) -> (u16, usize, Vec<u8>) {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let (mut length, mut json_length) = (0, 0);
        loop {
            line.clear();
            self.stream.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().unwrap(),
                "inference-header-content-length" => json_length = value.trim().parse().unwrap(),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).unwrap();
        (status, json_length, body)
    }
}

#[test]
fn under_64_clients_requests_share_executions_and_answers_are_the_callers_own() {
    const CLIENTS: usize = 64;
    const REQUESTS: usize = 400;
    const ROWS: [usize; 3] = [4, 1, 7];
    let models = Models::new().with("sentinel");
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        let address = server.addresses.http;
        let sent: usize = thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|client| {
                    scope.spawn(move || {
                        let mut connection = Client::new(address);
                        let mut sent = 0;
                        for request in 0..REQUESTS {
                            let rows = ROWS[(client + request) % ROWS.len()];
                            // Small integers: 2x + 1 is exact, and no two rows of the run are alike.
                            let base = (client * REQUESTS + request) as f32 * 8.0;
                            let data: Vec<f32> = (0..rows * 8).map(|i| base + i as f32).collect();
                            let expected: Vec<f32> = data.iter().map(|x| 2.0 * x + 1.0).collect();
                            assert_eq!(connection.sentinel(rows, &data), expected);
                            sent += rows;
                        }
                        sent
                    })
                })
                .collect();
            clients.into_iter().map(|client| client.join().unwrap()).sum()
        });
        assert!(sent >= 100_000, "{sent} rows");
        // The last batch is counted after its answers are sent.
        let label = ["model=\"sentinel\""];
        server.eventually("all rows are counted", |server| {
            server.metrics().sum("tidegate_inferences_total", &label) >= sent as f64
        });
        let executions = server.metrics().sum("tidegate_executions_total", &label);
        let requests = (CLIENTS * REQUESTS) as f64;
        assert!(executions < requests, "on {engine}: {executions} executions for {requests} requests");
        drop(server);
    }
}

#[test]
fn requests_of_different_lengths_share_a_batch_and_each_answer_has_its_own_length() {
    /// Of one bucket.
    const LENGTHS: [usize; 4] = [9, 10, 11, 12];
    let request = |length: usize| {
        let ids: Vec<usize> = (0..length).map(|i| (7 * i + length) % 20).collect();
        let input = |name: &str, data: Vec<usize>| json!({"name": name, "shape": [1, length], "datatype": "INT64", "data": data});
        json!({"inputs": [input("input_ids", ids), input("attention_mask", vec![1; length])]})
    };
    let answer = |server: &TestServer, model: &str, length: usize| {
        let reply = server.infer(model, &request(length));
        assert_eq!(reply.json()["outputs"][0]["shape"][1], json!(length), "{}", reply.text());
        reply.output("last_hidden_state")
    };
    let onnx = engines().into_iter().map(|engine| ("encoder", engine));
    for (model, engine) in onnx.chain([("bert", "candle")]) {
        let models = Models::new().with(model);
        let choice = if engine == "candle" { "auto" } else { engine };
        let settings = format!("{model}/model.toml");
        models.write(&settings, "batching = false");
        let server = TestServer::of(models.path()).set("engine", choice).start();
        let alone = LENGTHS.map(|length| answer(&server, model, length));
        drop(server);
        // Nothing runs before all are there: they share one batch for certain.
        models.write(&settings, "[batching]\npreferred_rows = 4\nmax_delay = \"60s\"\ntune = false\n");
        let server = TestServer::of(models.path()).set("engine", choice).start();
        let properties = server.get(&format!("/v2/models/{model}")).json()["properties"].clone();
        assert_eq!((&properties["ragged_batching"], &properties["backend"]), (&json!("on"), &json!(engine)));
        let together: Vec<Vec<f64>> = thread::scope(|scope| {
            let callers = LENGTHS.map(|length| {
                let server = &server;
                scope.spawn(move || answer(server, model, length))
            });
            callers.into_iter().map(|caller| caller.join().unwrap()).collect()
        });
        for (alone, together) in alone.iter().zip(&together) {
            assert_eq!(alone.len(), together.len());
            assert!(alone.iter().zip(together).all(|(a, b)| (a - b).abs() < 1e-4), "on {engine}");
        }
        let label = [format!("model=\"{model}\"")];
        let counted = |kind: &str| {
            let kind = format!("kind=\"{kind}\"");
            server.metrics().sum("tidegate_sequence_positions_total", &[&label[0], &kind])
        };
        // Counted after the answers are sent.
        let what = format!("42 positions of data and 6 of padding are counted on {engine}");
        server.eventually(&what, |_| (counted("data"), counted("padding")) == (42.0, 6.0));
    }
}

#[test]
fn a_poison_request_fails_alone() {
    const REQUESTS: usize = 32;
    const POISON: usize = 17;
    let models = Models::new().with("gather");
    // Nothing runs before all are there: they share one batch for certain.
    models.write(
        "gather/model.toml",
        format!("[batching]\npreferred_rows = {REQUESTS}\nmax_delay = \"60s\"\ntune = false\n"),
    );
    for engine in engines() {
        let server = Arc::new(TestServer::of(models.path()).set("engine", engine).start());
        let statuses: Vec<(usize, u16)> = thread::scope(|scope| {
            let clients: Vec<_> = (0..REQUESTS)
                .map(|i| {
                    let server = Arc::clone(&server);
                    scope.spawn(move || {
                        let id = if i == POISON { 1_000 } else { i % 10 };
                        let request =
                            json!({"inputs": [{"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": [id]}]});
                        (i, server.infer("gather", &request).status)
                    })
                })
                .collect();
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        for (i, status) in statuses {
            assert_eq!(status, if i == POISON { 400 } else { 200 }, "on {engine}: request {i}");
        }
        // Halved until the one at fault stands alone: 32, 16, 8, 4, 2 and 1 fail, the other halves run.
        let counted = |name: &str| server.metrics().sum(name, &["model=\"gather\""]);
        server.eventually("all rows are counted", |_| counted("tidegate_inferences_total") == (REQUESTS - 1) as f64);
        server.eventually("all runs are counted", |_| counted("tidegate_executions_total") == 11.0);
        assert_eq!(counted("tidegate_execution_failures_total"), 6.0, "on {engine}");
    }
}
