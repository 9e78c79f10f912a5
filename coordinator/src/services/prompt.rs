//! Connections that keep nobody waiting: who opens one says soon what it speaks, and over HTTP/1
//! asks whole requests. The server's own library waits for both without an end.
//!
//! HTTP/2 has keep-alives, which find a peer that is silent; from its preface on, nothing is
//! measured here.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Until it is known what a peer speaks.
const BEGINS_WITHIN: Duration = Duration::from_secs(10);
/// Between an answer over HTTP/1 and the next whole request.
const ASKS_WITHIN: Duration = Duration::from_secs(20);

/// What the other side speaks.
enum Speaks {
    /// So many bytes are those of HTTP/2's preface.
    Perhaps(usize),
    Http1,
    Http2,
}

/// See the module.
pub(super) struct Prompt<S> {
    stream: S,
    speaks: Speaks,
    until: Pin<Box<Sleep>>,
    asks_within: Duration,
}

impl<S> Prompt<S> {
    /// From now on it is measured.
    pub fn new(stream: S) -> Self {
        Self::within(stream, BEGINS_WITHIN, ASKS_WITHIN)
    }

    fn within(stream: S, begins: Duration, asks: Duration) -> Self {
        Self {
            stream,
            speaks: Speaks::Perhaps(0),
            until: Box::pin(sleep(begins)),
            asks_within: asks,
        }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.speaks {
            Speaks::Http2 => Ok(()),
            _ if self.until.as_mut().poll(cx).is_pending() => Ok(()),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn heard(&mut self, bytes: &[u8]) {
        let Speaks::Perhaps(begun) = self.speaks else {
            return;
        };
        let rest = &PREFACE[begun..];
        let same = rest.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        self.speaks = if same == rest.len() {
            Speaks::Http2
        } else if same == bytes.len() {
            Speaks::Perhaps(begun + same)
        } else {
            self.until.as_mut().reset(Instant::now() + self.asks_within);
            Speaks::Http1
        };
    }

    fn said(&mut self, written: &Poll<io::Result<usize>>) {
        if matches!(self.speaks, Speaks::Http1) && matches!(written, Poll::Ready(Ok(1..))) {
            self.until.as_mut().reset(Instant::now() + self.asks_within);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prompt<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.heard(&buffer.filled()[before..]);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prompt<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.said(&written);
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.said(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const LATER: Duration = Duration::from_millis(200);
    /// Nothing here takes so long.
    const LONG: Duration = Duration::from_secs(20);

    fn pair() -> (Prompt<DuplexStream>, DuplexStream) {
        let (ours, theirs) = duplex(4096);
        (Prompt::within(ours, SOON, LATER), theirs)
    }

    /// Reads until it is given up, and says how long that took.
    async fn given_up(ours: &mut Prompt<DuplexStream>) -> Duration {
        let began = Instant::now();
        let read = async {
            while let Ok(read) = ours.read(&mut [0; 64]).await {
                assert!(read > 0, "the other side is there");
            }
        };
        tokio::time::timeout(LONG, read).await.unwrap();
        began.elapsed()
    }

    #[tokio::test]
    async fn who_does_not_say_what_it_speaks_is_not_waited_for() {
        for beginning in [&b""[..], b"P", &PREFACE[..23]] {
            let (mut ours, mut theirs) = pair();
            theirs.write_all(beginning).await.unwrap();
            assert!(given_up(&mut ours).await >= SOON / 2);
        }
    }

    #[tokio::test]
    async fn a_request_that_drips_in_is_not_waited_for_after_the_last_answer() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        ours.read_exact(&mut [0; 16]).await.unwrap();
        tokio::time::sleep(LATER / 2).await;
        ours.write_all(b"an answer").await.unwrap();
        let drips = async {
            while theirs.write_all(b"x").await.is_ok() {
                tokio::time::sleep(SOON / 5).await;
            }
        };
        tokio::select! {
            waited = given_up(&mut ours) => assert!(waited >= LATER / 2),
            () = drips => unreachable!("it drips for ever"),
        }
    }

    #[tokio::test]
    async fn http2_is_left_to_its_keep_alives() {
        let (mut ours, mut theirs) = pair();
        for bytes in PREFACE.chunks(5) {
            theirs.write_all(bytes).await.unwrap();
            ours.read_exact(&mut vec![0; bytes.len()]).await.unwrap();
        }
        let waits = tokio::time::timeout(LATER * 2, ours.read(&mut [0; 8])).await;
        assert!(waits.is_err(), "it was given up");
    }
}
