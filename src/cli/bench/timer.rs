//! Waiting until an instant, to microseconds: the runtime's own timers round to milliseconds, which is longer than
//! the latencies that are to be measured.

#[cfg(target_os = "linux")]
pub(super) use linux::Timer;

#[cfg(target_os = "linux")]
mod linux {
    use std::ffi::{c_int, c_long};
    use std::fs::File;
    use std::io::{Error, ErrorKind, Read, Result};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::ptr;
    use std::time::Instant;

    use tokio::io::unix::AsyncFd;

    const CLOCK_MONOTONIC: c_int = 1;
    const TFD_NONBLOCK: c_int = 0o4000;
    const TFD_CLOEXEC: c_int = 0o2000000;

    #[repr(C)]
    struct Timespec {
        seconds: i64,
        nanos: c_long,
    }

    #[repr(C)]
    struct Setting {
        interval: Timespec,
        value: Timespec,
    }

    unsafe extern "C" {
        // SAFETY: as timerfd_create(2) has it; it takes no pointer.
        safe fn timerfd_create(clock: c_int, flags: c_int) -> c_int;
        fn timerfd_settime(fd: c_int, flags: c_int, new: *const Setting, old: *mut Setting) -> c_int;
    }

    pub struct Timer(AsyncFd<File>);

    impl Timer {
        /// Within a runtime.
        pub fn new() -> Result<Timer> {
            let fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
            if fd < 0 {
                return Err(Error::last_os_error());
            }
            // SAFETY: the descriptor is new, so nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // SAFETY: a file's descriptor is the same for as long as the file lives, and it is never replaced here.
            Ok(Timer(unsafe { AsyncFd::register(File::from(fd)) }?))
        }

        pub async fn until(&mut self, due: Instant) -> Result<()> {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let value = Timespec {
                seconds: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                nanos: c_long::from(left.subsec_nanos() as i32),
            };
            let setting = Setting { interval: Timespec { seconds: 0, nanos: 0 }, value };
            // SAFETY: the descriptor is open, `setting` lives through the call, and no old setting is asked for.
            if unsafe { timerfd_settime(self.0.as_raw_fd(), 0, &setting, ptr::null_mut()) } < 0 {
                return Err(Error::last_os_error());
            }
            loop {
                let mut rung = self.0.readable().await?;
                let mut count = [0; 8];
                match rung.get_inner().read(&mut count) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => rung.clear_ready(),
                    outcome => {
                        rung.clear_ready();
                        return outcome.map(drop);
                    }
                }
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) struct Timer;

#[cfg(not(target_os = "linux"))]
impl Timer {
    pub(super) fn new() -> std::io::Result<Timer> {
        Ok(Timer)
    }

    pub(super) async fn until(&mut self, due: std::time::Instant) -> std::io::Result<()> {
        tokio::time::sleep_until(due.into()).await;
        Ok(())
    }
}
