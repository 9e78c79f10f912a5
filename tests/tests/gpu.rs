//! Training on a GPU: needs one, and a program that was built with `--features gpu` or `cuda`. So
//! these are left out unless asked for, by
//!
//! ```sh
//! cargo build --release -p emberline-cli --features gpu
//! EMBERLINE_BIN=target/release/emberline cargo test -p emberline-tests --test gpu -- --ignored --nocapture
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use emberline_tests::{Dev, Place, Running, outside, place::task, seconds, wait_for};
use serde_json::Value;

const PIPELINE: &str = include_str!("../../examples/digits/pipeline.yaml");
const DIGITS: &[u8] = include_bytes!("../../examples/digits/data/digits.csv.gz");

/// `examples/digits`, with a training that takes long enough to be killed in.
fn digits(backend: &str, gpus: u32) -> String {
    let last = "seed: ${params.seed}\n\n  evaluate:";
    let of_task = format!("resources: {{ gpu: {gpus} }}\n    cache: false");
    let settings =
        format!("seed: ${{params.seed}}\n      checkpoint_every: 100ms\n      backend: {backend}");
    let changed = PIPELINE
        .replace(last, &format!("{settings}\n    {of_task}\n\n  evaluate:"))
        .replace("epochs: 12", "epochs: 40");
    assert!(changed.contains(&of_task) && changed.contains("epochs: 40"));
    changed
}

struct Cluster {
    place: Place,
    dev: Dev,
    home: Place,
}

impl Cluster {
    /// A leader without workers.
    fn start() -> Self {
        let place = Place::new();
        place.write("data/digits.csv.gz", DIGITS);
        place.write("gpu.yaml", digits("gpu", 1));
        place.write("cpu.yaml", digits("cpu", 0));
        let dev = Dev::start_with(&place, &["--workers", "0"]);
        let home = Place::new();
        Self { place, dev, home }
    }

    /// The worker that has the GPU.
    fn worker(&self, gpus: &str) -> Running {
        let server = &self.dev.address;
        let arguments = ["worker", "--server", server, "--name", "w", "--gpus", gpus];
        let call = self.home.emberline(&arguments);
        let mut worker = call.within(seconds(600)).start();
        wait_for("a session", seconds(60), || {
            assert!(!worker.has_ended(), "{}", worker.stderr());
            (worker.stdout().contains(" has a session with ")).then_some(())
        });
        worker
    }

    fn submit(&self, file: &str) -> String {
        let arguments = ["--server", &self.dev.address, "run", file, "--detach"];
        let output = self.place.emberline(&arguments).run().expect_code(0);
        output.stdout.trim().to_owned()
    }

    fn show(&self, run: &str) -> Value {
        (self.place).json(&["--server", &self.dev.address, "runs", "show", run])
    }

    fn ends(&self, run: &str) -> Value {
        wait_for("the run ends", seconds(240), || {
            let shown = self.show(run);
            let state = shown["state"].as_str().unwrap();
            ["succeeded", "failed", "cancelled"]
                .contains(&state)
                .then_some(shown)
        })
    }

    fn succeeds(&self, run: &str) -> Value {
        let ended = self.ends(run);
        assert_eq!(ended["state"], "succeeded", "{ended:#}");
        ended
    }

    fn log(&self, run: &str, attempt: u32) -> Vec<String> {
        let log = outside::log(&self.place.state(), run, "train", attempt.into()).unwrap();
        log.lines
    }

    /// The line about what it computed on, and the last epoch's.
    fn tell(&self, run: &str, attempt: u32) {
        let lines = self.log(run, attempt);
        let on = lines.iter().find(|l| l.contains(" parameters, on "));
        println!("{run}: {}", on.unwrap());
        println!(
            "  {}",
            lines.iter().rfind(|l| l.starts_with("epoch")).unwrap()
        );
    }
}

fn model(run: &Value) -> String {
    let manifest = &task(run, "train")["outputs"][0]["manifest"];
    manifest.as_str().unwrap().to_owned()
}

#[test]
#[ignore = "needs a GPU"]
fn a_training_on_the_gpu_is_repeated_and_goes_on_after_a_kill_to_the_same_weights() {
    let cluster = Cluster::start();
    let worker = cluster.worker("1");
    let first = cluster.submit("gpu.yaml");
    let expected = cluster.succeeds(&first);
    cluster.tell(&first, 1);
    assert!(
        cluster
            .log(&first, 1)
            .iter()
            .any(|l| l.contains("on gpu ("))
    );

    let again = cluster.submit("gpu.yaml");
    assert_eq!(model(&cluster.succeeds(&again)), model(&expected));

    let killed = cluster.submit("gpu.yaml");
    let checkpoint = format!("objects/checkpoints/{killed}/train");
    let checkpoint = cluster.place.state().join(checkpoint);
    wait_for("a checkpoint", seconds(60), || {
        checkpoint.exists().then_some(())
    });
    worker.kill();
    let _worker = cluster.worker("1");
    let ended = cluster.succeeds(&killed);
    assert_eq!(task(&ended, "train")["attempt"], 2);
    assert_eq!(model(&ended), model(&expected), "after kill -9");
    let log = cluster.log(&killed, 2);
    let went_on = log.iter().find(|l| l.starts_with("epoch")).unwrap();
    assert!(!went_on.starts_with("epoch 1/"), "{went_on}");
    println!("{killed}: went on with {went_on}");

    // What the CPU makes of it is as good, and rounded otherwise.
    let cpu = cluster.submit("cpu.yaml");
    cluster.succeeds(&cpu);
    cluster.tell(&cpu, 1);
}

#[test]
#[ignore = "needs a program with a GPU backend, and no GPU that it may see"]
fn a_gpu_that_is_promised_and_not_there_is_an_error_of_the_worker() {
    let cluster = Cluster::start();
    let _worker = cluster.worker("1");
    let run = cluster.submit("gpu.yaml");
    let ended = cluster.ends(&run);
    assert_eq!(ended["state"], "failed", "{ended:#}");
    let error = task(&ended, "train")["failure"].to_string();
    assert!(error.contains("finds no GPU"), "{ended:#}");
    println!("{error}");
}
