//! The record of who leads since when, so that a term whose leader was killed is closed by the next.

use std::{sync::Arc, time::Duration};

use emberline_common::{ids::Epoch, telemetry::Telemetry, time::Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    CoordinatorConfig,
    engine::api::Write,
    store::{StateStore, StoreError},
    traces::Spans,
};

/// The record's key. It is not the engine's.
pub(crate) const KEY: &str = "term";
/// How long noting the end may take: another one wants to lead.
const END_WITHIN: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct TermRecord {
    epoch: Epoch,
    began_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ended_at: Option<Timestamp>,
}

/// The term that is led here, from its beginning to its end.
pub(crate) struct Tenure {
    record: TermRecord,
    store: Arc<dyn StateStore>,
    telemetry: Telemetry,
    cluster: String,
}

impl Tenure {
    /// Notes that a term begins. `before` is what an earlier one left; if that was not ended by its
    /// own leader, its span is told now.
    ///
    /// # Errors
    /// The store's.
    pub(crate) async fn begin(
        config: &CoordinatorConfig,
        epoch: Epoch,
        before: Option<Vec<u8>>,
        now: Timestamp,
    ) -> Result<Self, StoreError> {
        let cluster = config.artifacts.url().to_owned();
        let telemetry = config.telemetry.clone();
        // What cannot be read says nothing; it is for those who watch alone.
        let before = before.and_then(|value| serde_json::from_slice::<TermRecord>(&value).ok());
        if let Some(before) = before.filter(|before| before.ended_at.is_none())
            && telemetry.traces()
        {
            let (epoch, began) = (before.epoch, before.began_at);
            telemetry.span(Spans::term(&cluster, epoch, began, now, true));
        }
        let tenure = Self {
            record: TermRecord {
                epoch,
                began_at: now,
                ended_at: None,
            },
            store: Arc::clone(&config.store),
            telemetry,
            cluster,
        };
        tenure.write().await?;
        Ok(tenure)
    }

    /// Notes that it has ended, if the store still takes it.
    pub(crate) async fn end(mut self) {
        let now = Timestamp::now().max(self.record.began_at);
        self.record.ended_at = Some(now);
        let noted = tokio::time::timeout(END_WITHIN, self.write()).await;
        // If not, the next leader tells its span, and knows that it did not end in order.
        if matches!(noted, Ok(Ok(()))) && self.telemetry.traces() {
            let (epoch, began) = (self.record.epoch, self.record.began_at);
            self.telemetry
                .span(Spans::term(&self.cluster, epoch, began, now, false));
        }
    }

    async fn write(&self) -> Result<(), StoreError> {
        let write = Write::Put {
            key: KEY.to_owned(),
            value: crate::engine::records::encode(&self.record),
        };
        self.store.commit(self.record.epoch, vec![write]).await
    }
}
