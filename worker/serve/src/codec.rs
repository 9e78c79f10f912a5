//! How inference requests are read from gRPC: as everywhere, but their tensors are counted before
//! there is room made for them. An empty tensor is two bytes on the wire and some hundred in memory.

use std::{pin::Pin, sync::Arc};

use bytes::{Buf as _, Bytes};
use emberline_proto::inference::{
    ModelInferRequest, ModelInferResponse, grpc_inference_service_server::GrpcInferenceService,
};
use http::{Request, Response};
use prost::{
    Message as _,
    encoding::{DecodeContext, decode_key, skip_field},
};
use tonic::{
    Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder},
    server::{Grpc, UnaryService},
};
use tonic_prost::ProstCodec;

use crate::{body::Metered, error::InferError, grpc::Inference, server::Inner};

/// The path of the one method that takes tensors.
pub(crate) const MODEL_INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
/// Tensors, requested outputs and raw contents of one request: as many columns as a table may have,
/// each with its contents, and some more.
const MAX_PARTS: usize = 10_000;

/// Reads requests, and writes answers.
#[derive(Debug, Default)]
struct InferCodec(ProstCodec<ModelInferResponse, ModelInferRequest>);

/// Reads requests.
#[derive(Debug)]
struct InferDecoder;

impl Codec for InferCodec {
    type Encode = ModelInferResponse;
    type Decode = ModelInferRequest;
    type Encoder = <ProstCodec<ModelInferResponse, ModelInferRequest> as Codec>::Encoder;
    type Decoder = InferDecoder;

    fn encoder(&mut self) -> Self::Encoder {
        self.0.encoder()
    }

    fn decoder(&mut self) -> InferDecoder {
        InferDecoder
    }
}

impl Decoder for InferDecoder {
    type Item = ModelInferRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        let request = decode(buffer.copy_to_bytes(buffer.remaining()));
        request.map(Some).map_err(Into::into)
    }
}

/// A request from its message.
pub(crate) fn decode(message: Bytes) -> Result<ModelInferRequest, InferError> {
    let parts = count_parts(message.clone()).and_then(|parts| {
        if parts > MAX_PARTS {
            return Err(format!(
                "the request has {parts} tensors and outputs, more than {MAX_PARTS}"
            ));
        }
        let request = ModelInferRequest::decode(message);
        request.map_err(|e| format!("the message is no ModelInferRequest: {e}"))
    });
    parts.map_err(|why| InferError::bad("message", why))
}

/// Fields of the outermost message that repeat.
fn count_parts(mut message: Bytes) -> Result<usize, String> {
    let mut parts = 0;
    while message.has_remaining() {
        let skipped = decode_key(&mut message).and_then(|(tag, wire_type)| {
            // Parameters, inputs, outputs, raw contents.
            parts += usize::from((4..=7).contains(&tag));
            skip_field(wire_type, tag, &mut message, DecodeContext::default())
        });
        skipped.map_err(|e| format!("the message is no ModelInferRequest: {e}"))?;
    }
    Ok(parts)
}

struct ModelInfer(Inference);

impl UnaryService<ModelInferRequest> for ModelInfer {
    type Response = ModelInferResponse;
    type Future =
        Pin<Box<dyn Future<Output = Result<tonic::Response<ModelInferResponse>, Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<ModelInferRequest>) -> Self::Future {
        let inference = self.0.clone();
        Box::pin(async move { inference.model_infer(request).await })
    }
}

/// Answers `ModelInfer`.
pub(crate) async fn model_infer(inner: &Arc<Inner>, request: Request<Metered>) -> Response<Body> {
    let most = inner.config.limits.max_request_bytes;
    let mut grpc = Grpc::new(InferCodec::default()).apply_max_message_size_config(Some(most), None);
    let method = ModelInfer(Inference(Arc::clone(inner)));
    grpc.unary(method, request).await
}

#[cfg(test)]
mod tests {
    use emberline_proto::inference::model_infer_request::InferInputTensor;

    use super::*;

    #[test]
    fn the_parts_of_a_request_are_counted_without_reading_them() {
        let request = ModelInferRequest {
            model_name: "m".to_owned(),
            inputs: vec![InferInputTensor::default(); 3],
            raw_input_contents: vec![Bytes::from_static(b"abc"); 2],
            ..ModelInferRequest::default()
        };
        let bytes = Bytes::from(request.encode_to_vec());
        assert_eq!(count_parts(bytes.clone()), Ok(5));
        assert!(count_parts(bytes.slice(..bytes.len() - 1)).is_err());
        assert_eq!(count_parts(Bytes::new()), Ok(0));
    }
}
