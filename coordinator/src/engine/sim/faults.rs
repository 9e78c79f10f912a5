//! What breaks, and how often: each seed draws a weather of its own.

use std::time::Duration;

use super::world::{Event, World};
use crate::engine::retries::Random;

/// The faults of one world.
#[derive(Debug, Clone)]
pub(super) struct Weather {
    /// How long the faults go on.
    pub lasts: Duration,
    /// The mean time between two faults, in milliseconds.
    every_ms: u64,
    /// What can happen; a fault that is in here twice happens twice as often.
    faults: Vec<Fault>,
    pub slow_up: bool,
    pub slow_down: bool,
    /// The store takes long now and then.
    pub slow_store: bool,
    /// Workers report twice.
    pub repeats: bool,
    /// Clocks of new leaders are off.
    pub clocks_differ: bool,
    /// At most so many live runs.
    pub max_live_runs: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A connection breaks.
    Cut,
    /// A worker dies with all it had, and another life of it starts.
    Death,
    /// A worker stands still; its connection may break.
    Pause,
    /// A worker stands still, and another life of it starts: later there are two.
    Twin,
    /// A worker drains.
    Drain,
    /// The leader dies: what was not committed is gone, and what was may not be told.
    Crash,
    /// Another leads, and the leader does not know it.
    Depose,
    /// The leader stands still.
    Stall,
    /// The leader is handed a time that has jumped.
    Clock,
}

impl Weather {
    pub fn random(rng: &mut Random) -> Self {
        let mut faults = Vec::new();
        for fault in [
            Fault::Cut,
            Fault::Death,
            Fault::Pause,
            Fault::Twin,
            Fault::Drain,
            Fault::Crash,
            Fault::Depose,
            Fault::Stall,
            Fault::Clock,
        ] {
            // Half of them, each with a weight.
            for _ in 0..rng.below(6).saturating_sub(2) {
                faults.push(fault);
            }
        }
        let mut coin = || rng.below(2) == 0;
        let (slow_up, slow_down, slow_store) = (coin(), coin(), coin());
        let (repeats, clocks_differ) = (coin(), coin());
        Self {
            lasts: Duration::from_millis(300 + rng.below(2700)),
            every_ms: 20 + rng.below(400),
            faults,
            slow_up,
            slow_down,
            slow_store,
            repeats,
            clocks_differ,
            max_live_runs: if rng.below(4) == 0 { 2 } else { 100 },
        }
    }
}

impl World {
    pub(super) fn fault(&mut self) -> Result<(), String> {
        if self.calm {
            return Ok(());
        }
        self.within_ms(2 * self.weather.every_ms, Event::Fault);
        if self.weather.faults.is_empty() {
            return Ok(());
        }
        let number = self.below(self.weather.faults.len());
        let fault = self.weather.faults[number];
        let process = self.below(self.processes.len());
        match fault {
            Fault::Cut => {
                if let Some(link) = self.processes[process].link {
                    self.cut(link);
                }
            }
            Fault::Death => self.restart(process, true),
            Fault::Pause => self.pause(process),
            Fault::Twin => {
                self.pause(process);
                self.restart(process, false);
            }
            Fault::Drain => self.drain(process),
            Fault::Crash => self.crash()?,
            Fault::Depose => self.lead()?,
            Fault::Stall => {
                let pause = Duration::from_micros(self.rng.below(1_500_000));
                let until = self.now.after(pause);
                let epoch = self.epoch;
                if let Some(leader) = self.leader_mut(epoch) {
                    leader.paused_until = until;
                }
            }
            Fault::Clock => {
                let jump = self.jump();
                let epoch = self.epoch;
                if let Some(leader) = self.leader_mut(epoch) {
                    leader.clock += jump;
                    leader.deadline = None;
                }
            }
        }
        Ok(())
    }

    /// How far a clock jumps, in microseconds.
    pub(super) fn jump(&mut self) -> i64 {
        let most = if self.one_in(4) {
            3_600_000_000
        } else {
            200_000
        };
        let by = i64::try_from(self.rng.below(most)).unwrap_or(0);
        if self.one_in(2) { by } else { -by }
    }
}
