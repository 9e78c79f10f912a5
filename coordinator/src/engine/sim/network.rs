//! Connections between workers and leaders. A stream keeps its order; when its connection breaks it
//! loses its tail, and each end notices at a time of its own. What is under way in an old
//! connection may still arrive after a new one has been opened.

use std::{collections::VecDeque, time::Duration};

use emberline_common::{
    ids::{AttemptId, Epoch},
    serving::ServingPlan,
    time::Timestamp,
};

use super::world::{Event, World};
use crate::engine::api::{Assignment, Command, Disconnect, SessionId};

/// A connection's number: also the number of its session.
pub(super) type Link = usize;

/// What a leader says to a worker.
#[derive(Debug, Clone)]
pub(super) enum Down {
    Registered(Vec<AttemptId>),
    Assign(Box<Assignment>),
    Stop(AttemptId),
    /// The leader has dealt with a report.
    Ack(AttemptId),
    /// What to serve.
    Serve(Box<ServingPlan>),
    /// The leader ends the session.
    Close,
    /// The connection is gone.
    Gone,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub epoch: Epoch,
    /// The number of the worker's process.
    pub process: usize,
    /// Nothing that is sent from now on arrives.
    cut: bool,
    up: VecDeque<Command>,
    down: VecDeque<Down>,
    /// When the last message of each direction arrives.
    up_until: Timestamp,
    down_until: Timestamp,
}

impl World {
    /// Opens a connection to the leader of a term.
    pub(super) fn open(&mut self, epoch: Epoch, process: usize) -> Link {
        self.links.push(Connection {
            epoch,
            process,
            cut: false,
            up: VecDeque::new(),
            down: VecDeque::new(),
            up_until: self.now,
            down_until: self.now,
        });
        self.links.len() - 1
    }

    pub(super) fn send_up(&mut self, link: Link, command: Command) {
        let delay = self.delay(self.weather.slow_up);
        if self.links[link].cut {
            return;
        }
        self.push_up(link, command, delay);
    }

    fn push_up(&mut self, link: Link, command: Command, delay: Duration) {
        let at = self.now.after(delay).max(self.links[link].up_until);
        let connection = &mut self.links[link];
        connection.up_until = at;
        connection.up.push_back(command);
        self.at(at, Event::Up(link));
    }

    pub(super) fn send_down(&mut self, link: Link, message: Down) {
        let delay = self.delay(self.weather.slow_down);
        if !self.links[link].cut {
            self.push_down(link, message, delay);
        }
    }

    fn push_down(&mut self, link: Link, message: Down, delay: Duration) {
        let at = self.now.after(delay).max(self.links[link].down_until);
        let connection = &mut self.links[link];
        connection.down_until = at;
        connection.down.push_back(message);
        self.at(at, Event::Down(link));
    }

    fn delay(&mut self, slow: bool) -> Duration {
        let most = if slow && self.one_in(20) {
            700_000
        } else {
            2000
        };
        Duration::from_micros(1 + self.rng.below(most))
    }

    /// Breaks a connection: some of what is under way is lost, and each end learns of it later.
    pub(super) fn cut(&mut self, link: Link) {
        if std::mem::replace(&mut self.links[link].cut, true) {
            return;
        }
        let (up, down) = (self.links[link].up.len(), self.links[link].down.len());
        let (up, down) = (self.below(up + 1), self.below(down + 1));
        self.links[link].up.truncate(up);
        self.links[link].down.truncate(down);
        // Half-open for a while, as seen from either end.
        let most = if self.one_in(4) { 1_000_000 } else { 5000 };
        let (above, below) = (self.rng.below(most), self.rng.below(most));
        let session = SessionId(link as u64);
        let how = if self.one_in(4) {
            Disconnect::Silent
        } else {
            Disconnect::Closed
        };
        let gone = Command::WorkerDisconnected { session, how };
        self.push_up(link, gone, Duration::from_micros(above));
        self.push_down(link, Down::Gone, Duration::from_micros(below));
    }

    /// The next message of a connection reaches its leader.
    pub(super) fn up_arrives(&mut self, link: Link) -> Result<(), String> {
        let epoch = self.links[link].epoch;
        if let Some(until) = self.leader(epoch).map(|leader| leader.paused_until)
            && until > self.now
        {
            self.at(until, Event::Up(link));
            return Ok(());
        }
        match self.links[link].up.pop_front() {
            None => Ok(()),
            Some(command) => self.decide(epoch, command, None),
        }
    }

    /// The next message of a connection reaches its worker.
    pub(super) fn down_arrives(&mut self, link: Link) -> Result<(), String> {
        let process = self.links[link].process;
        let until = self.processes[process].paused_until;
        if until > self.now {
            self.at(until, Event::Down(link));
            return Ok(());
        }
        match self.links[link].down.pop_front() {
            None => Ok(()),
            Some(message) => self.worker_gets(process, link, message),
        }
    }
}
