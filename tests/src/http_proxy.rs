//! A proxy before an HTTP/1 server that does harm: it answers in the server's place, delays, stalls,
//! cuts, corrupts, or forgets. Which request meets which [`Fault`] is told by [`Rule`]s. It changes
//! neither the `Host` header nor the path, so that a signed request stays valid.
//!
//! Every connection carries one request: the proxy closes it after the answer, and so need not know
//! where an answer ends. Start with [`HttpProxy::start`].

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    task::JoinSet,
};

/// What happens to a request that a rule fits.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The server is not asked: this status, these headers, this body.
    Answer(u16, Vec<(&'static str, String)>, String),
    /// It is passed on after a while.
    Delay(Duration),
    /// The body of the answer comes so many bytes a second.
    Drip(usize),
    /// After so many bytes of the answer's body nothing comes any more; the connection stays open.
    Stall(usize),
    /// After so many bytes of the answer's body the connection is closed.
    Cut(usize),
    /// After so many bytes of the request's body the connection is reset; the server sees it end too.
    CutRequest(usize),
    /// The server does what was asked, and its answer never comes; the connection is closed.
    LoseAnswer,
    /// The server does what was asked, and nothing comes back; the connection stays open.
    Silence,
    /// One bit of the answer's body is another, past so many bytes.
    Corrupt(usize),
    /// The headers `If-Match` and `If-None-Match` do not reach the server.
    IgnoreConditions,
}

impl Fault {
    /// An error as S3 tells it.
    #[must_use]
    pub fn s3_error(status: u16, code: &str, message: &str) -> Self {
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message><RequestId>4442587FB7D0A2F9</RequestId></Error>"
        );
        Self::Answer(
            status,
            vec![("Content-Type", "application/xml".to_owned())],
            body,
        )
    }
}

/// Which requests meet a fault.
#[derive(Debug, Clone)]
pub struct Rule {
    method: Option<&'static str>,
    part: String,
    skip: usize,
    times: usize,
    fault: Fault,
}

impl Rule {
    /// Every request, for ever.
    #[must_use]
    pub const fn new(fault: Fault) -> Self {
        Self {
            method: None,
            part: String::new(),
            skip: 0,
            times: usize::MAX,
            fault,
        }
    }

    /// Only requests with this method.
    #[must_use]
    pub const fn on(mut self, method: &'static str) -> Self {
        self.method = Some(method);
        self
    }

    /// Only requests whose path and query contain this.
    #[must_use]
    pub fn to(mut self, part: impl Into<String>) -> Self {
        self.part = part.into();
        self
    }

    /// Not the first so many of them.
    #[must_use]
    pub const fn after(mut self, skip: usize) -> Self {
        self.skip = skip;
        self
    }

    /// Only so many of them.
    #[must_use]
    pub const fn times(mut self, times: usize) -> Self {
        self.times = times;
        self
    }

    /// The fault that this request meets. Counts it.
    fn meet(&mut self, request: &Request) -> Option<Fault> {
        if self.times == 0
            || self.method.is_some_and(|m| m != request.method)
            || !request.target.contains(&self.part)
        {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times -= 1;
        Some(self.fault.clone())
    }
}

/// A request that came by.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET` and so on.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names are in lower case.
    pub headers: Vec<(String, String)>,
    /// Whether it met a fault.
    pub met_fault: bool,
}

impl Request {
    /// A header's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }
}

#[derive(Default)]
struct Shared {
    rules: Mutex<Vec<Rule>>,
    requests: Mutex<Vec<Request>>,
    under_way: Mutex<(usize, usize)>,
}

/// A running proxy. It ends, with all its connections, when it is dropped.
pub struct HttpProxy {
    address: String,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl HttpProxy {
    /// Starts one before a server at `host:port`.
    #[must_use]
    pub fn start(server: &str) -> Self {
        // Threads of its own, so that a test that blocks does not stop it.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let inside = runtime.enter();
        let listener = TcpListener::from_std(listener).unwrap();
        let shared = Arc::new(Shared::default());
        runtime.spawn(accept(listener, server.to_owned(), Arc::clone(&shared)));
        drop(inside);
        Self {
            address,
            shared,
            runtime: Some(runtime),
        }
    }

    /// `host:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on also this. The first rule that fits a request counts.
    pub fn add(&self, rule: Rule) {
        self.shared.rules.lock().unwrap().push(rule);
    }

    /// From now on no faults.
    pub fn clear(&self) {
        self.shared.rules.lock().unwrap().clear();
    }

    /// What has come by since the start, or since the last call.
    #[must_use]
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.shared.requests.lock().unwrap())
    }

    /// The most requests that were under way at the same moment so far.
    #[must_use]
    pub fn most_at_once(&self) -> usize {
        self.shared.under_way.lock().unwrap().1
    }
}

