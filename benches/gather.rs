//! Joining the inputs of a batch and splitting its outputs: copying in, reference counts out.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use tidegate::backend::Batch;
use tidegate::tensor::{Shape, Tensor};

fn rows(count: usize, width: usize) -> Vec<[Tensor; 1]> {
    let row = |i: usize| Tensor::from_vec(Shape::new([1, width]).unwrap(), vec![i as f32; width]).unwrap();
    (0..count).map(|i| [row(i)]).collect()
}

pub fn group() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("gather");
    for (count, width) in [(8, 30), (32, 30), (8, 150_528)] {
        let parts = rows(count, width);
        let jobs: Vec<&[Tensor]> = parts.iter().map(|part| part.as_slice()).collect();
        let mut destination = vec![0; Batch::new(&jobs).input(0).byte_length()];
        group.throughput(Throughput::Bytes(destination.len() as u64));
        let id = format!("{count} rows of {width}");
        group.bench_function(BenchmarkId::new("gather", &id), |b| {
            b.iter(|| Batch::new(black_box(&jobs)).input(0).gather_into(&mut destination));
        });
        let whole = Tensor::from_vec(Shape::new([count, width]).unwrap(), vec![0f32; count * width]).unwrap();
        let ones = vec![1; count];
        group.bench_function(BenchmarkId::new("split", &id), |b| b.iter(|| black_box(&whole).split_rows(&ones)));
    }
    group.finish();
}
