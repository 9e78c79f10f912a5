//! Which row goes into which part.
//!
//! The order of drawing is fixed by seed and position alone: the unit number `i` (a row, or with
//! `group` the rows with an equal value, numbered by their first row) has the key
//! `mix(mix(seed) + i)` with the finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast
//! splittable pseudorandom number generators", OOPSLA 2014), and units are drawn by key, then number.
//! That is integer arithmetic, the same on every platform.
//!
//! In each stratum (the whole table without `stratify`) the rows of the parts are its rows times the
//! shares, rounded by largest remainder, but at least one each. Single rows hit them exactly: the
//! first drawn go to `test`, the next to `validation`, the rest to `train`. Groups go one by one to
//! the part that lacks the most rows.

use std::collections::HashMap;

use emberline_common::spec::kinds::convert::SplitSpec;
use emberline_worker::stage::StageError;

use crate::schema::{Value, quoted};

/// A part of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What is learned from.
    Train,
    /// What is watched while learning.
    Validation,
    /// What is measured on.
    Test,
}

impl Part {
    /// The parts that a split makes, in a fixed order.
    #[must_use]
    pub fn of(spec: &SplitSpec) -> Vec<Self> {
        if spec.validation > 0.0 {
            vec![Self::Train, Self::Validation, Self::Test]
        } else {
            vec![Self::Train, Self::Test]
        }
    }

    /// The name of its output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

/// Gives small numbers to different values, in the order in which they come.
#[derive(Default)]
pub struct Interner {
    numbers: HashMap<String, u32>,
    names: Vec<String>,
}

impl Interner {
    /// The number of a value; null is a value like others.
    pub fn number(&mut self, value: Value<'_>) -> u32 {
        let key = match value {
            Value::Bytes(bytes) => format!("bytes:{bytes:02x?}"),
            // 0.0 and -0.0 are one value.
            Value::Float(v) => format!("float:{}", v + 0.0),
            other => format!("{}:{other}", other.kind()),
        };
        if let Some(number) = self.numbers.get(&key) {
            return *number;
        }
        let number = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        self.names.push(match value {
            Value::Text(text) => quoted(text),
            other => other.to_string(),
        });
        self.numbers.insert(key, number);
        number
    }

    fn name(&self, number: u32) -> &str {
        self.names.get(number as usize).map_or("?", String::as_str)
    }
}

/// Says for each row which part it goes to.
pub struct Splitter<'a> {
    spec: &'a SplitSpec,
    rows: usize,
    strata: Option<(Interner, Vec<u32>)>,
    groups: Option<(Interner, Vec<Option<u32>>)>,
}

impl<'a> Splitter<'a> {
    /// Checks the shares.
    ///
    /// # Errors
    /// Reason `user_error`.
    pub fn new(spec: &'a SplitSpec) -> Result<Self, StageError> {
        let share = |name: &str, value: f64, min: bool| {
            let fits = value < 1.0 && if min { value > 0.0 } else { value >= 0.0 };
            if fits {
                Ok(())
            } else {
                Err(StageError::user(format!(
                    "`split.{name}` is {value}: it is to be a share between 0 and 1, e.g. 0.2"
                )))
            }
        };
        share("test", spec.test, true)?;
        share("validation", spec.validation, false)?;
        if spec.test + spec.validation > 1.0 - 1e-9 {
            return Err(StageError::user(format!(
                "`split`: test {} and validation {} leave nothing to train on",
                spec.test, spec.validation
            )));
        }
        Ok(Self {
            spec,
            rows: 0,
            strata: spec.stratify.as_ref().map(|_| Default::default()),
            groups: spec.group.as_ref().map(|_| Default::default()),
        })
    }

    /// Takes the next row's values of the columns `stratify` and `group`, where they are asked for.
    /// A null group is one of its own for each row.
    pub fn push(&mut self, stratum: Option<Value<'_>>, group: Option<Value<'_>>) {
        self.rows += 1;
        if let Some((interner, numbers)) = &mut self.strata {
            numbers.push(interner.number(stratum.unwrap_or(Value::Null)));
        }
        if let Some((interner, numbers)) = &mut self.groups {
            numbers.push(match group {
                None | Some(Value::Null) => None,
                Some(value) => Some(interner.number(value)),
            });
        }
    }

    /// The part of each row.
    ///
    /// # Errors
    /// Reason `data` if a part would be empty or a stratum is too small, naming it.
    pub fn finish(self) -> Result<Vec<Part>, StageError> {
        let units = self.units()?;
        let mut strata: Vec<Vec<usize>> = Vec::new();
        for (number, unit) in units.iter().enumerate() {
            let stratum = unit.stratum as usize;
            if strata.len() <= stratum {
                strata.resize(stratum + 1, Vec::new());
            }
            strata[stratum].push(number);
        }
        let mut parts = vec![Part::Train; self.rows];
        let seed = mix(self.spec.seed);
        for (stratum, mut members) in strata.into_iter().enumerate() {
            members.sort_unstable_by_key(|unit| (mix(seed.wrapping_add(*unit as u64)), *unit));
            self.draw(stratum, &members, &units, &mut parts)?;
        }
        if self.rows == 0 {
            return Err(StageError::data("`split`: the table has no rows"));
        }
        Ok(parts)
    }

