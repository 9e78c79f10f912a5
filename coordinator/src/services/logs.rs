//! Logs and metrics of attempts: read from the object store, chunk by chunk, and followed live.
//!
//! Nothing of a log goes through the state. Who follows watches the run: a change or a progress
//! report wakes the reader, and it looks for the next chunk. An attempt whose log has no end once
//! the attempt is over was lost; its log ends as truncated.

use std::{collections::HashMap, sync::Arc, time::Duration};

use emberline_common::{
    attempt_log::{AttemptLogReader, LogEntry, LogStream},
    ids::{AttemptId, RunId, TaskName},
    run_view::{RunView, TaskState},
    wire,
};
use emberline_proto::v1::{
    self, LogEnd, LogLine, MetricPoint, StreamLogsRequest, StreamLogsResponse,
    stream_logs_response::Entry,
};
use tokio::sync::mpsc;
use tonic::Status;

use super::{Answers, Context, status, translate};
use crate::runtime::watchers::{Change, WatchEnd, Watching};

/// Lines that wait for the client.
const QUEUE: usize = 256;
/// Looks for new chunks at least this often while it follows.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

type Lines = mpsc::Sender<Result<StreamLogsResponse, Status>>;

/// Begins to stream.
pub(super) async fn open(
    context: Arc<Context>,
    request: StreamLogsRequest,
) -> Result<Answers<StreamLogsResponse>, Status> {
    let task: Option<TaskName> =
        wire::optional_id("task", &request.task).map_err(translate::bad)?;
    let stream = match v1::LogStream::try_from(request.stream) {
        Ok(v1::LogStream::Unspecified) => LogStream::Log,
        Ok(v1::LogStream::Metrics) => LogStream::Metrics,
        Err(_) => return Err(status::bad_field("stream", "this stream is not known")),
    };
    let place = context.lookup.place(&request.run).await;
    let run = place.map_err(status::from_lookup)?.run().clone();
    let (view, watching) = look(&context, &run, request.follow).await?;
    if let Some(task) = &task {
        let Some(found) = view.tasks.iter().find(|t| t.task == *task) else {
            return Err(status::not_found("task", task.as_str()));
        };
        if request.attempt > found.attempt {
            return Err(status::not_found(
                "attempt",
                &format!("{run}/{task}/{}", request.attempt),
            ));
        }
    } else if request.attempt > 0 {
        return Err(status::bad_field("attempt", "name the task too"));
    }
    let (lines, queue) = mpsc::channel(QUEUE);
    let follower = Follower {
        context: Arc::clone(&context),
        stream,
        task,
        attempt: request.attempt,
        logs: HashMap::new(),
        lines: lines.clone(),
    };
    let stop = context.tasks.stopping().clone();
    context.tasks.spawn("logs", async move {
        let ended = tokio::select! {
            () = stop.cancelled() => Err(status::stopping()),
            () = lines.closed() => Ok(()),
            ended = follower.run(run, view, watching) => ended,
        };
        if let Err(status) = ended {
            // The client may have left.
            let _ = lines.send(Err(status)).await;
        }
        Ok(())
    });
    Ok(Box::pin(futures::stream::unfold(
        queue,
        |mut queue| async {
            let line = queue.recv().await?;
            Some((line, queue))
        },
    )))
}

/// The run as it is, and what tells of its changes if it is live and that is wanted.
async fn look(
    context: &Context,
    run: &RunId,
    follow: bool,
) -> Result<(RunView, Option<Watching>), Status> {
    if follow {
        let watched = context.runtime.watch(run.clone()).await;
        if let Some((view, watching)) = watched.map_err(status::from_runtime)? {
            let live = !view.summary.state.is_final();
            return Ok((view, live.then_some(watching)));
        }
    }
    let view = context.lookup.view(run.as_str()).await;
    Ok((view.map_err(status::from_lookup)?, None))
}

/// How far the reading of one task is.
struct TaskLog {
    reader: AttemptLogReader,
    attempt: u32,
    ended: bool,
}

struct Follower {
    context: Arc<Context>,
    stream: LogStream,
    /// Only this one.
    task: Option<TaskName>,
    /// Only this one; 0 for the last.
    attempt: u32,
    logs: HashMap<TaskName, TaskLog>,
    lines: Lines,
}

