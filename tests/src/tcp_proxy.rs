//! A proxy before any TCP server that plays the network between two processes: it delays, drops in
//! silence, or cuts, one way or both, at a command of the test.
//!
//! What is dropped in silence is held, as a kernel that gets no acknowledgement holds it: when the
//! network is whole again and the connection still there, it arrives, late. So a partition here also
//! tests what a message does that comes long after its time. Start with [`TcpProxy::start`].

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Runtime,
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the one that connects to the one that listens.
    ToServer,
    /// Back.
    ToClient,
}

/// How one way is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Open,
    Slow(Duration),
    Shut,
}

/// What the network does now.
#[derive(Debug, Clone, Copy)]
struct Network {
    to_server: Gate,
    to_client: Gate,
    /// New connections are reset.
    refuses: bool,
    /// Connections of an earlier generation are reset.
    generation: u64,
}

impl Network {
    fn gate(&self, way: Way) -> Gate {
        match way {
            Way::ToServer => self.to_server,
            Way::ToClient => self.to_client,
        }
    }

    fn gate_mut(&mut self, way: Way) -> &mut Gate {
        match way {
            Way::ToServer => &mut self.to_server,
            Way::ToClient => &mut self.to_client,
        }
    }
}

/// The request whose answer is to be lost: what its bytes contain, and how long the server has for it.
#[derive(Debug, Clone)]
struct Loss {
    needle: Vec<u8>,
    after: Duration,
}

struct Shared {
    server: Mutex<String>,
    /// Only connections whose client has said this meet what is done to one way.
    only: Mutex<Option<Vec<u8>>>,
    network: watch::Sender<Network>,
    loss: Mutex<Option<Loss>>,
    lost: AtomicU32,
}

