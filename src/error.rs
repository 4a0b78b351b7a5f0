//! The one error of the request path: a closed [`Kind`] and a message fit for the client.
//!
//! Messages name the thing, what was found and what was expected; they carry no path, no secret and no more of the
//! client's bytes than [`quoted`] lets through. `protocol/status` maps a kind to HTTP and gRPC; `monitor` uses it as a
//! label. Modules with richer failures (configuration, loading) have their own types and convert at their edge.

use std::borrow::Cow;
use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a client or an operator can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    InvalidInput,
    Unauthenticated,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    RequestTimeout,
    Conflict,
    TooLarge,
    UnsupportedMedia,
    RateLimited,
    Cancelled,
    BackendFailed,
    Internal,
    Unsupported,
    Overloaded,
    NotReady,
    DeadlineExceeded,
}

impl Kind {
    pub const ALL: [Kind; 17] = [
        Kind::InvalidInput,
        Kind::Unauthenticated,
        Kind::Forbidden,
        Kind::NotFound,
        Kind::MethodNotAllowed,
        Kind::RequestTimeout,
        Kind::Conflict,
        Kind::TooLarge,
        Kind::UnsupportedMedia,
        Kind::RateLimited,
        Kind::Cancelled,
        Kind::BackendFailed,
        Kind::Internal,
        Kind::Unsupported,
        Kind::Overloaded,
        Kind::NotReady,
        Kind::DeadlineExceeded,
    ];

    /// The value of the metric label `kind`.
    pub fn label(self) -> &'static str {
        match self {
            Kind::InvalidInput => "invalid_input",
            Kind::Unauthenticated => "unauthenticated",
            Kind::Forbidden => "forbidden",
            Kind::NotFound => "not_found",
            Kind::MethodNotAllowed => "method_not_allowed",
            Kind::RequestTimeout => "request_timeout",
            Kind::Conflict => "conflict",
            Kind::TooLarge => "too_large",
            Kind::UnsupportedMedia => "unsupported_media",
            Kind::RateLimited => "rate_limited",
            Kind::Cancelled => "cancelled",
            Kind::BackendFailed => "backend_failed",
            Kind::Internal => "internal",
            Kind::Unsupported => "unsupported",
            Kind::Overloaded => "overloaded",
            Kind::NotReady => "not_ready",
            Kind::DeadlineExceeded => "deadline_exceeded",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    message: Cow<'static, str>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<Cow<'static, str>>) -> Self {
        Error { kind, message: message.into() }
    }

    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Kind::InvalidInput, message)
    }

    pub fn not_found(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Kind::NotFound, message)
    }

    pub fn too_large(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Kind::TooLarge, message)
    }

    /// A broken invariant of ours: the message is for us, and names no internals a client could use.
    pub fn internal(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Kind::Internal, message)
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Longest stretch of a client's own text that an error message or a log line repeats, in bytes.
pub const QUOTE_LIMIT: usize = 64;

/// [`quoted`] only when it is shown: most messages are never written.
#[derive(Clone, Copy, Debug)]
pub struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&quoted(self.0))
    }
}

/// A client's text made fit for a message: control characters escaped, cut at [`QUOTE_LIMIT`].
pub fn quoted(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let before = out.len();
        push_visible(&mut out, c);
        if out.len() > QUOTE_LIMIT {
            out.truncate(before);
            out.push('…');
            break;
        }
    }
    out
}

/// Text from elsewhere made fit for a terminal: nothing in it moves the cursor or colours what follows.
pub fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push_visible(&mut out, c));
    out
}

/// Control characters, and those that turn the direction of text, escaped.
fn push_visible(out: &mut String, c: char) {
    match c {
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => out.extend(c.escape_unicode()),
        c if c.is_control() => out.extend(c.escape_default()),
        c => out.push(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lists_every_kind_once_with_its_own_label() {
        let labels: std::collections::HashSet<_> = Kind::ALL.iter().map(|k| k.label()).collect();
        assert_eq!(labels.len(), Kind::ALL.len());
    }

    #[test]
    fn controls_are_escaped_and_quotes_cut() {
        assert_eq!(quoted("a\nb\u{1b}[0m"), "a\\nb\\u{1b}[0m");
        assert_eq!(quoted("\u{202e}x"), "\\u{202e}x");
        assert_eq!(visible("a\nb\u{1b}[0mé\u{202e}"), "a\\nb\\u{1b}[0mé\\u{202e}");
        let long = quoted(&"é".repeat(100));
        assert!(long.len() <= QUOTE_LIMIT + '…'.len_utf8() && long.ends_with('…'));
    }
}
