//! HTTP/1.1 as little of it as a load generator needs: a request's bytes are written as they are, of the answer the
//! head is parsed and the body is thrown away. One request at a time.

use std::net::SocketAddr;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::wire::{Fault, Reply};
use crate::cli::client::MAX_ANSWER_BYTES;

/// What is read at once; a head must fit.
const BUFFER_BYTES: usize = 64 << 10;
const MAX_HEADERS: usize = 64;
/// How much of a refusal is kept to be shown.
const MAX_REFUSAL_BYTES: usize = 512;

pub(super) struct Http1 {
    address: SocketAddr,
    /// `None` after a failure, until the next request.
    stream: Option<TcpStream>,
    buffer: Box<[u8]>,
    /// Where in the buffer lies what was received and not yet looked at.
    start: usize,
    end: usize,
}

/// How a body ends.
#[derive(Clone, Copy)]
enum Length {
    Known(usize),
    Chunked,
    UntilClosed,
}

struct Head {
    status: u16,
    length: Length,
    keep_alive: bool,
}

impl Http1 {
    pub(super) fn new(address: SocketAddr) -> Http1 {
        Http1 { address, stream: None, buffer: vec![0; BUFFER_BYTES].into(), start: 0, end: 0 }
    }

    pub(super) async fn connect(&mut self) -> Result<(), Fault> {
        if self.stream.is_none() {
            let failed = |error: std::io::Error| Fault::Connect(error.to_string());
            let stream = TcpStream::connect(self.address).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            (self.start, self.end) = (0, 0);
            self.stream = Some(stream);
        }
        Ok(())
    }

    /// A server may end a connection while it is idle, which is no failure: the next request gets another.
    fn drop_ended(&mut self) {
        // Nothing is due here: whatever comes but that there is nothing is an end.
        let idle = |stream: &TcpStream| matches!(stream.try_read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
        self.stream.take_if(|stream| !idle(stream));
    }

    /// Sends a request and reads its answer to the end. `reply` gets the answer, where somebody wants it.
    pub(super) async fn call(&mut self, request: &Bytes, reply: Option<&mut Reply>) -> Result<(), Fault> {
        self.drop_ended();
        self.connect().await?;
        // Whatever ends this early, a timeout that drops it included, ends the connection.
        let Some(mut stream) = self.stream.take() else { return Err(Fault::Connect(String::new())) };
        let keep_alive = self.exchange(&mut stream, request, reply).await;
        match &keep_alive {
            Ok(true) | Err((_, true)) => self.stream = Some(stream),
            Ok(false) | Err((_, false)) => {}
        }
        keep_alive.map(drop).map_err(|(fault, _)| fault)
    }

    /// Whether the connection can be used again, in failure, too.
    async fn exchange(
        &mut self,
        stream: &mut TcpStream,
        request: &Bytes,
        reply: Option<&mut Reply>,
    ) -> Result<bool, (Fault, bool)> {
        let broken = |fault| (fault, false);
        // A server that refuses may answer and close before it has read the whole request.
        let written = stream.write_all(request).await.map_err(|error| broken(closed(&error)));
        let mut kept = Reply::default();
        let head = self.head(stream, reply.is_some().then_some(&mut kept.headers)).await;
        let head = head.map_err(|fault| written.clone().err().unwrap_or(broken(fault)))?;
        let refused = !(200..300).contains(&head.status);
        let limit = match (&reply, refused) {
            (Some(_), _) => MAX_ANSWER_BYTES,
            (None, true) => MAX_REFUSAL_BYTES,
            (None, false) => 0,
        };
        self.body(stream, head.length, &mut kept.body, limit).await.map_err(broken)?;
        let reusable = written.is_ok() && head.keep_alive && self.start == self.end;
        if refused {
            kept.body.truncate(MAX_REFUSAL_BYTES);
            let text = String::from_utf8_lossy(&kept.body).trim().to_string();
            return Err((Fault::Status(head.status, text), reusable));
        }
        if let Some(reply) = reply {
            *reply = kept;
        }
        Ok(reusable)
    }

    async fn head(
        &mut self,
        stream: &mut TcpStream,
        mut kept: Option<&mut Vec<(String, Vec<u8>)>>,
    ) -> Result<Head, Fault> {
        loop {
            if self.start < self.end
                && let Some((length, head)) = parse_head(&self.buffer[self.start..self.end], &mut kept)?
            {
                self.start += length;
                // A server may tell how it goes before it answers.
                if !matches!(head.status, 100..200) || head.status == 101 {
                    return Ok(head);
                }
                if let Some(kept) = &mut kept {
                    kept.clear();
                }
                continue;
            }
            self.more(stream).await?;
        }
    }

    /// Receives something behind what is there.
    async fn more(&mut self, stream: &mut TcpStream) -> Result<(), Fault> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            if self.start == 0 {
                return Err(Fault::Malformed(format!("a head or chunk of over {BUFFER_BYTES} bytes")));
            }
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match stream.read(&mut self.buffer[self.end..]).await {
            Ok(0) => Err(Fault::Closed("in the middle of an answer".into())),
            Ok(received) => {
                self.end += received;
                Ok(())
            }
            Err(error) => Err(closed(&error)),
        }
    }

