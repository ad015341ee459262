//! The method `watch`: the events that a client receives.

use serde::Deserialize;
use serde_json::{Value, json};

use super::event_hub::{ControlEvent, EventHub, EventKind};
use super::schema::{array, boolean, integer, nullable, object, one_of_texts, text};

/// Parameters of `watch`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WatchParams {
    /// The kinds of events. `None` selects all kinds.
    events: Option<Vec<EventKind>>,
}

/// The kinds of events that a client receives. The default is none.
#[derive(Debug, Default)]
pub(super) struct Subscription {
    kinds: Vec<EventKind>,
    /// Number of the last event before the subscription.
    after: u64,
}

impl Subscription {
    /// Replaces the subscription. Returns the result of the method.
    pub(super) fn replace(&mut self, params: WatchParams, hub: &EventHub) -> Value {
        self.kinds = params.events.unwrap_or_else(|| EventKind::ALL.to_vec());
        self.after = hub.last_seq();
        json!({"events": self.kinds, "seq": self.after})
    }

    /// Whether the client receives any events.
    pub(super) fn is_active(&self) -> bool {
        !self.kinds.is_empty()
    }

    /// Whether the client receives this event.
    pub(super) fn selects(&self, event: &ControlEvent) -> bool {
        event.seq > self.after && self.kinds.contains(&event.kind)
    }

    /// Whether the client may have missed an event if all events up to the number `seq` were dropped.
    pub(super) fn may_miss(&self, seq: u64) -> bool {
        self.is_active() && seq > self.after
    }
}

fn kinds() -> Vec<Value> {
    EventKind::ALL.iter().map(|kind| json!(kind)).collect()
}

pub(super) fn params_schema() -> Value {
    object(&[], &[("events", array(one_of_texts(kinds())))])
}

pub(super) fn result_schema() -> Value {
    object(&[("events", array(one_of_texts(kinds()))), ("seq", integer())], &[])
}

/// Returns the schema of each kind of event, by kind.
pub(super) fn event_schemas() -> Value {
    let event = |kind: &str, has_disk: bool, own: &[(&str, Value)]| {
        let mut members = vec![("seq", integer()), ("time", text()), ("kind", json!({"const": kind}))];
        members.extend(has_disk.then(|| ("disk", text())));
        members.extend(own.iter().cloned());
        object(&members, &[])
    };
    let path = [("path", text())];
    json!({
        "front_end": event("front_end", true, &[
            ("connected", boolean()),
            ("pid", nullable(integer())),
            ("uid", nullable(integer())),
        ]),
        "disk_full": event("disk_full", true, &path),
        "room_again": event("room_again", true, &path),
        "poisoned": event("poisoned", true, &[("path", text()), ("reason", text())]),
        "snapshot": event("snapshot", true, &[("kept", text()), ("uuid", text()), ("pause_us", integer())]),
        "resized": event("resized", true, &[("size", integer())]),
        "lost": event("lost", false, &[("lost", integer())]),
        "ended": object(
            &[
                ("time", text()),
                ("kind", json!({"const": "ended"})),
                ("clean", boolean()),
                ("reason", nullable(text())),
            ],
            &[],
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::DiskEvent;

    #[test]
    fn every_kind_of_event_has_a_schema() {
        let schemas = event_schemas();
        for kind in kinds() {
            let kind = kind.as_str().unwrap();
            assert_eq!(schemas[kind]["properties"]["kind"]["const"], kind);
        }
    }

    #[test]
    fn a_client_receives_the_selected_events_after_its_subscription() {
        let hub = EventHub::new().unwrap();
        let reporter = hub.reporter("a");
        let full = || reporter.report(DiskEvent::DiskFull { path: "/x.vhd".into() });
        let room = || reporter.report(DiskEvent::RoomAgain { path: "/x.vhd".into() });
        let mut subscription = Subscription::default();
        full();
        let result = subscription.replace(WatchParams { events: Some(vec![EventKind::DiskFull]) }, &hub);
        assert_eq!(result, json!({"events": ["disk_full"], "seq": 1}));
        room();
        full();
        let selects = |subscription: &Subscription| {
            let events = hub.take().events;
            let selected = events.iter().filter(|event| subscription.selects(event));
            selected.map(|event| event.seq).collect::<Vec<u64>>()
        };
        assert_eq!(selects(&subscription), [3], "not the event before, and not the other kind");
        assert!(subscription.may_miss(2) && !subscription.may_miss(1));
        subscription.replace(WatchParams { events: None }, &hub);
        room();
        assert_eq!(selects(&subscription), [4]);
        assert!(!Subscription::default().is_active() && !Subscription::default().may_miss(9));
    }
}
