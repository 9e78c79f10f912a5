//! Ways in for what feeds this crate with anything; for nobody else.

use bytes::Bytes;
use emberline_train::Model;

use crate::{codec, grpc, infer::Request, json::FeedbackBody, rest, schema::Schema};

const MAX_ROWS: u32 = 1024;

/// Reads a request and its tensors as they come over HTTP, `json_length` bytes of it being JSON;
/// whether they are rows for the model.
#[must_use]
pub fn json(model: &Model, body: &[u8], json_length: usize) -> bool {
    // Labels are read from the same bytes; what they say is up to the rest.
    let _ = serde_json::from_slice::<FeedbackBody>(body);
    let asked = rest::asked(&Bytes::copy_from_slice(body), json_length);
    asked.is_ok_and(|asked| are_rows(model, asked.request))
}

/// The same as it comes over gRPC.
#[must_use]
pub fn grpc(model: &Model, message: &[u8]) -> bool {
    let request = codec::decode(Bytes::copy_from_slice(message));
    let request = request.and_then(grpc::request_of);
    request.is_ok_and(|request| are_rows(model, request))
}

fn are_rows(model: &Model, request: Request) -> bool {
    let Ok(schema) = Schema::of(model) else {
        return false;
    };
    schema.requested(&request.outputs).is_ok() && schema.columns(request.inputs, MAX_ROWS).is_ok()
}
