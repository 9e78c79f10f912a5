//! A real Prometheus: it scrapes what a test runs, evaluates rules, and answers queries. `ci.sh` unpacks
//! it. Start with [`PrometheusServer::start`].

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{http, processes, seconds, wait_for};

/// Where a program of Prometheus is: `prometheus` or `promtool`.
///
/// # Panics
/// If it is not there: the message says who installs it.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let tools = std::env::var_os("EMBERLINE_TOOLS").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/emberline/tools"),
        PathBuf::from,
    );
    let program = tools.join("bin").join(name);
    assert!(
        program.is_file(),
        "there is no `{}`: `./ci.sh` unpacks it from the package `prometheus`",
        program.display()
    );
    program
}

/// Runs `promtool`, which must find nothing wrong.
///
/// # Panics
/// If it does, with what it says.
#[track_caller]
pub fn promtool(arguments: &[&str]) {
    let output = Command::new(program("promtool")).args(arguments).output();
    let output = output.unwrap();
    let told = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "promtool {arguments:?}:\n{}{}",
        told(&output.stdout),
        told(&output.stderr)
    );
}

/// A running Prometheus. Killed when it is dropped.
pub struct PrometheusServer {
    root: TempDir,
    process: Child,
    address: String,
}

impl PrometheusServer {
    /// Scrapes these `host:port`s, by job, twice a second, with these rules.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(jobs: &[(&str, Vec<String>)], rules: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let jobs: Vec<Value> = (jobs.iter())
            .map(|(job, targets)| {
                serde_json::json!({"job_name": job, "static_configs": [{"targets": targets}]})
            })
            .collect();
        // JSON is YAML, too.
        let config = serde_json::json!({
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yml"],
            "scrape_configs": jobs,
        });
        fs::write(root.path().join("rules.yml"), rules).unwrap();
        let config_file = root.path().join("prometheus.yml");
        fs::write(&config_file, config.to_string()).unwrap();
        let address = format!("127.0.0.1:{}", processes::free_port());
        let log = File::create(root.path().join("log")).unwrap();
        let process = processes::ends_with_the_test(program("prometheus"))
            .arg(format!("--config.file={}", config_file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                root.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .current_dir(root.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server = Self {
            root,
            process,
            address,
        };
        wait_for("Prometheus is ready", seconds(30), || {
            if let Some(status) = server.process.try_wait().unwrap() {
                panic!("Prometheus left with {status}:\n{}", server.log());
            }
            std::net::TcpStream::connect(&server.address).ok()?;
            (http::get(&server.address, "/-/ready").status == 200).then_some(())
        });
        server
    }

    fn log(&self) -> String {
        fs::read_to_string(self.root.path().join("log")).unwrap_or_default()
    }

    fn ask(&self, path: &str) -> Result<Value, String> {
        let answer = http::get(&self.address, path);
        let body: Value = serde_json::from_str(&answer.body).map_err(|e| e.to_string())?;
        if body["status"] == "success" {
            return Ok(body["data"].clone());
        }
        Err(body["error"].to_string())
    }

    /// The value of an expression at that time, in seconds since 1970: each series that it gives.
    ///
    /// # Errors
    /// What is wrong with the expression.
    pub fn query(&self, expression: &str, at: u64) -> Result<Vec<Value>, String> {
        let query = escaped(expression);
        let data = self.ask(&format!("/api/v1/query?query={query}&time={at}"))?;
        Ok(match data["result"].as_array() {
            Some(series) if data["resultType"] == "vector" => series.clone(),
            _ => vec![data["result"].clone()],
        })
    }

    /// All alerting rules, as they stand.
    ///
    /// # Panics
    /// If there is no answer.
    #[must_use]
    pub fn rules(&self) -> Vec<Value> {
        let data = self.ask("/api/v1/rules?type=alert").unwrap();
        let groups = data["groups"].as_array().unwrap().iter();
        let rules = groups.flat_map(|group| group["rules"].as_array().unwrap());
        rules.cloned().collect()
    }

    /// The targets that do not answer, with why.
    ///
    /// # Panics
    /// If there is no answer.
    #[must_use]
    pub fn targets_down(&self) -> Vec<Value> {
        let data = self.ask("/api/v1/targets?state=active").unwrap();
        let targets = data["activeTargets"].as_array().unwrap().iter();
        targets.filter(|t| t["health"] != "up").cloned().collect()
    }
}

impl Drop for PrometheusServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(1500);
            let tail = String::from_utf8_lossy(&log.as_bytes()[from..]);
            eprintln!("--- end of the log of Prometheus\n{tail}");
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// As a part of a URL's query.
fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
            char::from(byte).to_string()
        }
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}
