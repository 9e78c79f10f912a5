//! What every coordinator tells of itself, whether it leads or not: that it leads, in which term, and
//! whether its state store takes writes. From these a pager knows that a cluster has no leader.

use std::sync::{Arc, Weak};

use emberline_common::{telemetry::Telemetry, time::Timestamp};
use opentelemetry::KeyValue;
use tokio::sync::watch;

use crate::{
    runtime::Runtime,
    store::{StateStore, TroubleKind},
};

/// Tells it for as long as the process lives. Holds nothing of the coordinator.
pub(crate) fn observe(
    telemetry: &Telemetry,
    leading: &watch::Receiver<Option<Runtime>>,
    store: &Arc<dyn StateStore>,
) {
    if !telemetry.measures() {
        return;
    }
    let meter = telemetry.meter();
    // The meter keeps the callbacks.
    let role = leading.clone();
    let _ = meter
        .u64_observable_gauge("emberline.coordinator.leading")
        .with_unit("{coordinator}")
        .with_description("1 while this coordinator leads, else 0")
        .with_callback(move |observer| observer.observe(role.borrow().is_some().into(), &[]))
        .build();
    let role = leading.clone();
    let _ = meter
        .u64_observable_gauge("emberline.coordinator.term")
        .with_unit("{term}")
        .with_description(
            "The term that this coordinator leads: each is higher than the one before",
        )
        .with_callback(move |observer| {
            if let Some(runtime) = &*role.borrow() {
                observer.observe(runtime.epoch().0, &[]);
            }
        })
        .build();
    let store: Weak<dyn StateStore> = Arc::downgrade(store);
    let _ = meter
        .f64_observable_gauge("emberline.store.unavailable")
        .with_unit("s")
        .with_description(
            "How long the state store has not taken writes, by cause; 0 while it does",
        )
        .with_callback(move |observer| {
            let Some(store) = store.upgrade() else { return };
            let trouble = store.trouble();
            for kind in TroubleKind::ALL {
                let since = trouble.as_ref().filter(|trouble| trouble.kind == kind);
                let age = since.map(|trouble| Timestamp::now().since(trouble.since));
                let cause = KeyValue::new("error.type", kind.as_str());
                observer.observe(age.unwrap_or_default().as_secs_f64(), &[cause]);
            }
        })
        .build();
}
