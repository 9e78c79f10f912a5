//! The page as a whole, made by the stage from inputs as other stages leave them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod fixture;
mod markup;

use emberline_common::{
    failure::{Failure, Reason},
    run_view::{RunState, TaskState},
    spec::ArtifactType,
};
use emberline_worker::{
    stage::ProducedContent,
    testing::{TestContext, TestContextBuilder},
};
use fixture::Fixture;
use serde_json::json;

const MAX_PAGE_BYTES: usize = 2_000_000;

/// Runs the stage and checks what holds for every page.
fn page(builder: TestContextBuilder) -> String {
    let test = builder.task("report").build();
    let stages = emberline_report::stages();
    let output = stages[0]
        .run(&test.ctx)
        .expect("a report is written whatever comes in");
    let [produced] = &output.artifacts[..] else {
        panic!("one output, not {:?}", output.artifacts);
    };
    assert_eq!(produced.name.as_str(), "page");
    let ProducedContent::Directory {
        dir, artifact_type, ..
    } = &produced.content
    else {
        panic!("a page is written, not handed on");
    };
    assert_eq!(*artifact_type, ArtifactType::Page);
    let text = std::fs::read_to_string(dir.join("report.html")).unwrap();
    if let Ok(keep) = std::env::var("KEEP_PAGES") {
        let name = std::thread::current().name().unwrap_or("page").to_owned();
        std::fs::write(
            std::path::Path::new(&keep).join(format!("{name}.html")),
            &text,
        )
        .unwrap();
    }
    markup::check(&text);
    assert!(text.len() <= MAX_PAGE_BYTES, "{} bytes", text.len());
    for outside in [
        "http:", "https:", "//", "url(", "<script", "<img", "<link", "@import", " on", "NaN",
    ] {
        // ` on` is for event handlers: only within tags.
        let found = if outside == " on" {
            text.split('<')
                .filter_map(|part| part.split_once('>'))
                .any(|(tag, _)| tag.contains(" on"))
        } else {
            text.contains(outside)
        };
        assert!(!found, "the page has `{outside}`");
    }
    text
}

#[test]
fn a_succeeded_run_is_shown_whole() {
    let fixture = Fixture::new();
    let text = page(fixture.succeeded());
    for part in [
        "predictive-maintenance",
        "2 min 31 s",
        "✓ succeeded",
        "cached",
        "ROC curve, AUC 0.9712",
        "Precision and recall, AP 0.7812",
        "Confusion matrix",
        "air_temperature",
        "best: 41",
        "gate &gt;= 0.60",
        "margin +0.12",
        "champion",
        "cpu (flex)",
        "Learning rate",
        "14 of 14 rules held",
        "Kolmogorov-Smirnov",
        "deploy",
    ] {
        assert!(text.contains(part), "the page lacks `{part}`");
    }
    assert!(!text.contains("What went wrong"));
}

#[test]
fn the_same_run_gives_the_same_page() {
    let fixture = Fixture::new();
    assert_eq!(page(fixture.succeeded()), page(fixture.succeeded()));
}

#[test]
fn a_failed_validation_shows_the_class_the_message_the_task_and_the_rows() {
    let fixture = Fixture::new();
    let text = page(fixture.failed_validation());
    for part in [
        "✕ failed",
        "What went wrong",
        "✕ data",
        "task check",
        "columns.torque.max",
        "Not run: train, evaluate, deploy",
        "1234.5",
        "12 of 14 rules held",
    ] {
        assert!(text.contains(part), "the page lacks `{part}`");
    }
    assert!(!text.contains("ROC curve"));
}

#[test]
fn without_a_run_and_inputs_there_is_a_page_all_the_same() {
    let text = page(TestContext::builder());
    assert!(text.contains("<h1>test</h1>"));
    assert!(!text.contains("<section"));
}

#[test]
fn the_title_is_the_one_asked_for() {
    let text = page(TestContext::builder().spec(json!({ "title": "Line 4 <night>" })));
    assert!(text.contains("<h1>Line 4 &lt;night&gt;</h1>"));
}

#[test]
fn texts_of_users_are_only_texts() {
    let fixture = Fixture::new();
    let evil = "</script></style></title><script>alert('x\"y')</script>\u{1b}[31mred\u{0}\nnext";
    let text = page(fixture.hostile(evil));
    assert!(text.contains(
        "&lt;/script&gt;&lt;/style&gt;&lt;/title&gt;&lt;script&gt;alert(&#39;x&quot;y&#39;)"
    ));
    assert!(!text.contains("</script>") && !text.contains('\u{1b}') && !text.contains('\0'));
    assert!(!text.contains("[31m"));
    assert_eq!(
        text.matches("</title>").count(),
        text.matches("<title>").count()
    );
}

#[test]
fn numbers_that_are_none_break_no_drawing() {
    let fixture = Fixture::new();
    page(fixture.extreme());
}

#[test]
fn a_document_that_cannot_be_read_is_named_and_the_rest_is_shown() {
    let fixture = Fixture::new();
    let text = page(fixture.damaged());
    assert!(text.contains("Not on this page"));
    assert!(text.contains("evaluation.json"));
    assert!(text.contains("Learning rate"), "the model is shown");
}

#[test]
fn many_classes_and_a_regression_and_several_models_are_shown() {
    let fixture = Fixture::new();
    let text = page(fixture.several());
    for part in [
        "Truth and prediction",
        "Errors",
        "All models",
        "★",
        "What is mixed up most",
        "Sweep",
    ] {
        assert!(text.contains(part), "the page lacks `{part}`");
    }
}

#[test]
fn a_run_of_a_thousand_tasks_stays_small_and_shows_what_failed() {
    let fixture = Fixture::new();
    let mut view = fixture::matrix_run(1000);
    view.tasks[700].state = TaskState::Failed;
    view.tasks[700].failure = Some(Failure::new(Reason::Oom, "needed 9 GiB"));
    let text = page(fixture.succeeded().run_view(view));
    assert!(text.contains("needed 9 GiB"));
    assert!(text.contains("task sweep.698"));
}

#[test]
fn what_would_make_the_page_too_large_is_left_out_and_said() {
    let fixture = Fixture::new();
    let text = page(fixture.huge());
    assert!(text.contains("Left out: with it this page would be larger than 2 MB"));
}

#[test]
fn a_run_still_on_its_way_is_shown_as_running() {
    let mut view = fixture::run();
    view.tasks[3].state = TaskState::Running;
    view.tasks[3].finished_at = None;
    assert_eq!(view.summary.state, RunState::Running);
    let text = page(TestContext::builder().run_view(view));
    assert!(text.contains("▶</span> running"));
}
