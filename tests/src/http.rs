//! HTTP/1.1 as anybody speaks it: single requests, and a sink that keeps what is posted to it and
//! can be gone, be there again on the same port, and hang.

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{processes, seconds};

/// The largest body that is read.
const MAX_BODY: usize = 16 << 20;

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The headers, by names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body, if all is well.
    ///
    /// # Panics
    /// If it is not.
    #[must_use]
    #[track_caller]
    pub fn expect_ok(self) -> String {
        assert!((200..300).contains(&self.status), "{self:#?}");
        self.body
    }
}

/// A message: its first line, its headers, its body.
fn read(stream: TcpStream) -> io::Result<(String, BTreeMap<String, String>, Vec<u8>)> {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let mut body = Vec::new();
    let is_chunked = headers
        .get("transfer-encoding")
        .is_some_and(|v| v == "chunked");
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
    if is_chunked {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(invalid)?;
            let mut chunk = vec![0; size.min(MAX_BODY) + 2];
            reader.read_exact(&mut chunk)?;
            if size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else if let Some(length) = headers.get("content-length") {
        let length: usize = length.parse().map_err(|_| io::ErrorKind::InvalidData)?;
        body.resize(length.min(MAX_BODY), 0);
        reader.read_exact(&mut body)?;
    } else if first.starts_with("HTTP/") {
        reader.read_to_end(&mut body)?;
    }
    Ok((first.trim_end().to_owned(), headers, body))
}

/// Sends one request, `head` being its method and path, and reads the answer.
///
/// # Errors
/// If there is no answer.
pub fn request(address: &str, head: &str, kind: &str, body: &str) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(seconds(20)))?;
    let length = body.len();
    write!(
        stream,
        "{head} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n"
    )?;
    // Who refuses it may answer before all of it was sent.
    let _ = write!(stream, "Content-Type: {kind}\r\n\r\n{body}");
    let (first, headers, body) = read(stream)?;
    let status = first.split(' ').nth(1).and_then(|s| s.parse().ok());
    Ok(Answer {
        status: status.ok_or(io::ErrorKind::InvalidData)?,
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// Reads a path of a server at `host:port`.
///
/// # Panics
/// If there is no answer.
#[must_use]
#[track_caller]
pub fn get(address: &str, path: &str) -> Answer {
    request(address, &format!("GET {path}"), "application/json", "").unwrap()
}

/// Posts a JSON body to a path of a server at `host:port`.
///
/// # Panics
/// If there is no answer.
#[must_use]
#[track_caller]
pub fn post(address: &str, path: &str, body: &str) -> Answer {
    post_as(address, path, "application/json", body)
}

/// Posts a body of another type.
///
/// # Panics
/// If there is no answer.
#[must_use]
#[track_caller]
pub fn post_as(address: &str, path: &str, kind: &str, body: &str) -> Answer {
    request(address, &format!("POST {path}"), kind, body).unwrap()
}

/// Something that was posted.
#[derive(Debug, Clone)]
pub struct Posted {
    /// The path.
    pub path: String,
    /// The headers, by names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

#[derive(Default)]
struct Shared {
    posted: Mutex<Vec<Posted>>,
    changed: Condvar,
    is_over: AtomicBool,
    hangs: AtomicBool,
}

/// A server that keeps what is posted to it.
pub struct Sink {
    port: u16,
    shared: Arc<Shared>,
    listens: Option<JoinHandle<()>>,
}

impl Sink {
    /// One that listens on a port of its own.
    #[must_use]
    pub fn start() -> Self {
        let mut sink = Self::prepare();
        sink.start_again();
        sink
    }

    /// One with a port of its own, on which nobody listens yet.
    #[must_use]
    pub fn prepare() -> Self {
        Self {
            port: processes::free_port(),
            shared: Arc::default(),
            listens: None,
        }
    }

    /// Listens, from the beginning or after [`Self::stop`].
    ///
    /// # Panics
    /// If it listens already, or somebody else has taken the port.
    pub fn start_again(&mut self) {
        assert!(self.listens.is_none(), "it listens");
        let listener = TcpListener::bind(("127.0.0.1", self.port)).unwrap();
        self.shared.is_over.store(false, Ordering::SeqCst);
        let shared = Arc::clone(&self.shared);
        self.listens = Some(std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.is_over.load(Ordering::SeqCst) {
                    return;
                }
                let shared = Arc::clone(&shared);
                // A thread for each, so that one that hangs holds up nobody.
                std::thread::spawn(move || {
                    let _ = stream.and_then(|stream| shared.answer(stream));
                });
            }
        }));
    }

    /// Is gone: nobody listens. What was posted is kept.
    pub fn stop(&mut self) {
        if let Some(listens) = self.listens.take() {
            self.shared.is_over.store(true, Ordering::SeqCst);
            // It looks whenever somebody comes.
            let _ = TcpStream::connect(("127.0.0.1", self.port));
            let _ = listens.join();
        }
    }

    /// Whether it takes requests and never answers, and keeps nothing.
    pub fn hang(&self, hangs: bool) {
        self.shared.hangs.store(hangs, Ordering::SeqCst);
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/events", self.port)
    }

    /// What was posted so far, in order.
    #[must_use]
    pub fn posted(&self) -> Vec<Posted> {
        self.shared.lock().clone()
    }

    /// Looks at what was posted, again whenever something comes, until it is as it should be.
    ///
    /// # Panics
    /// If it is not so by then.
    #[track_caller]
    pub fn wait_for<T>(
        &self,
        what: &str,
        within: Duration,
        mut look: impl FnMut(&[Posted]) -> Result<T, String>,
    ) -> T {
        let deadline = Instant::now() + within;
        let mut posted = self.shared.lock();
        loop {
            let wrong = match look(&posted) {
                Ok(found) => return found,
                Err(wrong) => wrong,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(posted);
                panic!("not within {within:?}: {what}: {wrong}");
            }
            let waited = self.shared.changed.wait_timeout(posted, left);
            posted = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Posted>> {
        self.posted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, stream: TcpStream) -> io::Result<()> {
        let mut back = stream.try_clone()?;
        let (first, headers, body) = read(stream)?;
        if self.hangs.load(Ordering::SeqCst) {
            // Until the other side gives up.
            let _ = back.read(&mut [0]);
            return Ok(());
        }
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let body = String::from_utf8_lossy(&body).into_owned();
        self.lock().push(Posted {
            path,
            headers,
            body,
        });
        self.changed.notify_all();
        back.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_keeps_what_is_posted_hangs_is_gone_and_is_there_again() {
        let mut sink = Sink::start();
        let address = format!("127.0.0.1:{}", sink.port);
        assert_eq!(post(&address, "/events", "{\"a\":1}").status, 202);
        sink.hang(true);
        let mut silent = TcpStream::connect(&address).unwrap();
        write!(silent, "POST /events HTTP/1.1\r\nContent-Length: 0\r\n\r\n").unwrap();
        silent
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        silent.read(&mut [0]).unwrap_err();
        drop(silent);
        sink.stop();
        TcpStream::connect(&address).unwrap_err();
        sink.hang(false);
        sink.start_again();
        assert_eq!(post(&address, "/events", "2").status, 202);
        let bodies = sink.wait_for("both", seconds(5), |posted| {
            let bodies: Vec<_> = posted.iter().map(|p| p.body.clone()).collect();
            (bodies.len() == 2)
                .then_some(bodies)
                .ok_or_else(String::new)
        });
        assert_eq!(bodies, ["{\"a\":1}", "2"]);
        assert_eq!(sink.posted()[0].headers["content-type"], "application/json");
        assert!(sink.url().ends_with(&sink.posted()[0].path));
    }
}