    fn units(&self) -> Result<Vec<Unit>, StageError> {
        let mut units: Vec<Unit> = Vec::new();
        let mut of_group: HashMap<u32, usize> = HashMap::new();
        for row in 0..self.rows {
            let stratum = self.strata.as_ref().map_or(0, |(_, numbers)| numbers[row]);
            let group = self.groups.as_ref().and_then(|(_, numbers)| numbers[row]);
            match group.and_then(|group| of_group.get(&group)) {
                Some(unit) => {
                    if units[*unit].stratum != stratum {
                        let (names, group) = match (&self.groups, group) {
                            (Some((interner, _)), Some(group)) => (interner.name(group), group),
                            _ => ("?", 0),
                        };
                        let _ = group;
                        return Err(StageError::data(format!(
                            "`split`: the group {names} has rows with different values of `{}`: leave out `stratify` or `group`",
                            self.spec.stratify.as_deref().unwrap_or_default()
                        )));
                    }
                    units[*unit].rows.push(row);
                }
                None => {
                    if let Some(group) = group {
                        of_group.insert(group, units.len());
                    }
                    units.push(Unit {
                        stratum,
                        rows: vec![row],
                    });
                }
            }
        }
        Ok(units)
    }

    fn draw(
        &self,
        stratum: usize,
        members: &[usize],
        units: &[Unit],
        out: &mut [Part],
    ) -> Result<(), StageError> {
        let parts = Part::of(self.spec);
        if members.len() < parts.len() {
            let what = if self.groups.is_some() {
                "groups"
            } else {
                "rows"
            };
            let of = match (&self.strata, &self.spec.stratify) {
                (Some((interner, _)), Some(column)) => format!(
                    "the value {} of `{column}`",
                    interner.name(u32::try_from(stratum).unwrap_or(u32::MAX))
                ),
                _ => "the table".to_owned(),
            };
            return Err(StageError::data(format!(
                "`split`: {of} has too few {what} ({}) to be in each of {} parts",
                members.len(),
                parts.len()
            )));
        }
        let rows: usize = members.iter().map(|unit| units[*unit].rows.len()).sum();
        let mut lacking = counts(rows, self.spec, &parts);
        let mut left = members.len();
        let mut empty = parts.len();
        let mut filled = vec![false; parts.len()];
        // Test first, so that the rest is what trains.
        for unit in members {
            let part = if self.groups.is_some() {
                // As many groups are left as parts are empty: each goes to an empty one.
                let must = left == empty;
                (0..parts.len())
                    .filter(|part| !must || !filled[*part])
                    .max_by_key(|part| (lacking[*part], *part))
            } else {
                (0..parts.len()).rev().find(|part| lacking[*part] > 0)
            }
            .unwrap_or(0);
            let size = i64::try_from(units[*unit].rows.len()).unwrap_or(i64::MAX);
            lacking[part] = lacking[part].saturating_sub(size);
            left -= 1;
            if !filled[part] {
                filled[part] = true;
                empty -= 1;
            }
            for row in &units[*unit].rows {
                out[*row] = parts[part];
            }
        }
        Ok(())
    }
}

struct Unit {
    stratum: u32,
    rows: Vec<usize>,
}

/// The rows of each part by largest remainder, ties to the earlier part, then at least one each,
/// taken from the largest.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "rows are far below 2^53"
)]
fn counts(rows: usize, spec: &SplitSpec, parts: &[Part]) -> Vec<i64> {
    let mut counts = Vec::with_capacity(parts.len());
    let mut remainders = Vec::with_capacity(parts.len());
    for (number, part) in parts.iter().enumerate() {
        let share = match part {
            Part::Train => 1.0 - spec.test - spec.validation,
            Part::Validation => spec.validation,
            Part::Test => spec.test,
        };
        let quota = share * rows as f64;
        // 0.1 · 30 is not exactly 3: what is that near is meant to be whole.
        let whole = (quota + 1e-6).floor();
        counts.push(whole as i64);
        remainders.push((number, quota - whole));
    }
    remainders.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let given: i64 = counts.iter().sum();
    let missing = usize::try_from(rows as i64 - given).unwrap_or(0);
    for (number, _) in remainders.iter().cycle().take(missing) {
        counts[*number] += 1;
    }
    for number in 0..counts.len() {
        if counts[number] < 1
            && let Some(largest) = (0..counts.len()).max_by_key(|n| counts[*n])
            && counts[largest] > 1
        {
            counts[largest] -= 1;
            counts[number] += 1;
        }
    }
    counts
}

/// The finaliser of SplitMix64, with its increment.
const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