/// A running proxy. It ends, with all its connections, when it is dropped.
pub struct TcpProxy {
    address: String,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl TcpProxy {
    /// Starts one before a server at `host:port`, which need not be there yet.
    #[must_use]
    pub fn start(server: &str) -> Self {
        // Threads of its own, so that a test that blocks does not stop it.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let network = Network {
            to_server: Gate::Open,
            to_client: Gate::Open,
            refuses: false,
            generation: 0,
        };
        let shared = Arc::new(Shared {
            server: Mutex::new(server.to_owned()),
            only: Mutex::new(None),
            network: watch::Sender::new(network),
            loss: Mutex::new(None),
            lost: AtomicU32::new(0),
        });
        runtime.spawn(accept(listener, Arc::clone(&shared)));
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

    /// From now on new connections go to another server.
    pub fn point_to(&self, server: &str) {
        server.clone_into(&mut self.shared.server.lock().unwrap());
    }

    /// From now on delays and silence meet only new connections whose client says this, from that
    /// moment on: one peer of many.
    pub fn only_who_says(&self, needle: impl Into<Vec<u8>>) {
        *self.shared.only.lock().unwrap() = Some(needle.into());
    }

    /// Everything passes; what was held goes on its way.
    pub fn heal(&self) {
        self.shared.network.send_modify(|network| {
            network.to_server = Gate::Open;
            network.to_client = Gate::Open;
            network.refuses = false;
        });
    }

    /// Everything takes so much longer, both ways.
    pub fn delay(&self, by: Duration) {
        self.shared.network.send_modify(|network| {
            network.to_server = Gate::Slow(by);
            network.to_client = Gate::Slow(by);
        });
    }

    /// Nothing passes this way any more, and nobody is told: connections stay open.
    pub fn drop_silently(&self, way: Way) {
        self.shared
            .network
            .send_modify(|network| *network.gate_mut(way) = Gate::Shut);
    }

    /// Nothing passes at all any more, and nobody is told.
    pub fn partition(&self) {
        self.drop_silently(Way::ToServer);
        self.drop_silently(Way::ToClient);
    }

    /// Resets every connection. New ones pass.
    pub fn cut(&self) {
        self.shared
            .network
            .send_modify(|network| network.generation += 1);
    }

    /// Resets every connection, and every new one, until [`Self::heal`].
    pub fn refuse(&self) {
        self.shared.network.send_modify(|network| {
            network.generation += 1;
            network.refuses = true;
        });
    }

    /// The next request whose bytes contain `needle` reaches the server, which then has so much time
    /// for it; its answer does not come back, for its connection is reset.
    pub fn lose_answer_to(&self, needle: impl Into<Vec<u8>>, after: Duration) {
        let needle = needle.into();
        *self.shared.loss.lock().unwrap() = Some(Loss { needle, after });
    }

    /// How many answers have been lost so.
    #[must_use]
    pub fn lost_answers(&self) -> u32 {
        self.shared.lost.load(Ordering::SeqCst)
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                if shared.network.borrow().refuses {
                    let _ = client.set_zero_linger();
                    continue;
                }
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    // A connection that breaks is what the proxy is there for.
                    let _ = serve(client, &shared).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(client: TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut network = shared.network.subscribe();
    let generation = network.borrow_and_update().generation;
    let only = shared.only.lock().unwrap().clone();
    let is_met = AtomicBool::new(only.is_none());
    // A new connection does not come through a network that is cut.
    let wait_open = network.wait_for(|n| {
        n.generation != generation
            || only.is_some()
            || (n.to_server != Gate::Shut && n.to_client != Gate::Shut)
    });
    wait_open.await.map_err(io::Error::other)?;
    let server = shared.server.lock().unwrap().clone();
    let server = TcpStream::connect(server).await?;
    server.set_nodelay(true)?;
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let is_mute = AtomicBool::new(false);
    let mut there = Stream {
        way: Way::ToServer,
        to: server_write,
        is_mute: &is_mute,
        only: only.as_deref(),
        is_met: &is_met,
        shared,
    };
    let mut back = Stream {
        way: Way::ToClient,
        to: client_write,
        is_mute: &is_mute,
        only: only.as_deref(),
        is_met: &is_met,
        shared,
    };
    let both = async { tokio::try_join!(there.pump(client_read), back.pump(server_read)) };
    tokio::select! {
        ended = both => if ended.is_ok() { return Ok(()) },
        _ = network.wait_for(|n| n.generation != generation) => {}
    }
    // With a linger of zero the kernel resets the connection instead of ending it.
    for half in [there.to, back.to] {
        half.as_ref().set_zero_linger()?;
        // A half that is dropped would end its side first.
        half.forget();
    }
    Ok(())
}

/// One way of one connection.
struct Stream<'a> {
    way: Way,
    to: OwnedWriteHalf,
    /// Nothing goes back on this connection any more.
    is_mute: &'a AtomicBool,
    only: Option<&'a [u8]>,
    /// Whether this connection meets what is done to its ways.
    is_met: &'a AtomicBool,
    shared: &'a Shared,
}

impl Stream<'_> {
    /// Carries bytes until the sender has ended its side. An error means that the connection is to
    /// be reset.
    async fn pump(&mut self, from: OwnedReadHalf) -> io::Result<()> {
        // What is under way: as much as the network takes before the sender has to wait.
        let (sender, mut under_way) = mpsc::channel(64);
        tokio::try_join!(read(from, sender), async {
            let mut network = self.shared.network.subscribe();
            while let Some((came, piece)) = under_way.recv().await {
                if let (Way::ToServer, Some(only), Ok(piece)) = (self.way, self.only, &piece)
                    && contains(piece, only)
                {
                    self.is_met.store(true, Ordering::SeqCst);
                }
                if self.is_met.load(Ordering::SeqCst) {
                    let open = network.wait_for(|n| n.gate(self.way) != Gate::Shut);
                    let gate = open.await.map_err(io::Error::other)?.gate(self.way);
                    if let Gate::Slow(by) = gate {
                        tokio::time::sleep_until(came + by).await;
                    }
                }
                self.pass(&piece?).await?;
            }
            self.to.shutdown().await
        })
        .map(drop)
    }

    async fn pass(&mut self, piece: &[u8]) -> io::Result<()> {
        if self.way == Way::ToClient {
            if self.is_mute.load(Ordering::SeqCst) {
                return std::future::pending().await;
            }
            return self.to.write_all(piece).await;
        }
        let loss = (self.shared.loss.lock().unwrap()).take_if(|loss| contains(piece, &loss.needle));
        if loss.is_some() {
            self.is_mute.store(true, Ordering::SeqCst);
        }
        self.to.write_all(piece).await?;
        let Some(loss) = loss else { return Ok(()) };
        tokio::time::sleep(loss.after).await;
        self.shared.lost.fetch_add(1, Ordering::SeqCst);
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

fn contains(piece: &[u8], needle: &[u8]) -> bool {
    piece.windows(needle.len()).any(|w| w == needle)
}

type Piece = (Instant, io::Result<Vec<u8>>);

async fn read(mut from: OwnedReadHalf, sender: mpsc::Sender<Piece>) -> io::Result<()> {
    loop {
        let mut piece = Vec::with_capacity(64 << 10);
        let read = from.read_buf(&mut piece).await;
        let is_last = !matches!(read, Ok(1..));
        if matches!(read, Ok(0))
            || sender
                .send((Instant::now(), read.map(|_| piece)))
                .await
                .is_err()
            || is_last
        {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Shutdown, TcpListener, TcpStream},
        thread::JoinHandle,
    };

    use super::*;
    use crate::{seconds, wait_for};

    /// A server that gives back what it gets, on each of its connections.
    fn echo() -> (String, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serving = std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut bytes = [0; 1024];
                    while let Ok(read @ 1..) = stream.read(&mut bytes) {
                        let _ = stream.write_all(&bytes[..read]);
                    }
                });
            }
        });
        (address, serving)
    }

    fn connect(proxy: &TcpProxy) -> TcpStream {
        let stream = TcpStream::connect(proxy.address()).unwrap();
        stream.set_read_timeout(Some(seconds(10))).unwrap();
        stream
    }

    fn say(stream: &mut TcpStream, text: &str) -> io::Result<String> {
        stream.write_all(text.as_bytes())?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer)?;
        Ok(String::from_utf8(answer).unwrap())
    }

    #[test]
    fn bytes_and_ends_pass_both_ways() {
        let proxy = TcpProxy::start(&echo().0);
        let mut stream = connect(&proxy);
        assert_eq!(say(&mut stream, "hello").unwrap(), "hello");
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
    }

    #[test]
    fn what_was_dropped_in_silence_comes_late() {
        let proxy = TcpProxy::start(&echo().0);
        let mut stream = connect(&proxy);
        assert_eq!(say(&mut stream, "hello").unwrap(), "hello");
        for way in [Way::ToServer, Way::ToClient] {
            proxy.drop_silently(way);
            stream
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let silence = say(&mut stream, "late").unwrap_err();
            assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
            // A new connection is not refused either.
            let mut other = connect(&proxy);
            other
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let silence = say(&mut other, "other").unwrap_err();
            assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
            proxy.heal();
            stream.set_read_timeout(Some(seconds(10))).unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"late");
            other.set_read_timeout(Some(seconds(10))).unwrap();
            let mut answer = [0; 5];
            other.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"other");
        }
    }

    #[test]
    fn one_peer_of_many_is_cut_off() {
        let proxy = TcpProxy::start(&echo().0);
        proxy.only_who_says("i am a");
        let (mut a, mut b) = (connect(&proxy), connect(&proxy));
        assert_eq!(say(&mut a, "hello, i am a").unwrap(), "hello, i am a");
        assert_eq!(say(&mut b, "hello, i am b").unwrap(), "hello, i am b");
        proxy.partition();
        a.set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let silence = say(&mut a, "late").unwrap_err();
        assert_eq!(silence.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(say(&mut b, "still there").unwrap(), "still there");
    }

    #[test]
    fn a_cut_resets_what_is_there_and_a_refusal_what_comes() {
        let proxy = TcpProxy::start(&echo().0);
        let mut stream = connect(&proxy);
        assert_eq!(say(&mut stream, "hello").unwrap(), "hello");
        proxy.cut();
        let reset = stream.read(&mut [0; 9]).unwrap_err();
        assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(say(&mut connect(&proxy), "again").unwrap(), "again");
        proxy.refuse();
        let reset = connect(&proxy).read(&mut [0; 9]).unwrap_err();
        assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
        proxy.heal();
        assert_eq!(say(&mut connect(&proxy), "again").unwrap(), "again");
    }

    #[test]
    fn a_delay_adds_to_each_way() {
        let proxy = TcpProxy::start(&echo().0);
        proxy.delay(Duration::from_millis(100));
        let mut stream = connect(&proxy);
        let start = std::time::Instant::now();
        assert_eq!(say(&mut stream, "hello").unwrap(), "hello");
        assert!(start.elapsed() >= Duration::from_millis(200));
    }

    #[test]
    fn an_answer_is_lost_though_the_server_did_what_was_asked() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = TcpProxy::start(&listener.local_addr().unwrap().to_string());
        proxy.lose_answer_to("needle", Duration::from_millis(50));
        let mut stream = connect(&proxy);
        let (mut server, _) = listener.accept().unwrap();
        stream.write_all(b"hay").unwrap();
        let mut got = [0; 3];
        server.read_exact(&mut got).unwrap();
        server.write_all(b"yes").unwrap();
        stream.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"yes");
        assert_eq!(proxy.lost_answers(), 0);
        stream.write_all(b"hay needle hay").unwrap();
        let mut got = [0; 14];
        server.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hay needle hay");
        server.write_all(b"yes").unwrap();
        let reset = stream.read(&mut [0; 9]).unwrap_err();
        assert_eq!(reset.kind(), io::ErrorKind::ConnectionReset);
        wait_for("it counts", seconds(5), || {
            (proxy.lost_answers() == 1).then_some(())
        });
    }
}