impl Follower {
    async fn run(
        mut self,
        run: RunId,
        mut view: RunView,
        mut watching: Option<Watching>,
    ) -> Result<(), Status> {
        loop {
            self.read_all(&run, &view).await?;
            let Some(changes) = &mut watching else {
                return Ok(());
            };
            if self.is_over(&view) {
                return Ok(());
            }
            match tokio::time::timeout(LOOK_AGAIN, changes.next()).await {
                // Nothing was said, but progress may be skipped.
                Err(_) => {}
                Ok(Ok(changes)) => apply(&mut view, &changes),
                Ok(Err(WatchEnd::TooSlow)) => {
                    (view, watching) = look(&self.context, &run, true).await?
                }
                Ok(Err(end)) => return Err(status::from_watch(end)),
            }
        }
    }

    fn wanted<'v>(
        &self,
        view: &'v RunView,
    ) -> impl Iterator<Item = &'v emberline_common::run_view::TaskView> + use<'v> {
        let only = self.task.clone();
        view.tasks
            .iter()
            .filter(move |t| only.as_ref().is_none_or(|only| t.task == *only))
    }

    fn is_over(&self, view: &RunView) -> bool {
        view.summary.state.is_final()
            || self
                .wanted(view)
                .all(|t| t.state.is_final() || (self.attempt > 0 && t.attempt > self.attempt))
    }

    /// Sends what is there and was not sent yet.
    async fn read_all(&mut self, run: &RunId, view: &RunView) -> Result<(), Status> {
        let tasks: Vec<(TaskName, u32, TaskState)> = self
            .wanted(view)
            .filter(|t| t.attempt > 0)
            .map(|t| (t.task.clone(), t.attempt, t.state))
            .collect();
        for (task, last, state) in tasks {
            let attempt = if self.attempt > 0 { self.attempt } else { last };
            // While we followed one attempt, the next may have begun: first the end of the old one.
            let old = self.logs.remove(&task);
            let mut log = match old {
                Some(log) if log.attempt == attempt => log,
                old => {
                    if let Some(mut log) = old {
                        self.read(&task, &mut log, true).await?;
                    }
                    self.begin(run, &task, attempt)
                }
            };
            let over = attempt < last || state != TaskState::Running;
            self.read(&task, &mut log, over).await?;
            self.logs.insert(task, log);
        }
        Ok(())
    }

    fn begin(&self, run: &RunId, task: &TaskName, attempt: u32) -> TaskLog {
        let id = AttemptId {
            run: run.clone(),
            task: task.clone(),
            attempt,
        };
        let artifacts = self.context.artifacts.clone();
        TaskLog {
            reader: AttemptLogReader::new(artifacts, self.stream, id),
            attempt,
            ended: false,
        }
    }

    /// Sends the chunks that are there; if the attempt is over, also the end of its log.
    async fn read(&self, task: &TaskName, log: &mut TaskLog, over: bool) -> Result<(), Status> {
        if log.ended {
            return Ok(());
        }
        while let Some(chunk) = log
            .reader
            .next_chunk()
            .await
            .map_err(|e| status::from_log(&e))?
        {
            for entry in chunk.entries {
                self.send(task, log.attempt, entry).await;
            }
        }
        let truncated = log.reader.end().is_none();
        log.ended = !truncated || over;
        if !truncated || (over && log.reader.is_truncated()) {
            let end = Entry::End(LogEnd {
                lines: log.reader.lines(),
                truncated,
            });
            self.answer(task, log.attempt, self.context.clock.now(), end)
                .await;
        }
        Ok(())
    }

    async fn send(&self, task: &TaskName, attempt: u32, entry: LogEntry) {
        let (at, entry) = match entry {
            LogEntry::Line(line) => (
                line.at,
                Entry::Line(LogLine {
                    source: line.source.to_string(),
                    text: line.text,
                }),
            ),
            LogEntry::Point(point) => (
                point.at,
                Entry::Point(MetricPoint {
                    name: point.name,
                    step: point.step,
                    value: point.value,
                }),
            ),
        };
        self.answer(task, attempt, at, entry).await;
    }

    async fn answer(
        &self,
        task: &TaskName,
        attempt: u32,
        at: emberline_common::time::Timestamp,
        entry: Entry,
    ) {
        let response = StreamLogsResponse {
            task: task.to_string(),
            attempt,
            at: Some(at.into()),
            entry: Some(entry),
        };
        // A client that has left ends the whole follower from outside.
        let _ = self.lines.send(Ok(response)).await;
    }
}

fn apply(view: &mut RunView, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Run(run) => view.summary = run.as_ref().clone(),
            Change::Task(task) => {
                if let Some(old) = view.tasks.iter_mut().find(|t| t.task == task.task) {
                    *old = task.as_ref().clone();
                }
            }
            Change::Progress(_) => {}
        }
    }
}
