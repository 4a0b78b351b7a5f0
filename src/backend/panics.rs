//! Panics of engines: what they say, and which of them a caller turns into an answer.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static ANSWERED: Cell<bool> = const { Cell::new(false) };
}

/// As `catch_unwind`, for a step whose panics become errors, or are resumed to somebody who logs them: while it runs,
/// [`panics_are_answered`] here, so that the process's panic hook need not report what any client can provoke. The
/// caller vouches that nothing which the step leaves half-done is used again.
#[cfg_attr(not(feature = "tract"), allow(dead_code, reason = "the engine that panics on bad input"))]
pub(super) fn answer_panics<T>(step: impl FnOnce() -> T) -> Result<T, Box<dyn Any + Send>> {
    let before = ANSWERED.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(step));
    ANSWERED.set(before);
    outcome
}

/// Whether a panic of this thread, now, would be answered.
pub fn panics_are_answered() -> bool {
    ANSWERED.get()
}

/// What a caught panic says.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_answered_while_the_step_runs() {
        assert!(!panics_are_answered());
        assert!(answer_panics(panics_are_answered).unwrap());
        assert!(!panics_are_answered());
        let caught = answer_panics(|| -> () { panic!("at {}", 7) }).unwrap_err();
        assert_eq!((panic_text(&*caught), panics_are_answered()), ("at 7", false));
        assert_eq!(panic_text(&"fixed"), "fixed");
        assert_eq!(panic_text(&7), "no message");
    }
}
