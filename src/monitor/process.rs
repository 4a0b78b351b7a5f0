//! The process's own numbers, read from Linux' `/proc` at scrape time; absent elsewhere.

use std::fs;

use super::export::{Family, Number};
use super::names;

/// Clock ticks per second in `/proc`: fixed at 100 by Linux' user-space interface on every architecture it still
/// supports.
const TICKS_PER_SECOND: f64 = 100.0;

pub(super) fn write(out: &mut String) {
    Family::new(out, &names::BUILD_INFO).sample(&[env!("CARGO_PKG_VERSION")], 1);
    let mut number = |metric, value: Option<f64>| {
        if let Some(value) = value {
            Family::new(out, metric).sample(&[], Number(value));
        }
    };
    let times = times("self");
    number(&names::RESIDENT_MEMORY, resident_memory());
    number(&names::OPEN_FDS, fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as f64));
    number(&names::CPU_SECONDS, times.as_ref().map(|times| times.cpu));
    number(&names::START_TIME, times.and_then(|times| Some(boot_time()? + times.start)));
}

/// Bytes.
pub(super) fn resident_memory() -> Option<f64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:").map(|kilobytes| kilobytes * 1024.0)
}

/// Seconds of CPU time; seconds from boot to the process's start.
struct Times {
    cpu: f64,
    start: f64,
}

/// Seconds of CPU time that a process has used, in user and kernel mode; this one, if none is named.
pub fn cpu_seconds(process: Option<u32>) -> Option<f64> {
    let process = process.map_or_else(|| "self".to_string(), |id| id.to_string());
    let cpu = times(&process)?.cpu;
    // What threads that ended have used is in the one, what is less than a tick in the other.
    Some(cpu.max(scheduled_seconds(&process).unwrap_or(0.0)))
}

/// The same of the threads that there are, in nanoseconds: a kernel may be built without.
fn scheduled_seconds(process: &str) -> Option<f64> {
    let mut nanos = 0.0;
    for thread in fs::read_dir(format!("/proc/{process}/task")).ok()? {
        // One that just ended has no file any more.
        let Ok(text) = fs::read_to_string(thread.ok()?.path().join("schedstat")) else { continue };
        nanos += text.split_whitespace().next()?.parse::<f64>().ok()?;
    }
    Some(nanos / 1e9)
}

fn times(process: &str) -> Option<Times> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is the command in parentheses and may itself hold spaces and parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |position: usize| fields.get(position)?.parse::<f64>().ok();
    // Fields 14, 15 and 22 of proc_pid_stat(5), counted from the third.
    Some(Times { cpu: (ticks(11)? + ticks(12)?) / TICKS_PER_SECOND, start: ticks(19)? / TICKS_PER_SECOND })
}

fn boot_time() -> Option<f64> {
    field(&fs::read_to_string("/proc/stat").ok()?, "btime")
}

/// The number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn linux_gives_every_number() {
        let mut out = String::new();
        write(&mut out);
        for metric in names::ALL.iter().filter(|metric| metric.section == names::Section::Process) {
            let line = out.lines().find(|line| line.starts_with(metric.name)).unwrap_or_else(|| panic!("{out}"));
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() >= 0.0, "{line}");
        }
        assert!(resident_memory().unwrap() > 1e6);
    }
}
