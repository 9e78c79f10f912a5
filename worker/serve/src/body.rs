//! Bodies as they are received: counted together, so that many senders at once cannot fill the memory
//! that each of them alone may use.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Sleep, sleep};
use tonic::Status;

use crate::error::InferError;

/// Bytes that may be on their way in.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicUsize,
    most: usize,
}

impl Budget {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            most,
        })
    }
}

/// A body whose bytes count against the budget until it is dropped, and that ends with an error when
/// it takes too long.
#[derive(Debug)]
pub(crate) struct Metered {
    body: Incoming,
    budget: Arc<Budget>,
    counted: usize,
    within: Duration,
    /// Only once it has to be waited for.
    end: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    pub fn new(body: Incoming, budget: &Arc<Budget>, within: Duration) -> Self {
        Self {
            body,
            budget: Arc::clone(budget),
            counted: 0,
            within,
            end: None,
        }
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.counted, Relaxed);
    }
}

impl Body for Metered {
    type Data = Bytes;
    // As this, it reaches a gRPC client as it is.
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            let within = self.within;
            let end = self.end.get_or_insert_with(|| Box::pin(sleep(within)));
            if end.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let status = Status::deadline_exceeded("the body did not arrive in time");
            return Poll::Ready(Some(Err(status.into())));
        };
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.counted += data.len();
            let used = self.budget.used.fetch_add(data.len(), Relaxed) + data.len();
            if used > self.budget.most {
                let why =
                    "too many bytes of requests are on their way to this server; try again later";
                let status = Status::from(InferError::Overloaded(why.to_owned()));
                return Poll::Ready(Some(Err(status.into())));
            }
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
