//! Which span the present task works for, so that what it calls far below (an object store's HTTP
//! client, say) can hand it on without being told.
//!
//! Only for what crosses somebody else's interface: whoever can be handed a context is handed one.

use tokio::task::futures::TaskLocalFuture;

use crate::trace::TraceContext;

tokio::task_local! {
    static CURRENT: Option<TraceContext>;
}

/// Does the work as part of that span; without one, as part of the span that it is in already. What
/// the work spawns is not part of it.
pub fn within<F: Future>(
    context: Option<TraceContext>,
    work: F,
) -> TaskLocalFuture<Option<TraceContext>, F> {
    CURRENT.scope(context.or_else(current), work)
}

/// The span that the present task works for, if it was said.
#[must_use]
pub fn current() -> Option<TraceContext> {
    CURRENT.try_with(|context| *context).ok().flatten()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const OUTER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const INNER: &str = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01";

    #[tokio::test]
    async fn work_is_part_of_the_innermost_span_that_was_named() {
        let shown = || current().map(|context| context.to_string());
        assert_eq!(shown(), None);
        within(OUTER.parse().ok(), async {
            let inner = within(INNER.parse().ok(), async { shown() }).await;
            assert_eq!(inner.as_deref(), Some(INNER));
            let unnamed = within(None, async { shown() }).await;
            assert_eq!(unnamed.as_deref(), Some(OUTER));
            assert_eq!(tokio::spawn(async { current() }).await.unwrap(), None);
        })
        .await;
        assert_eq!(shown(), None);
    }
}