impl Drop for HttpProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, server: String, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                let (server, shared) = (server.clone(), Arc::clone(&shared));
                connections.spawn(async move {
                    // A connection that breaks is what the proxy is there for.
                    let _ = serve(client, &server, &shared).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

struct UnderWay<'a>(&'a Shared);

impl<'a> UnderWay<'a> {
    fn new(shared: &'a Shared) -> Self {
        let mut count = shared.under_way.lock().unwrap();
        count.0 += 1;
        count.1 = count.1.max(count.0);
        Self(shared)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.lock().unwrap().0 -= 1;
    }
}

async fn serve(mut client: TcpStream, server: &str, shared: &Shared) -> io::Result<()> {
    client.set_nodelay(true)?;
    let (head, mut body) = read_head(&mut client).await?;
    let mut request = parse(&head);
    let _under_way = UnderWay::new(shared);
    let fault = {
        let mut rules = shared.rules.lock().unwrap();
        rules.iter_mut().find_map(|rule| rule.meet(&request))
    };
    request.met_fault = fault.is_some();
    shared.requests.lock().unwrap().push(request.clone());

    let length: usize = request
        .header("content-length")
        .map_or(0, |v| v.parse().unwrap());
    if let Some(Fault::CutRequest(at)) = fault {
        read_until(&mut client, &mut body, at.min(length)).await?;
        let mut upstream = TcpStream::connect(server).await?;
        upstream.write_all(&forwarded(&head, false)).await?;
        upstream.write_all(&body[..at.min(body.len())]).await?;
        return reset(client);
    }
    read_until(&mut client, &mut body, length).await?;
    match &fault {
        Some(Fault::Answer(status, headers, body)) => {
            let headers: String = headers
                .iter()
                .map(|(n, v)| format!("{n}: {v}\r\n"))
                .collect();
            let body = if request.method == "HEAD" { "" } else { body };
            let answer = format!(
                "HTTP/1.1 {status} Fault\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
            return finish(client, answer.as_bytes()).await;
        }
        Some(Fault::Delay(delay)) => tokio::time::sleep(*delay).await,
        _ => {}
    }

    let mut upstream = TcpStream::connect(server).await?;
    let is_lax = matches!(fault, Some(Fault::IgnoreConditions));
    upstream.write_all(&forwarded(&head, is_lax)).await?;
    upstream.write_all(&body).await?;
    let (head, mut answer) = read_head(&mut upstream).await?;
    let head = forwarded(&head, false);
    upstream.read_to_end(&mut answer).await?;
    match fault {
        Some(Fault::Drip(rate)) => {
            client.write_all(&head).await?;
            for piece in answer.chunks((rate / 10).max(1)) {
                client.write_all(piece).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            client.shutdown().await
        }
        Some(Fault::LoseAnswer) => Ok(()),
        Some(Fault::Silence) => until_left(client).await,
        Some(Fault::Stall(at)) => {
            client.write_all(&head).await?;
            client.write_all(&answer[..at.min(answer.len())]).await?;
            until_left(client).await
        }
        Some(Fault::Cut(at)) => {
            client.write_all(&head).await?;
            client.write_all(&answer[..at.min(answer.len())]).await?;
            client.shutdown().await
        }
        Some(Fault::Corrupt(at)) => {
            if let Some(byte) = answer.get_mut(at) {
                *byte ^= 1;
            }
            finish(client, &[head, answer].concat()).await
        }
        _ => finish(client, &[head, answer].concat()).await,
    }
}

async fn finish(mut client: TcpStream, answer: &[u8]) -> io::Result<()> {
    client.write_all(answer).await?;
    client.shutdown().await
}

/// Waits until the client gives up.
async fn until_left(mut client: TcpStream) -> io::Result<()> {
    while client.read(&mut [0; 1024]).await? > 0 {}
    Ok(())
}

fn reset(client: TcpStream) -> io::Result<()> {
    // With a linger of zero the kernel resets the connection instead of ending it.
    client.set_zero_linger()?;
    drop(client);
    Ok(())
}

/// Everything up to and with the empty line, and what has come of the body.
async fn read_head(from: &mut TcpStream) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let body = bytes.split_off(at + 4);
            return Ok((bytes, body));
        }
        if from.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn read_until(from: &mut TcpStream, body: &mut Vec<u8>, length: usize) -> io::Result<()> {
    while body.len() < length {
        if from.read_buf(body).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

fn parse(head: &[u8]) -> Request {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let mut next = || first.next().unwrap_or_default().to_owned();
    let (method, target) = (next(), next());
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Request {
        method,
        target,
        headers,
        met_fault: false,
    }
}

/// The head as the other side gets it: one request on a connection, and conditions taken out.
fn forwarded(head: &[u8], without_conditions: bool) -> Vec<u8> {
    let text = String::from_utf8_lossy(head);
    let mut out = String::new();
    for line in text.trim_end().split("\r\n") {
        let name = line
            .split(':')
            .next()
            .unwrap_or_default()
            .to_ascii_lowercase();
        let is_condition = matches!(name.as_str(), "if-match" | "if-none-match");
        if name != "connection" && !(without_conditions && is_condition) {
            out.push_str(line);
            out.push_str("\r\n");
        }
    }
    out.push_str("connection: close\r\n\r\n");
    out.into_bytes()
}
