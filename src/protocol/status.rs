//! The one table from an error's [`Kind`] to what each protocol says.

use crate::error::Kind;

/// What HTTP and gRPC say for one kind of error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub http: u16,
    /// The gRPC status code's number.
    pub grpc: i32,
    /// After how many seconds the same request may succeed, where waiting helps: HTTP's `Retry-After`.
    pub retry_after: Option<u32>,
}

/// Long enough for a queue to drain, short enough not to idle a client.
const RETRY_AFTER_SECONDS: u32 = 1;

/// gRPC's code numbers (grpc/grpc, `doc/statuscodes.md`).
mod code {
    pub const CANCELLED: i32 = 1;
    pub const INVALID_ARGUMENT: i32 = 3;
    pub const DEADLINE_EXCEEDED: i32 = 4;
    pub const NOT_FOUND: i32 = 5;
    pub const PERMISSION_DENIED: i32 = 7;
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    pub const ABORTED: i32 = 10;
    pub const UNIMPLEMENTED: i32 = 12;
    pub const INTERNAL: i32 = 13;
    pub const UNAVAILABLE: i32 = 14;
    pub const UNAUTHENTICATED: i32 = 16;
}

impl Status {
    pub fn of(kind: Kind) -> Status {
        let (http, grpc) = match kind {
            Kind::InvalidInput => (400, code::INVALID_ARGUMENT),
            Kind::Unauthenticated => (401, code::UNAUTHENTICATED),
            Kind::Forbidden => (403, code::PERMISSION_DENIED),
            Kind::NotFound => (404, code::NOT_FOUND),
            Kind::MethodNotAllowed => (405, code::UNIMPLEMENTED),
            // gRPC has no word for a client that sends too slowly.
            Kind::RequestTimeout => (408, code::CANCELLED),
            Kind::Conflict => (409, code::ABORTED),
            Kind::TooLarge => (413, code::RESOURCE_EXHAUSTED),
            Kind::UnsupportedMedia => (415, code::UNIMPLEMENTED),
            Kind::RateLimited => (429, code::RESOURCE_EXHAUSTED),
            Kind::Cancelled => (499, code::CANCELLED),
            Kind::BackendFailed | Kind::Internal => (500, code::INTERNAL),
            Kind::Unsupported => (501, code::UNIMPLEMENTED),
            Kind::Overloaded | Kind::NotReady => (503, code::UNAVAILABLE),
            Kind::DeadlineExceeded => (504, code::DEADLINE_EXCEEDED),
        };
        let retry_after = matches!(http, 429 | 503).then_some(RETRY_AFTER_SECONDS);
        Status { http, grpc, retry_after }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients depend on every line: a change here is a change of the protocol.
    const TABLE: &str = "\
invalid_input 400 3
unauthenticated 401 16
forbidden 403 7
not_found 404 5
method_not_allowed 405 12
request_timeout 408 1
conflict 409 10
too_large 413 8
unsupported_media 415 12
rate_limited 429 8 retry-after 1
cancelled 499 1
backend_failed 500 13
internal 500 13
unsupported 501 12
overloaded 503 14 retry-after 1
not_ready 503 14 retry-after 1
deadline_exceeded 504 4
";

    #[test]
    fn the_table_is_as_published() {
        let mut table = String::new();
        for kind in Kind::ALL {
            let Status { http, grpc, retry_after } = Status::of(kind);
            let retry = retry_after.map_or(String::new(), |seconds| format!(" retry-after {seconds}"));
            table.push_str(&format!("{} {http} {grpc}{retry}\n", kind.label()));
        }
        assert_eq!(table, TABLE);
    }
}
