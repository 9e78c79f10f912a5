//! Answers that go on only while whoever asked is known: a watch that is open when its token is
//! revoked ends then, and not when its run does.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::{sync::watch, time::sleep};
use tonic::{Status, body::Body};

use super::status;
use crate::{
    access::{Denied, Gate, Known},
    engine::api::AccessTable,
};

/// How often the file of tokens is asked, which tells nobody that it has changed.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// See the module.
struct WhileKnown {
    answer: Body,
    unknown: Pin<Box<dyn Future<Output = ()> + Send>>,
    ended: bool,
}

/// The answer, for as long as `by` may have it.
pub(super) fn while_known(
    answer: Body,
    gate: Gate,
    access: watch::Receiver<Arc<AccessTable>>,
    by: Known,
) -> Body {
    if by == Known::Anyone || http_body::Body::is_end_stream(&answer) {
        return answer;
    }
    Body::new(WhileKnown {
        answer,
        unknown: Box::pin(unknown(gate, access, by)),
        ended: false,
    })
}

/// Waits until nobody is known by that any more.
async fn unknown(gate: Gate, mut access: watch::Receiver<Arc<AccessTable>>, by: Known) {
    loop {
        let table = access.borrow_and_update().clone();
        if !gate.still_knows(&table, &by).await {
            return;
        }
        drop(table);
        tokio::select! {
            changed = access.changed() => if changed.is_err() {
                // The term is over, and says so itself.
                return std::future::pending().await;
            },
            () = sleep(ASK_EVERY) => {}
        }
    }
}

impl http_body::Body for WhileKnown {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        // First, so that an answer that always has more to say comes to an end, too.
        if self.unknown.as_mut().poll(cx).is_pending() {
            return Pin::new(&mut self.answer).poll_frame(cx);
        }
        self.ended = true;
        let mut trailers = HeaderMap::new();
        status::denied(&Denied::Unauthenticated).add_header(&mut trailers)?;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.answer.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
