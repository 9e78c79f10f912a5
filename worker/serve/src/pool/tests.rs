#![allow(clippy::unwrap_used)]

use std::sync::mpsc;

use super::*;

/// Doubles numbers, when it is let to.
struct Doubling {
    gate: Mutex<mpsc::Receiver<()>>,
    entered: mpsc::SyncSender<usize>,
    batches: Mutex<Vec<usize>>,
}

impl Forward for Doubling {
    fn forward(&self, rows: &Matrix) -> Result<Matrix, String> {
        self.entered.send(rows.rows).unwrap();
        // A closed gate lets all through.
        let _ = lock(&self.gate).recv();
        if rows.data.contains(&13.0) {
            return Err("unlucky".to_owned());
        }
        assert!(!rows.data.contains(&-1.0), "not a number to double");
        Ok(Matrix {
            rows: rows.rows,
            cols: rows.cols,
            data: rows.data.iter().map(|v| v * 2.0).collect(),
        })
    }
    fn computed(&self, rows: usize) {
        lock(&self.batches).push(rows);
    }
}

struct Place {
    pool: Pool,
    slot: Arc<Slot>,
    forward: Arc<Doubling>,
    gate: Option<mpsc::Sender<()>>,
    entered: mpsc::Receiver<usize>,
}

fn place(threads: usize, limits: ServingLimits) -> Place {
    let pool = Pool::start(threads).unwrap();
    let (open, gate) = mpsc::channel();
    let (enter, entered) = mpsc::sync_channel(1000);
    let forward = Arc::new(Doubling {
        gate: Mutex::new(gate),
        entered: enter,
        batches: Mutex::default(),
    });
    let slot = pool.slot(Arc::clone(&forward) as Arc<dyn Forward>, &limits);
    Place {
        pool,
        slot,
        forward,
        gate: Some(open),
        entered,
    }
}

fn job(value: f32, rows: usize) -> (Job, oneshot::Receiver<Result<Matrix, NotComputed>>) {
    let (reply, answer) = oneshot::channel();
    let job = Job {
        rows: Matrix {
            rows,
            cols: 1,
            data: vec![value; rows],
        },
        reply: Reply::Caller(reply),
        deadline: None,
        at: Instant::now(),
    };
    (job, answer)
}

#[test]
fn what_comes_while_one_is_computed_is_computed_together() {
    let mut place = place(1, ServingLimits::default());
    let mut answers = Vec::new();
    let (first, answer) = job(1.0, 1);
    place.slot.push(first).unwrap();
    answers.push(answer);
    assert_eq!(place.entered.recv().unwrap(), 1);
    for n in 2..=9 {
        let (next, answer) = job(n as f32, 1);
        place.slot.push(next).unwrap();
        answers.push(answer);
    }
    place.gate.take();
    for (n, answer) in (1..).zip(answers) {
        let outputs = answer.blocking_recv().unwrap().unwrap();
        assert_eq!(outputs.data, [2.0 * n as f32]);
    }
    assert_eq!(*lock(&place.forward.batches), [1, 8]);
    place.pool.stop();
}

#[test]
fn what_there_is_no_room_for_is_refused_at_once_and_there_is_room_again() {
    let limits = ServingLimits {
        max_queue: 4,
        max_batch: 2,
        ..ServingLimits::default()
    };
    let mut place = place(1, limits);
    let (first, _kept) = job(1.0, 1);
    place.slot.push(first).unwrap();
    place.entered.recv().unwrap();
    let mut answers = Vec::new();
    for _ in 0..2 {
        let (next, answer) = job(2.0, 2);
        place.slot.push(next).unwrap();
        answers.push(answer);
    }
    let (one_more, _) = job(3.0, 1);
    assert_eq!(place.slot.push(one_more), Err(Full(4)));
    assert_eq!(place.slot.waiting(), 4);
    place.gate.take();
    for answer in answers {
        assert!(answer.blocking_recv().unwrap().is_ok());
    }
    let (again, answer) = job(3.0, 1);
    place.slot.push(again).unwrap();
    assert!(answer.blocking_recv().unwrap().is_ok());
    assert_eq!(*lock(&place.forward.batches), [1, 2, 2, 1]);
}