    /// Reads a body to its end and keeps up to `limit` bytes of it.
    async fn body(
        &mut self,
        stream: &mut TcpStream,
        length: Length,
        kept: &mut Vec<u8>,
        limit: usize,
    ) -> Result<(), Fault> {
        match length {
            Length::Known(length) => self.skip(stream, length, kept, limit).await,
            Length::Chunked => self.chunks(stream, kept, limit).await,
            Length::UntilClosed => loop {
                let there = self.end - self.start;
                self.skip(stream, there, kept, limit).await?;
                match self.more(stream).await {
                    Ok(()) => {}
                    Err(Fault::Closed(_)) => return Ok(()),
                    Err(fault) => return Err(fault),
                }
            },
        }
    }

    async fn skip(
        &mut self,
        stream: &mut TcpStream,
        mut length: usize,
        kept: &mut Vec<u8>,
        limit: usize,
    ) -> Result<(), Fault> {
        loop {
            let here = length.min(self.end - self.start);
            let keep = here.min(limit.saturating_sub(kept.len()));
            kept.extend_from_slice(&self.buffer[self.start..self.start + keep]);
            self.start += here;
            length -= here;
            if length == 0 {
                return Ok(());
            }
            self.more(stream).await?;
        }
    }

    async fn chunks(&mut self, stream: &mut TcpStream, kept: &mut Vec<u8>, limit: usize) -> Result<(), Fault> {
        loop {
            let size = loop {
                let there = &self.buffer[self.start..self.end];
                match httparse::parse_chunk_size(there) {
                    Ok(httparse::Status::Complete((length, size))) => {
                        self.start += length;
                        break usize::try_from(size).unwrap_or(usize::MAX);
                    }
                    Ok(httparse::Status::Partial) => self.more(stream).await?,
                    Err(_) => return Err(Fault::Malformed("a chunk without its size".into())),
                }
            };
            if size == 0 {
                return self.trailers(stream).await;
            }
            self.skip(stream, size, kept, limit).await?;
            self.skip(stream, 2, &mut Vec::new(), 0).await?;
        }
    }

    /// Up to the empty line behind the last chunk.
    async fn trailers(&mut self, stream: &mut TcpStream) -> Result<(), Fault> {
        loop {
            let there = &self.buffer[self.start..self.end];
            match there.windows(2).position(|pair| pair == b"\r\n") {
                Some(length) => {
                    self.start += length + 2;
                    if length == 0 {
                        return Ok(());
                    }
                }
                None => self.more(stream).await?,
            }
        }
    }
}

fn closed(error: &std::io::Error) -> Fault {
    Fault::Closed(error.to_string())
}

/// The head and its length, where it is all there.
fn parse_head(received: &[u8], kept: &mut Option<&mut Vec<(String, Vec<u8>)>>) -> Result<Option<(usize, Head)>, Fault> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let malformed = |why: &str| Fault::Malformed(format!("no head of HTTP/1.1: {why}"));
    let length = match response.parse(received) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(malformed(&error.to_string())),
    };
    let mut head = Head {
        status: response.code.unwrap_or_default(),
        length: Length::UntilClosed,
        keep_alive: response.version == Some(1),
    };
    for header in response.headers {
        if header.name.eq_ignore_ascii_case("content-length") {
            let length = std::str::from_utf8(header.value).ok().and_then(|text| text.trim().parse().ok());
            let length = length.ok_or_else(|| malformed("its content-length is no number"))?;
            // Where both are there, the other one holds.
            if !matches!(head.length, Length::Chunked) {
                head.length = Length::Known(length);
            }
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            head.length = Length::Chunked;
        } else if header.name.eq_ignore_ascii_case("connection") {
            head.keep_alive = !header.value.eq_ignore_ascii_case(b"close");
        } else if let Some(kept) = kept
            && !header.name.eq_ignore_ascii_case("date")
        {
            kept.push((header.name.to_string(), header.value.to_vec()));
        }
    }
    // These have no body, whatever length they tell.
    if matches!(head.status, 100..200 | 204 | 304) {
        head.length = Length::Known(0);
    }
    if matches!(head.length, Length::UntilClosed) || head.status == 101 {
        head.keep_alive = false;
    }
    Ok(Some((length, head)))
}
