//! How many GPUs the NVIDIA driver shows to this process, asked of the driver's own library. Engines find theirs by
//! themselves: this is for settings that mean all there are, and for telling a person what is there.

use std::mem::ManuallyDrop;

use libloading::Library;

/// The driver's interface, which comes with it and with nothing else.
const LIBRARY: &str = "libcuda.so.1";

/// Numbered from 0; `CUDA_VISIBLE_DEVICES` counts. The error says what is missing. The library stays loaded, as any
/// engine that computes on a GPU would have it.
pub fn count() -> Result<u32, String> {
    // SAFETY: loading runs the library's initialisers; it is the driver's, as every program with CUDA loads it.
    let library = unsafe { Library::new(LIBRARY) }
        .map_err(|_| format!("no NVIDIA driver was found (its library {LIBRARY} cannot be loaded)"))?;
    // The driver must not be unloaded once it has been initialised.
    let library = ManuallyDrop::new(library);
    type Init = unsafe extern "C" fn(flags: u32) -> i32;
    type GetCount = unsafe extern "C" fn(count: *mut i32) -> i32;
    // SAFETY: these two functions have had these types in every release of the driver.
    let functions = unsafe { (library.get::<Init>(b"cuInit\0"), library.get::<GetCount>(b"cuDeviceGetCount\0")) };
    let (Ok(init), Ok(get_count)) = functions else {
        return Err(format!("{LIBRARY} is not the NVIDIA driver's"));
    };
    let done = |call: &str, code: i32| if code == 0 { Ok(()) } else { Err(failed(call, code)) };
    // SAFETY: it takes flags, of which there are none.
    done("cuInit", unsafe { init(0) })?;
    let mut count = 0;
    // SAFETY: the driver is initialised, and `count` may be written to.
    done("cuDeviceGetCount", unsafe { get_count(&mut count) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn failed(call: &str, code: i32) -> String {
    /// CUDA_ERROR_NO_DEVICE.
    const NO_DEVICE: i32 = 100;
    match code {
        NO_DEVICE => "the NVIDIA driver shows no GPU".into(),
        code => format!("the NVIDIA driver refuses {call} with error {code}"),
    }
}

/// What there is, as a part of a sentence.
pub fn told(count: &Result<u32, String>) -> String {
    match count {
        Ok(0) => "the NVIDIA driver shows no GPU".into(),
        Ok(1) => "the NVIDIA driver shows one GPU, cuda:0".into(),
        Ok(count) => format!("the NVIDIA driver shows {count} GPUs, cuda:0 to cuda:{}", count - 1),
        Err(why) => why.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_is_told_in_words() {
        assert_eq!(told(&Ok(0)), "the NVIDIA driver shows no GPU");
        assert_eq!(told(&Ok(1)), "the NVIDIA driver shows one GPU, cuda:0");
        assert_eq!(told(&Ok(4)), "the NVIDIA driver shows 4 GPUs, cuda:0 to cuda:3");
        assert_eq!(told(&Err(failed("cuInit", 100))), told(&Ok(0)));
        assert_eq!(failed("cuInit", 804), "the NVIDIA driver refuses cuInit with error 804");
    }

    #[test]
    fn asking_twice_gives_one_answer_on_any_machine() {
        let first = count();
        assert_eq!(first, count());
        assert!(!told(&first).is_empty());
    }
}