#[test]
fn what_nobody_waits_for_is_not_computed() {
    let mut place = place(1, ServingLimits::default());
    let (first, _kept) = job(1.0, 1);
    place.slot.push(first).unwrap();
    place.entered.recv().unwrap();
    let (gone, answer) = job(2.0, 1);
    place.slot.push(gone).unwrap();
    drop(answer);
    let (mut late, late_answer) = job(3.0, 1);
    late.deadline = Some(Instant::now());
    place.slot.push(late).unwrap();
    let (last, answer) = job(4.0, 1);
    place.slot.push(last).unwrap();
    place.gate.take();
    assert_eq!(answer.blocking_recv().unwrap().unwrap().data, [8.0]);
    let late = late_answer.blocking_recv().unwrap();
    assert_eq!(late, Err(NotComputed::Expired));
    assert_eq!(*lock(&place.forward.batches), [1, 1]);
}

#[test]
fn a_failure_and_a_panic_are_those_of_their_batch() {
    let mut place = place(1, ServingLimits::default());
    place.gate.take();
    for (value, expected) in [
        (13.0, Err(NotComputed::Failed("unlucky".to_owned()))),
        (
            -1.0,
            Err(NotComputed::Failed("the forward panicked".to_owned())),
        ),
        (2.0, Ok(vec![4.0])),
    ] {
        let (next, answer) = job(value, 1);
        place.slot.push(next).unwrap();
        let seen = answer.blocking_recv().unwrap();
        assert_eq!(seen.map(|outputs| outputs.data), expected);
    }
}

#[test]
fn a_shadow_waits_for_all_others_and_is_refused_beyond_its_room() {
    let limits = ServingLimits {
        max_queue: 1,
        ..ServingLimits::default()
    };
    let mut place = place(1, limits);
    let shadow = place
        .pool
        .slot(Arc::clone(&place.forward) as Arc<dyn Forward>, &limits);
    let (first, _kept) = job(1.0, 1);
    place.slot.push(first).unwrap();
    place.entered.recv().unwrap();
    let (told, hear) = mpsc::channel();
    let copy = |value: f32| {
        let told = told.clone();
        let (mut copy, _) = job(value, 1);
        copy.reply = Reply::Shadow(Box::new(move |outputs| {
            told.send(outputs.unwrap().data[0]).unwrap();
        }));
        copy
    };
    shadow.push_low(copy(5.0)).unwrap();
    assert_eq!(shadow.push_low(copy(6.0)), Err(Full(1)));
    let (next, answer) = job(2.0, 3);
    place.slot.push(next).unwrap();
    place.gate.take();
    assert!(answer.blocking_recv().unwrap().is_ok());
    assert_eq!(hear.recv().unwrap(), 10.0);
    assert_eq!(*lock(&place.forward.batches), [1, 3, 1]);
    place.pool.stop();
}

#[test]
fn fewer_than_before_wait_for_more_but_not_for_long() {
    let limits = ServingLimits {
        max_delay_micros: 50_000_000,
        ..ServingLimits::default()
    };
    let mut place = place(2, limits);
    let (first, _kept) = job(1.0, 4);
    place.slot.push(first).unwrap();
    place.entered.recv().unwrap();
    let (one, _kept_too) = job(2.0, 1);
    place.slot.push(one).unwrap();
    place.gate.take();
    // One row waits: the last batch had four. With three more it is enough.
    let mut answers = Vec::new();
    for _ in 0..3 {
        let (next, answer) = job(3.0, 1);
        place.slot.push(next).unwrap();
        answers.push(answer);
    }
    for answer in answers {
        assert!(answer.blocking_recv().unwrap().is_ok());
    }
    assert_eq!(*lock(&place.forward.batches), [4, 4]);
    place.pool.stop();
}
