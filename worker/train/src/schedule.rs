//! The learning rate of each step: a pure function of the step, so that a resumed training needs
//! nothing but its position.

use emberline_common::spec::kinds::train::ScheduleSpec;

use crate::error::TrainError;

/// The learning rate by step.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    spec: ScheduleSpec,
    base: f64,
    steps_per_epoch: u64,
    steps: u64,
}

impl Schedule {
    /// For a training of `epochs` epochs of `steps_per_epoch` steps each.
    ///
    /// # Errors
    /// If a share is not between 0 and 1, or `every` is 0.
    pub fn new(
        spec: &ScheduleSpec,
        learning_rate: f64,
        steps_per_epoch: u64,
        epochs: u32,
    ) -> Result<Self, TrainError> {
        let share = |name: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                Ok(())
            } else {
                Err(TrainError::Spec(format!(
                    "`schedule.{name}` is {value}: it is a share between 0 and 1"
                )))
            }
        };
        match spec {
            ScheduleSpec::Constant => {}
            ScheduleSpec::Cosine { warmup, floor } => {
                share("warmup", *warmup)?;
                share("floor", *floor)?;
            }
            ScheduleSpec::Step { every, factor } => {
                share("factor", *factor)?;
                if *every == 0 {
                    return Err(TrainError::Spec(
                        "`schedule.every` is 0: give at least one epoch".to_owned(),
                    ));
                }
            }
        }
        Ok(Self {
            spec: spec.clone(),
            base: learning_rate,
            steps_per_epoch,
            steps: steps_per_epoch.saturating_mul(u64::from(epochs)),
        })
    }

    /// The learning rate of a step, counted from 0 over all epochs.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "steps are far below 2^52")]
    pub fn at(&self, step: u64) -> f64 {
        match &self.spec {
            ScheduleSpec::Constant => self.base,
            ScheduleSpec::Step { every, factor } => {
                let epoch = step / self.steps_per_epoch.max(1);
                let changes = epoch / u64::from(*every);
                self.base * factor.powi(i32::try_from(changes).unwrap_or(i32::MAX))
            }
            // Loshchilov and Hutter, "SGDR", 2017, without restarts.
            ScheduleSpec::Cosine { warmup, floor } => {
                let rising = warmup * self.steps as f64;
                let step = step as f64;
                if step < rising {
                    return self.base * (step + 1.0) / (rising + 1.0);
                }
                let falling = (self.steps as f64 - rising).max(1.0);
                let done = ((step - rising) / falling).min(1.0);
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
                self.base * (floor + (1.0 - floor) * cosine)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::float_cmp)]
    use super::*;

    #[test]
    fn cosine_rises_then_falls_to_its_floor() {
        let spec = ScheduleSpec::Cosine {
            warmup: 0.1,
            floor: 0.2,
        };
        let schedule = Schedule::new(&spec, 1.0, 10, 10).unwrap();
        assert!(schedule.at(0) > 0.0 && schedule.at(0) < schedule.at(5));
        assert!((schedule.at(10) - 1.0).abs() < 1e-12);
        assert!((schedule.at(55) - 0.6).abs() < 1e-12);
        assert!((schedule.at(1000) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn step_changes_after_whole_epochs() {
        let spec = ScheduleSpec::Step {
            every: 2,
            factor: 0.5,
        };
        let schedule = Schedule::new(&spec, 1.0, 10, 10).unwrap();
        assert_eq!(schedule.at(19), 1.0);
        assert_eq!(schedule.at(20), 0.5);
        assert_eq!(schedule.at(40), 0.25);
    }

    #[test]
    fn a_share_above_one_is_refused() {
        let spec = ScheduleSpec::Cosine {
            warmup: 1.5,
            floor: 0.0,
        };
        let error = Schedule::new(&spec, 1.0, 1, 1).unwrap_err().to_string();
        assert!(error.contains("schedule.warmup"), "{error}");
    }
}
